"""One model and its random twin, run over documents; and what a probe of their states gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loopdiag.model.decoder import LoopedLM
from loopdiag.probing.reading import BothPlaces, Halves
from loopdiag.probing.states import Point, States, collect, untrained

# The probe; on the control task; on random weights; without the state, and that on random weights.
SCORE, CONTROL, FLOOR, BASELINE, FLOOR_BASELINE = "score", "control", "floor", "baseline", "floor_baseline"


@dataclass(frozen=True, eq=False)
class Found:
    """What one probe gave.

    Attributes:
        kind: `SCORE`, `CONTROL`, `FLOOR`, `BASELINE` or `FLOOR_BASELINE`.
        target: Its name.
        hook: Where; None for every hook, and for what has none.
        loop: Where; None for every loop.
        score, nll: By document; no score where the kind has none.
        C: The chosen strength; None where nothing was fitted.
        unconverged: How many of its fits did not converge; of a probe that stands in several places, in the first.
    """

    kind: str
    target: str
    hook: str | None
    loop: int | None
    score: np.ndarray | None
    nll: np.ndarray
    C: float | None = None
    unconverged: int = 0


@dataclass(frozen=True, eq=False)
class Run:
    """What all probes of one call share.

    Attributes:
        model: The model.
        n_loops: Loops to run.
        halves: Documents to fit on and to report on.
        loops_of: The loops of each hook.
        batch_size: Documents of a batch.
        seed: Of everything that is drawn.
        tell: Called with what is being done, how much is done, of how much.
    """

    model: LoopedLM
    n_loops: int
    halves: Halves
    loops_of: dict[str, list[int]]
    batch_size: int
    seed: int
    tell: Callable[[str, int, int], None]
    _done: Counter[str] = field(default_factory=Counter)

    def states(self, places: BothPlaces, points: Sequence[Point]) -> Iterator[tuple[str, States]]:
        """States of the model (`SCORE`), then of its random twin (`FLOOR`)."""
        run: dict[str, Any] = {"n_loops": self.n_loops, "batch_size": self.batch_size, "seed": self.seed}
        run["tell"] = lambda done: self.count("recording states", done, of=2 * sum(map(len, self.halves)))
        for kind, net in ((SCORE, self.model), (FLOOR, untrained(self.model, self.seed))):
            fit, report = (collect(net, *half, points, **run) for half in zip(self.halves, places, strict=True))
            yield kind, States(places, (fit, report))

    def count(self, what: str, more: int = 1, *, of: int) -> None:
        """Tell that more is done."""
        self._done[what] += more
        self.tell(what, self._done[what], of)
