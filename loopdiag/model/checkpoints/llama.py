"""Dense decoders in the Llama layout: the one-loop baseline.

Run with more loops than one, the stack is applied again to its own raw output, which nobody trained it for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopdiag.model.checkpoints.common import PLAIN_LOOPS, Keys, Names, llama_names, llama_sizes
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "llama"
DESCRIPTION = "dense Llama layout, the one-loop baseline"
HUB = ""
# What a missing key means in transformers' configuration.
DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    return LoopedConfig(**llama_sizes(DEFAULTS | dict(keys)), n_loops=1, norm_between_loops=False, **PLAIN_LOOPS)


def redundant(cfg: LoopedConfig) -> dict[str, Tensor]:
    """Buffers that older files store beside the weights, with the values they must have."""
    speeds = cfg.rope_base ** (-torch.arange(0, cfg.d_head, 2, dtype=torch.float64) / cfg.d_head)
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": speeds for layer in range(cfg.n_layers)}


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    return llama_names(cfg)
