"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loopdiag.errors import InputError


def refuse_special(target: Path) -> None:
    """Refuse to write where something else than a file is: a device such as /dev/null would be replaced by a file.

    Raises:
        InputError: It is a folder, a pipe or a device.
    """
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "a pipe or a device"
        raise InputError(f"{target} is {what}: give the name of a file.")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary name beside `target` to write to; it becomes `target` at the end, or goes away if writing fails.

    What a killed process of this machine left of the same target goes away, too.
    """
    ours = f".{target.name}.{socket.gethostname()}."
    for left in target.parent.glob(f"{glob.escape(ours)}*.partial"):
        pid = left.name.removeprefix(ours).removesuffix(".partial")
        if pid.isdecimal() and not _runs(int(pid)):
            left.unlink(missing_ok=True)
    refuse_special(target)
    partial = target.with_name(f"{ours}{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether there is such a process."""
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_all(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, which is made if needed, each whole or not at all; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with whole(folder / name) as partial:
            partial.write_bytes(content)
    return [folder / name for name in contents]
