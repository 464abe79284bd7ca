"""The design space of looped decoders, as one frozen dataclass."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Literal, get_args

Injection = Literal["none", "add", "concat"]
InitialState = Literal["embedding", "random"]
Memory = Literal["own", "first"]
GateInput = Literal["hidden", "query"]
Norms = Literal["pre", "sandwich", "pre_post", "post"]
RopePairs = Literal["half", "adjacent"]

CHOICES: dict[str, Any] = {
    "initial_state": InitialState,
    "injection": Injection,
    "memory": Memory,
    "gate_input": GateInput,
    "norms": Norms,
    "rope_pairs": RopePairs,
}
# Smallest and largest value of what is counted. Far above every model there is, and small enough that no product of
# them overflows and a model of them is put together (without weights) in seconds.
COUNTS = {
    "vocab_size": (1, 2**24),
    "d_model": (1, 2**18),
    "n_layers": (1, 2**9),
    "n_heads": (1, 2**12),
    "n_kv_heads": (1, 2**12),
    "d_head": (1, 2**14),
    "d_mlp": (1, 2**20),
    "n_ctx": (1, 2**31),
    "n_loops": (1, 2**12),
    "window": (1, 2**31),
    "n_prelude": (0, 2**9),
    "n_coda": (0, 2**9),
    "offset": (0, 2**12),
}
MOST_PASSES = 2**12  # through layers, in the loops of a run as trained


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the rotary embedding: slow rotations are slowed further, fast ones kept.

    Attributes:
        factor: How much slower the slow ones turn.
        low_freq_factor: Pairs that turn fewer times than this over `original_n_ctx` tokens are slow.
        high_freq_factor: Pairs that turn more often than this are fast; between the two it is blended.
        original_n_ctx: Context before the stretch, in tokens.

    Raises:
        ValueError: A value that is not a number > 0, or two equal factors.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_n_ctx: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require(f"rope_scaling.{name}", value, _is_finite(value) and value > 0, "a finite number > 0")
        low, high = self.low_freq_factor, self.high_freq_factor
        _require("rope_scaling.high_freq_factor", high, high > low, f"greater than low_freq_factor = {low}")


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
        n_prelude: Layers passed once before the loops. What leaves them is E, the start of the loops.
        n_coda: Layers passed once after the loops, on the way to the head.
        embed_multiplier: Scale of the token embedding as it enters the model.
        initial_state: What stands for Z_0: `"embedding"`: loop 1 starts from E as it is; `"random"`: a
            random state enters loop 1 through the injection.
        initial_std: Standard deviation of the random state's normal distribution, cut at three of them.
        offset: Cross-loop position offset in tokens: loop r at token i starts from loop r-1 at token
            i - offset. 0 is the same token, 1 a Parallel Loop Transformer.
        injection: What enters a loop, S being the shifted carry: `"none"`: S; `"add"`:
            `embed_scale * E + carry_scale * S`; `"concat"`: a linear map of [S; E].
        embed_scale: Scale a of E in the injection.
        carry_scale: Scale b of the carry in the injection.
        memory: `"own"`: each loop attends to its own keys and values. `"first"`: loops r >= 2 blend
            loop 1's keys and values, seen in full, with a sliding window over their own.
        window: Tokens the sliding window sees, the token itself included.
        gate_input: What the blending gate reads: the layer input through a norm of its own
            (`"hidden"`) or the rotated query of its head (`"query"`).
        norms: Where a layer normalises, f being attention or MLP: `"pre"`: x + f(N(x)); `"sandwich"`:
            x + N'(f(N(x))); `"pre_post"`: N'(x + f(N(x))); `"post"`: N'(x + f(x)).
        norm_between_loops: Whether the final norm is applied to what one loop hands to the next.
        norm_before_coda: Whether the final norm is applied to what the coda reads (and again to what it gives).
        qk_bias: Whether queries and keys have a bias, added before RoPE.
        rope_base: Base of the rotary position embedding.
        rope_scaling: Stretch of the rotary embedding, or None.
        rope_pairs: Which entries of a head turn together: i and i + d_head / 2 (`"half"`), or 2i and
            2i + 1 (`"adjacent"`).
        rope_table: Whether the rotations come as a table of `n_ctx` positions with the weights, instead of being
            computed from `rope_base`.
        exit_gate: Whether the model has a gate that says, after every loop, how likely it is to leave.
        exit_threshold: Cumulative probability at which the model's own early exit leaves.
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
    n_prelude: int = 0
    n_coda: int = 0
    embed_multiplier: float = 1.0
    initial_state: InitialState = "embedding"
    initial_std: float = 1.0
    offset: int = 1
    injection: Injection = "add"
    embed_scale: float = 0.707
    carry_scale: float = 0.053
    memory: Memory = "first"
    window: int = 65
    gate_input: GateInput = "hidden"
    norms: Norms = "pre"
    norm_between_loops: bool = True
    norm_before_coda: bool = False
    qk_bias: bool = False
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_pairs: RopePairs = "half"
    rope_table: bool = False
    exit_gate: bool = False
    exit_threshold: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name)
            _require(name, value, _is_int(value, least) and value <= most, f"an integer from {least} to {most}")
        passes = self.n_layers * self.n_loops
        _require("n_layers * n_loops", passes, passes <= MOST_PASSES, f"at most {MOST_PASSES}")
        for name, allowed in CHOICES.items():
            choices = get_args(allowed)
            _require(name, getattr(self, name), getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("embed_multiplier", "embed_scale", "carry_scale"):
            _require(name, getattr(self, name), _is_finite(getattr(self, name)), "a finite number")
        for name in ("initial_std", "rope_base", "exit_threshold", "norm_eps"):
            value = getattr(self, name)
            _require(name, value, _is_finite(value) and value > 0, "a finite number > 0")
        _require(
            "rope_scaling",
            self.rope_scaling,
            self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling),
            "a RopeScaling or None",
        )
        for name in (
            *("norm_between_loops", "norm_before_coda", "qk_bias"),
            *("rope_table", "exit_gate", "tie_embeddings"),
        ):
            _require(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        _require(
            "n_kv_heads", self.n_kv_heads, self.n_heads % self.n_kv_heads == 0, f"a divisor of n_heads = {self.n_heads}"
        )
        _require("d_head", self.d_head, self.d_head % 2 == 0, "an even integer, since RoPE turns pairs")
        _require(
            "initial_state",
            self.initial_state,
            self.initial_state == "embedding" or self.injection != "none",
            "embedding where injection = 'none', or no token would ever enter the loops",
        )

    @property
    def normalization_type(self) -> str:
        """The norm's name in TransformerLens, whose cache helpers ask for it."""
        return "RMS"


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _require(name: str, value: Any, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"LoopedConfig: {name} = {short(value)} is not allowed: it must be {allowed}.")
