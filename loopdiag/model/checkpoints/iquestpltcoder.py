"""LoopCoder-V2, the released Parallel Loop Transformer (`Multilingual-Multimodal-NLP/LoopCoder-V2`).

Semantics: the vendor's inference fork (vLLM), since the release holds no modeling code. Two public ports got them
wrong: the shift is not in the fork's model file but in its runner, and a window of [64, 0] is 65 tokens, the token
itself included.
"""

from __future__ import annotations

from typing import Any

from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "iquestpltcoder"
DESCRIPTION = "Parallel Loop Transformers: LoopCoder-V2 and the bundled family"

# What a missing key means, from the vendor's configuration class. Keys without a default are required.
DEFAULTS: dict[str, Any] = {
    "plt_num_loops": 2,
    "plt_window_size": [64, 0],
    "plt_normalize_per_loop": True,
    "plt_emb_scale": None,
    "plt_hidden_scale": None,
    "plt_gate_use_hidden_states": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
# Settings that change the computation and that this family's released files never turn on.
UNSUPPORTED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "hidden_act": ("silu", None),
}


def read_config(keys: dict[str, Any]) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes.

    Raises:
        ValueError: A key is missing, out of range, or asks for something this family does not have.
    """
    for key, allowed in UNSUPPORTED.items():
        if keys.get(key) not in allowed:
            raise ValueError(
                f"config.json: {key} = {keys[key]!r} is not supported for {MODEL_TYPE}: allowed is {allowed[0]!r}."
            )
    full = DEFAULTS | keys
    try:
        heads = full["num_attention_heads"]
        left, right = full["plt_window_size"]
        if right != 0:
            raise ValueError(f"config.json: plt_window_size = [{left}, {right}] looks ahead: allowed is [n, 0].")
        return LoopedConfig(
            vocab_size=full["vocab_size"],
            d_model=full["hidden_size"],
            n_layers=full["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=full.get("num_key_value_heads", heads),
            # The fork ignores `head_dim`; in every known file the two agree, and read_weights checks shapes.
            d_head=full.get("head_dim") or full["hidden_size"] // heads,
            d_mlp=full["intermediate_size"],
            n_ctx=full["max_position_embeddings"],
            n_loops=full["plt_num_loops"],
            offset=1,
            injection="add",
            embed_scale=_one_if_null(full["plt_emb_scale"]),
            carry_scale=_one_if_null(full["plt_hidden_scale"]),
            memory="first",
            window=left + 1,
            gate_input="hidden" if full["plt_gate_use_hidden_states"] else "query",
            norm_between_loops=full["plt_normalize_per_loop"],
            rope_base=float(full["rope_theta"]),
            norm_eps=full["rms_norm_eps"],
            tie_embeddings=full["tie_word_embeddings"],
        )
    except KeyError as missing:
        raise ValueError(f"config.json: the key {missing} is missing; {MODEL_TYPE} needs it.") from None


def _one_if_null(scale: float | None) -> float:
    return 1.0 if scale is None else float(scale)


def write_config(cfg: LoopedConfig) -> dict[str, Any]:
    """The `config.json` of a model; `read_config` gives `cfg` back.

    Raises:
        ValueError: `cfg` is no Parallel Loop Transformer, so this layout cannot say it.
    """
    wanted = {"offset": 1, "injection": "add", "memory": "first"}
    for name, value in wanted.items():
        if getattr(cfg, name) != value:
            raise ValueError(
                f"{MODEL_TYPE} cannot store {name} = {getattr(cfg, name)!r}: it has {name} = {value!r} built in."
            )
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


def weight_names(cfg: LoopedConfig) -> dict[str, str]:
    """Our parameter names, each with the released tensor's name."""
    names = {"embed.weight": "model.embed_tokens.weight", "ln_final.weight": "model.norm.weight"}
    if not cfg.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    parts = {
        "ln1.weight": "input_layernorm.weight",
        "ln2.weight": "post_attention_layernorm.weight",
        "attn.gate.weight": "self_attn.plt_gate.weight",
        "attn.gate.bias": "self_attn.plt_gate.bias",
    }
    if cfg.gate_input == "hidden":
        parts["attn.gate.norm.weight"] = "self_attn.plt_gate.gate_norm.weight"
    parts |= {f"attn.{p}_proj.weight": f"self_attn.{p}_proj.weight" for p in "qkvo"}
    parts |= {f"mlp.{p}_proj.weight": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    for layer in range(cfg.n_layers):
        names |= {f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in parts.items()}
    return names
