"""Released families: one file each, with its config keys and weight names and nothing else.

A family module has `MODEL_TYPE`, `DESCRIPTION`, `read_config(dict) -> LoopedConfig`,
`write_config(LoopedConfig) -> dict` and `weight_names(LoopedConfig) -> dict` from our parameter names to the
released ones.
"""

from types import ModuleType

from loopdiag.model.checkpoints import iquestpltcoder

FAMILIES: dict[str, ModuleType] = {family.MODEL_TYPE: family for family in (iquestpltcoder,)}
