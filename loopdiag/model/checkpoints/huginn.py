"""Huginn (`tomg-group-umd/huginn-0125`), arXiv 2502.05171: prelude, a core looped from a random state, coda."""

from __future__ import annotations

import math
from typing import Any

from loopdiag.model.checkpoints.common import Keys, Names, Rows, count, number, refuse_unbuilt
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "huginn_raven"
DESCRIPTION = "Huginn-0125: recurrent depth between prelude and coda"
HUB = "tomg-group-umd/huginn-0125"
BUILT = {
    "bias": (False, None),
    "block_class_name": ("SandwichBlock",),
    "injection_type": ("linear",),
    "mlp_class_name": ("GatedMLP",),
    "nonlin_name": ("SiLU",),
    "norm_class_name": ("RMSNorm_llama",),
    "state_init": ("like-init",),
    "test_time_noise": (0, None),
}
STAGES = {"prelude_blocks": "prelude", "blocks": "core_block", "coda_blocks": "coda"}


def sizes(keys: Keys) -> dict[str, Any]:
    """The part of a `LoopedConfig` that the family shares with models cut out of pretrained ones (`retrofitted`)."""
    refuse_unbuilt(keys, BUILT)
    return {
        "vocab_size": keys.get("padded_vocab_size") or keys["vocab_size"],
        "d_model": keys["n_embd"],
        "n_layers": keys["n_layers_in_recurrent_block"],
        "n_prelude": keys["n_layers_in_prelude"],
        "n_coda": keys["n_layers_in_coda"],
        "n_heads": keys["n_heads"],
        "n_kv_heads": keys.get("num_key_value_heads") or keys["n_heads"],
        "d_head": count(keys, "n_embd") // count(keys, "n_heads"),
        "d_mlp": keys["intermediate_size"],
        "n_loops": keys["mean_recurrence"],
    }


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    fitting = sizes(keys)
    if keys["qk_bias"] and fitting["n_kv_heads"] != fitting["n_heads"]:
        raise ValueError("num_key_value_heads and n_heads differ, which is not built with qk_bias.")
    return LoopedConfig(
        **fitting,
        n_ctx=keys["block_size"],
        embed_multiplier=math.sqrt(keys["n_embd"]),
        initial_state="random",
        # sqrt(2 / (5 n_embd)), times the embedding's multiplier.
        initial_std=math.sqrt(2 / 5),
        offset=0,
        injection="concat",
        memory="own",
        norms="pre_post",
        norm_between_loops=False,
        norm_before_coda=True,
        qk_bias=keys["qk_bias"],
        rope_base=number(keys, "rope_base"),
        rope_pairs="adjacent",
        rope_table=True,
        norm_eps=keys["norm_eps"],
        tie_embeddings=keys["tie_embeddings"],
    )


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    norms = {f"ln{n}{kind}.weight": f"norm_{2 * n - (not kind)}.weight" for n in (1, 2) for kind in ("", "_post")}
    names = stacked_names(cfg, norms)
    names["rope_table.table"] = Rows("freqs_cis", 0, 1, (1, cfg.n_ctx, 1, cfg.d_head // 2, 2))
    if cfg.qk_bias:
        for ours, theirs in _layers(cfg):
            for row, p in enumerate("qk"):
                shape = (2, 1, cfg.n_heads, cfg.d_head)
                names[f"{ours}.attn.{p}_proj.bias"] = Rows(f"{theirs}.attn.qk_bias", row, row + 1, shape)
    return names


def stacked_names(cfg: LoopedConfig, norms: dict[str, str]) -> Names:
    """Names of everything but what Huginn alone has; one matrix holds [q; k; v], and one [gate; up]."""
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    qkv, fc = (q + 2 * kv, cfg.d_model), (2 * cfg.d_mlp, cfg.d_model)
    names: Names = {
        "embed.weight": "transformer.wte.weight",
        "adapter.weight": "transformer.adapter.weight",
        "ln_final.weight": "transformer.ln_f.weight",
        "head.weight": "lm_head.weight",
    }
    for ours, theirs in _layers(cfg):
        for p, start, stop in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            names[f"{ours}.attn.{p}_proj.weight"] = Rows(f"{theirs}.attn.Wqkv.weight", start, stop, qkv)
        for p, start in (("gate", 0), ("up", cfg.d_mlp)):
            names[f"{ours}.mlp.{p}_proj.weight"] = Rows(f"{theirs}.mlp.fc.weight", start, start + cfg.d_mlp, fc)
        names[f"{ours}.attn.o_proj.weight"] = f"{theirs}.attn.proj.weight"
        names[f"{ours}.mlp.down_proj.weight"] = f"{theirs}.mlp.proj.weight"
        names |= {f"{ours}.{norm}": f"{theirs}.{their_norm}" for norm, their_norm in norms.items()}
    return names


def _layers(cfg: LoopedConfig) -> list[tuple[str, str]]:
    """Our name and theirs of every layer."""
    counts = {"prelude_blocks": cfg.n_prelude, "blocks": cfg.n_layers, "coda_blocks": cfg.n_coda}
    return [
        (f"{ours}.{layer}", f"transformer.{theirs}.{layer}")
        for ours, theirs in STAGES.items()
        for layer in range(counts[ours])
    ]
