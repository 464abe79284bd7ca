"""Commands that are killed at random moments: nothing half written, and the same command ends as an unbroken one.

Sweeps are killed in test_cli_sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopdiag.files import whole

ASKED = ["diagnose", "tiny-plt-2", "--documents", "16", "--max-tokens", "32", "--batch-size", "2", "--quiet"]
ASKED += ["--measures", "prediction,readouts,motion,exit_rules"]


def in_folder(arguments: list[str], folder: Path) -> None:
    """The command line, in a process that is forked from one that has imported it; what it says is in `said`."""
    os.chdir(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)

    from loopdiag.cli import app

    app(arguments)


@pytest.fixture(scope="module")
def start():
    """Start a command in a folder, within a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loopdiag.cli", "loopdiag.diagnosis", "loopdiag.interventions", "loopdiag.report"])

    def started(arguments: list[str], folder: Path):
        process = context.Process(target=in_folder, args=(arguments, folder))
        process.start()
        return process

    return started


def contents(folder: Path) -> dict[str, bytes]:
    """All files that look whole: no point in front, and not among the parts of a diagnosis."""
    found = [file for file in folder.rglob("*") if file.is_file() and file.parent.suffix != ".parts"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if not file.name.startswith(".")}


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """Folders in which commands ran without a kill, and how many seconds that took."""
    made: dict[str, tuple[Path, float]] = {}

    def ran(arguments: list[str], given: dict[str, bytes]) -> tuple[Path, float]:
        if arguments[0] not in made:
            folder = tmp_path_factory.mktemp(arguments[0])
            for name, content in given.items():
                (folder / name).write_bytes(content)
            start(["--help"], folder).join()  # the process that all are forked from is up
            began = time.monotonic()
            process = start(arguments, folder)
            process.join()
            assert process.exitcode == 0, (folder / "said").read_text()
            made[arguments[0]] = folder, time.monotonic() - began
        return made[arguments[0]]

    return ran


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kills"), [("diagnose", 8), ("report", 6), ("figures", 6)])
def test_killed_again_and_again(start, unbroken, tmp_path, command, kills):
    """Whatever has a final name is whole at all times; in the end all is there, to the byte, and nothing else."""
    commands = {
        "diagnose": [*ASKED, "--save", "saved.nc", "--resume"],
        "report": ["report", "saved.nc", "--out", "page.html"],
        "figures": ["figures", "saved.nc", "--out", "drawn", "--against-paper", "paper.md"],
    }
    given = {}
    if command != "diagnose":
        saved, _ = unbroken(commands["diagnose"], {})
        given = {"saved.nc": (saved / "saved.nc").read_bytes()}
    folder, seconds = unbroken(commands[command], given)
    expected = {name: content for name, content in contents(folder).items() if name != "said"}
    for name, content in given.items():
        (tmp_path / name).write_bytes(content)
    chosen, killed, goes_on = random.Random(command), 0, command != "diagnose"
    while killed < kills or not goes_on:
        process = start(commands[command], tmp_path)
        process.join(chosen.uniform(0, seconds))
        killed += process.is_alive()
        process.kill()
        process.join()
        goes_on |= any((tmp_path / "saved.nc.parts").glob("*.safetensors"))
        for name, content in contents(tmp_path).items():
            assert name == "said" or content == expected[name], name
    process = start(commands[command], tmp_path)
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert {name: content for name, content in contents(tmp_path).items() if name != "said"} == expected
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {*expected, "said"}


# -- what a killed writer leaves ---------------------------------------------------------------------


def left_by(target: Path) -> Path:
    """What a process that was killed while it wrote left."""
    code = "import os, signal, sys; from pathlib import Path; from loopdiag.files import whole\n"
    code += "with whole(Path(sys.argv[1])) as partial:\n    partial.write_text('half')\n    os.kill(os.getpid(), 9)"
    before = set(target.parent.iterdir())
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    (left,) = set(target.parent.iterdir()) - before
    return left


def test_what_a_killed_writer_left_goes_away(tmp_path):
    """When the same file is written again, also if that fails; of other files, nothing is touched."""
    target, other = tmp_path / "a[b].csv", tmp_path / "c.csv"
    target.write_text("before")
    ours, theirs = left_by(target), left_by(other)
    with pytest.raises(FileNotFoundError), whole(target):
        assert not ours.exists()  # and nothing is written
    assert {target, theirs} == set(tmp_path.iterdir())
    assert target.read_text() == "before"
    with whole(other) as partial:
        partial.write_text("whole")
    assert {target, other} == set(tmp_path.iterdir())


def test_what_another_process_writes_stays(tmp_path):
    """One that is at work here, or that may be at work on another machine."""
    target = tmp_path / "a.csv"
    left = left_by(target)
    here = left.name.split(".")[-2]
    at_work = left.rename(left.with_name(left.name.replace(f".{here}.", f".{os.getppid()}.")))
    elsewhere = left_by(target).rename(tmp_path / f".a.csv.another-machine.{here}.partial")
    with whole(target) as partial:
        partial.write_text("whole")
    assert set(tmp_path.iterdir()) == {target, at_work, elsewhere}
