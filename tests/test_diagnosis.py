"""A diagnosis of a tiny model: what is in it, that it can be made again, and that files are whole or not there."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from test_decoder import BASE, make_model
from tiny import VOCABULARY, padded, random_corpus, word_tokenizer, words

from loopdiag import diagnosis as module
from loopdiag import plots
from loopdiag.corpus import Corpus, CorpusError, Document, TokenDocument
from loopdiag.diagnosis import DEFINITIONS, Diagnosis, DiagnosisError, diagnose, matched_tokens, measure, weights_hash
from loopdiag.errors import InputError
from loopdiag.gaincost import gain_cost, recommend
from loopdiag.gaincost.answer import answer, dumps, loop_rows
from loopdiag.measures.prediction import exits
from loopdiag.trace import ForeignModel, LoopTrace, record

CORPUS = random_corpus()
# Measures that need one or two loops before them; the others start at the embedding.
FROM_LOOP = {
    **dict.fromkeys(("nll_exit", "nll_usable", "rank", "entropy", "effective_rank", "effective_rank_centred"), 0),
    **dict.fromkeys(("log_rank", "confidence", "accuracy", "settled", "participation_ratio"), 0),
    **dict.fromkeys(("gain", "cost", "output_shift", "output_shift_reverse", "output_shift_js"), 1),
    **dict.fromkeys(("step_size", "relative_step", "state_cosine", "radial_share", "changed", "fixed", "broken"), 1),
    **dict.fromkeys(("acceleration", "breadth"), 2),
    **dict.fromkeys(("cos_update", "cos_reference", "omega", "omega_relative", "omega_random"), 2),
    **dict.fromkeys(("withheld", "gate_mean"), 2),
    "nll_lens": 0,
    "exit_probability": 1,
}
# What a Parallel Loop Transformer has nothing of.
NOT_OF_PLT = {"nll_lens", "exit_probability"}


def make_readable(**changes):
    """A model as `load` gives it: with a tokenizer and without gradients."""
    model = make_model(**{"dtype": torch.float32, **changes}).requires_grad_(False)
    model.tokenizer = word_tokenizer()
    return model


MODEL = make_readable()


@pytest.fixture(scope="module")
def whole():
    """A diagnosis with everything in it."""
    return diagnose(MODEL, CORPUS, n_loops=4)


@pytest.fixture(scope="module")
def quick():
    """A diagnosis without readouts."""
    return diagnose(MODEL, CORPUS, readouts=False)


def corpus_of(*texts, fit=CORPUS.fit):
    """A corpus that reports on these texts."""
    return Corpus("made here", fit, tuple(Document(text, f"text {i}", f"source {i}") for i, text in enumerate(texts)))


# -- what is in it ----------------------------------------------------------------------------------


def test_dimensions_and_names(whole):
    """Every measure by document and loop 0..R, gates by layer and head too; documents and sources in their order."""
    data = whole.data
    assert set(data.data_vars) == set(DEFINITIONS) - NOT_OF_PLT
    assert set(DEFINITIONS) == set(FROM_LOOP)
    for name, values in data.data_vars.items():
        expected = ("document", "loop", "layer", "head") if name == "gate_mean" else ("document", "loop")
        assert values.dims == expected, name
        assert values.dtype == np.float64, name
    assert dict(data.sizes) == {"document": 5, "loop": 5, "layer": 2, "head": 4}
    assert data["document"].values.tolist() == [document.name for document in CORPUS.report]
    assert data["source"].dims == ("document",)
    assert data["source"].values.tolist() == [document.source for document in CORPUS.report]
    assert data["loop"].values.tolist() == [0, 1, 2, 3, 4]
    assert whole.loops.tolist() == [1, 2, 3, 4]


def test_every_number_says_what_it_is(whole):
    """Unit, state and a name to read, and nothing else, on every variable."""
    for name, values in whole.data.data_vars.items():
        assert set(values.attrs) == {"units", "state", "long_name"}, name
        assert tuple(values.attrs[key] for key in ("units", "state", "long_name")) == DEFINITIONS[name]
        assert values.attrs["state"] in ("Y", "Z", "N(Y)", "layer input")


def test_undefined_is_nan_and_nothing_else_is(whole):
    """The first loops of what looks back; every other number is finite."""
    for name, values in whole.data.items():
        first = FROM_LOOP[name]
        assert values.isel(loop=slice(0, first)).isnull().all(), name
        assert np.isfinite(values.isel(loop=slice(first, None))).all(), name


def test_numbers_are_those_of_each_document(quick):
    """Batches change nothing and no document is lost or swapped. Measured: 2e-6 of at most 23."""
    for index, document in enumerate(CORPUS.report):
        batch = padded([MODEL.tokenizer(document.text)["input_ids"]])
        for name, expected in measure(record(MODEL, batch), quick.provenance["rank_tokens"]).items():
            np.testing.assert_allclose(quick.data[name][index], expected[0], rtol=0, atol=5e-5, err_msg=name)


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
        "schema": 2,
        "model": "a model made here",
        "weights_sha256": weights_hash(MODEL),
        "config": config,
        "trained_loops": 3,
        "run_loops": 4,
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
    """Without readouts there is none of their variables, and without gates no gate."""
    assert set(DEFINITIONS) - set(quick.data) == {"nll_usable", "withheld"} | NOT_OF_PLT
    ungated = diagnose(make_readable(memory="own"), CORPUS, readouts=False, n_loops=1)
    assert set(DEFINITIONS) - set(ungated.data) == {"nll_usable", "withheld", "gate_mean"} | NOT_OF_PLT
    assert ungated.loops.tolist() == [1]


# -- what a model does not have ---------------------------------------------------------------------

NO_READOUTS = "readouts were not fitted"
NO_PREDICTIONS = "the trace has no head or no tokens"
NO_OFFSET = "the model has no cross-loop position offset"
NO_GATE = "no loop of this run blends attention, so there is no gate"
NO_CODA = "no coda stands before the head, so exits are the plain logit lens"
NO_EXIT_GATE = "the model has no exit gate"
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
    "gate": {"gate_mean": NO_GATE},
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


@pytest.mark.parametrize("readouts", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_lacks_is_absent(kind, readouts):
    """Each measure is there, finite from its first loop on, or absent with its reason: never both, and never neither.

    Said in the provenance and in the JSON, whose rows have null for it.
    """
    changes, lacks = KINDS[kind]
    made = diagnose(make_readable(**changes), CORPUS, readouts=readouts)
    absent = {name: why for part in lacks for name, why in WITHOUT[part].items()}
    if not readouts:
        absent = dict.fromkeys(("nll_usable", "withheld"), NO_READOUTS) | absent
    assert made.provenance["absent"] == absent
    assert set(made.data) == set(DEFINITIONS) - set(absent)
    for name, values in made.data.items():
        assert values.isel(loop=slice(0, FROM_LOOP[name])).isnull().all(), name
        assert np.isfinite(values.isel(loop=slice(FROM_LOOP[name], None))).all(), name
    told = json.loads(dumps(answer(made, recommend(made))))
    assert told["absent"] == absent
    assert {name for name in DEFINITIONS if all(row[name] is None for row in told["loops"])} == set(absent)


def test_a_run_of_one_loop_does_not_deny_the_gate():
    """What one loop does not use is not what the model does not have."""
    made = diagnose(MODEL, CORPUS, readouts=False, n_loops=1)
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
    one, other = (diagnose(model, CORPUS, readouts=False, batch_size=size) for size in (8, batch_size))
    xr.testing.assert_allclose(other.data.drop_attrs(), one.data.drop_attrs(), rtol=1e-5, atol=1e-5)


def test_the_seed_draws_the_start():
    """The same seed is the same diagnosis, to the bit and with readouts; another one moves every measure of it.

    A model that starts from its embedding has nothing to draw: only the fits know the seed.
    """
    model = make_readable(**HUGINN)
    first, again, other = (diagnose(model, CORPUS, seed=seed) for seed in (3, 3, 4))
    xr.testing.assert_identical(again.data, first.data)
    assert first.provenance["seed"] == 3
    for name in first.data:
        assert not other.data[name].equals(first.data[name]), name
    first, other = (diagnose(MODEL, CORPUS, seed=seed, readouts=False) for seed in (3, 4))
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
    xr.testing.assert_identical(theirs.data.drop_attrs(deep=False), ours.data.drop_attrs(deep=False))
    unknown = {"weights_sha256": None, "config": None, "dtype": None, "device": None}
    assert theirs.provenance == ours.provenance | unknown | {"model": "a model of another kind"}


def test_states_captured_by_plain_hooks():
    """Y, Z, norm, head and tokens are enough for every number of the model but the gate's, which states do not have."""
    ours = diagnose(MODEL, CORPUS, n_loops=4)
    theirs = diagnose(foreign(lambda batch, n: captured(MODEL, batch, n)), CORPUS, n_loops=4)
    assert theirs.provenance["absent"] == ours.provenance["absent"] | {"gate_mean": NO_GATE}
    expected = ours.data.drop_vars("gate_mean").drop_attrs(deep=False)
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
    assert about["absent"] == {name: why for part in KINDS["plain"][1] for name, why in WITHOUT[part].items()}
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

    made = diagnose(toy[1], CORPUS, readouts=False)
    plt.switch_backend("agg")
    try:
        plots.hidden_states(made)
    finally:
        plt.close("all")


def test_how_many_loops_unless_told(toy):
    """The trained number, as for a model of ours; and the documents that its context allows."""
    assert diagnose(toy[1], CORPUS, readouts=False).loops.tolist() == [1, 2]
    short = replace(toy[1], n_ctx=20)
    assert diagnose(short, CORPUS, readouts=False).provenance["max_tokens"] == 20
    # A model may be made for far more than a batch of documents should hold: then at most 2,048 unless told.
    long = replace(short, n_ctx=10**6)
    assert diagnose(long, CORPUS, readouts=False).provenance["max_tokens"] == 2048
    assert diagnose(long, CORPUS, readouts=False, max_tokens=5000).provenance["max_tokens"] == 5000
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

    return diagnose(replace(toy[1], record=run), CORPUS, readouts=False)


def test_states_alone_are_measured(headless):
    """Motion and rank need no predictions; each of those is absent with the reason."""
    assert set(headless.data) == {
        *("step_size", "relative_step", "radial_share", "acceleration", "state_cosine"),
        *("cos_update", "cos_reference", "effective_rank", "effective_rank_centred", "participation_ratio"),
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
    """Readouts are asked for by default: the message says what is missing."""

    def run(batch, n_loops):
        return replace(toy[1].record(batch, n_loops), head=None)

    with pytest.raises(ValueError, match="Readouts need head and tokens"):
        diagnose(replace(toy[1], record=run), CORPUS)


def test_states_of_a_coda_alone(toy):
    """Left out is said to be left out, for the lens, too."""

    def run(batch, n_loops):
        trace = toy[1].record(batch, n_loops)
        return replace(trace, head=None, coda=trace.raw)

    made = diagnose(replace(toy[1], record=run), CORPUS, readouts=False)
    assert made.provenance["absent"]["nll_lens"] == NO_PREDICTIONS


# -- documents --------------------------------------------------------------------------------------


def test_documents_are_cut_counted_and_left_out():
    """Cut at what the model was made for or at max_tokens; what is shorter than 16 tokens cannot say anything."""
    text = [words(np.arange(length) % VOCABULARY) for length in (15, 16, 30, 70)]
    corpus = corpus_of(*text, fit=(*CORPUS.fit, Document(words([1]), "short", "short")))
    for max_tokens, cut, tokens in ((None, 1, 15 + 29 + 63), (20, 2, 15 + 19 + 19), (64, 1, 15 + 29 + 63)):
        made = diagnose(MODEL, corpus, max_tokens=max_tokens, readouts=False)
        about = made.provenance
        assert (about["documents"], about["documents_cut"], about["documents_too_short"]) == (3, cut, 2)
        assert about["tokens"] == tokens
        assert about["max_tokens"] == (max_tokens or 64)
        assert made.data["document"].values.tolist() == ["text 1", "text 2", "text 3"]
    first_tokens = diagnose(MODEL, corpus_of(*(" ".join(t.split()[:20]) for t in text)), readouts=False)
    made = diagnose(MODEL, corpus, max_tokens=20, readouts=False)
    np.testing.assert_array_equal(made.data["nll_exit"], first_tokens.data["nll_exit"])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([20, 50, 30], 20), ([16] + [99] * 8, 16), ([16] + [99] * 9, 99), ([300] * 10, 256), (range(100, 120), 102)],
)
def test_matched_tokens(lengths, expected):
    """The length that nine of ten documents have, at most 256."""
    documents = [TokenDocument(f"{i}", "s", (0,) * length, cut=False) for i, length in enumerate(lengths)]
    assert matched_tokens(documents) == expected
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
    diagnose(MODEL, CORPUS, batch_size=2, progress=lambda what, done, of: told.setdefault(what, []).append((done, of)))
    assert list(told) == ["fitting readouts", "measuring"]
    for steps in told.values():
        done, of = zip(*steps, strict=True)
        assert list(done) == sorted(set(done))
        assert set(of) == {done[-1]}
    assert told["measuring"] == [(2, 5), (4, 5), (5, 5)]


# -- the same again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_matter(quick, batch_size):
    """Padding and neighbours change no number. Measured: 2e-6 of at most 23."""
    other = diagnose(MODEL, CORPUS, readouts=False, batch_size=batch_size)
    xr.testing.assert_allclose(other.data, quick.data, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers(whole):
    """To the bit, readouts and provenance included; another seed is another order of the fit documents."""
    xr.testing.assert_identical(diagnose(MODEL, CORPUS, n_loops=4).data, whole.data)
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


def test_a_file_is_replaced_and_not_rewritten(whole, quick, tmp_path):
    """Whoever has the older file open keeps it whole: the new one takes its name in one step."""
    file, older = tmp_path / "saved.nc", tmp_path / "older.nc"
    quick.save(file)
    older.hardlink_to(file)
    whole.save(file)
    xr.testing.assert_identical(Diagnosis.load(older).data, quick.data)
    xr.testing.assert_identical(Diagnosis.load(file).data, whole.data)


@pytest.mark.parametrize("before", [None, "an older diagnosis"])
def test_a_save_that_fails_leaves_things_as_they_were(whole, tmp_path, monkeypatch, before):
    """No half-written target, no partial file beside it, and the older file is whole; the failure is told."""
    file = tmp_path / "saved.nc"
    if before:
        file.write_text(before)

    def full_disk(self, path, **kwargs):
        path.write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full_disk)
    with pytest.raises(OSError, match="No space left"):
        whole.save(file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([before] if before else [])


def save_other(file, whole, **changes):
    """A file like a saved diagnosis but for its provenance."""
    data = whole.data.copy()
    data.attrs["provenance"] = json.dumps(whole.provenance | changes)
    data.to_netcdf(file, engine="h5netcdf")


def write_half(file, whole):
    whole.save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file, whole: None, "is no file"),
        (lambda file, whole: file.mkdir(), "is no file"),
        (lambda file, whole: file.write_bytes(b""), "is not a diagnosis"),
        (lambda file, whole: file.write_text("numbers " * 100), "is not a diagnosis"),
        (write_half, "is not a diagnosis"),
        (lambda file, whole: xr.Dataset().to_netcdf(file, engine="h5netcdf"), "is not a diagnosis.*provenance"),
        (lambda file, whole: save_other(file, whole, schema=1), "has schema 1.*reads 2"),
    ],
    ids=["missing", "folder", "empty", "text", "half", "other_netcdf", "schema"],
)
def test_files_that_are_no_diagnosis(whole, tmp_path, write, message):
    """One message with the file's name, whatever the layers below would have said."""
    file = tmp_path / "given.nc"
    write(file, whole)
    with pytest.raises(DiagnosisError, match=rf"given\.nc {message}"):
        Diagnosis.load(file)


@pytest.mark.parametrize("provenance", ["[]", "null", 3])
def test_other_peoples_provenance(tmp_path, provenance):
    """An attribute of that name in somebody else's netCDF file is no failure of ours."""
    file = tmp_path / "given.nc"
    xr.Dataset(attrs={"provenance": provenance}).to_netcdf(file, engine="h5netcdf")
    with pytest.raises(DiagnosisError, match=r"given\.nc is not a diagnosis"):
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
        diagnose(MODEL, CORPUS, max_tokens=0, readouts=False)


def test_nothing_to_report_on():
    """A half without documents is wrong input, and said to be."""
    with pytest.raises(InputError, match="report"):
        diagnose(MODEL, corpus_of(), readouts=False)


@pytest.mark.parametrize("fit", [(), tuple(replace(document, source="one") for document in CORPUS.fit)])
def test_too_few_sources_to_fit_on(fit):
    """Two sources, one in each half, are allowed by the corpus; that readouts need more is an error of the input."""
    with pytest.raises(InputError, match="at least 2 sources"):
        diagnose(MODEL, Corpus("made here", fit, CORPUS.report))


# -- models and documents as they come --------------------------------------------------------------


def test_a_model_in_training():
    """`diagnose` asks for no gradient, so a model need not be frozen for it, and no graph may pile up."""
    model = make_readable().requires_grad_(True)
    made = diagnose(model, CORPUS, readouts=False)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    np.testing.assert_array_equal(made.data["nll_exit"], diagnose(MODEL, CORPUS, readouts=False).data["nll_exit"])


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
    for name, values in made.data.items():
        assert np.isfinite(values.isel(loop=slice(FROM_LOOP[name], None))).all(), name


def test_a_document_of_one_repeated_token():
    """One odd document is not the end of a long run; what has no value there is NaN."""
    made = diagnose(MODEL, corpus_of(words([3] * 20), words(range(20))), readouts=False)
    assert np.isnan(made.data["effective_rank_centred"][0, 0])
    assert np.isfinite(made.data["effective_rank_centred"][1]).all()


def test_the_exits_of_a_shallow_run_are_those_of_a_deep_one(quick):
    """Asking for more loops changes nothing about those before: what the decision to stop early rests on.

    But for `settled` and `breadth`, which ask what the loops after r do.
    """
    deep = diagnose(MODEL, CORPUS, readouts=False, n_loops=5)
    for name in exits_and_motion():
        np.testing.assert_array_equal(deep.data[name][:, :4], quick.data[name], err_msg=name)


def exits_and_motion():
    trace = record(MODEL, padded([[1, 2, 3, 4]]))
    return (
        *(set(exits(trace)) - {"settled", "breadth"}),
        *("step_size", "relative_step", "radial_share", "acceleration", "state_cosine"),
        *("cos_update", "cos_reference", "effective_rank", "participation_ratio"),
    )
