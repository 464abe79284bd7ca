"""What one batch left behind, loop by loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopdiag import html
from loopdiag.corpus.batching import one_text

if TYPE_CHECKING:
    from loopdiag.corpus import Batch
    from loopdiag.model.config import LoopedConfig
    from loopdiag.model.decoder import LoopedLM

States = Float[Tensor, "loop document pos d_model"]


@dataclass(frozen=True)
class LoopTrace:
    """Hidden states of one batch at loop boundaries.

    The first axis of the states is the loop, 0..R, or 0 and some of them; 0 is what loop 1 starts from: the embedding E
    (after the prelude, where there is one), or the random initial state of models that have one. Where only some loops
    were kept, what a measure says of loop r - 1 is said of the kept loop before.

    Attributes:
        input_ids: Tokens [document, pos]; None where only states are known, which measures of the prediction refuse.
        mask: True on real tokens [document, pos].
        raw: Y_r, the output of the last layer.
        carry: Z_r, what loop r hands to the next loop before the offset. Where only some loops were kept, what was
            handed into the next kept loop.
        readout: What a head reads after loop r: N(Y_r), or with a coda N of its output.
        offset: Cross-loop position offset of the model, in tokens.
        norm: The model's final norm N.
        head: What it reads to logits; None where there is no head.
        gate: Weight of the global attention branch [loop, layer, document, pos, head], NaN where a
            loop has none; None where none has.
        coda: Raw output of the coda after loop r, of which the readout is N; None where no coda stands before the head.
        leave: Probability that the model's exit gate leaves after loop r, once there, NaN at loop 0; None without a
            gate.
        at: The loops that were kept, 0 first; None when all were.
        following: Y of one loop more, where `with_maps` ran it: Y_{r+1} at loop r.
        mapped: f(Y_r), f the layers alone, where `with_maps` ran them: no injection, no offset, own keys and values.
    """

    input_ids: Int[Tensor, "document pos"] | None
    mask: Bool[Tensor, "document pos"]
    raw: States
    carry: States
    readout: States
    offset: int
    norm: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None
    gate: Float[Tensor, "loop layer document pos head"] | None = None
    coda: States | None = None
    leave: Float[Tensor, "loop document pos"] | None = None
    at: tuple[int, ...] | None = None
    following: States | None = None
    mapped: States | None = None

    def __repr__(self) -> str:
        documents, pos, d_model = self.raw.shape[1:]
        counted = f"{documents} document{'s' if documents > 1 else ''}"
        return f"LoopTrace of {self.n_loops} loops: {counted} of up to {pos} tokens, width {d_model}"

    def _repr_html_(self) -> str:
        tokens = self.mask.sum(1).tolist()
        told = ", ".join(map(str, tokens)) if len(tokens) <= 8 else f"{min(tokens)} to {max(tokens)}"
        rows = [
            ("tokens of each document", told),
            ("loops kept", ", ".join(map(str, self.loops))),
            ("offset", str(self.offset)),
            ("predictions to measure", "yes" if self.readable else "no: it lacks a head or tokens"),
            ("gate", "no" if self.gate is None else "yes"),
            ("coda", "no" if self.coda is None else "yes"),
        ]
        states = f"States [loop, document, pos, d_model] = {list(self.raw.shape)}: .raw is Y, .carry Z, .readout N(Y)."
        return html.card(repr(self), body=rows, notes=[states])

    @property
    def n_loops(self) -> int:
        """R, the loops that were run."""
        return self.loops[-1]

    @property
    def loops(self) -> tuple[int, ...]:
        """Numbers of the kept loops, 0 first."""
        return self.at or tuple(range(len(self.raw)))

    @cached_property
    def normed(self) -> States:
        """N(Y_r), what the plain logit lens reads; the readout itself, where no coda stands in between."""
        return self.readout if self.coda is None else self.norm(self.raw)

    @property
    def finite(self) -> Bool[Tensor, " document"]:
        """Whether no state of a document is NaN or infinite, nor so large that its sum is."""
        return are_finite(self.raw, self.mask).all(0)

    @property
    def exit_state(self) -> States:
        """Y_r, or the coda's output; the readout is N of it."""
        return self.raw if self.coda is None else self.coda

    @property
    def readable(self) -> bool:
        """Whether there are a head and the tokens, and so predictions to measure."""
        return self.head is not None and self.input_ids is not None

    @property
    def predicts(self) -> Bool[Tensor, "document pos"]:
        """True on the real tokens that have a real next token."""
        following = torch.zeros_like(self.mask)
        following[:, :-1] = self.mask[:, 1:]
        return self.mask & following

    @classmethod
    def from_states(
        cls,
        embed: Float[Tensor, "document pos d_model"],
        states: States | Sequence[Tensor],
        head: Callable[[Tensor], Tensor] | None = None,
        *,
        norm: Callable[[Tensor], Tensor] | None = None,
        input_ids: Int[Tensor, "document pos"] | None = None,
        mask: Bool[Tensor, "document pos"] | None = None,
        carry: States | Sequence[Tensor] | None = None,
        coda: States | Sequence[Tensor] | None = None,
        offset: int = 0,
    ) -> LoopTrace:
        """A trace of a model that is not ours, from states captured elsewhere.

        Args:
            embed: What loop 1 starts from.
            states: Y, the state after each loop 1..R, before any norm: one tensor with the loop first, or one for each
                loop.
            head: What it reads to logits; needed by measures of the prediction.
            norm: Final norm, applied before the head; the identity when None.
            input_ids: Tokens; needed by measures of the prediction.
            mask: True on real tokens; all True when None.
            carry: Z, what each loop 1..R hands on, when it differs from Y.
            coda: Raw output of the coda when reading out after 0..R loops, where one stands before norm and head.
            offset: Cross-loop position offset in tokens.

        Raises:
            ValueError: States that are no tensors, a negative offset, shapes that do not belong together, or no loop.

        Example:
            One token in a plane: loop 1 moves it up by 1, loop 2 by 2 more.

            >>> import torch
            >>> embed = torch.tensor([[[1.0, 0.0]]])  # [document, pos, d_model]
            >>> trace = LoopTrace.from_states(embed, [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 3.0]]])])
            >>> trace
            LoopTrace of 2 loops: 1 document of up to 1 tokens, width 2
            >>> from loopdiag.measures.motion import step_size
            >>> step_size(trace)  # [document, loop]; loop 0 has none
            tensor([[nan, 1., 2.]])
        """
        if not isinstance(offset, int) or offset < 0:
            raise ValueError(f"offset = {offset!r} is not allowed: it must be an integer >= 0.")
        _require_shape("embed", embed, None)
        n_loops = len(states)
        if n_loops == 0:
            raise ValueError("states is empty: give the state after each loop, at least one.")
        documents, pos = embed.shape[:2]
        if mask is None:
            mask = torch.ones(documents, pos, dtype=torch.bool)
        for name, given in (("mask", mask), ("input_ids", input_ids)):
            if given is not None and given.shape != (documents, pos):
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}: with this embed it must be {(documents, pos)}."
                )

        def stacked(name: str, given: Any, count: int) -> Tensor:
            if len(given) != count:
                raise ValueError(f"{name} is of {len(given)} loops: with these states it must be of {count}.")
            for state in given:
                _require_shape(name, state, embed)
            return given if isinstance(given, Tensor) else torch.stack(list(given))

        raw = torch.cat((embed[None], stacked("states", states, n_loops)))
        handed = raw if carry is None else torch.cat((embed[None], stacked("carry", carry, n_loops)))
        after_coda = None if coda is None else stacked("coda", coda, n_loops + 1)
        norm = norm or torch.nn.Identity()
        readout = norm(raw if after_coda is None else after_coda)
        mask, input_ids = mask.bool().to(embed.device), None if input_ids is None else input_ids.to(embed.device)
        return cls(input_ids, mask, raw, handed, readout, offset, norm, head, coda=after_coda)


def _require_shape(name: str, state: Any, like: Tensor | None) -> None:
    if not isinstance(state, Tensor):
        raise ValueError(f"{name} holds a {type(state).__name__}: it must be a torch tensor.")
    if like is None and state.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(state.shape)}: it must be [document, pos, d_model].")
    if like is not None and state.shape != like.shape:
        raise ValueError(
            f"{name} has states of shape {tuple(state.shape)}: they must be {tuple(like.shape)}, as embed is."
        )


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention of one layer in one loop works from, after RoPE.

    Attributes:
        loop: From 1.
        layer: From 0.
        q: Queries [document, pos, head, d_head].
        k: The loop's own keys [document, pos, kv_head, d_head].
        k_global: Loop 1's keys, where the loop blends attention to them with a window over its own; else None.
        gate: Weight of the attention to loop 1's keys [document, pos, head]; None where nothing is blended.
        window: Tokens that the window sees, the token itself included.
    """

    loop: int
    layer: int
    q: Float[Tensor, "document pos head d_head"]
    k: Float[Tensor, "document pos kv_head d_head"]
    k_global: Float[Tensor, "document pos kv_head d_head"] | None
    gate: Float[Tensor, "document pos head"] | None
    window: int


@dataclass(frozen=True)
class ForeignModel:
    """A looped model that is not ours, for `diagnose`: whatever runs it and captures its states.

    Attributes:
        record: Runs a batch (`input_ids`, `attention_mask`) with a number of loops and gives its states, by
            `LoopTrace.from_states`.
        tokenizer: The model's, of transformers.
        trained_loops: Loops it was trained with.
        n_ctx: Longest document that it reads, in tokens.
        source: What to call it in results.
    """

    record: Callable[[Batch, int], LoopTrace]
    tokenizer: Any
    trained_loops: int
    n_ctx: int
    source: str = "a model of another kind"


@torch.no_grad()
def record(
    model: LoopedLM,
    batch: Batch | str,
    n_loops: int | None = None,
    *,
    at: Sequence[int] | None = None,
    seed: int = 0,
    on_attention: Callable[[AttentionInputs, Tensor], None] | None = None,
    on_layer: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> LoopTrace:
    """Run a model on a batch and keep what left each loop.

    Args:
        model: The model.
        batch: Padded tokens with their mask, or a text, which is a batch of one document.
        n_loops: Loops to run; the trained number, or the last of `at`, when None.
        at: Loops to keep, from 1 on; all when None.
        seed: Of the initial state, where a model draws one.
        on_attention: Called with the inputs of every attention of the kept loops and the mask, in the order of the run;
            on the layer's device, where a model stands on several.
        on_layer: Called with loop, layer, the state after the layer and the mask, likewise.

    Raises:
        ValueError: `n_loops` below 1, `at` that does not rise from 1 to it, or a model whose loops are wired otherwise
            than its configuration says.
        CorpusError: A text without a token, or a model without a tokenizer to read it.

    Example:
        >>> from loopdiag.model import load
        >>> trace = record(load("tiny-plt-4"), "x = 1", n_loops=6)
        >>> trace
        LoopTrace of 6 loops: 1 document of up to 4 tokens, width 128
        >>> list(trace.raw.shape)  # loop, document, pos, d_model; loop 0 is the embedding
        [7, 1, 4, 128]
    """
    cfg = model.cfg
    if model.wiring.rewired:
        raise ValueError(
            "record: the model is inside skip_loop, repeat_loop, swap_loops, own_memory, or shift_offset of one loop. "
            "A trace would tell of loops as the configuration has them: use run_with_cache, or record outside."
        )
    n_loops = (at[-1] if at else cfg.n_loops) if n_loops is None else n_loops
    loops = kept_loops(n_loops, at)
    if isinstance(batch, str):
        batch = one_text(batch, model.tokenizer)
    model.ensure_loops(n_loops)
    device = model.embed.weight.device
    input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device).bool()
    start = (
        "hook_initial_state" if cfg.initial_state == "random" else "prelude.hook_out" if cfg.n_prelude else "hook_embed"
    )
    points = ["hook_out_pre_norm", "hook_readout"]
    points += ["hook_coda_out"] if cfg.n_coda else []
    # Whether a token is still there after loop r depends on every loop before.
    points += ["hook_exit_gate"] if cfg.exit_gate and len(loops) == n_loops else []
    # Each state goes straight to its place: beside the trace, no state is held twice.
    whole: dict[str, Tensor] = {}

    def keep(point: str, *place: int) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            if point not in whole:
                size = (len(loops) + 1, cfg.n_layers) if point == "attn.hook_gate" else (len(loops) + 1,)
                whole[point] = value.new_full((*size, *value.shape), float("nan"), device=device)
            whole[point][place] = value

        return hook

    hooks: list[tuple[str | Callable, Callable]] = [(start, keep("hook_out_pre_norm", 0))]
    for place, loop in enumerate(loops, 1):
        hooks += [(f"loops.{loop}.{point}", keep(point, place)) for point in points]
        hands_on = loop if place == len(loops) else loops[place] - 1
        hooks.append((f"loops.{hands_on}.hook_out", keep("hook_out", place)))
        for layer in range(cfg.n_layers):
            at_layer = f"loops.{loop}.blocks.{layer}."
            if loop > 1 and cfg.memory == "first":
                hooks.append((f"{at_layer}attn.hook_gate", keep("attn.hook_gate", place, layer)))
            if on_layer is not None:
                hooks.append((f"{at_layer}hook_resid_post", _telling(on_layer, loop, layer, mask)))
    if on_attention is not None:
        hooks += _attention_hooks(cfg, loops, mask, on_attention)
    model.run_with_hooks(input_ids, mask, n_loops=n_loops, seed=seed, return_type="last", fwd_hooks=hooks)
    first = whole["hook_out_pre_norm"][0]
    if cfg.n_coda:
        whole["hook_coda_out"][0] = model.coda_out(first, mask)
    whole["hook_out"][0] = first
    whole["hook_readout"][0] = model.ln_final(whole["hook_coda_out"][0] if cfg.n_coda else first)
    return LoopTrace(
        input_ids=input_ids,
        mask=mask,
        raw=whole["hook_out_pre_norm"],
        carry=whole["hook_out"],
        readout=whole["hook_readout"],
        offset=cfg.offset,
        norm=model.ln_final,
        head=model.unembed,
        gate=whole.get("attn.hook_gate"),
        coda=whole.get("hook_coda_out"),
        leave=whole.get("hook_exit_gate"),
        at=None if len(loops) == n_loops else (0, *loops),
    )


def are_finite(
    states: Float[Tensor, "*loops document pos d_model"], mask: Bool[Tensor, "document pos"]
) -> Bool[Tensor, "*loops document"]:
    """Whether no state of a document is NaN or infinite, nor so large that its sum is."""
    total = states.sum(-1, dtype=torch.promote_types(states.dtype, torch.float32))
    return (total.isfinite() | ~mask).all(-1)


def kept_loops(n_loops: int, at: Sequence[int] | None) -> tuple[int, ...]:
    """The loops of a run that are kept.

    Raises:
        ValueError: `at` does not rise from 1 to `n_loops`.
    """
    if at is None:
        return tuple(range(1, n_loops + 1))
    whole = all(isinstance(loop, int) and not isinstance(loop, bool) for loop in at)
    if not whole or list(at) != sorted(set(at)) or not at or at[0] != 1 or at[-1] != n_loops:
        raise ValueError(
            f"at = {list(at)} is not allowed: it must be loop numbers that rise from 1 to the last loop of the run, "
            f"{n_loops}, such as [1, 2, 4, 8]."
        )
    return tuple(at)


@torch.no_grad()
def with_maps(model: LoopedLM, batch: Batch, trace: LoopTrace, *, seed: int = 0) -> LoopTrace:
    """A trace with what the loop's map makes of each kept state: `following` and `mapped`.

    `following` is a run with one loop more: the map as the model really runs it. `mapped` passes Y_r through the
    layers alone, as loop 1 does with E, one loop at a time: the paper's f(h). Costs about two more runs.

    Args:
        model: The model.
        batch: What the trace was recorded on.
        trace: As `record` gave it.
        seed: As for `record`.
    """
    ids, mask = batch.input_ids.to(trace.mask.device), trace.mask
    following, mapped = torch.full_like(trace.raw, float("nan")), torch.full_like(trace.raw, float("nan"))

    def keep(into: Tensor) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            into.copy_(value)

        return hook

    more = trace.n_loops + 1
    hooks: list[tuple[str | Callable, Callable]] = [
        (f"loops.{loop + 1}.hook_out_pre_norm", keep(following[place])) for place, loop in enumerate(trace.loops)
    ]
    run: dict[str, Any] = {"seed": seed, "return_type": "last"}
    model.ensure_loops(more)
    model.run_with_hooks(ids, mask, n_loops=more, fwd_hooks=hooks, **run)
    for place in range(len(trace.raw)):
        start = trace.raw[place]
        hooks = [
            ("loops.1.hook_in", lambda value, hook, start=start: start.clone()),
            ("loops.1.hook_out_pre_norm", keep(mapped[place])),
        ]
        model.run_with_hooks(ids, mask, n_loops=1, fwd_hooks=hooks, **run)
    return replace(trace, following=following, mapped=mapped)


def _telling(tell: Callable[..., None], loop: int, layer: int, mask: Tensor) -> Callable[..., None]:
    return lambda value, hook: tell(loop, layer, value.to(mask.device), mask)


def _attention_hooks(
    cfg: LoopedConfig, loops: Sequence[int], mask: Tensor, tell: Callable[[AttentionInputs, Tensor], None]
) -> list[tuple[str | Callable, Callable]]:
    """Hooks that collect what each attention works from, and tell once it is together."""
    memory: dict[int, Tensor] = {}  # loop 1's keys by layer
    parts: dict[str, Tensor] = {}

    def keep(loop: int, layer: int, part: str, last: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            parts[part] = value
            if part != last:
                return
            if loop == 1 and cfg.memory == "first":
                memory[layer] = parts["rot_k"]
            blended = memory.get(layer) if loop > 1 else None
            q, k, gate = parts["rot_q"], parts["rot_k"], parts.get("gate")
            tell(AttentionInputs(loop, layer, q, k, blended, gate, cfg.window), mask.to(q.device))
            parts.clear()

        return hook

    hooks: list[tuple[str | Callable, Callable]] = []
    for loop in loops:
        points = ("rot_q", "rot_k", "gate") if loop > 1 and cfg.memory == "first" else ("rot_q", "rot_k")
        for layer in range(cfg.n_layers):
            at = f"loops.{loop}.blocks.{layer}.attn.hook_"
            hooks += [(at + part, keep(loop, layer, part, points[-1])) for part in points]
    return hooks
