"""What the cross-loop position offset displaces. On Z, the carry.

For a model without an offset the distances are those that an offset of one token would displace, so that twins trained
with and without it can be compared.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from loopdiag.measures.reduce import at_least_float32, over_tokens, undefined
from loopdiag.trace import LoopTrace

PerLoop = Float[Tensor, "document loop"]

PAIRED = 4096  # tokens whose distances, half as many as their number squared, exist at a time


def omega(trace: LoopTrace) -> PerLoop:
    """Offset distance Omega(r) = mean over i of ||Z_{r-1}[i] - Z_{r-1}[i-1]||, r >= 2.

    In the units of the carry, >= 0; NaN at loops 0 and 1 and for documents of one token. Over pairs of real tokens: the
    first token, whose predecessor is the zero that the offset brings in, is left out.

    Source: arXiv 2606.18023, intrinsic offset cost.
    """
    distance, _, pairs = _neighbours(trace)
    return over_tokens(torch.cat((undefined(distance, 2), distance)), pairs)


def omega_relative(trace: LoopTrace) -> PerLoop:
    """Omega with each distance divided by ||Z_{r-1}[i]||; dimensionless, >= 0, NaN at loops 0 and 1."""
    distance, norm, pairs = _neighbours(trace)
    return over_tokens(torch.cat((undefined(distance, 2), distance / norm)), pairs)


def omega_random(trace: LoopTrace) -> PerLoop:
    """Mean distance of all pairs of tokens of the document: what Omega is if neighbours are as strange as any two.

    Units and NaN as for `omega`.
    """
    z = at_least_float32(trace.carry[1:-1])
    distances = torch.full((len(trace.mask), len(trace.raw)), float("nan"), dtype=z.dtype, device=z.device)
    for document, real in enumerate(trace.mask):
        for loop, states in enumerate(z[:, document, real], start=2):
            distances[document, loop] = _mean_distance(states)
    return distances


def _mean_distance(states: Float[Tensor, "token d_model"]) -> Tensor:
    """Mean distance of all pairs, with room for those of `PAIRED` tokens; NaN of one token."""
    # Of the direct form: the matrix-product form loses the distances of nearly equal states.
    if len(states) <= PAIRED:
        return torch.pdist(states).mean()
    # Every two blocks together: in these sums, pairs within a block are counted with each of the other blocks.
    blocks = states.split(PAIRED // 2)
    within = torch.stack([torch.pdist(block).sum(dtype=torch.float64) for block in blocks]).sum()
    of_two = [torch.pdist(torch.cat(two)).sum(dtype=torch.float64) for two in combinations(blocks, 2)]
    total = torch.stack(of_two).sum() - (len(blocks) - 2) * within
    return total / math.comb(len(states), 2)


def _neighbours(trace: LoopTrace) -> tuple[Tensor, Tensor, Tensor]:
    """Distances and norms of tokens 1.. in Z_1..Z_{R-1}, and which of them have a real predecessor."""
    z, lag = at_least_float32(trace.carry[1:-1]), max(1, trace.offset)
    here, there = z[:, :, lag:], z[:, :, :-lag]
    return (here - there).norm(dim=-1), here.norm(dim=-1), trace.mask[:, lag:] & trace.mask[:, :-lag]
