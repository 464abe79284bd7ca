"""LoopCoder-V2, the released Parallel Loop Transformer (`Multilingual-Multimodal-NLP/LoopCoder-V2`).

Semantics: the vendor's inference fork (vLLM), since the release holds no modeling code. Two public ports got them
wrong: the shift is not in the fork's model file but in its runner, and a window of [64, 0] is 65 tokens, the token
itself included.
"""

from __future__ import annotations

from typing import Any

from loopdiag.model.checkpoints.common import Keys, Names, kept, llama_names, llama_sizes, number
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "iquestpltcoder"
DESCRIPTION = "Parallel Loop Transformers: LoopCoder-V2 and the bundled family"
HUB = "Multilingual-Multimodal-NLP/LoopCoder-V2"

# What a missing key means, from the vendor's configuration class.
DEFAULTS: dict[str, Any] = {
    "plt_num_loops": 2,
    "plt_window_size": [64, 0],
    "plt_normalize_per_loop": True,
    "plt_emb_scale": None,
    "plt_hidden_scale": None,
    "plt_gate_use_hidden_states": False,
}


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    full = DEFAULTS | dict(keys)
    match full["plt_window_size"]:
        case [int(left), 0]:
            pass
        case other:
            raise ValueError(f"plt_window_size = {other!r} is not built: allowed is [n, 0], n tokens to the left.")
    return LoopedConfig(
        # The vendor's fork ignores `head_dim`; in every known file it is hidden_size / heads.
        **llama_sizes(keys),
        n_loops=full["plt_num_loops"],
        offset=1,
        injection="add",
        embed_scale=1.0 if full["plt_emb_scale"] is None else number(full, "plt_emb_scale"),
        carry_scale=1.0 if full["plt_hidden_scale"] is None else number(full, "plt_hidden_scale"),
        memory="first",
        window=left + 1,
        gate_input="hidden" if kept(full, "plt_gate_use_hidden_states", bool, "true or false") else "query",
        norm_between_loops=full["plt_normalize_per_loop"],
    )


def write_config(cfg: LoopedConfig) -> dict[str, Any]:
    """The `config.json` of a model; `read_config` gives `cfg` back.

    Raises:
        ValueError: `cfg` is no Parallel Loop Transformer, so this layout cannot say it.
    """
    keys = _written(cfg)
    said = read_config(keys)
    # Whatever the layout has no key for must be what it has built in.
    if cfg.d_head * cfg.n_heads != cfg.d_model:
        raise ValueError(f"{MODEL_TYPE} cannot store d_head = {cfg.d_head}: it takes d_model / n_heads for it.")
    if lost := [name for name, value in vars(cfg).items() if value != getattr(said, name)]:
        raise ValueError(f"{MODEL_TYPE} cannot store " + ", ".join(f"{n} = {getattr(cfg, n)!r}" for n in lost) + ".")
    return keys


def _written(cfg: LoopedConfig) -> dict[str, Any]:
    return {
        "architectures": ["IQuestPLTCoderForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "intermediate_size": cfg.d_mlp,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "tie_word_embeddings": cfg.tie_embeddings,
        "plt_num_loops": cfg.n_loops,
        "plt_window_size": [cfg.window - 1, 0],
        "plt_normalize_per_loop": cfg.norm_between_loops,
        "plt_emb_scale": cfg.embed_scale,
        "plt_hidden_scale": cfg.carry_scale,
        "plt_gate_use_hidden_states": cfg.gate_input == "hidden",
    }


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    parts = {f"attn.gate.{part}": f"self_attn.plt_gate.{part}" for part in ("weight", "bias")}
    if cfg.gate_input == "hidden":
        parts["attn.gate.norm.weight"] = "self_attn.plt_gate.gate_norm.weight"
    return llama_names(cfg, parts)
