"""What a configuration says without any weights: wiring, parameters, memory and work of every loop count."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM


@dataclass(frozen=True)
class Parameters:
    """Numbers that a model learns.

    Attributes:
        once: As stored.
        looped: Those of them that every loop uses again.
    """

    once: int
    looped: int

    def effective(self, n_loops: int) -> int:
        """Of a model as deep that shares nothing."""
        return self.once + (n_loops - 1) * self.looped


@dataclass(frozen=True)
class KeyValueBytes:
    """Memory of decoding one text.

    Attributes:
        per_token: Bytes that every token adds.
        fixed: Bytes of windows and carries, once the text is longer than the window.
    """

    per_token: int
    fixed: int


def parameters(cfg: LoopedConfig) -> Parameters:
    """Parameters of a model; nothing is allocated."""
    with torch.device("meta"):
        model = LoopedLM(cfg)
    looped = [model.blocks] + ([model.adapter] if cfg.injection == "concat" else [])
    return Parameters(
        once=sum(weight.numel() for weight in model.parameters()),
        looped=sum(weight.numel() for part in looped for weight in part.parameters()),
    )


def kv_bytes(cfg: LoopedConfig, n_loops: int, bytes_per_number: int = 2) -> KeyValueBytes:
    """What decoding keeps of a text (`Past`), run with `n_loops` loops.

    Source: arXiv 2510.24824 and 2606.18023, which give it in O-notation.
    """
    layer = 2 * cfg.n_kv_heads * cfg.d_head
    once, later = cfg.n_prelude + cfg.n_layers + cfg.n_coda, (n_loops - 1) * cfg.n_layers
    carries = (n_loops if cfg.initial_state == "random" else n_loops - 1) * cfg.offset * cfg.d_model
    shared = cfg.memory == "first"
    return KeyValueBytes(
        per_token=bytes_per_number * layer * (once if shared else once + later),
        fixed=bytes_per_number * (carries + (later * layer * (cfg.window - 1) if shared else 0)),
    )


def flops(cfg: LoopedConfig, n_loops: int, context: int) -> int:
    """Floating point operations of one token that sees `context` tokens, itself included.

    Matrix products only, a multiplication and an addition each; the head once.
    """
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    layer = 2 * cfg.d_model * (2 * heads + 2 * kv_heads + 3 * cfg.d_mlp)
    attention = 4 * heads
    passed = n_loops * cfg.n_layers
    blending = (n_loops - 1) * cfg.n_layers if cfg.memory == "first" else 0
    gate = 2 * cfg.d_model * cfg.n_heads if cfg.gate_input == "hidden" else 0
    injected = n_loops if cfg.initial_state == "random" else n_loops - 1
    return (
        (cfg.n_prelude + passed + cfg.n_coda) * (layer + attention * context)
        + blending * (attention * min(context, cfg.window) + gate)
        + (injected * 4 * cfg.d_model**2 if cfg.injection == "concat" else 0)
        + 2 * cfg.d_model * cfg.vocab_size
    )


def wiring(cfg: LoopedConfig) -> dict[str, str]:
    """How the model is put together, in words; what it does not have is said to be absent."""
    start = "the output of the prelude" if cfg.n_prelude else "the embedding"
    whose = {0: "the token's own", 1: "the previous token's"}.get(cfg.offset, f"the token {cfg.offset} places before's")
    carried = f"{whose} {'normed' if cfg.norm_between_loops else 'raw'} state after the previous loop"
    injection = {
        "none": carried,
        "add": f"{cfg.embed_scale:g} x {start} + {cfg.carry_scale:g} x {carried}",
        "concat": f"a linear map of [{carried}; {start}]",
    }[cfg.injection]
    random = f"a random state of standard deviation {cfg.initial_std:.3g}, injected as in every loop"
    norms = {
        "pre": "before attention and MLP",
        "sandwich": "before and after attention and MLP",
        "pre_post": "before attention and MLP, and of the stream after each",
        "post": "of the stream after attention and MLP",
    }[cfg.norms]
    gate = "layer input" if cfg.gate_input == "hidden" else "query"
    absent = {
        "offset": cfg.offset == 0,
        "shared memory and gate": cfg.memory == "own",
        "prelude": cfg.n_prelude == 0,
        "coda": cfg.n_coda == 0,
        "exit gate": not cfg.exit_gate,
    }
    return {
        "layers": f"{cfg.n_layers} in the loop"
        + (f", {cfg.n_prelude} before, {cfg.n_coda} after" if cfg.n_prelude or cfg.n_coda else ""),
        "loop 1 starts from": random if cfg.initial_state == "random" else start,
        "later loops start from": injection,
        "keys and values": "of every loop its own"
        if cfg.memory == "own"
        else f"loop 1's for all loops, blended by a gate (it reads the {gate}) with a window of {cfg.window} tokens "
        "over the loop's own",
        "norms": norms,
        "exit": ("through the coda, " if cfg.n_coda else "")
        + ("the embedding as head" if cfg.tie_embeddings else "a head of its own")
        + (f", exit gate (threshold {cfg.exit_threshold:g})" if cfg.exit_gate else ""),
        "absent": ", ".join(name for name, missing in absent.items() if missing) or "nothing",
    }
