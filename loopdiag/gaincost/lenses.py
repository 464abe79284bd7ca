"""Lenses: single curves of one checkpoint that might say how many loops a family like it should train with.

Each reads loops 0..R (NaN where undefined) and gives a loop count, or None where it has no opinion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
from jaxtyping import Float

COST_OVER_GAIN = 0.50
LEAST = 1e-9  # nats; a shift below it is rounding

PerLoop = Float[np.ndarray, " loop"]


def cost_gain(gain: PerLoop, cost: PerLoop) -> int | None:
    """The last loop before cost/gain reaches 0.5."""
    if len(gain) <= 2 or np.isnan(gain[2:]).any() or np.isnan(cost[2:]).any():
        return None
    over = np.flatnonzero(cost[2:] >= COST_OVER_GAIN * gain[2:])
    return int(over[0]) + 1 if len(over) else len(gain) - 1


def rank_peak(effective_rank: PerLoop) -> int | None:
    """The loop of the highest effective rank."""
    rank = effective_rank[1:]
    return None if np.isnan(rank).all() else int(np.nanargmax(rank)) + 1


def paper_rule(effective_rank: PerLoop) -> int | None:
    """Loop on while effective rank rises, stop at its first fall (arXiv 2606.18023).

    Example:
        The paper's own values (loop 1 put below them), and undefined at loop 0:

        >>> paper_rule(np.array([np.nan, 150.0, 174.6, 172.5, 158.2]))
        2
    """
    known = [loop for loop in range(1, len(effective_rank)) if not np.isnan(effective_rank[loop])]
    for loop, following in pairwise(known):
        if effective_rank[following] < effective_rank[loop]:
            return loop
    return known[-1] if known else None


def shift_knee(output_shift: PerLoop) -> int | None:
    """The loop after which the output shift falls by the largest factor, of 2..R; the last loop if it never falls."""
    return _knee(output_shift)


def attention_freeze(attention_kl: PerLoop) -> int | None:
    """Likewise of what attention moves from the loop before: the last loop before it freezes."""
    return _knee(attention_kl)


def _knee(curve: PerLoop) -> int | None:
    moved = np.maximum(curve[2:], LEAST)
    if len(moved) < 2 or np.isnan(moved).any():
        return None
    fall = moved[:-1] / moved[1:]
    return int(fall.argmax()) + 2 if fall.max() > 1 else len(curve) - 1


LENSES: dict[str, tuple[Callable[..., int | None], tuple[str, ...]]] = {
    "cost_gain": (cost_gain, ("gain", "cost")),
    "rank_peak": (rank_peak, ("effective_rank",)),
    "shift_knee": (shift_knee, ("output_shift",)),
    "attention_freeze": (attention_freeze, ("attention_kl",)),
    "paper_rule": (paper_rule, ("effective_rank",)),
}
INPUTS = sorted({name for _, needed in LENSES.values() for name in needed})


def lens_picks(curves: Mapping[str, PerLoop]) -> dict[str, int]:
    """Each lens' pick from mean curves over loops 0..R; without an opinion, or its curve, a lens is left out."""
    picks = {
        name: lens(*(np.asarray(curves[curve], dtype=float) for curve in needed))
        for name, (lens, needed) in LENSES.items()
        if all(curve in curves for curve in needed)
    }
    return {name: pick for name, pick in picks.items() if pick is not None}


def combine(picks: Mapping[str, int]) -> int | None:
    """One prediction from the lenses' picks: their lower median; None where no lens has an opinion."""
    return sorted(picks.values())[(len(picks) - 1) // 2] if picks else None
