"""Probes: what they read from states of known content, what they leave alone, and what is said of it."""

from __future__ import annotations

import csv
import json
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from test_decoder import HUGINN_LIKE, POST_CODA, make_model
from tiny import random_corpus, word_tokenizer

import loopdiag as ld
from loopdiag import plots, report
from loopdiag.corpus import Corpus, Document, TokenDocument
from loopdiag.errors import InputError
from loopdiag.probing import SUITES, Reading, ScoresError, Target, fit_probe, linear, probe
from loopdiag.probing.carried import Clusters, beside, dealt, information
from loopdiag.probing.examples import Examples
from loopdiag.probing.linear import FOLDS, ITERATIONS, SPARED, STRENGTHS, TOLERANCE
from loopdiag.probing.python import KINDS, code_labels, token_labels
from loopdiag.probing.reading import document_means, draw_places, moved, read, together
from loopdiag.probing.states import EMBEDDING, States, collect, points_of, untrained
from loopdiag.probing.suites import token_at
from loopdiag.scores import SCHEMA, ProbeScores

SMALL = {"places": 8, "classes": 5, "batch_size": 3}


def blobs(seed=0, rows=240, classes=4, width=6, spread=1.0):
    """States around a centre for each class, the classes, and six sources."""
    random = np.random.default_rng(seed)
    y = random.integers(classes, size=rows)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return centres[y] + spread * random.normal(size=(rows, width)), y, np.arange(rows) % 6


def examples_of(labels_fit, labels_report, n_classes, of_document=10):
    """Examples of ten places a document, six sources."""
    places = tuple([np.arange(of_document)] * (len(y) // of_document) for y in (labels_fit, labels_report))
    sources = np.repeat(np.arange(len(places[0])) % 6, of_document)
    return Examples(places, (labels_fit, labels_report), sources, n_classes)


def planted_model(**changes):
    """Layers that add nothing: Z_r is N of what enters the loop."""
    model = make_model(**{"d_model": 32, "carry_scale": 0.5, **changes})
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
        if name == "embed.weight":
            weight.data = weight.data / 2
    model.tokenizer = word_tokenizer()
    return model.requires_grad_(False)


CORPUS = random_corpus(fit=30, report=8)
TOKENS = SUITES["position_identity"]


@pytest.fixture(scope="module")
def planted_scores():
    """Tokens i, i-1 and i+1 of random words, read from a model with an offset of 1 that adds nothing of its own."""
    return probe(planted_model(), CORPUS, TOKENS, classes=5, places=24)


# -- linear probes ----------------------------------------------------------------------------------------


def test_a_probe_is_that_of_scikit_learn():
    """Its own search over folds of sources finds the same strength, and gives the same probabilities."""
    x, y, sources = blobs()
    ours = fit_probe(x, y, sources, 4)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(tol=TOLERANCE, max_iter=ITERATIONS))
    grid = {"logisticregression__C": STRENGTHS}
    theirs = GridSearchCV(pipeline, grid, scoring="neg_log_loss", cv=GroupKFold(2)).fit(x, y, groups=sources)
    assert theirs.best_params_["logisticregression__C"] == ours.C
    new, labels, _ = blobs(seed=1)
    expected = (1 - SPARED) * theirs.predict_proba(new) + SPARED / 4
    np.testing.assert_allclose(np.exp(ours.log_probabilities(new)), expected, atol=1e-12)
    right, nll = ours.score(new, labels)
    assert right.mean() == theirs.best_estimator_.score(new, labels)
    assert nll.mean() == pytest.approx(log_loss(labels, expected), abs=1e-12)


def test_a_class_that_was_not_seen_costs_no_infinity():
    """A thousandth of the probability is kept for all classes; a single class in a fold is said throughout."""
    x, y, sources = blobs(classes=2)
    _, nll = fit_probe(x, y, sources, 3).score(x, np.full(len(y), 2))
    np.testing.assert_allclose(nll, np.log(3 / SPARED))
    alone = fit_probe(x, np.zeros(len(y), int), sources, 3)
    np.testing.assert_allclose(np.exp(alone.log_probabilities(x[:1])), [[1 - SPARED * 2 / 3, SPARED / 3, SPARED / 3]])


def test_strength_follows_the_noise():
    """Where states say nothing, a strong regularisation is best; where they say all, the weakest."""
    x, y, sources = blobs(spread=0.05)
    noise = np.random.default_rng(5).normal(size=(240, 40))
    assert fit_probe(noise, y, sources, 4).C <= 1e-3
    assert max(STRENGTHS) == fit_probe(x, y, sources, 4).C


def test_fits_that_do_not_converge_are_counted(monkeypatch):
    """None of the usual ones; each, those of folds included, where one step is all there is. Others' warnings stay."""
    x, y, sources = blobs()
    assert fit_probe(x, y, sources, 4).unconverged == 0
    monkeypatch.setattr(linear, "ITERATIONS", 1)
    of_probe = FOLDS * len(STRENGTHS) + 1
    assert fit_probe(x, y, sources, 4).unconverged == of_probe
    # The embedding is probed once, as loop 0 and as what enters loop 1; so are its control and that of random weights.
    scores = probe(planted_model(), CORPUS, TOKENS[:1], hooks=["hook_in"], n_loops=1, **SMALL)
    assert scores.provenance["unconverged"] == 3 * of_probe

    def warn(x):
        warnings.warn("of another kind", stacklevel=1)
        return x

    monkeypatch.setattr(linear, "StandardScaler", partial(FunctionTransformer, warn))
    with pytest.warns(UserWarning, match="of another kind"):
        fit_probe(x, y, sources, 4)


def test_a_label_that_is_there_is_read_and_one_that_is_not_is_not():
    """Accuracy 1 and chance; the loss 0 and the entropy."""
    x, y, _ = blobs(spread=0.05)
    new, labels, _ = blobs(seed=1, spread=0.05)
    examples, random = examples_of(y, labels, 4), np.random.default_rng(3)
    there = examples.probe((x, new))
    assert there.accuracy.mean() == 1
    assert there.nll.mean() < 0.05
    absent = examples.probe((random.normal(size=x.shape), random.normal(size=new.shape)))
    guess = examples.frequencies()
    assert abs(absent.accuracy.mean() - 0.25) < 0.08
    assert absent.nll.mean() == pytest.approx(guess.nll.mean(), abs=0.02)
    share = np.bincount(y) / len(y)
    assert guess.accuracy.mean() == (labels == share.argmax()).mean()
    assert guess.nll.mean() == pytest.approx(-np.log(share[labels]).mean(), abs=2e-3)


# -- control tasks ----------------------------------------------------------------------------------------


def test_a_control_label_is_one_of_the_token():
    """The same for a token wherever it stands, in both halves; its frequencies are those of the labels."""
    random = np.random.default_rng(0)
    y = random.choice(3, size=(2, 200), p=(0.7, 0.2, 0.1))
    tokens = random.integers(3000, size=(2, 200))
    control = examples_of(y[0], y[1], 3).control((tokens[0], tokens[1]), 3000, (0, 1))
    of_token = {}
    for token, label in zip(tokens.ravel(), np.concatenate(control.labels), strict=True):
        assert of_token.setdefault(token, label) == label
    share = np.bincount(list(of_token.values()), minlength=3) / len(of_token)
    np.testing.assert_allclose(share, np.bincount(y[0]) / 200, atol=0.08)
    other = examples_of(y[0], y[1], 3).control((tokens[0], tokens[1]), 3000, (0, 2))
    assert (other.labels[0] != control.labels[0]).any()


def test_selectivity_tells_learning_by_heart():
    """From states that are the token, a control task is learned as well as the label; from others it is not."""
    random = np.random.default_rng(0)
    tokens = random.integers(12, size=(2, 300))
    one_hot, label = np.eye(12), tokens % 3
    examples = examples_of(label[0], label[1], 3)
    control = examples.control((tokens[0], tokens[1]), 12, (0, 0))
    states = (one_hot[tokens[0]], one_hot[tokens[1]])
    assert (examples.probe(states).accuracy.mean(), control.probe(states).accuracy.mean()) == (1, 1)
    only_label = (np.eye(3)[label[0]], np.eye(3)[label[1]])
    assert examples.probe(only_label).accuracy.mean() == 1
    assert control.probe(only_label).accuracy.mean() < 0.8


# -- information that is carried over ------------------------------------------------------------------------


def test_information_is_what_the_state_adds():
    """None where the state copies what is known or stands elsewhere; log k nats where it is an independent code."""
    random = np.random.default_rng(0)
    code = random.integers(4, size=(2, 600))
    known = tuple(random.normal(size=(600, 5)) for _ in range(2))
    told = tuple(np.eye(4)[each] for each in code)
    examples = examples_of(code[0], code[1], 4)
    given = examples.probe(known)
    assert given.nll.mean() == pytest.approx(np.log(4), abs=0.02)
    assert information(examples, given, known, known)[1].mean() == pytest.approx(0, abs=0.01)
    assert information(examples, given, known, dealt(told, 0))[1].mean() == pytest.approx(0, abs=0.02)
    read_, nats = information(examples, given, known, told)
    assert nats.mean() == pytest.approx(np.log(4), abs=0.03)
    np.testing.assert_allclose(nats, given.nll - read_.nll)


def test_information_is_beyond_what_is_known():
    """A label of two halves, one of them known: the state that has both adds the other half alone."""
    random = np.random.default_rng(1)
    first, second = random.integers(2, size=(2, 2, 600))
    label = 2 * first + second
    known, both = tuple(np.eye(2)[first]), tuple(np.eye(4)[label])
    examples = examples_of(label[0], label[1], 4)
    given = examples.probe(known)
    assert given.nll.mean() == pytest.approx(np.log(2), abs=0.02)
    assert information(examples, given, known, both)[1].mean() == pytest.approx(np.log(2), abs=0.03)


def test_clusters_are_of_the_fitted_states():
    """As many as there are different states, at most 32; others get the nearest centre's."""
    states = np.repeat(np.eye(5), 3, axis=0)
    clusters = Clusters(states, seed=0)
    fit, reported = clusters((states, np.eye(5) * 1.1))
    assert clusters.count == 5
    assert len(set(fit)) == 5
    assert reported.tolist() == fit[::3].tolist()
    assert Clusters(np.random.default_rng(0).normal(size=(100, 3)), seed=0).count == 32
    (row, *_), _ = beside((fit[:, None], fit[:, None]), (states, states))
    assert row.tolist() == [fit[0], 1, 0, 0, 0, 0]
    first, second = dealt((states, states), 3)
    assert sorted(map(tuple, first)) == sorted(map(tuple, states))
    assert not np.array_equal(first, second)


# -- the offset made visible --------------------------------------------------------------------------------


def score_of(scores, target, hook, loop, name="score"):
    return float(scores.data[name].sel(target=target, hook=hook, loop=loop).mean())


def test_the_offset_hands_over_the_token_before(planted_scores):
    """What enters loop 2 knows tokens i and i-1; the embedding knows i alone, and nothing knows i+1."""
    for loop in (0, 1, 2):
        assert score_of(planted_scores, "token i", "hook_in", loop) > 0.9
        assert score_of(planted_scores, "token i+1", "hook_in", loop) < 0.4
    assert score_of(planted_scores, "token i-1", "hook_in", 1) < 0.4
    assert score_of(planted_scores, "token i-1", "hook_in", 2) > 0.9


def test_without_an_offset_it_does_not():
    """The same model, wired otherwise."""
    model = planted_model(offset=0)
    scores = probe(model, CORPUS, TOKENS[1:2], hooks=["hook_in"], n_loops=2, classes=5, places=24)
    assert score_of(scores, "token i-1", "hook_in", 2) < 0.4


def test_what_is_beside_the_scores(planted_scores):
    """Loop 0 is the embedding for every hook and loop 1's entrance; the baseline is the most frequent class."""
    data = planted_scores.data
    assert data["score"].dims == ("target", "hook", "loop", "document")
    assert data["loop"].values.tolist() == [0, 1, 2, 3]
    for name in ("score", "control", "floor", "nll", "C"):
        of_embedding = data[name].sel(loop=0)
        xr.testing.assert_identical(
            of_embedding.sel(hook="hook_in", drop=True), of_embedding.sel(hook="hook_out", drop=True)
        )
        xr.testing.assert_identical(
            of_embedding.sel(hook="hook_in", drop=True).drop_vars("loop"),
            data[name].sel(loop=1, hook="hook_in", drop=True),
        )
    readings = read(CORPUS.fit, word_tokenizer(), 64)
    counts = np.bincount(np.concatenate([reading.ids for reading in readings]))
    kept = np.argsort(-counts, kind="stable")[:5]
    said = {each["target"]: each for each in planted_scores.provenance["targets"]}["token i"]
    words = np.concatenate([reading.ids for reading in read(CORPUS.report, word_tokenizer(), 64)])
    assert said["coverage"] == pytest.approx(np.isin(words, kept).mean())
    assert said["classes"] == 5
    assert 0.1 < float(data["baseline"].mean()) < 0.4
    assert float(data["baseline_nll"].mean()) == pytest.approx(np.log(5), abs=0.1)
    # The token is decoded from random weights, too, and its control as well: a label of the token, learned by heart.
    assert score_of(planted_scores, "token i", "hook_in", 0, "floor") > 0.95
    assert score_of(planted_scores, "token i", "hook_in", 0, "control") > 0.9


def test_carried_information_of_a_model_that_only_hands_over():
    """The entrance of loop 2 tells of Z(i-1), which two embeddings do tell; the control tells nothing."""
    scores = probe(planted_model(), CORPUS, "carried_information", n_loops=2, places=12)
    data = scores.data
    assert data["target"].values.tolist() == ["Z(i)", "Z(i-1)"]
    assert data["loop"].values.tolist() == [2]
    for score, loss, alone in (("score", "nll", "baseline_nll"), ("floor", "floor_nll", "floor_baseline_nll")):
        xr.testing.assert_allclose(data[score], (data[alone] - data[loss]).transpose(*data[score].dims))
    assert float(data["control"].mean()) < 0.02
    # Every state is a function of one token, and both tokens' embeddings are given.
    assert float(data["baseline_nll"].mean()) < 0.6
    assert "baseline" not in data


@pytest.mark.parametrize(
    ("wiring", "hook", "loops"), [(HUGINN_LIKE, "hook_coda_out", [0, 1, 2]), (POST_CODA, "hook_carry", [0, 2])]
)
def test_other_wirings(wiring, hook, loops):
    """A prelude's output for the embedding, a random start, a coda: hooks are read where they are."""
    model = make_model(**wiring)
    model.tokenizer = word_tokenizer()
    corpus = random_corpus(fit=6, report=3)
    scores = probe(model.requires_grad_(False), corpus, TOKENS[:1], hooks=[hook], n_loops=2, places=6, classes=3)
    assert [row.loop for row in scores.table()] == loops
    assert score_of(scores, "token i", hook, 0) > 0.9
    carried = probe(model, corpus, "carried_information", hooks=[hook], n_loops=2, places=6)
    assert carried.targets == ["Z(i)", f"Z(i-{max(1, model.cfg.offset)})"]
    assert np.isfinite(carried.data["score"]).all()


# -- nothing of the report documents reaches the probes --------------------------------------------------------


@pytest.mark.parametrize("suite", [TOKENS[:2], "carried_information"])
def test_report_documents_change_nothing_but_their_own_scores(suite):
    """Another text in one of them: the same strengths, classes and clusters, and the same scores of the others."""
    model = planted_model()
    *others, last = CORPUS.report
    poisoned = Corpus(CORPUS.name, CORPUS.fit, (*others, replace(last, text="w1 w2 " * 15)))
    before, after = (
        probe(model, corpus, suite, hooks=["hook_in"], n_loops=2, places=6, classes=5, batch_size=1).data
        for corpus in (CORPUS, poisoned)
    )
    for name in ("C", "floor_C"):
        xr.testing.assert_identical(before[name], after[name])
    for name in ("score", "nll", "floor_nll", "baseline_nll"):
        xr.testing.assert_identical(before[name].isel(document=slice(-1)), after[name].isel(document=slice(-1)))
    assert not before["nll"].isel(document=-1).equals(after["nll"].isel(document=-1))


def test_the_seed_settles_everything():
    """The same seed gives the same numbers, another one others; batches do not matter beyond rounding."""
    model = planted_model()
    run = {"n_loops": 2, "hooks": ["hook_out"], **SMALL, "places": 3}
    first, again, other = (probe(model, CORPUS, TOKENS[1:2], seed=seed, **run) for seed in (0, 0, 1))
    xr.testing.assert_identical(first.data, again.data)
    assert not first.data["score"].equals(other.data["score"])
    batched = probe(model, CORPUS, TOKENS[1:2], **{**run, "batch_size": 8})
    xr.testing.assert_allclose(first.data["nll"], batched.data["nll"], atol=1e-6)


# -- states -------------------------------------------------------------------------------------------------


def test_states_are_those_of_the_cache():
    """At the chosen places, from padded batches, heads side by side."""
    model = make_model()
    model.tokenizer = word_tokenizer()
    readings = read(CORPUS.report[:5], model.tokenizer, 64)
    places = draw_places([np.ones(len(reading.ids), bool) for reading in readings], 4, (0,))
    points = [EMBEDDING, ("hook_in", 2), ("blocks.1.attn.hook_z", 1), ("blocks.0.attn.hook_gate", 3)]
    done = []
    found = collect(model, readings, places, points, n_loops=3, batch_size=2, seed=0, tell=done.append)
    states = States((places, places), (found, found))
    assert sum(done) == 5
    for index, reading in enumerate(readings):
        _, cache = model.run_with_cache(torch.from_numpy(reading.ids)[None], n_loops=3)
        only = [here if at == index else here[:0] for at, here in enumerate(places)]
        for point in points:
            name = f"loops.{point[1]}.{point[0]}" if point[1] else "hook_embed"
            expected = cache[name][0, places[index]].flatten(1).detach().numpy()
            np.testing.assert_allclose(states.at(point, (only, only))[0], expected, atol=1e-10)
    assert found[("blocks.1.attn.hook_z", 1)].shape[1] == model.cfg.n_heads * model.cfg.d_head


def test_a_random_twin_has_the_same_shape_and_other_weights():
    """Same configuration, dtype and loops; the seed says which weights."""
    model = make_model(dtype=torch.float32)
    model.ensure_loops(5)
    twin, again, other = (untrained(model, seed) for seed in (0, 0, 1))
    assert twin.cfg == model.cfg
    assert twin.embed.weight.dtype == torch.float32
    assert len(twin.loops) == 5
    assert torch.equal(twin.embed.weight, again.embed.weight)
    assert not torch.equal(twin.embed.weight, other.embed.weight)
    assert not torch.equal(twin.embed.weight, model.embed.weight)


def test_places_are_drawn_once_among_those_that_are_eligible():
    """No place twice, at most so many, the same for the same seed; the mean is over a document's places."""
    eligible = [np.arange(30) % 3 == 0, np.zeros(9, bool), np.ones(2, bool)]
    places = draw_places(eligible, 4, (7, 0))
    assert [len(each) for each in places] == [4, 0, 2]
    assert all(eligible[0][places[0]])
    assert (np.diff(places[0]) > 0).all()
    assert [each.tolist() for each in places] == [each.tolist() for each in draw_places(eligible, 4, (7, 0))]
    assert any(draw_places(eligible, 4, (seed, 0))[0].tolist() != places[0].tolist() for seed in range(5))
    means = document_means(np.array([1.0, 2, 3, 6, 10, 20]), places)
    np.testing.assert_array_equal(means, [3, np.nan, 15])
    both = (places, places)
    assert together(both, moved(both, 1))[0][2].tolist() == [-1, 0, 1]


def test_tokens_to_the_left_and_right():
    """Where the document ends there is no label."""
    reading = Reading(TokenDocument("d", "s", (5, 6, 7), False), "", np.array([5, 6, 7]), None)
    assert token_at(reading, -1).tolist() == [-1, 5, 6]
    assert token_at(reading, 0).tolist() == [5, 6, 7]
    assert token_at(reading, 2).tolist() == [7, -1, -1]


# -- labels of Python -----------------------------------------------------------------------------------------

SNIPPET = """\
class A:  # one
    def f(self, x=[1]):
        '''Doc
        more'''
        return f"{x}" + \\
            x(2)

y = None
"""
# Pieces of it as a tokenizer might cut it: kind, indentation, depth after it, and whether in a string or comment.
WORKED = [
    ("class", "keyword", 0, 0, 0),
    (" A", "name", 0, 0, 0),
    (":", "operator", 0, 0, 0),
    ("  # one", "comment", 0, 0, 1),
    ("\n   ", "space", 0, 0, 0),
    (" def", "keyword", 1, 0, 0),
    (" f(", "name", 1, 1, 0),
    ("self", "name", 1, 1, 0),
    (", x", "operator", 1, 1, 0),
    ("=[", "operator", 1, 2, 0),
    ("1", "number", 1, 2, 0),
    ("]):", "operator", 1, 0, 0),
    ("\n       ", "space", 1, 0, 0),
    (" '''Doc", "string", 2, 0, 1),
    ("\n        ", "string", 2, 0, 1),
    ("more'''", "string", 2, 0, 1),
    ("\n        return", "keyword", 2, 0, 0),
    (' f"{', "string", 2, 0, 1),
    ('x}"', "string", 2, 0, 1),
    (" +", "operator", 2, 0, 0),
    (" \\\n           ", "space", 2, 0, 0),
    (" x", "name", 2, 0, 0),
    ("(", "operator", 2, 1, 0),
    ("2)", "number", 2, 0, 0),
    ("\n\n", "space", 2, 0, 0),
    ("y", "name", 0, 0, 0),
    (" =", "operator", 0, 0, 0),
    (" None", "keyword", 0, 0, 0),
    ("\n", "space", 0, 0, 0),
]


def reading_of(text, pieces):
    """A reading whose tokens are these pieces of the text."""
    ends = np.cumsum([len(piece) for piece in pieces])
    ids = tuple(range(len(pieces)))
    spans = np.column_stack((ends - [len(piece) for piece in pieces], ends))
    return Reading(TokenDocument("d", "s", ids, False), text, np.array(ids), spans)


def test_labels_of_a_snippet_by_hand():
    """Token by token."""
    pieces = [piece for piece, *_ in WORKED]
    assert "".join(pieces) == SNIPPET
    found = token_labels(reading_of(SNIPPET, pieces))
    for place, (piece, kind, indentation, depth, inside) in enumerate(WORKED):
        got = (KINDS[found["kind"][place]], *(int(found[name][place]) for name in ("indentation", "depth", "inside")))
        assert got == (kind, indentation, depth, inside), piece


def test_deep_is_one_class_and_special_tokens_have_none():
    """From four on; a token of no characters is no part of the text."""
    text = "x = ((((((1))))))\n"
    reading = reading_of(text, ["", "x = (", "(((((", "1", "))))))\n"])
    assert token_labels(reading)["depth"].tolist() == [-1, 1, 4, 4, 0]
    assert token_labels(reading)["kind"][0] == -1


@pytest.mark.parametrize(
    "text", ["x = 1\ns = '''never closed\n", "if x:\n    a = 1\n  b = 2\n", "what is this? no $code\n"]
)
def test_what_does_not_tokenise_has_no_labels(text):
    """As far as the model reads; beyond, it may break as it likes."""
    first = re.match(r"[^\n]+", text)[0]
    pieces = [first, text[len(first) :]]
    assert all((labels == -1).all() for labels in token_labels(reading_of(text, pieces)).values())
    assert code_labels(text).reach < len(text)
    if text.startswith("x = 1"):
        assert token_labels(reading_of(text, pieces[:1]))["kind"].tolist() == [KINDS.index("name")]


def test_a_suite_of_code_says_how_many_documents_it_leaves_out():
    """They are in neither half."""
    fit, halves = [f"def f{i}(a, b):\n    return a[{i}] + '{i}'\n" for i in range(12)], []
    for name, texts in (("fit", [*fit, "'''" + "never closed " * 20]), ("report", fit[:6])):
        halves.append(tuple(Document(text * 3, f"{name}/{i}", f"{name} {i % 3}") for i, text in enumerate(texts)))
    model = make_model(vocab_size=2048, n_ctx=256)
    model.tokenizer = ld.load("tiny-plt-4").tokenizer
    scores = probe(model, Corpus("code", *halves), "code_structure", n_loops=1, hooks=["hook_out"], places=8)
    about = scores.provenance
    assert (about["documents_unlabelled"], about["documents_fit"], about["documents"]) == (1, 12, 6)
    assert {each["target"]: each["classes"] for each in about["targets"]}["indentation"] == 2
    assert score_of(scores, "token kind", "hook_out", 0) > 0.9  # it is nearly one of the token


# -- targets of your own, and refusals ---------------------------------------------------------------------


def test_a_target_of_your_own():
    """Whatever can be said of a token: here whether its number is even, which random embeddings tell for most."""
    even = Target("even", lambda reading: reading.ids % 2, ("odd", "even"))
    scores = probe(planted_model(), CORPUS, [even], hooks=["hook_carry"], n_loops=2, places=24)
    assert scores.targets == ["even"]
    assert scores.provenance["suite"] == "targets of your own"
    assert scores.provenance["absent"] == {"hook_carry": "loops 1 have no hook_carry"}
    assert [(row.loop, row.hook) for row in scores.table()] == [(0, "hook_carry"), (2, "hook_carry")]
    # The token itself is gone: the carry is of the one before.
    assert score_of(scores, "even", "hook_carry", 0) > 0.8
    assert score_of(scores, "even", "hook_carry", 2) < 0.65


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "position"}, "no suite 'position': there are position_identity, code_structure"),
        ({"suite": []}, "a list of one target or more"),
        ({"suite": [TOKENS[0], TOKENS[0]]}, "each with its own name"),
        ({"hooks": ["hook_inn"]}, "No loop of this model has a hook 'hook_inn': there are .*hook_in, .*hook_readout"),
        ({"hooks": ["blocks.0.attn.hook_pattern_global"]}, "No loop of this model has a hook"),
        ({"hooks": []}, "give one or more names"),
        ({"hooks": ["hook_in", "hook_in"]}, "each once"),
        ({"suite": "carried_information", "n_loops": 1}, "needs two loops or more, and this run has 1"),
        ({"suite": "code_structure", "corpus": CORPUS}, "labels in the fit documents.*Is this the right text"),
        ({"corpus": replace(CORPUS, fit=CORPUS.fit[:1])}, "at least 2 sources, and were given 1"),
        ({"corpus": replace(CORPUS, report=())}, "no report documents"),
        ({"max_tokens": 999}, "beyond this model"),
        ({"suite": [Target("one", lambda reading: 0 * reading.ids)]}, "'one' has 1 labels in the fit documents"),
    ],
)
def test_refusals(change, message):
    """One message, before the model runs."""
    model = planted_model()
    model.forward = None  # a run would fail otherwise
    arguments = {"corpus": CORPUS, "suite": "position_identity", **SMALL, **change}
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        probe(model, **arguments)


def test_a_model_that_cannot_be_read():
    """No tokenizer; loops that an intervention has rewired; numbers out of range."""
    model = planted_model()
    with pytest.raises(ValueError, match="places = 0"):
        probe(model, CORPUS, TOKENS, places=0)
    with ld.interventions.skip_loop(model, 2), pytest.raises(ScoresError, match="inside an intervention"):
        probe(model, CORPUS, TOKENS)
    model.tokenizer = None
    with pytest.raises(ScoresError, match="no tokenizer"):
        probe(model, CORPUS, TOKENS)


def test_states_that_are_not_finite_are_named():
    """Of a model that breaks down in its loops."""
    model = planted_model()
    model.ln_final.weight.data.fill_(float("inf"))
    with pytest.raises(ScoresError, match=r"States at loops\.1\.hook_out are not finite"):
        probe(model, CORPUS, TOKENS[:1], hooks=["hook_out"], **SMALL)


def test_hooks_are_listed_by_the_loops_that_have_them():
    """A gate is in later loops only."""
    assert points_of(make_model(), 3, ["hook_in", "blocks.0.attn.hook_gate"]) == {
        "hook_in": [1, 2, 3],
        "blocks.0.attn.hook_gate": [2, 3],
    }


# -- the result -------------------------------------------------------------------------------------------------


def hand_made(unit="accuracy", loops=(0, 1, 2), trained=1):
    """Two documents of a source each and a third without a place; two hooks, of which one lacks loop 1."""
    values = np.zeros((1, 2, len(loops), 3))
    values[0, :, :, 0] = [0.2, 0.4, 0.9][: len(loops)]
    values[0, :, :, 1] = [0.4, 0.4, 0.5][: len(loops)]
    values[0, 0] += 0.1
    values[..., 2] = np.nan
    values[0, 1, 1:2] = np.nan
    dims = ("target", "hook", "loop", "document")
    about = {
        "schema": SCHEMA,
        "suite": "s",
        "unit": unit,
        "model": "m",
        "trained_loops": trained,
        "run_loops": loops[-1],
    }
    about |= {"documents": 3, "documents_fit": 3, "corpus": "c"}
    baseline = np.full((1, len(loops), 3), 0.25)
    return ProbeScores(
        xr.Dataset(
            {
                "score": (dims, values),
                "control": (dims, values / 2),
                "floor": (dims, values / 4),
                "nll": (dims, 1 - values),
                "baseline" if unit == "accuracy" else "floor_baseline_nll": (("target", "loop", "document"), baseline),
                "baseline_nll": (("target", "loop", "document"), 4 * baseline),
                "C": (dims[:-1], values[..., 0] + 1),
                "floor_C": (dims[:-1], values[..., 0] + 2),
            },
            {
                "target": ["t"],
                "hook": ["hook_in", "hook_late"],
                "loop": list(loops),
                "document": ["a", "b", "c"],
                "source": ("document", ["a", "b", "c"]),
            },
            {"provenance": json.dumps(about)},
        )
    )


def test_the_table_by_hand():
    """Means over the documents that have places, paired changes, and no row where a loop lacks the hook."""
    rows = hand_made().table()
    assert [(row.hook, row.loop, row.extrapolated) for row in rows] == [
        ("hook_in", 0, False),
        ("hook_in", 1, False),
        ("hook_in", 2, True),
        ("hook_late", 0, False),
        ("hook_late", 2, True),
    ]
    last = rows[2]
    assert (last.score, last.control, last.floor) == pytest.approx((0.8, 0.4, 0.2))
    assert (last.change, last.selectivity, last.nll) == pytest.approx((0.3, 0.4, 0.2))
    assert (last.baseline, last.baseline_nll) == (0.25, 1)
    assert (last.C, last.floor_C) == pytest.approx((2, 3))
    assert np.isnan([last.control_C, last.share, last.floor_share]).all()
    # Of two documents the resamples are one of them, the other, or both.
    assert (last.score_low, last.score_high) == pytest.approx((0.6, 1.0))
    assert (last.change_low, last.change_high) == pytest.approx((0.1, 0.5))
    assert np.isnan([rows[0].change, rows[4].change, last.floor_baseline_nll]).all()
    informs = hand_made("information").table()
    assert np.isnan([row.change for row in informs]).all()
    assert (informs[2].floor_baseline_nll, informs[2].baseline_nll) == (0.25, 1)
    assert (informs[2].share, informs[2].floor_share) == pytest.approx((0.8, 0.8))
    assert np.isnan(informs[2].baseline)


def test_a_file_keeps_the_scores(tmp_path, planted_scores):
    """Whole; and a file of another kind is refused."""
    planted_scores.save(tmp_path / "p.nc")
    xr.testing.assert_identical(ProbeScores.load(tmp_path / "p.nc").data, planted_scores.data)
    with pytest.raises(InputError, match="holds no diagnosis but scores of probes"):
        ld.Diagnosis.load(tmp_path / "p.nc")
    assert "targets of your own on a model made here" in repr(planted_scores)
    assert "hook_out, loop 3" in planted_scores._repr_html_()


def test_the_csv_is_the_table():
    """Every row and field, five digits, empty where undefined; the seed is that of the intervals."""
    scores = hand_made()
    lines = list(csv.DictReader(report.probe_table(scores, 3).decode().splitlines()))
    for line, row in zip(lines, scores.table(3), strict=True):
        assert (line["model"], line["suite"], line["unit"]) == ("m", "s", "accuracy")
        for name, value in vars(row).items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            expected = ("" if np.isnan(value) else f"{value:.5g}") if isinstance(value, float) else text
            assert line[name] == expected


# -- the figure ---------------------------------------------------------------------------------------------------


def drawn(axes):
    """Label to y values of the lines of axes."""
    return {str(each.get_label()): each.get_ydata() for each in axes.lines}


def test_the_figure_shows_every_loop_beside_its_references():
    """Score, control and random weights by hook, the most frequent class; loops beyond training on a shade."""
    (axes,) = plots.probes(hand_made())
    lines = drawn(axes)
    np.testing.assert_allclose(lines["hook_in"], [0.4, 0.5, 0.8])
    np.testing.assert_allclose(lines["hook_late"], [0.3, 0.7])
    np.testing.assert_allclose(lines["hook_in: control task"], [0.2, 0.25, 0.4])
    np.testing.assert_allclose(lines["hook_in: random weights"], [0.1, 0.125, 0.2])
    np.testing.assert_allclose(lines["most frequent class"], [0.25, 0.25, 0.25])
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("t", "loop", "accuracy")
    told = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert told == ["hook_in", "hook_late", "control task", "random weights", "most frequent class", "beyond training"]
    assert axes.figure.legends[0].get_title().get_text() == "s, m. Intervals: 95 % over 3 documents."


def test_information_stands_under_what_is_open():
    """Random weights have clusters of their own, on another scale."""
    (axes,) = plots.probes(hand_made("information"))
    lines = drawn(axes)
    assert "hook_in: random weights" not in lines
    np.testing.assert_allclose(lines["left open by the embeddings"], [1, 1, 1])
    assert axes.get_ylabel() == "information (nats per token)"
    (axes,) = plots.probes(hand_made("information", loops=(2,)))
    (left_open,) = (each for each in axes.lines if each.get_label() == "left open by the embeddings")
    assert left_open.get_marker() == "_"


def test_the_same_scores_give_the_same_pictures(planted_scores):
    """To the byte; three targets side by side."""
    first, again = (plots.pictures_of_probes(planted_scores) for _ in range(2))
    assert first == again
    assert first["png"].startswith(b"\x89PNG")
    assert len(plots.probes(planted_scores)) == 3


# -- the folder of results ---------------------------------------------------------------------------------------

FOLDERS = sorted((Path(__file__).parents[1] / "probes").glob("*/"))


def test_every_suite_has_its_folder():
    """And no other folder."""
    assert {folder.name for folder in FOLDERS} == set(SUITES)


@pytest.mark.parametrize(
    "file", sorted(file for folder in FOLDERS for file in folder.glob("*.csv")), ids=lambda file: file.stem
)
def test_strengths_are_chosen_from_among_enough(file):
    """Not at an edge, but the weakest where nearly all is read, since there a weaker one would do as well."""
    for row in csv.DictReader(file.read_text().splitlines()):
        for name, strength in (("score", "C"), ("control", "control_C"), ("floor", "floor_C")):
            chosen = float(row[strength])
            weakest = chosen == max(STRENGTHS) and float(row[name]) > 0.95
            assert weakest or min(STRENGTHS) < chosen < max(STRENGTHS), row


# Of information: what there is to tell, and the share of it.
OPEN = {"score": ("baseline_nll", "share"), "floor": ("floor_baseline_nll", "floor_share")}


def as_told(row, column):
    """A number of a command's table as README has it: with an interval, with what there is to tell, or alone."""
    name = {"": "score", "random weights": "floor"}.get(column, column.removesuffix(" [95 %]"))
    if not row or not row[name]:
        return ""
    if column.endswith("[95 %]"):
        value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"
    if row["unit"] == "information" and name in OPEN:
        value, there, share = (float(row[each]) for each in (name, *OPEN[name]))
        return f"{value:.2f} of {there:.2f} ({100 * share:.0f} %)"
    return f"{float(row[name]):.2f}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_whole_and_its_numbers_are_those_of_its_files(folder):
    """Question, command, what would have changed our mind, result; every cell is that of the command's own table."""
    text = (folder / "README.md").read_text()
    parts = ("**Question.**", "**Labels.**", "**Command.**", "**What would have changed our mind.**", "**Result.**")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert [link for link in re.findall(r"(?:\]\(|src=\")([^)\"]+)", text) if not (folder / link).exists()] == []
    result = text[places[-1] :]
    cells, numbers = 0, {}
    for line in (line for line in result.splitlines() if line.startswith("|")):
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        if others[0].startswith("loop"):
            loops = [int(cell.removeprefix("loop ")) for cell in others]
            file = folder / f"{folder.name}-{first}.csv"
            rows = csv.DictReader(file.read_text().splitlines())
            numbers = {(row["target"], row["hook"], int(row["loop"])): row for row in rows}
        elif not first.startswith("-"):
            target, hook, column = (*first.split(", "), "")[:3]
            for loop, cell in zip(loops, others, strict=True):
                assert cell == as_told(numbers.get((target, hook, loop)), column), (first, loop)
                cells += 1
    assert cells > 10
    prose = re.sub(r"^\|.*$|\(\S+\)", "", result, flags=re.MULTILINE)
    assert not re.search(r"\d\.\d", prose)  # numbers stand in the tables
