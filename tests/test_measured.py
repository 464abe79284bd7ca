"""What a sweep measured: gain, tax and net, the loop count to train with, and the JSON answer; on made-up losses."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import diagnosis_of
from scipy import stats

from loopdiag.bootstrap import interval, resampled_means, student_interval
from loopdiag.errors import InputError
from loopdiag.gaincost import decompose, recommend, recommend_training
from loopdiag.gaincost.answer import dumps, sweep_answer
from loopdiag.gaincost.measured import _student_noise, equal_work, loss_curves, over_training
from loopdiag.gaincost.scaling import exponent_of
from loopdiag.losses import SweepError, SweepLosses
from loopdiag.model.config import LoopedConfig
from loopdiag.sweep.gathering import gather
from loopdiag.sweep.grid import Grid

calm = settings(deadline=None, derandomize=True, max_examples=25)
DOCUMENTED = Path(__file__).parents[1] / "docs" / "json.md"
PLACE = ("seed", "memory", "offset", "loops")
COSTS = ("flops", "kv_bytes", "kv_bytes_fixed", "parameters_once", "parameters_looped")

# Held-out losses of one to four loops with an offset, and without: two loops win, or three.
SEVERAL = [[3.2, 3.1, 3.15, 3.14], [3.2, 3.18, 3.12, 3.13]]


def by_token(
    truth, *, loops=None, seeds=1, memories=1, documents=40, tokens=4, noise=0.0, spread=0.0, missing=(), seed=0
):
    """Losses [seed, memory, offset, loops, document, token] around a truth.

    Args:
        truth: Mean losses [offset, loops], or [memory, offset, loops].
        loops: Loop counts, of which one loop is the same model everywhere; 1.. when None.
        seeds, memories, documents, tokens: How many.
        noise: Standard deviation of each document's loss at each place, the same for every seed.
        spread: Standard deviation of a training's loss.
        missing: Places [seed, memory, offset, loops], counted from 0, that are not trained.
        seed: Of all that is drawn.
    """
    random = np.random.default_rng(seed)
    truth = np.broadcast_to(truth, (memories, *np.shape(truth)[-2:]))
    difficulty, within = 0.5 * random.standard_normal((documents, 1)), random.standard_normal((documents, tokens))
    churn = 0.2 * random.standard_normal((seeds, *truth.shape, documents, tokens))
    losses = truth[..., None, None] + spread * random.standard_normal((seeds, *truth.shape, 1, 1))
    losses = losses + difficulty + noise * random.standard_normal((*truth.shape, documents, 1))
    losses = losses + within + churn - (within + churn).mean(-1, keepdims=True)
    if loops is None or loops[0] == 1:
        losses[:, :, :, 0] = losses[:, :1, :1, 0]
    for place in missing:
        losses[place] = np.nan
    return losses


def sweep_of(losses, *, loops=None, offsets=(1, 0), sources=None):
    """A sweep in the form that `loopdiag.sweep` gives it, from the losses of tokens."""
    n_seeds, n_memories, n_offsets, n_loops, n_documents, _ = losses.shape
    fewer = np.full_like(losses, np.nan)
    fewer[:, :, :, 1:] = losses[:, :, :, :-1]
    without = losses[:, :, [-1]] if offsets[-1] == 0 else np.nan * losses
    values = {"nll": losses}
    for name, reference in (("loop", fewer), ("offset", without)):
        values[f"{name}_helped"] = np.maximum(reference - losses, 0)
        values[f"{name}_harmed"] = np.maximum(losses - reference, 0)
    shape = (n_memories, n_offsets, n_loops)
    names = [f"document {n}" for n in range(n_documents)]
    data = xr.Dataset(
        {name: ((*PLACE, "document"), of_tokens.mean(-1)) for name, of_tokens in values.items()}
        | {name: (PLACE[1:], np.full(shape, 1e6)) for name in COSTS}
        | {"learning_rate": ("loops", np.full(n_loops, 0.003))}
        | {"nll_look": ((*PLACE, "look", "document"), np.stack([losses.mean(-1) + 1, losses.mean(-1)], 4))},
        {
            "seed": range(n_seeds),
            "memory": ["first", "own"][:n_memories],
            "offset": list(offsets),
            "loops": list(loops or range(1, n_loops + 1)),
            "look": [500, 1000],
            "document": names,
            "source": ("document", names if sources is None else sources),
        },
        {
            "provenance": json.dumps(
                {"schema": 1, "data": "made-up text", "text_sha256": "0", "recipe": {"tokens": 1000, "sequence": 8}}
            )
        },
    )
    return SweepLosses(data)


def made_up(truth, *, loops=None, offsets=(1, 0), sources=None, **drawn):
    """A sweep drawn from a truth; see `by_token`."""
    return sweep_of(by_token(truth, loops=loops, **drawn), loops=loops, offsets=offsets, sources=sources)


def measured(losses, offset=1, memory="first"):
    """Mean losses [seed, loops] over documents."""
    return losses.data["nll"].sel(offset=offset, memory=memory).mean("document").values


def told(losses, price=0.01, seed=0):
    """The JSON answer as somebody who reads it gets it, for every place of a whole sweep."""
    answers = [
        recommend_training(losses, price, offset=int(offset), memory=str(memory), seed=seed)
        for memory in losses.data["memory"].values
        for offset in losses.data["offset"].values
    ]
    return json.loads(dumps(sweep_answer(losses, answers, seed)))


def test_made_up_sweeps_are_what_gathering_gives(tmp_path):
    """The same losses, written as trained models leave them, give the same numbers under the same names and axes."""
    losses = by_token(SEVERAL, seeds=2, memories=2, documents=6, missing=[(1, 0, 0, 2)]).astype(np.float32)
    expected = sweep_of(losses.astype(float)).data
    grid = Grid((1, 2, 3, 4), memories=("first", "own"), seeds=(0, 1))
    size = {"n_layers": 1, "d_model": 8, "n_heads": 2, "n_kv_heads": 1, "d_head": 4, "d_mlp": 8}
    config = asdict(LoopedConfig(**size, n_loops=1, vocab_size=9, n_ctx=16))
    for name in ("n_loops", "offset", "memory"):
        del config[name]
    text = {"data": "made-up text", "text_sha256": "0"}
    settings = {"config": config, "recipe": {"sequence": 8, "tokens": 1000}, "schema": 1, **text}
    (tmp_path / "sweep.json").write_text(json.dumps(settings))
    (tmp_path / "cells").mkdir()
    for place in np.ndindex(losses.shape[:4]):
        cell = grid.cell(place[0], ("first", "own")[place[1]], 1 - place[2], place[3] + 1)
        if np.isfinite(losses[place]).all():
            about = {"cell": asdict(cell), "recipe": {"learning_rate": 0.003}, "weights_sha256": ""}
            look = expected["nll_look"].values[place].astype(np.float32)
            data = xr.Dataset(
                {"nll_token": (("document", "pos"), losses[place]), "nll_look": (("look", "document"), look)},
                {name: expected[name] for name in ("document", "source", "look")},
                {"provenance": json.dumps(about)},
            )
            data.to_netcdf(tmp_path / "cells" / f"{cell.name}.nc", engine="h5netcdf")
    found = gather(tmp_path)
    for name, values in expected.data_vars.items():
        assert found.data[name].dims == values.dims
        if name not in COSTS:
            np.testing.assert_allclose(found.data[name].values, values.values, rtol=1e-6, atol=1e-6, err_msg=name)
    for name, values in expected.coords.items():
        assert (found.data[name].values == values.values).all()
    assert set(json.loads(expected.attrs["provenance"])) <= set(found.provenance)


# -- gain, tax and net --------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["seeds", "documents"])
@pytest.mark.parametrize("loops", [(1, 2, 3, 4), (1, 2, 4, 8), (2, 3, 4, 6)])
def test_the_decomposition_adds_up(loops, over):
    """net = gain - the change of the tax, loop by loop and in sum; each is what its tokens gain less what they lose."""
    losses = made_up(SEVERAL, loops=loops, seeds=3, memories=2, noise=0.05, spread=0.02)
    parts = decompose(losses, "own", over=over)
    on, off = measured(losses, 1, "own").mean(0), measured(losses, 0, "own").mean(0)
    gain, tax, net = parts.gain.mean, parts.tax.mean, parts.net.mean
    assert (parts.memory, parts.loops.tolist(), parts.seeds, parts.over) == ("own", list(loops), 3, over)
    np.testing.assert_allclose(parts.loss_on.mean, on, atol=1e-12)
    np.testing.assert_allclose(parts.loss_off.mean, off, atol=1e-12)
    np.testing.assert_allclose(tax, on - off, atol=1e-12)
    np.testing.assert_allclose(net[1:], gain[1:] - np.diff(tax), rtol=0, atol=1e-12)
    np.testing.assert_allclose(parts.rise.mean[1:], np.diff(tax), rtol=0, atol=1e-12)
    np.testing.assert_allclose(net[1:].sum(), on[0] - on[-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gain[1:].sum(), off[0] - off[-1], rtol=0, atol=1e-12)
    assert np.isnan([gain[0], net[0], parts.helped["gain"].mean[0], parts.harmed["net"].low[0]]).all()
    for name, sign in (("gain", 1), ("tax", -1), ("net", 1)):
        whole = sign * (parts.helped[name].mean - parts.harmed[name].mean)
        np.testing.assert_allclose(getattr(parts, name).mean, whole, rtol=0, atol=1e-12)
        if loops[0] == 2 or name != "tax":
            assert parts.helped[name].mean[1] > 0 < parts.harmed[name].mean[1]
    if loops[0] == 1:  # one model, which nothing can tax
        for estimate in (parts.tax, parts.helped["tax"], parts.harmed["tax"]):
            assert (estimate.mean[0], estimate.low[0], estimate.high[0]) == (0, 0, 0)
    else:
        assert tax[0] != 0


def test_decomposition_by_hand():
    """One document, two tokens: what is seen of a table in one's head."""
    on, off = [[4.0, 2.0], [1.0, 3.0]], [[4.0, 2.0], [2.0, 2.5]]  # [loops, token]
    parts = decompose(sweep_of(np.array([on, off])[None, None, :, :, None]))
    assert (parts.loss_on.mean.tolist(), parts.loss_off.mean.tolist()) == ([3, 2], [3, 2.25])
    assert (parts.gain.mean[1], parts.helped["gain"].mean[1], parts.harmed["gain"].mean[1]) == (0.75, 1, 0.25)
    assert (parts.net.mean[1], parts.helped["net"].mean[1], parts.harmed["net"].mean[1]) == (1, 1.5, 0.5)
    assert (parts.tax.mean[1], parts.helped["tax"].mean[1], parts.harmed["tax"].mean[1]) == (-0.25, 0.5, 0.25)


def test_intervals_over_seeds_are_scipys():
    """t intervals on each seed's own differences, so what a seed adds to all its models does not count."""
    losses = made_up(SEVERAL, seeds=4, noise=0.05, spread=0.02)
    losses.data["nll"] += xr.DataArray([0.0, 5.0, -3.0, 1.0], dims="seed")
    parts = decompose(losses)
    assert parts.over == "seeds"
    on, off = measured(losses), measured(losses, 0)
    for estimate, differences in (
        (parts.tax, on - off),
        (parts.gain, -np.diff(off, prepend=np.nan)),
        (parts.net, -np.diff(on, prepend=np.nan)),
        (parts.rise, np.diff(on - off, prepend=np.nan)),
        (parts.loss_on, on),
    ):
        for place in range(1, 4):
            outside = stats.ttest_1samp(differences[:, place], 0).confidence_interval()
            found = estimate.low[place], estimate.high[place]
            assert found == pytest.approx((outside.low, outside.high), rel=1e-9)
    assert (parts.tax.high - parts.tax.low)[1:].max() < 0.2 < (parts.loss_on.high - parts.loss_on.low).min()


def test_t_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), 4.303 of it at two degrees of freedom; what is not there is not."""
    nan = math.nan
    low, high = student_interval(np.array([[1.0, 1, nan, nan, 7], [2, nan, nan, 5, 7], [3, 3, nan, nan, 7]]))
    assert (low[0], high[0]) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-5)
    assert (low[1], high[1]) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)
    assert np.isnan([low[2:4], high[2:4]]).all()  # none, and one
    assert (low[4], high[4]) == (7, 7)


@calm
@given(st.integers(2, 6), st.integers(0, 1000))
def test_t_interval_with_gaps_is_scipys(n_seeds, seed):
    """Each column by itself, without its gaps."""
    random = np.random.default_rng(seed)
    values = random.normal(3, 0.1, (n_seeds, 5))
    values[2:][random.random((n_seeds - 2, 5)) < 0.4] = np.nan
    outside = stats.ttest_1samp(values, 0, nan_policy="omit").confidence_interval()
    np.testing.assert_allclose(student_interval(values), (outside.low, outside.high), rtol=1e-9)


def test_intervals_over_documents_are_scipys():
    """A bootstrap over documents of the mean of the seeds, which leaves out how much seeds differ."""
    losses = made_up(SEVERAL, seeds=2, noise=0.1, spread=1.0)
    parts = decompose(losses)
    assert parts.over == "documents"
    nll = losses.data["nll"].sel(memory="first").mean("seed")
    on, off = nll.sel(offset=1).transpose("loops", "document").values, nll.sel(offset=0).transpose("loops", ...).values
    for estimate, values in ((parts.tax, on[2] - off[2]), (parts.net, on[1] - on[2]), (parts.gain, off[1] - off[2])):
        outside = stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
        )
        found = estimate.low[2], estimate.high[2]
        assert found == pytest.approx(tuple(outside.confidence_interval), abs=0.15 * outside.standard_error)
        assert estimate.mean[2] == pytest.approx(values.mean(), abs=1e-12)


def test_documents_of_one_source_are_drawn_together():
    """Twins of a document add no certainty; the seed of the draws settles them."""
    losses = by_token(SEVERAL, documents=20, noise=0.1)
    twice = sweep_of(np.repeat(losses, 2, axis=4), sources=np.repeat([f"source {n}" for n in range(20)], 2))
    alone = decompose(sweep_of(losses, sources=[f"source {n}" for n in range(20)]))
    for name in ("gain", "tax", "net", "loss_on"):
        np.testing.assert_allclose(getattr(decompose(twice), name).low, getattr(alone, name).low, rtol=1e-9, atol=1e-12)
    assert (decompose(twice).tax.low == decompose(twice).tax.low).all()
    assert decompose(twice, seed=1).tax.low[1] != decompose(twice).tax.low[1]


def test_which_seeds_and_what_over():
    """Three seeds make a claim over seeds, which documents or fewer seeds may replace."""
    losses = made_up(SEVERAL, seeds=4, noise=0.05, spread=0.05)
    assert (decompose(losses).over, decompose(losses, over="documents").over) == ("seeds", "documents")
    two = decompose(losses, seeds=[3, 1])
    assert (two.over, two.seeds) == ("documents", 2)
    np.testing.assert_allclose(two.loss_on.mean, measured(losses)[[1, 3]].mean(0), atol=1e-12)
    low, high = student_interval((measured(losses) - measured(losses, 0))[[1, 3]])
    over_seeds = decompose(losses, seeds=(1, 3), over="seeds")
    np.testing.assert_allclose((over_seeds.tax.low, over_seeds.tax.high), (low, high), atol=1e-12)
    one = decompose(losses, seeds=[2])
    np.testing.assert_allclose(one.tax.mean, measured(losses)[2] - measured(losses, 0)[2], atol=1e-12)
    assert decompose(losses).memory == "first"


def test_seeds_that_lack_a_model_are_left_out():
    """As long as one has them all, so that what is said adds up."""
    losses = made_up(SEVERAL, seeds=4, spread=0.1, missing=[(0, 0, 1, 2), (3, 0, 0, 1)])
    parts, whole = decompose(losses), decompose(losses, seeds=[1, 2])
    assert (parts.seeds, parts.over) == (2, "documents")
    for name in ("gain", "tax", "net", "loss_on", "loss_off"):
        np.testing.assert_array_equal(getattr(parts, name).mean, getattr(whole, name).mean)
    np.testing.assert_allclose(parts.net.mean[1:], (parts.gain.mean - np.diff(parts.tax.mean, prepend=0))[1:])


def test_where_no_seed_has_all_models_each_number_is_of_those_it_has():
    """NaN where there is none."""
    missing = [(0, 0, 0, 3), (1, 0, 0, 3), (2, 0, 0, 3), (1, 0, 0, 1)]
    losses = made_up(SEVERAL, seeds=3, noise=0.05, spread=0.1, missing=missing)
    taxes = measured(losses) - measured(losses, 0)
    parts = decompose(losses, over="seeds")
    np.testing.assert_allclose(parts.tax.mean, [0, taxes[[0, 2], 1].mean(), taxes[:, 2].mean(), np.nan], atol=1e-12)
    np.testing.assert_allclose(
        np.stack([parts.tax.low, parts.tax.high])[:, 1:3], np.stack(student_interval(taxes))[:, 1:3]
    )
    documents = decompose(losses, over="documents")
    np.testing.assert_allclose(documents.tax.mean, parts.tax.mean)
    by_document = losses.data["nll"].sel(memory="first").isel(loops=1, seed=[0, 2]).mean("seed")
    by_document = (by_document.sel(offset=1) - by_document.sel(offset=0)).values
    expected = interval(resampled_means(by_document, losses.data["source"].values))
    assert (documents.tax.low[1], documents.tax.high[1]) == pytest.approx(expected, rel=1e-9)
    assert np.isnan([documents.tax.low[3], documents.net.mean[3], parts.loss_on.high[3]]).all()
    assert np.isfinite(documents.gain.low[1:]).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"memory": "own"}, "no models with memory 'own': it has first"),
        ({"seeds": [0, 7]}, r"seeds = \[0, 7\] is not allowed: give different ones of 0, 1, 2"),
        ({"seeds": []}, "give different ones of 0, 1, 2"),
        ({"seeds": [1, 1, 1]}, "give different ones of 0, 1, 2"),
        ({"seeds": [1], "over": "seeds"}, "One seed cannot say how much trainings differ"),
    ],
)
def test_what_cannot_be_decomposed(arguments, said):
    with pytest.raises(SweepError, match=said):
        decompose(made_up(SEVERAL, seeds=3), **arguments)


def test_a_tax_needs_both_offsets():
    for offset, truth in zip((1, 0), SEVERAL, strict=True):
        with pytest.raises(SweepError, match="one offset only"):
            decompose(made_up([truth], offsets=(offset,)))
    with pytest.raises(ValueError, match="over = 'models' is not allowed"):
        decompose(made_up(SEVERAL), over="models")


def test_curves_of_the_losses():
    """Every memory and offset, over the seeds that have all of its models; over all where each lacks one."""
    missing = [(0, 1, 0, 2), (0, 1, 1, 3), (1, 1, 1, 3), (2, 1, 1, 3)]
    losses = made_up(SEVERAL, seeds=3, memories=2, spread=0.1, missing=missing)
    curves = loss_curves(losses)
    assert [(curve.memory, curve.offset) for curve in curves] == [("first", 1), ("first", 0), ("own", 1), ("own", 0)]
    for curve, whole in zip(curves, ([0, 1, 2], [0, 1, 2], [1, 2], [0, 1, 2]), strict=True):
        values = measured(losses, curve.offset, curve.memory)[whole]
        np.testing.assert_allclose(curve.by_seed, values)
        assert curve.over == ("seeds" if len(whole) == 3 else "documents")
        if len(whole) == 3:
            low, high = student_interval(values)
            np.testing.assert_allclose(curve.nll.low, low)
            np.testing.assert_allclose(curve.nll.high, high)
    assert np.isnan([curves[3].nll.mean[3], curves[3].nll.low[3]]).all()
    assert curves[2].nll.mean[2] == pytest.approx(measured(losses, 1, "own")[1:, 2].mean())
    assert [curve.offset for curve in loss_curves(losses, "own")] == [1, 0]


def test_equal_work():
    """Read off the looks where a model had cost as much as the smallest in all; the looks are at half and all."""
    losses = made_up([[3.0, 2.9, 2.8, 2.7]] * 2)
    losses.data["flops"][:] = np.array([1.0, 4 / 3, 2.0, 4.0])
    # Looks after 500 and 1,000 tokens, a nat apart; reached are 1,000, 750, 500 and 250 tokens.
    found = equal_work(losses, offset=1, memory="first") - measured(losses)[0]
    np.testing.assert_allclose(found, [0, 0.5, 1, np.nan], atol=1e-6)


def test_some_loop_counts_only():
    """As if the others had not been asked for; unknown ones are refused."""
    losses = made_up(SEVERAL, missing=[(0, 0, 0, 3)])
    some = recommend_training(losses, loops=[1, 2])
    assert some.loops == (1, 2)
    assert some.pick == 2
    with pytest.raises(SweepError, match="no models with loops"):
        recommend_training(losses, loops=[1, 5])


def test_what_an_answer_leaves_out():
    """Trainings that diverged, and a head start of the wiring that all models started from."""
    losses = made_up(SEVERAL, seeds=2, missing=[(0, 0, 0, 3)])
    about = losses.provenance | {"diverged": ["loops4-offset1-first-seed0"], "from": "a model"}
    losses.data.attrs["provenance"] = json.dumps(about)
    said = recommend_training(losses).leaves_out
    assert "diverged (loops4-offset1-first-seed0)" in said
    assert "head start" in said
    assert "diverged" not in recommend_training(losses, offset=0).leaves_out
    alone = made_up(SEVERAL, missing=[(0, 0, 0, 3)])
    alone.data.attrs["provenance"] = json.dumps(about)
    with pytest.raises(SweepError, match="Training diverged: loops4-offset1-first-seed0; a lower learning rate"):
        recommend_training(alone)


@pytest.mark.parametrize("seeds", [1, 3])
def test_looks_in_training_end_as_the_decomposition(seeds):
    """The same taxes and intervals at the last look; the loss above the smallest count sums what loops bring."""
    losses = made_up(SEVERAL, seeds=seeds, noise=0.05, spread=0.02)
    losses.data["nll_look"][:, :, 0, 1:, 0] += 0.25  # early on, the offset costs a quarter more
    course, parts = over_training(losses), decompose(losses)
    assert (course.tokens.tolist(), course.loops.tolist()) == ([500, 1000], [1, 2, 3, 4])
    assert (course.seeds, course.over) == (seeds, parts.over)
    for end in ("mean", "low", "high"):
        np.testing.assert_allclose(getattr(course.tax, end)[1], getattr(parts.tax, end), atol=1e-12)
        early = getattr(parts.tax, end) + np.array([0, 0.25, 0.25, 0.25])
        np.testing.assert_allclose(getattr(course.tax, end)[0], early, atol=1e-12)
    np.testing.assert_allclose(course.above[1].mean[1, 1:], -parts.net.mean[1:].cumsum(), atol=1e-12)
    np.testing.assert_allclose(course.above[0].mean[1, 1:], -parts.gain.mean[1:].cumsum(), atol=1e-12)
    assert not np.any([course.above[0].low[:, 0], course.above[1].high[:, 0]])
    assert over_training(made_up([SEVERAL[1]], offsets=(0,))).tax is None


# -- how many loops to train with ---------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_clear_winner_is_recommended(seeds):
    """Where it stands, at each offset its own."""
    losses = made_up(SEVERAL, seeds=seeds, noise=0.005, spread=0.0005)
    for offset, best in ((1, 2), (0, 3)):
        answer = recommend_training(losses, offset=offset)
        assert (answer.verdict, answer.recommended_loops, answer.pick, answer.why) == ("recommended", best, best, "")
        assert answer.support[best] > 0.95
        assert answer.contenders == (best,)
        assert (answer.offset, answer.memory, answer.seeds, answer.data) == (offset, "first", seeds, "made-up text")
        assert answer.loops == (1, 2, 3, 4)
        np.testing.assert_allclose(answer.nll.mean, measured(losses, offset).mean(0), atol=1e-12)
        assert (answer.nll.low < answer.nll.mean).all()
        assert (answer.nll.mean < answer.nll.high).all()
        assert str(answer).startswith(
            f"Train on made-up text with how many loops (offset {offset}, memory first)? Measured: {best} (support "
        )
    assert recommend_training(losses).offset == 1  # the standard


@pytest.mark.parametrize("seeds", [1, 3])
def test_ties_are_undetermined(seeds):
    """Losses that differ by less than their noise, where the price is small."""
    spread = 0.05 if seeds > 1 else 0.0
    answer = recommend_training(made_up([[3.0] * 3, [3.0] * 3], seeds=seeds, noise=0.2, spread=spread), 0.001)
    assert (answer.verdict, answer.recommended_loops) == ("undetermined", None)
    assert answer.why
    assert len(answer.contenders) > 1
    assert sum(answer.support.values()) == pytest.approx(1)
    assert "Measured: undetermined (" in str(answer)


def test_one_seed_is_judged_as_a_checkpoint_is():
    """The same losses, as loops of one checkpoint: the same rule, draws and errors."""
    losses = made_up(SEVERAL, noise=0.1, sources=[f"source {n // 2}" for n in range(40)])
    diagnosis = diagnosis_of(losses.data["nll"].sel(offset=1).values[0, 0].T, sources=losses.data["source"].values)
    for price in (0.0, 0.01, 0.05, 0.2):
        ours, other = recommend_training(losses, price, seed=3), recommend(diagnosis, price, seed=3)
        for name in ("verdict", "pick", "why", "support", "contenders", "break_even"):
            assert getattr(ours, name) == getattr(other, name), name


@pytest.mark.parametrize("loops", [(1, 2, 3, 4), (1, 2, 4, 8), (2, 3, 4, 7)])
def test_the_price_moves_the_pick_as_the_break_even_prices_say(loops):
    """Just below each price its count, just above the next."""
    truth = [3.6, 3.2, 3.1, 3.04]
    losses = made_up([truth, truth], loops=loops, documents=20)
    steps = recommend_training(losses).break_even
    assert [step.loops for step in steps] == list(loops[:0:-1])
    slopes = -np.diff(truth) / np.diff(loops)
    if loops[-1] == 8 or loops == (1, 2, 3, 4):
        assert [step.below for step in steps] == pytest.approx(slopes[::-1].tolist())
    for step, fewer in zip(steps, [*(step.loops for step in steps[1:]), loops[0]], strict=True):
        assert recommend_training(losses, step.below * 0.99).recommended_loops == step.loops
        assert recommend_training(losses, step.below * 1.01).recommended_loops == fewer
    assert f"else {loops[0]}" in str(recommend_training(losses))
    rising = made_up([[3.0, 3.1], [3.0, 3.1]], loops=loops[:2])
    assert recommend_training(rising).break_even == ()
    assert f"{loops[0]} loop{'s' if loops[0] > 1 else ''} at any price" in str(recommend_training(rising))


@pytest.mark.parametrize("loops", [(1,), (3,)])
def test_a_single_count_is_no_choice(loops):
    """It is recommended, and says so without doubt."""
    answer = recommend_training(made_up([[3.0], [3.0]], loops=loops))
    assert (answer.recommended_loops, answer.support, answer.break_even) == (loops[0], {loops[0]: 1.0}, ())


def test_noise_of_seeds_has_their_t_intervals():
    """Every paired difference of the draws, and every level: Student's t with the seeds' own standard error."""
    for n_seeds in (3, 5):
        means = np.random.default_rng(n_seeds).normal(size=(n_seeds, 3)) * [0.1, 0.5, 1.0]
        draws = _student_noise(means - means.mean(0), 20_000, 0)
        assert draws.shape == (20_000, 3)
        for weights in ([1, 0, 0], [1, -1, 0], [0, 1, -1], [1, 0, -1]):
            error = (means @ weights).std(ddof=1) / math.sqrt(n_seeds)
            assert stats.kstest(draws @ weights / error, stats.t(n_seeds - 1).cdf).pvalue > 0.01
            low, high = student_interval(means @ weights - (means @ weights).mean())
            assert interval(draws @ weights) == pytest.approx((low, high), rel=0.06)
    assert not _student_noise(np.zeros((3, 4)), 100, 0).any()


def test_three_seeds_count_beside_documents():
    """The interval is wide as seeds differ; with two, which cannot say, it is that of the documents."""
    losses = made_up(SEVERAL, seeds=3, noise=0.02, spread=0.3)
    seeds_alone = made_up(SEVERAL, seeds=3, spread=0.3)
    seeds_alone.data["nll"] -= seeds_alone.data["nll"].mean("seed") - seeds_alone.data["nll"].mean(("seed", "document"))
    answer = recommend_training(seeds_alone)
    low, high = student_interval(measured(seeds_alone))
    np.testing.assert_allclose(answer.nll.high - answer.nll.low, high - low, rtol=0.15)  # 2000 draws
    assert answer.leaves_out == "other data, sizes and budgets than these"
    two = SweepLosses(losses.data.isel(seed=[0, 1]))
    draws = resampled_means(two.data["nll"].sel(offset=1).mean("seed").values[0].T, losses.data["source"].values)
    np.testing.assert_allclose((recommend_training(two).nll.low, recommend_training(two).nll.high), interval(draws))
    assert "2 seeds cannot say how much trainings differ" in recommend_training(two).leaves_out
    wide = recommend_training(losses).nll
    assert (wide.high - wide.low > 1.5 * np.subtract(*interval(draws)[::-1])).all()


def test_the_standard_error_is_that_of_the_seeds():
    """Hand-worked: gains of 0.02, 0.05 and 0.14 have the mean 0.07 and the standard error 0.0361; prices around it."""
    losses = made_up([[3.0, 3.0], [3.0, 3.0]], seeds=3)
    for seed, gain in enumerate((0.02, 0.05, 0.14)):
        losses.data["nll"][seed] = losses.data["nll"][0, 0, 0, 0]
        losses.data["nll"][seed, :, :, 1] -= gain
    assert recommend_training(losses, 0.07 - 0.0360).pick == 1
    assert recommend_training(losses, 0.07 - 0.0362).pick == 2


def test_one_wild_seed_leaves_it_undetermined():
    """What two or more calm seeds would settle."""
    calm_seeds = made_up(SEVERAL, seeds=3, noise=0.005, spread=0.0005)
    assert recommend_training(calm_seeds).recommended_loops == 2
    wild = made_up(SEVERAL, seeds=3, noise=0.005, spread=0.0005)
    wild.data["nll"][1, 0, 0, 1] += 0.3
    answer = recommend_training(wild)
    assert (answer.verdict, answer.recommended_loops) == ("undetermined", None)
    shifted = made_up(SEVERAL, seeds=3, noise=0.005, spread=0.0005)
    shifted.data["nll"][1] += 0.3  # all models of a seed alike: nothing to choose from
    assert recommend_training(shifted).recommended_loops == 2


def test_one_seed_says_what_it_leaves_out():
    answer = recommend_training(made_up(SEVERAL, noise=0.01))
    assert "one training of each may tell another story" in answer.leaves_out
    assert str(answer).endswith(f"Left out: {answer.leaves_out}.")


def test_incomplete_seeds_are_left_out():
    """Of the offset that is asked for; another may have them."""
    losses = made_up(SEVERAL, seeds=4, noise=0.05, spread=0.02, missing=[(1, 0, 0, 2)])
    answer, whole = recommend_training(losses), recommend_training(SweepLosses(losses.data.isel(seed=[0, 2, 3])))
    assert (answer.seeds, recommend_training(losses, offset=0).seeds) == (3, 4)
    assert (answer.support, answer.nll.low.tolist()) == (whole.support, whole.nll.low.tolist())
    diverged = made_up(SEVERAL, seeds=2, noise=0.05)
    diverged.data["nll"][1, 0, 0, 3, 5] = np.inf
    assert recommend_training(diverged).seeds == 1


@pytest.mark.parametrize("seeds", [1, 3])
def test_few_sources_cannot_tell(seeds):
    """As of a checkpoint: errors over fewer than five sources would come out too small, or as nothing."""
    for n_sources, known in ((1, False), (4, False), (5, True)):
        sources = [f"source {n % n_sources}" for n in range(40)]
        answer = recommend_training(made_up(SEVERAL, seeds=seeds, noise=0.001, spread=0.0001, sources=sources))
        assert (answer.recommended_loops is not None) is known
        assert ("fewer than 5 sources" in answer.why) is not known
        assert answer.pick == 2


def test_the_seed_settles_the_draws():
    losses = made_up(SEVERAL, seeds=3, noise=0.1, spread=0.05)
    assert str(recommend_training(losses)) == str(recommend_training(losses))
    assert recommend_training(losses, seed=1).support != recommend_training(losses).support
    assert recommend_training(losses, seed=1).pick == recommend_training(losses).pick


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"price": -0.1}, ValueError, "price = -0.1 is not allowed"),
        ({"price": math.nan}, ValueError, "price = nan is not allowed"),
        ({"price": math.inf}, ValueError, "price = inf is not allowed"),
        ({"offset": 2}, SweepError, "no models with offset 2: it has 1, 0"),
        ({"memory": "own"}, SweepError, "no models with memory 'own': it has first"),
        ({"offset": 0}, SweepError, "No seed of this sweep has losses of all loop counts 1, 2, 3, 4 with offset 0"),
    ],
)
def test_what_cannot_be_recommended(arguments, error, said):
    with pytest.raises(error, match=said):
        recommend_training(made_up(SEVERAL, seeds=2, missing=[(0, 0, 1, 1), (1, 0, 1, 3)]), **arguments)


# -- the JSON answer ----------------------------------------------------------------------------------


def ends(*names):
    return {f"{name}{end}" for name in names for end in ("", "_low", "_high")}


# Every key of the answer, and of the rows in it.
ANSWER = {
    "recurrence_exponent",
    "schema",
    "kind",
    "data",
    "price_nats_per_loop",
    "draws",
    "answers",
    "decompositions",
    "provenance",
}
TRAINED = {
    *("offset", "memory", "seeds", "verdict", "recommended_loops", "why_undetermined", "support", "contenders"),
    *("break_even", "leaves_out", "loops"),
}
TRAINED_ROW = {"loops", "nll_equal_work", "learning_rate", "flops", "kv_bytes", "kv_bytes_fixed"} | ends("nll")
DECOMPOSED = {"memory", "seeds", "intervals_over", "loops"}
DECOMPOSED_ROW = {"loops"} | ends(
    *("loss_on", "loss_off", "gain", "tax", "net"),
    *(f"{name}_{whose}" for name in ("gain", "tax", "net") for whose in ("helped", "harmed")),
)


def assert_contract(found):
    """Exactly these keys, and no number that is none."""
    assert set(found) == ANSWER
    for answer in found["answers"]:
        assert set(answer) == TRAINED
        assert all(set(row) == TRAINED_ROW for row in answer["loops"])
        assert list(answer["support"]) == [str(row["loops"]) for row in answer["loops"]]
        assert (answer["verdict"] == "undetermined") == (answer["recommended_loops"] is None)
        assert (answer["verdict"] == "undetermined") == (answer["why_undetermined"] is not None)
        assert all(set(step) == {"loops", "below"} for step in answer["break_even"])
    for parts in found["decompositions"]:
        assert set(parts) == DECOMPOSED
        assert all(set(row) == DECOMPOSED_ROW for row in parts["loops"])
    assert all(math.isfinite(number) for number in numbers(found))


def numbers(found):
    """Every number in an answer."""
    if isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from numbers(value)
    elif isinstance(found, int | float):
        yield found


def test_the_contract_is_what_the_documentation_says():
    """The keys of the section's tables in docs/json.md."""
    _, _, text = DOCUMENTED.read_text(encoding="utf-8").partition("`loopdiag recommend SWEEP --json FILE`")
    tables = re.split(r"\n(?:A row of|Its rows of) ", text)
    documented = [set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.M)))) for table in tables]
    assert documented == [ANSWER, TRAINED, TRAINED_ROW, DECOMPOSED, DECOMPOSED_ROW]


@pytest.mark.parametrize("loops", [(1,), (1, 2, 4, 8), (2, 3)])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("memories", [1, 2])
def test_contract(memories, seeds, loops):
    """Whatever the grid: every key, every number finite or null."""
    truth = np.array(SEVERAL)[:, : len(loops)]
    found = told(made_up(truth, loops=loops, seeds=seeds, memories=memories, noise=0.05, spread=0.02))
    assert_contract(found)
    assert [(answer["memory"], answer["offset"]) for answer in found["answers"]] == [
        (memory, offset) for memory in ("first", "own")[:memories] for offset in (1, 0)
    ]
    assert [parts["memory"] for parts in found["decompositions"]] == ["first", "own"][:memories]
    assert {parts["intervals_over"] for parts in found["decompositions"]} == {"seeds" if seeds == 3 else "documents"}


def test_one_offset_has_no_decomposition():
    found = told(made_up([SEVERAL[1]], offsets=(0,)))
    assert_contract(found)
    assert (len(found["answers"]), found["decompositions"]) == (1, [])


def test_what_is_missing_is_null():
    """A count that no seed has with the offset: no number of it, and none of what is said against it."""
    losses = made_up(SEVERAL, noise=0.05, missing=[(0, 0, 0, 2)])
    found = json.loads(dumps(sweep_answer(losses, [recommend_training(losses, offset=0)], 0)))
    assert_contract(found)
    nulls = {(row["loops"], key) for row in found["decompositions"][0]["loops"] for key in row if row[key] is None}
    against = ends("net", "net_helped", "net_harmed")
    first = against | ends("gain", "gain_helped", "gain_harmed")
    own = against | ends("loss_on", "tax", "tax_helped", "tax_harmed")
    assert nulls == {(loops, key) for loops, keys in ((1, first), (3, own), (4, against)) for key in keys}


def test_answer_by_hand():
    """Nothing is renamed, shifted by a count, or rounded on the way."""
    losses = made_up(SEVERAL, seeds=3, noise=0.02, spread=0.01)
    losses.data["flops"][0, 1] = [10, 20, 30, 40]
    losses.data["learning_rate"][:] = [0.1, 0.2, 0.3, 0.4]
    found = told(losses, 0.02, seed=5)
    assert (found["schema"], found["kind"], found["data"]) == (1, "sweep", "made-up text")
    assert (found["price_nats_per_loop"], found["draws"]) == (0.02, {"seed": 5, "draws": 2000})
    assert found["provenance"] == losses.provenance
    answer, of = found["answers"][1], recommend_training(losses, 0.02, offset=0, seed=5)
    assert (answer["offset"], answer["memory"], answer["seeds"]) == (0, "first", 3)
    assert (answer["verdict"], answer["recommended_loops"]) == (of.verdict, of.recommended_loops)
    assert answer["support"] == {str(loops): share for loops, share in of.support.items()}
    assert answer["contenders"] == list(of.contenders)
    assert answer["break_even"] == [asdict(step) for step in of.break_even]
    assert answer["leaves_out"] == of.leaves_out
    assert [row["loops"] for row in answer["loops"]] == [1, 2, 3, 4]
    assert [row["nll_high"] for row in answer["loops"]] == of.nll.high.tolist()
    assert [row["flops"] for row in answer["loops"]] == [10, 20, 30, 40]
    assert [row["learning_rate"] for row in answer["loops"]] == [0.1, 0.2, 0.3, 0.4]
    parts, rows = decompose(losses), found["decompositions"][0]["loops"]
    assert [row["tax"] for row in rows] == parts.tax.mean.tolist()
    assert [row["gain_harmed_low"] for row in rows[1:]] == parts.harmed["gain"].low[1:].tolist()
    assert [row["net_helped"] for row in rows[1:]] == parts.helped["net"].mean[1:].tolist()
    assert [row["loss_off"] for row in rows] == parts.loss_off.mean.tolist()
    assert dumps(told(losses, 0.02, seed=5)) == dumps(found)


# -- what a loop is worth in parameters ---------------------------------------------------------------


def sized(n_once, n_rec, phi, *, seeds=1):
    """A sweep whose losses follow L = 2 + 30 (n_once + r^phi n_rec)^-0.3 exactly, but for what all models share."""
    law = [2 + 30 * (n_once + loops**phi * n_rec) ** -0.3 for loops in (1, 2, 3, 4)]
    losses = made_up([law, law], seeds=seeds)
    for name, count in (("parameters_once", n_once), ("parameters_looped", n_rec)):
        losses.data[name][:] = count
    return losses


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_a_loop_is_worth_over_two_sizes(seeds):
    """Sweeps of two sizes give back the exponent that they were made with; one size cannot tell."""
    small, large = sized(1e4, 1e5, 0.5, seeds=seeds), sized(2e4, 1e6, 0.5, seeds=seeds)
    found = exponent_of([small, large])
    assert found.phi == pytest.approx(0.5, abs=0.02)
    assert exponent_of([large, small], offset=0).phi == pytest.approx(0.5, abs=0.02)
    assert "size" in exponent_of([small]).why


def test_sweeps_that_do_not_compare():
    """Another text or budget, or no such models."""
    small, other = sized(1e4, 1e5, 0.5), sized(2e4, 1e6, 0.5)
    about = json.loads(other.data.attrs["provenance"]) | {"text_sha256": "1"}
    other.data.attrs["provenance"] = json.dumps(about)
    with pytest.raises(InputError, match="differ in text"):
        exponent_of([small, other])
    with pytest.raises(InputError, match="offset 7"):
        exponent_of([small], offset=7)
    with pytest.raises(InputError, match="No seed"):
        exponent_of([made_up(SEVERAL, missing=[(0, 0, 0, 2)])])
