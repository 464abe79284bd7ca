"""The parts of one layer, and the hook points that each loop owns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from loopdiag.model.config import LoopedConfig, RopePairs

Heads = Float[Tensor, "batch pos head d_head"]
KeyHeads = Float[Tensor, "batch key kv_head d_head"]
KeyValue = tuple[KeyHeads, KeyHeads]
# What the global branch of a blend reads: loop 1's, or for once the loop's own. None where nothing is blended.
Memory = KeyValue | Literal["own"] | None
# This run's keys and values, with those that earlier runs left behind before them.
Extend = Callable[[KeyValue], KeyValue]


class AttentionHooks(nn.Module):
    """Hook points of one attention in one loop; the names are TransformerLens' where it has one."""

    def __init__(self, blends: bool) -> None:
        super().__init__()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        if blends:
            self.hook_pattern_global, self.hook_pattern_local = HookPoint(), HookPoint()
            self.hook_z_global, self.hook_z_local = HookPoint(), HookPoint()
            self.hook_gate = HookPoint()
        else:
            self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()


class LayerHooks(nn.Module):
    """Hook points of one layer in one loop."""

    def __init__(self, blends: bool) -> None:
        super().__init__()
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.attn = AttentionHooks(blends)


class LoopHooks(nn.Module):
    """Hook points of one loop. They hold no weights: those stand once, under `blocks`."""

    def __init__(self, cfg: LoopedConfig, loop: int) -> None:
        super().__init__()
        blends = cfg.memory == "first" and loop > 1
        if loop > 1 or cfg.initial_state == "random":
            self.hook_carry = HookPoint()
        self.hook_in = HookPoint()
        self.blocks = nn.ModuleList(LayerHooks(blends) for _ in range(cfg.n_layers))
        self.hook_out_pre_norm, self.hook_out = HookPoint(), HookPoint()
        if cfg.exit_gate:
            self.hook_exit_gate = HookPoint()
        if cfg.n_coda:
            self.hook_coda_out = HookPoint()
        self.hook_readout = HookPoint()

    def reads_out(self) -> bool:
        """Whether somebody asks for the exit after this loop."""
        return self.hook_readout.has_hooks() or (hasattr(self, "hook_coda_out") and self.hook_coda_out.has_hooks())


class PreludeHooks(nn.Module):
    """Hook points of the layers before the loops."""

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LayerHooks(blends=False) for _ in range(cfg.n_prelude))
        self.hook_out = HookPoint()


class CodaHooks(nn.Module):
    """Hook points of the layers after the loops."""

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.hook_in = HookPoint()
        self.blocks = nn.ModuleList(LayerHooks(blends=False) for _ in range(cfg.n_coda))


class RopeTable(nn.Module):
    """Rotations as a checkpoint stores them: cos and sin by position and pair.

    They stay in float32 whatever the model is cast to: rounded to bfloat16, they move logits.
    """

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.zeros(cfg.n_ctx, cfg.d_head // 2, 2))

    def fill(self, cfg: LoopedConfig) -> None:
        """The rotations of `cfg`, for a model that is made rather than loaded."""
        cos, sin = _angles(cfg, torch.arange(cfg.n_ctx, device=self.table.device)[None], None)
        self.table.copy_(torch.stack((cos[0, :, 0], sin[0, :, 0]), dim=-1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RopeTable:
        kept = self.table
        super()._apply(fn, recurse)
        if self.table.dtype != kept.dtype:
            self.table = kept.to(self.table.device)
        return self


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a run stand and what each may see; the same for every loop and layer.

    Attributes:
        positions: Of the tokens in their documents.
        cos, sin: Rotations of the tokens.
        causal: Allowed keys of the full attention, or None when plain causality says it all.
        local: Allowed keys of the sliding window; None where no loop has one.
        real: False on padding, or None when there is none.
        seen: Tokens of earlier runs, which go before these.
    """

    positions: Int[Tensor, "#batch pos"]
    cos: Float[Tensor, "#batch pos 1 half"]
    sin: Float[Tensor, "#batch pos 1 half"]
    causal: Bool[Tensor, "#batch 1 pos key"] | None
    local: Bool[Tensor, "#batch 1 pos near"] | None
    real: Bool[Tensor, "batch pos"] | None
    seen: int

    @classmethod
    def of(
        cls,
        cfg: LoopedConfig,
        input_ids: Int[Tensor, "batch pos"],
        mask: Tensor | None,
        dtype: torch.dtype,
        table: RopeTable | None = None,
        seen: int = 0,
    ) -> Layout:
        """Positions count real tokens only, so that padding on either side changes nothing.

        Args:
            cfg: The model's.
            input_ids: Tokens of this run.
            mask: True on real tokens; None where nothing is padded.
            dtype: What the model runs in.
            table: Rotations that came with the weights.
            seen: Tokens of earlier runs, whose keys and values are kept and go before these.
        """
        device, length = input_ids.device, input_ids.shape[1]
        index = torch.arange(seen + length, device=device)
        positions = index[None, seen:] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        causal = local = None
        if seen or mask is not None or cfg.memory == "first":
            query, key = index[seen:, None], index[None, :]
            visible = (query >= key)[None, None]
            if mask is not None:
                # A padding query keeps itself in sight: a row without a key has no softmax.
                visible = (visible & mask[:, None, None, :]) | (query == key)[None, None]
            if seen or mask is not None:
                causal = visible
            if cfg.memory == "first":
                near = visible & (query < key + cfg.window)[None, None]
                local = near[..., seen - min(seen, cfg.window - 1) :]  # no more is kept of the window
        cos, sin = _angles(cfg, positions, table)
        # Half precisions are turned in float32: angles rounded to bfloat16 move logits.
        dtype = torch.promote_types(dtype, torch.float32)
        return cls(positions, cos.to(dtype), sin.to(dtype), causal, local, mask, seen)

    def to(self, device: torch.device) -> Layout:
        """For a layer on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def _angles(cfg: LoopedConfig, positions: Int[Tensor, "#batch pos"], table: RopeTable | None) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, pos, 1, half] of every pair."""
    if table is not None:
        cos, sin = table.table[positions].unsqueeze(2).unbind(-1)
        return cos, sin
    # In float64 whatever the model runs in: at long contexts float32 angles are off by 1e-3.
    pair = torch.arange(0, cfg.d_head, 2, device=positions.device, dtype=torch.float64)
    speed = cfg.rope_base ** (-pair / cfg.d_head)
    if cfg.rope_scaling is not None:
        scaling = cfg.rope_scaling
        turns = scaling.original_n_ctx * speed / (2 * math.pi)
        slow, fast = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / scaling.factor)
    angle = positions[:, :, None, None].double() * speed
    return angle.cos(), angle.sin()


def rotate(x: Heads, layout: Layout, pairs: RopePairs) -> Heads:
    """RoPE on the pairs (i, i + d_head / 2) or (2i, 2i + 1)."""
    if pairs == "half":
        first, second = x.chunk(2, dim=-1)
    else:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = first * layout.cos - second * layout.sin, second * layout.cos + first * layout.sin
    return (torch.cat(turned, dim=-1) if pairs == "half" else torch.stack(turned, dim=-1).flatten(-2)).to(x.dtype)


def attend(q: Heads, k: KeyHeads, v: KeyHeads, allowed: Tensor | None, hook_pattern: HookPoint) -> Heads:
    """Attention of every query head; `allowed=None` is plain causality.

    The pattern [batch, head, query, key] exists only while a hook asks for it; what the hook returns
    is then what weighs the values.
    """
    shared = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)))
    if not hook_pattern.has_hooks():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None).transpose(1, 2)
    if allowed is None:
        allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    pattern = hook_pattern(scores.masked_fill(~allowed, float("-inf")).softmax(-1))
    return (pattern @ v).transpose(1, 2)


class Gate(nn.Module):
    """Weight of the global branch, per head and position: sigmoid of an affine map.

    Weights and bias start at zero, an even blend.
    """

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.reads_hidden = cfg.gate_input == "hidden"
        self.weight = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_model if self.reads_hidden else cfg.d_head))
        self.bias = nn.Parameter(torch.zeros(cfg.n_heads))
        if self.reads_hidden:
            self.norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(self, resid_pre: Float[Tensor, "batch pos d_model"], q: Heads) -> Float[Tensor, "batch pos head"]:
        if self.reads_hidden:
            return torch.sigmoid(F.linear(self.norm(resid_pre), self.weight, self.bias))
        return torch.sigmoid((q * self.weight).sum(-1) + self.bias)


class Attention(nn.Module):
    """Grouped-query attention whose keys and values may be shared across loops."""

    def __init__(self, cfg: LoopedConfig, looped: bool) -> None:
        super().__init__()
        self.d_head, self.rope_pairs = cfg.d_head, cfg.rope_pairs
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.d_head, bias=cfg.qk_bias)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head, bias=cfg.qk_bias)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=False)
        if looped and cfg.memory == "first":
            self.gate = Gate(cfg)

    def forward(
        self,
        normed: Float[Tensor, "batch pos d_model"],
        resid_pre: Float[Tensor, "batch pos d_model"],
        layout: Layout,
        hooks: AttentionHooks,
        memory: Memory,
        extend: Extend | None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], KeyValue]:
        """Attention output, and the rotated keys and the values that it saw as its own.

        With `memory` (loop 1's keys and values) the output blends attention to the memory with a
        sliding window over this call's own; `"own"` takes these for the memory, too.
        """
        q, k, v = (
            hook(project(normed).unflatten(-1, (-1, self.d_head)))
            for project, hook in (
                (self.q_proj, hooks.hook_q),
                (self.k_proj, hooks.hook_k),
                (self.v_proj, hooks.hook_v),
            )
        )
        q = hooks.hook_rot_q(rotate(q, layout, self.rope_pairs))
        k = hooks.hook_rot_k(rotate(k, layout, self.rope_pairs))
        if extend is not None:
            k, v = extend((k, v))
        if memory is None:
            z = attend(q, k, v, layout.causal, hooks.hook_pattern)
        else:
            kept: KeyValue = (k, v) if isinstance(memory, str) else memory
            everywhere = hooks.hook_z_global(attend(q, *kept, layout.causal, hooks.hook_pattern_global))
            nearby = hooks.hook_z_local(attend(q, k, v, layout.local, hooks.hook_pattern_local))
            gate = hooks.hook_gate(self.gate(resid_pre, q)).unsqueeze(-1)
            z = gate * everywhere + (1 - gate) * nearby
        return self.o_proj(hooks.hook_z(z).flatten(-2)), (k, v)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.down_proj = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer: attention and MLP, each adding to the residual stream; `LoopedConfig.norms` says where it normalises.

    Args:
        cfg: The model's.
        looped: Whether it belongs to the shared block; layers of prelude and coda blend no branches.
    """

    def __init__(self, cfg: LoopedConfig, looped: bool = True) -> None:
        super().__init__()
        self.norms = cfg.norms

        def norm(there: bool) -> nn.Module:
            return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps) if there else nn.Identity()

        before, after = cfg.norms != "post", cfg.norms != "pre"
        self.ln1, self.ln1_post = norm(before), norm(after)
        self.attn = Attention(cfg, looped)
        self.ln2, self.ln2_post = norm(before), norm(after)
        self.mlp = SwiGLU(cfg)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        layout: Layout,
        hooks: LayerHooks,
        memory: Memory = None,
        extend: Extend | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], KeyValue]:
        x = hooks.hook_resid_pre(x)
        attn_out, made = self.attn(self.ln1(x), x, layout, hooks.attn, memory, extend)
        x = hooks.hook_resid_mid(self.add(x, attn_out, self.ln1_post))
        return hooks.hook_resid_post(self.add(x, self.mlp(self.ln2(x)), self.ln2_post)), made

    def add(self, x: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        """The residual stream with an update, normalised where this layer does."""
        return x + norm(update) if self.norms == "sandwich" else norm(x + update)
