"""What LoopCoder-v2 (arXiv 2606.18023) reports, as numbers, and what it says of them, as rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr

Values = Callable[[int], xr.DataArray]  # from a loop to a measure there, by document
FOUR = "four-loop model"


@dataclass(frozen=True)
class Reported:
    """Numbers of the paper.

    Attributes:
        what: In words, with the unit.
        digits: Behind the point, for ours.
        values: By loop.
        source: Where they stand.
    """

    what: str
    digits: int
    values: dict[int, float]
    source: str


REPORTED = {
    "step_size": Reported("step size (residual stream)", 1, {2: 846, 3: 464, 4: 1014}, FOUR),
    "cos_update": Reported("cosine of successive updates", 2, {2: -0.72, 3: -0.46, 4: 0.04}, FOUR),
    "effective_rank": Reported("effective rank", 1, {2: 174.6, 3: 172.5, 4: 158.2}, FOUR),
    "output_shift": Reported("output shift Dp (nats)", 3, {1: 26.5, 2: 1.75, 3: 1.32, 4: 1.58}, FOUR),
    "omega": Reported("offset distance Ω (carry)", 2, {2: 54, 3: 60, 4: 51}, f"{FOUR}, read off its Figure 3"),
    "head_cosine": Reported("likeness of heads (mean cosine)", 2, {1: 0.57, 2: 0.67, 3: 0.71}, "three-loop model"),
}
# Its Table 3: shares of loops 2, 3 and 4, in percent.
SHARES = {
    "output_shift": {2: 38, 3: 28, 4: 34},
    "attention_kl": {2: 50, 3: 25, 4: 25},
    "breadth": {2: 43, 3: 13, 4: 44},
}
# Its models of one to four loops, by the mean of ten benchmarks, in percent.
BENCHMARKS = {1: 38.0, 2: 46.5, 3: 36.9, 4: 34.3}


@dataclass(frozen=True)
class Point:
    """Something that the paper says, as differences that must be above 0.

    Attributes:
        says: In words.
        measure: Of what.
        rule: The differences, in words.
        paper: What the paper's own numbers say.
        loops: The fewest that a model must have been trained with.
        differences: From a measure's values and the last trained loop to the differences, by document.
    """

    says: str
    measure: str
    rule: str
    paper: str
    loops: int
    differences: Callable[[Values, int], list[xr.DataArray]]


CONSTANT = 1.25  # the paper's own offset distances differ by a factor of 1.18

POINTS = (
    Point(
        "Effective rank peaks at loop 2",
        "effective_rank",
        "rank at loop 2 above that at every other loop",
        "174.6, then 172.5 and 158.2",
        3,
        lambda at, last: [at(2) - at(loop) for loop in range(1, last + 1) if loop != 2],
    ),
    Point(
        "The first loop makes most of the output",
        "output_shift",
        "Dp at loop 2 below a tenth of that at loop 1",
        "26.5, then 1.75",
        2,
        lambda at, last: [0.1 * at(1) - at(2)],
    ),
    Point(
        "Dp falls after loop 2",
        "output_shift",
        "Dp at loop 2 above that at every later loop",
        "1.75, then 1.32 and 1.58",
        3,
        lambda at, last: [at(2) - at(loop) for loop in range(3, last + 1)],
    ),
    Point(
        "The last loop moves the output more than the one before",
        "output_shift",
        "Dp at the last loop above that at the one before",
        "1.58 after 1.32",
        3,
        lambda at, last: [at(last) - at(last - 1)],
    ),
    Point(
        "The last loop's step is longer than the one before",
        "step_size",
        "step size at the last loop above that at the one before",
        "1014 after 464",
        3,
        lambda at, last: [at(last) - at(last - 1)],
    ),
    Point(
        "Updates turn back at loop 2",
        "cos_update",
        "cosine at loop 2 below 0",
        "-0.72",
        2,
        lambda at, last: [-at(2)],
    ),
    Point(
        "Turning back ends with more loops",
        "cos_update",
        "cosine above that of the loop before, from loop 3 on",
        "-0.72, -0.46, 0.04",
        3,
        lambda at, last: [at(loop) - at(loop - 1) for loop in range(3, last + 1)],
    ),
    Point(
        "Attention re-routing falls after loop 2",
        "attention_kl",
        "attention KL at loop 2 above that at every later loop",
        "half of it in loop 2",
        3,
        lambda at, last: [at(2) - at(loop) for loop in range(3, last + 1)],
    ),
    Point(
        "Heads grow more alike",
        "head_cosine",
        "mean cosine of heads above that of the loop before",
        "0.57, 0.67, 0.71",
        2,
        lambda at, last: [at(loop) - at(loop - 1) for loop in range(2, last + 1)],
    ),
    Point(
        "The gate prefers the global branch",
        "gate_mean",
        "mean gate above 0.5 at every loop from 2 on",
        "well above 0.5",
        2,
        lambda at, last: [at(loop) - 0.5 for loop in range(2, last + 1)],
    ),
    Point(
        "The offset distance stays about constant",
        "omega",
        f"no loop's Ω above {CONSTANT} times that of another",
        "54, 60, 51",
        3,
        lambda at, last: [
            CONSTANT * at(one) - at(other) for one in range(2, last + 1) for other in range(2, last + 1) if one != other
        ],
    ),
)
