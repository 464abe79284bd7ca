"""Arithmetic on diagnoses: cases worked by hand, laws, and an outside bootstrap."""

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from synthetic import change, make

from loopdiag import summary
from loopdiag.bootstrap import DRAWS
from loopdiag.diagnosis import Diagnosis, DiagnosisError
from loopdiag.gaincost import gain_cost
from loopdiag.measures.exit_rules import RULES


def by_document(values, **coords):
    sources = [f"s{index}" for index in range(len(values))]
    dims = ("document", *coords, *["loop"][: np.ndim(values) - 1 - len(coords)])
    return xr.DataArray(np.asarray(values, float), {"source": ("document", sources), **coords}, dims)


def planted(name, values, dims=("document", "loop")):
    """A diagnosis whose measure has just these values."""
    diagnosis = make(np.shape(values)[1] - 1, documents=len(values))
    return Diagnosis(diagnosis.data.assign({name: (dims, np.asarray(values, float))}))


# -- means and intervals


def test_an_estimate_by_hand():
    """Two documents of 1 and 3: a resample takes one twice or both once."""
    found = summary.estimate(by_document([1.0, 3.0]))
    assert (found.mean, found.low, found.high) == (2, 1, 3)


def test_the_interval_is_that_of_an_outside_bootstrap():
    """scipy's percentile bootstrap over unclustered documents, as far as 2,000 draws tell."""
    values = np.random.default_rng(0).gamma(2, size=100)
    found = summary.estimate(by_document(values))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=DRAWS, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low  # measured: within 3 % of it
    np.testing.assert_allclose((found.low, found.high), theirs, atol=0.08 * width)


def test_documents_without_a_value_are_left_out():
    """The mean of the others; and the interval of a value that every document has is as if alone."""
    values = by_document([[1.0, np.nan], [3.0, 5.0], [4.0, 7.0]])
    found = summary.estimate(values)
    np.testing.assert_allclose(found.mean, (8 / 3, 6))
    alone = summary.estimate(values.isel(loop=0))
    np.testing.assert_allclose((found.low[0], found.high[0]), (alone.low, alone.high))


def test_a_value_of_one_source_has_no_interval():
    found = summary.estimate(by_document([1.0, np.nan, np.nan]))
    assert found.mean == 1
    assert np.isnan(found.low)


def test_resamples_that_miss_a_value_are_left_out_of_its_interval():
    found = summary.estimate(by_document([1.0, 2.0, np.nan, np.nan]))
    assert (found.low, found.mean, found.high) == (1, 1.5, 2)


def test_what_was_not_measured_by_document_has_no_interval():
    curve = summary.by_loop(make(), "effective_rank_pooled")
    assert np.isfinite(curve.mean).all()
    assert np.isnan(curve.low).all()


def test_by_loop_averages_layers_and_heads_first():
    diagnosis = make()
    curve = summary.by_loop(diagnosis, "gate_mean")
    np.testing.assert_array_equal(curve.loop, (2, 3, 4))
    values = diagnosis.data["gate_mean"].values[:, 2:]
    np.testing.assert_allclose(curve.mean, values.mean((0, 2, 3)))
    expected = summary.estimate(by_document(values.mean((2, 3))).assign_coords(source=diagnosis.data["source"]))
    np.testing.assert_allclose((curve.low, curve.high), (expected.low, expected.high))


def test_by_loop_goes_by_numbers_and_not_by_places():
    curve = summary.by_loop(make(8, at=(1, 2, 4, 8), trained=4), "step_size")
    np.testing.assert_array_equal(curve.loop, (1, 2, 4, 8))
    np.testing.assert_array_equal(curve.beyond, (False, False, False, True))


def test_no_measure_is_no_loops_and_other_dimensions_are_refused():
    assert not len(summary.by_loop(make(without=["omega"]), "omega").loop)
    assert not len(summary.by_loop(make(1), "cos_update").loop)
    with pytest.raises(ValueError, match=r"hsic has the dimensions .*loop_b"):
        summary.by_loop(make(), "hsic")


def test_the_curve_of_gain_and_cost_rests_on_the_same_means():
    diagnosis = make()
    curve, nll = gain_cost(diagnosis), summary.by_loop(diagnosis, "nll_exit")
    np.testing.assert_allclose(curve.nll_exit.mean, nll.mean)
    np.testing.assert_allclose(curve.nll_exit.low, nll.low)


# -- noise


def test_what_is_below_twice_the_noise_says_nothing():
    """The levels' noise is 0.5: steps of 0.8 and 0.4 at loops 5 and 6 are lost, and the cosine of such steps, too."""
    diagnosis = make(6)
    for name in ("step_size", "relative_step", "cos_update"):
        np.testing.assert_array_equal(summary.below_noise(diagnosis, name), (5, 6))
        curve = summary.by_loop(diagnosis, name)
        np.testing.assert_array_equal(curve.loop[curve.in_noise], (5, 6))
    assert not len(summary.below_noise(diagnosis, "output_shift"))
    assert not len(summary.below_noise(diagnosis, "effective_rank"))


def test_noise_measured_on_few_documents_counts_and_unmeasured_noise_does_not():
    diagnosis = make(6)
    diagnosis.data["noise_step"][4:] = np.nan
    np.testing.assert_array_equal(summary.below_noise(diagnosis), (5, 6))
    assert not len(summary.below_noise(make(6, without=["noise_step"])))


# -- shares


def test_shares_by_hand():
    """Means over documents of 6, 3, 1 at loops 2 to 4: 60, 30 and 10 %; a ratio of means, not a mean of ratios."""
    shift = [[np.nan, 9, 2, 2, 0], [np.nan, 9, 10, 4, 2]]
    found = summary.refinement_shares(planted("output_shift", shift))["output_shift"]
    np.testing.assert_array_equal(found.loop, (2, 3, 4))
    np.testing.assert_allclose(found.mean, (0.6, 0.3, 0.1))


@pytest.mark.parametrize("form", [{}, {"n_loops": 16, "at": (1, 2, 4, 16)}])
def test_shares_sum_to_one(form):
    for shares in summary.refinement_shares(make(**form)).values():
        assert shares.mean.sum() == pytest.approx(1)
        assert (shares.low <= shares.mean).all()
        assert (shares.mean <= shares.high).all()


def test_shares_need_two_loops_after_the_first():
    assert not summary.has_shares(make(2))
    with pytest.raises(DiagnosisError, match=r"two loops or more after the first.* has the loops 1, 2"):
        summary.refinement_shares(make(2))
    left = summary.refinement_shares(make(without=["attention_kl"]))
    assert set(left) == {"output_shift", "breadth"}


def test_a_ratio_by_hand():
    found = summary.ratio(by_document([1.0, 3.0]), by_document([4.0, 4.0]))
    assert (found.mean, found.low, found.high) == (0.5, 0.25, 0.75)


# -- similarity


def test_a_loop_is_like_itself():
    found = summary.loop_cka(make())
    for part in (found.mean, found.low, found.high):
        np.testing.assert_allclose(np.diagonal(part), 1)
        np.testing.assert_allclose(part, part.T)


def test_documents_are_pooled_before_the_ratio():
    """HSIC of (4, 1; 1, 1) and (0, 1; 1, 3): their means 2, 1, 2, so 1 / sqrt(2 * 2), where a mean of ratios fails."""
    diagnosis = planted("hsic", [[[4, 1], [1, 1]], [[0, 1], [1, 3]]], ("document", "loop", "loop_b"))
    assert summary.loop_cka(diagnosis).mean[0, 1] == pytest.approx(0.5)


def test_short_documents_are_left_out_of_the_similarity():
    diagnosis = make()
    diagnosis.data["hsic"][0] = np.nan
    rest = Diagnosis(diagnosis.data.isel(document=slice(1, None)))
    np.testing.assert_allclose(summary.loop_cka(diagnosis).low, summary.loop_cka(rest).low)


def test_what_was_not_measured_is_refused_with_the_reason():
    diagnosis = make(groups=("prediction", "motion"))
    for ask in (summary.loop_cka, summary.exit_trade_off):
        with pytest.raises(DiagnosisError, match="was not asked for"):
            ask(diagnosis)


# -- exit rules


def test_the_trade_off_holds_every_rule_that_the_model_can_follow():
    diagnosis = make()
    found = summary.exit_trade_off(diagnosis)
    assert [rule.name for rule in found.rules] == [name for name in RULES if name != "gate"]
    for rule in found.rules:
        np.testing.assert_array_equal(rule.threshold, RULES[rule.name].thresholds)
        usual = RULES[rule.name].usual
        assert (None if rule.usual is None else rule.threshold[rule.usual]) == usual
    assert found.oracle.loops.mean == pytest.approx(1.7)
    assert (found.always.loop[-1], found.always.mean[-1], found.always.high[-1]) == (4, 0, 0)


@pytest.mark.parametrize("price", [0.0, 0.01, 0.1, 1.0])
def test_the_chosen_threshold_is_the_best_on_the_fit_documents(price):
    """Never worse there than the published one, or any; a higher price never takes more loops."""
    diagnosis = make()
    data = diagnosis.data
    for rule in summary.exit_trade_off(diagnosis, price).rules:
        of_rule = data.sel(rule=rule.name)
        utility = (-of_rule["exit_rule_nll_fit"] - price * (of_rule["exit_rule_loops_fit"] - 1)).values
        assert utility[rule.chosen] == np.nanmax(utility)
        dearer = next(each for each in summary.exit_trade_off(diagnosis, price + 1).rules if each.name == rule.name)
        assert dearer.loops.mean[dearer.chosen] <= rule.loops.mean[rule.chosen]


def test_what_is_reported_is_not_what_was_chosen_on():
    """Other numbers on the fit documents change the choice, and no reported number."""
    diagnosis = make()
    other = Diagnosis(diagnosis.data.assign(exit_rule_nll_fit=-diagnosis.data["exit_rule_nll_fit"]))
    ours, theirs = (summary.exit_trade_off(each).rules[0] for each in (diagnosis, other))
    assert ours.chosen != theirs.chosen
    np.testing.assert_array_equal(ours.utility.low, theirs.utility.low)


def test_utility_and_excess_by_hand():
    diagnosis = make()
    rule = summary.exit_trade_off(diagnosis, 0.25).rules[0]
    np.testing.assert_allclose(rule.utility.mean, -rule.nll.mean - 0.25 * (rule.loops.mean - 1))
    last = diagnosis.data["nll_exit"].values[:, -1].mean()
    np.testing.assert_allclose(rule.excess.mean, rule.nll.mean - last)


# -- names


def test_names_tell_runs_apart_and_no_more():
    assert summary.labels([make(model="a"), make(model="b")]) == ["a", "b"]
    assert summary.labels([make(4), make(6, trained=4)]) == ["tiny, 4 loops", "tiny, 6 loops"]
    assert summary.labels([make(4), make(4, documents=10)])[1] == "tiny, 10 documents"
    with pytest.raises(DiagnosisError, match="Two diagnoses are of the same model and run"):
        summary.labels([make(), change(make(), "rank", 1, 0.0), make(model="b")])
