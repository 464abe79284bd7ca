"""One diagnosis by several processes: the numbers of one process, and a death that is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import xarray as xr
from test_cli import run

from loopdiag import parts as module
from loopdiag.cli import processes
from loopdiag.diagnosis import Diagnosis
from loopdiag.parts import Parts, PartsError

# The command line that notes which documents each process runs, and dies where it is told to.
NOTED = """
import json, os, signal
from pathlib import Path

from loopdiag import diagnosis
from loopdiag.cli import main
from loopdiag.parts import Parts
from loopdiag.trace import record

rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
noted = Path(os.environ["NOTED"]) / f"ran-{rank}.jsonl"
keep, kept = Parts.__setitem__, []


def noting(model, batch, *others, **settings):
    with noted.open("a") as file:
        file.write(json.dumps(batch.names) + "\\n")
    return record(model, batch, *others, **settings)


def keeping(self, name, tensors):
    keep(self, name, tensors)
    kept.append(name)
    if os.environ.get("DIES") == f"{rank} after {len(kept)}":
        os.kill(os.getpid(), signal.SIGKILL)


diagnosis.record, Parts.__setitem__ = noting, keeping
main()
"""
# Sixteen documents in batches of two: four to fit on, four to report on.
ASKED = ["diagnose", "tiny-plt-2", "--documents", "16", "--max-tokens", "32", "--batch-size", "2"]
ASKED += ["--measures", "prediction,readouts,pooled,exit_rules,tokens,noise"]
BATCHES = 4


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes."""
    file = tmp_path_factory.mktemp("alone") / "saved.nc"
    result = run(*ASKED, "--quiet", "--save", file)
    assert result.exit_code == 0, result.output
    return Diagnosis.load(file).data


@pytest.fixture
def environment(tmp_path):
    """Where `-m noted_diagnose` is that command line; what it notes is in `noted`."""
    (tmp_path / "noted_diagnose.py").write_text(NOTED)
    (tmp_path / "noted").mkdir()
    ours = {"NOTED": str(tmp_path / "noted"), "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    return os.environ | ours | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def reported(noted: Path, names: set[str]) -> dict[int, list[tuple[str, ...]]]:
    """The batches of reported documents that each process ran, but for what each does when all is measured."""
    found = {}
    for file in sorted(noted.iterdir()):
        batches = [tuple(json.loads(line)) for line in file.read_text().splitlines()]
        found[int(file.stem.removeprefix("ran-"))] = [batch for batch in batches if set(batch) <= names]
    return found


@pytest.mark.slow
def test_two_processes_make_what_one_does(alone, environment, tmp_path):
    """Under torchrun: to the bit, half of the batches run by each; the first one says where the result is."""
    file = tmp_path / "saved.nc"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "noted_diagnose", *ASKED, "--save", str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{file}\n"
    assert done.stderr.count("documents were cut") == 1
    xr.testing.assert_identical(Diagnosis.load(file).data, alone)
    assert not (tmp_path / "saved.nc.parts").exists()
    names = alone["document"].values.tolist()
    in_order = [tuple(names[first : first + 2]) for first in range(0, 8, 2)]
    ran = reported(tmp_path / "noted", set(names))
    # After these, both run the noise's documents once more in higher precision, and those that are shown.
    assert {rank: batches[: BATCHES // 2] for rank, batches in ran.items()} == {0: in_order[0::2], 1: in_order[1::2]}


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job(alone, environment, tmp_path):
    """Under accelerate: a failure and no result; one process goes on with what is missing, and no other document."""
    file = tmp_path / "saved.nc"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    # The second process has made half of the exit rules, and its first batch of the report.
    done = subprocess.run(
        [*launch, "-m", "noted_diagnose", *ASKED, "--save", str(file)],
        env=environment | {"DIES": f"1 after {BATCHES // 2 + 1}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert not file.exists()
    names = alone["document"].values.tolist()
    measured = sorted(part.stem for part in (tmp_path / "saved.nc.parts").glob("measuring-*.safetensors"))
    assert "measuring-00001" in measured
    assert len(measured) < BATCHES
    refused = run(*ASKED, "--quiet", "--save", file)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr

    for noted in (tmp_path / "noted").iterdir():
        noted.unlink()
    again = subprocess.run(
        [sys.executable, "-m", "noted_diagnose", *ASKED, "--resume", "--quiet", "--save", str(file)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{file}\n", "")
    xr.testing.assert_identical(Diagnosis.load(file).data, alone)
    missing = sorted({f"measuring-{index:05}" for index in range(BATCHES)} - set(measured))
    ran = reported(tmp_path / "noted", set(names))[0]
    firsts = [2 * int(part.removeprefix("measuring-")) for part in missing]
    assert ran[: len(missing)] == [tuple(names[first : first + 2]) for first in firsts]
    # Then the noise, as it is and in higher precision, and the shown documents.
    assert len(ran) == len(missing) + 2 + 2


@pytest.mark.slow
def test_the_others_do_not_wait_for_a_dead_process(environment, tmp_path):
    """Without a launcher to end them, as MPI may start them: an error and exit code 1, and nothing that looks whole."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "noted_diagnose", *ASKED, "--quiet", "--save", str(tmp_path / "saved.nc")],
            env=environment
            | {
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_SIZE": "2",
                "MASTER_PORT": port,
                "DIES": "0 after 1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [-signal.SIGKILL, 1]
    assert said[1][0] == ""
    assert said[1][1].startswith("error: ")
    assert "Traceback" not in said[1][1]
    assert not (tmp_path / "saved.nc").exists()
    assert [part.name for part in (tmp_path / "saved.nc.parts").glob("*.safetensors")] == ["readouts.safetensors"]


@pytest.mark.parametrize("command", ["recommend", "intervene", "probe", "report", "figures", "generate", "info"])
def test_commands_that_are_for_one_process(monkeypatch, command):
    """Each would do the same, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(command, "tiny-plt-2")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"`loopdiag {command}` is for one process, and 2 were started" in result.stderr


@pytest.mark.parametrize("command", [["diagnose", "tiny-plt-2"], ["recommend"]])
def test_a_size_of_the_group_that_is_no_number(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "two")
    result = run(*command)
    assert result.exit_code == 2
    assert "WORLD_SIZE = 'two' in the environment is no number" in result.stderr


def test_a_group_that_does_not_come_together(monkeypatch, tmp_path):
    """One process alone with the environment of two: told, not waited for without end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    result = run("diagnose", "tiny-plt-2", "--quiet", "--save", tmp_path / "x.nc")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Not all of the 2 processes that WORLD_SIZE or MPI tells of have come" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"])
def test_each_process_takes_its_own_device(monkeypatch, name):
    """Whatever launcher says which of the machine's processes it is."""
    for other in processes.LOCAL_RANKS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv(name, "3")
    processes._take_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


class Group:
    """Stands for torch.distributed: the second of two processes has said something else."""

    def __init__(self, theirs):
        self.theirs = theirs

    def is_available(self):
        return True

    is_initialized = is_available

    def get_rank(self):
        return 0

    def get_world_size(self):
        return 2

    def all_gather_object(self, everyone, ours):
        everyone[:] = [ours, self.theirs]

    def broadcast_object_list(self, said):
        pass

    def barrier(self):
        pass


def test_processes_that_would_measure_something_else(tmp_path, monkeypatch):
    """Such as with another version or model on another machine: refused, and nothing is made."""
    monkeypatch.setattr(module, "dist", Group({"seed": 0, "threads": 2}))
    parts = Parts(tmp_path / "parts")
    with (
        pytest.raises(PartsError, match=r"would not measure the same: threads \(1, now 2\)"),
        parts.claimed({"seed": 0, "threads": 1}),
    ):
        pytest.fail("claimed")
    assert list(tmp_path.iterdir()) == []


def test_missing_parts_are_shared_out(tmp_path, monkeypatch):
    """In turn, whoever left them; what is there is nobody's."""
    parts = Parts(tmp_path)
    names = [f"part-{index}" for index in range(7)]
    assert parts.share(names) == names
    with parts.claimed({}):
        for name in names[1:3]:
            parts[name] = {"x": torch.ones(1)}
    monkeypatch.setattr(module, "dist", Group({}))
    assert Parts(tmp_path, resume=True).share(names) == ["part-0", "part-4", "part-6"]
