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
    "GainCost": "loopdiag.gaincost",
    "LoopTrace": "loopdiag.trace",
    "LoopedConfig": "loopdiag.model",
    "LoopedLM": "loopdiag.model",
    "Recommendation": "loopdiag.gaincost",
    "bundled_models": "loopdiag.model",
    "diagnose": "loopdiag.diagnosis",
    "gain_cost": "loopdiag.gaincost",
    "load": "loopdiag.model",
    "recommend": "loopdiag.gaincost",
    "record": "loopdiag.trace",
}
_ROOMS = ("corpus", "measures", "plots")

__all__ = [*_PUBLIC, *_ROOMS, "__version__"]

if TYPE_CHECKING:
    from loopdiag import corpus, measures, plots
    from loopdiag.diagnosis import Diagnosis, diagnose
    from loopdiag.gaincost import GainCost, Recommendation, gain_cost, recommend
    from loopdiag.model import LoopedConfig, LoopedLM, bundled_models, load
    from loopdiag.trace import LoopTrace, record


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"loopdiag.{name}")
    raise AttributeError(f"module 'loopdiag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
