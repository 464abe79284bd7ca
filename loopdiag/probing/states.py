"""States at chosen places of documents, from any hook of every loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopdiag.corpus import Batch, batches
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.placement import connect, place_of, places_of
from loopdiag.probing.reading import BothPlaces, Pair, Places, Reading
from loopdiag.scores import ScoresError

Point = tuple[str, int]  # hook and loop
EMBEDDING: Point = ("", 0)


def points_of(model: LoopedLM, n_loops: int, hooks: Sequence[str]) -> dict[str, list[int]]:
    """The loops that have each hook.

    Args:
        model: The model.
        n_loops: Loops of the run.
        hooks: Names without the loop, such as `hook_in` or `blocks.0.attn.hook_z`.

    Raises:
        ScoresError: No loop has a hook of that name, or one is named twice.
    """
    there: dict[str, list[int]] = {}
    for name in model.hook_dict:
        told = re.fullmatch(r"loops\.(\d+)\.(.+)", name)
        # A pattern is no state of a token.
        if told and int(told[1]) <= n_loops and "hook_pattern" not in name:
            there.setdefault(told[2], []).append(int(told[1]))
    if unknown := [hook for hook in hooks if hook not in there]:
        raise ScoresError(f"No loop of this model has a hook {unknown[0]!r}: there are {', '.join(there)}.")
    if not hooks or len(set(hooks)) < len(hooks):
        raise ScoresError(f"hooks = {list(hooks)} is not allowed: give one or more names, each once.")
    return {hook: sorted(there[hook]) for hook in hooks}


@dataclass(frozen=True, eq=False)
class States:
    """States of both halves of the documents.

    Attributes:
        kept: The places of each document that were kept.
        of: Of each half, by hook and loop, the states at these places, one document after the other [place, width].
    """

    kept: BothPlaces
    of: tuple[dict[Point, np.ndarray], dict[Point, np.ndarray]]

    def at(self, point: Point, places: BothPlaces) -> Pair:
        """States of a hook and loop at places that are among those kept."""
        fit, report = (of[point][_rows(kept, here)] for of, kept, here in zip(self.of, self.kept, places, strict=True))
        return fit, report


def _rows(kept: Places, places: Places) -> Int[np.ndarray, " row"]:
    starts = np.cumsum([0, *map(len, kept[:-1])])
    found = (start + np.searchsorted(each, here) for start, each, here in zip(starts, kept, places, strict=True))
    return np.concatenate(list(found))


@torch.no_grad()
def collect(
    model: LoopedLM,
    readings: Sequence[Reading],
    at: Places,
    points: Sequence[Point],
    *,
    n_loops: int,
    batch_size: int,
    seed: int,
    tell: Callable[[int], None],
) -> dict[Point, Float[np.ndarray, "place width"]]:
    """Run a model on documents and keep its states at some places; nothing else is held.

    The embedding E, after the prelude where there is one, is under `EMBEDDING`.

    Args:
        model: The model.
        readings: The documents.
        at: Places to keep in each.
        points: Hooks and loops to keep.
        n_loops: Loops to run.
        batch_size: Documents of a batch.
        seed: Of the initial state, where a model draws one.
        tell: Called with the documents of each batch that is done.

    Raises:
        ScoresError: A state is not finite.
    """
    embedding = "prelude.hook_out" if model.cfg.n_prelude else "hook_embed"
    names = {point: embedding if point == EMBEDDING else f"loops.{point[1]}.{point[0]}" for point in points}
    parts: dict[Point, list[np.ndarray]] = {point: [] for point in names}
    for batch, rows, columns in _batches(readings, at, batch_size):

        def keep(point: Point, rows: Tensor = rows, columns: Tensor = columns) -> Callable[..., None]:
            def hook(value: Tensor, hook: Any) -> None:
                kept = value[rows, columns].reshape(len(rows), value[0, 0].numel())
                parts[point].append(kept.to(torch.promote_types(kept.dtype, torch.float32)).cpu().numpy())

            return hook

        device = model.embed.weight.device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        hooks: list[tuple[str | Callable, Callable]] = [(name, keep(point)) for point, name in names.items()]
        model.run_with_hooks(ids, mask, n_loops=n_loops, seed=seed, return_type="last", fwd_hooks=hooks)
        tell(len(batch.names))
    states = {point: np.concatenate(each) for point, each in parts.items()}
    for point, each in states.items():
        if not np.isfinite(each).all():
            raise ScoresError(
                f"States at {names[point]} are not finite, so nothing can be read from them: run fewer loops, or in "
                "float32."
            )
    return states


def _batches(readings: Sequence[Reading], at: Places, size: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches, and row and column of their places."""
    done = 0
    for batch in batches([reading.document for reading in readings], size):
        here = at[done : done + len(batch.names)]
        rows = np.repeat(np.arange(len(here)), [len(each) for each in here])
        yield batch, torch.from_numpy(rows), torch.from_numpy(np.concatenate(here))
        done += len(here)


def untrained(model: LoopedLM, seed: int) -> LoopedLM:
    """A model of the same configuration with fresh random weights, on the same devices and in the same dtype."""
    places = places_of(model)
    fresh = LoopedLM(model.cfg)
    fresh.init_weights(seed)
    fresh.to(model.embed.weight.dtype)
    state = {name: value.to(place_of(name, places)) for name, value in fresh.state_dict().items()}
    fresh.load_state_dict(state, assign=True)
    connect(fresh, places)
    fresh.ensure_loops(len(model.loops))
    return fresh.eval().requires_grad_(False)
