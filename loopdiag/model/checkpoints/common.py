"""What the families' files share: the usual Llama keys and names, and how a stored tensor that holds several is cut."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from loopdiag.model.config import COUNTS, LoopedConfig, RopeScaling

Keys = Mapping[str, Any]
LARGEST_COUNT = max(most for _, most in COUNTS.values())  # what each may be, `LoopedConfig` knows


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a stored tensor of this shape."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


Names = dict[str, "str | Rows"]

# Settings that change the computation, with what is built.
LLAMA_BUILT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
}


def kept(keys: Keys, name: str, kind: type | tuple[type, ...], allowed: str) -> Any:
    """A value that must be of a kind.

    Raises:
        KeyError: It is missing.
        ValueError: It is of another kind.
    """
    if not isinstance(keys[name], kind) or (isinstance(keys[name], bool) and kind is not bool):
        raise ValueError(f"{name} = {short(keys[name])} is not allowed: it must be {allowed}.")
    return keys[name]


def number(keys: Keys, name: str) -> float:
    """A number, refused as in `kept`."""
    value = kept(keys, name, (int, float), "a number")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} = {short(value)} is not allowed: it must be a finite number.")
    return float(value)


def count(keys: Keys, name: str) -> int:
    """An integer from 1 on, refused as in `kept`."""
    value = kept(keys, name, int, "an integer >= 1")
    if not 1 <= value <= LARGEST_COUNT:
        raise ValueError(f"{name} = {short(value)} is not allowed: it must be an integer from 1 to {LARGEST_COUNT}.")
    return value


ROPE_KEYS = {
    *("rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
}


def refuse_unbuilt(keys: Keys, built: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse settings that this toolkit does not build.

    Raises:
        ValueError: A key of `built` is present with another value than the listed ones.
    """
    for key, allowed in built.items():
        if key in keys and keys[key] not in allowed:
            raise ValueError(f"{key} = {short(keys[key])} is not built: allowed is {' or '.join(map(repr, allowed))}.")


def rotary(keys: Keys) -> dict[str, Any]:
    """`rope_base` and `rope_scaling`, from the keys of transformers 4 or from `rope_parameters` of transformers 5.

    Raises:
        KeyError: No base.
        ValueError: A scaling other than that of Llama 3.
    """
    name = "rope_parameters" if keys.get("rope_parameters") else "rope_scaling"
    given = kept(keys, name, dict, "an object, or null") if keys.get(name) else {}
    if unknown := sorted(set(given) - ROPE_KEYS) + sorted(set(keys) & {"partial_rotary_factor"}):
        raise ValueError(f"{name}: {', '.join(unknown)} are not built: allowed are {', '.join(sorted(ROPE_KEYS))}.")
    kind = given.get("rope_type", given.get("type", "default"))
    base = number(given if given.get("rope_theta") else keys, "rope_theta")
    if kind == "default":
        return {"rope_base": base}
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind!r} is not built: allowed are none, 'default' and 'llama3'.")
    scaling = RopeScaling(
        factor=given["factor"],
        low_freq_factor=given["low_freq_factor"],
        high_freq_factor=given["high_freq_factor"],
        original_n_ctx=given["original_max_position_embeddings"],
    )
    return {"rope_base": base, "rope_scaling": scaling}


def llama_sizes(keys: Keys) -> dict[str, Any]:
    """The part of a `LoopedConfig` that the usual Llama keys say.

    Raises:
        KeyError: A key is missing; only the number of key/value heads, the width of a head and the tie have defaults.
        ValueError: A setting that is not built.
    """
    refuse_unbuilt(keys, LLAMA_BUILT)
    heads = count(keys, "num_attention_heads")
    return {
        "vocab_size": keys["vocab_size"],
        "d_model": keys["hidden_size"],
        "n_layers": keys["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": keys.get("num_key_value_heads") or heads,
        "d_head": keys.get("head_dim") or count(keys, "hidden_size") // heads,
        "d_mlp": keys["intermediate_size"],
        "n_ctx": keys["max_position_embeddings"],
        "norm_eps": keys["rms_norm_eps"],
        "tie_embeddings": keys.get("tie_word_embeddings", False),
        **rotary(keys),
    }


def llama_names(cfg: LoopedConfig, parts: Mapping[str, str] | None = None) -> Names:
    """Our parameter names, each with its name in the Llama layout.

    Args:
        cfg: The configuration.
        parts: What a layer has beyond Llama's, or names otherwise.
    """
    layer_parts = {
        "ln1.weight": "input_layernorm.weight",
        "ln2.weight": "post_attention_layernorm.weight",
        **{f"attn.{p}_proj.weight": f"self_attn.{p}_proj.weight" for p in "qkvo"},
        **{f"mlp.{p}_proj.weight": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
        **(parts or {}),
    }
    return {
        "embed.weight": "model.embed_tokens.weight",
        "ln_final.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        **{
            f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}"
            for layer in range(cfg.n_layers)
            for ours, theirs in layer_parts.items()
        },
    }


PLAIN_LOOPS: dict[str, Any] = {"offset": 0, "injection": "none", "memory": "own"}
"""The whole stack again and again: nothing shifted, nothing injected, keys and values of every loop its own."""
