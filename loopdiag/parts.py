"""What a run has measured so far, on disk: for a run that is killed and goes on, and for processes that share one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopdiag.errors import InputError
from loopdiag.files import whole

ABOUT, LOCK, SUFFIX = "about.json", "lock", ".safetensors"

T = TypeVar("T")


class PartsError(InputError):
    """A folder of parts that cannot be used; the message says what is there, and what to do."""


class Parts:
    """A folder of named parts of a result, each whole or not there.

    Where `torch.distributed` is initialised, its processes share the folder, and what there is to do.

    Args:
        folder: Made if needed.
        resume: Go on from the parts that a stopped run left there.

    Attributes:
        first: Whether this is the first of the processes, which keeps the whole result.

    Raises:
        PartsError: The folder has parts, and is not to go on; or it is somebody's for something else.

    Example:
        The same lines go on where they were stopped, and share the work under `torchrun`:

        >>> from loopdiag import corpus, diagnose, load
        >>> from loopdiag.parts import Parts
        >>> parts = Parts("tiny.nc.parts", resume=True)
        >>> diagnosis = diagnose(load("tiny-plt-2"), corpus.bundled().take(16), max_tokens=32, parts=parts)
        >>> if parts.first:
        ...     diagnosis.save("tiny.nc")
        ...     parts.remove()
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.folder = Path(folder)
        together = dist.is_available() and dist.is_initialized()
        self._process, self._processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self._lock = FileLock(self.folder / LOCK, blocking=False)
        if self._is_anothers():
            raise PartsError(f"{self.folder} is there and holds no parts of a diagnosis: move it, or save elsewhere.")
        self._resume = resume
        self._left = self.names()
        if wrong := self._unasked():
            raise PartsError(wrong)

    @property
    def first(self) -> bool:
        return self._process == 0

    @contextmanager
    def claimed(self, about: Mapping[str, Any]) -> Iterator[None]:
        """Have the folder for these processes alone, and say in it what its parts are of; they leave it together.

        Args:
            about: Everything that shapes them, as JSON has it.

        Raises:
            PartsError: The folder has parts of something else, another run is at work in it, or the processes differ.
        """
        ours = json.loads(json.dumps(about))
        everyone = [ours] * self._processes
        if self._processes > 1:
            dist.all_gather_object(everyone, ours)
        # What is there by now: another run may have worked in it while this one loaded its model.
        wrong = self._take(everyone) if self.first else None
        if self._processes > 1:
            said: list[Any] = [wrong, self._left]
            dist.broadcast_object_list(said)
            wrong, self._left = said
        if wrong is not None:
            raise PartsError(wrong)
        try:
            yield
            self.meet()
        finally:
            self._lock.release()

    def share(self, names: Sequence[str]) -> list[str]:
        """Of the parts that a stopped run did not leave, those that this process is to make."""
        return [name for name in names if name not in self._left][self._process :: self._processes]

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A part that the first process makes, unless it is there, for all."""
        if self.first and name not in self:
            self[name] = make()
        self.meet()
        return self[name]

    def meet(self) -> None:
        """Wait for the other processes; one that died is an error."""
        if self._processes > 1:
            dist.barrier()

    def names(self) -> set[str]:
        """Parts that are there."""
        return {file.name.removesuffix(SUFFIX) for file in self.folder.glob(f"*{SUFFIX}")}

    def remove(self) -> None:
        """Take the folder away: the whole result is kept elsewhere."""
        for name in self.names():  # before what says what they are of: a kill in between must leave no doubt
            self._file(name).unlink()
        shutil.rmtree(self.folder)

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file()

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self._file(name))
        except SafetensorError as error:
            raise PartsError(f"{self._file(name)} is broken ({error}): delete it, and go on.") from None

    def __setitem__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with whole(self._file(name)) as partial:
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, partial)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _unasked(self) -> str | None:
        """Why not to go on from the parts that are there."""
        if not self._left or self._resume:
            return None
        return (
            f"{self.folder} has what a stopped run measured: go on with it (--resume, in Python resume=True), or "
            "delete the folder to measure anew."
        )

    def _is_anothers(self) -> bool:
        """Whether there is something that is not ours to write into, and to remove in the end."""
        if not self.folder.is_dir():
            return self.folder.exists()
        strange = [file for file in self.folder.iterdir() if file.name != LOCK and not file.name.startswith(".")]
        return bool(strange) and not (self.folder / ABOUT).is_file()

    def _take(self, everyone: Sequence[dict[str, Any]]) -> str | None:
        """Take the folder for these processes; why not, where it cannot be."""
        ours = everyone[0]
        if other := next((theirs for theirs in everyone if theirs != ours), None):
            return f"The processes would not measure the same: {_differ(ours, other)}."
        self.folder.mkdir(exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            return f"Another run is measuring into {self.folder}: wait for it, or stop it."
        said = self.folder / ABOUT
        self._left = self.names()
        wrong = self._unasked()
        if self._left and not wrong:
            theirs = json.loads(said.read_text(encoding="utf-8"))
            if theirs != ours:
                threads = theirs.get("threads")
                hint = f" (OMP_NUM_THREADS={threads} sets its threads)" if threads != ours.get("threads") else ""
                wrong = (
                    f"{self.folder} has parts of another run, with other numbers: {_differ(theirs, ours)}. Run it as "
                    f"then{hint} to go on, or delete the folder to measure anew."
                )
        if wrong:
            self._lock.release()
            return wrong
        if not self._left:
            with whole(said) as partial:
                partial.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        return None


def _differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, shortly."""
    names = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} ({_brief(before.get(name))}, now {_brief(now[name])})" for name in names)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
