"""The recommendation: how many loops to run this checkpoint with, and how many a family like it should train with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float

from loopdiag.bootstrap import resampled_means
from loopdiag.diagnosis import Diagnosis

PRICE = 0.01
CONTENDER = 0.10
MAJORITY = 0.50
ROUNDING = 1e-9  # nats; differences below it are arithmetic
FEWEST_SOURCES = 5  # fewer cannot say how much sources differ, and every error would come out too small
COST_OVER_GAIN = 0.50

PerLoop = Float[np.ndarray, " loop"]


@dataclass(frozen=True)
class BreakEven:
    """`loops` is the best count while the price is under `below` (and over the next count's)."""

    loops: int
    below: float


@dataclass(frozen=True)
class Recommendation:
    """Answers to the two questions, with what they rest on.

    Attributes:
        verdict: Whether question 1, how many loops to run this checkpoint with, has an answer.
        recommended_loops: That answer, or None.
        pick: What the rule picks on all documents, answer or not.
        why: Why undetermined; empty otherwise.
        price: Nats per token that an extra loop must bring.
        support: For each loop count, how often the rule picks it over bootstrap resamples of the documents.
        contenders: Counts with a support of 10 % or more.
        break_even: At which prices the best count changes, by mean utility, the largest count first.
        predicted_training_loops: Question 2, predicted from the lenses; provisional, since how they are combined is not
            backtested yet. None where no lens has an opinion.
        lenses: Each lens' own pick.
        trained_loops: Loops the model was trained with.
        model: Which model.
        seed: Of the bootstrap.
    """

    verdict: Literal["recommended", "undetermined"]
    recommended_loops: int | None
    pick: int
    why: str
    price: float
    support: dict[int, float]
    contenders: tuple[int, ...]
    break_even: tuple[BreakEven, ...]
    predicted_training_loops: int | None
    lenses: dict[str, int]
    trained_loops: int
    model: str
    seed: int

    def __str__(self) -> str:
        support = f"support {self.support[self.pick]:.0%}, price {self.price:g} nats per token and loop"
        if self.recommended_loops is None:
            run = f"undetermined ({self.why}; {support})"
        else:
            run = f"{self.recommended_loops} ({support})"
        lenses = ", ".join(f"{name} {loops}" for name, loops in self.lenses.items()) or "no lens has an opinion"
        return (
            f"Run {self.model} (trained with {self.trained_loops}) with how many loops? Measured: {run}.\n"
            f"Break-even prices, by mean utility: {describe(self.break_even)}.\n"
            "Train with how many loops? Predicted, not backtested: "
            f"{self.predicted_training_loops or 'no answer'} ({lenses})."
        )


def recommend(diagnosis: Diagnosis, price: float = PRICE, *, seed: int = 0) -> Recommendation:
    """Recommend loop counts from a diagnosis.

    Question 1 is measured: utility(r) = -nll_exit(r) - price * (r - 1); the smallest r that no larger one beats by more
    than one standard error of their paired difference. Undetermined when that r is picked in less than half of the
    resamples, when the data leave room (95 %) for another count to be better than the pick by more than the price, or
    when the documents come from fewer than five sources.

    Question 2 is a prediction from the lenses: the lower median of their picks.

    Args:
        diagnosis: What was measured.
        price: Nats per token that an extra loop must bring, >= 0.
        seed: Of the bootstrap.

    Raises:
        ValueError: `price` is negative or not finite, or the NLL of a loop is not finite.
    """
    if not (math.isfinite(price) and price >= 0):
        raise ValueError(
            f"price = {price} is not allowed: it must be a finite number >= 0, in nats per token and loop."
        )
    diagnosis.require("nll_exit")
    nll = diagnosis.data["nll_exit"].values[:, 1:]
    loops = diagnosis.loops
    if not np.isfinite(nll).all():
        broken = loops[~np.isfinite(nll).all(0)]
        raise ValueError(f"The NLL after loop {broken[0]} is not finite, so there is nothing to recommend from.")
    utility = -nll - price * (loops - 1)
    sources = diagnosis.data["source"].values
    draws = resampled_means(utility, sources, seed=seed)
    # [loop, loop]: the standard error of each paired difference, the same for every resample.
    errors = (draws[:, :, None] - draws[:, None, :]).std(0)
    picked = _rule(utility.mean(0), errors)
    picks = np.array([_rule(draw, errors) for draw in draws])
    support = {int(loop): float((picks == index).mean()) for index, loop in enumerate(loops)}
    pick = int(loops[picked])
    if len(loops) > 1 and len(np.unique(sources)) < FEWEST_SOURCES:
        why = f"the documents come from fewer than {FEWEST_SOURCES} sources, too few to tell how sure an answer is"
    else:
        why = _doubt(utility.mean(0), draws, picked, support[pick], price, loops)
    about = diagnosis.provenance
    # Lenses compare what each loop does with the loop before: where loops were left out, they have no opinion.
    measured = [name for name in _LENS_INPUTS if name in diagnosis.data] if len(loops) == loops[-1] else []
    lenses = lens_picks({name: diagnosis.data[name].mean("document").values for name in measured})
    return Recommendation(
        verdict="undetermined" if why else "recommended",
        recommended_loops=None if why else pick,
        pick=pick,
        why=why,
        price=float(price),
        support=support,
        contenders=tuple(loop for loop, share in support.items() if share >= CONTENDER),
        break_even=break_even(nll.mean(0), loops),
        predicted_training_loops=sorted(lenses.values())[(len(lenses) - 1) // 2] if lenses else None,
        lenses=lenses,
        trained_loops=about["trained_loops"],
        model=about["model"],
        seed=seed,
    )


def _rule(utility: PerLoop, errors: Float[np.ndarray, "loop loop"]) -> int:
    """Index of the smallest count that no larger one beats by more than one standard error.

    Where the errors are alike this is the smallest count within one standard error of the best. Where the best is
    noisy, it does not let in a count that a third one clearly beats, and a higher price never picks more loops.
    """
    ahead = utility - utility[:, None]  # [count, rival]
    beaten = np.triu(ahead > errors + ROUNDING, 1).any(1)
    return int((~beaten).argmax())


def _doubt(
    utility: PerLoop,
    draws: Float[np.ndarray, "draw loop"],
    picked: int,
    support: float,
    price: float,
    loops: np.ndarray,
) -> str:
    """Why the pick does not stand, or an empty string."""
    if support < MAJORITY:
        return f"{loops[picked]} would be picked in {support:.0%} of the resamples only"
    ahead = draws - draws[:, [picked]]
    half_width = (np.percentile(ahead, 97.5, axis=0) - np.percentile(ahead, 2.5, axis=0)) / 2
    room = utility - utility[picked] + half_width
    room[picked] = -np.inf
    rival = int(room.argmax())
    if room[rival] > price + ROUNDING:
        return (
            f"{loops[rival]} instead of {loops[picked]} could be better by {room[rival]:.3f} nats per token, "
            "price paid, which is more than the price"
        )
    return ""


def break_even(nll: PerLoop, loops: np.ndarray) -> tuple[BreakEven, ...]:
    """At which prices the count of best mean utility changes, the largest count first.

    Only counts that are best at some price >= 0 appear. One loop, best above the last price, is not listed.

    Args:
        nll: Mean exit NLL of each count.
        loops: The counts, rising from 1.
    """
    steps: list[BreakEven] = []
    best = int(nll.argmin())
    while best > 0:
        # The next count down is the one that the falling utility meets first: the least slope to a smaller count.
        slopes = [(float((nll[fewer] - nll[best]) / (loops[best] - loops[fewer])), fewer) for fewer in range(best)]
        below, fewer = min(slopes)
        steps.append(BreakEven(int(loops[best]), below))
        best = fewer
    return tuple(steps)


def describe(steps: tuple[BreakEven, ...]) -> str:
    """Break-even prices in words."""
    return (
        ", ".join(f"{step.loops} loops below {step.below:.2g}" for step in steps) + ", else 1"
        if steps
        else "1 loop at any price"
    )


# -- lenses: each reads loops 0..R (NaN where undefined) and says how many loops a family like this should train with


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
    """Loop on while effective rank rises, stop at its first fall (arXiv 2606.18023)."""
    known = [loop for loop in range(1, len(effective_rank)) if not np.isnan(effective_rank[loop])]
    for loop, following in pairwise(known):
        if effective_rank[following] < effective_rank[loop]:
            return loop
    return known[-1] if known else None


def shift_knee(output_shift: PerLoop) -> int | None:
    """The loop after which the output shift falls by the largest factor, of 2..R; the last loop if it never falls."""
    shift = np.maximum(output_shift[2:], ROUNDING)
    if len(shift) < 2 or np.isnan(shift).any():
        return None
    fall = shift[:-1] / shift[1:]
    return int(fall.argmax()) + 2 if fall.max() > 1 else len(output_shift) - 1


LENSES: dict[str, tuple[Callable[..., int | None], tuple[str, ...]]] = {
    "cost_gain": (cost_gain, ("gain", "cost")),
    "rank_peak": (rank_peak, ("effective_rank",)),
    "shift_knee": (shift_knee, ("output_shift",)),
    "paper_rule": (paper_rule, ("effective_rank",)),
}
_LENS_INPUTS = sorted({name for _, needed in LENSES.values() for name in needed})


def lens_picks(curves: Mapping[str, PerLoop]) -> dict[str, int]:
    """Each lens' pick from mean curves over loops 0..R; without an opinion, or its curve, a lens is left out."""
    picks = {
        name: lens(*(np.asarray(curves[curve], dtype=float) for curve in needed))
        for name, (lens, needed) in LENSES.items()
        if all(curve in curves for curve in needed)
    }
    return {name: pick for name, pick in picks.items() if pick is not None}
