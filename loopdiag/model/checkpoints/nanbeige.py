"""Nanbeige 4.2 (`Nanbeige/Nanbeige4.2-3B` and `-Base`), arXiv 2607.22083: a Llama stack, looped.

Its released code implements more than its released checkpoints use; what is not built here is refused.
"""

from __future__ import annotations

from reprlib import repr as short

from loopdiag.model.checkpoints.common import PLAIN_LOOPS, Keys, Names, kept, llama_names, llama_sizes
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "nanbeige"
DESCRIPTION = "Nanbeige 4.2: looped Llama stack"
HUB = "Nanbeige/Nanbeige4.2-3B"
# LoopSplit, hyper-connections, n-gram embeddings, norms of queries and keys: off in every release. Files carry other
# keys of theirs, which mean nothing while these are off.
SWITCHES = (
    *("loop_middle_layers", "loop_share_kv", "qk_layernorm"),
    *("mhc_diff_for_loop", "mhc_double_stream_position_for_loop", "mhc_identity_nohresparam"),
    *("emb_neighbor_num", "emb_split_num", "insert_ngram_layer_idx", "ngram_insert_all_layers"),
    *("ngram_embedding_hidden_size", "ngram_vocab_size_ratio"),
)


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    if on := [key for key in keys if keys[key] and (key in SWITCHES or key.startswith("enable_"))]:
        settings = ", ".join(f"{key} = {short(keys[key])}" for key in on)
        raise ValueError(f"{settings}: not built, since no released checkpoint uses it; allowed is off.")
    # The list of loss weights, one for every loop but the last, overrules the loop count.
    weights = kept(keys, "loop_loss_weights", list, "a list") if keys.get("loop_loss_weights") else []
    return LoopedConfig(
        **llama_sizes({"head_dim": keys.get("kv_channels")} | dict(keys)),
        n_loops=len(weights) + 1 if weights else keys["num_loops"],
        norm_between_loops=not keys.get("skip_loop_final_norm", False),
        **PLAIN_LOOPS,
    )


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    return llama_names(cfg)
