"""Disks as bad days bring them: a message, exit code 1, and what was there before is still there."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from synthetic import make
from test_cli import run

from loopdiag.errors import InputError
from loopdiag.files import whole, write_all

QUICK = ("--documents", "16", "--max-tokens", "16", "--measures", "prediction", "--quiet")
OLD = b"an earlier result"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "d.nc"
    make(2, groups=("prediction", "offset"), documents=6).save(file)
    return file


@contextmanager
def full_after(size):
    """Files that grow beyond so many bytes fail to be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def expect_failure(result, folder, target):
    """Exit code 1 with the system's reason, the old file as it was, and nothing beside it."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert target.read_bytes() == OLD
    assert [file.name for file in folder.iterdir() if file.suffix != ".parts"] == [target.name]


COMMANDS = {
    "recommend --json": lambda saved, target: ("recommend", saved, "--json", target, "--quiet"),
    "report": lambda saved, target: ("report", saved, "--out", target, "--quiet"),
    "diagnose": lambda saved, target: ("diagnose", "tiny-plt-2", *QUICK, "--save", target),
    "recommend --save": lambda saved, target: ("recommend", "tiny-plt-2", *QUICK, "--save", target),
    "intervene --save": lambda saved, target: (
        *("intervene", "tiny-plt-2", "--documents", "16", "--max-tokens", "16", "--only", "loops", "--quiet"),
        *("--save", target),
    ),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk(saved, tmp_path, command):
    """Where it is full at once, and where it is full in the middle."""
    target = tmp_path / "result"
    target.write_bytes(OLD)
    with full_after(1_000):
        result = run(*command(saved, target))
    expect_failure(result, tmp_path, target)


def test_a_full_disk_of_figures(saved, tmp_path):
    """Figures that were there stay whole, and none is half there."""
    (tmp_path / "gain_cost.svg").write_bytes(OLD)
    with full_after(1_000):
        result = run("figures", saved, "--out", tmp_path, "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (tmp_path / "gain_cost.svg").read_bytes() == OLD
    assert all(file.stat().st_size < 1_000 for file in tmp_path.iterdir())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("arguments", [("models",), ("info", "tiny-plt-2"), ("info", "tiny-plt-2", "--json")])
def test_an_output_that_takes_nothing(arguments):
    """/dev/full is a disk without room."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "loopdiag", *arguments], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["/dev/null", "/dev/full", "pipe", "folder"])
@pytest.mark.parametrize("option", ["--json", "--save"])
def test_nothing_takes_the_place_of_a_device(tmp_path, what, option):
    """Files are written beside their name and moved there, which would put a file where the device was."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    target = Path(what) if what.startswith("/") else tmp_path / what
    before = target.stat().st_mode
    result = run("recommend", "tiny-plt-2", *QUICK, option, target)
    assert result.exit_code == 2
    assert (
        f"{target} is a {'folder' if what == 'folder' else 'pipe or a device'}: give the name of a file"
        in result.stderr
    )
    with pytest.raises(InputError, match="give the name of a file"), whole(target):
        pass
    assert target.stat().st_mode == before


@pytest.mark.parametrize("option", ["--json", "--save", "--figures"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, option):
    """Refused before any work."""
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).startswith(str(tmp_path)))
    result = run("recommend", "tiny-plt-2", option, tmp_path / "x")
    assert result.exit_code == 2
    assert "no folder that can be written to" in result.stderr


def test_a_folder_below_a_file(tmp_path):
    """There is none, and none can be made."""
    (tmp_path / "file").write_bytes(OLD)
    for option in ("--json", "--figures"):
        result = run("recommend", "tiny-plt-2", option, tmp_path / "file" / "x")
        assert result.exit_code == 2
        assert "no folder that can be written to" in result.stderr


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENXIO])
def test_a_read_that_is_interrupted(tmp_path, monkeypatch, code):
    """Of a configuration and of data: the file is named, and the reason."""
    failing = tmp_path / "config.json"
    failing.write_text("{}")
    (tmp_path / "x.jsonl").write_text("{}")

    def broken(self, *_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_text", broken)
    monkeypatch.setattr(Path, "read_bytes", broken)
    for arguments, file in ((("info", tmp_path), failing), (("recommend", "--data", tmp_path / "x.jsonl"), "x.jsonl")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert f"{file} cannot be read: {os.strerror(code)}" in result.stderr


@pytest.mark.parametrize("before", [None, OLD])
@pytest.mark.parametrize(
    "fails", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(1)]
)
def test_files_are_whole_or_not_at_all(tmp_path, before, fails):
    """Whatever breaks the writing off."""
    target = tmp_path / "result"
    if before:
        target.write_bytes(before)

    def broken_off():
        with whole(target) as partial:
            partial.write_bytes(b"half")
            raise fails

    with pytest.raises(type(fails)):
        broken_off()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_several_files_stop_at_the_first_that_fails(tmp_path):
    """Those before are whole, the others as they were."""
    (tmp_path / "b").write_bytes(OLD)
    with full_after(100), pytest.raises(OSError, match="File too large"):
        write_all(tmp_path, {"a": b"x" * 50, "b": b"x" * 500, "c": b"x" * 50})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"x" * 50, "b": OLD}
