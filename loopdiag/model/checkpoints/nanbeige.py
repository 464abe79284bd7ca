"""Nanbeige 4.2 (`Nanbeige/Nanbeige4.2-3B` and `-Base`), arXiv 2607.22083: a Llama stack, looped.

Its released code implements more than its released checkpoints use; what is not built here is refused.
"""

from __future__ import annotations

from loopdiag.model.checkpoints.common import PLAIN_LOOPS, Keys, Names, llama_names, llama_sizes
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "nanbeige"
DESCRIPTION = "Nanbeige 4.2: looped Llama stack"
# LoopSplit, hyper-connections, depth attention, n-gram embeddings, norms of queries and keys: off in every release.
NOT_BUILT = (
    *("enable_double_loop_split", "loop_middle_layers", "loop_share_kv"),
    *("enable_hyper_connection", "enable_mhc", "enable_depth_attention", "qk_layernorm"),
)
# Whatever else starts so and is switched on belongs to one of them.
NOT_BUILT_PREFIXES = ("enable_", "emb_", "mhc_", "hyper_connection", "depth_attention")


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    switched_on = [key for key in keys if key in NOT_BUILT or key.startswith(NOT_BUILT_PREFIXES) if keys[key]]
    if switched_on:
        settings = ", ".join(f"{key} = {keys[key]!r}" for key in switched_on)
        raise ValueError(f"{settings}: not built, since no released checkpoint uses it; allowed is off.")
    # The list of loss weights, one for every loop but the last, overrules the loop count.
    weights = keys.get("loop_loss_weights") or []
    return LoopedConfig(
        **llama_sizes({"head_dim": keys.get("kv_channels")} | dict(keys)),
        n_loops=len(weights) + 1 if weights else keys["num_loops"],
        norm_between_loops=not keys.get("skip_loop_final_norm", False),
        **PLAIN_LOOPS,
    )


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    return llama_names(cfg)
