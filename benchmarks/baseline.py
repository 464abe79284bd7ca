"""The default measures as one would write them today: every state captured by hooks, then numpy and scipy.

What `benchmarks/overhead.py` holds the toolkit against: the same numbers of the same model and documents, document by
document. Written from the measures' definitions (docs/measures.md), plainly: activations of the whole run are cached,
attention maps included; each measure is a few lines of numpy, with scipy for distributions, spectra and distances
and ckatorch for CKA. For models with an offset and a shared memory, like the bundled ones.
"""

from __future__ import annotations

import ckatorch.core
import numpy as np
import torch
from scipy import linalg, spatial, special
from torch import Tensor

from loopdiag.diagnosis import Diagnosis
from loopdiag.model import LoopedLM
from loopdiag.summary import loop_cka

LONGEST_RANK = 256  # tokens of a document that ranks and CKA look at
NOT_HERE = ("motion_label", "gate_by_position")  # of the default groups, what is left out
WANTED = ("hook_embed", "hook_out_pre_norm", "hook_out", "hook_readout", "hook_pattern", "hook_gate")


@torch.no_grad()
def measure(model: LoopedLM, documents: list[list[int]]) -> dict[str, np.ndarray]:
    """Every measure [document, ...], by the name it has in a diagnosis; `cka` [loop, loop] is pooled over documents."""
    rank_tokens = min(LONGEST_RANK, sorted(map(len, documents))[len(documents) // 10])
    found: dict[str, list[np.ndarray]] = {}
    normed = []
    for ids in documents:
        _, cache = model.run_with_cache(
            torch.tensor([ids]), names_filter=lambda name: any(part in name for part in WANTED)
        )
        loops = range(1, model.cfg.n_loops + 1)
        embed = cache["hook_embed"][0]
        raw = torch.stack([embed, *(cache[f"loops.{r}.hook_out_pre_norm"][0] for r in loops)])
        readout = torch.stack([model.ln_final(embed), *(cache[f"loops.{r}.hook_readout"][0] for r in loops)])
        carry = torch.stack([cache[f"loops.{r}.hook_out"][0] for r in loops[:-1]]) if len(loops) > 1 else raw[:0]
        numbers = (
            predictions(model.unembed(readout), ids)
            | motion(raw.numpy())
            | ranks(readout[:, :rank_tokens].double().numpy())
            | distances(carry.numpy())
            | attention(model, cache)
        )
        for name, values in numbers.items():
            found.setdefault(name, []).append(values)
        if len(ids) >= rank_tokens:
            normed.append(readout[:, :rank_tokens])
    return {name: np.stack(values) for name, values in found.items()} | {"cka": cka(normed)}


def assert_same(found: dict[str, np.ndarray], diagnosis: Diagnosis) -> None:
    """Hold what `measure` gives against a diagnosis of the same model and documents, every measure of it."""
    np.testing.assert_allclose(found["cka"], loop_cka(diagnosis).mean, rtol=1e-4)
    ours = {str(name): values.values for name, values in diagnosis.data.data_vars.items()}
    theirs = {name: values for name, values in found.items() if name != "cka"}
    assert set(theirs) == set(ours) - {*NOT_HERE, "hsic"}
    for name, values in theirs.items():
        assert np.isnan(values).tolist() == np.isnan(ours[name]).tolist(), name
        np.testing.assert_allclose(values, ours[name], rtol=2e-3, atol=1e-5, err_msg=name)


def after(first: int, values: np.ndarray) -> np.ndarray:
    """With NaN for the loops before."""
    return np.concatenate([np.full((first, *values.shape[1:]), np.nan), values])


def predictions(logits: Tensor, ids: list[int]) -> dict[str, np.ndarray]:
    """Of the next token at every exit."""
    scores, targets = logits[:, :-1].numpy(), np.array(ids[1:])  # [loop, token, vocab]
    log_p = special.log_softmax(scores, axis=-1)
    p = np.exp(log_p)
    tokens = np.arange(len(targets))
    nll = -log_p[:, tokens, targets]
    true = scores[:, tokens, targets][..., None]
    rank = 1 + (scores > true).sum(-1) + ((scores == true).sum(-1) - 1) / 2
    best = scores.argmax(-1)
    right = best == targets
    shift = special.rel_entr(p[1:], p[:-1]).sum(-1)
    middle = (p[1:] + p[:-1]) / 2
    both = special.rel_entr(p[1:], middle).sum(-1) + special.rel_entr(p[:-1], middle).sum(-1)
    change = np.diff(nll, axis=0)
    largest = shift[1:].argmax(0)[None] == np.arange(len(shift) - 1)[:, None]
    stays = np.logical_and.accumulate((best == best[-1])[::-1])[::-1]
    return {
        "nll_exit": nll.mean(1),
        "gain": after(1, np.maximum(-change, 0).mean(1)),
        "cost": after(1, np.maximum(change, 0).mean(1)),
        "rank": np.median(rank, axis=1),
        "log_rank": np.log(rank).mean(1),
        "confidence": p.max(-1).mean(1),
        "accuracy": right.mean(1),
        "changed": after(1, (best[1:] != best[:-1]).mean(1)),
        "fixed": after(1, (right[1:] & ~right[:-1]).mean(1)),
        "broken": after(1, (right[:-1] & ~right[1:]).mean(1)),
        "settled": stays.mean(1),
        "entropy": special.entr(p).sum(-1).mean(1),
        "output_shift": after(1, shift.mean(1)),
        "output_shift_reverse": after(1, special.rel_entr(p[:-1], p[1:]).sum(-1).mean(1)),
        "output_shift_js": after(1, both.mean(1) / 2),
        "breadth": after(2, largest.mean(1)),
    }


def motion(y: np.ndarray) -> dict[str, np.ndarray]:
    """Of the raw states [loop, token, d_model]."""
    step, size = np.diff(y, axis=0), np.linalg.norm(y, axis=-1)
    length = np.linalg.norm(step, axis=-1)
    third = len(y[0]) // 3
    first = np.roll(y[1:-1], third, 1) - np.roll(y[:-2], 2 * third, 1)
    second = y[2:] - np.roll(y[1:-1], third, 1)
    return {
        "step_size": after(1, length.mean(1)),
        "relative_step": after(1, (length / size[:-1]).mean(1)),
        "radial_share": after(1, np.nanmean(cosine(step, y[:-1]) ** 2, axis=1)),
        "acceleration": after(2, (np.linalg.norm(np.diff(step, axis=0), axis=-1) / size[1:-1]).mean(1)),
        "state_cosine": after(1, cosine(y[1:], y[:-1]).mean(1)),
        "cos_update": after(2, np.nanmean(cosine(step[1:], step[:-1]), axis=1)),
        "cos_reference": after(2, np.nanmean(cosine(second, first), axis=1)),
    }


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """NaN where nothing moves, as the first token, which has no carry, in loops 3.."""
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def ranks(h: np.ndarray) -> dict[str, np.ndarray]:
    """Of the states that a head reads [loop, token, d_model]."""
    raw = [linalg.svdvals(states) for states in h]
    centred = [linalg.svdvals(states - states.mean(0)) for states in h]
    return {
        "effective_rank": np.array([np.exp(special.entr(s / s.sum()).sum()) for s in raw]),
        "effective_rank_centred": np.array([np.exp(special.entr(s / s.sum()).sum()) for s in centred]),
        "participation_ratio": np.array([(s**2).sum() ** 2 / (s**4).sum() for s in centred]),
    }


def distances(z: np.ndarray) -> dict[str, np.ndarray]:
    """Of the carries [loop, token, d_model], one token apart."""
    apart = np.linalg.norm(z[:, 1:] - z[:, :-1], axis=-1)
    return {
        "omega": after(2, apart.mean(1)),
        "omega_relative": after(2, (apart / np.linalg.norm(z[:, 1:], axis=-1)).mean(1)),
        "omega_random": after(2, np.array([spatial.distance.pdist(states).mean() for states in z])),
    }


def cka(documents: list[Tensor]) -> np.ndarray:
    """Debiased, HSIC averaged over documents first."""
    stacked = torch.stack(documents, dim=1)  # [loop, document, token, d_model]
    return np.array([[float(ckatorch.core.cka_batch(a, b)) for b in stacked] for a in stacked])


def attention(model: LoopedLM, cache: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Of every loop, layer and head, from the whole maps."""
    by_place = []
    for layer in range(model.cfg.n_layers):
        before: dict[str, np.ndarray] = {}
        of_layer = []
        for loop in range(1, model.cfg.n_loops + 1):
            of_loop: dict[str, np.ndarray] = {}
            maps = maps_of(cache, loop, layer)
            for branch, a in maps.items():
                visible = np.minimum(np.arange(1, a.shape[1] + 1), model.cfg.window if branch == "_local" else np.inf)
                entropy = special.entr(a).sum(-1)
                of_loop[f"attention_entropy{branch}"] = entropy[:, 1:].mean(-1)
                of_loop[f"attention_entropy_relative{branch}"] = (entropy[:, 1:] / np.log(visible[1:])).mean(-1)
                of_loop[f"attention_sink{branch}"] = a[:, 1:, 0].mean(-1)
                # Loop 1 has one map, against which the global branch of loop 2 is held, too.
                if (other := before.get(branch, None if branch == "_local" else before.get(""))) is not None:
                    divergence = special.rel_entr(a, other).sum(-1)
                    of_loop[f"attention_kl{branch}"] = divergence[:, 1:].mean(-1)
                if branch != "_local" and loop > 1:
                    near = np.triu(np.tril(np.ones(a.shape[1:])), 1 - model.cfg.window)
                    inside = (a * near).sum(-1)[:, model.cfg.window :]
                    of_loop[f"attention_window{branch}"] = inside.mean(-1)
            if loop > 1:
                gate = cache[f"loops.{loop}.blocks.{layer}.attn.hook_gate"][0]
                of_loop["gate_mean"] = gate.mean(0).numpy()
            of_layer.append(of_loop)
            before = maps
        by_place.append(of_layer)
    names = {name for of_layer in by_place for of_loop in of_layer for name in of_loop}
    nowhere = np.full(model.cfg.n_heads, np.nan)
    return {
        name: after(
            1, np.stack([[of_loop.get(name, nowhere) for of_loop in of_layer] for of_layer in by_place], axis=1)
        )
        for name in names
    }


def maps_of(cache: dict[str, Tensor], loop: int, layer: int) -> dict[str, np.ndarray]:
    """Attention maps [head, query, key] by branch; the effective one has no name of its own."""
    place = f"loops.{loop}.blocks.{layer}.attn."
    if loop == 1:
        return {"": cache[f"{place}hook_pattern"][0].numpy()}
    everywhere, nearby = (cache[f"{place}hook_pattern_{branch}"][0].numpy() for branch in ("global", "local"))
    gate = cache[f"{place}hook_gate"][0].T[..., None].numpy()
    return {"": gate * everywhere + (1 - gate) * nearby, "_global": everywhere, "_local": nearby}
