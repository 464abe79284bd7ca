"""Any looped decoder of this toolkit: the fields of `LoopedConfig` are the keys, our parameter names the tensors'.

For models that no released layout can say, such as a Parallel Loop Transformer trained without its offset.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

from loopdiag.model.checkpoints.common import Keys, kept
from loopdiag.model.config import LoopedConfig, RopeScaling

MODEL_TYPE = "loopdiag"
DESCRIPTION = "any looped decoder of this toolkit"
HUB = ""
NOT_SETTINGS = ("model_type", "dtype", "eos_token_id", "transformers_version", "architectures")


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    known = {field.name for field in fields(LoopedConfig)}
    if unknown := sorted(set(keys) - known - set(NOT_SETTINGS)):
        raise ValueError(f"unknown keys {unknown}: allowed are the fields of LoopedConfig.")
    for field in fields(LoopedConfig):
        if field.default is MISSING and field.name not in keys:
            raise KeyError(field.name)
    settings = {key: value for key, value in keys.items() if key in known}
    if settings.get("rope_scaling"):
        settings["rope_scaling"] = RopeScaling(**kept(settings, "rope_scaling", dict, "an object, or null"))
    return LoopedConfig(**settings)


def write_config(cfg: LoopedConfig) -> dict[str, Any]:
    """The `config.json` of a model; `read_config` gives `cfg` back."""
    return {"model_type": MODEL_TYPE, **asdict(cfg)}
