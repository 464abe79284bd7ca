"""What the tokens of earlier runs left behind, for decoding token by token."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from loopdiag.model.layers import Extend, KeyValue
from loopdiag.model.states import State


class Past:
    """Keys, values and carries of the tokens that were run so far.

    `model(ids, past=past)` runs the next tokens of the same texts and adds theirs. Loops with a sliding window keep the
    `window - 1` tokens that the next one can see, so a Parallel Loop Transformer holds one full set of keys
    and values whatever its loop count, and between loops the last `offset` carries.

    Attributes:
        seen: Tokens of each text that were run.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._run: tuple[int, int, list[int]] | None = None
        self._wiring: Hashable = None
        self._running = False
        self._kept: dict[Hashable, KeyValue] = {}
        self._carries: dict[int, State] = {}

    def begin(self, texts: int, n_loops: int, exits: list[int], wiring: Hashable) -> None:
        """Refuse a run that does not go on from this past; the first run settles what goes on.

        Args:
            texts: How many.
            n_loops: Loops of the run.
            exits: Loops before the last whose exits through a coda are read: these need keys and values of their own.
            wiring: What else must stay as it is: the order of the loops, window and offsets.

        Raises:
            ValueError: Other texts, loops, exits or wiring than before, or the run before failed.
        """
        if self._running:
            raise ValueError("The run before failed and left this past half written. Start with a new Past().")
        if self._run is not None and self._run != (texts, n_loops, exits):
            was_texts, was_loops, was_exits = self._run
            raise ValueError(
                f"This past is of {was_texts} texts, {was_loops} loops and the early exits {was_exits}; {texts} texts, "
                f"{n_loops} loops and the early exits {exits} do not go on from it. Start with a new Past()."
            )
        if self._run is not None and self._wiring != wiring:
            raise ValueError(
                "The order of loops, the window or an offset is another than when this past began: run all of a text "
                "within the same interventions, or start with a new Past()."
            )
        self._run, self._wiring, self._running = (texts, n_loops, exits), wiring, True

    def end(self, tokens: int) -> None:
        """The run is over and has added this many tokens."""
        self.seen += tokens
        self._running = False

    def extend(self, place: Hashable, keep: int | None = None) -> Extend:
        """A function that puts what `place` holds before new keys and values, and keeps the last `keep` of all."""

        def joined(new: KeyValue) -> KeyValue:
            old = self._kept.get(place)
            k, v = new if old is None else (torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))
            first = 0 if keep is None else max(0, k.shape[1] - keep)
            # A slice would keep the whole tensor in memory.
            self._kept[place] = (k[:, first:].clone(), v[:, first:].clone()) if first else (k, v)
            return k, v

        return joined

    def before(self, turn: int, carry: State, offset: int) -> State:
        """The last `offset` carries of earlier tokens into the pass at `turn`; those of `carry` take their place."""
        old = self._carries.get(turn, carry.new_zeros(len(carry), offset, carry.shape[2]))
        self._carries[turn] = torch.cat((old, carry), dim=1)[:, carry.shape[1] :].clone()
        return old

    def kept(self, place: Hashable) -> KeyValue:
        """Keys and values that `place` holds."""
        return self._kept[place]

    def carried(self, turn: int) -> State:
        """The last `offset` carries into the pass at `turn`, the oldest token first."""
        return self._carries[turn]

    @property
    def n_loops(self) -> int | None:
        """Loops of its runs; None before the first."""
        return None if self._run is None else self._run[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        tensors = [*(x for pair in self._kept.values() for x in pair), *self._carries.values()]
        return sum(x.numel() * x.element_size() for x in tensors)
