"""Arithmetic on a diagnosis: the gain-cost curve and the decision."""

from loopdiag.gaincost.curve import Estimate, GainCost, gain_cost
from loopdiag.gaincost.decision import Recommendation, recommend
from loopdiag.gaincost.measured import Decomposition, TrainingRecommendation, decompose, recommend_training
from loopdiag.gaincost.rule import BreakEven

__all__ = [
    "BreakEven",
    "Decomposition",
    "Estimate",
    "GainCost",
    "Recommendation",
    "TrainingRecommendation",
    "decompose",
    "gain_cost",
    "recommend",
    "recommend_training",
]
