"""How many directions the states of a document use. On N(Y)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from loopdiag.measures.reduce import at_least_float32
from loopdiag.trace import LoopTrace


def effective_rank(h: Float[Tensor, "*batch tokens d_model"]) -> Float[Tensor, "*batch"]:
    """Effective rank of a set of hidden states.

    exp of the entropy of the singular values, scaled to sum to 1. Dimensionless, from 1 (one direction) to
    min(tokens, d_model). Computed in float64. States are not centred: subtract the mean first if a shared part
    should not count.

    Raises:
        ValueError: A set of states is all zeros or has a non-finite entry.

    Source: Roy and Vetterli (2007), as in arXiv 2606.18023. Singular values, not their squares; papers that square
    them report a smaller number.
    """
    values = _singular_values("effective_rank", h)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def _singular_values(asked_by: str, h: Float[Tensor, "*batch tokens d_model"]) -> Float[Tensor, "*batch value"]:
    if not torch.isfinite(h).all():
        raise ValueError(f"{asked_by}: the states have a non-finite entry, so they have no singular values.")
    values = torch.linalg.svdvals(h.double())
    if (values.sum(-1) == 0).any():
        raise ValueError(f"{asked_by}: the states are all zeros, which has no rank.")
    return values


def participation_ratio(h: Float[Tensor, "*batch tokens d_model"]) -> Float[Tensor, "*batch"]:
    """Participation ratio of a set of hidden states: (sum of the squared singular values)^2 / sum of their 4th powers.

    Dimensionless, from 1 (one direction) to min(tokens, d_model). Computed in float64, not centred. It weighs large
    directions more than the effective rank does.

    Raises:
        ValueError: A set of states is all zeros or has a non-finite entry.

    Source: Gao et al. (2017).
    """
    values = _singular_values("participation_ratio", h).square()
    return values.sum(-1).square() / values.square().sum(-1)


def document_rank(
    trace: LoopTrace, tokens: int, centred: bool = False, of: Callable[[Tensor], Tensor] = effective_rank
) -> Float[Tensor, "document loop"]:
    """Rank of the first `tokens` real tokens' N(Y) of each document, loops 0..R.

    The rank is bounded by the number of tokens and grows with it, so documents and loops are compared at the same
    number. NaN for documents with fewer real tokens, and where states are all zero (when centred, all equal) or not
    finite.

    Args:
        trace: The batch.
        tokens: Tokens of each document that count.
        centred: Subtract the document's mean state first.
        of: Which rank: `effective_rank` or `participation_ratio`.
    """
    rounding = 8 * torch.finfo(at_least_float32(trace.raw).dtype).eps
    ranks = torch.full((len(trace.mask), trace.n_loops + 1), float("nan"), dtype=torch.float64)
    states = trace.normed
    for document, real in enumerate(trace.mask):
        if int(real.sum()) < tokens:
            continue
        h = states[:, document, real][:, :tokens].double()
        size = h.norm(dim=(1, 2))
        if centred:
            h = h - h.mean(1, keepdim=True)
        some = h.norm(dim=(1, 2)) > rounding * size  # what centring leaves of equal states
        ranks[document, some.cpu()] = of(h[some]).cpu()
    return ranks
