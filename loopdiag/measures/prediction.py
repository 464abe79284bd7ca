"""What each exit predicts: the head on the readout after loop r, p^(r) its softmax, p^(0) that before any loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopdiag.measures.reduce import at_least_float32, over_tokens, undefined
from loopdiag.model.exit_gate import exit_probabilities
from loopdiag.trace import LoopTrace, States

PerLoop = Float[Tensor, "document loop"]

# Logits of this many entries (all loops together) exist at a time. On a CPU they should stay in its cache (four times
# as fast as 2**26 on a vocabulary of 2,048); a GPU wants large blocks. A head too wide for the cache is read again for
# every block: there, more at a time is faster (1.4 times on a vocabulary of 32,000).
LOGITS_AT_A_TIME = {"cpu": 2**20}
LOGITS_ELSEWHERE = 2**26
WIDE, LOGITS_OF_WIDE = 2**13, 2**22


def exits(trace: LoopTrace) -> dict[str, PerLoop]:
    """Everything that is read off the exits' distributions, in one pass over the vocabulary.

    Means over the tokens that have a next token; medians for the rank. All in nats but the rank.

    - `nll_exit`: -log p^(r)(next token), loops 0..R.
    - `rank`: median rank of the next token, 1 the best; tied tokens share their mean rank. `log_rank`: mean of its log.
    - `accuracy`: share of tokens whose likeliest next token is right (the first of equals).
    - `changed`, `fixed`, `broken`: share whose likeliest next token loop r changes, puts right, puts wrong; loops 1..R.
    - `confidence`: probability of the likeliest next token.
    - `settled`: share whose likeliest next token after loop r is that of every later exit; 1 at loop R.
    - `breadth`: share whose largest output shift of loops 2..R falls in loop r.
    - `entropy`: of p^(r).
    - `output_shift`: KL(p^(r) || p^(r-1)), loops 1..R. Unsigned: a move to a worse prediction has it too.
    - `output_shift_reverse`: KL(p^(r-1) || p^(r)).
    - `output_shift_js`: Jensen-Shannon divergence of the two, at most log 2.
    - `gain`, `cost`: with d the change of a token's NLL from exit r-1 to exit r, mean of max(0, -d), what loop r gives
      to the tokens it helps, and of max(0, d), what it takes from those it harms. Their difference is
      nll_exit(r-1) - nll_exit(r).

    Raises:
        ValueError: The trace has no head or no tokens.

    Source: arXiv 2606.18023 for NLL, rank, entropy, output shift and breadth; gain and cost are this project's.

    Example:
        Two tokens of a vocabulary of two, the states their own logits. Loop 1 finds the next token, loop 2 loses it:
        its NLL goes from log 2 to log(1 + 1/e) and log(1 + e).

        >>> embed, right, wrong = torch.zeros(1, 2, 2), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
        >>> states = [embed + right, embed + wrong]
        >>> trace = LoopTrace.from_states(embed, states, torch.nn.Identity(), input_ids=torch.tensor([[0, 1]]))
        >>> for name, values in exits(trace).items():
        ...     if name in ("nll_exit", "gain", "cost"):
        ...         print(name, values.numpy().round(3))
        nll_exit [[0.693 0.313 1.313]]
        gain [[ nan 0.38 0.  ]]
        cost [[nan  0.  1.]]
    """
    return averaged(exit_series(trace), trace.predicts)


def exit_series(trace: LoopTrace) -> dict[str, Float[Tensor, "loop document pos"]]:
    """What `exits` averages, token by token; 0 where no next token is predicted."""
    return per_token(trace, trace.readout, _exits_of)


def by_class(
    series: dict[str, Float[Tensor, "loop document pos"]],
    trace: LoopTrace,
    class_of_token: Int[Tensor, " vocab"],
    classes: int,
) -> dict[str, Tensor]:
    """NLL, gain and cost by the class of the next token.

    Args:
        series: `exit_series` of the trace.
        trace: The batch.
        class_of_token: Each token's class.
        classes: How many there are.

    Returns:
        `class_share` [document, class], share of a document's next tokens, and `nll_by_class`, `gain_by_class`,
        `cost_by_class` [document, loop, class] in nats per token, NaN where a document has none of the class.
    """
    if trace.input_ids is None:
        raise ValueError("by_class: this trace lacks tokens, so there are no classes.")
    following = class_of_token.to(trace.input_ids.device)[trace.input_ids.roll(-1, dims=1)]
    inside = [trace.predicts & (following == number) for number in range(classes)]
    total = trace.predicts.sum(1)
    found = {"class_share": torch.stack([kept.sum(1).double() / total for kept in inside], dim=-1)}
    for name, of in (("nll_by_class", "nll_exit"), ("gain_by_class", "gain"), ("cost_by_class", "cost")):
        found[name] = torch.stack([over_tokens(series[of], kept) for kept in inside], dim=-1)
    return found


def noise(
    series: dict[str, Float[Tensor, "loop document pos"]],
    exact: dict[str, Float[Tensor, "loop document pos"]],
    kept: Bool[Tensor, "document pos"],
) -> dict[str, PerLoop]:
    """`noise_shift` and `noise_nll`: mean size of x - x' over tokens of output shift and NLL, x' in higher precision.

    A value that is not well above it says nothing about the model. In nats, NaN where the measure is.

    Args:
        series: `exit_series` of a run.
        exact: That of the same run in higher precision.
        kept: Tokens that count.
    """
    of = {"noise_shift": "output_shift", "noise_nll": "nll_exit"}
    return {name: over_tokens((series[x].double() - exact[x]).abs(), kept) for name, x in of.items()}


def lens(trace: LoopTrace) -> dict[str, PerLoop]:
    """`nll_lens`: NLL through the plain logit lens, the head on N(Y_r), for models whose exits go through a coda.

    Raises:
        ValueError: The trace has no head or no tokens.

    Source: the logit lens (nostalgebraist, 2020).
    """
    return {"nll_lens": _nll_read(trace, trace.normed)}


def finite_documents(trace: LoopTrace) -> Bool[Tensor, " document"]:
    """Whether a document's states are finite, and the losses of its exits where there is a head.

    In float16 logits may overflow where states do not.
    """
    if not trace.readable:
        return trace.finite
    return trace.finite & _nll_read(trace, trace.readout).isfinite().all(1)


def exit_probability(trace: LoopTrace) -> PerLoop:
    """Mean probability that the model's exit gate leaves after loop r; sums to 1 over loops 1..R, NaN at loop 0.

    Raises:
        ValueError: The model has no exit gate.

    Source: arXiv 2510.25741.
    """
    p = leaving(trace)
    return over_tokens(torch.cat((undefined(p, 1), p)), trace.mask)


def leaving(trace: LoopTrace) -> Float[Tensor, "loops document pos"]:
    """Probability that the exit gate leaves a token after each of the loops 1..R.

    Raises:
        ValueError: The model has no exit gate.
    """
    if trace.leave is None:
        raise ValueError("exit_probability: this model has no exit gate.")
    return exit_probabilities(at_least_float32(trace.leave[1:]).movedim(0, -1)).movedim(-1, 0)


def per_token(
    trace: LoopTrace, states: States, of_logits: Callable[[Tensor, Tensor], dict[str, Float[Tensor, "loop token"]]]
) -> dict[str, Float[Tensor, "loop document pos"]]:
    """Numbers of the distributions that the head makes of `states`; 0 where nothing is predicted.

    The vocabulary is processed in blocks of tokens.
    """
    if trace.head is None or trace.input_ids is None:
        raise ValueError(
            "This trace lacks head or tokens, so it has no predictions: give LoopTrace.from_states(..., head=, "
            "input_ids=)."
        )
    predicts = trace.predicts
    targets = trace.input_ids.roll(-1, dims=1)[predicts]
    kept = states[:, predicts]  # [loop, token, d_model]
    width = trace.head(states[:1, :1, :1]).shape[-1]
    most = LOGITS_AT_A_TIME.get(kept.device.type, LOGITS_ELSEWHERE)
    block = max(1, (max(most, LOGITS_OF_WIDE) if width > WIDE else most) // (width * len(kept)))
    parts = [
        # Contiguous: else loops are multiplied one by one.
        of_logits(at_least_float32(trace.head(kept[:, start : start + block].contiguous())), targets[start:][:block])
        for start in range(0, max(1, len(targets)), block)
    ]
    series = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts], dim=1)
        series[name] = values.new_zeros(len(kept), *predicts.shape)
        series[name][:, predicts] = values
    return series


def _nll_read(trace: LoopTrace, states: States) -> PerLoop:
    """Mean NLL of the next token, read off some states."""
    nll = per_token(trace, states, lambda logits, targets: {"nll": nll_of(logits.log_softmax(-1), targets)})
    return over_tokens(nll["nll"], trace.predicts)


def averaged(series: dict[str, Float[Tensor, "loop document pos"]], kept: Tensor) -> dict[str, PerLoop]:
    """Means over the kept tokens of each document, medians for the rank."""
    return {name: _median(x, kept) if name == "rank" else over_tokens(x, kept) for name, x in series.items()}


def nll_of(log_p: Float[Tensor, "loop token vocab"], targets: Tensor) -> Float[Tensor, "loop token"]:
    return -log_p.gather(-1, targets[None, :, None].expand(len(log_p), -1, 1))[..., 0]


def _exits_of(logits: Float[Tensor, "loop token vocab"], targets: Tensor) -> dict[str, Float[Tensor, "loop token"]]:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    true = logits.gather(-1, targets[None, :, None].expand(len(logits), -1, 1))
    nll = nll_of(log_p, targets)
    change = nll[1:] - nll[:-1]
    moved = log_p[1:] - log_p[:-1]
    middle = (p[1:] + p[:-1]).div_(2).clamp_min_(torch.finfo(p.dtype).tiny).log_()
    # A head may leave tokens out by logits of -inf: they have no part in anything.
    nowhere = logits.isneginf()
    if nowhere.any():
        moved = moved.masked_fill(nowhere[1:] & nowhere[:-1], 0.0)
        log_p, middle = log_p.masked_fill(nowhere, 0.0), middle.masked_fill(nowhere[1:] & nowhere[:-1], 0.0)
    divergence = {
        "output_shift": (p[1:] * moved).sum(-1),
        "output_shift_reverse": -(p[:-1] * moved).sum(-1),
        "output_shift_js": (_kl(p[1:], log_p[1:], middle) + _kl(p[:-1], log_p[:-1], middle)) / 2,
        "gain": (-change).clamp_min(0),
        "cost": change.clamp_min(0),
    }
    better, tied = (x.sum(-1, dtype=torch.int32) for x in (logits > true, logits == true))  # slow in int64
    rank = 1 + better + (tied - 1) / 2
    best = logits.argmax(-1)
    right = best == targets
    flips = {
        "changed": best[1:] != best[:-1],
        "fixed": right[1:] & ~right[:-1],
        "broken": right[:-1] & ~right[1:],
    }
    first = torch.full_like(nll[:1], float("nan"))
    found = {
        "nll_exit": nll,
        "rank": rank,
        "log_rank": rank.to(nll).log(),
        "entropy": -(p * log_p).sum(-1),
        "accuracy": right.to(nll),
        "confidence": p.amax(-1),
        "settled": (best == best[-1]).flip(0).int().cummin(0).values.flip(0).to(nll),
        "breadth": _largest(divergence["output_shift"]),
        **{name: torch.cat((first, values.to(nll))) for name, values in (divergence | flips).items()},
    }
    # Where a state is not finite nothing is predicted: comparisons with NaN would say that the best came out.
    lost = nll.isnan()
    if lost.any():
        since = lost.flip(0).cummax(0).values.flip(0)  # at this exit or a later one
        either = torch.cat((lost[:1], lost[1:] | lost[:-1]))
        where = {"settled": since, "breadth": lost.any(0).expand_as(lost)} | dict.fromkeys(
            (*divergence, *flips), either
        )
        found = {name: x.masked_fill(where.get(name, lost), float("nan")) for name, x in found.items()}
    return found


def _largest(shift: Float[Tensor, "loop token"]) -> Float[Tensor, "loop token"]:
    """1 where a token's output shift is the largest of loops 2..R (the first of equals), NaN at loops 0 and 1."""
    nowhere = torch.full_like(shift[:1], float("nan"))
    if len(shift) == 1:
        return torch.cat((nowhere, nowhere))
    later = shift[1:]
    largest = torch.zeros_like(later).scatter(0, later.argmax(0, keepdim=True), 1.0)
    return torch.cat((nowhere, nowhere, largest))


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (p * (log_p - log_q)).sum(-1)


def _median(values: Float[Tensor, "loop document pos"], kept: Tensor) -> PerLoop:
    """Median over the kept tokens of each document (the mean of the middle two); NaN for a document without any."""
    medians = values.new_full((len(kept), len(values)), float("nan"), dtype=torch.float64)
    for document, real in enumerate(kept):
        if real.any():
            medians[document] = torch.quantile(values[:, document, real].double(), 0.5, dim=-1)
    return medians
