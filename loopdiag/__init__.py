"""Looped language models, loop by loop: how many loops are worth it?

import loopdiag as ld
model = ld.load("tiny-plt-4")
diagnosis = ld.diagnose(model, ld.corpus.bundled())
print(ld.recommend(diagnosis))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: `import loopdiag` must not wait for torch.
_PUBLIC = {
    "Diagnosis": "loopdiag.diagnosis",
    "Effects": "loopdiag.interventions",
    "ForeignModel": "loopdiag.trace",
    "GainCost": "loopdiag.gaincost",
    "LoopMonitor": "loopdiag.monitor",
    "LoopTrace": "loopdiag.trace",
    "LoopedConfig": "loopdiag.model",
    "LoopedLM": "loopdiag.model",
    "ProbeScores": "loopdiag.scores",
    "Recommendation": "loopdiag.gaincost",
    "SweepLosses": "loopdiag.losses",
    "bundled_models": "loopdiag.model",
    "decompose": "loopdiag.gaincost",
    "diagnose": "loopdiag.diagnosis",
    "gain_cost": "loopdiag.gaincost",
    "intervene": "loopdiag.interventions",
    "load": "loopdiag.model",
    "probe": "loopdiag.probing",
    "recommend": "loopdiag.gaincost",
    "recommend_training": "loopdiag.gaincost",
    "record": "loopdiag.trace",
}
_ROOMS = ("corpus", "interventions", "measures", "plots", "probing")

__all__ = [*_PUBLIC, *_ROOMS, "__version__"]

if TYPE_CHECKING:
    from loopdiag import corpus as corpus
    from loopdiag import interventions as interventions
    from loopdiag import measures as measures
    from loopdiag import plots as plots
    from loopdiag import probing as probing
    from loopdiag.diagnosis import Diagnosis as Diagnosis
    from loopdiag.diagnosis import diagnose as diagnose
    from loopdiag.gaincost import GainCost as GainCost
    from loopdiag.gaincost import Recommendation as Recommendation
    from loopdiag.gaincost import decompose as decompose
    from loopdiag.gaincost import gain_cost as gain_cost
    from loopdiag.gaincost import recommend as recommend
    from loopdiag.gaincost import recommend_training as recommend_training
    from loopdiag.interventions import Effects as Effects
    from loopdiag.interventions import intervene as intervene
    from loopdiag.losses import SweepLosses as SweepLosses
    from loopdiag.model import LoopedConfig as LoopedConfig
    from loopdiag.model import LoopedLM as LoopedLM
    from loopdiag.model import bundled_models as bundled_models
    from loopdiag.model import load as load
    from loopdiag.monitor import LoopMonitor as LoopMonitor
    from loopdiag.probing import probe as probe
    from loopdiag.scores import ProbeScores as ProbeScores
    from loopdiag.trace import ForeignModel as ForeignModel
    from loopdiag.trace import LoopTrace as LoopTrace
    from loopdiag.trace import record as record


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"loopdiag.{name}")
    raise AttributeError(f"module 'loopdiag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
