"""Measures that need the model again: the fixed-point gap, one loop further, and the noise of a run's precision."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_looped import plain_run
from test_decoder import HUGINN_LIKE, OURO_LIKE, make_model
from tiny import assert_all_same, assert_same, padded, random_trace, token_lists, trace_of

from loopdiag.measures.motion import (
    fixed_point_gap,
    fixed_point_gap_layers,
    fixed_point_gap_relative,
    noise_step,
    step_size,
)
from loopdiag.measures.prediction import exit_series, noise
from loopdiag.model.dtypes import higher_precision
from loopdiag.trace import record, with_maps

NAN = float("nan")
GAPS = (fixed_point_gap, fixed_point_gap_relative, fixed_point_gap_layers)
DOCUMENTS = token_lists(seed=1, lengths=(7, 2, 9))
LEFT = (1,)
UNMIXED = {"offset": 0, "memory": "own", "injection": "none"}
KINDS = [
    {},
    {"offset": 2, "memory": "own"},
    UNMIXED,
    HUGINN_LIKE,
    OURO_LIKE,
    {"n_coda": 1, "norm_between_loops": False},
]
calm = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 10**6)


def mapped(model, batch, n_loops=None, **kept):
    """A recorded trace with what its maps make of it."""
    return with_maps(model, batch, record(model, batch, n_loops, **kept))


# -- fixed points -----------------------------------------------------------------------------------


def test_gaps_by_hand():
    """One token at (3, 4) that goes on to (0, 4), and that the layers alone send to the origin; NaN at loop 0."""
    start = torch.zeros(1, 1, 2, dtype=torch.float64)
    here = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    trace = trace_of(torch.stack([start, here]))
    on = replace(
        trace, following=torch.stack([here, torch.tensor([[[0.0, 4.0]]]).double()]), mapped=torch.stack([here, start])
    )
    for of, expected in zip(GAPS, (3, 3 / 5, 5), strict=True):
        assert_same(of(on), torch.tensor([[NAN, expected]], dtype=torch.float64), 1e-15)
        with pytest.raises(ValueError, match="with_maps"):
            of(trace)


@given(seed=seeds)
@calm
def test_gaps_against_plain_loops(seed):
    """The mean of each real token's distance, and over its norm. Measured: 9e-16."""
    trace, other = random_trace(seed), random_trace(seed + 1)
    trace = replace(trace, following=other.raw, mapped=other.carry)
    for of, after, over in zip(GAPS, (other.raw, other.raw, other.carry), (False, True, False), strict=True):
        for document, real in enumerate(trace.mask):
            for loop in range(1, 4):
                sizes = [
                    (after[loop, document, pos] - trace.raw[loop, document, pos]).norm()
                    / (trace.raw[loop, document, pos].norm() if over else 1)
                    for pos in real.nonzero()[:, 0]
                ]
                mean = torch.stack(sizes).mean()
                assert of(trace)[document, loop].item() == pytest.approx(mean.item(), abs=1e-13)
        assert of(trace)[:, 0].isnan().all()


@pytest.mark.parametrize("changes", KINDS)
def test_the_gap_is_the_next_step(changes):
    """With all loops kept, what a run of one loop more steps; with some of them, the same at these. Measured: 0."""
    model, batch = make_model(**changes), padded(DOCUMENTS, LEFT)
    trace, longer = mapped(model, batch, 3), record(model, batch, 4)
    assert_same(trace.following, longer.raw[1:])
    assert_same(fixed_point_gap(trace)[:, 1:], step_size(longer)[:, 2:], 1e-13)
    some = mapped(model, batch, at=[1, 3])
    for of in GAPS:
        assert_same(of(some)[:, 1:], of(trace)[:, [1, 3]], 1e-13)
    assert_same(record(model, batch, 3).raw, trace.raw)
    assert model.list_hooks() == {}


@pytest.mark.parametrize("changes", KINDS)
@torch.no_grad()
def test_the_layers_alone(changes):
    """f(Y_r) is Y_r through the blocks once, with no injection, offset or other loop's keys. Measured: 4e-15."""
    model, batch = make_model(**changes), padded(DOCUMENTS, LEFT)
    trace = mapped(model, batch)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    cfg = replace(model.cfg, n_prelude=0, initial_state="embedding", embed_multiplier=1.0)
    for row, tokens in enumerate(DOCUMENTS):
        real = trace.mask[row]
        for loop in (1, 3):
            # The plain decoder once more, with the state as its embedding of as many tokens.
            own = weights | {"embed.weight": trace.raw[loop, row, real]}
            alone = plain_run(cfg, own, range(len(tokens)), 1)["loops.1.hook_out_pre_norm"]
            assert_same(trace.mapped[loop, row, real], alone, 1e-12)


def silent(model):
    """A model whose blocks add nothing to the stream."""
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
    return model


def test_a_planted_fixed_point():
    """Blocks that add nothing and a carry that is handed on as it is: every state is a fixed point, to the bit."""
    model = silent(make_model(**UNMIXED, norm_between_loops=False))
    trace = mapped(model, padded(DOCUMENTS, LEFT))
    for of in GAPS:
        assert_same(of(trace)[:, 1:], torch.zeros(3, 3).double())


def test_a_planted_contraction():
    """B_r = E + Z_(r-1) / 2 and blocks that add nothing: Y_r = (2 - 2^(1-r)) E, and so each gap is half the one before.

    The layers alone leave every state where it is: a gap of 0 that says nothing of the loop. Measured: 3e-17.
    """
    model = silent(make_model(offset=0, memory="own", carry_scale=0.5, embed_scale=1.0, norm_between_loops=False))
    batch = padded(DOCUMENTS, LEFT)
    trace = mapped(model, batch, 5)
    length = trace.raw[0].norm(dim=-1)
    mean = torch.where(trace.mask, length, 0.0).sum(1) / trace.mask.sum(1)
    halves = 0.5 ** torch.arange(1, 6).double()
    assert_same(fixed_point_gap(trace)[:, 1:], mean[:, None] * halves, 1e-12)
    assert_same(fixed_point_gap_relative(trace)[:, 1:], (halves / (2 - 2 * halves)).expand(3, 5), 1e-12)
    assert_same(fixed_point_gap_layers(trace)[:, 1:], torch.zeros(3, 5).double())


def test_the_same_start_for_the_loop_more():
    """A random start is drawn by the run's seed, or the loop further is that of another run."""
    model, batch = make_model(**HUGINN_LIKE), padded(DOCUMENTS, LEFT)
    trace = record(model, batch, seed=3)
    assert_same(with_maps(model, batch, trace, seed=3).following[:-1], trace.raw[1:])
    assert not torch.equal(with_maps(model, batch, trace, seed=4).following[:-1], trace.raw[1:])


# -- noise ------------------------------------------------------------------------------------------


def bits(model):
    """Every weight's type and bytes."""
    return {
        name: (w.dtype, w.detach().clone().view(torch.uint8).flatten().tolist()) for name, w in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("dtype", "higher"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("changes", [{}, HUGINN_LIKE])
def test_higher_precision(dtype, higher, fails, changes):
    """Inside, the same values in the next precision; afterwards the same bits in the same parameters, come what may."""
    model = make_model(dtype=dtype, **changes)
    before, identities = bits(model), [id(weight) for weight in model.parameters()]
    exact = [weight.detach().double() for weight in model.parameters()]
    with pytest.raises(RuntimeError, match="enough") if fails else nullcontext(), higher_precision(model):
        assert {weight.dtype for weight in model.parameters()} == {higher}
        assert all(torch.equal(w.double(), e) for w, e in zip(model.parameters(), exact, strict=True))
        assert torch.isfinite(model(torch.tensor([DOCUMENTS[0]]))).all()
        if fails:
            raise RuntimeError("enough")
    assert bits(model) == before
    assert [id(weight) for weight in model.parameters()] == identities
    assert model(torch.tensor([DOCUMENTS[0]])).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [{}, HUGINN_LIKE])
@torch.no_grad()
def test_the_noise_is_the_difference_to_a_copy(dtype, changes):
    """A second model with the same weights in higher precision gives the same noise, to the bit.

    Of the size of the precision: measured 2 to 5 times eps of a step, and NLL 3 to 10 eps.
    """
    model, batch = make_model(dtype=dtype, **changes), padded(DOCUMENTS, LEFT)
    copy = make_model(dtype=dtype, **changes).to(torch.float32 if dtype == torch.bfloat16 else torch.float64)
    trace, expected = record(model, batch), record(copy, batch)
    with higher_precision(model):
        exact = record(model, batch)
        series = exit_series(exact)
    assert_same(exact.raw, expected.raw)
    step = noise_step(trace, exact)
    assert step.dtype == torch.float64
    y, z = trace.raw.double(), expected.raw.double()
    moved = ((y.diff(dim=0) - z.diff(dim=0)).norm(dim=-1) * trace.mask).sum(-1) / trace.mask.sum(1)
    assert_same(step[:, 1:], moved.T.contiguous(), 1e-15)
    assert step[:, 0].isnan().all()
    eps = torch.finfo(dtype).eps
    ratio = step[:, 1:].mean() / (eps * step_size(expected)[:, 1:].double().mean())
    assert 0.5 < ratio < 20
    found = noise(exit_series(trace), series, trace.predicts)
    for name, of in (("noise_shift", "output_shift"), ("noise_nll", "nll_exit")):
        apart = (exit_series(trace)[of].double() - exit_series(expected)[of]).abs()
        for document, kept in enumerate(trace.predicts):
            assert_same(found[name][document], apart[:, document, kept].mean(1), 1e-15, name)
    assert 0.5 < found["noise_nll"].mean() / eps < 50


def test_no_noise():
    """A run beside itself has none, whatever it is; and what is undefined stays so."""
    trace = random_trace()
    series = exit_series(trace)
    assert_same(noise_step(trace, trace)[:, 1:], torch.zeros(4, 3).double())
    found = noise(series, series, trace.predicts)
    assert_all_same(
        found,
        {
            "noise_nll": torch.zeros(4, 4).double(),
            "noise_shift": torch.cat((torch.full((4, 1), NAN), torch.zeros(4, 3)), 1).double(),
        },
    )


def test_noise_by_hand():
    """A state that is off by (3, 4) in one loop: an update is off by 5, and the next one back by as much."""
    states = torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    off = states.clone()
    off[2, 0, 0] = torch.tensor([3.0, 4.0])
    assert_same(noise_step(trace_of(off), trace_of(states)), torch.tensor([[NAN, 0, 2.5, 2.5]]).double())
    series = {"nll_exit": torch.tensor([[[1.0, 2.0, 9.0]]]), "output_shift": torch.tensor([[[NAN, NAN, NAN]]])}
    exact = {"nll_exit": torch.tensor([[[1.5, 1.0, 0.0]]]), "output_shift": torch.zeros(1, 1, 3)}
    found = noise(series, exact, torch.tensor([[True, True, False]]))
    assert found["noise_nll"].tolist() == [[0.75]]
    assert found["noise_shift"].isnan().all()
