"""Documents whose states overflow: named and left out, and a failure where it is all of them."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_cli import run
from test_decoder import make_model
from tiny import VOCABULARY, random_corpus, word_tokenizer, words

import loopdiag as ld
from loopdiag.corpus import Corpus, Document
from loopdiag.interventions import Intervention
from loopdiag.model import save
from loopdiag.parts import Parts

LOUD = 7  # a word that no float32 holds the states of
OF_ALL_TOKENS = ("rank", "hsic")  # these depend on how many tokens documents have in common


def model(**settings):
    """A model in float32 whose states overflow at the word `LOUD`, and nowhere before."""
    made = make_model(dtype=torch.float32, tie_embeddings=False, **settings)
    made.tokenizer = word_tokenizer()
    made.embed.weight.data[LOUD] = torch.finfo(torch.float32).max
    return made.eval().requires_grad_(False)


def documents(name, count, loud, length=24):
    """Random words, `LOUD` as the first of those documents that are named so, and in no other."""
    quiet = torch.tensor([word for word in range(VOCABULARY) if word != LOUD])
    drawn = quiet[torch.randint(len(quiet), (count, length), generator=torch.Generator().manual_seed(count))]
    drawn[list(loud), 0] = LOUD
    return tuple(Document(words(row.tolist()), f"{name}/{place}", f"{name} {place}") for place, row in enumerate(drawn))


def without(corpus, names):
    fit, report = (tuple(each for each in half if each.name not in names) for half in (corpus.fit, corpus.report))
    return Corpus(corpus.name, fit, report)


@pytest.mark.parametrize("measures", [["default"], ["all"], ["motion"]])
def test_what_is_measured_is_what_is_measured_without_them(measures):
    """Law: as if they had not been given, pooled and fitted measures among them; their names and count are told."""
    corpus = Corpus("some are loud", documents("fit", 9, {0, 4}), documents("report", 10, {1, 2, 9}))
    lost = ["report/1", "report/2", "report/9"]
    made = ld.diagnose(model(), corpus, measures=measures, batch_size=3)
    assert made.provenance["documents_not_finite"] == lost
    assert (made.provenance["documents"], made.provenance["tokens"]) == (7, 7 * 23)
    ours = ld.diagnose(model(), without(corpus, {*lost, "fit/0", "fit/4"}), measures=measures, batch_size=3)
    assert ours.provenance["documents_not_finite"] == []
    assert list(made.data.data_vars) == list(ours.data.data_vars)
    assert list(made.data["document"].values) == list(ours.data["document"].values)
    for name, values in made.data.drop_vars("nll_usable", errors="ignore").data_vars.items():
        if name not in ("withheld",) and values.dtype.kind == "f":
            torch.testing.assert_close(
                torch.tensor(values.values), torch.tensor(ours.data[name].values), atol=1e-4, rtol=1e-4, equal_nan=True
            )
    if "nll_usable" in made.data:  # fitted on the same documents in another order
        assert abs(made.data["nll_usable"] - ours.data["nll_usable"]).mean() < 0.05


def blinding():
    """A model whose states stay finite at `LOUD`, and whose logits there do not."""
    made = model()
    for block in made.blocks:
        for out in (block.attn.o_proj, block.mlp.down_proj):
            out.weight.data.zero_()
    made.embed.weight.data[:, 0] = 0
    made.embed.weight.data[LOUD] = torch.eye(made.cfg.d_model)[0]
    made.head.weight.data[:, 0] = torch.finfo(torch.float32).max / 2
    return made


@pytest.mark.parametrize("resumed", [False, True])
def test_documents_to_fit_on_whose_logits_overflow(tmp_path, resumed):
    """They are left out of translators and exit rules, named, and spoil no other document's numbers."""
    corpus = Corpus("one is loud", documents("fit", 9, {4}), documents("report", 6, set()))
    asked = {"measures": ["readouts", "exit_rules", "prediction"], "batch_size": 3}
    made = ld.diagnose(blinding(), corpus, parts=Parts(tmp_path / "parts") if resumed else None, **asked)
    if resumed:
        made = ld.diagnose(blinding(), corpus, parts=Parts(tmp_path / "parts", resume=True), **asked)
    about = made.provenance
    assert (about["documents_fit"], about["documents_fit_not_finite"]) == (8, ["fit/4"])
    assert (about["documents"], about["documents_not_finite"]) == (6, [])
    assert np.isfinite(made.data["nll_usable"]).all()
    ours = ld.diagnose(blinding(), without(corpus, {"fit/4"}), **asked)
    np.testing.assert_allclose(made.data["exit_rule_nll_fit"], ours.data["exit_rule_nll_fit"], rtol=1e-5)
    assert ours.provenance["documents_fit_not_finite"] == []


def test_parts_say_it_too(tmp_path):
    """What a stopped run kept tells which documents were left out."""
    corpus = Corpus("one is loud", (), documents("report", 8, {3}))
    asked = {"measures": ["prediction", "pooled", "tokens"], "batch_size": 4}
    kept = Parts(tmp_path / "parts")
    made = ld.diagnose(model(), corpus, parts=kept, **asked)
    again = ld.diagnose(model(), corpus, parts=Parts(tmp_path / "parts", resume=True), **asked)
    assert made.provenance == again.provenance
    assert again.provenance["documents_not_finite"] == ["report/3"]
    assert made.data.equals(again.data)


def overflowing(ids):
    """An intervention after which one document, or all, has no finite numbers."""

    @contextmanager
    def make(model):
        def spoil(tensor, hook):
            return tensor.masked_fill(spoilt[:, None, None], torch.inf)

        spoilt = torch.tensor(ids)
        with model.hooks([("hook_embed", spoil)]):
            yield

    return Intervention("mine", "overflow", None, make)


def test_effects_are_those_without_them():
    """Law: an intervention's effects are paired, so a document that one run loses is left out of all of them."""
    corpus = Corpus("one is loud", (), documents("report", 5, {1}))
    made = ld.intervene(model(), corpus, ["loops", overflowing([False] * 3 + [True] * 2)], batch_size=5)
    assert made.provenance["documents_not_finite"] == ["report/1", "report/3", "report/4"]
    assert (made.provenance["documents"], made.provenance["tokens"]) == (2, 2 * 23)
    ours = ld.intervene(model(), without(corpus, {"report/1", "report/3", "report/4"}), ["loops"])
    assert ours.provenance["documents_not_finite"] == []
    for name in ("nll", "effect", "helped", "harmed"):
        found = made.data[name].sel(intervention=ours.data["intervention"]) if name != "nll" else made.data[name]
        np.testing.assert_allclose(found.values, ours.data[name].values, rtol=1e-5, atol=1e-6)
    assert np.isfinite(made.data["effect"]).all()


@pytest.mark.parametrize(
    ("loud", "spoilt", "named"), [({0, 1}, [], "in every run"), (set(), [True] * 2, "with overflow")]
)
def test_no_finite_effects_are_a_failure(loud, spoilt, named):
    """The message says which run lost them all."""
    corpus = Corpus("all are loud", (), documents("report", 2, loud))
    with pytest.raises(FloatingPointError, match=f"None of the 2 documents gave finite numbers {named}: "):
        ld.intervene(model(), corpus, ["loops", *([overflowing(spoilt)] if spoilt else [])])


@pytest.mark.parametrize("measures", [["default"], ["motion"], ["pooled", "tokens", "noise", "exit_rules"]])
def test_none_that_is_finite_is_a_failure(measures):
    """There is nothing to answer from."""
    corpus = Corpus("all are loud", documents("fit", 8, set()), documents("report", 8, set(range(8))))
    with pytest.raises(FloatingPointError, match=r"None of the 8 documents gave finite numbers: .* wider range"):
        ld.diagnose(model(), corpus, measures=measures)


def test_none_to_fit_on_is_a_failure():
    """Not a translator of nothing."""
    corpus = Corpus("all are loud", documents("fit", 8, set(range(8))), documents("report", 8, set()))
    with pytest.raises(FloatingPointError, match="No document to fit readouts on gave finite numbers"):
        ld.diagnose(model(), corpus)
    assert ld.diagnose(model(), corpus, measures=["prediction"]).provenance["documents"] == 8


def test_padding_is_not_looked_at():
    """Only what stands for tokens counts."""
    made = model()
    ids = torch.tensor([[1, 2, LOUD], [1, 2, 3]])
    batch = ld.corpus.Batch(ids, torch.tensor([[True, True, False], [True] * 3]), ("a", "b"), ("a", "b"))
    assert ld.record(made, batch).finite.tolist() == [True, True]
    batch = ld.corpus.Batch(ids, torch.ones(2, 3, dtype=torch.bool), ("a", "b"), ("a", "b"))
    assert ld.record(made, batch).finite.tolist() == [False, True]


@pytest.fixture
def folder(tmp_path):
    save(model(), tmp_path / "model")
    return tmp_path


def write(folder, loud, count=30):
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": each.text}) + "\n" for each in documents("any", count, loud)))
    return file


def test_the_command_tells_how_many(folder):
    """In the table, in the notes with names, and in the JSON."""
    data = write(folder, range(0, 30, 5))
    result = run("recommend", folder / "model", "--data", data, "--json", folder / "a.json", "--measures", "prediction")
    assert result.exit_code in (0, 3), result.output
    told = json.loads((folder / "a.json").read_text())
    lost = told["documents_not_finite"]
    assert 0 < lost == len(told["provenance"]["documents_not_finite"])
    assert told["documents"] + lost == 15
    assert f"{lost} more gave no finite numbers" in " ".join(result.stdout.split())
    name = told["provenance"]["documents_not_finite"][0]
    assert f"note: {lost} documents were left out: their numbers are not finite ({name}" in result.stderr


def test_intervene_tells_how_many(folder):
    """In the text below the table, in the notes with names, and in the JSON."""
    data = write(folder, range(0, 30, 5))
    result = run("intervene", folder / "model", "--data", data, "--json", folder / "a.json", "--only", "loops")
    assert result.exit_code == 0, result.output
    told = json.loads((folder / "a.json").read_text())
    lost = told["documents_not_finite"]
    assert 0 < lost == len(told["provenance"]["documents_not_finite"])
    assert told["documents"] + lost == 15
    assert f"{lost} more gave no finite numbers" in " ".join(result.stdout.split())
    assert f"note: {lost} documents were left out: their numbers are not finite (" in result.stderr


def test_the_command_fails_without_a_recommendation(folder):
    """Exit code 1, nothing on stdout, nothing written."""
    data = write(folder, range(30))
    result = run("recommend", folder / "model", "--data", data, "--json", folder / "a.json", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "finite numbers" in result.stderr
    assert not (folder / "a.json").exists()


def test_an_overflow_of_half_precision_is_refused_by_name_when_loading(folder):
    """The weight itself is beyond float16."""
    result = run("recommend", folder / "model", "--dtype", "float16", "--quiet")
    assert result.exit_code == 2
    assert "embed.weight holds numbers that are NaN or infinite as float16" in result.stderr
    assert "load them in float32 or bfloat16" in result.stderr


def test_a_finite_model_is_told_to_be_one():
    """No document of an ordinary corpus is left out."""
    made = model()
    made.embed.weight.data[LOUD] = 0.5
    about = ld.diagnose(made, random_corpus(), measures=["prediction"]).provenance
    assert about["documents_not_finite"] == []
