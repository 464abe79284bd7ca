"""How far, and which way, each loop moves the state. All on Y, the raw output of the last layer, with Y_0 = E."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from loopdiag.measures.reduce import at_least_float32, over_tokens, undefined
from loopdiag.trace import LoopTrace

PerLoop = Float[Tensor, "document loop"]


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
    y = at_least_float32(trace.raw)
    moved = (y[1:] - y[:-1]).norm(dim=-1) / y[:-1].norm(dim=-1)
    return over_tokens(torch.cat((undefined(moved, 1), moved)), trace.mask)


def state_cosine(trace: LoopTrace) -> PerLoop:
    """cos(Y_r, Y_{r-1}), mean over tokens; -1 to 1, NaN at loop 0."""
    y = at_least_float32(trace.raw)
    cosine = cosine_similarity(y[1:], y[:-1], dim=-1)
    return over_tokens(torch.cat((undefined(cosine, 1), cosine)), trace.mask)


def cos_update(trace: LoopTrace) -> PerLoop:
    """Cosine of successive updates, cos(Y_r - Y_{r-1}, Y_{r-1} - Y_{r-2}), mean over tokens.

    -1 (each loop undoes the last) to 1 (straight on); NaN at loops 0 and 1, and where nothing moves. Read it beside
    `cos_reference`: a negative value alone is no oscillation.

    Source: arXiv 2606.18023, angular change.
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
