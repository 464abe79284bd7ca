"""What single loops of a run do otherwise than the configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wiring:
    """Exceptions from the configuration, loop by loop; `loopdiag.interventions` sets them on `model.wiring`.

    Attributes:
        order: Makes of the loops (1, ..., n_loops) those to pass: (1, 2, 2, 3) repeats loop 2. All loops
            share their weights, so a loop's name stands for its hook points and what is tied to it. None passes them as
            they come.
        offsets: Offset on the way into single loops, where it is not the configuration's.
        own_memory: Loops whose global branch reads the loop's own keys and values in full instead of loop 1's; None is
            all of them.
        ongoing: How many interventions are going on, those included that do with hooks or the configuration alone.
    """

    order: Callable[[tuple[int, ...]], Sequence[int]] | None = None
    offsets: Mapping[int, int] = field(default_factory=dict)
    own_memory: frozenset[int] | None = frozenset()
    ongoing: int = 0

    @property
    def rewired(self) -> bool:
        """Whether the order of loops, an offset or a memory is another than the configuration's."""
        return self.order is not None or bool(self.offsets) or self.own_memory != frozenset()

    def remembers_itself(self, loop: int) -> bool:
        """Whether the global branch of `loop` reads its own keys and values."""
        return self.own_memory is None or loop in self.own_memory
