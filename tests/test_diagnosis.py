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
from loopdiag.corpus import Corpus, CorpusError, Document, TokenDocument
from loopdiag.diagnosis import DEFINITIONS, Diagnosis, DiagnosisError, diagnose, matched_tokens, measure, weights_hash
from loopdiag.errors import InputError
from loopdiag.measures.prediction import exits
from loopdiag.trace import record

CORPUS = random_corpus()
# Measures that need one or two loops before them; the others start at the embedding.
FROM_LOOP = {
    **dict.fromkeys(("nll_exit", "nll_usable", "rank", "entropy", "effective_rank", "effective_rank_centred"), 0),
    **dict.fromkeys(("gain", "cost", "output_shift", "output_shift_reverse", "output_shift_js"), 1),
    **dict.fromkeys(("step_size", "relative_step", "state_cosine"), 1),
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
    """Asking for more loops changes nothing about those before: what the decision to stop early rests on."""
    deep = diagnose(MODEL, CORPUS, readouts=False, n_loops=5)
    for name in exits_and_motion():
        np.testing.assert_array_equal(deep.data[name][:, :4], quick.data[name], err_msg=name)


def exits_and_motion():
    trace = record(MODEL, padded([[1, 2, 3, 4]]))
    return (
        *exits(trace),
        "step_size",
        "relative_step",
        "state_cosine",
        "cos_update",
        "cos_reference",
        "effective_rank",
    )
