"""Released families: one file each, with its config keys and weight names and nothing else.

A family module has

- `MODEL_TYPE`, that of its `config.json`, `DESCRIPTION`, a line for people, and `HUB`, a model of it on the hub;
- `read_config(keys) -> LoopedConfig`. A missing key may raise KeyError, a setting that is not built ValueError;
- `weight_names(cfg)`, from our parameter names to the stored ones (or rows of them); without it they are the same.
  `head.weight` is always named: where the head is tied, a stored copy is allowed if it equals the embedding;
- `redundant(cfg)`, where files may hold tensors that the configuration implies: their names, with the values they must
  have;
- `claims(keys)`, where several families share a model type: whether a file is of this one;
- `write_config(cfg) -> dict`, where models can be saved in its layout.

docs/models.md says how to add one.
"""

from __future__ import annotations

from reprlib import repr as short
from types import ModuleType
from typing import Any

from loopdiag.model.checkpoints import (
    huginn,
    iquestloopcoder,
    iquestpltcoder,
    llama,
    nanbeige,
    native,
    ouro,
    retrofitted,
)

# Those that claim a shared model type stand before the one that takes the rest.
FAMILIES: tuple[ModuleType, ...] = (
    iquestpltcoder,
    iquestloopcoder,
    ouro,
    retrofitted,
    huginn,
    nanbeige,
    llama,
    native,
)


def family_of(keys: dict[str, Any]) -> ModuleType:
    """The family of a `config.json`.

    Raises:
        ValueError: None has its model type; the message lists those that are supported.
    """
    model_type = keys.get("model_type")
    for family in FAMILIES:
        if model_type == family.MODEL_TYPE and getattr(family, "claims", lambda keys: True)(keys):
            return family
    supported = ", ".join(dict.fromkeys(family.MODEL_TYPE for family in FAMILIES))
    raise ValueError(f"model_type {short(model_type)} is not supported; supported are {supported}.")
