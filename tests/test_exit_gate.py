"""When a model leaves by itself: probabilities of leaving, the loop they mean, and whose logits count."""

import pytest
import torch
from test_decoder import HUGINN_LIKE, IDS, OURO_LIKE, POST_CODA, assert_same, make_model, padded_batch

from loopdiag.model.exit_gate import exit_loop, exit_probabilities


def test_probabilities_by_hand():
    """A half leaves, then half of the rest, and the last loop takes what is left whatever its gate says."""
    ours = exit_probabilities(torch.tensor([[0.5, 0.5, 0.1], [0.0, 1.0, 0.3], [0.25, 0.0, 0.0], [1.0, 0.5, 0.5]]))
    expected = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75], [1.0, 0.0, 0.0]])
    assert torch.equal(ours, expected)
    assert torch.equal(exit_probabilities(torch.tensor([0.3])), torch.tensor([1.0]))


@pytest.mark.parametrize("n_loops", [1, 2, 7])
def test_probabilities_sum_to_one(n_loops):
    """And are the chance of getting there times that of leaving there. Measured: 2e-16."""
    leave = torch.rand(4, 5, n_loops, dtype=torch.float64, generator=torch.Generator().manual_seed(n_loops))
    ours = exit_probabilities(leave)
    assert ours.shape == leave.shape
    assert (ours >= 0).all()
    assert_same(ours.sum(-1), torch.ones(4, 5, dtype=torch.float64), 1e-14)
    for row in ours.flatten(0, 1).tolist():
        assert all(p <= 1 for p in row)
    for row, doors in zip(ours.flatten(0, 1).tolist(), leave.flatten(0, 1).tolist(), strict=True):
        there = 1.0
        for loop in range(n_loops - 1):
            assert row[loop] == pytest.approx(there * doors[loop], abs=1e-14)
            there *= 1 - doors[loop]


@pytest.mark.parametrize(
    ("threshold", "loops"),
    [
        *((0.1, [1, 2, 1]), (0.25, [1, 2, 1]), (0.3, [2, 2, 1]), (0.75, [2, 2, 1]), (0.76, [3, 2, 1])),
        *((1.0, [3, 2, 1]), (2.0, [3, 3, 3])),
    ],
)
def test_the_loop_that_reaches_a_threshold(threshold, loops):
    """The first whose cumulative probability is the threshold or more, from 1; where none is, the last."""
    probabilities = torch.tensor([[0.25, 0.5, 0.25], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert exit_loop(probabilities, threshold).tolist() == loops
    assert exit_loop(probabilities[:, None], threshold).shape == (3, 1)


def test_rounding_does_not_keep_a_token_in():
    """Three thirds may sum to a little less than one: the last loop is the last all the same."""
    assert exit_loop(torch.full((2, 3), 1 / 3 - 1e-6), 1.0).tolist() == [3, 3]


@pytest.mark.parametrize(
    "changes", [OURO_LIKE, HUGINN_LIKE | {"exit_gate": True}, POST_CODA | {"exit_gate": True}, {"exit_gate": True}]
)
@pytest.mark.parametrize("threshold", [0.3, 0.7, None])
@torch.no_grad()
def test_early_exit_picks_the_logits_of_shorter_runs(changes, threshold):
    """Token by token those of a run of as many loops; at the configuration's threshold of 1 the last ones."""
    model = make_model(**changes)
    ids, mask = padded_batch()
    for n_loops in (1, 3, 5):
        early = model.early_exit(ids, mask, threshold, n_loops)
        assert early.loop.shape == ids.shape
        assert early.probabilities.shape == (*ids.shape, n_loops)
        runs = {loop: model(ids, mask, n_loops=loop) for loop in range(1, n_loops + 1)}
        for row, pos in mask.nonzero().tolist():
            loop = int(early.loop[row, pos])
            # Measured: 0.
            assert_same(early.logits[row, pos], runs[loop][row, pos], 1e-12)
            reached = early.probabilities[row, pos].cumsum(-1)
            least = 1.0 if threshold is None else threshold
            assert loop == n_loops or reached[loop - 1] >= least
            assert (reached[: loop - 1] < least).all()
        if threshold is None:
            assert (early.loop == n_loops).all()
        elif n_loops > 1:
            assert len(early.loop[mask.bool()].unique()) > 1


@torch.no_grad()
def test_the_gate_reads_the_normed_state():
    """Its probability is the sigmoid of an affine map of N(Y_r), normalised between loops or not."""
    for norm_between_loops in (True, False):
        model = make_model(**OURO_LIKE | {"norm_between_loops": norm_between_loops})
        _, cache = model.run_with_cache(IDS)
        leave = []
        for loop in range(1, 5):
            normed = model.ln_final(cache[f"loops.{loop}.hook_out_pre_norm"])
            leave.append(torch.sigmoid(normed @ model.exit_gate.weight[0] + model.exit_gate.bias))
            assert_same(cache[f"loops.{loop}.hook_exit_gate"], leave[-1], 1e-12)
        assert_same(model.early_exit(IDS).probabilities, exit_probabilities(torch.stack(leave, -1)), 1e-12)


@torch.no_grad()
def test_the_configuration_has_a_threshold():
    """It decides where none is given; the trained number of loops likewise."""
    model = make_model(**OURO_LIKE | {"exit_threshold": 0.4})
    assert torch.equal(model.early_exit(IDS).loop, model.early_exit(IDS, threshold=0.4, n_loops=4).loop)
    assert not torch.equal(model.early_exit(IDS).loop, model.early_exit(IDS, threshold=0.99).loop)


def test_early_exit_keeps_nothing():
    """No graph, no hook, and the model's own run is not moved by its gate."""
    model = make_model(**OURO_LIKE)
    early = model.early_exit(IDS)
    assert not early.logits.requires_grad
    assert model.list_hooks() == {}
    assert torch.equal(model(IDS), early.logits)


def test_a_model_without_an_exit_gate():
    """It has nothing to decide with; the message says what to do instead."""
    with pytest.raises(ValueError, match=r"no exit gate; model\(ids, n_loops=r\)"):
        make_model().early_exit(IDS)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_wrong_thresholds(threshold):
    """At 0 every token would leave before the gate is asked."""
    with pytest.raises(ValueError, match=f"threshold = {threshold} is not allowed"):
        make_model(**OURO_LIKE).early_exit(IDS, threshold=threshold)
