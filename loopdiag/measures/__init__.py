"""Measures: pure functions from a `LoopTrace` to arrays whose first dimension is the document."""

from loopdiag.measures import (
    attention,
    diversity,
    exit_rules,
    motion,
    offset,
    prediction,
    similarity,
    tokens,
    trajectories,
)
from loopdiag.measures.definitions import DEFAULT_GROUPS, DEFINITIONS, GROUPS, chosen, dimensions, is_by_loop
from loopdiag.measures.taking import absent, rarefied, take

__all__ = [
    "DEFAULT_GROUPS",
    "DEFINITIONS",
    "GROUPS",
    "absent",
    "attention",
    "chosen",
    "dimensions",
    "diversity",
    "exit_rules",
    "is_by_loop",
    "motion",
    "offset",
    "prediction",
    "rarefied",
    "similarity",
    "take",
    "tokens",
    "trajectories",
]
