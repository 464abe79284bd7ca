"""The grid of a sweep: models that differ in nothing but the factors named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loopdiag.errors import InputError
from loopdiag.model.config import LoopedConfig, Memory

OFFSETS = {"on": 1, "off": 0}
MEMORIES: tuple[Memory, ...] = ("first", "own")
SEARCH_SEED = 1_000_003  # of the short trainings that choose learning rates: of no model that is measured


@dataclass(frozen=True, order=True)
class Cell:
    """One model of a sweep."""

    seed: int
    n_loops: int
    offset: int
    memory: Memory

    @property
    def name(self) -> str:
        """A file name."""
        return f"loops{self.n_loops}-offset{self.offset}-{self.memory}-seed{self.seed}"

    def config(self, base: LoopedConfig) -> LoopedConfig:
        """The model's configuration."""
        return replace(base, n_loops=self.n_loops, offset=self.offset, memory=self.memory)


@dataclass(frozen=True)
class Grid:
    """Loop counts x offsets x memories x seeds, of which a model with one loop is one cell for each seed.

    It has no loop that an offset or a shared memory could reach: the same weights, bit for bit, come out of each.

    Attributes:
        loops: Loop counts, rising.
        offsets: Cross-loop position offsets in tokens, the one that counts as the standard first.
        memories: Whose keys and values later loops read, likewise.
        seeds: Seeds of initial weights and data order.

    Raises:
        InputError: An empty or repeated factor, or values that are not allowed.
    """

    loops: tuple[int, ...]
    offsets: tuple[int, ...] = (1, 0)
    memories: tuple[Memory, ...] = ("first",)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name, values, least in (("loops", self.loops, 1), ("offsets", self.offsets, 0), ("seeds", self.seeds, 0)):
            if not values or len(set(values)) < len(values) or any(value < least for value in values):
                raise InputError(f"{name} = {values} is not allowed: give different integers, each {least} or more.")
        if not self.memories or len(set(self.memories)) < len(self.memories) or not set(self.memories) <= set(MEMORIES):
            raise InputError(f"memories = {self.memories} is not allowed: give one or both of {', '.join(MEMORIES)}.")
        if list(self.loops) != sorted(self.loops):
            raise InputError(f"loops = {self.loops} is not allowed: give loop counts that rise.")

    def cell(self, seed: int, memory: Memory, offset: int, n_loops: int) -> Cell:
        """The model of a place in the grid."""
        if n_loops == 1:  # the same one whatever else the grid has, so that it stays when that is extended
            memory, offset = MEMORIES[0], OFFSETS["on"]
        return Cell(seed, n_loops, offset, memory)

    def cells(self, seeds: Sequence[int] | None = None) -> list[Cell]:
        """All models, seed by seed, so that an unfinished sweep has whole seeds; the longest trainings first."""
        places = [
            self.cell(seed, memory, offset, n_loops)
            for seed in (self.seeds if seeds is None else seeds)
            for n_loops in reversed(self.loops)
            for memory in self.memories
            for offset in self.offsets
        ]
        return list(dict.fromkeys(places))
