"""Measures: pure functions from a `LoopTrace` to arrays whose first dimension is the document."""

from loopdiag.measures import attention, diversity, exit_rules, motion, offset, prediction, similarity

__all__ = ["attention", "diversity", "exit_rules", "motion", "offset", "prediction", "similarity"]
