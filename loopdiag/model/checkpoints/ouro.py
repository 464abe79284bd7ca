"""Ouro (`ByteDance/Ouro-1.4B`, `Ouro-2.6B` and their `-Thinking` versions), arXiv 2510.25741.

The whole stack again and again with the final norm in between, four norms a layer, and an exit gate.
"""

from __future__ import annotations

from reprlib import repr as short

from loopdiag.model.checkpoints.common import PLAIN_LOOPS, Keys, Names, kept, llama_names, llama_sizes, refuse_unbuilt
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "ouro"
DESCRIPTION = "Ouro: looped stack with an exit gate"
HUB = "ByteDance/Ouro-1.4B"
BUILT = {"use_sliding_window": (False, None)}


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    refuse_unbuilt(keys, BUILT)
    if keys.get("layer_types") and set(map(str, kept(keys, "layer_types", list, "a list"))) != {"full_attention"}:
        raise ValueError(
            f"layer_types = {short(keys['layer_types'])} is not built: allowed is 'full_attention' throughout."
        )
    threshold = keys.get("early_exit_threshold")
    return LoopedConfig(
        **llama_sizes(keys),
        n_loops=keys["total_ut_steps"],
        norms="sandwich",
        norm_between_loops=True,
        exit_gate=True,
        exit_threshold=1.0 if threshold is None else threshold,
        **PLAIN_LOOPS,
    )


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    parts = {
        "ln1_post.weight": "input_layernorm_2.weight",
        "ln2_post.weight": "post_attention_layernorm_2.weight",
    }
    gate = {f"exit_gate.{part}": f"model.early_exit_gate.{part}" for part in ("weight", "bias")}
    return llama_names(cfg, parts) | gate
