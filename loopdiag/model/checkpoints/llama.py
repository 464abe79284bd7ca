"""Dense decoders in the Llama layout: the one-loop baseline.

Run with more loops than one, the stack is applied again to its own raw output, which nobody trained it for.
"""

from __future__ import annotations

from loopdiag.model.checkpoints.common import PLAIN_LOOPS, Keys, Names, llama_names, llama_sizes
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "llama"
DESCRIPTION = "dense Llama layout, the one-loop baseline"


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    return LoopedConfig(**llama_sizes(keys), n_loops=1, norm_between_loops=False, **PLAIN_LOOPS)


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    return llama_names(cfg)
