"""Retrofitted recurrence (`smcleish/Recurrent-Llama-3.2-...`, `Recurrent-TinyLlama-3T-...`), arXiv 2511.07384.

Prelude, core and coda cut out of a pretrained Llama, in the code base and under the `model_type` of Huginn, but with
Llama's layer: two norms, rotate-half RoPE (`rope_theta`; the `rope_base` of these files is not used), no table, no
biases, and the final norm once. Their OLMo branch has other tensors and is refused when the weights are matched.
"""

from __future__ import annotations

import math

from loopdiag.model.checkpoints.common import Keys, Names, kept, number, refuse_unbuilt, rotary
from loopdiag.model.checkpoints.huginn import MODEL_TYPE, sizes, stacked_names
from loopdiag.model.config import LoopedConfig

__all__ = ["MODEL_TYPE"]
DESCRIPTION = "Retrofitted recurrence: prelude, looped core and coda cut out of a Llama"
HUB = "smcleish/Recurrent-TinyLlama-3T-train-recurrence-4"
BUILT = {"qk_bias": (False, None)}


def claims(keys: Keys) -> bool:
    """Whether a file with this `model_type` is of this family: Huginn's own has no `rope_theta`."""
    return "rope_theta" in keys or "rope_parameters" in keys


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    refuse_unbuilt(keys, BUILT)
    shared = sizes(keys)
    usual = {"embed_scale": math.sqrt(keys["n_embd"]), "std": math.sqrt(2 / (5 * keys["n_embd"]))}
    init = usual | (kept(keys, "init_values", dict, "an object, or null") if keys.get("init_values") else {})
    multiplier = number(init, "embed_scale")
    return LoopedConfig(
        **shared,
        n_ctx=keys["max_position_embeddings"],
        embed_multiplier=multiplier,
        initial_state="random",
        initial_std=multiplier * number(init, "std"),
        offset=0,
        injection="concat",
        memory="own",
        norms="pre",
        norm_between_loops=False,
        norm_eps=keys["norm_eps"],
        tie_embeddings=keys["tie_embeddings"],
        **rotary(keys),
    )


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    return stacked_names(cfg, {"ln1.weight": "norm_1.weight", "ln2.weight": "norm_2.weight"})
