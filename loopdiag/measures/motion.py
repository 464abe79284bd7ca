"""How far, and which way, each loop moves the state. All on Y, the raw output of the last layer, with Y_0 = E."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from loopdiag.measures.reduce import at_least_float32, over_tokens, undefined
from loopdiag.trace import LoopTrace

PerLoop = Float[Tensor, "document loop"]
PerToken = Float[Tensor, "loop document pos"]


def step_size(trace: LoopTrace) -> PerLoop:
    """||Y_r - Y_{r-1}||, mean over tokens.

    In the units of the residual stream, >= 0; NaN at loop 0. Comparable between loops of one model only.

    Source: arXiv 2606.18023, step size.
    """
    y = at_least_float32(trace.raw)
    moved = (y[1:] - y[:-1]).norm(dim=-1)
    return over_tokens(torch.cat((undefined(moved, 1), moved)), trace.mask)


def relative_step(trace: LoopTrace) -> PerLoop:
    """||Y_r - Y_{r-1}|| / ||Y_{r-1}||, mean over tokens.

    Dimensionless, >= 0; NaN at loop 0. Loop 1 is measured from the embedding and so is large.
    """
    return over_tokens(relative_steps(trace), trace.mask)


def relative_steps(trace: LoopTrace) -> PerToken:
    """What `relative_step` averages, token by token."""
    y = at_least_float32(trace.raw)
    moved = (y[1:] - y[:-1]).norm(dim=-1) / y[:-1].norm(dim=-1)
    return torch.cat((undefined(moved, 1), moved))


def state_cosine(trace: LoopTrace) -> PerLoop:
    """cos(Y_r, Y_{r-1}), mean over tokens; -1 to 1, NaN at loop 0."""
    y = at_least_float32(trace.raw)
    cosine = cosine_similarity(y[1:], y[:-1], dim=-1)
    return over_tokens(torch.cat((undefined(cosine, 1), cosine)), trace.mask)


def radial_share(trace: LoopTrace) -> PerLoop:
    """Share of an update's squared length that lies along Y_{r-1}, mean over tokens: it changes the norm, not the way.

    0 (all tangential, a turn) to 1 (all radial); NaN at loop 0 and where nothing moves. For unrelated directions it is
    1 / d_model.
    """
    y = at_least_float32(trace.raw)
    moved = y[1:] - y[:-1]
    share = cosine_similarity(moved, y[:-1], dim=-1).square()
    none = undefined(share, 1)
    return over_tokens(torch.cat((none, share)), trace.mask & torch.cat((none.isnan(), (moved != 0).any(-1))))


def acceleration(trace: LoopTrace) -> PerLoop:
    """||Y_r - 2 Y_{r-1} + Y_{r-2}|| / ||Y_{r-1}||, mean over tokens: how much the update itself changes.

    Dimensionless, >= 0; NaN at loops 0 and 1. 0 for steady motion; a state that goes back and forth has twice its
    relative step.
    """
    return over_tokens(accelerations(trace), trace.mask)


def accelerations(trace: LoopTrace) -> PerToken:
    """What `acceleration` averages, token by token."""
    y = at_least_float32(trace.raw)
    change = (y[2:] - 2 * y[1:-1] + y[:-2]).norm(dim=-1) / y[1:-1].norm(dim=-1)
    return torch.cat((undefined(change, 2), change))


def cos_update(trace: LoopTrace) -> PerLoop:
    """Cosine of successive updates, cos(Y_r - Y_{r-1}, Y_{r-1} - Y_{r-2}), mean over tokens.

    -1 (each loop undoes the last) to 1 (straight on); NaN at loops 0 and 1, and where nothing moves. Read it beside
    `cos_reference`: a negative value alone is no oscillation.

    Source: arXiv 2606.18023, angular change.

    Example:
        One token: up, on in the same direction, and half of the way back.

        >>> import torch
        >>> states = [torch.tensor([[[1.0, height]]]) for height in (0.0, 1.0, 3.0, 2.0)]
        >>> cos_update(LoopTrace.from_states(states[0], states[1:]))
        tensor([[nan, nan,  1., -1.]])
    """
    y = at_least_float32(trace.raw)
    return _turn(y[:-2], y[1:-1], y[2:], trace.mask)


def cos_reference(trace: LoopTrace) -> PerLoop:
    """`cos_update` as it would be if the states of successive loops were unrelated.

    The three states of each turn are taken from tokens a third of the document apart, which keeps every loop's
    norms and mean state and breaks what one token's states have to do with each other. For unrelated states of equal
    norm and no mean it is -0.5, and -0.71 at loop 2 when the embedding is small. NaN at loops 0 and 1, and for
    documents of fewer than three tokens.
    """
    y = at_least_float32(trace.raw)
    before, middle, after = y[:-2].clone(), y[1:-1].clone(), y[2:]
    for document, real in enumerate(trace.mask):
        third = int(real.sum()) // 3
        before[:, document, real] = before[:, document, real].roll(2 * third, dims=1)
        middle[:, document, real] = middle[:, document, real].roll(third, dims=1)
    enough = trace.mask.sum(1, keepdim=True) >= 3
    return _turn(before, middle, after, trace.mask & enough)


def _turn(before: Tensor, middle: Tensor, after: Tensor, kept: Bool[Tensor, "document pos"]) -> PerLoop:
    """Mean cosine of two successive updates over the kept tokens that both of them move."""
    first, second = middle - before, after - middle
    moved = (first != 0).any(-1) & (second != 0).any(-1)
    cosine = cosine_similarity(second, first, dim=-1)
    none = undefined(cosine, 2)
    return over_tokens(torch.cat((none, cosine)), kept & torch.cat((none.isnan(), moved)))


def fixed_point_gap(trace: LoopTrace) -> PerLoop:
    """||Y_r - Y_{r+1}||, mean over tokens: how far a state is from a fixed point of the map that the model runs.

    Embedding injected, offset applied, loop 1's memory shared. In the units of the residual stream, >= 0; loops 1..R,
    NaN at loop 0. Where every loop was kept, it is the step size of the next.

    Raises:
        ValueError: The trace lacks what `with_maps` adds.

    Source: arXiv 2606.18023, fixed-point gap, on the loop as it runs.
    """
    return over_tokens(_gaps(trace, trace.following), trace.mask)


def fixed_point_gap_relative(trace: LoopTrace) -> PerLoop:
    """||Y_r - Y_{r+1}|| / ||Y_r||, mean over tokens; dimensionless, otherwise as `fixed_point_gap`."""
    return over_tokens(_gaps(trace, trace.following) / at_least_float32(trace.raw).norm(dim=-1), trace.mask)


def fixed_point_gap_layers(trace: LoopTrace) -> PerLoop:
    """||Y_r - f(Y_r)||, mean over tokens, f the layers alone as loop 1 passes them: the paper's formula read literally.

    No loop of a model with an offset, an injection or a shared memory computes this f from Y_r, so a gap of 0 is
    nothing that such a model could reach. Otherwise as `fixed_point_gap`.

    Source: arXiv 2606.18023, fixed-point gap.
    """
    return over_tokens(_gaps(trace, trace.mapped), trace.mask)


def _gaps(trace: LoopTrace, after: Tensor | None) -> PerToken:
    if after is None:
        raise ValueError(
            "A fixed-point gap needs one loop more: loopdiag.trace.with_maps(model, batch, trace) runs it."
        )
    moved = (at_least_float32(after) - at_least_float32(trace.raw)).norm(dim=-1)
    return torch.cat((undefined(moved, 1), moved[1:]))


# What is not above so many times what rounding makes of it says nothing.
ABOVE_NOISE = 2.0


def noise_step(trace: LoopTrace, exact: LoopTrace) -> PerLoop:
    """||(Y_r - Y_{r-1}) - (Y'_r - Y'_{r-1})||, mean over tokens, Y' of the same run in higher precision.

    What rounding adds to an update: a step size that is not well above it says nothing. Units and NaN as `step_size`.
    """
    y, y_exact = trace.raw.double(), exact.raw.double()
    moved = ((y[1:] - y[:-1]) - (y_exact[1:] - y_exact[:-1])).norm(dim=-1)
    return over_tokens(torch.cat((undefined(moved, 1), moved)), trace.mask)


SETTLING, ORBITING, DRIFTING = 0, 1, 2
# An update is a turn back beyond chance when its cosine lies this much below that of unrelated states.
BEYOND_CHANCE = 0.1
# A loop settles when its step is at most this share of the one before.
SHRINKS_TO = 0.8


def label(trace: LoopTrace) -> Float[Tensor, " document"]:
    """What a document's states do at a run's end: 0 settling, 1 orbiting, 2 drifting; NaN for fewer than 3 loops.

    Read off the last loop R, from means over the document's tokens. Settling: the step size is at most 0.8 of
    that of loop R-1. Else orbiting: `cos_update` is negative and lies at least 0.1 below `cos_reference`, so the update
    turns back more than unrelated states would. Else drifting. Where only some loops were kept, the last two steps must
    be of as many loops each, else NaN.

    The limits are conventions of this project.
    """
    gaps = [later - earlier for earlier, later in pairwise(trace.loops)]
    if len(gaps) < 3 or gaps[-1] != gaps[-2]:
        return torch.full((len(trace.mask),), float("nan"), dtype=torch.float64)
    step, cosine, reference = step_size(trace), cos_update(trace)[:, -1], cos_reference(trace)[:, -1]
    settles = step[:, -1] <= SHRINKS_TO * step[:, -2]
    turns = (cosine < 0) & (cosine <= reference - BEYOND_CHANCE)
    found = torch.where(settles, SETTLING, torch.where(turns, ORBITING, DRIFTING)).double()
    return found.masked_fill(step[:, -1].isnan(), float("nan"))
