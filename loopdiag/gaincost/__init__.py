"""Arithmetic on a diagnosis: the gain-cost curve and the decision."""

from loopdiag.gaincost.curve import Estimate, GainCost, gain_cost
from loopdiag.gaincost.decision import BreakEven, Recommendation, recommend

__all__ = ["BreakEven", "Estimate", "GainCost", "Recommendation", "gain_cost", "recommend"]
