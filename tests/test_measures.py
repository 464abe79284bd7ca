"""Each measure: a case worked by hand, laws that hold for any states, and an outside reference.

Hand-worked cases are small enough to check by eye. Outside references are scipy, scikit-learn and numpy, one token at
a time in float64. What is compared is always [document, loop], NaN where a measure is not defined.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import make_model
from tiny import VOCABULARY, assert_all_same, assert_same, padded, random_trace, token_lists, trace_of

from loopdiag.measures import DEFINITIONS, GROUPS, rarefied, take
from loopdiag.measures import offset as offset_module
from loopdiag.measures.attention import gate_by_position, gate_mean, octaves
from loopdiag.measures.diversity import PooledRank, document_rank, effective_rank, participation_ratio
from loopdiag.measures.exit_rules import state_series, trade_off
from loopdiag.measures.motion import (
    DRIFTING,
    ORBITING,
    SETTLING,
    acceleration,
    cos_reference,
    cos_update,
    fixed_point_gap,
    fixed_point_gap_layers,
    fixed_point_gap_relative,
    label,
    radial_share,
    relative_step,
    state_cosine,
    step_size,
)
from loopdiag.measures.offset import omega, omega_random, omega_relative
from loopdiag.measures.prediction import averaged, by_class, exit_probability, exit_series, exits, lens, per_token
from loopdiag.measures.similarity import loop_hsic
from loopdiag.trace import record, with_maps

NAN, LOG2 = float("nan"), math.log(2)
MOTION = (step_size, relative_step, radial_share, acceleration, state_cosine, cos_update, cos_reference)
OFFSET = (omega, omega_relative, omega_random)
GAPS = (fixed_point_gap, fixed_point_gap_relative, fixed_point_gap_layers)
DIVERGENCES = ("output_shift", "output_shift_reverse", "output_shift_js")
calm = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 10**6)


def states_of(*documents):
    """States [loop, document, pos, d_model] of documents that are written [token][loop][d_model]."""
    return torch.tensor(documents, dtype=torch.float64).permute(2, 0, 1, 3)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


# Groups that `take` takes; the others are taken while a model runs, over all documents or a few, or by readouts.
ELSEWHERE = ("readouts", "pooled", "layers", "noise", "tokens", "attention_pairs", "heads")
TAKEN = [name for name in GROUPS if name not in ELSEWHERE]
CLASSES = torch.arange(VOCABULARY) % 3


def measure(trace, tokens, groups=TAKEN):
    """Every measure of a trace that needs nothing else; documents of up to 64 tokens, three classes of them."""
    return take(trace, groups, tokens, 64, (CLASSES, 3))


def recorded(model, batch):
    """A trace with everything in it."""
    return with_maps(model, batch, record(model, batch))


def participation(trace):
    """The participation ratio as a diagnosis takes it, at five tokens."""
    return document_rank(trace, 5, centred=True, of=participation_ratio)


def exit_values(name):
    """One of the measures that `exits` takes together, as a measure of its own."""
    return lambda trace: exits(trace)[name]


# -- by hand ----------------------------------------------------------------------------------------

# Two tokens, loops 0 to 2: one turns a corner of a 3-4-5 triangle, the other comes back past where it started.
CORNER, BOUNCE = [[3, 0], [3, 4], [0, 4]], [[1, 0], [2, 0], [-2, 0]]


@pytest.mark.parametrize(
    ("of", "corner", "bounce"),
    [
        (step_size, [NAN, 4, 3], [NAN, 1, 4]),
        (relative_step, [NAN, 4 / 3, 3 / 5], [NAN, 1, 2]),
        (radial_share, [NAN, 0, (3 * 3 / (3 * 5)) ** 2], [NAN, 1, 1]),
        (acceleration, [NAN, NAN, 5 / 5], [NAN, NAN, 5 / 2]),
        (state_cosine, [NAN, 3 / 5, 4 / 5], [NAN, 1, -1]),
        (cos_update, [NAN, NAN, 0], [NAN, NAN, -1]),
    ],
)
def test_motion_by_hand(of, corner, bounce):
    """Each token as on paper, and the mean of two; a straight line and a turn back have cosines 1 and -1."""
    alone = rows(corner, bounce)
    assert_same(of(trace_of(states_of([CORNER], [BOUNCE]))), alone, 1e-15)
    assert_same(of(trace_of(states_of([CORNER, BOUNCE]))), alone.mean(0, keepdim=True), 1e-15)


def test_straight_on_and_back():
    """Updates in one direction have cosine 1 whatever their lengths, and an oscillation -1."""
    start, way = torch.randn(2, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for places, cosine in (((0, 1, 3, 3.5), 1), ((0, 1, -1, 2), -1)):
        trace = trace_of(torch.stack([start + place * way for place in places]))
        assert_same(cos_update(trace), rows([NAN, NAN, cosine, cosine]), 1e-14)


@pytest.mark.parametrize(
    ("of", "offset", "expected"),
    [
        (omega, 1, 8 / 3),  # distances 5, 0, 3
        (omega, 0, 8 / 3),
        (omega_relative, 1, (5 / 5 + 0 / 5 + 3 / 4) / 3),
        (omega_random, 1, 20 / 6),  # the six pairs: 5, 5, 4, 0, 3, 3
        (omega, 2, (5 + 3) / 2),
        (omega_relative, 2, (5 / 5 + 3 / 4) / 2),
        (omega_random, 2, 20 / 6),
    ],
)
def test_offset_by_hand(of, offset, expected):
    """On the carry of the loop before, over pairs of real tokens; without an offset as with an offset of one."""
    carry = states_of([[[9, i], z, [i, 9]] for i, z in enumerate(([0, 0], [3, 4], [3, 4], [0, 4]))])
    trace = trace_of(torch.zeros_like(carry), carry=carry, offset=offset)
    assert_same(of(trace), rows([NAN, NAN, expected]), 1e-15)


def test_rank_of_states_by_hand():
    """Equal singular values count each, one direction counts once; 3 and 1 give 4 / 3^(3/4)."""
    assert_same(effective_rank(torch.eye(4)[:3] * 7).item(), 3.0, 1e-14)
    assert_same(effective_rank(torch.ones(5, 4)).item(), 1.0, 1e-14)
    assert_same(effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item(), 4 / 3**0.75, 1e-14)


def test_rank_with_a_coda_by_hand():
    """The rank stays on N(Y), here of one direction and of two, whatever the coda makes of it."""
    one, other, third = torch.eye(3).tolist()
    states = torch.tensor([[one, one, one], [one, other, one]])[:, None]
    trace = trace_of(states[:, :, :2], coda=torch.tensor([[[one, other]], [[third, third]]]), norm=lambda y: 2 * y)
    assert_same(document_rank(trace, 2), rows([1, 2]), 1e-14)


def test_rank_of_a_document_by_hand():
    """On N(Y) of the first tokens, NaN where a document has fewer; three equal directions less their mean are two."""
    one, other, third = torch.eye(3).tolist()
    states = torch.tensor([[one, other, third], [third, one, one]]).repeat(2, 1, 1, 1)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    trace = trace_of(states, mask=mask, norm=lambda y: y * torch.tensor([1.0, 3.0, 3.0]))
    assert_same(document_rank(trace, 2), rows([4 / 3**0.75] * 2, [1, 1]), 1e-14)
    assert_same(document_rank(trace, 3), rows([math.exp(scipy.stats.entropy([1, 3, 3]))] * 2, [NAN, NAN]), 1e-14)
    assert_same(document_rank(trace_of(states[:, :1]), 3, centred=True), rows([2, 2]), 1e-14)


# Probabilities of four tokens, in halvings, and what three predictions of them are worth.
FIRST, SECOND, EVEN = [1, 2, 3, 3], [3, 1, 2, 3], [2, 2, 2, 2]
EXITS_BY_HAND = {  # in units of log 2, but the rank; next tokens are 1, 0 and 1
    "nll_exit": [(2 + 1 + 2) / 3, (1 + 3 + 1) / 3, 2],
    "rank": [2, 1, 2.5],  # medians of (2, 1, 2), (1, 3.5, 1) and (2.5, 2.5, 2.5)
    "entropy": [1.75, 1.75, 2],
    "output_shift": [NAN, 1 / 2, 1 / 4],
    "output_shift_reverse": [NAN, 5 / 8, 1 / 4],
    "gain": [NAN, (1 + 0 + 1) / 3, (0 + 1 + 0) / 3],
    "cost": [NAN, (0 + 2 + 0) / 3, (1 + 0 + 1) / 3],
}


@pytest.mark.parametrize("name", EXITS_BY_HAND)
def test_exits_by_hand(name):
    """Powers of two, so that every logarithm can be read off."""
    states = -LOG2 * states_of([[FIRST, SECOND, EVEN]] * 4)
    trace = trace_of(states, input_ids=torch.tensor([[3, 1, 0, 1]]), head=lambda h: h)
    expected = rows(EXITS_BY_HAND[name]) * (1 if name == "rank" else LOG2)
    assert_same(exits(trace)[name], expected, 1e-15)


def test_gates_by_hand():
    """Mean over real tokens for every layer and head; loops without a gate stay undefined."""
    trace = random_trace(n_loops=2, spans=((0, 3), (1, 3)))
    gate = torch.full((3, 2, 2, 3, 1), NAN)
    gate[2, 0] = torch.tensor([[0.1, 0.2, 0.6], [9.0, 0.5, 1.0]])[..., None]
    gate[2, 1] = torch.tensor([[0.0, 0.0, 0.3], [9.0, 0.0, 1.0]])[..., None]
    mean = gate_mean(replace(trace, gate=gate))
    assert mean.shape == (2, 3, 2, 1)
    assert mean[:, :2].isnan().all()
    assert_same(mean[:, 2, :, 0], torch.tensor([[0.3, 0.1], [0.75, 0.5]]), 1e-7)
    with pytest.raises(ValueError, match="no gate"):
        gate_mean(trace)


def test_gates_by_position_by_hand():
    """Heads together, by the document's own positions: 0, 1, 2 and 3, then what begins at 4; NaN where none reaches."""
    trace = random_trace(n_loops=2, spans=((0, 6), (3, 6)))
    gate = torch.full((3, 1, 2, 6, 2), NAN)
    gate[2, 0, 0] = torch.tensor([[0.0, 0.2], [0.3, 0.3], [0.2, 0.4], [0.5, 0.5], [0.6, 0.6], [0.7, 0.9]])
    gate[2, 0, 1] = torch.tensor([[9.0, 9.0]] * 3 + [[0.1, 0.3], [0.5, 0.5], [1.0, 0.0]])
    found = gate_by_position(replace(trace, gate=gate), 9)
    assert octaves(9) == [0, 1, 2, 4, 8]
    assert found.shape == (2, 3, 1, 5)
    assert found[:, :2].isnan().all()
    assert_same(found[:, 2, 0], torch.tensor([[0.1, 0.3, 0.4, 0.7, NAN], [0.2, 0.5, 0.5, NAN, NAN]]), 1e-7)
    with pytest.raises(ValueError, match="no gate"):
        gate_by_position(trace, 9)


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2]), (5, [0, 1, 2, 4]), (64, [0, 1, 2, 4, 8, 16, 32])],
)
def test_octaves(tokens, starts):
    """Every bin holds a position of the longest document, and they hold all of them."""
    assert octaves(tokens) == starts


@given(seed=seeds)
@calm
def test_gates_by_position_add_up_to_their_mean(seed):
    """Weighted by the tokens of a bin, the bins are the mean gate; and numpy agrees on each. Measured: 1e-16."""
    trace = random_trace(seed)
    gate = torch.rand(4, 2, *trace.mask.shape, 3, generator=torch.Generator().manual_seed(seed)).double()
    trace = replace(trace, gate=gate)
    found, starts = gate_by_position(trace, 9), [*octaves(9), 9]
    for d, real in enumerate(trace.mask):
        own = gate[:, :, d, real].mean(-1).numpy()
        for index, (start, end) in enumerate(itertools.pairwise(starts)):
            expected = own[:, :, start:end].mean(-1) if own.shape[2] > start else np.full((4, 2), NAN)
            np.testing.assert_allclose(found[d, :, :, index], expected, rtol=0, atol=1e-14)
        tokens = torch.tensor([own[..., start:end].shape[2] for start, end in itertools.pairwise(starts)])
        weighed = (found[d].nan_to_num() * tokens).sum(-1) / tokens.sum()
        assert_same(weighed, gate_mean(trace)[d].mean(-1), 1e-14)


def test_exit_probability_by_hand():
    """Two tokens of three loops: leave with 1/2, then half of the rest, then what is left; and never before the last.

    The probability once at the last loop does not count, since there is nowhere else to go.
    """
    first, second = [NAN, 1 / 2, 1 / 2, 0.9], [NAN, 0, 0, 0]
    leave = rows(first, second).T[:, None]
    trace = replace(random_trace(spans=((0, 2),)), leave=leave)
    assert_same(exit_probability(trace), rows([NAN, 1 / 4, 1 / 8, 5 / 8]), 1e-15)
    for token, alone in enumerate(([NAN, 1 / 2, 1 / 4, 1 / 4], [NAN, 0, 0, 1])):
        kept = torch.arange(2) == token
        assert_same(exit_probability(replace(trace, mask=kept[None])), rows(alone), 1e-15)
    certain = replace(trace, leave=rows([NAN] * 2, [1, 1], [0.5, 0.5], [0.5, 0.5])[:, None])
    assert_same(exit_probability(certain), rows([NAN, 1, 0, 0]))


def test_no_exit_gate_no_probability():
    """Refused in words."""
    with pytest.raises(ValueError, match="exit_probability: this model has no exit gate"):
        exit_probability(random_trace())


# Three logits of four tokens, loops 0 to 2, all next tokens 1; LIKELIEST and whether it is right can be read off.
# The first is put right and wrong again, the second is right throughout, the third ties (the first of equals counts),
# the last one predicts nothing.
FLIPS = [[[9, 5, 0], [0, 9, 5], [9, 5, 0]], [[0, 2, 1], [0, 3, 1], [0, 9, 1]], [[4, 4, 0], [0, 4, 4], [0, 6, 0]]]
FLIPS_BY_HAND = {
    "accuracy": [1 / 3, 1, 2 / 3],
    "changed": [NAN, 2 / 3, 1 / 3],
    "fixed": [NAN, 2 / 3, 0],
    "broken": [NAN, 0, 1 / 3],
    "settled": [1 / 3, 2 / 3, 1],  # the first token is back where it began, which is not to have stayed
    "breadth": [NAN, NAN, 1],
    "log_rank": [(math.log(2) + 0 + math.log(1.5)) / 3, math.log(1.5) / 3, math.log(2) / 3],
}


@pytest.mark.parametrize("name", FLIPS_BY_HAND)
def test_flips_by_hand(name):
    """What happens to the likeliest token, and the rank's logarithm, with ties."""
    trace = trace_of(
        states_of([*FLIPS, FLIPS[0]]).double(), input_ids=torch.ones(1, 4, dtype=torch.long), head=lambda h: h
    )
    assert_same(exits(trace)[name], rows(FLIPS_BY_HAND[name]), 1e-15)


def test_confidence_by_hand():
    """The largest probability, of an even prediction one in four."""
    trace = trace_of(
        -LOG2 * states_of([[FIRST, SECOND, EVEN]] * 4), input_ids=torch.ones(1, 4).long(), head=lambda h: h
    )
    assert_same(exits(trace)["confidence"], rows([1 / 2, 1 / 2, 1 / 4]), 1e-15)


def test_breadth_by_hand():
    """Loop 1 never counts, however far it goes; of equal shifts the first one does."""
    still, left, right = [0, 0], [5, 0], [0, 5]
    tokens = [[still, left, left, left, right], [right, left, right, left, left], [still, left, right, left, right]]
    trace = trace_of(states_of([*tokens, tokens[0]]), input_ids=torch.ones(1, 4).long(), head=lambda h: h)
    shift = exit_series(trace)["output_shift"][2:, 0, 2]
    assert (shift == shift[0]).all()
    assert_same(exits(trace)["breadth"], rows([NAN, NAN, 2 / 3, 0, 1 / 3]), 1e-15)


def test_participation_ratio_by_hand():
    """One direction is 1, d equal ones d; variances 9 and 1 give 100 / 82."""
    assert_same(participation_ratio(torch.ones(5, 4)).item(), 1.0, 1e-14)
    assert_same(participation_ratio(torch.eye(6)[:4] * 7).item(), 4.0, 1e-14)
    assert_same(participation_ratio(torch.diag(torch.tensor([3.0, 1.0]))).item(), 100 / 82, 1e-14)


def test_participation_ratio_of_isotropic_states():
    """Close to d for many tokens, d n / (n + d) for n of them. Measured: 0.1 % of 7.97, 1.2 % of 4."""
    draw = torch.randn(40, 2000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for tokens in (2000, 8):
        expected = 8 * tokens / (tokens + 8)
        assert participation_ratio(draw[:, :tokens]).mean().item() == pytest.approx(expected, rel=0.03)


def test_radial_share_of_scaling_and_turning():
    """Growing or shrinking is all radial, a small turn hardly, a random step 1 / d. Measured: 5e-5; 0.0098."""
    y = torch.randn(2, 300, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_same(radial_share(trace_of(torch.stack((y, 3 * y, y / 2)))), rows(*[[NAN, 1, 1]] * 2), 1e-14)
    generator = torch.randn(100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turn = torch.matrix_exp(1e-3 * (generator - generator.T))
    assert (radial_share(trace_of(torch.stack((y, y @ turn))))[:, 1] < 1e-3).all()
    step = torch.randn(2, 300, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_same(radial_share(trace_of(torch.stack((y, y + step)))).mean(0), rows(NAN, 0.01), 1e-3)


def test_acceleration_of_steady_motion_and_of_a_cycle():
    """Nothing for steps that are all alike; a state that goes back and forth has twice its relative step."""
    start, way = torch.randn(2, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steady = trace_of(torch.stack([start + r * way for r in range(4)]))
    assert_same(acceleration(steady), rows([NAN, NAN, 0, 0]), 1e-14)
    cycle = trace_of(torch.stack([start + (r % 2) * way for r in range(5)]))
    assert_same(acceleration(cycle)[:, 2:], 2 * relative_step(cycle)[:, 2:], 1e-14)


def planted_motion(kind, n_loops=4):
    """Ten tokens that settle, orbit or drift; E far from where they go."""
    start, way, other = torch.randn(3, 1, 10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    across = way - (way * other).sum(-1, keepdim=True) / other.square().sum(-1, keepdim=True) * other
    places = {
        "geometric": [start + (1 - 0.5**r) * way for r in range(n_loops + 1)],
        "two-cycle": [other + (-1) ** r * across for r in range(n_loops + 1)],  # both ends of one norm
        "steady": [start + 0.1 * r * way for r in range(n_loops + 1)],
        "circle": [start * math.cos(r) + way * math.sin(r) for r in range(n_loops + 1)],
        "still": [start] * (n_loops + 1),
        # Back and forth around what shrinks: it orbits, but it also settles, which comes first.
        "damped": [other + (-0.5) ** r * way for r in range(n_loops + 1)],
    }
    return trace_of(torch.stack(places[kind]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *(("geometric", SETTLING), ("damped", SETTLING), ("still", SETTLING)),
        *(("two-cycle", ORBITING), ("steady", DRIFTING), ("circle", DRIFTING)),
    ],
)
def test_labels_of_planted_motion(kind, expected):
    """At three loops as at six; a small step onward is no settling."""
    for n_loops in (3, 4, 6):
        assert label(planted_motion(kind, n_loops)).tolist() == [expected]


def test_labels_of_kept_loops_need_steps_alike():
    """A step of four loops beside one of one would make a state that settles drift."""
    settling = torch.cumsum(0.7 ** torch.arange(9.0), 0)[:, None, None, None] * torch.ones(9, 1, 6, 3)
    for at, expected in (((0, 1, 2, 3, 4), 0), ((0, 2, 4, 6, 8), 0), ((0, 1, 2, 3, 8), NAN)):
        trace = replace(trace_of(settling[list(at)]), at=at)
        assert label(trace).tolist() == pytest.approx([expected], nan_ok=True)


def test_labels_of_too_few_loops():
    """Two steps after the first are needed: NaN under three loops, and for a document without tokens."""
    for n_loops in (1, 2):
        assert label(planted_motion("steady", n_loops)).isnan().all()
    found = label(random_trace(spans=((0, 9), (0, 0))))
    assert found.dtype == torch.float64
    assert found.isnan().tolist() == [False, True]


def test_unrelated_states_do_not_orbit():
    """Though their cosine is -1/2: a turn counts beyond what unrelated states give."""
    assert label(trace_of(sphere(4))).tolist() == [DRIFTING, DRIFTING]


def test_lens_by_hand():
    """The head on N(Y), whatever stands in the coda: the numbers of the exits above, one state further back."""
    states = -LOG2 * states_of([[FIRST, SECOND, EVEN]] * 4)
    ids = torch.tensor([[3, 1, 0, 1]])
    trace = trace_of(states, input_ids=ids, head=lambda h: h, coda=states.flip(0))
    assert_same(lens(trace)["nll_lens"], rows(EXITS_BY_HAND["nll_exit"]) * LOG2, 1e-15)
    assert_same(exits(trace)["nll_exit"], rows(EXITS_BY_HAND["nll_exit"][::-1]) * LOG2, 1e-15)
    assert set(lens(trace)) == {"nll_lens"}


@pytest.mark.parametrize("of", [exits, lens])
@pytest.mark.parametrize("given", [{"input_ids": torch.zeros(1, 3).long()}, {"head": torch.nn.Identity()}])
def test_nothing_to_read_without_head_and_tokens(given, of):
    """The message says what to give; tokens are never made up."""
    with pytest.raises(ValueError, match=r"lacks head or tokens.*head=, input_ids="):
        of(trace_of(torch.zeros(2, 1, 3, 4), **given))


# -- outside references -----------------------------------------------------------------------------


def token_by_token(trace, value, first, kept):
    """[document, loop]: mean over the kept tokens of value(loop, document, pos), NaN before loop `first`."""
    loops = range(trace.n_loops + 1)
    return rows(
        *(
            [NAN if r < first else np.mean([value(r, d, i) for i in np.flatnonzero(real)]) for r in loops]
            for d, real in enumerate(kept)
        )
    )


def cosine(a, b):
    return 1 - scipy.spatial.distance.cosine(a, b)


def motion_references(trace):
    """Each measure of motion once more, on Y, with the first loop that has it."""
    y, euclidean = trace.raw.numpy(), scipy.spatial.distance.euclidean

    def size(r, d, i):
        return np.linalg.norm(y[r, d, i])

    def turned(r, d, i):
        real = np.flatnonzero(trace.mask[d])
        place, third = np.flatnonzero(real == i)[0], len(real) // 3
        middle, before = y[r - 1, d, real[place - third]], y[r - 2, d, real[place - 2 * third]]
        return cosine(y[r, d, i] - middle, middle - before)

    return {
        step_size: (1, lambda r, d, i: euclidean(y[r, d, i], y[r - 1, d, i])),
        relative_step: (1, lambda r, d, i: euclidean(y[r, d, i], y[r - 1, d, i]) / size(r - 1, d, i)),
        radial_share: (1, lambda r, d, i: cosine(y[r, d, i] - y[r - 1, d, i], y[r - 1, d, i]) ** 2),
        acceleration: (
            2,
            lambda r, d, i: np.linalg.norm(np.diff(y[r - 2 : r + 1, d, i], 2, axis=0)) / size(r - 1, d, i),
        ),
        state_cosine: (1, lambda r, d, i: cosine(y[r, d, i], y[r - 1, d, i])),
        cos_update: (2, lambda r, d, i: cosine(y[r, d, i] - y[r - 1, d, i], y[r - 1, d, i] - y[r - 2, d, i])),
        cos_reference: (2, turned),
    }


@pytest.mark.parametrize("of", MOTION)
def test_motion_against_scipy(of):
    """Loop by loop on Y, over real tokens. Measured: 1e-15."""
    trace = random_trace()
    first, value = motion_references(trace)[of]
    assert_same(of(trace), token_by_token(trace, value, first, trace.mask), 1e-13)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("together", [4, 6, 4096])
def test_offset_against_scipy(monkeypatch, offset, together):
    """On Z of the loop before, whatever the number of pairs at a time. Measured: 1e-15."""
    monkeypatch.setattr(offset_module, "PAIRED", together)
    trace = random_trace(offset=offset)
    z, lag = trace.carry.numpy(), max(1, offset)
    pairs = np.zeros(trace.mask.shape, dtype=bool)
    pairs[:, lag:] = trace.mask[:, lag:] & trace.mask[:, :-lag]

    def apart(r, d, i):
        return scipy.spatial.distance.euclidean(z[r - 1, d, i], z[r - 1, d, i - lag])

    def relative(r, d, i):
        return apart(r, d, i) / np.linalg.norm(z[r - 1, d, i])

    def any_two(r, d, _):
        return scipy.spatial.distance.pdist(z[r - 1, d, trace.mask[d]]).mean()

    for of, value in ((omega, apart), (omega_relative, relative), (omega_random, any_two)):
        assert_same(of(trace), token_by_token(trace, value, 2, pairs), 1e-13)


@pytest.mark.parametrize("centred", [False, True])
def test_rank_against_numpy(centred):
    """exp of the entropy of numpy's singular values of a document's first states N(Y). Measured: 7e-15."""
    trace = random_trace()
    expected = []
    for d, real in enumerate(trace.mask):
        states = trace.readout[:, d, real][:, :5].numpy()
        states = states - states.mean(1, keepdims=True) if centred else states
        values = np.linalg.svd(states, compute_uv=False)
        expected.append(np.exp(scipy.stats.entropy(values, axis=1)).tolist())
    assert_same(document_rank(trace, 5, centred=centred), rows(*expected), 1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_participation_ratio_against_numpy(centred):
    """From numpy's eigenvalues of the matrix of second moments. Measured: 2e-15."""
    trace = random_trace()
    expected = []
    for d, real in enumerate(trace.mask):
        states = trace.readout[:, d, real][:, :5].numpy()
        states = states - states.mean(1, keepdims=True) if centred else states
        values = np.linalg.eigvalsh(states.transpose(0, 2, 1) @ states)
        expected.append((values.sum(1) ** 2 / (values**2).sum(1)).tolist())
    assert_same(document_rank(trace, 5, centred=centred, of=participation_ratio), rows(*expected), 1e-12)


def pooled(*traces):
    """Ranks of all documents of some batches."""
    ranks = PooledRank()
    for trace in traces:
        ranks.add(ranks.moments(trace))
    return ranks.result()


def test_pooled_rank_against_numpy():
    """From numpy's singular values of all documents' states behind one another, and of those less their mean.

    Measured: 3e-15.
    """
    trace = random_trace(coda=True)
    states = trace.norm(trace.raw)[:, trace.mask].numpy()
    raw = np.linalg.svd(states, compute_uv=False)
    centred = np.linalg.svd(states - states.mean(1, keepdims=True), compute_uv=False)
    expected = {
        "effective_rank_pooled": np.exp(scipy.stats.entropy(raw, axis=1)),
        "effective_rank_centred_pooled": np.exp(scipy.stats.entropy(centred, axis=1)),
        "participation_ratio_pooled": (centred**2).sum(1) ** 2 / (centred**4).sum(1),
    }
    assert_all_same(pooled(trace), {name: torch.from_numpy(values) for name, values in expected.items()}, 1e-11)
    assert set(expected) == set(GROUPS["pooled"])


def test_pooled_rank_by_hand():
    """Two documents of one direction each are two together; equal states less their mean are none."""
    one, other = torch.eye(3, dtype=torch.float64)[:2]
    states = torch.stack([one, other]).reshape(1, 2, 1, 3).repeat(2, 1, 4, 1)
    found = pooled(trace_of(states))
    assert_same(found["effective_rank_pooled"], torch.full((2,), 2.0).double(), 1e-14)
    # Less their mean, the two lie on a line.
    assert_same(found["effective_rank_centred_pooled"], torch.ones(2).double(), 1e-6)
    assert_same(found["participation_ratio_pooled"], torch.ones(2).double(), 1e-14)
    equal = pooled(trace_of(one.expand(2, 1, 4, 3)))
    assert_same(equal["effective_rank_pooled"], torch.ones(2).double(), 1e-14)
    assert equal["effective_rank_centred_pooled"].isnan().all()
    assert equal["participation_ratio_pooled"].isnan().all()
    with pytest.raises(ValueError, match="no batch was added"):
        PooledRank().result()


def test_pooled_rank_is_only_looked_at():
    """A result changes nothing: asked for again it is the same, also where a loop's states are not finite."""
    states = torch.randn(3, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states[1, 0, 0, 0] = torch.inf
    ranks = PooledRank()
    ranks.add(ranks.moments(trace_of(states)))
    first = ranks.result()
    assert_all_same(ranks.result(), first)
    for values in first.values():
        assert values.isnan().tolist() == [False, True, False]
    ranks.add(ranks.moments(trace_of(states.nan_to_num(posinf=0.0))))
    assert ranks.result()["effective_rank_pooled"].isnan().tolist() == [False, True, False]


@given(seed=seeds, cut=st.integers(1, 5))
@settings(calm, max_examples=6)
@torch.no_grad()
def test_pooled_rank_of_any_batches(seed, cut):
    """However documents are dealt, padded or ordered; of one document, its own rank. Measured: 5e-7."""
    documents = token_lists(seed, lengths=(14, 19, 12, 17, 15, 13))
    model = make_model()
    whole = pooled(record(model, padded(documents)))
    parts = [record(model, padded(part, left=(0,))) for part in (documents[cut:], documents[:cut])]
    assert_all_same(pooled(*parts), whole, 1e-10)
    alone = record(model, padded(documents[:1]))
    found = pooled(alone)
    assert_same(found["effective_rank_pooled"], document_rank(alone, 14)[0], 1e-5)
    assert_same(found["effective_rank_centred_pooled"], document_rank(alone, 14, centred=True)[0], 1e-5)
    ratio = document_rank(alone, 14, centred=True, of=participation_ratio)[0]
    assert_same(found["participation_ratio_pooled"], ratio, 1e-11)


def test_rarefaction():
    """The rank at each of the token counts that documents reach, the matched count last; it grows with the tokens."""
    assert rarefied(256) == [16, 32, 64, 128, 256]
    assert rarefied(40) == [16, 32, 40]
    assert rarefied(16) == [16]
    trace = random_trace(spans=((0, 50), (3, 43), (0, 20)))
    found = measure(trace, 40, ["rarefaction"])["effective_rank_by_tokens"]
    for index, tokens in enumerate((16, 32, 40)):
        assert_same(found[..., index], document_rank(trace, tokens))
    assert found[2, :, 1:].isnan().all()
    assert found[2, :, 0].isfinite().all()


def first_best(p):
    """Index of the first of the largest, in plain Python."""
    return max(range(len(p)), key=lambda index: (p[index], -index))


@pytest.mark.parametrize("rounded", [False, True])
def test_flips_against_plain_python(rounded):
    """Token by token, with logits that tie when rounded. Measured: 2e-16."""
    trace = random_trace()
    if rounded:
        trace = replace(trace, head=lambda h, head=trace.head: head(h).round())
    logits = trace.head(trace.readout).numpy()
    best = np.apply_along_axis(first_best, -1, logits)
    order = scipy.stats.rankdata(-logits, method="average", axis=-1)
    last, ids = trace.n_loops, trace.input_ids.numpy()
    shift = exit_series(trace)["output_shift"].numpy()

    def right(r, d, i):
        return best[r, d, i] == ids[d, i + 1]

    references = {
        "log_rank": (0, lambda r, d, i: np.log(order[r, d, i, ids[d, i + 1]])),
        "confidence": (0, lambda r, d, i: scipy.special.softmax(logits[r, d, i]).max()),
        "accuracy": (0, right),
        "settled": (0, lambda r, d, i: all(best[later, d, i] == best[last, d, i] for later in range(r, last + 1))),
        "changed": (1, lambda r, d, i: best[r, d, i] != best[r - 1, d, i]),
        "fixed": (1, lambda r, d, i: right(r, d, i) and not right(r - 1, d, i)),
        "broken": (1, lambda r, d, i: right(r - 1, d, i) and not right(r, d, i)),
        "breadth": (2, lambda r, d, i: r == 2 + first_best(shift[2:, d, i])),
    }
    assert (logits[..., None] == logits[..., None, :]).sum() > logits.size or not rounded
    for name, (first, value) in references.items():
        assert_same(exits(trace)[name], token_by_token(trace, value, first, trace.predicts), 1e-14, name)


@pytest.mark.parametrize(
    ("name", "first", "value"),
    [
        ("nll_exit", 0, lambda p, q, target: sklearn.metrics.log_loss([target], [p], labels=range(len(p)))),
        ("entropy", 0, lambda p, q, target: scipy.stats.entropy(p)),
        ("output_shift", 1, lambda p, q, target: scipy.stats.entropy(p, q)),
        ("output_shift_reverse", 1, lambda p, q, target: scipy.stats.entropy(q, p)),
        ("output_shift_js", 1, lambda p, q, target: scipy.spatial.distance.jensenshannon(p, q) ** 2),
        ("gain", 1, lambda p, q, target: max(0, np.log(p[target] / q[target]))),
        ("cost", 1, lambda p, q, target: max(0, np.log(q[target] / p[target]))),
    ],
)
def test_exits_against_scipy_and_sklearn(name, first, value):
    """Distribution by distribution, p^(r) and q = p^(r-1), over tokens that have a next one. Measured: 1e-15."""
    trace = random_trace()
    p = scipy.special.softmax(trace.head(trace.readout).numpy(), axis=-1)
    ids = trace.input_ids.tolist()
    expected = token_by_token(
        trace, lambda r, d, i: value(p[r, d, i], p[r - 1, d, i], ids[d][i + 1]), first, trace.predicts
    )
    assert_same(exits(trace)[name], expected, 1e-12)


@pytest.mark.parametrize("coda", [False, True])
def test_lens_against_scipy(coda):
    """scipy's log_softmax of the head on N(Y), token by token, with a coda or without. Measured: 9e-16."""
    trace = random_trace(coda=coda)
    log_p = scipy.special.log_softmax(trace.head(trace.norm(trace.raw)).numpy(), axis=-1)
    ids = trace.input_ids.tolist()
    expected = token_by_token(trace, lambda r, d, i: -log_p[r, d, i, ids[d][i + 1]], 0, trace.predicts)
    assert_same(lens(trace)["nll_lens"], expected, 1e-13)


def test_exits_through_a_coda_against_scipy():
    """Then the distributions are those of the head on N(coda). Measured: 9e-16."""
    trace = random_trace(coda=True)
    log_p = scipy.special.log_softmax(trace.head(trace.norm(trace.coda)).numpy(), axis=-1)
    ids = trace.input_ids.tolist()
    expected = token_by_token(trace, lambda r, d, i: -log_p[r, d, i, ids[d][i + 1]], 0, trace.predicts)
    assert_same(exits(trace)["nll_exit"], expected, 1e-13)


def test_exit_probability_against_numpy():
    """p_r = leave_r * prod_{j<r} (1 - leave_j), the last loop what is left; mean over real tokens. Measured: 1e-16."""
    trace = random_trace(exit_gate=True)
    leave = trace.leave.numpy().copy()
    leave[-1] = 1
    expected = token_by_token(trace, lambda r, d, i: leave[r, d, i] * np.prod(1 - leave[1:r, d, i]), 1, trace.mask)
    assert_same(exit_probability(trace), expected, 1e-14)


def test_token_ranks_against_scipy():
    """The median of the next tokens' average ranks; logits are rounded so that many tie."""
    trace = random_trace()
    trace = replace(trace, head=lambda h, head=trace.head: head(h).round())
    order = scipy.stats.rankdata(-trace.head(trace.readout).numpy(), method="average", axis=-1)
    expected = [
        [
            np.median([order[r, d, i, trace.input_ids[d, i + 1]] for i in np.flatnonzero(trace.predicts[d])])
            for r in range(trace.n_loops + 1)
        ]
        for d in range(len(trace.mask))
    ]
    assert (order % 1 != 0).any()
    assert_same(exits(trace)["rank"], rows(*expected))


# -- laws -------------------------------------------------------------------------------------------


@given(seed=seeds)
@calm
def test_gain_less_cost_is_the_change_of_the_loss(seed):
    """The identity that the gain-cost curve stands on. Measured: 2e-15."""
    values = exits(random_trace(seed))
    nll = values["nll_exit"]
    assert_same((values["gain"] - values["cost"])[:, 1:], nll[:, :-1] - nll[:, 1:], 1e-13)
    assert (values["gain"][:, 1:] >= 0).all()
    assert (values["cost"][:, 1:] >= 0).all()


@given(seed=seeds, n_loops=st.integers(1, 5))
@calm
def test_laws_of_the_likeliest_token(seed, n_loops):
    """What is put right less what is put wrong is the rise of accuracy; what has settled stays, all of it at R.

    A token that is put right or wrong has changed; what settles with loop r changed in it; breadth sums to 1 over
    loops 2..R. Measured: 2e-16.
    """
    values = exits(random_trace(seed, n_loops=n_loops))
    accuracy, settled, breadth = (values[name] for name in ("accuracy", "settled", "breadth"))
    assert_same((values["fixed"] - values["broken"])[:, 1:], accuracy.diff(dim=1), 1e-14)
    assert (values["fixed"] + values["broken"] <= values["changed"] + 1e-14)[:, 1:].all()
    assert (settled.diff(dim=1) >= 0).all()
    assert (settled.diff(dim=1) <= values["changed"][:, 1:] + 1e-14).all()
    assert (settled[:, -1] == 1).all()
    assert breadth[:, :2].isnan().all()
    if n_loops > 1:
        assert_same(breadth[:, 2:].sum(1), torch.ones(4).double(), 1e-14)


@given(seed=seeds)
@calm
def test_exits_are_the_averages_of_their_series(seed):
    """Token by token, 0 where nothing is predicted; and the means are those of `exits`, to the bit."""
    trace = random_trace(seed)
    series = exit_series(trace)
    for name, values in series.items():
        assert values.shape == (4, *trace.mask.shape), name
        assert (values[:, ~trace.predicts] == 0).all(), name
    assert_all_same(averaged(series, trace.predicts), exits(trace))
    one = per_token(
        trace, trace.readout, lambda logits, targets: {"x": logits.gather(-1, targets.expand(4, 1, -1).mT)[..., 0]}
    )
    targets = trace.input_ids.roll(-1, 1)[trace.predicts]
    expected = trace.head(trace.readout)[:, trace.predicts].numpy()[:, np.arange(len(targets)), targets.numpy()]
    np.testing.assert_allclose(one["x"][:, trace.predicts], expected, rtol=0, atol=1e-13)


@given(seed=seeds)
@calm
def test_a_coda_that_changes_nothing(seed):
    """Then the plain lens is the exit, to the bit, and every other measure is what it is without a coda."""
    trace = random_trace(seed)
    coda = replace(trace, coda=trace.raw)
    assert_same(lens(coda)["nll_lens"], exits(coda)["nll_exit"])
    assert_all_same(measure(coda, 5), measure(trace, 5) | lens(coda))


@given(seed=seeds, n_loops=st.integers(1, 5))
@calm
def test_exit_probabilities_sum_to_one(seed, n_loops):
    """Over loops 1..R, in every document, each of them between 0 and 1. Measured: 2e-16."""
    p = exit_probability(random_trace(seed, n_loops=n_loops, exit_gate=True))
    assert p[:, 0].isnan().all()
    assert ((p[:, 1:] >= 0) & (p[:, 1:] <= 1)).all()
    assert_same(p[:, 1:].sum(1), torch.ones(4).double(), 1e-14)


@given(seed=seeds)
@calm
def test_bounds(seed):
    """Ranges that the docstrings promise, for any states."""
    trace = random_trace(seed)
    values = exits(trace)
    for name in ("output_shift", "output_shift_reverse"):
        assert (values[name][:, 1:] > 0).all()
    assert ((values["output_shift_js"][:, 1:] > 0) & (values["output_shift_js"][:, 1:] <= LOG2)).all()
    assert ((values["entropy"] >= 0) & (values["entropy"] <= math.log(7))).all()
    assert ((values["rank"] >= 1) & (values["rank"] <= 7)).all()
    assert ((values["log_rank"] >= 0) & (values["log_rank"] <= math.log(7))).all()
    assert ((values["confidence"] > 1 / 7) & (values["confidence"] <= 1)).all()
    assert ((radial_share(trace)[:, 1:] >= 0) & (radial_share(trace)[:, 1:] <= 1)).all()
    assert (acceleration(trace)[:, 2:] > 0).all()
    for tokens in (2, 5):
        ranks, ratios = document_rank(trace, tokens), document_rank(trace, tokens, of=participation_ratio)
        assert ((ranks >= 1) & (ranks <= min(tokens, 6))).all()
        assert ((ratios >= 1) & (ratios <= ranks)).all()
        assert (document_rank(trace, tokens, centred=True) <= min(tokens - 1, 6) + 1e-12).all()
    for of in (state_cosine, cos_update, cos_reference):
        assert (of(trace)[:, 2:].abs() <= 1).all()


def test_a_loop_that_does_nothing():
    """Equal predictions have no divergence, no gain and no cost, and equal states no step."""
    trace = random_trace()
    trace = replace(trace, raw=trace.raw[[0, 1, 1, 2]], readout=trace.readout[[0, 1, 1, 2]])
    values = exits(trace)
    for name in (*DIVERGENCES, "gain", "cost"):
        # Measured: 1e-17, the Jensen-Shannon divergence, whose mixture is rounded.
        assert_same(values[name][:, 2], torch.zeros(4).double(), 1e-15 if name == "output_shift_js" else 0)
        assert (values[name][:, [1, 3]].sum(1) > 0).all()
    assert (step_size(trace)[:, 2] == 0).all()
    assert (relative_step(trace)[:, 2] == 0).all()


@given(seed=seeds)
@calm
def test_the_reverse_of_a_shift(seed):
    """Running the loops backwards swaps the two directions of Dp, gain and cost, and leaves Jensen-Shannon."""
    trace = random_trace(seed)
    forward, backward = exits(trace), exits(replace(trace, readout=trace.readout.flip(0)))
    swaps = {"output_shift": "output_shift_reverse", "output_shift_js": "output_shift_js", "gain": "cost"}
    for one, other in swaps.items():
        assert_same(backward[one][:, 1:], forward[other][:, 1:].flip(1), 1e-13)


def test_predictions_that_exclude_each_other():
    """Certain and opposed predictions stay finite: Jensen-Shannon reaches log 2, KL the logits' distance.

    No prediction gives the third token any chance that a float32 can hold.
    """
    states = torch.zeros(3, 1, 4, 3)
    states[1, ..., 0], states[2, ..., 1], states[..., 2] = 300.0, 300.0, -300.0
    values = exits(trace_of(states, input_ids=torch.ones(1, 4, dtype=torch.long), head=lambda h: h))
    assert values["output_shift"][0, 2] == values["output_shift_reverse"][0, 2] == 300
    assert values["nll_exit"].tolist() == [pytest.approx([LOG2, 300, 0])]
    assert values["entropy"].tolist() == [pytest.approx([LOG2, 0, 0])]
    assert values["output_shift_js"][0, 2].item() == pytest.approx(LOG2)


def test_a_loop_that_is_not_finite_predicts_nothing():
    """Its numbers are NaN, and so is what compares with it; comparisons with NaN would say that the best came out."""
    whole = random_trace(n_loops=4)
    broken = whole.readout.clone()
    broken[3] = float("nan")
    found, expected = exit_series(replace(whole, readout=broken)), exit_series(whole)
    predicts = whole.predicts
    compares = {"gain", "cost", "changed", "fixed", "broken"} | {name for name in found if name.startswith("output")}
    others = {"settled": [0, 1, 2, 3], "breadth": [0, 1, 2, 3, 4]} | {name: [3, 4] for name in compares}
    for name, values in found.items():
        lost = others.get(name, [3])
        kept = [loop for loop in range(5) if loop not in lost]
        assert values[lost][:, predicts].isnan().all(), name
        assert_same(values[kept], expected[name][kept], 1e-13, name)


def test_tokens_that_a_head_leaves_out():
    """Logits of -inf at every exit have no part in entropy and divergences: as if the head did not have them."""
    trace = random_trace()
    few = replace(trace, input_ids=trace.input_ids.clamp_max(4))

    def head(h):
        return trace.head(h)[..., :5]

    def with_holes(h):
        return torch.cat((head(h), torch.full_like(h[..., :2], float("-inf"))), dim=-1)

    assert_all_same(exits(replace(few, head=with_holes)), exits(replace(few, head=head)), 1e-13)


def test_tied_tokens_share_their_rank():
    """Where every logit is the same, every token is in the middle: (V + 1) / 2."""
    trace = random_trace()
    trace = replace(trace, head=lambda h, head=trace.head: 0 * head(h) + 3)
    assert (exits(trace)["rank"] == 4).all()


@given(seed=seeds, scale=st.sampled_from([1e-4, 0.5, 300.0]))
@calm
def test_scale(seed, scale):
    """Lengths grow with the states, ratios and angles do not. Measured, relative: 1e-14."""
    trace = random_trace(seed)
    scaled = replace(trace, raw=trace.raw * scale, carry=trace.carry * scale, readout=trace.readout * scale)
    for of in (step_size, omega, omega_random):
        torch.testing.assert_close(of(scaled), of(trace) * scale, rtol=1e-12, atol=0, equal_nan=True)
    ranks = (lambda t: document_rank(t, 5), lambda t: document_rank(t, 5, centred=True), participation)
    for of in (*MOTION[1:], omega_relative, *ranks):
        torch.testing.assert_close(of(scaled), of(trace), rtol=1e-12, atol=1e-13, equal_nan=True)


@given(seed=seeds)
@calm
def test_rotation(seed):
    """No basis is preferred: lengths, angles and ranks are those of the rotated states. Measured: 2e-14."""
    trace = random_trace(seed)
    noise = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(noise).Q
    turned = replace(trace, raw=trace.raw @ turn, carry=trace.carry @ turn, readout=trace.readout @ turn)
    ranks = (lambda t: document_rank(t, 5), lambda t: document_rank(t, 5, centred=True), participation)
    for of in (*MOTION, *OFFSET, *ranks):
        assert_same(of(turned), of(trace), 1e-12)


@given(seed=seeds)
@calm
def test_a_shared_part(seed):
    """What all states have in common moves nothing, displaces nothing, and does not count for the centred rank.

    Measured: 5e-14.
    """
    trace = random_trace(seed)
    moved = replace(trace, raw=trace.raw + 50, carry=trace.carry + 50, readout=trace.readout + 50)
    for of in (step_size, cos_update, cos_reference, omega, omega_random, lambda t: document_rank(t, 5, centred=True)):
        assert_same(of(moved), of(trace), 1e-12)
    assert (document_rank(moved, 5) < document_rank(trace, 5)).all()


def test_constant_carries_are_displaced_by_nothing():
    """Omega of any kind is zero when all tokens hand on the same state."""
    trace = random_trace()
    trace = replace(trace, carry=trace.carry[:, :, :1].expand_as(trace.carry))
    for of in OFFSET:
        assert (of(trace)[:, 2:] == 0).all()


def test_omega_of_tokens_without_order():
    """For independent states neighbours are as strange as any two. Measured: 1.3 %, of 300 tokens."""
    trace = random_trace(spans=((0, 300),), width=8)
    torch.testing.assert_close(omega(trace)[:, 2:], omega_random(trace)[:, 2:], rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("h", "message"),
    [(torch.zeros(3, 2), "all zeros"), (torch.tensor([[1.0, NAN]]), "non-finite"), (torch.ones(2, 2) / 0, "finite")],
)
def test_states_without_a_rank(h, message):
    """Refused in words, as the docstring says."""
    for of in (effective_rank, participation_ratio):
        with pytest.raises(ValueError, match=f"{of.__name__}.*{message}"):
            of(h)


# -- the loop-order reference -----------------------------------------------------------------------


def sphere(seed, n_loops=3, tokens=300, width=64):
    """Independent states of equal norm."""
    states = torch.randn(
        n_loops + 1, 2, tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return states / states.norm(dim=-1, keepdim=True)


def test_unrelated_states_seem_to_oscillate():
    """-1/2 for states of equal norm, -1/sqrt(2) at loop 2 when E is tiny; nothing to tell from the cosine itself."""
    # Measured over both documents and loops, 300 tokens: 0.005.
    for embedding, second in ((1.0, -0.5), (1e-3, -(0.5**0.5))):
        states = sphere(0)
        states[0] *= embedding
        for of in (cos_reference, cos_update):
            assert_same(of(trace_of(states)), rows([NAN, NAN, second, -0.5]).expand(2, 4), 0.02)


def test_a_real_motion_is_told_from_its_reference():
    """On a straight line the cosine is 1 and the reference, of the same states and norms, is not."""
    start, way = sphere(1, n_loops=1)
    trace = trace_of(torch.stack([start + r * way for r in range(4)]))
    assert_same(cos_update(trace)[:, 2:], torch.ones(2, 2).double(), 1e-13)
    assert (cos_reference(trace)[:, 2:] < -0.2).all()


def test_the_reference_keeps_what_all_tokens_share():
    """A motion that is the same for all tokens relates the states of any of them: the reference is 1 too."""
    way = sphere(2)[:, :1, :1] * 100
    trace = trace_of(torch.cumsum(way[[0, 0, 0, 0]], 0) + sphere(3)[:1])
    assert (cos_reference(trace)[:, 2:] > 0.99).all()


def test_too_few_tokens_for_a_reference():
    """One or two tokens cannot be a third of a document apart: not defined, rather than the cosine itself."""
    trace = random_trace(spans=((0, 1), (0, 2)))
    assert cos_reference(trace).isnan().all()


# -- padding, batches, precision --------------------------------------------------------------------

# Everything that a Parallel Loop Transformer has not: a random start, layers before and after, an exit gate.
HUGINN = {"initial_state": "random", "injection": "concat", "n_prelude": 1, "n_coda": 1, "norm_before_coda": True}
HUGINN |= {"offset": 0, "memory": "own", "norms": "pre_post", "norm_between_loops": False, "exit_gate": True}
MODELS = [
    make_model(),
    make_model(offset=2, memory="own", norm_between_loops=False),
    make_model(**HUGINN),
    make_model(n_coda=2, exit_gate=True),
]
CHUNK = 4  # tokens at which ranks and HSIC are compared


def concatenated(parts):
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("model", MODELS, ids=["plt", "own", "huginn", "everything"])
@torch.no_grad()
def test_padded_documents_get_the_numbers_they_get_alone(model):
    """Every measure, padding on either side, documents too short for some. Measured: 2e-14."""
    documents = token_lists(seed=3, lengths=(9, 2, 6, 3, 9, 4))
    together = measure(recorded(model, padded(documents, left=(1, 2))), CHUNK)
    alone = concatenated([measure(recorded(model, padded([document])), CHUNK) for document in documents])
    assert_all_same(together, alone, 1e-12)
    assert together["effective_rank"][1].isnan().all()


@given(cut=st.integers(1, 5), seed=seeds)
@settings(calm, max_examples=6)
@torch.no_grad()
def test_two_batches_equal_one(cut, seed):
    """Merging is concatenation. Measured: 5e-15."""
    documents = token_lists(seed, lengths=(4, 9, 2, 7, 5, 3))
    whole = measure(recorded(MODELS[0], padded(documents)), CHUNK)
    parts = [measure(recorded(MODELS[0], padded(part)), CHUNK) for part in (documents[:cut], documents[cut:])]
    assert_all_same(concatenated(parts), whole, 1e-12)


@torch.no_grad()
def test_what_stands_on_padding_is_never_seen():
    """Not even a NaN there reaches a number: masked, not multiplied by zero."""
    trace = recorded(MODELS[3], padded(token_lists(seed=4, lengths=(5, 8, 4)), left=(2,)))

    real = trace.mask[..., None]
    states = ("raw", "carry", "readout", "gate", "coda", "following", "mapped")
    fields = {name: torch.where(real, getattr(trace, name), NAN) for name in states}
    fields["leave"] = torch.where(trace.mask, trace.leave, NAN)
    assert_all_same(measure(replace(trace, **fields), CHUNK), measure(trace, CHUNK))


@torch.no_grad()
def test_each_name_is_its_measure():
    """`take` gives every number under its own name; of a model that has everything, all of the groups that it takes."""
    trace = recorded(MODELS[3], padded(token_lists(seed=5, lengths=(6, 8))))
    expected = {of.__name__: of(trace) for of in (*MOTION, *OFFSET, *GAPS, gate_mean, exit_probability)}
    expected |= exits(trace) | lens(trace) | {"gate_by_position": gate_by_position(trace, 64)}
    expected |= {"motion_label": label(trace), "hsic": loop_hsic(trace, CHUNK)}
    series = exit_series(trace)
    expected |= trade_off(series | state_series(trace), trace.predicts, trace.loops)
    expected |= by_class(series, trace, CLASSES, 3)
    expected["effective_rank_by_tokens"] = document_rank(trace, CHUNK)[..., None]
    expected["effective_rank"] = document_rank(trace, CHUNK)
    expected["effective_rank_centred"] = document_rank(trace, CHUNK, centred=True)
    expected["participation_ratio"] = document_rank(trace, CHUNK, centred=True, of=participation_ratio)
    assert_all_same(measure(trace, CHUNK), expected)
    while_running = {name for name in GROUPS["attention"] if name.startswith("attention_")}
    over_fit = {"exit_rule_loops_fit", "exit_rule_nll_fit"}
    assert set(expected) == {name for group in TAKEN for name in GROUPS[group]} - while_running - over_fit


@torch.no_grad()
def test_each_measure_reads_the_state_it_names():
    """Y, Z, N(Y) or the gate: what `DEFINITIONS` says is what changes the number, and nothing else is.

    Documents long enough that of few right predictions some are lost.
    """
    trace = record(MODELS[0], padded(token_lists(seed=5, lengths=(45, 60))))
    before, noise = measure(trace, CHUNK), torch.randn(trace.raw.shape, generator=torch.Generator().manual_seed(0))
    del before["motion_label"]  # of three values, which need not change
    for field, state in (("raw", "Y"), ("carry", "Z"), ("readout", "N(Y)"), ("gate", "layer input")):
        states = getattr(trace, field)
        after = measure(replace(trace, **{field: states + noise if field != "gate" else states / 2}), CHUNK)
        changed = {name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
        assert changed == {name for name in before if state in DEFINITIONS[name][1].split(", ")}


@torch.no_grad()
def test_what_each_measure_reads_with_a_coda():
    """The exits read what leaves the coda; effective rank and the lens N(Y), and motion Y; the exit gate its own."""
    trace = recorded(MODELS[3], padded(token_lists(seed=5, lengths=(6, 8))))
    before, noise = measure(trace, CHUNK), torch.randn(trace.raw.shape, generator=torch.Generator().manual_seed(0))
    del before["motion_label"]
    of_y = {of.__name__ for of in (*MOTION, *GAPS)}
    n_of_y = {*GROUPS["diversity"], "effective_rank_by_tokens", "nll_lens"}
    rules = {"exit_rule_loops", "exit_rule_nll"}
    for field, expected in (
        ("raw", of_y | n_of_y | rules),
        ("carry", {of.__name__ for of in OFFSET}),
        ("readout", set(exits(trace)) | rules | set(GROUPS["classes"]) - {"class_share"}),
        ("coda", set()),  # its N is the readout; the translators read it
        ("leave", {"exit_probability", *rules}),
        ("following", {"fixed_point_gap", "fixed_point_gap_relative"}),
        ("mapped", {"fixed_point_gap_layers"}),
    ):
        states = getattr(trace, field)
        after = measure(replace(trace, **{field: states / 2 if field == "leave" else states + noise}), CHUNK)
        changed = {name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
        assert changed == expected, field


def test_loops_of_omega():
    """Omega(r) is that of the carry which loop r received: of Z_1 to Z_{R-1}, not of E nor of the last one."""
    trace = random_trace()
    for source in range(4):
        carry = trace.carry.clone()
        carry[source] *= 2
        for of in (omega, omega_random):
            ratio = of(replace(trace, carry=carry))[:, 2:] / of(trace)[:, 2:]
            assert_same(ratio, torch.ones(4, 2).double() + (torch.arange(2, 4) == source + 1), 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_before_any_arithmetic(dtype):
    """The numbers of half-precision states are those of the same states in float32, to the bit."""
    half = random_trace(dtype=dtype, coda=True, exit_gate=True)
    # N is the model's: what it gives in half precision is what is measured.
    half = replace(half, norm=lambda y, norm=half.norm: norm(y.to(dtype)))
    fields = {name: getattr(half, name).float() for name in ("raw", "carry", "readout", "coda", "leave")}
    gate = torch.rand(4, 2, *half.mask.shape, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    half = replace(half, gate=gate, head=lambda h, head=half.head: head(h.to(dtype)))
    single = replace(half, **fields, gate=gate.float(), head=lambda h, head=half.head: head(h).float())
    ours, expected = measure(half, CHUNK), measure(single, CHUNK)
    assert {values.dtype for values in ours.values()} == {torch.float32, torch.float64}
    assert_all_same(ours, expected)


def test_float64_stays():
    """Nothing is rounded to float32 on the way."""
    trace = random_trace(coda=True, exit_gate=True)
    values = measure(replace(trace, gate=torch.rand(4, 2, *trace.mask.shape, 3).double()), CHUNK)
    assert {name for name, value in values.items() if value.dtype != torch.float64} == set()


@pytest.mark.parametrize("entries", [1, 60, 10**6])
def test_blocks_of_the_vocabulary(entries, monkeypatch):
    """How many logits exist at a time changes no number."""
    trace = random_trace(coda=True)
    whole = exits(trace) | lens(trace)
    monkeypatch.setattr("loopdiag.measures.prediction.LOGITS_AT_A_TIME", {"cpu": entries})
    assert_all_same(exits(trace) | lens(trace), whole, 1e-14)


@pytest.mark.parametrize("of", [*MOTION, *OFFSET, *map(exit_values, EXITS_BY_HAND)])
def test_one_loop(of):
    """A model of one loop has loops 0 and 1, and what needs two is NaN."""
    trace = random_trace(n_loops=1)
    values = of(trace)
    assert values.shape == (4, 2)
    whole = of(random_trace(n_loops=3))
    assert torch.equal(values.isnan(), whole[:, :2].isnan())


# -- what cannot be measured ------------------------------------------------------------------------


def test_documents_too_short_for_a_pair():
    """One token has no neighbour, none has nothing at all: NaN, and the other documents as without them."""
    trace = random_trace(spans=((0, 1), (0, 0), (0, 9)))
    for of in OFFSET:
        assert of(trace)[:2].isnan().all()
        assert of(trace)[2, 2:].isfinite().all()
    for of in set(MOTION) - {cos_reference}:
        assert of(trace)[0, 2:].isfinite().all()
        assert of(trace)[1].isnan().all()


@pytest.mark.parametrize("empty", [(0, 0), (4, 5)])
def test_exits_of_a_document_without_a_next_token(empty):
    """It has no numbers; its neighbours in the batch keep theirs."""
    values = exits(random_trace(spans=(empty, (0, 9))))
    for name, value in values.items():
        assert value[0].isnan().all(), name
        assert value[1, 2 if name == "breadth" else 1 :].isfinite().all(), name


def test_exits_of_a_batch_without_a_next_token():
    """Nothing to predict is nothing known, not a failure."""
    assert all(value.isnan().all() for value in exits(random_trace(spans=((0, 1), (0, 1)))).values())


def test_centred_rank_of_equal_states():
    """A run of one token has no direction left at loop 0 once it is centred: undefined for it, not for the batch."""
    trace = random_trace()
    readout = trace.readout.clone()
    readout[0, 1], readout[:, 2] = 0.7, 0.1  # the mean of three 0.1 is not 0.1
    expected = document_rank(trace, 3, centred=True)
    expected[1, 0] = expected[2] = NAN
    assert_same(document_rank(replace(trace, readout=readout), 3, centred=True), expected)
    expected = document_rank(trace, 3)
    expected[1, 0] = expected[2] = 1
    assert_same(document_rank(replace(trace, readout=readout), 3), expected, 1e-14)
    expected[2] = NAN
    readout[:, 2] = 0
    assert_same(document_rank(replace(trace, readout=readout), 3), expected, 1e-14)


@torch.no_grad()
def test_centred_rank_of_states_that_rounding_tells_apart():
    """One token over and over leaves loop 1 with equal states but for the last bit, which is no direction."""
    model = make_model(dtype=torch.float32)
    ranks = document_rank(record(model, padded([[3] * 20])), 16, centred=True)
    assert ranks[0, :2].isnan().all()
    assert ranks[0, 2:].isfinite().all()


def test_the_direction_of_no_update():
    """A loop that moves nothing has no direction, neither then nor seen from the next loop: no right angle, but NaN.

    A token that stands still is left out of its document's mean.
    """
    trace = random_trace()
    stopped = replace(trace, raw=trace.raw[[0, 1, 1, 2]])
    assert cos_update(stopped).isnan().all()
    assert radial_share(stopped).isnan().all(0).tolist() == [True, False, True, False]
    raw = trace.raw.clone()
    raw[3, :, 4] = raw[2, :, 4]
    kept = trace.mask.clone()
    kept[:, 4] = False
    some = replace(trace, raw=raw)
    for of in (cos_update, radial_share):
        assert_same(of(some)[:, 3], of(replace(some, mask=kept))[:, 3])
        assert_same(of(some)[:, 2], of(trace)[:, 2])
