"""What attention does, loop by loop, layer by layer, head by head.

Maps are rows of probabilities over the keys that a query sees. In loops that blend, `effective` is
g * A_global + (1 - g) * A_local; where nothing is blended, it is the only map. Every number is a mean over a document's
queries that see at least two keys: the first has no choice.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopdiag.measures.reduce import at_least_float32
from loopdiag.trace import AttentionInputs, LoopTrace

# Entries of a block of maps [document, head, query, key] that exist at a time.
ENTRIES_AT_A_TIME = 2**21
# Of the maps that are held against each other head by head: on a CPU they should stay in its cache.
ENTRIES_OF_HEADS = {"cpu": 2**18}
# Queries of a block that looks at a window: a block sees as many keys more as the window has, most of them in vain.
SHORTEST_BLOCK = 64
PerQuery = Float[Tensor, "head query"]
Map = Float[Tensor, "document head query key"]
LogMap = Float[Tensor, "document head query key"]
Gram = Float[Tensor, "*query head head_b"]


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


def octaves(tokens: int) -> list[int]:
    """First positions of the bins of `gate_by_position`: 0, 1, 2, 4, 8 and so on, while documents reach them."""
    return [0, *(2**power for power in range(max(0, tokens - 1).bit_length()))]


def gate_by_position(trace: LoopTrace, tokens: int) -> Float[Tensor, "document loop layer bin"]:
    """Mean weight of the global branch over heads and the tokens of a bin of positions; NaN where there are none.

    Args:
        trace: The batch.
        tokens: Length of the longest document of the corpus, so that every batch has the bins of `octaves(tokens)`.

    Raises:
        ValueError: The model has no gates.
    """
    if trace.gate is None:
        raise ValueError("gate_by_position: this model has no gated attention, so there is no gate to average.")
    gate = at_least_float32(trace.gate).mean(-1)
    place = trace.mask.cumsum(1) - 1
    bins = []
    starts = octaves(tokens)
    for start, end in zip(starts, [*starts[1:], tokens], strict=True):
        inside = trace.mask & (place >= start) & (place < end)
        total = torch.where(inside, gate, 0.0).sum(-1)
        bins.append(total / inside.sum(1))
    return torch.stack(bins, dim=-1).permute(2, 0, 1, 3)


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
    return _cosine_of(torch.einsum("bhqk,bgqk->bqhg", a, a))


def _cosine_of(gram: Gram) -> Float[Tensor, "*query"]:
    heads = gram.shape[-1]
    size = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = gram / (size[..., :, None] * size[..., None, :])
    return (
        (cosine.sum((-2, -1)) - heads) / (heads * (heads - 1)) if heads > 1 else torch.full_like(size[..., 0], math.nan)
    )


def head_rank(a: Map) -> Float[Tensor, "document query"]:
    """Effective rank of the matrix of heads by keys at each query, 1 to the heads; spectrum in float64.

    Source: arXiv 2606.18023, head diversity.
    """
    return _rank_of(torch.einsum("bhqk,bgqk->bqhg", a.double(), a.double()))


def _rank_of(gram: Gram) -> Float[Tensor, "*query"]:
    finite = gram.isfinite().flatten(-2).all(-1)[..., None, None]  # what is not has no spectrum: NaN
    values = torch.linalg.eigvalsh(gram.where(finite, 0)).clamp_min(0).sqrt()
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


class AttentionMeasures:
    """Numbers of every attention of a run, taken while it runs: `record(..., on_attention=AttentionMeasures(...))`.

    Entropies, divergences and shares are exact without a map as a whole. With p the softmax of scores q.k / sqrt(d) and
    lse the logarithm of its normaliser, the mean score under p is q.E / sqrt(d), E = sum_k p_k k: so the entropy is
    lse - q.E / sqrt(d), and a divergence needs one more such mean. A blend differs from its global branch in the window
    only: there, and there alone, maps are built, in blocks of queries. How alike the heads are needs the whole maps, in
    blocks of queries, too. Of a loop's inputs nothing is kept longer than needed.

    Args:
        groups: `"attention"` for entropies, the divergence from the loop before, and shares; `"attention_pairs"` for
            the divergence from every earlier loop, whose inputs are kept; `"heads"` for how alike the heads are.
    """

    def __init__(self, groups: Collection[str] = ("attention", "heads")) -> None:
        self.groups = groups
        # By layer and loop: what a later loop needs, the inputs and each document's normalisers.
        self._earlier: dict[int, dict[int, tuple[AttentionInputs, list[Tensor]]]] = {}
        self._taken: dict[str, dict[tuple[int, ...], Tensor]] = {}  # by (loop, layer) or (loop, earlier loop, layer)
        self._loops: list[int] = []

    def __call__(self, inputs: AttentionInputs, mask: Bool[Tensor, "document pos"]) -> None:
        loop, layer, pairs = inputs.loop, inputs.layer, "attention_pairs" in self.groups
        if loop not in self._loops:
            self._loops.append(loop)
        by_query = pairs or "attention" in self.groups
        earlier = self._earlier.get(layer, {}) if loop > 1 else {}
        held_against = [None] if not earlier else sorted(earlier) if pairs else [max(earlier)]
        found: dict[int | None, list[dict[str, Tensor]]] = {other: [] for other in held_against}
        alike, normalisers = [], []
        for index, real in enumerate(mask):  # one at a time: what is repeated for every head stays small
            now = _View.of(inputs, index, real)
            if "heads" in self.groups:
                alike.append({name: x[1:].mean() for name, x in _of_heads(now).items()})
            if not by_query:
                continue
            expected, lse = mean_under(now.q, now.everywhere, now.everywhere)
            normalisers.append(lse)
            for other in held_against:
                before = None
                if other is not None:
                    kept, kept_lse = earlier[other]
                    before = _View.of(kept, index, real), kept_lse[index]
                numbers = _of_queries(now, expected, lse, before)
                found[other].append({name: _over_queries(name, x, now.window) for name, x in numbers.items()})
        if "heads" in self.groups:
            self._keep(_stacked(alike), loop, layer)
        if "attention" in self.groups:
            self._keep(_stacked(found[held_against[-1]]), loop, layer)
        for other in earlier if pairs else ():
            numbers = _stacked(found[other])
            divergences = {name.replace("_kl", "_kl_pairs"): x for name, x in numbers.items() if "_kl" in name}
            self._keep(divergences, loop, other, layer)
        if by_query:
            self._earlier[layer] = (earlier if pairs else {}) | {loop: (inputs, normalisers)}

    def _keep(self, found: dict[str, Tensor], *place: int) -> None:
        for name, values in found.items():
            self._taken.setdefault(name, {})[place] = values

    def result(self) -> dict[str, Tensor]:
        """Each number by document, loop (of pairs: and the earlier loop), layer and head, but no head in `"heads"`.

        Loops are 0 and those that were watched, in their order. NaN where undefined.
        """
        results = {}
        index = {loop: place for place, loop in enumerate(self._loops, 1)}
        layers = 1 + max((place[-1] for taken in self._taken.values() for place in taken), default=0)
        for name, taken in self._taken.items():
            first, example = next(iter(taken.items()))
            sides = [len(index) + 1] * (len(first) - 1)
            results[name] = example.new_full((len(example), *sides, layers, *example.shape[1:]), math.nan)
            for (*loops, layer), values in taken.items():
                place: list[Any] = [index[loop] for loop in loops]
                results[name][(slice(None), *place, layer)] = values
        return results


def _over_queries(name: str, x: PerQuery, window: int) -> Float[Tensor, " head"]:
    """Mean over the queries that have a choice; NaN for a document without any."""
    if name.startswith("attention_window"):
        return x[:, window:].mean(-1)  # before, the window holds all there is
    mean = x[:, 1:].mean(-1)
    # Rounding may not make an entropy or a divergence negative.
    return mean if "sink" in name else mean.clamp_min(0)


def _stacked(documents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([numbers[name] for numbers in documents]) for name in documents[0]}


def mean_under(
    q: Float[Tensor, "head pos d_head"], k: Float[Tensor, "head pos d_head"], values: Float[Tensor, "head pos d_head"]
) -> tuple[Float[Tensor, "head pos d_head"], Float[Tensor, "head pos"]]:
    """Mean of `values` under each query's causal attention to `k`, and the logarithm of that softmax's normaliser."""
    if q.device.type == "cpu":
        # What F.scaled_dot_product_attention runs here, with the normaliser that it keeps to itself.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mean, lse = fused(q[None], k[None], values[None], 0.0, True)
        return mean[0], lse[0]
    return _mean_in_blocks(q, k, values)


def _mean_in_blocks(q: Tensor, k: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`mean_under` on any device: scores in blocks of queries."""
    means, normalisers = [], []
    index = torch.arange(q.shape[1], device=q.device)
    step = max(1, ENTRIES_AT_A_TIME // (q.shape[0] * q.shape[1]))
    for rows in index.split(step):
        scores = (q[:, rows] @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(rows[:, None] < index, -math.inf)
        means.append(scores.softmax(-1) @ values)
        normalisers.append(scores.logsumexp(-1))
    return torch.cat(means, 1), torch.cat(normalisers, 1)


@dataclass(frozen=True)
class _View:
    """What one document's attention works from, without padding, in float32 at least, keys repeated for every head.

    `everywhere` are the keys that are seen in full. Where they are blended with a window, its keys are `nearby`, and
    `gate` is the weight of the former.
    """

    q: Float[Tensor, "head pos d_head"]
    everywhere: Float[Tensor, "head pos d_head"]
    nearby: Float[Tensor, "head pos d_head"] | None
    gate: Float[Tensor, "head pos"] | None
    window: int

    @classmethod
    def of(cls, inputs: AttentionInputs, index: int, real: Bool[Tensor, " pos"]) -> _View:
        heads, unpadded = inputs.q.shape[2], bool(real.all())

        def cut(x: Tensor) -> Tensor:
            x = at_least_float32(x[index] if unpadded else x[index, real]).transpose(0, 1)
            return x if len(x) == heads else x.repeat_interleave(heads // len(x), 0)

        if inputs.k_global is None or inputs.gate is None:
            return cls(cut(inputs.q), cut(inputs.k), None, None, inputs.window)
        return cls(cut(inputs.q), cut(inputs.k_global), cut(inputs.k), cut(inputs.gate), inputs.window)

    def log_blend(self, lse: Tensor, rows: slice, keys: slice, inside: Tensor) -> tuple[LogMap, LogMap, LogMap]:
        """Logarithms of the maps inside the window: of the blend, its global and its local branch; -inf outside."""
        log_p = self._scores(self.everywhere, rows, keys) - lse[:, rows, None]
        log_p = log_p.masked_fill(~inside, -math.inf)
        if self.nearby is None or self.gate is None:
            return log_p, log_p, log_p
        log_l = self._scores(self.nearby, rows, keys).masked_fill(~inside, -math.inf).log_softmax(-1)
        gate = self.gate[:, rows, None]
        return torch.logaddexp(gate.log() + log_p, torch.log1p(-gate) + log_l), log_p, log_l

    def map_of(self, k: Tensor, rows: slice, keys: slice, seen: Tensor) -> Float[Tensor, "head query key"]:
        """Probabilities of some keys, which hold all that some queries see of `k`."""
        return self._scores(k, rows, keys).masked_fill_(~seen, -math.inf).softmax(-1)

    def _scores(self, k: Tensor, rows: slice, keys: slice) -> Tensor:
        return self.q[:, rows] @ k[:, keys].transpose(1, 2) * self.q.shape[-1] ** -0.5


def _of_queries(
    now: _View, expected: Tensor, lse: PerQuery, before: tuple[_View, PerQuery] | None
) -> dict[str, PerQuery]:
    """Every number but the heads' likeness, query by query.

    Args:
        now: A document's attention.
        expected, lse: What `mean_under` says of its full attention.
        before: That of the loop to hold it against, with its own `lse`.
    """
    scale = now.q.shape[-1] ** -0.5
    visible = torch.arange(1, lse.shape[1] + 1, device=lse.device)
    log_p = scale * (now.q * expected).sum(-1) - lse  # mean under p; so is the next
    kl = None
    if before is not None:
        other, other_lse = before
        if now.nearby is None:  # else both see loop 1's keys
            expected, _ = mean_under(now.q, now.everywhere, other.everywhere)
        log_before = scale * (other.q * expected).sum(-1) - other_lse
        kl = log_p - log_before
    first = (scale * (now.q * now.everywhere[:, :1]).sum(-1) - lse).exp()
    everywhere = _named(-log_p, kl, first, visible)
    if now.gate is None:
        return everywhere
    inside = _inside(now, lse, before)
    # What the window does not hold, the global branch alone sees. No query before `window` has such keys.
    far, gate = visible > now.window, now.gate
    mass = torch.where(far, 1 - inside["mass"], 0.0)
    weight, log_gate = torch.where(far, gate, 0.0), gate.log()
    outside = torch.xlogy(weight, gate) * mass + weight * (log_p + inside["entropy_global"])
    effective_kl = None
    if before is not None and kl is not None:
        gate_before = torch.ones_like(gate) if before[0].gate is None else before[0].gate
        ratio = torch.where(weight * mass > 0, log_gate - gate_before.log(), 0.0)
        effective_kl = inside["kl"] + weight * (ratio * mass + kl - inside["kl_global"])
    local_kl = inside.get("kl_local")
    window = {"attention_window": gate * inside["mass"] + 1 - gate, "attention_window_global": inside["mass"]}
    return {
        **_named(inside["entropy"] - outside, effective_kl, gate * first + (1 - gate) * inside["first"], visible),
        **{f"{name}_global": x for name, x in everywhere.items()},
        **{
            f"{name}_local": x
            for name, x in _named(
                inside["entropy_local"], local_kl, inside["first"], visible.clamp_max(now.window)
            ).items()
        },
        **window,
    }


def _named(nats: PerQuery, kl: PerQuery | None, first: PerQuery, visible: Tensor) -> dict[str, PerQuery]:
    """The numbers of one map."""
    # A window of one token leaves no choice, so that there is nothing to divide by.
    most = visible.to(nats).log().where(visible > 1, math.nan)
    found = {"attention_entropy": nats, "attention_entropy_relative": nats / most, "attention_sink": first}
    return found if kl is None else found | {"attention_kl": kl}


def _inside(now: _View, lse: PerQuery, before: tuple[_View, PerQuery] | None) -> dict[str, PerQuery]:
    """Sums over the keys in the window, where both branches see, from maps in blocks of queries."""
    length, window = lse.shape[1], now.window
    index = torch.arange(length, device=lse.device)
    most = ENTRIES_AT_A_TIME // (len(lse) * min(length, SHORTEST_BLOCK + window))
    step = max(1, min(max(SHORTEST_BLOCK, window), most))
    blocks = []
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        keys = slice(max(0, start - window + 1), rows.stop)
        ahead = index[rows, None] - index[None, keys]
        near = (ahead >= 0) & (ahead < window)
        log_a, log_p, log_l = now.log_blend(lse, rows, keys, near)
        p, local = log_p.exp(), log_l.exp()
        sums = {
            "mass": p.sum(-1),
            "entropy": entropy(log_a.exp()),
            "entropy_global": entropy(p),
            "entropy_local": entropy(local),
            "first": local[..., 0] if keys.start == 0 else torch.zeros_like(lse[:, rows]),
        }
        if before is not None:
            log_b, log_q, log_m = before[0].log_blend(before[1], rows, keys, near)
            sums |= {"kl": divergence(log_a, log_b), "kl_global": divergence(log_p, log_q)}
            if before[0].nearby is not None:
                sums["kl_local"] = divergence(log_l, log_m)
        blocks.append(sums)
    return {name: torch.cat([block[name] for block in blocks], 1) for name in blocks[0]}


def _of_heads(now: _View) -> dict[str, Float[Tensor, " query"]]:
    """How alike the heads of a document are, query by query.

    Both numbers are of the Gram matrix of the heads' maps, in float64: that of a blend is put together from those of
    its branches, which overlap in the window only.
    """
    heads, length, _ = now.q.shape
    index = torch.arange(length, device=now.q.device)
    most = min(ENTRIES_AT_A_TIME, ENTRIES_OF_HEADS.get(now.q.device.type, ENTRIES_AT_A_TIME))
    step = max(1, most // (heads * max(1, length)))
    blocks = []
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        ahead = index[rows, None] - index[None, : rows.stop]
        p = now.map_of(now.everywhere, rows, slice(0, rows.stop), ahead >= 0)
        grams = {"": _gram(p, p)}
        if now.nearby is not None and now.gate is not None:
            keys = slice(max(0, start - now.window + 1), rows.stop)
            ahead = ahead[:, keys]
            local = now.map_of(now.nearby, rows, keys, (ahead >= 0) & (ahead < now.window))
            gate = now.gate[:, rows].double().T.unsqueeze(-1)  # [query, head, 1]
            both, own, other = gate * (1 - gate).mT * _gram(p[..., keys], local), _gram(local, local), 1 - gate
            blend = gate * gate.mT * grams[""] + both + both.mT + other * other.mT * own
            grams = {"": blend, "_global": grams[""], "_local": own}
        blocks.append(
            {f"head_cosine{end}": _cosine_of(gram).to(p) for end, gram in grams.items()}
            | {f"head_rank{end}": _rank_of(gram) for end, gram in grams.items()}
        )
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _gram(a: Float[Tensor, "head query key"], b: Float[Tensor, "head query key"]) -> Gram:
    return a.double().transpose(0, 1) @ b.double().permute(1, 2, 0)
