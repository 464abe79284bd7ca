"""From arguments to a model and to a diagnosis."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopdiag.cli.options import BUNDLED_DATA, LARGEST_SEED, MOST_LOOPS, Device, Dtype, in_range
from loopdiag.cli.output import print_notes, progress_bars, stderr
from loopdiag.errors import InputError

if TYPE_CHECKING:
    from loopdiag.diagnosis import Diagnosis
    from loopdiag.model import LoopedLM


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
            import torch

            from loopdiag.model.loading import load

            if self.device == Device.cuda and not torch.cuda.is_available():
                raise InputError("--device cuda: torch sees no GPU here. Use --device cpu or auto.")
            return load(
                self.model,
                n_loops=loops,
                dtype=self.dtype.value,
                device="cuda" if self.device != Device.cpu and torch.cuda.is_available() else "cpu",
                revision=self.revision,
                local_files_only=self.offline,
            )


@dataclass(frozen=True)
class Run:
    """The arguments that a diagnosis comes from."""

    checkpoint: Checkpoint
    data: str
    documents: int | None
    max_tokens: int | None
    loops: int | None
    batch_size: int
    seed: int
    quiet: bool

    def diagnosis(self) -> Diagnosis:
        """Read a saved diagnosis, or make one; everything that can be wrong is found before the model runs."""
        in_range("--documents", self.documents, 16)
        in_range("--max-tokens", self.max_tokens, 16)
        in_range("--loops", self.loops, 1, MOST_LOOPS)
        in_range("--batch-size", self.batch_size, 1)
        in_range("--seed", self.seed, 0, LARGEST_SEED)
        model = self.checkpoint.model
        if Path(model).is_file():
            return self._saved()
        if model.endswith(".nc"):
            raise InputError(f"There is no file {model}: a saved diagnosis comes from `loopdiag diagnose --save`.")
        return self._made()

    def _saved(self) -> Diagnosis:
        given = [flag for flag, value, default in self._of_a_run() if value != default]
        if given:
            raise InputError(
                f"{', '.join(given)} cannot change the saved diagnosis {self.checkpoint.model}: diagnose again, or "
                "leave them out."
            )
        from loopdiag.diagnosis import Diagnosis

        return Diagnosis.load(self.checkpoint.model)

    def _of_a_run(self) -> tuple[tuple[str, Any, Any], ...]:
        """Options that a saved diagnosis has settled, with their values and defaults."""
        return (
            ("--data", self.data, BUNDLED_DATA),
            ("--documents", self.documents, None),
            ("--max-tokens", self.max_tokens, None),
            ("--loops", self.loops, None),
            ("--batch-size", self.batch_size, 8),
            ("--revision", self.checkpoint.revision, None),
            ("--offline", self.checkpoint.offline, False),
            ("--device", self.checkpoint.device, Device.auto),
            ("--dtype", self.checkpoint.dtype, Dtype.float32),
        )

    def _made(self) -> Diagnosis:
        from loopdiag import corpus

        text = corpus.bundled() if self.data == BUNDLED_DATA else corpus.read(self.data)
        if self.documents:
            text = text.take(self.documents)

        net = self.checkpoint.load(self.loops, self.quiet)

        from loopdiag import diagnosis

        with progress_bars(self.quiet) as progress:
            made = diagnosis.diagnose(
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
