"""Measures: pure functions from a `LoopTrace` to arrays whose first dimension is the document."""

from loopdiag.measures import attention, diversity, motion, offset, prediction

__all__ = ["attention", "diversity", "motion", "offset", "prediction"]
