"""Interventions as context managers on a model.

Each takes the model first, refuses at once what cannot be, changes every run inside its `with` block, and leaves the
model as it was, also when the block raises. They nest in any number: of two that set the same thing the inner one
wins, and what they do to states they do one after the other, the outer one first. Each restores what it found, so they
must be left in the reverse order of entering, as `with` does. Hooks of the user stay and fire in the order in which
they were placed. `loop=None` is every loop where an intervention applies, however many a run has.

An intervention on one loop goes with the loop's name. In a run that does not reach this loop it does nothing, but for
`skip_loop`, `repeat_loop` and `swap_loops`, which raise.

A model that went through `torch.compile` runs its loops uncompiled while an intervention is going on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopdiag.model.cache import LoopCache
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.layers import Layout
from loopdiag.model.states import State
from loopdiag.model.wiring import Wiring

Block = AbstractContextManager[None]
Edit = Callable[[Tensor], Tensor]


def shift_offset(model: LoopedLM, k: int, loop: int | None = None) -> Block:
    """Hand every token the carry of the token `k` places to its left.

    Args:
        model: The model.
        k: Offset in tokens, >= 0; the model's own changes nothing.
        loop: The loop whose carry is shifted otherwise, 2 or later; None is every loop, and with them the random
            initial state of models that have one, on its way into loop 1.

    Raises:
        ValueError: `k` or `loop` out of range.
    """
    k, loop = _within("k", k, 0), _check_loop(model, loop)
    if loop is None:
        return _changed(model, lambda cfg, wiring: (replace(cfg, offset=k), replace(wiring, offsets={})))
    return _changed(model, lambda cfg, wiring: (cfg, replace(wiring, offsets={**wiring.offsets, loop: k})))


def drop_carry(model: LoopedLM, loop: int | None = None) -> Block:
    """Let `loop` (2 or later; None is each of them) start without a carry: zeros stand for it.

    In models whose injection is `"none"` nothing but the carry enters a loop, so that this takes the text away, too.

    Raises:
        ValueError: `loop` out of range.
    """
    return _on_carry(model, loop, lambda carry, layout, offset: torch.zeros_like(carry))


def mean_carry(model: LoopedLM, loop: int | None = None) -> Block:
    """Let every token of a document start `loop` from the mean of the carries that enter it in this document.

    Tokens that no carry reaches, the first ones where there is an offset, keep their zeros. The mean is over the whole
    document, later tokens included.

    Args:
        model: The model.
        loop: 2 or later; None is each of them.

    Raises:
        ValueError: `loop` out of range; within the block, a run that goes on from a past, since it does not see its
            whole document.
    """

    def mean(carry: State, layout: Layout, offset: int) -> State:
        there = _reached(carry, layout, offset).unsqueeze(-1)
        # Half precisions would lose digits in the sum.
        wide = carry.to(torch.promote_types(carry.dtype, torch.float32)).masked_fill(~there, 0)
        mean = wide.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        return torch.where(there, mean.to(carry.dtype), carry)

    return _on_carry(model, loop, mean)


def other_carry(model: LoopedLM, loop: int | None = None) -> Block:
    """Let every token start `loop` from the carry that enters at its place in the next document of the batch.

    The last document takes the first one's; a longer document starts over in a shorter one. Tokens that no carry
    reaches, the first ones where there is an offset, keep their zeros.

    Args:
        model: The model.
        loop: 2 or later; None is each of them.

    Raises:
        ValueError: `loop` out of range; within the block, a run of one document, or one that goes on from a past.
    """

    def other(carry: State, layout: Layout, offset: int) -> State:
        if len(carry) < 2:
            raise ValueError("other_carry: a batch of 1 document has no other one. Give a batch of 2 or more.")
        there = _reached(carry, layout, offset)
        carries, first = there.sum(1).roll(-1)[:, None], there.int().argmax(1).roll(-1)[:, None]
        source = first + (layout.positions - offset) % carries.clamp(min=1)
        taken = carry.roll(-1, 0).gather(1, source.unsqueeze(-1).expand_as(carry))
        taken = taken.masked_fill((carries == 0).unsqueeze(-1), 0)  # of a document that is shorter than the offset
        return torch.where(there.unsqueeze(-1), taken, carry)

    return _on_carry(model, loop, other)


def skip_loop(model: LoopedLM, loop: int) -> Block:
    """Leave out `loop`. All loops share their weights, so this is a run of one loop fewer, whichever is left out.

    It differs where something else is tied to a loop's name, such as a hook or another intervention.

    Raises:
        ValueError: `loop` is below 2 (loop 1 is what the others build on) or unknown; within the block, a run that
            does not reach it.

    Example:
        >>> from loopdiag.model import load
        >>> model, ids = load("tiny-plt-4"), torch.tensor([[5, 6, 7]])
        >>> with skip_loop(model, 2):
        ...     skipped = model(ids)
        >>> torch.equal(skipped, model(ids, n_loops=3))
        True
    """
    loop = _one_loop(model, loop)
    return _reordered(model, (loop,), lambda order: [name for name in order if name != loop])


def repeat_loop(model: LoopedLM, loop: int) -> Block:
    """Pass `loop` twice. All loops share their weights, so this is a run of one more loop, whichever is repeated.

    It differs where something else is tied to a loop's name; of a repeated loop the cache holds the last pass.

    Raises:
        ValueError: `loop` is below 2 (loop 1 is what the others build on) or unknown; within the block, a run that
            does not reach it.
    """
    loop = _one_loop(model, loop)
    return _reordered(model, (loop,), lambda order: [n for name in order for n in ([name] * (1 + (name == loop)))])


def swap_loops(model: LoopedLM, a: int, b: int) -> Block:
    """Pass loop `b` where loop `a` would be, and `a` in place of `b`. All loops share their weights, so this changes
    nothing, unless something else is tied to one of their names, such as a hook or another intervention.

    Raises:
        ValueError: One is below 2 (loop 1 is what the others build on) or unknown, or both are the same; within the
            block, a run that does not reach them.
    """
    a, b = _one_loop(model, a, "a"), _one_loop(model, b, "b")
    if a == b:
        raise ValueError(f"a = {a} and b = {b} are the same loop: give two of 2 to {len(model.loops)}.")
    swapped = {a: b, b: a}
    return _reordered(model, (a, b), lambda order: [swapped.get(name, name) for name in order])


def clamp_gate(
    model: LoopedLM, value: float, loop: int | None = None, layer: int | None = None, head: int | None = None
) -> Block:
    """Fix the weight of the global branch: at 1 attention sees loop 1's memory alone, at 0 its own window alone.

    Args:
        model: A model with a gate (`cfg.memory == "first"`).
        value: 0 to 1.
        loop: 2 or later; None is each of them.
        layer: From 0; None is all.
        head: From 0; None is all.

    Raises:
        ValueError: The model has no gate, or an argument is out of range.
    """
    _require_memory(model, "gate")
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"value = {value!r} is not allowed: it must be a number from 0 to 1.")
    number, loop = float(value), _check_loop(model, loop)
    for name, given, count in (("layer", layer, model.cfg.n_layers), ("head", head, model.cfg.n_heads)):
        if given is not None:
            _within(name, given, 0, count - 1)

    def clamp(gate: Tensor) -> Tensor:
        if head is None:
            return torch.full_like(gate, number)
        gate = gate.clone()
        gate[..., head] = number
        return gate

    layers = range(model.cfg.n_layers) if layer is None else (layer,)
    edits: dict[str, Edit] = {f"blocks.{layer}.attn.hook_gate": clamp for layer in layers}
    return _placed(model, loop, lambda r: edits)


def set_window(model: LoopedLM, window: int) -> Block:
    """Let the sliding window of loops 2 and later see `window` tokens, the token itself included.

    Raises:
        ValueError: The model has no sliding window, or `window` is below 1.
    """
    _require_memory(model, "sliding window")
    window = _within("window", window, 1)
    return _changed(model, lambda cfg, wiring: (replace(cfg, window=window), wiring))


def own_memory(model: LoopedLM, loop: int | None = None) -> Block:
    """Let the global branch of `loop` (2 or later; None is each of them) read the loop's own keys and values, in full.

    Raises:
        ValueError: The model shares no memory between loops, or `loop` is out of range; within the block, a run with a
            past.
    """
    _require_memory(model, "shared memory")
    loop = _check_loop(model, loop)

    def change(cfg: LoopedConfig, wiring: Wiring) -> tuple[LoopedConfig, Wiring]:
        loops = None if loop is None or wiring.own_memory is None else wiring.own_memory | {loop}
        return cfg, replace(wiring, own_memory=loops)

    return _changed(model, change)


def patch(
    model: LoopedLM,
    states: LoopCache | Mapping[str, Tensor] | Tensor,
    loop: int,
    positions: int | Sequence[int] | Tensor | np.ndarray | None = None,
    later: bool = False,
) -> Block:
    """Put the states of another run in the place of Y, the raw output of a loop (`loops.{r}.hook_out_pre_norm`).

    The exit and the carry follow from Y. Loop 1's keys and values do not: where later loops read them
    (`cfg.memory == "first"`), they still know this run's text.

    Args:
        model: The model.
        states: Cache or dict of the other run, with `loops.{r}.hook_out_pre_norm` [batch, pos, d_model]; or, without
            `later`, this tensor itself.
        loop: The loop to patch, from 1.
        positions: Which of `pos` to patch, from 0, or negative from the end; None is all.
        later: Patch all later loops of a run as well.

    Raises:
        ValueError: `loop` or a position is out of range, or states are missing or no [batch, pos, d_model]; within the
            block, a run whose states have another shape, or has more loops than `states` where `later` is asked for.
    """
    loop = _one_loop(model, loop, least=1)
    if isinstance(states, Tensor):
        if later:
            raise ValueError("later=True patches several loops: give a cache or a dict of their states, not a tensor.")
        states = {_raw(loop): states}
    if _raw(loop) not in states:
        raise ValueError(f"states has no {_raw(loop)!r}: cache it, run_with_cache(ids, names_filter=[{_raw(loop)!r}]).")
    shape = tuple(states[_raw(loop)].shape)
    if len(shape) != 3:
        raise ValueError(f"states have shape {shape}: they must be [batch, pos, d_model].")
    if isinstance(positions, Tensor | np.ndarray):
        positions = positions.tolist()
    given = range(shape[1]) if positions is None else positions if isinstance(positions, Iterable) else [positions]
    chosen = [_within("positions", position, -shape[1], shape[1] - 1) for position in given]

    def hook(r: int) -> Edit:
        def put(raw: Tensor) -> Tensor:
            if _raw(r) not in states:
                raise ValueError(f"patch: this run passes loop {r}, but states has no {_raw(r)!r}.")
            if states[_raw(r)].shape != raw.shape:
                raise ValueError(
                    f"patch: states have shape {tuple(states[_raw(r)].shape)}, this run's have {tuple(raw.shape)}: "
                    "texts must have as many tokens as those that were cached."
                )
            raw = raw.clone()
            raw[:, chosen] = states[_raw(r)][:, chosen].to(raw)
            return raw

        return put

    return _place(model, lambda r: {"hook_out_pre_norm": hook(r)} if r == loop or (later and r > loop) else {})


# -- how they are put there ------------------------------------------------------------------------


@contextmanager
def _changed(model: LoopedLM, change: Callable[[LoopedConfig, Wiring], tuple[LoopedConfig, Wiring]]) -> Iterator[None]:
    before = model.cfg, model.wiring
    model.cfg, wiring = change(*before)
    model.wiring = replace(wiring, ongoing=wiring.ongoing + 1)
    try:
        yield
    finally:
        model.cfg, model.wiring = before


def _reordered(model: LoopedLM, names: tuple[int, ...], edit: Callable[[Sequence[int]], list[int]]) -> Block:
    def change(cfg: LoopedConfig, wiring: Wiring) -> tuple[LoopedConfig, Wiring]:
        def order(loops: tuple[int, ...]) -> list[int]:
            if missing := set(names) - set(loops):
                raise ValueError(
                    f"loop {min(missing)} is skipped, repeated or swapped, but this run has loops 1 to {len(loops)}: "
                    f"run it with n_loops={min(missing)} or more."
                )
            return edit(loops if wiring.order is None else wiring.order(loops))

        return cfg, replace(wiring, order=order)

    return _changed(model, change)


@contextmanager
def _place(model: LoopedLM, edits: Callable[[int], Mapping[str, Edit]]) -> Iterator[None]:
    """Hooks on every loop that has some, those included that the model grows while they are there."""
    placed = []

    def on(loop: int) -> None:
        for name, edit in edits(loop).items():
            point = model.hook_dict[f"loops.{loop}.{name}"]
            # Permanent: `reset_hooks` at the end of a run leaves it.
            handle = point.add_hook(lambda value, hook, edit=edit: edit(value), is_permanent=True)
            placed.append((point, handle))

    model.on_growth.append(on)
    model.wiring = replace(model.wiring, ongoing=model.wiring.ongoing + 1)
    try:
        for loop in range(1, len(model.loops) + 1):
            on(loop)
        yield
    finally:
        model.wiring = replace(model.wiring, ongoing=model.wiring.ongoing - 1)
        model.on_growth.remove(on)
        for point, handle in placed:
            handle.hook.remove()
            point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]


def _placed(model: LoopedLM, loop: int | None, edits: Callable[[int], Mapping[str, Edit]]) -> Block:
    return _place(model, lambda r: edits(r) if r > 1 and loop in (None, r) else {})


def _on_carry(model: LoopedLM, loop: int | None, edit: Callable[[State, Layout, int], State]) -> Block:
    def on(r: int) -> dict[str, Edit]:
        def changed(carry: Tensor) -> Tensor:
            assert model.layout is not None  # a run is going on
            return edit(carry, model.layout, model.offset_into(r))

        return {"hook_carry": changed}

    return _placed(model, _check_loop(model, loop), on)


def _reached(carry: State, layout: Layout, offset: int) -> Tensor:
    """True on the real tokens that a carry reaches [batch, pos]."""
    if layout.seen:
        raise ValueError(
            "The carry of a whole document was asked for, but this run goes on from a past: run whole texts."
        )
    reached = (layout.positions >= offset).expand(carry.shape[:2])
    return reached if layout.real is None else reached & layout.real


def _raw(loop: int) -> str:
    return f"loops.{loop}.hook_out_pre_norm"


# -- what is allowed ---------------------------------------------------------------------------------


def _within(name: str, value: Any, least: int, most: int | None = None, fix: str = "") -> int:
    """The value as an int, once it is known to be one and in range."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
        raise ValueError(f"{name} = {value!r} is not allowed: it must be {allowed}.{fix}")
    return int(value)


def _check_loop(model: LoopedLM, loop: int | None) -> int | None:
    return None if loop is None else _one_loop(model, loop)


def _one_loop(model: LoopedLM, loop: int, name: str = "loop", least: int = 2) -> int:
    most = len(model.loops)
    if most < least:
        raise ValueError(f"{name} = {loop!r}: this model has one loop. Run more: model.ensure_loops(2), n_loops=2.")
    return _within(name, loop, least, most, f" For a later loop, model.ensure_loops({name}) first.")


def _require_memory(model: LoopedLM, part: str) -> None:
    if model.cfg.memory != "first":
        raise ValueError(
            f"This model has no {part}: its loops attend to their own keys and values alone (cfg.memory is "
            f"{model.cfg.memory!r}, it must be 'first')."
        )
