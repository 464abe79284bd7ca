"""Looped decoders with hook points by loop, and where they are loaded from."""

from loopdiag.model.cache import LoopCache
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.loading import LoadError, bundled_models, load
from loopdiag.model.past import Past
from loopdiag.model.saving import save

__all__ = ["LoadError", "LoopCache", "LoopedConfig", "LoopedLM", "Past", "bundled_models", "load", "save"]
