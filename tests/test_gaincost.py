"""The curve and the decision: the bootstrap, gain and cost, the rule of question 1, the lenses of question 2."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import diagnosis_of, planted

from loopdiag.bootstrap import interval, resampled_means
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import BreakEven, gain_cost, recommend
from loopdiag.gaincost.decision import predict
from loopdiag.gaincost.lenses import combine, lens_picks
from loopdiag.gaincost.rule import break_even, describe

calm = settings(deadline=None, derandomize=True, max_examples=60)
nan = math.nan

SEVERAL = np.array([4.0, 3.4, 3.3, 3.35, 3.2])  # a plausible curve, one loop of which harms


def lone(values):
    """Every document its own source."""
    return [f"source {document}" for document in range(len(values))]


def clustered(rng, n_clusters):
    """Values [document] with something shared within each source, sources of 1 to 4 documents, and the sources."""
    sizes = rng.integers(1, 5, n_clusters)
    sources = np.repeat([f"source {cluster}" for cluster in range(n_clusters)], sizes)
    shared = np.repeat(rng.normal(size=n_clusters), sizes)
    return shared + rng.normal(size=len(sources)), sources


# -- bootstrap ----------------------------------------------------------------------------------------


def test_interval_of_a_paired_difference_is_scipys():
    """An outside reference for interval and standard error, every document being its own source."""
    rng = np.random.default_rng(0)
    before = rng.gamma(2.0, size=40)
    after = before - 0.1 + 0.3 * rng.standard_normal(40)
    outside = scipy.stats.bootstrap(
        (before, after),
        lambda x, y, axis: np.mean(x, axis) - np.mean(y, axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=rng,
    )
    draws = resampled_means(np.column_stack((before, after)), lone(before), draws=20_000)
    difference = draws[:, 0] - draws[:, 1]
    error = outside.standard_error
    # The draws alone are expected to move these, in standard errors, by 0.01 (error), 0.02 (ends).
    assert difference.std() == pytest.approx(error, rel=0.03)
    assert interval(difference) == pytest.approx(tuple(outside.confidence_interval), abs=0.06 * error)


def test_sources_are_resampled_whole_as_an_explicit_loop_does():
    """A reference that draws clusters one by one and pools their documents; unequal sizes, values shared inside."""
    rng = np.random.default_rng(1)
    values, sources = clustered(rng, 15)
    names = np.unique(sources)
    explicit = []
    for _ in range(8000):
        pooled = [values[sources == name] for name in rng.choice(names, len(names))]
        explicit.append(np.concatenate(pooled).mean())
    explicit = np.array(explicit)
    draws = resampled_means(values, sources, draws=8000)
    # The draws alone are expected to move these, in standard errors, by 0.01 (mean, error), 0.02 (ends).
    error = explicit.std()
    assert draws.mean() == pytest.approx(explicit.mean(), abs=0.05 * error)
    assert draws.std() == pytest.approx(error, rel=0.04)
    assert interval(draws) == pytest.approx(interval(explicit), abs=0.1 * error)
    assert error > 1.1 * resampled_means(values, lone(values)).std()  # so the sources matter here


def test_two_sources_have_three_resamples():
    """Hand-worked: sources of 1 and 3 documents; means are over documents, not over sources."""
    draws = resampled_means(np.array([9.0, 1.0, 2.0, 3.0]), ["a", "b", "b", "b"], draws=4000)
    means, counts = np.unique(draws, return_counts=True)
    np.testing.assert_allclose(means, [2.0, 3.75, 9.0], rtol=1e-15)  # b twice, both, a twice
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)


def test_the_seed_settles_the_draws():
    """The same seed draws the same sources: calls are paired, and results can be made again."""
    values, sources = clustered(np.random.default_rng(2), 12)
    draws = resampled_means(values, sources, seed=5)
    assert np.array_equal(draws, resampled_means(values, sources, seed=5))
    assert not np.array_equal(draws, resampled_means(values, sources, seed=6))
    np.testing.assert_allclose(resampled_means(values + 1, sources, seed=5), draws + 1, rtol=1e-13)
    order = np.random.default_rng(3).permutation(len(values))
    np.testing.assert_allclose(resampled_means(values[order], sources[order], seed=5), draws, rtol=1e-12, atol=1e-15)


def test_columns_are_resampled_together():
    """The same documents stand in every column of a draw, whatever the number of axes."""
    values, sources = clustered(np.random.default_rng(4), 12)
    stacked = np.stack((values, 2 * values + 3, -values, values**2), axis=1).reshape(-1, 2, 2)
    draws = resampled_means(stacked, sources)
    assert draws.shape == (2000, 2, 2)
    np.testing.assert_allclose(draws[:, 0, 1], 2 * draws[:, 0, 0] + 3, rtol=1e-12)
    np.testing.assert_allclose(draws[:, 1, 1], resampled_means(values**2, sources), rtol=1e-12)


def test_a_constant_has_no_width_and_nan_stays_in_its_column():
    """Sources of unequal size add no spread of their own; one undefined value does not spoil its neighbours."""
    values, sources = clustered(np.random.default_rng(5), 12)
    columns = np.column_stack((np.full_like(values, 3.7), values, values))
    columns[3, 2] = nan
    low, high = interval(resampled_means(columns, sources))
    np.testing.assert_allclose([low[0], high[0]], 3.7, rtol=1e-14)
    assert (low[1], high[1]) == pytest.approx(interval(resampled_means(values, sources)), rel=1e-12)
    assert np.isnan([low[2], high[2]]).all()


def test_interval_is_from_2_5_to_97_5_percent():
    """Hand-worked, for each column on its own."""
    draws = np.arange(1001.0)
    low, high = interval(np.column_stack((draws, -draws)))
    np.testing.assert_allclose(low, [25, -975])
    np.testing.assert_allclose(high, [975, -25])


def test_intervals_cover_the_truth_as_often_as_they_say():
    """200 data sets of 60 sources each, documents of one source alike: about 95 % of the intervals cover the mean."""
    rng = np.random.default_rng(6)
    sizes = rng.integers(1, 5, 60)
    sources = np.repeat(np.arange(60), sizes)
    values = rng.normal(size=(60, 200))[sources] + rng.normal(size=(len(sources), 200))
    low, high = interval(resampled_means(values, [f"source {source}" for source in sources]))
    covered = ((low <= 0) & (high >= 0)).sum()
    assert 180 <= covered <= 196
    narrow = interval(resampled_means(values, lone(values)))
    assert ((narrow[0] <= 0) & (narrow[1] >= 0)).sum() < 170  # what ignoring the sources would do


# -- the curve ----------------------------------------------------------------------------------------


def test_curve_by_hand():
    """Two documents, two loops: means over documents, loops 1..R, nothing of loop 0 but as loop 1's start."""
    curve = gain_cost(diagnosis_of([[4.0, 3.0], [6.0, 7.0]], churn=[0.5, 0.25], trained_loops=1))
    np.testing.assert_array_equal(curve.loop, [1, 2])
    np.testing.assert_allclose(curve.nll_exit.mean, [5.0, 5.0])
    np.testing.assert_allclose(curve.net.mean, [7.0, 0.0])  # from 12
    np.testing.assert_allclose(curve.gain.mean, [7.5, 0.75])
    np.testing.assert_allclose(curve.cost.mean, [0.5, 0.75])
    np.testing.assert_allclose(curve.cost_over_gain, [1 / 15, 1.0])
    assert (curve.model, curve.trained_loops, curve.documents) == ("a planted model", 1, 2)


def test_curve_laws():
    """net = gain - cost = what the exit's NLL falls by, sums telescope, and a mean lies in its interval."""
    diagnosis = planted(SEVERAL, noise=0.1, sources=[f"source {document // 3}" for document in range(64)])
    curve = gain_cost(diagnosis)
    nll = diagnosis.data["nll_exit"].values
    np.testing.assert_allclose(curve.net.mean, curve.gain.mean - curve.cost.mean, atol=1e-12)
    np.testing.assert_allclose(curve.net.mean, nll.mean(0)[:-1] - nll.mean(0)[1:], atol=1e-12)
    np.testing.assert_allclose(np.cumsum(curve.net.mean), nll[:, :1].mean() - curve.nll_exit.mean, atol=1e-12)
    for estimate in (curve.gain, curve.cost, curve.net, curve.nll_exit):
        assert estimate.mean.shape == estimate.low.shape == estimate.high.shape == (5,)
        assert (estimate.low <= estimate.mean + 1e-12).all()
        assert (estimate.mean <= estimate.high + 1e-12).all()
    assert (curve.net.low < curve.net.mean).all()
    assert (curve.net.mean < curve.net.high).all()


def test_intervals_of_the_curve_are_paired_and_clustered():
    """What all loops of a document share cancels in the net; sources are those of the diagnosis."""
    diagnosis = planted(SEVERAL)  # documents differ by 0.5 nats, their loops by the same
    curve = gain_cost(diagnosis)
    for name in ("gain", "cost", "net"):
        estimate = getattr(curve, name)
        np.testing.assert_allclose([estimate.low[1:], estimate.high[1:]], [estimate.mean[1:]] * 2, atol=1e-12)
    assert (curve.nll_exit.high - curve.nll_exit.low > 0.1).all()

    sources = [f"source {document // 8}" for document in range(64)]
    clustered = planted(SEVERAL, noise=0.1, sources=sources)
    curve = gain_cost(clustered, seed=3)
    nll = clustered.data["nll_exit"].values
    for estimate, values in ((curve.nll_exit, nll[:, 1:]), (curve.net, nll[:, :-1] - nll[:, 1:])):
        np.testing.assert_allclose(
            (estimate.low, estimate.high), interval(resampled_means(values, sources, seed=3)), rtol=1e-12
        )


def test_cost_over_gain_of_a_loop_that_changes_nothing():
    """No gain and no cost have no ratio: NaN, without a warning."""
    ratio = gain_cost(diagnosis_of([[4.0, 4.0], [5.0, 5.0]], churn=0.0)).cost_over_gain
    np.testing.assert_array_equal(ratio, [0.0, nan])


# -- question 1: the rule -----------------------------------------------------------------------------


def pair(ahead, deviation, documents=100):
    """Two loops, the second `ahead` by so many nats on average; by documents with exactly this standard deviation.

    The paired standard error is deviation / sqrt(documents); documents differ far more than loops do.
    """
    normal = scipy.stats.norm.ppf((np.random.default_rng(0).permutation(documents) + 0.5) / documents)
    first = 4 + np.linspace(-1, 1, documents)
    return np.column_stack((first, first - ahead - deviation * normal / normal.std()))


@pytest.mark.parametrize(
    # Paired error 0.007, then 0.012; a lead of 0.03 - 0.02 in utility.
    ("deviation", "pick"),
    [(0.07, 2), (0.12, 1)],
)
def test_smallest_within_one_paired_standard_error(deviation, pick):
    """Hand-worked: 1.4 errors ahead is ahead, 0.8 is not; the spread between documents does not count."""
    assert recommend(diagnosis_of(pair(0.03, deviation)), price=0.02).pick == pick


def test_the_error_is_that_of_whole_sources():
    """The same numbers in ten sources, alike inside: an error larger by sqrt(10), and another pick."""
    nll = pair(0.03, 0.07)
    nll = nll[np.argsort(nll[:, 1] - nll[:, 0])]  # documents helped alike stand together
    sources = [f"source {document // 10}" for document in range(100)]
    assert recommend(diagnosis_of(nll), price=0.02).pick == 2
    assert recommend(diagnosis_of(nll, sources=sources), price=0.02).pick == 1


def test_price_is_paid_for_every_loop_after_the_first():
    """Hand-worked, no noise: nets 0.5, 0.1, 0.04; the utility of loop r pays (r - 1) prices."""
    diagnosis = planted([4.0, 3.5, 3.4, 3.36], noise=0.0)
    picks = {price: recommend(diagnosis, price).recommended_loops for price in (0.0, 0.03, 0.05, 0.09, 0.2, 0.49, 0.6)}
    assert picks == {0.0: 4, 0.03: 4, 0.05: 3, 0.09: 3, 0.2: 2, 0.49: 2, 0.6: 1}
    assert recommend(diagnosis) == recommend(diagnosis, 0.01)


def test_a_loop_worth_its_price_only_with_the_next_is_taken_with_it():
    """No greedy stop: loop 2 alone brings less than the price, loops 2 and 3 together more than both."""
    diagnosis = planted([4.0, 3.99, 3.5])
    assert recommend(diagnosis, 0.1).recommended_loops == 3
    assert recommend(diagnosis, 0.3).recommended_loops == 1


curves_of_hundredths = st.lists(st.integers(100, 160), min_size=1, max_size=6).map(lambda nll: np.array(nll) / 100)


@given(nll=curves_of_hundredths, prices=st.lists(st.floats(0, 0.7), min_size=2, max_size=2).map(sorted))
@calm
def test_a_higher_price_never_gives_more_loops(nll, prices):
    """Law, on curves without noise: also those that rise, or fall late."""
    diagnosis = planted(nll, documents=4)
    cheap, dear = (recommend(diagnosis, price).pick for price in prices)
    assert dear <= cheap


@given(seed=st.integers(0, 10**6), prices=st.lists(st.floats(0.001, 0.1), min_size=2, max_size=2).map(sorted))
@calm
def test_a_higher_price_never_recommends_more_loops(seed, prices):
    """Law, with noise that grows from loop to loop: of two prices with an answer, the higher has no more loops."""
    rng = np.random.default_rng(seed)
    nll = 4 - np.cumsum(rng.uniform(-0.02, 0.06, 4)) + rng.normal(size=(40, 1))
    nll = nll + np.cumsum(rng.normal(scale=0.08, size=(40, 4)), axis=1)
    cheap, dear = (recommend(diagnosis_of(nll), price).recommended_loops for price in prices)
    assert cheap is None or dear is None or dear <= cheap


def test_a_higher_price_never_picks_more_loops():
    """Hand-worked: loop 2 beats loop 1 in every document; loop 3 is best by a hair, and noisy.

    At 0.0105, loop 3 is best by 0.0005 and loop 1 within its error of 0.0075; at 0.0115, loop 2 is best. So the pick
    goes from 1 to 2 where a loop costs more.
    """
    sign = np.where(np.arange(64) % 2, 1.0, -1.0)
    nll = np.column_stack((np.full(64, 4.0), np.full(64, 3.985), 3.974 + 0.06 * sign))
    diagnosis = diagnosis_of(nll + np.linspace(-1, 1, 64)[:, None])
    assert recommend(diagnosis, 0.0115).pick <= recommend(diagnosis, 0.0105).pick


def test_support_by_hand():
    """Two sources have three resamples, 1 : 2 : 1, and the whole rule runs on each.

    Loop 2 leads by 0.3 nats in one, trails by 0.1 in the other. The paired error is sqrt(0.02) = 0.141, so its mean
    lead of 0.1 less the price picks loop 1; of the resamples, only the first source twice picks loop 2.
    """
    recommendation = recommend(diagnosis_of([[4.0, 3.7], [4.0, 4.1]]), price=0.001)
    assert recommendation.pick == 1
    assert recommendation.support == pytest.approx({1: 0.75, 2: 0.25}, abs=0.03)
    assert recommendation.contenders == (1, 2)


@pytest.mark.parametrize("seed", range(5))
def test_support_and_contenders(seed):
    """Support is a share of the resamples for each count; contenders have a tenth, fewest loops first."""
    recommendation = recommend(planted([4.0, 3.5, 3.49, 3.478, 3.6], noise=0.1, seed=seed))
    assert list(recommendation.support) == [1, 2, 3, 4, 5]
    assert sum(recommendation.support.values()) == pytest.approx(1, abs=1e-12)
    assert recommendation.contenders == tuple(loop for loop in range(1, 6) if recommendation.support[loop] >= 0.1)
    assert recommendation.support[5] == 0


def test_a_contender_has_a_tenth():
    """Three loops of which each is best somewhere: 6 % are no contender."""
    rng = np.random.default_rng(0)
    shares = {}
    for seed in range(40):
        nll = 4 - np.array([0.0, 0.03, 0.045]) + 0.02 * rng.standard_normal((30, 3)) * np.sqrt(seed)
        recommendation = recommend(diagnosis_of(nll))
        shares |= {share: loop in recommendation.contenders for loop, share in recommendation.support.items()}
    assert {taken for share, taken in shares.items() if share >= 0.1} == {True}
    assert {taken for share, taken in shares.items() if share < 0.1} == {False}
    assert any(0.05 < share < 0.1 for share in shares)
    assert any(0.1 <= share < 0.15 for share in shares)


def test_undetermined_while_a_smaller_count_could_be_better():
    """Hand-worked: a lead of 0.1 - 0.03 nats; the room for loop 1 is 1.96 errors less that, against a price of 0.03."""
    clear = recommend(diagnosis_of(pair(0.1, 0.45)), 0.03)  # half-width 0.088, room 0.018
    assert (clear.verdict, clear.recommended_loops, clear.pick, clear.why) == ("recommended", 2, 2, "")
    unclear = recommend(diagnosis_of(pair(0.1, 0.6)), 0.03)  # half-width 0.118, room 0.048
    assert (unclear.verdict, unclear.recommended_loops, unclear.pick) == ("undetermined", None, 2)
    assert unclear.support[2] > 0.5
    assert "1 instead of 2 could be better by 0.04" in unclear.why


def test_undetermined_while_a_larger_count_could_be_better():
    """The pick is within an error of the best, but the best could be better by more than the price."""
    unclear = recommend(diagnosis_of(pair(0.02, 0.3)), 0.01)  # lead 0.01, error 0.03, room about 0.069
    assert (unclear.verdict, unclear.recommended_loops, unclear.pick) == ("undetermined", None, 1)
    assert unclear.support[1] > 0.5
    assert "2 instead of 1 could be better by 0.07" in unclear.why
    clear = recommend(diagnosis_of(pair(0.11, 0.3)), 0.1)  # the same lead and error, at a price above the room
    assert (clear.verdict, clear.recommended_loops, clear.why) == ("recommended", 1, "")


def test_undetermined_without_a_majority():
    """Hand-worked by simulation: each loop half an error better; all room is far below the price of 1."""
    better = 0.09 * np.array([0, 0.6, 0.9, 1.0])
    recommendation = recommend(planted(10 - np.arange(4) - better, documents=60, noise=0.5, seed=2), 1.0)
    assert max(recommendation.support.values()) < 0.45
    assert (recommendation.verdict, recommendation.recommended_loops) == ("undetermined", None)
    assert recommendation.pick in recommendation.contenders
    assert "picked in" in recommendation.why


def test_why_is_true():
    """'Would be picked in so many resamples only' is said of a pick with less than half of them, and only then."""
    skewed = np.random.default_rng(0).exponential(size=8) ** 2
    skewed -= skewed.mean()
    error = skewed.std() / np.sqrt(8)
    for sign in (-1, 1):
        for errors_ahead in (0.9, 0.95, 0.995, 1.005, 1.05, 1.1):
            nll = np.column_stack((np.full(8, 4.0), 4.0 - 0.01 - errors_ahead * error - sign * skewed))
            recommendation = recommend(diagnosis_of(nll))
            assert ("of the resamples only" in recommendation.why) == (
                recommendation.support[recommendation.pick] < 0.5
            )


@pytest.mark.parametrize("price", [-0.01, -1e-300, nan, math.inf, -math.inf])
def test_a_price_that_is_none(price):
    """Refused with what was given and what is allowed."""
    with pytest.raises(ValueError, match=rf"price = {price} is not allowed: it must be a finite number >= 0"):
        recommend(planted([4.0, 3.5]), price)


def test_a_model_that_breaks_down_is_not_recommended():
    """A loop without a finite NLL is named; comparisons with NaN would quietly favour one loop."""
    with pytest.raises(ValueError, match="after loop 2 is not finite"):
        recommend(planted([4.0, nan, 3.0]))


@pytest.mark.parametrize("price", [0, 0.01, 5.0])
def test_one_loop_works_everywhere(price):
    """R = 1: the only answer, with full support, nothing to break even with, and two lenses that can speak."""
    diagnosis = planted([4.0], noise=0.2)
    curve = gain_cost(diagnosis)
    assert curve.net.mean == pytest.approx(12 - curve.nll_exit.mean)
    recommendation = recommend(diagnosis, price)
    assert (recommendation.verdict, recommendation.recommended_loops, recommendation.pick) == ("recommended", 1, 1)
    assert (recommendation.support, recommendation.contenders, recommendation.break_even) == ({1: 1.0}, (1,), ())
    assert recommendation.lenses == {"rank_peak": 1, "paper_rule": 1}
    assert recommendation.predicted_training_loops == 1
    assert "1 loop at any price" in str(recommendation)


def test_recommendation_is_the_seeds():
    """The same seed, the same recommendation; another seed moves the support a little."""
    diagnosis = planted([4.0, 3.5, 3.49], noise=0.1)
    assert recommend(diagnosis, seed=1) == recommend(diagnosis, seed=1)
    others = [recommend(diagnosis, seed=seed).support[3] for seed in range(4)]
    assert 0 < np.ptp(others) < 0.1


def test_recommendation_in_words():
    """Both answers, their support and price, the lenses, and that the prediction is not backtested."""
    text = str(recommend(planted([4.0, 3.5, 3.4, 3.39]), 0.05))
    assert "Run a planted model (trained with 4) with how many loops? Measured: 3 (support 100%, price 0.05 " in text
    assert (
        "Break-even prices, by mean utility: 4 loops below 0.01, 3 loops below 0.1, 2 loops below 0.5, else 1." in text
    )
    assert (
        "Predicted, not backtested: 3 (cost_gain 3, rank_peak 4, shift_knee 2, attention_freeze 2, paper_rule 4)."
        in text
    )
    assert "Measured: undetermined (1 instead of 2 could be better by " in str(
        recommend(diagnosis_of(pair(0.1, 0.6)), 0.03)
    )


# -- question 1: planted truths -----------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_loops_that_only_move_things_are_not_recommended(noise):
    """Loops 3 and 4 give to some tokens what they take from others: 2 are answered."""
    recommendation = recommend(planted([4.0, 3.5, 3.5, 3.5], noise=noise, churn=0.1))
    assert recommendation.recommended_loops == 2
    assert recommendation.lenses["cost_gain"] == 2


def test_loops_that_change_nothing_are_not_recommended():
    """Exactly nothing: no token's NLL moves, no probability does, in loops 3 and 4. Both answers are 2 or fewer."""
    shift = [nan, 2.0, 0.5, 0.0, 0.0]
    recommendation = recommend(planted([4.0, 3.5, 3.5, 3.5], churn=0.0, curves={"output_shift": shift}))
    assert recommendation.recommended_loops == 2
    assert recommendation.lenses["cost_gain"] == 2
    assert recommendation.lenses["shift_knee"] == 2


@pytest.mark.parametrize("n_loops", [2, 4, 8])
def test_every_loop_worth_its_price(n_loops):
    """Every loop nets clearly more than the price: the maximum."""
    recommendation = recommend(planted(4 - 0.05 * np.arange(n_loops), noise=0.03))
    assert recommendation.recommended_loops == n_loops
    assert recommendation.support[n_loops] > 0.9


def test_tied_loops_are_undetermined():
    """Loops 2 and 3 of the same true utility, paired error 0.03, price 0.01: undetermined in 89 of 100 seeds."""
    undetermined = 0
    for seed in range(100):
        recommendation = recommend(planted([4.0, 3.5, 3.49], noise=0.17, seed=seed))
        undetermined += recommendation.verdict == "undetermined"
    assert undetermined > 70


def test_a_clear_winner_is_recommended():
    """Loop 3 ahead by 0.09 and 0.008 nats, paired error 0.0035, price 0.01: 3 recommended in 100 of 100 seeds."""
    answers = [
        recommend(planted([4.0, 3.4, 3.3, 3.298], noise=0.02, seed=seed)).recommended_loops for seed in range(100)
    ]
    assert answers.count(3) > 70
    assert set(answers) <= {3, None}


@pytest.mark.parametrize("n_sources", [1, 2, 4, 5])
def test_few_sources_cannot_tell(n_sources):
    """With fewer than five sources, errors come out too small (0 with one), so a clear lead is no answer either."""
    sources = [f"source {document % n_sources}" for document in range(64)]
    recommendation = recommend(planted([4.0, 3.5, 3.0], noise=0.01, sources=sources))
    assert recommendation.pick == 3
    if n_sources < 5:
        assert (recommendation.verdict, recommendation.recommended_loops) == ("undetermined", None)
        assert "fewer than 5 sources" in recommendation.why
    else:
        assert recommendation.recommended_loops == 3


# -- break-even prices --------------------------------------------------------------------------------


def test_break_even_of_the_design():
    """The example of the design: nets of 0.79, 0.13 and 0.02 nats."""
    steps = break_even(np.array([5.0, 4.21, 4.08, 4.06]), np.arange(1, 5))
    assert [step.loops for step in steps] == [4, 3, 2]
    assert [step.below for step in steps] == pytest.approx([0.02, 0.13, 0.79])
    assert describe(steps) == "4 loops below 0.02, 3 loops below 0.13, 2 loops below 0.79, else 1"


@pytest.mark.parametrize(
    ("nll", "steps"),
    [
        ([4.0], ()),
        ([4.0, 4.0], ()),
        ([4.0, 4.5, 4.1], ()),  # more loops only harm
        ([4.0, 3.0, 3.5, 3.25], ((2, 1.0),)),  # nothing after the best count is ever best
        ([4.0, 3.75, 3.0], ((3, 0.5),)),  # loop 2 below the line from 1 to 3: never best
        ([4.0, 3.5, 3.0], ((3, 0.5),)),  # on the line: best at one price only
        ([4.0, 4.5, 3.0, 2.75], ((4, 0.25), (3, 0.5))),
    ],
)
def test_break_even_by_hand(nll, steps):
    """Curves that are not convex: only counts that are best somewhere appear."""
    assert break_even(np.array(nll), np.arange(1, len(nll) + 1)) == tuple(
        BreakEven(loops, below) for loops, below in steps
    )
    if not steps:
        assert describe(break_even(np.array(nll), np.arange(1, len(nll) + 1))) == "1 loop at any price"


@given(nll=curves_of_hundredths)
@calm
def test_break_even_is_what_a_scan_of_prices_finds(nll):
    """Law, on any curve: at every price, the listed count has the best mean utility, and steps are in order."""
    steps = break_even(nll, np.arange(1, len(nll) + 1))
    belows, listed = [step.below for step in steps], [step.loops for step in steps]
    assert belows == sorted(set(belows))
    assert listed == sorted(set(listed), reverse=True)
    for price in np.arange(0.00037, 0.65, 0.00137):
        if np.abs(price - np.array([*belows, 9.0])).min() > 1e-9:
            told = next((step.loops for step in steps if price < step.below), 1)
            assert told == (-nll - price * np.arange(len(nll))).argmax() + 1


def test_break_even_of_a_recommendation_is_that_of_the_mean():
    """On loops 1..R, the embedding left out."""
    recommendation = recommend(diagnosis_of([[4.0, 3.0, 2.5], [5.0, 3.5, 3.5]]))
    assert recommendation.break_even == (BreakEven(3, 0.25), BreakEven(2, 1.25))


# -- question 2: the lenses ---------------------------------------------------------------------------


def test_the_papers_table_under_the_papers_rule():
    """The four-loop table of arXiv 2606.18023: effective rank falls after loop 2, its best measured count."""
    rank = [nan, nan, 174.6, 172.5, 158.2]
    shift = [nan, 26.5, 1.75, 1.32, 1.58]
    assert lens_picks({"effective_rank": rank})["paper_rule"] == 2
    assert lens_picks({"effective_rank": rank, "output_shift": shift}) == {
        "rank_peak": 2,
        "shift_knee": 2,
        "paper_rule": 2,
    }


@pytest.mark.parametrize(
    ("gain", "cost", "pick"),
    [
        # The design's trial: ratios 0.20, 0.50, 0.78.
        ([nan, 9.0, 1.0, 0.3, 0.1], [nan, 0.1, 0.2, 0.15, 0.078], 2),
        ([nan, 9.0, 0.98, 0.27, 0.10], [nan, 0.1, 0.19, 0.14, 0.08], 2),
        ([nan, 9.0, 1.0, 1.0, 1.0], [nan, 0.1, 0.1, 0.2, 0.49], 4),  # never reached: all
        ([nan, 9.0, 1.0, 1.0, 1.0], [nan, 0.1, 0.6, 0.1, 0.1], 1),  # at once, and better later
        ([nan, 9.0, 1.0, 1.0, 1.0], [nan, 0.1, 0.1, 0.5, 0.1], 2),  # exactly reached
        ([nan, 1.0, 1.0], [nan, 9.0, 0.4], 2),  # loop 1 has no say
        ([nan, 1.0, 1.0], [nan, 0.0, 0.6], 1),
        ([nan, 1.0, 1.0], [nan, 0.0, 2.0], 1),
        ([nan, 9.0], [nan, 0.1], None),
    ],
)
def test_cost_gain(gain, cost, pick):
    """The last loop before cost/gain reaches 0.5, from loop 2 on; no opinion on one loop."""
    assert lens_picks({"gain": gain, "cost": cost}).get("cost_gain") == pick


def test_cost_gain_of_a_loop_that_changes_nothing():
    """A loop without any gain is where to stop."""
    assert lens_picks({"gain": [nan, 9.0, 1.0, 0.0], "cost": [nan, 0.1, 0.1, 0.0]}) == {"cost_gain": 2}


def test_cost_gain_that_is_not_known():
    """A lens that sees nothing has no opinion."""
    assert lens_picks({"gain": [nan, nan, nan, nan], "cost": [nan, nan, nan, nan]}) == {}


@pytest.mark.parametrize(
    ("rank", "peak", "paper"),
    [
        ([99.0, 10.0, 20.0, 15.0, 30.0], 4, 2),  # falls, then rises above: the first fall counts
        ([99.0, 10.0, 20.0, 30.0, 40.0], 4, 4),  # never falls
        ([99.0, 40.0, 30.0, 20.0, 10.0], 1, 1),  # only falls
        ([99.0, 10.0, 20.0, 20.0, 15.0], 2, 3),  # a tie is no fall, and the smaller of two peaks
        ([99.0, 10.0, 20.0, nan, 15.0], 2, 2),
        ([99.0, 10.0, nan, 20.0, 15.0], 3, 3),
        ([99.0, nan, nan, 20.0, nan], 3, 3),
        ([99.0, nan, nan, nan, nan], None, None),
        ([99.0, 10.0], 1, 1),
        ([99.0, nan], None, None),
        ([99.0, 10.0, 20.0], 2, 2),
        ([99.0, 20.0, 10.0], 1, 1),
    ],
)
def test_lenses_of_the_effective_rank(rank, peak, paper):
    """The highest and the last before the first fall; the embedding has no say, unknown loops are passed over."""
    picks = lens_picks({"effective_rank": rank})
    assert (picks.get("rank_peak"), picks.get("paper_rule")) == (peak, paper)


@pytest.mark.parametrize(
    ("shift", "pick"),
    [
        ([nan, 99.0, 8.0, 4.0, 1.0], 3),  # factors 2, 4
        ([nan, 99.0, 8.0, 1.0, 0.5], 2),  # factors 8, 2
        ([nan, 99.0, 8.0, 4.0, 2.0], 2),  # equal factors: the earlier
        ([nan, 99.0, 1.0, 1.0, 0.9], 3),
        ([nan, 99.0, 1.0, 2.0, 3.0], 4),  # only rises
        ([nan, 99.0, 1.0, 1.0, 1.0], 4),  # never falls
        ([nan, 1.0, 2.0, 1.0], 2),
        ([nan, 99.0, 1.0], None),  # one loop after the first has no knee
        ([nan, 99.0], None),
        ([nan, 99.0, 1.0, nan, 1.0], None),
        ([nan, nan, 4.0, 1.0, 1.0], 2),
    ],
)
def test_shift_knee(shift, pick):
    """After which of the loops 2..R the output shift falls by the largest factor; loop 1 has no say."""
    assert lens_picks({"output_shift": shift}).get("shift_knee") == pick


@pytest.mark.parametrize("nothing", [0.0, -1e-9])
def test_shift_knee_of_a_fall_to_nothing(nothing):
    """The largest fall there can be; a KL of 0 may be negative by rounding."""
    assert lens_picks({"output_shift": [nan, 9.0, 2.0, nothing, nothing]}) == {"shift_knee": 2}


def test_attention_freeze():
    """The same rule on what attention moves: 0.63, 0.08 and 0.01 nats, as the bundled four-loop model has it."""
    assert lens_picks({"attention_kl": [nan, nan, 0.63, 0.08, 0.01]}) == {"attention_freeze": 3}
    assert lens_picks({"attention_kl": [nan, nan, 0.63, 0.05, 0.01]}) == {"attention_freeze": 2}
    assert lens_picks({"attention_kl": [nan, nan, 0.63]}) == {}


def test_predicted_support_is_over_resampled_documents():
    """Documents that agree leave no doubt; where half of them turn the rank's peak, resamples disagree."""
    sure = recommend(planted([4.0, 3.0, 2.9], curves={"effective_rank": [9, 50, 60, 55]}))
    assert sum(sure.predicted_support.values()) == pytest.approx(1)
    assert sure.predicted_support[sure.predicted_training_loops] == 1
    torn = planted([4.0, 3.0], curves={"effective_rank": [9, 50, 50]})
    rank = torn.data["effective_rank"].values
    rank[::2, 2], rank[1::2, 2] = 60, 40
    _, support = predict(Diagnosis(torn.data[["effective_rank"]]))
    assert 0.2 < support[1] < 0.8


def test_lenses_without_their_curve_are_left_out():
    """A lens speaks when all of its curves are there; curves that no lens reads do not matter."""
    assert lens_picks({}) == {}
    assert lens_picks({"gain": [nan, 9.0, 1.0], "omega": [nan, nan, 3.0]}) == {}
    assert lens_picks({"output_shift": [nan, 9.0, 2.0, 1.0]}) == {"shift_knee": 2}
    assert set(lens_picks({"effective_rank": [1.0, 2.0]})) == {"rank_peak", "paper_rule"}


def test_prediction_is_the_lower_median_of_the_lenses():
    """Each lens reads its own curve of the diagnosis, averaged over documents; four picks have two middles."""
    curves = {"effective_rank": [9, 50, 40, 60, 70], "output_shift": [nan, 9.0, 4.0, 1.0, 0.9]}
    recommendation = recommend(planted([4.0, 3.0, 2.5, 2.45], noise=0.01, churn=[0, 0.1, 0.1, 0.1], curves=curves))
    knees = {"shift_knee": 2, "attention_freeze": 2}
    assert recommendation.lenses == {"cost_gain": 3, "rank_peak": 4, **knees, "paper_rule": 1}
    assert recommendation.predicted_training_loops == combine(recommendation.lenses) == 2
    assert combine({"a": 4, "b": 1, "c": 3, "d": 1}) == 1
    three = recommend(planted([4.0, 3.0], curves={"effective_rank": [9, 70, 60]}))
    assert three.lenses == {"cost_gain": 2, "rank_peak": 1, "paper_rule": 1}
    assert three.predicted_training_loops == 1


def test_lenses_read_means_over_documents():
    """As every number of the answer: not medians, and not means of each document's ratio."""
    nll = [[4.0, 3.9]] * 9 + [[4.0, 1.0]]  # gains 0.25 and 3.15, costs 0.15: ratios 0.6 and 0.05, of means 0.28
    assert recommend(diagnosis_of(nll, churn=0.15)).lenses["cost_gain"] == 2


def test_no_lens_no_prediction():
    """Question 1 is answered all the same."""
    recommendation = recommend(planted([4.0], curves={"effective_rank": [9, nan]}))
    assert (recommendation.lenses, recommendation.predicted_training_loops) == ({}, None)
    assert recommendation.recommended_loops == 1
    assert "no answer (no lens has an opinion)" in str(recommendation)
