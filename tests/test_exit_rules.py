"""Exit rules: where each leaves, what that costs, and that none beats the oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import make_model
from tiny import assert_same, padded, random_trace, token_lists, trace_of

from loopdiag.measures.exit_rules import ORACLE, RULES, SETTINGS, exit_loops, state_series, thresholds, trade_off
from loopdiag.measures.motion import acceleration, relative_step
from loopdiag.measures.prediction import exit_series, exits
from loopdiag.measures.reduce import over_tokens
from loopdiag.trace import record

calm = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 10**6)
NAMES = [*RULES, ORACLE]
LATER_WITH_THE_THRESHOLD = {"confidence", "gate", "argmax"}


def series_of(trace):
    return state_series(trace) | exit_series(trace)


def settling_trace(seed=0, n_loops=6, **settings):
    """Random states that come to rest at a different pace in each document."""
    trace = random_trace(seed, n_loops=n_loops, **settings)
    pace = torch.tensor([0.02, 0.2, 0.5, 0.9], dtype=torch.float64)[:, None, None]
    raw = torch.stack([trace.raw[0] + 1.5 * trace.raw[r] * pace**r for r in range(n_loops + 1)])

    return replace(trace, raw=raw, readout=trace.norm(raw))


def written_out(name, series, threshold, document, pos):
    """The loop that a rule leaves after, in plain Python."""
    at = {key: values[:, document, pos].tolist() for key, values in series.items()}
    last = len(at["nll_exit"]) - 1
    leaves = {
        "latent": lambda r: at["relative_step"][r] < threshold,
        "kl": lambda r: at["output_shift"][r] < threshold,
        "entropy": lambda r: abs(at["entropy"][r] - at["entropy"][r - 1]) < threshold,
        "argmax": lambda r: r >= threshold and not any(at["changed"][int(r - threshold) + 1 : r + 1]),
        "acceleration": lambda r: r > 2 and max(at["acceleration"][r - 1 : r + 1]) < threshold,
        "confidence": lambda r: at["confidence"][r] >= threshold,
        "gate": lambda r: at["gate"][r] >= threshold,
    }[name]
    return next((r for r in range(1, last) if leaves(r)), last)


def test_exit_loops_by_hand():
    """The first loop that lets a token go; loop 0 is no loop to leave after, and the last takes whoever is left."""
    leaves = torch.tensor(
        [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]],
    ).bool()[:, None]
    before = leaves.clone()
    assert exit_loops(leaves).tolist() == [[2, 1, 3, 3]]
    assert torch.equal(leaves, before)
    assert exit_loops(leaves[:2]).tolist() == [[1, 1, 1, 1]]


def test_stay_by_hand():
    """One token that loops 2 and 3 do not change: it leaves after 2 with a patience of one, after 3 with two."""
    changed = torch.tensor([float("nan"), 1, 0, 0, 1, 0])[:, None, None]
    for times, loop in ((1, 2), (2, 3), (3, 5)):
        assert exit_loops(RULES["argmax"].leaves({"changed": changed}, times)).item() == loop
    small = torch.tensor([float("nan"), float("nan"), 0.01, 0.5, 0.01, 0.02, 0.3])[:, None, None]
    assert exit_loops(RULES["acceleration"].leaves({"acceleration": small}, 0.03)).item() == 5
    cumulative = torch.tensor([float("nan"), 0.25, 0.5, 1.0])[:, None, None]
    for threshold, loop in ((0.1, 1), (0.25, 1), (0.3, 2), (1.0, 3)):
        assert exit_loops(RULES["gate"].leaves({"gate": cumulative}, threshold)).item() == loop


def test_the_rules_themselves():
    """Thresholds rise, the usual one is swept, and there is a slot for each."""
    for name, rule in RULES.items():
        assert list(rule.thresholds) == sorted(set(rule.thresholds)), name
        assert rule.usual is None or rule.usual in rule.thresholds, name
        assert rule.what, name
    assert max(len(rule.thresholds) for rule in RULES.values()) == SETTINGS


def test_series_of_states_are_those_of_the_measures():
    """Token by token what `motion` averages, and the gate's probabilities summed up; none without a gate."""
    trace = random_trace(exit_gate=True)
    series = state_series(trace)
    assert set(series) == {"relative_step", "acceleration", "gate"}
    assert set(state_series(random_trace())) == {"relative_step", "acceleration"}
    for of in (relative_step, acceleration):
        assert_same(over_tokens(series[of.__name__], trace.mask), of(trace))
    stay = np.cumprod(1 - trace.leave[1:].numpy(), axis=0)
    stay[-1] = 0
    assert series["gate"][0].isnan().all()
    np.testing.assert_allclose(series["gate"][1:], 1 - stay, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n_loops", [1, 2, 3, 6])
def test_every_rule_against_plain_python(n_loops):
    """Loops in 1..R, token by token; the NLL is that of the exit taken, read off by hand. Measured: 1e-15."""
    trace = settling_trace(n_loops=n_loops, exit_gate=True)
    series = series_of(trace)
    found = trade_off(series, trace.predicts, trace.loops)
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(
        ("exit_rule_loops", "exit_rule_nll"), (4, len(NAMES), SETTINGS)
    )
    for index, (name, rule) in enumerate(RULES.items()):
        for setting, threshold in enumerate(rule.thresholds):
            for document, kept in enumerate(trace.predicts):
                where = kept.nonzero()[:, 0].tolist()
                loops = [written_out(name, series, threshold, document, pos) for pos in where]
                assert set(loops) <= set(range(1, n_loops + 1))
                nll = [series["nll_exit"][r, document, pos].item() for r, pos in zip(loops, where, strict=True)]
                at = document, index, setting
                assert found["exit_rule_loops"][at].item() == pytest.approx(np.mean(loops), abs=1e-12), (name, at)
                assert found["exit_rule_nll"][at].item() == pytest.approx(np.mean(nll), abs=1e-12), (name, at)
        for values in found.values():
            assert values[:, index, len(rule.thresholds) :].isnan().all()
    for values in found.values():
        assert values[:, -1, 1:].isnan().all()
    if n_loops == 6:  # not a test of nothing: every rule lets some leave early and some stay
        used = found["exit_rule_loops"][:, :-1]
        for index, name in enumerate(RULES):
            assert used[:, index].nan_to_num(9).min() < 6, name
            assert used[:, index].nan_to_num(0).max() > 1, name


@given(seed=seeds)
@calm
def test_nobody_beats_the_oracle(seed):
    """Neither a rule at any threshold nor a fixed exit; the oracle takes the best loop of each token."""
    trace = settling_trace(seed, exit_gate=True)
    series = series_of(trace)
    found = trade_off(series, trace.predicts, trace.loops)
    best = found["exit_rule_nll"][:, -1, 0]
    assert (found["exit_rule_nll"].nan_to_num(99) >= best[:, None, None] - 1e-12).all()
    assert (exits(trace)["nll_exit"][:, 1:] >= best[:, None] - 1e-12).all()
    lowest = over_tokens(series["nll_exit"][1:].amin(0, keepdim=True), trace.predicts)[:, 0]
    assert_same(best, lowest, 1e-13)


@given(seed=seeds)
@calm
def test_thresholds_are_monotone(seed):
    """Laxer is earlier: a larger threshold for what must be small, a smaller one for what must be large."""
    trace = settling_trace(seed, exit_gate=True)
    loops = trade_off(series_of(trace), trace.predicts, trace.loops)["exit_rule_loops"]
    for index, (name, rule) in enumerate(RULES.items()):
        later = loops[:, index, : len(rule.thresholds)].diff(dim=1)
        assert ((later if name in LATER_WITH_THE_THRESHOLD else -later) >= 0).all(), name


def test_a_threshold_that_nobody_meets():
    """Then all loops are run, and the NLL is that of the last exit. Measured: 0."""
    trace = random_trace(n_loops=4, exit_gate=True)
    series = series_of(trace)
    none = {"latent": 0, "kl": 0, "entropy": 0, "acceleration": 0, "confidence": 1.1, "gate": 1.1, "argmax": 9}
    assert set(none) == set(RULES)
    for name, threshold in none.items():
        assert (exit_loops(RULES[name].leaves(series, threshold)) == 4).all(), name
    found = trade_off(series, trace.predicts, trace.loops)
    tightest = NAMES.index("latent"), 0  # random states move more than 1e-4 of their length
    assert (found["exit_rule_loops"][:, *tightest] == 4).all()
    assert_same(found["exit_rule_nll"][:, *tightest], exits(trace)["nll_exit"][:, -1], 1e-14)


def test_states_that_stand_still():
    """Every rule that asks for rest leaves as early as it may: after loop 1, the second difference after loop 3."""
    states = torch.randn(1, 2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(5, 1, 1, 1)
    trace = trace_of(states, input_ids=torch.ones(2, 8, dtype=torch.long), head=lambda h: h)
    found = trade_off(series_of(trace), trace.predicts, trace.loops)
    for name, loops in {"latent": 1, "kl": 1, "entropy": 1, "argmax": 1, "acceleration": 3, ORACLE: 1}.items():
        assert (found["exit_rule_loops"][:, NAMES.index(name), 0] == loops).all(), name
    nll = exits(trace)["nll_exit"][:, 0]
    kept = found["exit_rule_nll"][:, [index for index, name in enumerate(NAMES) if name != "gate"], 0]
    assert_same(kept, nll[:, None].expand_as(kept), 1e-13)


@torch.no_grad()
def test_the_gate_is_that_of_the_model():
    """Rows are NaN without a gate; with one, tokens leave where `model.early_exit` lets them, padded on either side."""
    batch = padded(token_lists(seed=3, lengths=(9, 4, 12)), left=(1,))
    gate = NAMES.index("gate")
    plain = record(make_model(), batch)
    for values in trade_off(series_of(plain), plain.predicts, plain.loops).values():
        assert values[:, gate].isnan().all()
        assert values[:, NAMES.index("latent")].isfinite().any()
    model = make_model(exit_gate=True)
    trace = record(model, batch, 5)
    series = series_of(trace)
    found = trade_off(series, trace.predicts, trace.loops)
    thresholds = RULES["gate"].thresholds
    seen = set()
    for setting, threshold in enumerate(thresholds):
        early = model.early_exit(batch.input_ids, batch.attention_mask, threshold, 5)
        ours = exit_loops(RULES["gate"].leaves(series, threshold))
        assert torch.equal(ours[trace.mask], early.loop[trace.mask])
        seen |= set(ours[trace.mask].tolist())
        targets = batch.input_ids.roll(-1, 1)[..., None]
        nll = -early.logits.log_softmax(-1).gather(-1, targets)[..., 0]
        mean = over_tokens(nll[None], trace.predicts)[:, 0]
        assert_same(found["exit_rule_nll"][:, gate, setting], mean, 1e-11)  # measured: 0
    assert len(seen) > 2


@torch.no_grad()
def test_padding_and_neighbours_do_not_matter():
    """A document alone has the numbers that it has in a batch; one without a next token has none. Measured: 2e-15."""
    model = make_model(exit_gate=True)
    documents = token_lists(seed=4, lengths=(9, 1, 6))

    def taken(batch):
        trace = record(model, batch)
        return trade_off(series_of(trace), trace.predicts, trace.loops)

    together = taken(padded(documents, left=(2,)))
    for index, document in enumerate(documents):
        for name, values in taken(padded([document])).items():
            assert_same(together[name][index], values[0], 1e-11, name)
    assert all(values[1].isnan().all() for values in together.values())


def test_the_table_of_thresholds():
    """One row for each rule and one for the oracle, which has none; where a rule has numbers, it has a threshold."""
    table = thresholds()
    assert table.shape == (len(NAMES), SETTINGS)
    for name, row in zip(NAMES, table, strict=True):
        own = () if name == ORACLE else RULES[name].thresholds
        assert row[: len(own)].tolist() == list(own), name
        assert row[len(own) :].isnan().all(), name
    trace = settling_trace(exit_gate=True)
    found = trade_off(series_of(trace), trace.predicts, trace.loops)
    for values in found.values():
        assert torch.equal(values[:, :-1].isnan(), table[:-1].isnan().expand(4, -1, -1))


def test_loops_have_numbers():
    """Where only some loops were kept, tokens leave after one of these and have taken as many as it is; NLL as ever."""
    trace = settling_trace(n_loops=3, exit_gate=True)
    series = series_of(trace)
    plain, some = trade_off(series, trace.predicts, [0, 1, 2, 3]), trade_off(series, trace.predicts, (0, 1, 4, 16))
    assert_same(some["exit_rule_nll"], plain["exit_rule_nll"])
    none = NAMES.index("confidence"), RULES["confidence"].thresholds.index(0.99)
    stays = exit_loops(RULES["confidence"].leaves(series, 0.99))
    taken = torch.tensor([0.0, 1, 4, 16], dtype=torch.float64)[stays]
    assert_same(some["exit_rule_loops"][:, *none], over_tokens(taken[None], trace.predicts)[:, 0], 1e-13)
    assert some["exit_rule_loops"].nan_to_num(1).max() <= 16
    assert_same(trade_off(series, trace.predicts, (0, 2, 4, 6))["exit_rule_loops"], 2 * plain["exit_rule_loops"], 1e-13)


@torch.no_grad()
def test_rules_on_kept_loops():
    """A recorded subset is its own run of rules: changes are from the kept loop before."""
    model, batch = make_model(), padded(token_lists(seed=3, lengths=(9, 4, 12)), left=(1,))
    trace = record(model, batch, at=[1, 2, 5])
    found = trade_off(series_of(trace), trace.predicts, trace.loops)
    loops = found["exit_rule_loops"]
    assert loops.nan_to_num(1).min() >= 1
    assert loops.nan_to_num(5).max() == 5
    best = record(model, batch, 5).readout[[1, 2, 5]]
    targets = batch.input_ids.roll(-1, 1)[None, ..., None].expand(3, -1, -1, 1)
    nll = -model.unembed(best).log_softmax(-1).gather(-1, targets)[..., 0]
    oracle = over_tokens(nll.amin(0, keepdim=True), trace.predicts)[:, 0]
    assert_same(found["exit_rule_nll"][:, -1, 0], oracle, 1e-12)
