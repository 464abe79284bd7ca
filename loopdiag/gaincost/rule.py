"""The rule that picks a loop count from measured losses, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from loopdiag import html

PRICE = 0.01
CONTENDER = 0.10
MAJORITY = 0.50
FEWEST_SOURCES = 5  # fewer cannot say how much sources differ, and every error would come out too small
ROUNDING = 1e-9  # nats; differences below it are arithmetic

PerLoop = Float[np.ndarray, " loop"]


@dataclass(frozen=True)
class BreakEven:
    """`loops` is the best count while the price is under `below` (and over the next count's)."""

    loops: int
    below: float


@dataclass(frozen=True)
class Decision:
    """A loop count, and how sure it is.

    Attributes:
        pick: The count that the rule picks on all that was measured, answer or not.
        why: Why undetermined; empty otherwise.
        price: Nats per token that an extra loop must bring.
        support: For each count, how often the rule picks it over resamples of what was measured.
        break_even: At which prices the best count changes, by mean utility, the largest count first.
    """

    pick: int
    why: str
    price: float
    support: dict[int, float]
    break_even: tuple[BreakEven, ...]

    @property
    def verdict(self) -> Literal["recommended", "undetermined"]:
        """Whether there is an answer."""
        return "undetermined" if self.why else "recommended"

    @property
    def recommended_loops(self) -> int | None:
        """The answer, or None."""
        return None if self.why else self.pick

    @property
    def contenders(self) -> tuple[int, ...]:
        """Counts with a support of 10 % or more."""
        return tuple(loops for loops, share in self.support.items() if share >= CONTENDER)

    def card(self, question: str, notes: Sequence[str], fewest: int = 1) -> str:
        """The answer with its support and prices as HTML; `fewest` is the smallest count that was measured."""
        answer = self.recommended_loops or f"undetermined: {self.why}"
        support = ", ".join(f"{loops}: {share:.0%}" for loops, share in self.support.items())
        rows = [
            ("support", support),
            ("price", f"{self.price:g} nats per token and extra loop"),
            ("break-even prices, by mean utility", describe(self.break_even, fewest)),
        ]
        return html.card(f"{question} {answer}", body=rows, notes=notes)

    def in_words(self) -> str:
        """The answer, or why there is none, with its support and price."""
        support = f"support {self.support[self.pick]:.0%}, price {self.price:g} nats per token and loop"
        return f"undetermined ({self.why}; {support})" if self.why else f"{self.pick} ({support})"


def checked_price(price: float) -> float:
    """The price.

    Raises:
        ValueError: It is negative or not finite.
    """
    if not (math.isfinite(price) and price >= 0):
        raise ValueError(
            f"price = {price} is not allowed: it must be a finite number >= 0, in nats per token and loop."
        )
    return float(price)


def decide(
    nll: PerLoop,
    draws: Float[np.ndarray, "draw loop"],
    errors: Float[np.ndarray, "loop loop"],
    loops: np.ndarray,
    price: float,
    sources: np.ndarray,
) -> Decision:
    """Pick a loop count.

    utility(r) = -nll(r) - price * (r - 1); the smallest r that no larger one beats by more than one standard error of
    their paired difference. Undetermined when it is picked in less than half of the resamples, when the data leave room
    (95 %) for another count to be better by more than the price, or when the documents come from fewer than five
    sources.

    Args:
        nll: Mean loss of each count, in nats per token.
        draws: Resamples of it.
        errors: Standard error of each paired difference.
        loops: The counts, rising.
        price: Nats per token that an extra loop must bring.
        sources: Of the documents.
    """
    paid = price * (loops - 1)
    utility, resampled = -nll - paid, -draws - paid
    picked = int(_rule(utility, errors))
    picks = _rule(resampled, errors)
    support = {int(count): float((picks == index).mean()) for index, count in enumerate(loops)}
    return Decision(
        pick=int(loops[picked]),
        why=_few_sources(sources, loops)
        or _doubt(utility, resampled, picked, support[int(loops[picked])], price, loops),
        price=price,
        support=support,
        break_even=break_even(nll, loops),
    )


def _few_sources(sources: np.ndarray, loops: np.ndarray) -> str:
    """Why no pick among these counts stands on documents of these sources; empty where they are enough."""
    if len(loops) > 1 and len(np.unique(sources)) < FEWEST_SOURCES:
        return f"the documents come from fewer than {FEWEST_SOURCES} sources, too few to tell how sure an answer is"
    return ""


def _rule(utility: Float[np.ndarray, "*draw loop"], errors: Float[np.ndarray, "loop loop"]) -> Int[np.ndarray, "*draw"]:
    """Index of the smallest count that no larger one beats by more than one standard error.

    Where the errors are alike this is the smallest count within one standard error of the best. Where the best is
    noisy, it does not let in a count that a third one clearly beats, and a higher price never picks more loops.
    """
    ahead = utility[..., None, :] - utility[..., :, None]  # [*draw, count, rival]
    beaten = np.triu(ahead > errors + ROUNDING, 1).any(-1)
    return (~beaten).argmax(-1)


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

    Example:
        Loop 2 takes 0.5 nats off, loop 3 another 0.125.

        >>> break_even(np.array([2.0, 1.5, 1.375]), np.array([1, 2, 3]))
        (BreakEven(loops=3, below=0.125), BreakEven(loops=2, below=0.5))
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


def describe(steps: tuple[BreakEven, ...], fewest: int = 1) -> str:
    """Break-even prices in words; `fewest` is the smallest count that was measured."""
    if not steps:
        return f"{fewest} loop{'s' if fewest > 1 else ''} at any price"
    return ", ".join(f"{step.loops} loops below {step.below:.2g}" for step in steps) + f", else {fewest}"
