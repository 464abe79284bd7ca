"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


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
