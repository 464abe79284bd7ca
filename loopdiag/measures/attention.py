"""What attention does, loop by loop, layer by layer, head by head.

Maps are rows of probabilities over the keys that a query sees. In loops that blend, `effective` is
g * A_global + (1 - g) * A_local; where nothing is blended, it is the only map. Every number is a mean over a document's
queries that see at least two keys: the first has no choice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopdiag.measures.reduce import at_least_float32
from loopdiag.trace import AttentionInputs, LoopTrace

# Entries of a block of maps [document, head, query, key] that exist at a time.
ENTRIES_AT_A_TIME = 2**21
Map = Float[Tensor, "document head query key"]
LogMap = Float[Tensor, "document head query key"]


def gate_mean(trace: LoopTrace) -> Float[Tensor, "document loop layer head"]:
    """Mean weight of the global branch over a document's tokens; 0 to 1, NaN where a loop has no gate.

    Raises:
        ValueError: The model has no gates.

    Source: arXiv 2606.18023, gate.
    """
    if trace.gate is None:
        raise ValueError("gate_mean: this model has no gated attention, so there is no gate to average.")
    real = trace.mask[None, None, :, :, None]
    total = torch.where(real, at_least_float32(trace.gate), 0.0).sum(3)
    return (total / trace.mask.sum(1)[:, None]).permute(2, 0, 1, 3)


def log_maps(
    inputs: AttentionInputs, mask: Bool[Tensor, "document pos"], queries: slice = slice(None)
) -> dict[str, LogMap]:
    """Logarithms of the maps of some queries, by branch, in float32 at least; -inf where a key is not seen.

    A padding query also sees itself, so that no row is empty.
    """
    length = mask.shape[1]
    index = torch.arange(length, device=mask.device)
    ahead = index[queries, None] - index[None, :]
    seen = ((ahead >= 0) & mask[:, None, :]) | (ahead == 0)
    q = inputs.q[:, queries]
    if inputs.gate is None or inputs.k_global is None:
        return {"effective": _log_map(q, inputs.k, seen)}
    everywhere = _log_map(q, inputs.k_global, seen)
    nearby = _log_map(q, inputs.k, seen & (ahead < inputs.window))
    gate = at_least_float32(inputs.gate[:, queries]).transpose(1, 2).unsqueeze(-1)
    return {
        "effective": torch.logaddexp(gate.log() + everywhere, torch.log1p(-gate) + nearby),
        "global": everywhere,
        "local": nearby,
    }


def _log_map(q: Tensor, k: Tensor, seen: Bool[Tensor, "document query key"]) -> LogMap:
    grouped = at_least_float32(q).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, at_least_float32(k)).flatten(1, 2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen[:, None], -math.inf).log_softmax(-1)


def entropy(a: Map) -> Float[Tensor, "document head query"]:
    """-sum_k a log a, in nats; 0 to the log of the visible keys.

    Source: arXiv 2606.18023, attention entropy.
    """
    return torch.special.entr(a).sum(-1)


def divergence(log_a: LogMap, log_b: LogMap) -> Float[Tensor, "document head query"]:
    """KL(a || b) in nats, >= 0; infinite where b sees less than a.

    Source: arXiv 2606.18023, inter-loop attention KL, with a the map of loop r and b that of loop r - 1.
    """
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)


def head_cosine(a: Map) -> Float[Tensor, "document query"]:
    """Mean cosine between the maps of two heads, 0 to 1; NaN for a single head.

    Source: arXiv 2606.18023, head diversity.
    """
    heads = a.shape[1]
    gram = torch.einsum("bhqk,bgqk->bqhg", a, a)
    size = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = gram / (size[..., :, None] * size[..., None, :])
    return (
        (cosine.sum((-2, -1)) - heads) / (heads * (heads - 1)) if heads > 1 else torch.full_like(size[..., 0], math.nan)
    )


def head_rank(a: Map) -> Float[Tensor, "document query"]:
    """Effective rank of the matrix of heads by keys at each query, 1 to the heads; spectrum in float64.

    Source: arXiv 2606.18023, head diversity.
    """
    gram = torch.einsum("bhqk,bgqk->bqhg", a.double(), a.double())
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


class AttentionMeasures:
    """Numbers of every attention of a run, taken while it runs: `record(..., on_attention=AttentionMeasures(...))`.

    The maps exist in blocks of queries only, and of a loop's inputs nothing is kept longer than the next loop needs.

    Args:
        groups: `"attention"` for entropies, divergences and shares, `"heads"` for how alike the heads are, or both.
    """

    def __init__(self, groups: Collection[str] = ("attention", "heads")) -> None:
        self.groups = groups
        self._before: dict[int, AttentionInputs] = {}
        self._taken: dict[str, dict[tuple[int, int], Tensor]] = {}

    def __call__(self, now: AttentionInputs, mask: Bool[Tensor, "document pos"]) -> None:
        before = self._before.get(now.layer) if now.loop > 1 else None
        for name, values in _numbers(now, before, mask, self.groups).items():
            self._taken.setdefault(name, {})[now.loop, now.layer] = values
        self._before[now.layer] = now

    def result(self) -> dict[str, Tensor]:
        """Each number by document, loop 0..R, layer and, but for how alike heads are, head; NaN where undefined."""
        results = {}
        for name, taken in self._taken.items():
            loops, layers = (1 + max(index) for index in zip(*next(iter(self._taken.values())), strict=True))
            example = next(iter(taken.values()))
            results[name] = example.new_full((len(example), loops, layers, *example.shape[1:]), math.nan)
            for (loop, layer), values in taken.items():
                results[name][:, loop, layer] = values
        return results


def _numbers(
    now: AttentionInputs, before: AttentionInputs | None, mask: Bool[Tensor, "document pos"], groups: Collection[str]
) -> dict[str, Tensor]:
    """Means over queries of every number of one attention, [document, head] or [document]."""
    sums: dict[str, Tensor] = {}
    seen = mask.cumsum(1)  # visible keys of a real query
    counts = (mask & (seen > 1)).sum(1)
    for queries in _blocks(now, mask):
        kept = (mask & (seen > 1))[:, queries]
        for name, values in _of_queries(now, before, mask, queries, seen[:, queries], groups).items():
            keep = kept if values.ndim == 2 else kept[:, None]
            total = torch.where(keep, values, 0.0).sum(-1)
            sums[name] = sums[name] + total if name in sums else total
    return {name: total / (counts if total.ndim == 1 else counts[:, None]) for name, total in sums.items()}


def _blocks(inputs: AttentionInputs, mask: Tensor) -> Iterator[slice]:
    documents, length = mask.shape
    step = max(1, ENTRIES_AT_A_TIME // (documents * inputs.q.shape[2] * length))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _of_queries(
    now: AttentionInputs,
    before: AttentionInputs | None,
    mask: Tensor,
    queries: slice,
    seen: Tensor,
    groups: Collection[str],
) -> dict[str, Tensor]:
    maps = log_maps(now, mask, queries)
    earlier = {} if before is None else log_maps(before, mask, queries)
    # Loop 1 blends nothing: its one map is what the global branch of loop 2 is held against.
    if "global" not in earlier and "effective" in earlier:
        earlier["global"] = earlier["effective"]
    index = torch.arange(mask.shape[1], device=mask.device)
    ahead = index[queries, None] - index[None, :]
    first = mask & (mask.cumsum(1) == 1)
    found: dict[str, Tensor] = {}
    for branch, log_a in maps.items():
        end = "" if branch == "effective" else f"_{branch}"
        a = log_a.exp()
        if "attention" in groups:
            visible = (seen.clamp_max(now.window) if branch == "local" else seen)[:, None]
            found[f"attention_entropy{end}"] = nats = entropy(a)
            # A window of one token leaves no choice either.
            found[f"attention_entropy_relative{end}"] = nats / visible.to(nats).log().where(visible > 1, math.nan)
            found[f"attention_sink{end}"] = (a * first[:, None, None]).sum(-1)
            if now.gate is not None and branch != "local":
                found[f"attention_window{end}"] = (a * (ahead < now.window)).sum(-1)
            if branch in earlier:
                found[f"attention_kl{end}"] = divergence(log_a, earlier[branch])
        if "heads" in groups:
            found[f"head_cosine{end}"] = head_cosine(a)
            found[f"head_rank{end}"] = head_rank(a)
    return found
