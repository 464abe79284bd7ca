"""From arguments to a model and to a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loopdiag.cli.options import BUNDLED_DATA, LARGEST_SEED, MOST_LOOPS, Device, Dtype, in_range
from loopdiag.cli.output import print_notes, progress_bars, stderr
from loopdiag.errors import InputError

if TYPE_CHECKING:
    from loopdiag.corpus import Corpus
    from loopdiag.diagnosis import Diagnosis
    from loopdiag.interventions import Effects
    from loopdiag.losses import SweepLosses
    from loopdiag.model import LoopedLM
    from loopdiag.parts import Parts
    from loopdiag.scores import ProbeScores

Measured = TypeVar("Measured", "Diagnosis", "Effects", "ProbeScores")

SWEEP, SWEEP_SETTINGS = "sweep.nc", "sweep.json"  # those of `loopdiag.sweep`, which would load torch


@dataclass(frozen=True)
class Checkpoint:
    """The arguments that a model comes from."""

    model: str
    revision: str | None
    offline: bool
    device: Device
    dtype: Dtype

    def load(self, loops: int | None, quiet: bool) -> LoopedLM:
        """The model on its device."""
        with nullcontext() if quiet else stderr.status("loading the model"):
            from loopdiag.model.loading import load

            return load(
                self.model,
                n_loops=loops,
                dtype=self.dtype.value,
                device=self.device.value,
                revision=self.revision,
                local_files_only=self.offline,
            )


def kind_of(file: Path) -> str | None:
    """What a file of results says it holds; None where it does not say."""
    import h5py

    try:
        with h5py.File(file) as content:
            kind = content.attrs.get("kind")
    except Exception:  # of many kinds; who reads the file says what is wrong with it
        return None
    return kind if isinstance(kind, str) else None


@dataclass(frozen=True)
class Run:
    """The arguments that a diagnosis, or the effects of interventions, come from."""

    checkpoint: Checkpoint
    data: str
    documents: int | None
    max_tokens: int | None
    loops: int | None
    batch_size: int
    seed: int
    quiet: bool
    measures: str = "default"
    at: str | None = None

    def diagnosis(
        self,
        needs: str | None = None,
        parts: Parts | None = None,
        also: Callable[[LoopedLM], None] | None = None,
    ) -> Diagnosis:
        """Read a saved diagnosis, or make one; everything that can be wrong is found before the model runs.

        Args:
            needs: A group of measures that has to be among those asked for.
            parts: Where what is measured is kept as it appears.
            also: Called with the model before it is measured.
        """
        self._check()
        kept = self.kept()
        model = self.checkpoint.model
        if Path(model).is_file():
            if also is not None:
                raise InputError(f"--decoding times a model, and {model} is a saved diagnosis: give the model.")
            return self._saved()
        if model.endswith(".nc"):
            raise InputError(f"There is no file {model}: a saved diagnosis comes from `loopdiag diagnose --save`.")
        from loopdiag.measures import chosen

        groups = chosen([name.strip() for name in self.measures.split(",")])
        if needs is not None and needs not in groups:
            raise InputError(f"--measures {self.measures} lacks {needs}, on which the answer rests: add it.")

        from loopdiag.diagnosis import diagnose

        def measured(net: LoopedLM, *rest: Any, **settings: Any) -> Diagnosis:
            if also is not None:
                also(net)
            return diagnose(net, *rest, at=kept, measures=groups, parts=parts, **settings)

        return self._made(measured, loops=kept[-1] if kept else self.loops)

    def losses(self) -> SweepLosses | None:
        """The losses of a sweep, where the model is the folder or the file of one."""
        given = Path(self.checkpoint.model)
        file = given / SWEEP if given.is_dir() else given
        if not file.is_file():
            if (given / SWEEP_SETTINGS).is_file():
                raise InputError(
                    f"{given} is a sweep that has no finished model yet: `loopdiag sweep` goes on with it."
                )
            return None
        if (kind_of(file) or file.stem) != "sweep":
            return None
        self._check()
        self._settled("the sweep", but="--at")

        from loopdiag.losses import SweepLosses

        return SweepLosses.load(file)

    def effects(self, groups: Sequence[str] | None) -> Effects:
        """Measure interventions; everything that can be wrong is found before the model runs."""
        self._check()

        from loopdiag.interventions import intervene

        return self._made(partial(intervene, which=groups), self.loops)

    def probed(self, suite: str, hooks: Sequence[str] | None, places: int, classes: int) -> ProbeScores:
        """Run a suite of probes; everything that can be wrong is found before the model runs."""
        self._check()

        from loopdiag.probing import HOOKS, probe

        asked = partial(probe, suite=suite, hooks=hooks or HOOKS, places=places, classes=classes)
        return self._made(asked, self.loops)

    def _check(self) -> None:
        in_range("--documents", self.documents, 16)
        in_range("--max-tokens", self.max_tokens, 16)
        in_range("--loops", self.loops, 1, MOST_LOOPS)
        in_range("--batch-size", self.batch_size, 1)
        in_range("--seed", self.seed, 0, LARGEST_SEED)

    def _corpus(self) -> Corpus:
        from loopdiag import corpus

        text = corpus.bundled() if self.data == BUNDLED_DATA else corpus.read(self.data)
        return text.take(self.documents) if self.documents else text

    def _saved(self) -> Diagnosis:
        self._settled("the saved diagnosis")

        from loopdiag.diagnosis import Diagnosis

        return Diagnosis.load(self.checkpoint.model)

    def _settled(self, what: str, but: str | None = None) -> None:
        """Refuse options that a saved result has settled, `but` one that chooses among what it has."""
        of_a_run: tuple[tuple[str, Any, Any], ...] = (
            ("--data", self.data, BUNDLED_DATA),
            ("--documents", self.documents, None),
            ("--max-tokens", self.max_tokens, None),
            ("--loops", self.loops, None),
            ("--at", self.at, None),
            ("--measures", self.measures, "default"),
            ("--batch-size", self.batch_size, 8),
            ("--revision", self.checkpoint.revision, None),
            ("--offline", self.checkpoint.offline, False),
            ("--device", self.checkpoint.device, Device.auto),
            ("--dtype", self.checkpoint.dtype, Dtype.float32),
        )
        if given := [flag for flag, value, default in of_a_run if value != default and flag != but]:
            raise InputError(
                f"{', '.join(given)} cannot change {what} {self.checkpoint.model}: measure again, or leave them out."
            )

    def kept(self) -> list[int] | None:
        """The loops of --at."""
        if self.at is None:
            return None
        loops = [int(loop) if loop.strip().isdecimal() else 0 for loop in self.at.split(",")]
        if loops[0] != 1 or loops != sorted(set(loops)) or loops[-1] > MOST_LOOPS:
            raise InputError(
                f"--at {self.at} is not allowed: give loop numbers that rise from 1, at most {MOST_LOOPS}, such as "
                "1,2,4,8."
            )
        if self.loops not in (None, loops[-1]):
            raise InputError(f"--at ends with loop {loops[-1]} and --loops is {self.loops}: leave --loops out.")
        return loops

    def _made(self, measure: Callable[..., Measured], loops: int | None) -> Measured:
        """What `measure` makes of the corpus and the model, loaded for that many loops."""
        text = self._corpus()
        net = self.checkpoint.load(loops, self.quiet)
        with progress_bars(self.quiet) as progress:
            made = measure(
                net,
                text,
                n_loops=self.loops,
                max_tokens=self.max_tokens,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=progress,
            )
        if not self.quiet:
            print_notes(made)
        return made
