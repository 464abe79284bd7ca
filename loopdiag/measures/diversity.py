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

    Example:
        Four tokens, each in a direction of its own, and four that are all the same:

        >>> round(effective_rank(torch.eye(4)).item(), 6), round(effective_rank(torch.ones(4, 3)).item(), 6)
        (4.0, 1.0)
    """
    return _spread(_singular_values("effective_rank", h))


def _spread(values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    """Effective rank of singular values."""
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def _singular_values(asked_by: str, h: Float[Tensor, "*batch tokens d_model"]) -> Float[Tensor, "*batch value"]:
    values = torch.linalg.eigvalsh(_gram(_rankable(asked_by, h)))
    # Below this share of the largest they are rounding; of singular values that is about 1e-7.
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps
    return values.where(values > rounding * values.amax(-1, keepdim=True), 0).sqrt()


def _gram(h: Float[Tensor, "*batch tokens d_model"]) -> Float[Tensor, "*batch side side"]:
    """The smaller one of two with the same spectrum, but for zeros."""
    return h @ h.mT if h.shape[-2] < h.shape[-1] else h.mT @ h


def _rankable(asked_by: str, h: Float[Tensor, "*batch tokens d_model"]) -> Float[Tensor, "*batch tokens d_model"]:
    """States in float64, of which there is a rank."""
    if not torch.isfinite(h).all():
        raise ValueError(f"{asked_by}: the states have a non-finite entry, so they have no singular values.")
    if (h == 0).all(-1).all(-1).any():
        raise ValueError(f"{asked_by}: the states are all zeros, which has no rank.")
    return h.double()


def participation_ratio(h: Float[Tensor, "*batch tokens d_model"]) -> Float[Tensor, "*batch"]:
    """Participation ratio of a set of hidden states: (sum of the squared singular values)^2 / sum of their 4th powers.

    Dimensionless, from 1 (one direction) to min(tokens, d_model). Computed in float64, not centred. It weighs large
    directions more than the effective rank does.

    Raises:
        ValueError: A set of states is all zeros or has a non-finite entry.

    Source: Gao et al. (2017).
    """
    h = _rankable("participation_ratio", h)
    # The sums need no singular values: they are the squared norms of h and of its Gram matrix.
    return h.square().sum((-2, -1)).square() / _gram(h).square().sum((-2, -1))


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
    ranks = torch.full((len(trace.mask), len(trace.raw)), float("nan"), dtype=torch.float64)
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


class PooledRank:
    """Ranks of all documents' real tokens together, gathered batch by batch: `add` the moments of each, then `result`.

    One number per loop and no interval: documents cannot be drawn again.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @staticmethod
    def moments(trace: LoopTrace) -> dict[str, Tensor]:
        """All that is kept of a batch: tokens, and in float64 the states' sums [loop, d_model] and second moments."""
        states = trace.normed
        loops, width = len(states), states.shape[-1]
        total = states.new_zeros(loops, width, dtype=torch.float64)
        moment = states.new_zeros(loops, width, width, dtype=torch.float64)
        for loop in range(loops):  # one at a time: in float64 they are large
            h = states[loop, trace.mask].double()
            total[loop] = h.sum(0)
            torch.mm(h.T, h, out=moment[loop])
        return {"pooled_tokens": trace.mask.sum(), "pooled_sum": total, "pooled_moment": moment}

    def add(self, moments: dict[str, Tensor]) -> None:
        """Take in the moments of a batch."""
        for name, value in moments.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()

    def result(self) -> dict[str, Float[Tensor, " loop"]]:
        """`effective_rank_pooled`, `effective_rank_centred_pooled`, `participation_ratio_pooled`; loops 0..R.

        Dimensionless, 1 to min(tokens, d_model); NaN where all states are equal (raw: all zero).

        Raises:
            ValueError: No batch was added.
        """
        if not self._sums:
            raise ValueError("PooledRank: no batch was added, so there is nothing to rank.")
        tokens, total, moment = (self._sums[f"pooled_{name}"] for name in ("tokens", "sum", "moment"))
        # What is not finite has no spectrum.
        finite = moment.flatten(1).isfinite().all(1)
        moment = moment.where(finite[:, None, None], 0)
        mean = total.where(finite[:, None], 0) / tokens
        raw = torch.linalg.eigvalsh(moment).clamp_min(0).sqrt()
        centred = moment - tokens * mean[:, :, None] * mean[:, None, :]
        spectrum = torch.linalg.eigvalsh(centred).clamp_min(0).sqrt()
        return {
            "effective_rank_pooled": _spread(raw),
            "effective_rank_centred_pooled": _spread(spectrum),
            "participation_ratio_pooled": spectrum.square().sum(-1).square() / spectrum.pow(4).sum(-1),
        }
