"""A diagnosis of a tiny model: what is in it, that it can be made again, and that files are whole or not there."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from test_decoder import BASE, make_model
from tiny import VOCABULARY, padded, random_corpus, word_tokenizer, words

from loopdiag import diagnosis as module
from loopdiag import interventions, plots
from loopdiag.corpus import TOKEN_CLASSES, Corpus, CorpusError, Document
from loopdiag.diagnosis import Diagnosis, DiagnosisError, diagnose, matched_tokens
from loopdiag.errors import InputError
from loopdiag.gaincost import gain_cost, recommend
from loopdiag.gaincost.answer import answer, dumps, loop_rows
from loopdiag.interventions import Effects
from loopdiag.measures import DEFAULT_GROUPS, DEFINITIONS, GROUPS, chosen, dimensions, is_by_loop, take
from loopdiag.measures.attention import AttentionMeasures
from loopdiag.measures.exit_rules import ORACLE, RULES, thresholds
from loopdiag.measures.prediction import exits
from loopdiag.results import weights_hash
from loopdiag.trace import ForeignModel, LoopTrace, record

CORPUS = random_corpus()
QUICK = [group for group in DEFAULT_GROUPS if group != "readouts"]
BRANCHES = ("_global", "_local", "_window")
ATTENTION = {name for group in ("attention", "attention_pairs", "heads") for name in GROUPS[group]}
# The first kept loop, 0 the start, that has a number; measures that are not named here are of no loop.
FROM_LOOP = {
    **dict.fromkeys(("nll_exit", "nll_usable", "rank", "entropy", "effective_rank", "effective_rank_centred"), 0),
    **dict.fromkeys(("log_rank", "confidence", "accuracy", "settled", "participation_ratio", "hsic"), 0),
    **dict.fromkeys(("nll_lens", "effective_rank_by_tokens", *GROUPS["pooled"], "noise_nll", "nll_by_class"), 0),
    **dict.fromkeys(("token_nll", "token_top"), 0),
    **dict.fromkeys(("gain", "cost", "output_shift", "output_shift_reverse", "output_shift_js"), 1),
    **dict.fromkeys(("step_size", "relative_step", "state_cosine", "radial_share", "changed", "fixed", "broken"), 1),
    **dict.fromkeys((*GROUPS["fixed_point"], "noise_step", "noise_shift", "gain_by_class", "cost_by_class"), 1),
    **dict.fromkeys(("exit_probability", "hsic_layers"), 1),
    **dict.fromkeys(("acceleration", "breadth"), 2),
    **dict.fromkeys(("cos_update", "cos_reference", "omega", "omega_relative", "omega_random", "withheld"), 2),
    **{name: 2 if name.endswith(BRANCHES) or name.startswith("gate_") else 1 for name in ATTENTION},
    **{name: 3 if name.endswith("_local") else 2 for name in ATTENTION if "_kl" in name},
}
# What a Parallel Loop Transformer has nothing of.
NOT_OF_PLT = {"nll_lens", "exit_probability"}
TEXTS = {"token_text", "token_top"}


def where_defined(values, exit_gate=False, loops=3):
    """Where a measure of documents of words must have a number, and nowhere else: by definition, not by its values."""
    there = xr.ones_like(values, dtype=bool)
    name = values.name

    def places(dim):
        return xr.DataArray(np.arange(values.sizes[dim]), dims=dim)

    if name == "motion_label":
        there &= loops >= 3
    if "loop" in values.dims:
        there &= places("loop") >= FROM_LOOP[name]
    if name == "hsic_layers":
        there &= places("loop_b") >= 1
    if "shown" in values.dims:
        lengths = {document.name: len(document.text.split()) for document in CORPUS.report}
        ends = [lengths[name] for name in values["shown"].values.tolist()]
        there &= places("token") < xr.DataArray(ends, dims="shown")
    if name in ("token_nll", "token_top"):
        there &= places("token") >= 1
    if "pairs" in name:
        there &= (places("loop_b") < places("loop")) & (places("loop_b") >= (2 if name.endswith("_local") else 1))
    if name.startswith("noise"):
        there &= places("document") < module.NOISE_DOCUMENTS
    if name.endswith("_by_class"):  # a word of the tests is a letter and digits
        there &= values["token_class"] == "piece"
    if name.startswith("exit_rule"):
        swept = values["exit_rule_threshold"].notnull() & ((values["rule"] != "gate") | exit_gate)
        there &= swept | ((values["rule"] == "oracle") & (places("setting") == 0))
    return there


def is_there(values):
    """Where a number is finite, or a text is one."""
    return (values != "" if values.name in TEXTS else np.isfinite(values)).drop_attrs()


def make_readable(**changes):
    """A model as `load` gives it: with a tokenizer and without gradients."""
    model = make_model(**{"dtype": torch.float32, **changes}).requires_grad_(False)
    model.tokenizer = word_tokenizer()
    return model


MODEL = make_readable()


@pytest.fixture(scope="module")
def whole():
    """A diagnosis with everything in it."""
    return diagnose(MODEL, CORPUS, n_loops=4, measures=["all"])


@pytest.fixture(scope="module")
def quick():
    """A diagnosis without readouts."""
    return diagnose(MODEL, CORPUS, measures=QUICK)


@pytest.fixture(scope="module")
def small():
    """A diagnosis of the motion alone: a small file."""
    return diagnose(MODEL, CORPUS, measures=["motion"])


def corpus_of(*texts, fit=CORPUS.fit):
    """A corpus that reports on these texts."""
    return Corpus("made here", fit, tuple(Document(text, f"text {i}", f"source {i}") for i, text in enumerate(texts)))


# -- what is in it ----------------------------------------------------------------------------------


def test_dimensions_and_names(whole):
    """Every measure by its dimensions, each with its coordinate; documents and sources in their order."""
    data = whole.data
    assert set(data.data_vars) == set(DEFINITIONS) - NOT_OF_PLT
    for name, values in data.data_vars.items():
        assert values.dims == dimensions(name, values.ndim), name
        assert ("loop" in values.dims) == (name in FROM_LOOP), name
        assert values.dtype == (object if name in TEXTS else np.float64), name
        assert is_by_loop(name) == (set(values.dims) <= {"document", "loop", "layer", "head"} and "loop" in values.dims)
    sizes = {"document": 5, "loop": 5, "layer": 2, "head": 4, "loop_b": 5, "layer_b": 2, "token_class": 6}
    sizes |= {"shown": 4, "token": max(len(document.text.split()) for document in CORPUS.report)}
    assert dict(data.sizes) == sizes | {"rule": 8, "setting": 10, "position": 6, "tokens": 2}
    assert data["document"].values.tolist() == [document.name for document in CORPUS.report]
    assert data["source"].dims == ("document",)
    assert data["source"].values.tolist() == [document.source for document in CORPUS.report]
    assert data["loop"].values.tolist() == data["loop_b"].values.tolist() == [0, 1, 2, 3, 4]
    assert data["tokens"].values.tolist() == [16, whole.provenance["rank_tokens"]]
    assert data["position"].values.tolist() == [0, 1, 2, 4, 8, 16]  # documents have up to 30 tokens
    assert data["token_class"].values.tolist() == list(TOKEN_CLASSES)
    assert data["rule"].values.tolist() == [*RULES, ORACLE]
    np.testing.assert_array_equal(data["exit_rule_threshold"], thresholds())
    assert whole.loops.tolist() == [1, 2, 3, 4]


def test_every_number_says_what_it_is(whole):
    """Unit, state and a name to read, and nothing else, on every variable."""
    for name, values in whole.data.data_vars.items():
        assert set(values.attrs) == {"units", "state", "long_name"}, name
        assert tuple(values.attrs[key] for key in ("units", "state", "long_name")) == DEFINITIONS[name]
        states = ("Y", "Z", "N(Y)", "Y, N(Y)", "N(resid_post)", "layer input", "attention", "tokens")
        assert values.attrs["state"] in states


def test_undefined_is_nan_and_nothing_else_is(whole):
    """The first loops of what looks back, pairs that are none, thresholds that a rule has not; all else is finite."""
    for values in whole.data.values():
        xr.testing.assert_equal(is_there(values), where_defined(values).drop_attrs())


def test_numbers_are_those_of_each_document(quick):
    """Batches change nothing and no document is lost or swapped. Measured: 2e-6 of at most 23."""
    for index, document in enumerate(CORPUS.report):
        batch = padded([MODEL.tokenizer(document.text)["input_ids"]])
        attention = AttentionMeasures(["attention"])
        taken = take(record(MODEL, batch, on_attention=attention), QUICK, quick.provenance["rank_tokens"], 30)
        taken |= attention.result()
        assert set(taken) == set(quick.data)
        for name, expected in taken.items():
            if name != "hsic":
                np.testing.assert_allclose(quick.data[name][index], expected[0], rtol=0, atol=5e-5, err_msg=name)
        np.testing.assert_allclose(quick.data["hsic"][index], taken["hsic"][0], rtol=1e-4)  # in squares of squares


def test_the_loss_is_that_of_the_model(quick):
    """nll_exit of the last loop is what the model calls its loss. Measured: 1e-6."""
    for index, document in enumerate(CORPUS.report):
        batch = padded([MODEL.tokenizer(document.text)["input_ids"]])
        loss = MODEL(batch.input_ids, return_type="loss").item()
        assert quick.data["nll_exit"][index, -1].item() == pytest.approx(loss, abs=1e-5)


def test_provenance(whole):
    """What is needed to make the same numbers again, as one JSON string."""
    about = whole.provenance
    assert about == json.loads(whole.data.attrs["provenance"])
    config = vars(BASE)
    expected = {
        "schema": 3,
        "model": "a model made here",
        "weights_sha256": weights_hash(MODEL),
        "config": config,
        "trained_loops": 3,
        "run_loops": 4,
        "measured_loops": [1, 2, 3, 4],
        "measures": list(GROUPS),
        "absent": {
            "nll_lens": "no coda stands before the head, so exits are the plain logit lens",
            "exit_probability": "the model has no exit gate",
        },
        "corpus": "random words",
        "corpus_sha256": CORPUS.fingerprint,
        "documents": 5,
        "documents_fit": 6,
        "documents_cut": 0,
        "documents_too_short": 0,
        "tokens": sum(len(document.text.split()) - 1 for document in CORPUS.report),
        "max_tokens": 64,
        "rank_tokens": min(len(document.text.split()) for document in CORPUS.report),
        "seed": 0,
        "batch_size": 8,
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    assert {key: about[key] for key in expected} == expected
    assert {"loopdiag", "python", "torch", "transformers", "transformer-lens", "numpy"} <= set(about["versions"])
    assert str(about["documents"]) in repr(whole)
    assert "trained with 3 loops, run with 4" in repr(whole)


def test_what_was_not_taken_is_left_out(quick):
    """The variables of the groups that were asked for, and without gates no gate."""
    names = {name for group in QUICK for name in GROUPS[group]} - NOT_OF_PLT
    assert set(quick.data) == names
    ungated = diagnose(make_readable(memory="own"), CORPUS, measures=QUICK, n_loops=1)
    assert set(ungated.data) == names - set(WITHOUT["gate"]) - {"attention_kl"}
    assert ungated.loops.tolist() == [1]


# -- what a model does not have ---------------------------------------------------------------------

NO_READOUTS = "the group readouts was not asked for"
NO_PREDICTIONS = "the trace has no head or no tokens"
NO_OFFSET = "the model has no cross-loop position offset"
NO_GATE = "no loop of this run blends attention, so there is no gate and one map"
NO_CODA = "no coda stands before the head, so exits are the plain logit lens"
NO_EXIT_GATE = "the model has no exit gate"
NOT_CAPTURED = "attention was not captured, or the run has too few loops"
NOT_OURS = "only models of this toolkit can be run again for it"
PREDICTIONS = (
    "nll_exit",
    "gain",
    "cost",
    *("rank", "log_rank", "confidence", "entropy"),
    *("accuracy", "changed", "fixed", "broken", "settled", "breadth"),
    *(f"output_shift{end}" for end in ("", "_reverse", "_js")),
)
WITHOUT = {
    "offset": dict.fromkeys(("omega", "omega_relative", "omega_random", "withheld"), NO_OFFSET),
    "gate": {name: NO_GATE for name in ATTENTION if name.startswith("gate_") or name.endswith(BRANCHES)},
    "coda": {"nll_lens": NO_CODA},
    "exit gate": {"exit_probability": NO_EXIT_GATE},
}
HUGINN = {"initial_state": "random", "injection": "concat", "n_prelude": 1, "n_coda": 1, "norm_before_coda": True}
HUGINN |= {"offset": 0, "memory": "own", "norms": "pre_post", "norm_between_loops": False}
KINDS = {  # settings, and the parts that a model with them does not have
    "plt": ({}, ["coda", "exit gate"]),
    "plain": ({"offset": 0, "memory": "own", "injection": "none"}, ["offset", "gate", "coda", "exit gate"]),
    "ungated": ({"memory": "own"}, ["gate", "coda", "exit gate"]),
    "unshifted": ({"offset": 0}, ["offset", "coda", "exit gate"]),
    "ouro": ({"offset": 0, "memory": "own", "exit_gate": True}, ["offset", "gate", "coda"]),
    "huginn": (HUGINN, ["offset", "gate", "exit gate"]),
    "everything": ({"n_coda": 1, "exit_gate": True}, []),
}


def lacking(parts, groups):
    """What is absent, with its reason, of a model that lacks these parts."""
    reasons = {name: why for part in parts for name, why in WITHOUT[part].items()}
    absent = {}
    for group, names in GROUPS.items():
        for name in names:
            if group not in groups:
                absent[name] = f"the group {group} was not asked for"
            elif name in reasons:
                absent[name] = reasons[name]
    return absent


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        *((kind, QUICK) for kind in KINDS),
        *((kind, list(GROUPS)) for kind in KINDS if kind not in ("ungated", "unshifted")),
    ],
)
def test_what_a_model_lacks_is_absent(kind, groups):
    """Each measure is there, with numbers where it is defined, or absent with its reason: never both, never neither.

    Said in the provenance and in the JSON, whose rows have null for what was asked for.
    """
    changes, lacks = KINDS[kind]
    made = diagnose(make_readable(**changes), CORPUS, measures=groups)
    absent = lacking(lacks, groups)
    assert made.provenance["absent"] == absent
    assert made.provenance["measures"] == groups
    assert set(made.data) == set(DEFINITIONS) - set(absent)
    for name, values in made.data.items():
        assert values.dims == dimensions(name, values.ndim), name
        defined = where_defined(values, exit_gate="exit gate" not in lacks)
        xr.testing.assert_equal(is_there(values), defined.drop_attrs())
    told = json.loads(dumps(answer(made, recommend(made))))
    assert told["absent"] == absent
    asked = {name for group in groups for name in GROUPS[group] if is_by_loop(name)}
    assert asked <= set(told["loops"][0])
    assert {name for name in asked if all(row[name] is None for row in told["loops"])} == asked & set(absent)


@pytest.mark.parametrize(("kind", "loops"), [("plt", 1), ("plt", 2), ("everything", 1)])
def test_runs_of_few_loops(kind, loops):
    """What looks back further than the run goes is NaN or absent with a reason, and nothing fails."""
    changes, lacks = KINDS[kind]
    made = diagnose(make_readable(**changes), CORPUS, n_loops=loops, measures=["all"])
    absent = made.provenance["absent"]
    known = lacking([*lacks, "gate"] if loops == 1 else lacks, GROUPS)
    beyond = set(absent) - set(known)
    assert {name: absent[name] for name in known} == known
    assert beyond <= {name for name in ATTENTION if "_kl" in name}
    assert {absent[name] for name in beyond} <= {NOT_CAPTURED}
    assert set(made.data) == set(DEFINITIONS) - set(absent)
    for values in made.data.values():
        defined = where_defined(values, exit_gate="exit gate" not in lacks, loops=loops)
        xr.testing.assert_equal(is_there(values), defined.drop_attrs())


def test_a_run_of_one_loop_does_not_deny_the_gate():
    """What one loop does not use is not what the model does not have."""
    made = diagnose(MODEL, CORPUS, measures=QUICK, n_loops=1)
    assert "of this run" in made.provenance["absent"]["gate_mean"]


def test_measures_that_must_be_there(quick):
    """`require` lets pass what was measured and says why another was not, with the name of the model."""
    quick.require()
    quick.require("nll_exit", "omega")
    with pytest.raises(
        DiagnosisError, match=rf"diagnosis of a model made here has no exit_probability: {NO_EXIT_GATE}\."
    ):
        quick.require("nll_exit", "exit_probability")
    with pytest.raises(DiagnosisError, match=rf"has no withheld: {NO_READOUTS}"):
        quick.require("withheld")
    with pytest.raises(DiagnosisError, match="has no loudness: it was not measured"):
        quick.require("loudness")


# -- a random initial state -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_matter_to_a_random_start(batch_size):
    """Every document starts from the same draw, wherever it stands. Measured: 2e-6 of at most 21."""
    model = make_readable(**HUGINN)
    one, other = (diagnose(model, CORPUS, measures=QUICK, batch_size=size) for size in (8, batch_size))
    xr.testing.assert_allclose(other.data.drop_attrs(), one.data.drop_attrs(), rtol=1e-5, atol=1e-5)


def test_the_seed_draws_the_start():
    """The same seed is the same diagnosis, to the bit and with readouts; another one moves every measure of it.

    A model that starts from its embedding has nothing to draw: only the fits know the seed.
    """
    model = make_readable(**HUGINN)
    first, again, other = (diagnose(model, CORPUS, seed=seed, measures=["all"]) for seed in (3, 3, 4))
    xr.testing.assert_identical(again.data, first.data)
    assert first.provenance["seed"] == 3
    for name in set(first.data) - {"motion_label", "class_share", "token_text"}:  # of three values; of the text
        assert not other.data[name].equals(first.data[name]), name
    first, other = (diagnose(MODEL, CORPUS, seed=seed, measures=QUICK) for seed in (3, 4))
    for name in first.data:
        assert other.data[name].equals(first.data[name]), name


# -- models that are not ours -----------------------------------------------------------------------


def foreign(record, model=MODEL, **changes):
    """A foreign model around a model of ours."""
    settings = {"tokenizer": model.tokenizer, "trained_loops": model.cfg.n_loops, "n_ctx": model.cfg.n_ctx}
    return ForeignModel(record, **(settings | changes))


def captured(model, batch, n_loops):
    """A run seen from outside: plain forward hooks of torch on the modules, not a hook point among them."""
    with torch.no_grad():
        outputs = []
        first, last = model.blocks[0], model.blocks[-1]
        handles = [
            first.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0])),
            last.register_forward_hook(lambda module, inputs, output: outputs.append(output[0])),
        ]
        model(batch.input_ids, batch.attention_mask, n_loops=n_loops)
        for handle in handles:
            handle.remove()
        states = outputs[1::2]
        return LoopTrace.from_states(
            outputs[0],
            states,
            model.unembed,
            norm=model.ln_final,
            input_ids=batch.input_ids,
            mask=batch.attention_mask,
            carry=[model.ln_final(state) for state in states],
            offset=model.cfg.offset,
        )


@pytest.mark.parametrize("kind", ["plt", "ouro", "huginn", "everything"])
def test_a_model_of_ours_as_a_foreign_one(kind):
    """The same states, the same numbers to the bit, readouts and all; what is not known of it is null."""
    model = make_readable(**KINDS[kind][0])
    ours = diagnose(model, CORPUS, n_loops=4, seed=5)
    theirs = diagnose(foreign(lambda batch, n: record(model, batch, n, seed=5), model), CORPUS, n_loops=4, seed=5)
    seen = [name for name in ours.data if name.startswith("attention_")]  # while the model runs
    expected = ours.data.drop_vars(seen).drop_attrs(deep=False)
    xr.testing.assert_identical(theirs.data.drop_attrs(deep=False), expected)
    unknown = {"weights_sha256": None, "config": None, "dtype": None, "device": None}
    absent = ours.provenance["absent"] | dict.fromkeys(seen, NOT_CAPTURED)
    assert theirs.provenance == ours.provenance | unknown | {"model": "a model of another kind", "absent": absent}


def test_states_captured_by_plain_hooks():
    """Y, Z, norm, head and tokens are enough for every number of the model but the gate's, which states do not have."""
    ours = diagnose(MODEL, CORPUS, n_loops=4)
    theirs = diagnose(foreign(lambda batch, n: captured(MODEL, batch, n)), CORPUS, n_loops=4)
    of_attention = {name: WITHOUT["gate"].get(name, NOT_CAPTURED) for name in GROUPS["attention"]}
    assert theirs.provenance["absent"] == ours.provenance["absent"] | of_attention
    expected = ours.data.drop_vars(GROUPS["attention"]).drop_vars("position").drop_attrs(deep=False)
    xr.testing.assert_identical(theirs.data.drop_attrs(deep=False), expected)


class Toy(torch.nn.Module):
    """An embedding, one linear map and tanh looped, a head: a looped model of three lines."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.block = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(self, ids, n_loops):
        h = self.embed(ids)
        for _ in range(n_loops):
            h = torch.tanh(self.block(h))
        return self.head(h)


@pytest.fixture(scope="module")
def toy():
    """A toy with weights of its own, and how it is recorded: a forward hook on the block that loops."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Toy()

    def run(batch, n_loops):
        states = []
        handle = net.block.register_forward_hook(lambda module, inputs, output: states.append(torch.tanh(output)))
        with torch.no_grad():
            net(batch.input_ids, n_loops)
        handle.remove()
        start, mask = net.embed(batch.input_ids).detach(), batch.attention_mask
        return LoopTrace.from_states(start, states, net.head, input_ids=batch.input_ids, mask=mask)

    return net, ForeignModel(run, word_tokenizer(), trained_loops=2, n_ctx=40, source="a toy")


def test_a_toy_end_to_end(toy, tmp_path):
    """From a plain module to both answers, the curve, the JSON and a file; what states cannot say is absent."""
    net, model = toy
    corpus = random_corpus(fit=8, report=12)
    corpus = replace(corpus, report=tuple(replace(d, source=d.name) for d in corpus.report))
    made = diagnose(model, corpus, n_loops=4)
    about = made.provenance
    expected = {"model": "a toy", "trained_loops": 2, "run_loops": 4, "max_tokens": 40, "config": None}
    assert {key: about[key] for key in expected} == expected
    not_captured = dict.fromkeys(GROUPS["attention"], NOT_CAPTURED)
    assert about["absent"] == not_captured | lacking(KINDS["plain"][1], DEFAULT_GROUPS)
    for index, document in enumerate(corpus.report):  # the loss of the module itself. Measured: 5e-7
        ids = torch.tensor([model.tokenizer(document.text)["input_ids"]])
        for loops in (1, 4):
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(net(ids, loops)[0, :-1], ids[0, 1:]).item()
            assert made.data["nll_exit"][index, loops].item() == pytest.approx(loss, abs=1e-5)
    recommendation = recommend(made)
    assert set(recommendation.support) == {1, 2, 3, 4}
    assert "Run a toy (trained with 2)" in str(recommendation)
    curve = gain_cost(made)
    assert (curve.model, curve.trained_loops, curve.documents) == ("a toy", 2, 12)
    told = json.loads(dumps(answer(made, recommendation)))
    assert [row["extrapolated"] for row in told["loops"]] == [False, False, True, True]
    assert told["provenance"]["weights_sha256"] is None
    made.save(tmp_path / "toy.nc")
    again = Diagnosis.load(tmp_path / "toy.nc")
    xr.testing.assert_identical(again.data, made.data)
    assert answer(again, recommend(again)) == answer(made, recommendation)


def test_figures_of_a_toy(toy):
    """Every figure can be drawn of a model whose configuration is not known."""
    import matplotlib.pyplot as plt

    made = diagnose(toy[1], CORPUS, measures=QUICK)
    plt.switch_backend("agg")
    try:
        plots.hidden_states(made)
    finally:
        plt.close("all")


def test_how_many_loops_unless_told(toy):
    """The trained number, as for a model of ours; and the documents that its context allows."""
    assert diagnose(toy[1], CORPUS, measures=QUICK).loops.tolist() == [1, 2]
    short = replace(toy[1], n_ctx=20)
    assert diagnose(short, CORPUS, measures=QUICK).provenance["max_tokens"] == 20
    # A model may be made for far more than a batch of documents should hold: then at most 2,048 unless told.
    long = replace(short, n_ctx=10**6)
    assert diagnose(long, CORPUS, measures=QUICK).provenance["max_tokens"] == 2048
    assert diagnose(long, CORPUS, measures=QUICK, max_tokens=5000).provenance["max_tokens"] == 5000
    with pytest.raises(DiagnosisError, match="max_tokens = 21 is beyond this model, which was made for 20"):
        diagnose(short, CORPUS, max_tokens=21)
    with pytest.raises(DiagnosisError, match="no tokenizer"):
        diagnose(replace(short, tokenizer=None), CORPUS)
    for loops in (0, -1, True, 2.0, "2"):
        with pytest.raises(ValueError, match=r"n_loops = .* is not allowed: it must be an integer >= 1"):
            diagnose(short, CORPUS, n_loops=loops)


@pytest.fixture(scope="module")
def headless(toy):
    """A diagnosis of states alone."""

    def run(batch, n_loops):
        return replace(toy[1].record(batch, n_loops), head=None)

    return diagnose(replace(toy[1], record=run), CORPUS, measures=QUICK)


def test_states_alone_are_measured(headless):
    """Motion and rank need no predictions; each of those is absent with the reason."""
    assert set(headless.data) == {
        *("step_size", "relative_step", "radial_share", "acceleration", "state_cosine"),
        *("cos_update", "cos_reference", "effective_rank", "effective_rank_centred", "participation_ratio"),
        *("motion_label", "hsic"),
    }
    absent = headless.provenance["absent"]
    assert set(absent) == set(DEFINITIONS) - set(headless.data)
    assert {name: absent[name] for name in PREDICTIONS} == dict.fromkeys(PREDICTIONS, NO_PREDICTIONS)


def test_without_predictions_there_is_nothing_to_recommend(headless):
    """Refused with the model and the reason, as wrong input, by all that rests on the NLL."""
    for of in (recommend, gain_cost, lambda made: loop_rows(made, 0)):
        with pytest.raises(InputError, match=rf"diagnosis of a toy has no nll_exit: {NO_PREDICTIONS}"):
            of(headless)


def test_states_alone_cannot_be_read_out(toy):
    """Readouts are asked for by default, and left out with the reason."""

    def run(batch, n_loops):
        return replace(toy[1].record(batch, n_loops), head=None)

    made = diagnose(replace(toy[1], record=run), CORPUS)
    assert "nll_usable" not in made.data
    assert made.provenance["absent"]["nll_usable"].startswith("the trace has no head or no tokens")


def test_a_model_that_runs_other_loops_than_it_is_asked_for(toy):
    """Refused with the first batch, and not after all of them."""
    other = replace(toy[1], record=lambda batch, n_loops: toy[1].record(batch, n_loops + 1))
    with pytest.raises(DiagnosisError, match="was asked for 3 loops, and recorded 4"):
        diagnose(other, CORPUS, n_loops=3, measures=QUICK)


def test_states_of_a_coda_alone(toy):
    """Left out is said to be left out, for the lens, too."""

    def run(batch, n_loops):
        trace = toy[1].record(batch, n_loops)
        return replace(trace, head=None, coda=trace.raw)

    made = diagnose(replace(toy[1], record=run), CORPUS, measures=QUICK)
    assert made.provenance["absent"]["nll_lens"] == NO_PREDICTIONS


def test_every_group_on_a_model_that_is_not_ours(toy):
    """What states alone give is taken, the rest says what it would need."""
    made = diagnose(toy[1], CORPUS, measures=["all"])
    absent = made.provenance["absent"]
    for group in ("layers", "fixed_point", "noise"):
        assert {absent[name] for name in GROUPS[group]} == {NOT_OURS}
    for group in ("attention_pairs", "heads"):
        assert {absent[name] for name in GROUPS[group]} == {NO_GATE, NOT_CAPTURED}
    for group in ("rarefaction", "pooled", "tokens", "classes", "exit_rules"):
        assert set(GROUPS[group]) <= set(made.data), group
    for values in made.data.values():
        xr.testing.assert_equal(is_there(values), where_defined(values, loops=2).drop_attrs())


def test_no_loops_are_left_out_of_a_foreign_run(toy):
    """It records all that it runs: to keep some is refused, not ignored."""
    with pytest.raises(DiagnosisError, match="at is for models of this toolkit"):
        diagnose(toy[1], CORPUS, at=[1, 2])


# -- what is asked for ------------------------------------------------------------------------------


def test_groups_by_name():
    """In the order of `GROUPS`, each once; `default` and `all` stand for several, and others are refused by name."""
    assert chosen(["all"]) == tuple(GROUPS)
    assert chosen(["default"]) == DEFAULT_GROUPS
    assert chosen(["heads", "motion", "heads"]) == ("motion", "heads")
    assert chosen(["pooled", "default"]) == tuple(group for group in GROUPS if group in {*DEFAULT_GROUPS, "pooled"})
    for wrong, what in ((["motion", "emotion"], "emotion"), ([], "none were given"), (["nll_exit"], "nll_exit")):
        with pytest.raises(InputError, match=f"Unknown measures: {what}. Allowed are default, all, and the groups"):
            chosen(wrong)
    with pytest.raises(InputError, match="Unknown measures: emotion"):
        diagnose(MODEL, CORPUS, measures=["emotion"])


def test_every_measure_is_defined_once():
    """In one group, with a unit, a state and a meaning that fit on a line, and dimensions that begin as they should."""
    assert sum(len(names) for names in GROUPS.values()) == len(DEFINITIONS)
    for name, (unit, state, said) in DEFINITIONS.items():
        assert unit, name
        assert state, name
        assert 0 < len(said) <= 100, name
        assert dimensions(name, 2)[0] in ("document", "loop", "rule", "shown"), name
        assert is_by_loop(name) == (
            set(dimensions(name, 4)) <= {"document", "loop", "layer", "head"} and name in FROM_LOOP
        )
    assert set(DEFAULT_GROUPS) <= set(GROUPS)


def test_every_measure_is_documented():
    """Each group and each measure by its name, but for the branches of a map, which follow its own."""
    text = (Path(module.__file__).parents[1] / "docs" / "measures.md").read_text(encoding="utf-8")
    for group, names in GROUPS.items():
        assert f"`{group}`" in text, group
        for name in names:
            of = name.removesuffix("_global").removesuffix("_local")
            assert f"`{of}`" in text, name


# What takes each group, wherever it is called from.
TAKERS = {
    "prediction": ["prediction.averaged"],
    "readouts": ["diagnosis.fit_readouts"],
    "motion": ["motion.step_size", "motion.cos_reference", "motion.label"],
    "diversity": ["similarity.loop_hsic"],
    "pooled": ["diagnosis.PooledRank"],
    "layers": ["diagnosis.LayerSimilarity"],
    "fixed_point": ["diagnosis.with_maps", "motion.fixed_point_gap", "motion.fixed_point_gap_layers"],
    "noise": ["diagnosis.higher_precision", "motion.noise_step", "prediction.noise"],
    "tokens": ["diagnosis.by_token"],
    "classes": ["diagnosis.token_classes", "prediction.by_class"],
    "exit_rules": ["exit_rules.trade_off"],
    "offset": ["offset.omega", "offset.omega_random"],
    "attention": ["attention.gate_mean", "attention.gate_by_position"],
    "heads": ["attention.head_cosine", "attention.head_rank"],
}
SHARED = {  # by groups, each of which needs it
    "attention.mean_under": {"attention", "attention_pairs"},
    "diversity.document_rank": {"diversity", "rarefaction"},
    "diagnosis.AttentionMeasures": {"attention", "attention_pairs", "heads"},
    "prediction.exit_series": {"prediction", "classes", "exit_rules", "noise"},
}


@pytest.mark.parametrize("asked", GROUPS)
def test_what_was_not_asked_for_is_not_computed(asked, monkeypatch):
    """Every other group's functions fail when called; and the group's own variables are there, and no others."""
    needs = {name: {group} for group, names in TAKERS.items() for name in names} | SHARED
    for name, groups in needs.items():
        if asked not in groups:
            room, _ = name.split(".")
            path = f"loopdiag.{name}" if room == "diagnosis" else f"loopdiag.measures.{name}"
            monkeypatch.setattr(path, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))
    made = diagnose(MODEL, CORPUS, measures=[asked])
    assert set(made.data) == set(GROUPS[asked]) - NOT_OF_PLT
    assert made.provenance["measures"] == [asked]


def test_each_group_alone_is_its_share_of_all(whole):
    """To the bit: groups do not feel one another."""
    for group, names in GROUPS.items():
        alone = diagnose(MODEL, CORPUS, n_loops=4, measures=[group])
        for name in set(names) - NOT_OF_PLT:
            assert alone.data[name].equals(whole.data[name]), name


def test_the_exit_rules_of_the_fit_documents():
    """Their means are those of a diagnosis that reports on them; without such documents they are absent, with why."""
    made = diagnose(MODEL, CORPUS, measures=["exit_rules"])
    swapped = diagnose(MODEL, Corpus("swapped", CORPUS.report, CORPUS.fit), measures=["exit_rules"])
    for name in ("exit_rule_loops", "exit_rule_nll"):
        assert made.data[f"{name}_fit"].dims == ("rule", "setting")
        np.testing.assert_allclose(made.data[f"{name}_fit"], swapped.data[name].mean("document"), rtol=1e-12)
    without = diagnose(MODEL, Corpus("no fit", (), CORPUS.report), measures=["exit_rules"])
    names = {"exit_rule_loops_fit", "exit_rule_nll_fit"}
    assert {without.provenance["absent"][name] for name in names} == {"the corpus has no fit documents"}
    xr.testing.assert_identical(without.data.drop_attrs(), made.data.drop_vars(names).drop_attrs())


def test_the_noise_of_a_half_precision_model():
    """The weights are afterwards what they were; the noise is far above that of a float32 model, NaN beyond a few."""
    model = make_readable(dtype=torch.bfloat16)
    before = weights_hash(model)
    made = diagnose(model, CORPUS, measures=["noise"])
    assert weights_hash(model) == made.provenance["weights_sha256"] == before
    single = diagnose(MODEL, CORPUS, measures=["noise"])
    for name in GROUPS["noise"]:
        ratio = made.data[name].mean() / single.data[name].mean()
        assert 1e3 < ratio < 1e6, name  # measured: 3e4
        assert np.isnan(made.data[name][module.NOISE_DOCUMENTS :]).all()


def test_classes_add_up_in_a_diagnosis(monkeypatch):
    """Of tokens of all classes: what is said of one, weighted by its share, sums to the whole. Measured: 2e-6."""
    monkeypatch.setattr(module, "token_classes", lambda tokenizer, size: torch.arange(size) % len(TOKEN_CLASSES))
    data = diagnose(MODEL, CORPUS, measures=["classes", "prediction"]).data
    np.testing.assert_allclose(data["class_share"].sum("token_class"), 1, rtol=1e-12)
    assert (data["class_share"].mean("document") > 0.05).all()
    for name, of in (("nll_by_class", "nll_exit"), ("gain_by_class", "gain"), ("cost_by_class", "cost")):
        weighed = (data["class_share"] * data[name]).sum("token_class", skipna=True)
        first = FROM_LOOP[of]
        np.testing.assert_allclose(weighed[:, first:], data[of][:, first:], rtol=0, atol=1e-5, err_msg=name)


# -- some of the loops ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plt", "ouro"])
def test_some_loops(kind):
    """Their numbers are coordinates, what reads one loop is that of the whole run, and what compares, of neighbours."""
    changes, lacks = KINDS[kind]
    model, at = make_readable(**changes), [1, 2, 5]
    groups = [group for group in GROUPS if group not in ("readouts", "noise")]
    some = diagnose(model, CORPUS, at=at, measures=groups)
    every = diagnose(model, CORPUS, n_loops=5, measures=groups)
    assert some.loops.tolist() == some.provenance["measured_loops"] == at
    assert some.data["loop"].values.tolist() == some.data["loop_b"].values.tolist() == [0, *at]
    assert some.provenance["run_loops"] == 5
    assert every.provenance["measured_loops"] == [1, 2, 3, 4, 5]
    for name, values in some.data.items():
        assert values.dims == dimensions(name, values.ndim), name
        if name == "motion_label":  # the last step is of three loops, the one before of one
            assert np.isnan(values).all()
        else:
            xr.testing.assert_equal(is_there(values), where_defined(values).drop_attrs())
    alike = {"nll_exit", "entropy", "rank", "accuracy", "nll_by_class", *GROUPS["offset"], *GROUPS["pooled"]}
    alike |= {"hsic", "hsic_layers", "effective_rank", "participation_ratio", *GROUPS["fixed_point"], *GROUPS["heads"]}
    alike |= {"gate_mean", "gate_by_position", *GROUPS["attention_pairs"]}
    alike |= {name for name in GROUPS["attention"] if "_kl" not in name}
    for name in alike & set(some.data):
        there = {dim: [0, *at] for dim in ("loop", "loop_b") if dim in some.data[name].dims}
        np.testing.assert_allclose(some.data[name], every.data[name].sel(there), rtol=1e-4, atol=1e-5, err_msg=name)
    for name in GROUPS["tokens"]:
        there = {"loop": [0, *at]} if name != "token_text" else {}
        assert some.data[name].equals(every.data[name].sel(there)), name
    net = (some.data["gain"] - some.data["cost"])[:, 1:]
    np.testing.assert_allclose(net, -np.diff(some.data["nll_exit"]), atol=1e-5)
    assert ("exit_probability" in every.data) == ("exit gate" not in lacks)
    assert "exit_probability" not in some.data
    assert set(every.data) - set(some.data) <= {"exit_probability", "attention_kl_local", "attention_kl_pairs_local"}


def test_readouts_of_some_loops():
    """Translators are fitted for the kept loops, and named after them."""
    made = diagnose(MODEL, CORPUS, at=[1, 3], measures=["readouts"])
    assert made.data["nll_usable"].shape == made.data["withheld"].shape == (5, 3)
    assert np.isfinite(made.data["nll_usable"]).all()
    assert np.isfinite(made.data["withheld"]).all("document").values.tolist() == [False, False, True]
    assert set(made.provenance["ridges"]) == {"exit 0", "exit 1", "exit 3", "carry 3", "shifted 3"}


@pytest.mark.parametrize("at", [[2, 3], [1, 2], [1, 3, 2], [1, 1, 3], []])
def test_loops_that_cannot_be_measured(at):
    """Refused before anything is run."""
    with pytest.raises(ValueError, match=r"at = .* is not allowed: it must be loop numbers that rise from 1"):
        diagnose(MODEL, CORPUS, n_loops=3, at=at)


# -- documents --------------------------------------------------------------------------------------


def test_documents_are_cut_counted_and_left_out():
    """Cut at what the model was made for or at max_tokens; what is shorter than 16 tokens cannot say anything."""
    text = [words(np.arange(length) % VOCABULARY) for length in (15, 16, 30, 70)]
    corpus = corpus_of(*text, fit=(*CORPUS.fit, Document(words([1]), "short", "short")))
    for max_tokens, cut, tokens in ((None, 1, 15 + 29 + 63), (20, 2, 15 + 19 + 19), (64, 1, 15 + 29 + 63)):
        made = diagnose(MODEL, corpus, max_tokens=max_tokens, measures=QUICK)
        about = made.provenance
        assert (about["documents"], about["documents_cut"], about["documents_too_short"]) == (3, cut, 2)
        assert about["tokens"] == tokens
        assert about["max_tokens"] == (max_tokens or 64)
        assert made.data["document"].values.tolist() == ["text 1", "text 2", "text 3"]
    first_tokens = diagnose(MODEL, corpus_of(*(" ".join(t.split()[:20]) for t in text)), measures=QUICK)
    made = diagnose(MODEL, corpus, max_tokens=20, measures=QUICK)
    np.testing.assert_array_equal(made.data["nll_exit"], first_tokens.data["nll_exit"])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([20, 50, 30], 20), ([16] + [99] * 8, 16), ([16] + [99] * 9, 99), ([300] * 10, 256), (range(100, 120), 102)],
)
def test_matched_tokens(lengths, expected):
    """The length that nine of ten documents have, at most 256."""
    assert matched_tokens(lengths) == expected
    assert sum(length >= expected for length in lengths) >= 0.9 * len(lengths)


def test_readouts_never_see_what_is_reported(monkeypatch):
    """While readouts are fitted only `fit` documents are run; each document of `report` is run once, after that."""
    ran = []

    def spy(model, batch, n_loops, **settings):
        ran.extend(batch.names)
        return record(model, batch, n_loops, **settings)

    monkeypatch.setattr(module, "record", spy)
    diagnose(MODEL, CORPUS)
    fit, report = ([document.name for document in half] for half in (CORPUS.fit, CORPUS.report))
    assert ran[-len(report) :] == report
    assert set(ran[: -len(report)]) == set(fit)


def test_what_is_told_on_the_way():
    """Each kind of work counts up to what it announced, and says so."""
    told = {}

    def tell(what, done, of):
        told.setdefault(what, []).append((done, of))

    diagnose(MODEL, CORPUS, batch_size=2, progress=tell, measures=["readouts", "exit_rules"])
    assert list(told) == ["fitting readouts", "exit rules", "measuring"]
    assert told["exit rules"] == [(2, 6), (4, 6), (6, 6)]
    for steps in told.values():
        done, of = zip(*steps, strict=True)
        assert list(done) == sorted(set(done))
        assert set(of) == {done[-1]}
    assert told["measuring"] == [(2, 5), (4, 5), (5, 5)]


# -- the same again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_matter(quick, batch_size):
    """Padding and neighbours change no number. Measured: 2e-6 of at most 23."""
    other = diagnose(MODEL, CORPUS, measures=QUICK, batch_size=batch_size)
    xr.testing.assert_allclose(other.data, quick.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["plt", "everything"])
def test_batches_do_not_matter_to_any_group(kind, batch_size):
    """But to the readouts, which learn batch by batch, and to the noise, which is what this test allows for."""
    groups = [group for group in GROUPS if group not in ("readouts", "noise")]
    model = make_readable(**KINDS[kind][0])
    one, other = (diagnose(model, CORPUS, measures=groups, batch_size=size).data for size in (8, batch_size))
    assert set(one) == set(other)
    for name in one:
        if name in TEXTS:
            assert other[name].equals(one[name])
        else:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=5e-5, err_msg=name)


def test_traces_are_let_go(monkeypatch):
    """However many batches there are, no more than two traces are alive: memory is that of a batch."""
    alive, most = [], []

    def spy(*args, **settings):
        most.append(sum(trace() is not None for trace in alive))
        trace = record(*args, **settings)
        alive.append(weakref.ref(trace))
        return trace

    monkeypatch.setattr(module, "record", spy)
    groups = [group for group in GROUPS if group not in ("readouts", "noise")]
    diagnose(MODEL, CORPUS, batch_size=1, measures=groups)
    assert len(alive) == len(CORPUS.fit) + len(CORPUS.report) + module.SHOWN_DOCUMENTS
    assert max(most) <= 1


def test_the_same_seed_gives_the_same_numbers(whole):
    """To the bit, readouts and provenance included; another seed is another order of the fit documents."""
    xr.testing.assert_identical(diagnose(MODEL, CORPUS, n_loops=4, measures=["all"]).data, whole.data)
    other = diagnose(MODEL, CORPUS, n_loops=4, seed=1, batch_size=2)
    again = diagnose(MODEL, CORPUS, n_loops=4, seed=2, batch_size=2)
    changed = {name for name in other.data if not other.data[name].equals(again.data[name])}
    assert changed == {"nll_usable", "withheld"}
    assert other.provenance["seed"] == 1


def test_the_hash_of_the_weights():
    """One weight, or one name, is another model; the same weights elsewhere are the same."""
    before = weights_hash(MODEL)
    assert len(before) == 64
    assert weights_hash(make_readable()) == before
    for name, weight in make_readable().state_dict().items():
        model = make_readable()
        value = model.get_parameter(name).flatten()[-1:]
        value += torch.finfo(weight.dtype).eps * value.abs().clamp_min(1)
        assert weights_hash(model) != before, name
    assert weights_hash(make_readable(dtype=torch.bfloat16)) != before
    one, other = (torch.nn.ModuleDict({name: MODEL.ln_final}) for name in ("one", "other"))
    assert weights_hash(one) != weights_hash(other)


# -- files ------------------------------------------------------------------------------------------


def test_what_is_saved_can_be_loaded(whole, tmp_path):
    """Numbers, coordinates, attributes and provenance come back; a file of that name is replaced."""
    file = tmp_path / "saved.nc"
    file.write_text("something else")
    whole.save(file)
    back = Diagnosis.load(str(file))
    xr.testing.assert_identical(back.data, whole.data)
    assert back.provenance == whole.provenance
    assert list(tmp_path.iterdir()) == [file]
    back.save(file)  # over the file that it came from
    xr.testing.assert_identical(Diagnosis.load(file).data, whole.data)


def test_a_file_is_replaced_and_not_rewritten(small, tmp_path):
    """Whoever has the older file open keeps it whole: the new one takes its name in one step."""
    file, older = tmp_path / "saved.nc", tmp_path / "older.nc"
    small.save(file)
    older.hardlink_to(file)
    newer = Diagnosis(small.data.isel(document=slice(2)))
    newer.save(file)
    xr.testing.assert_identical(Diagnosis.load(older).data, small.data)
    xr.testing.assert_identical(Diagnosis.load(file).data, newer.data)


@pytest.mark.parametrize("before", [None, "an older diagnosis"])
def test_a_save_that_fails_leaves_things_as_they_were(small, tmp_path, monkeypatch, before):
    """No half-written target, no partial file beside it, and the older file is whole; the failure is told."""
    file = tmp_path / "saved.nc"
    if before:
        file.write_text(before)

    def full_disk(self, content):
        self.write_text("half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small.save(file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([before] if before else [])


def save_other(file, small, **changes):
    """A file like a saved diagnosis but for its provenance."""
    data = small.data.copy()
    data.attrs["provenance"] = json.dumps(small.provenance | changes)
    data.to_netcdf(file, engine="h5netcdf")


def write_half(file, small):
    small.save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file, small: None, "is no file"),
        (lambda file, small: file.mkdir(), "is no file"),
        (lambda file, small: file.write_bytes(b""), "holds no diagnosis"),
        (lambda file, small: file.write_text("numbers " * 100), "holds no diagnosis"),
        (write_half, "holds no diagnosis"),
        (lambda file, small: xr.Dataset().to_netcdf(file, engine="h5netcdf"), "holds no diagnosis.*provenance"),
        (lambda file, small: save_other(file, small, schema=2), "has schema 2.*reads 3"),
        (lambda file, small: Effects(small.data).save(file), "holds no diagnosis but effects of interventions"),
    ],
    ids=["missing", "folder", "empty", "text", "half", "other_netcdf", "schema", "effects"],
)
def test_files_that_are_no_diagnosis(small, tmp_path, write, message):
    """One message with the file's name, whatever the layers below would have said."""
    file = tmp_path / "given.nc"
    write(file, small)
    with pytest.raises(DiagnosisError, match=rf"given\.nc {message}"):
        Diagnosis.load(file)


@pytest.mark.parametrize("provenance", ["[]", "null", 3])
def test_other_peoples_provenance(tmp_path, provenance):
    """An attribute of that name in somebody else's netCDF file is no failure of ours."""
    file = tmp_path / "given.nc"
    xr.Dataset(attrs={"provenance": provenance}).to_netcdf(file, engine="h5netcdf")
    with pytest.raises(DiagnosisError, match=r"given\.nc holds no diagnosis"):
        Diagnosis.load(file)


# -- what cannot be diagnosed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_tokens": 65}, DiagnosisError, "max_tokens = 65 is beyond this model, which was made for 64"),
        ({"max_tokens": 15}, CorpusError, "max_tokens 15 is out of range"),
        ({"n_loops": 0}, ValueError, "n_loops = 0 is not allowed"),
        ({"batch_size": 0}, CorpusError, "batch_size 0 is out of range"),
    ],
)
def test_wrong_arguments(changes, error, message):
    """Refused with what was given and what is allowed."""
    with pytest.raises(error, match=message):
        diagnose(MODEL, CORPUS, **changes)


def test_a_model_that_cannot_read():
    """Without a tokenizer there is nothing to measure on."""
    with pytest.raises(DiagnosisError, match="no tokenizer"):
        diagnose(make_model(), CORPUS)


def test_a_refusal_comes_before_the_model_runs(monkeypatch):
    """Wrong input is found before the expensive part."""
    monkeypatch.setattr(module, "record", lambda *args, **settings: pytest.fail("the model was run"))
    for changes in ({"max_tokens": 65}, {"max_tokens": 15}, {"n_loops": 0}):
        with pytest.raises(ValueError, match=r"max_tokens|n_loops"):
            diagnose(MODEL, CORPUS, **changes)


def test_no_tokens_at_all():
    """Zero is a number, and out of range as 15 is."""
    with pytest.raises(CorpusError, match="max_tokens 0 is out of range"):
        diagnose(MODEL, CORPUS, max_tokens=0, measures=QUICK)


def test_nothing_to_report_on():
    """A half without documents is wrong input, and said to be."""
    with pytest.raises(InputError, match="report"):
        diagnose(MODEL, corpus_of(), measures=QUICK)


def test_too_few_sources_to_fit_on():
    """Two sources, one in each half, are allowed by the corpus; that readouts need more is an error of the input."""
    fit = tuple(replace(document, source="one") for document in CORPUS.fit)
    with pytest.raises(InputError, match="at least 2 sources"):
        diagnose(MODEL, Corpus("made here", fit, CORPUS.report))


def test_nothing_to_fit_on():
    """Readouts are left out, and the reason says so."""
    made = diagnose(MODEL, Corpus("made here", (), CORPUS.report))
    assert made.provenance["absent"]["nll_usable"].endswith("the corpus has no documents to fit on")
    assert "nll_exit" in made.data


def test_rewired_loops_are_not_measured():
    """Inside an intervention that passes other loops than the configuration has, numbers would tell of others."""
    with interventions.skip_loop(MODEL, 2), pytest.raises(ValueError, match="inside skip_loop"):
        diagnose(MODEL, CORPUS, measures=QUICK)
    with interventions.clamp_gate(MODEL, 0.5):
        made = diagnose(MODEL, CORPUS, measures=["attention"])
    np.testing.assert_allclose(made.data["gate_mean"][:, 2:], 0.5)


# -- models and documents as they come --------------------------------------------------------------


def test_a_model_in_training():
    """`diagnose` asks for no gradient, so a model need not be frozen for it, and no graph may pile up."""
    model = make_readable().requires_grad_(True)
    made = diagnose(model, CORPUS, measures=QUICK)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    np.testing.assert_array_equal(made.data["nll_exit"], diagnose(MODEL, CORPUS, measures=QUICK).data["nll_exit"])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.bfloat16,
        torch.float16,
    ],
)
def test_any_precision(whole, dtype):
    """Every dtype that the command line offers; near the float32 numbers, and said to be what it is."""
    made = diagnose(make_readable(dtype=dtype), CORPUS, n_loops=4)
    assert made.provenance["dtype"] == str(dtype).removeprefix("torch.")
    # Of at most 11 nats. Measured: 0.02 in bfloat16, 0.001 in float16.
    np.testing.assert_allclose(
        made.data["nll_exit"].mean("document"), whole.data["nll_exit"].mean("document"), atol=0.1
    )
    for values in made.data.values():
        xr.testing.assert_equal(is_there(values), where_defined(values).drop_attrs())


def test_a_document_of_one_repeated_token():
    """One odd document is not the end of a long run; what has no value there is NaN."""
    made = diagnose(MODEL, corpus_of(words([3] * 20), words(range(20))), measures=QUICK)
    assert np.isnan(made.data["effective_rank_centred"][0, 0])
    assert np.isfinite(made.data["effective_rank_centred"][1]).all()


def test_the_exits_of_a_shallow_run_are_those_of_a_deep_one(quick):
    """Asking for more loops changes nothing about those before: what the decision to stop early rests on.

    But for `settled` and `breadth`, which ask what the loops after r do.
    """
    deep = diagnose(MODEL, CORPUS, measures=QUICK, n_loops=5)
    for name in exits_and_motion():
        np.testing.assert_array_equal(deep.data[name][:, :4], quick.data[name], err_msg=name)


def exits_and_motion():
    trace = record(MODEL, padded([[1, 2, 3, 4]]))
    return (
        *(set(exits(trace)) - {"settled", "breadth"}),
        *("step_size", "relative_step", "radial_share", "acceleration", "state_cosine"),
        *("cos_update", "cos_reference", "effective_rank", "participation_ratio"),
    )
