"""The design space of looped decoders, as one frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Injection = Literal["none", "add"]
Memory = Literal["own", "first"]
GateInput = Literal["hidden", "query"]


@dataclass(frozen=True)
class LoopedConfig:
    """Every choice that tells one looped decoder from another.

    A family of models is a setting of this class and an ablation is a changed setting
    (`dataclasses.replace(cfg, offset=0)`). The defaults are those of a Parallel Loop Transformer.

    Attributes:
        vocab_size: Number of tokens.
        d_model: Width of the residual stream.
        n_layers: Layers of the shared block, passed once in every loop.
        n_heads: Query heads.
        n_kv_heads: Key/value heads; divides `n_heads` (query head h reads key/value head
            `h // (n_heads // n_kv_heads)`).
        d_head: Width of a head; even, for RoPE. Need not be `d_model / n_heads`.
        d_mlp: Width of the SwiGLU hidden layer.
        n_ctx: Longest sequence the model was made for, in tokens.
        n_loops: Loops the model was trained with. A run may ask for more or fewer.
        offset: Cross-loop position offset in tokens: loop r at token i starts from loop r-1 at token
            i - offset. 0 is the same token, 1 a Parallel Loop Transformer.
        injection: What enters loop r >= 2, S being the shifted carry: `"none"`: S; `"add"`:
            `embed_scale * E + carry_scale * S`.
        embed_scale: Scale a of the embedding in loops r >= 2.
        carry_scale: Scale b of the carry in loops r >= 2.
        memory: `"own"`: each loop attends to its own keys and values. `"first"`: loops r >= 2 blend
            loop 1's keys and values, seen in full, with a sliding window over their own.
        window: Tokens the sliding window sees, the token itself included.
        gate_input: What the blending gate reads: the layer input through a norm of its own
            (`"hidden"`) or the rotated query of its head (`"query"`).
        norm_between_loops: Whether the final norm is applied to what one loop hands to the next.
        rope_base: Base of the rotary position embedding (rotate-half pairs).
        norm_eps: Epsilon of every RMSNorm.
        tie_embeddings: Whether the unembedding is the embedding matrix.

    Raises:
        ValueError: A value outside its range; the message names it, what is allowed and what came.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    n_ctx: int
    n_loops: int
    offset: int = 1
    injection: Injection = "add"
    embed_scale: float = 0.707
    carry_scale: float = 0.053
    memory: Memory = "first"
    window: int = 65
    gate_input: GateInput = "hidden"
    norm_between_loops: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads"),
            *("d_head", "d_mlp", "n_ctx", "n_loops", "window"),
        ):
            _require(name, getattr(self, name), _is_int(getattr(self, name), 1), "an integer >= 1")
        _require("offset", self.offset, _is_int(self.offset, 0), "an integer >= 0")
        for name, allowed in (("injection", Injection), ("memory", Memory), ("gate_input", GateInput)):
            choices = get_args(allowed)
            _require(name, getattr(self, name), getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("embed_scale", "carry_scale"):
            _require(name, getattr(self, name), _is_finite(getattr(self, name)), "a finite number")
        for name in ("rope_base", "norm_eps"):
            value = getattr(self, name)
            _require(name, value, _is_finite(value) and value > 0, "a finite number > 0")
        for name in ("norm_between_loops", "tie_embeddings"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        _require(
            "n_kv_heads", self.n_kv_heads, self.n_heads % self.n_kv_heads == 0, f"a divisor of n_heads = {self.n_heads}"
        )
        _require("d_head", self.d_head, self.d_head % 2 == 0, "an even integer, since RoPE turns pairs")

    @property
    def normalization_type(self) -> str:
        """The norm's name in TransformerLens, whose cache helpers ask for it."""
        return "RMS"


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(name: str, value: Any, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"LoopedConfig: {name} = {value!r} is not allowed: it must be {allowed}.")
