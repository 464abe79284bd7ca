"""`loopdiag sweep` as a user meets it: refusals, plans, kills, several processes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import expect_refusal, run
from test_sweep import SMALL, texts

from loopdiag.losses import SweepLosses
from loopdiag.model import facts
from loopdiag.sweep import running

FAST = ["--no-compile", "--no-bf16"]
# The command line, noting each training run in the file TRAINED; the first one waits for the first of other processes.
NOTED = """
import json, os, time
from pathlib import Path

import torch

from loopdiag.cli import main
from loopdiag.sweep import running
from loopdiag.sweep.training import _last_whole_checkpoint, train

noted, processes = Path(os.environ["TRAINED"]), int(os.environ["PROCESSES"])
here = noted.with_name(f"here-{os.getpid()}")


def noting(cfg, recipe, stream, held_out, folder, **keywords):
    if not here.exists():
        here.touch()
        while len(list(noted.parent.glob("here-*"))) < processes:
            time.sleep(0.05)
    said = {"what": folder.name, "process": os.getpid(), "resumed": _last_whole_checkpoint(folder) is not None}
    with noted.open("a") as file:
        file.write(json.dumps(said) + "\\n")
    model = train(cfg, recipe, stream, held_out, folder, **keywords)
    assert not torch.distributed.is_initialized()
    return model


running.train = noting
main()
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Data and size of a sweep that is over in seconds."""
    base = tmp_path_factory.mktemp("asked")
    fields = {name: value for name, value in asdict(SMALL).items() if name not in ("n_loops", "vocab_size")}
    (base / "size.json").write_text(json.dumps(fields))
    data = texts(base / "texts")
    return ["--data", data, "--size", base / "size.json", "--tokens", "384", "--batch-size", "4", *FAST]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--loops", "0"], "--loops 0 is not allowed: give loop counts that rise, such as 1,2,3,4"),
        (["--loops", "2,1"], "--loops 2,1 is not allowed"),
        (["--loops", "2,2"], "--loops 2,2 is not allowed"),
        (["--loops", "65"], "--loops 65 is not allowed"),
        (["--loops", "two"], "--loops two is not allowed"),
        (["--loops", ""], "--loops is not allowed"),
        (["--offset", "maybe"], "--offset maybe is not allowed: give on, off, or both with a comma"),
        (["--offset", "on,on"], "--offset on,on is not allowed"),
        (["--memory", "all"], "--memory all is not allowed: give first, own, or both with a comma"),
        (["--memory", ""], "--memory is not allowed"),
        (["--lr", "0"], "--lr 0 is not allowed: give different numbers above 0, with commas, such as 0.001,0.003"),
        (["--lr", "nan"], "--lr nan is not allowed"),
        (["--lr", "inf"], "--lr inf is not allowed"),
        (["--lr", "0.1,0.10"], "--lr 0.1,0.10 is not allowed"),
        (["--lr", "fast"], "--lr fast is not allowed"),
        (["--seeds", "0"], "--seeds 0 is out of range: allowed 1 to 100"),
        (["--seeds", "101"], "--seeds 101 is out of range: allowed 1 to 100"),
        (["--tokens", "0"], "--tokens 0 is out of range: allowed 1 or more"),
        (["--tokens", "100", "--lr", "0.01"], "100 training tokens do not fill a batch of 4 x 32: ask for more, or"),
        (["--search-tokens", "48"], "48 training tokens do not fill a batch of 4 x 32"),
        (["--tokens", "10000000"], "are more than 4 rounds: ask for fewer, or give more text"),
        (["--search-tokens", "385"], "--search-tokens 385 is out of range: allowed 1 to 384"),
        (["--batch-size", "0"], "--batch-size 0 is out of range: allowed 1 or more"),
        (["--data", "missing.jsonl"], "no such file or folder"),
        (["--data", "missing.jsonl"], "A sweep also takes bundled and the tasks p_hop, permutations, addition"),
        (["--size", "huge"], "A size is also tiny, small, or a JSON file of settings"),
        (["--size", "huge.json"], "huge.json holds no settings of a model"),
        (["--tokenizer", "nobody"], "There is no model 'nobody': bundled are tiny-plt-1"),
        (["--from", "tiny-plt-2"], "--from brings its own size and tokenizer"),
        (["--from", "tiny-plt-2", "--size", "tiny", "--tokenizer", "tiny-plt-1"], "--from brings its own size"),
        (["--from", "tiny-plt-2", "--size", "tiny"], "--from needs --lr: the rates of a training from scratch"),
        (
            ["--from", "tiny-plt-2", "--size", "tiny", "--lr", "1e-4", "--loops", "1,3"],
            "tiny-plt-2 has 2 loops, offset 1 and memory",
        ),
        (["--from", "nobody", "--size", "tiny", "--lr", "1e-4"], "There is no model 'nobody'"),
        (["--diagnose", "everything"], "Unknown measures: everything. Allowed are default, all, and the groups"),
        (["--seeds", "many"], "unable to parse string as an integer"),
    ],
)
def test_bad_arguments(asked, tmp_path, monkeypatch, arguments, said):
    """One message that says what is allowed, exit 2, before any training."""
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained"))
    expect_refusal(run("sweep", *asked, "--out", tmp_path / "out", *arguments), said)
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_a_place_that_cannot_be_written(asked, tmp_path):
    """A file, a folder under a file, and none at all."""
    (tmp_path / "file").touch()
    for out in ("file", "file/out"):
        expect_refusal(run("sweep", *asked, "--out", tmp_path / out), "cannot be made")
    expect_refusal(run("sweep", *asked), "Missing option '--out'")


def test_a_plan_trains_nothing(asked, tmp_path, monkeypatch):
    """It says what there is, what would be trained and how long that takes, in notes; stdout is for results."""
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained"))
    for quiet in ([], ["--quiet"]):
        result = run("sweep", *asked, "--search-tokens", "128", "--seeds", "2", "--out", tmp_path, "--plan", *quiet)
        assert result.exit_code == 0, result.output
        assert result.stdout == ""
        said = " ".join(result.stderr.split())
        assert (
            "texts: 384 tokens to train on; held out are 8 documents to choose learning rates on, 8 to report" in said
        )
        parameters = facts.parameters(replace(SMALL, vocab_size=2048)).once
        each = f"14 models of {parameters:,} parameters, 384 tokens each, in batches of 4 x 32; 14 still to train"
        assert each in said
        assert f"{14 * 384 + 7 * 3 * 128:,} tokens in all: about 0 h 0" in said
        assert "min by one process" in said
    assert not (tmp_path / "cells").exists()


def test_a_sweep_from_start_to_end(asked, tmp_path, monkeypatch):
    """Notes on stderr and the path of the result on stdout; a second time nothing is left to train."""
    command = ["sweep", *asked, "--lr", "0.01", "--loops", "2", "--offset", "off", "--memory", "own", "--out", tmp_path]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "sweep.nc")
    assert "1 models of" in result.stderr
    assert "1 still to train" in result.stderr
    assert "1 of 1 places measured" in result.stderr
    assert SweepLosses.load(tmp_path / "sweep.nc").data["nll"].notnull().all()
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained again"))
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert "0 still to train" in again.stderr
    assert "tokens in all" not in again.stderr
    other = run(*command, "--lr", "0.02")
    expect_refusal(other, f"{tmp_path} holds another sweep (sweep.json says which; rates differs)")


def test_the_standard_comes_first_however_it_is_asked(asked, tmp_path):
    """`off,on` and `own,first` are the grid of `on,off` and `first,own`."""
    from loopdiag.cli.sweep import _grid

    assert _grid("1, 2", "off, on", "own,first", 2) == _grid("1,2", "on,off", "first,own", 2)


def test_launched_processes_have_devices_of_their_own(monkeypatch):
    """Those that a launcher gave, in turn; none where none is to be seen. Nothing of the group is left."""
    from loopdiag.cli.processes import apart

    for given, seen in ((None, "3"), ("4,5", "5"), ("", ""), ("0,2,4,6", "6")):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.setenv(name, "3")
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert apart() == 3
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(os.environ)
        assert apart() == 0


# -- in processes of their own -------------------------------------------------------------------------


def environment(folder: Path, processes: int = 1) -> dict[str, str]:
    """Where `-m noted_sweep` is the command line that notes what it trains."""
    folder.mkdir(exist_ok=True)
    (folder / "noted_sweep.py").write_text(NOTED)
    ours = {"TRAINED": str(folder / "trained.jsonl"), "PROCESSES": str(processes), "PYTHONPATH": str(folder)}
    return os.environ | ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def trained(folder: Path) -> list[dict]:
    file = folder / "trained.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n") if line] if file.is_file() else []


def assert_same_numbers(one: Path, other: Path) -> None:
    ours, theirs = (SweepLosses.load(folder / "sweep.nc") for folder in (one, other))
    for name in theirs.data.variables:
        np.testing.assert_array_equal(ours.data[name], theirs.data[name], err_msg=str(name))
    assert ours.provenance["models"] == theirs.provenance["models"]


def test_quiet_is_silent(asked, tmp_path):
    """Nothing on stderr, whatever the libraries would say; the result on stdout."""
    command = [sys.executable, "-m", "loopdiag", "sweep", *map(str, asked), "--lr", "0.01", "--loops", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--quiet"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'out' / 'sweep.nc'}\n", "")


LONGER = ["--tokens", "1536", "--search-tokens", "512", "--lr", "0.003,0.01", "--loops", "1,2"]


@pytest.mark.slow
def test_a_killed_sweep_ends_as_an_unbroken_one(asked, tmp_path):
    """Killed again and again, at whatever moment, and run again: the same numbers, and nothing finished twice."""
    chosen, out, work = random.Random(0), tmp_path / "out", tmp_path / "work"
    command = [sys.executable, "-m", "noted_sweep", "sweep", *map(str, asked), *LONGER, "--quiet", "--out"]
    resumed, killed = 0, 0
    for kill in range(6):
        before = len(trained(work))
        process = subprocess.Popen([*command, str(out)], env=environment(work))
        while len(trained(work)) == before and process.poll() is None:
            time.sleep(0.01)
        if kill % 2:  # with a whole checkpoint, of which there are twelve of each model
            while not list((out / "runs").glob("*seed0/checkpoint-[2-9]")) and process.poll() is None:
                time.sleep(0.001)
        else:
            time.sleep(chosen.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # a fast machine ended it before the signal
            break
        killed += 1
        there = {file.stem for folder in ("cells", "search") for file in (out / folder).glob("*-*") if file.suffix}
        done = {name for name in there if not name.startswith(".")}
        since = trained(work)[before:]
        resumed += since[0]["resumed"]
        assert len({run["what"] for run in since}) == len(since)
        (work / f"done{kill}").write_text(json.dumps([len(trained(work)), sorted(done)]))
    finished = subprocess.run([*command, str(out)], env=environment(work), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    resumed += sum(run["resumed"] for run in trained(work)[-8:])
    assert resumed
    assert killed >= 2
    for kill in range(killed):
        count, done = json.loads((work / f"done{kill}").read_text())
        assert not {run["what"] for run in trained(work)[count:]} & set(done)
    assert not list((out / "runs").iterdir())
    unbroken = subprocess.run(
        [*command, str(tmp_path / "unbroken")], env=environment(tmp_path / "other"), capture_output=True, text=True
    )
    assert unbroken.returncode == 0, unbroken.stderr
    assert len(trained(tmp_path / "other")) == 3 * 2 + 3
    assert_same_numbers(out, tmp_path / "unbroken")
    there, expected = (
        {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
        for folder in (out, tmp_path / "unbroken")
    )
    assert set(there) == set(expected)  # nothing that a killed process left
    for name in expected:
        assert not name.endswith(".json") or there[name].read_bytes() == expected[name].read_bytes(), name


@pytest.mark.slow
def test_two_processes_share_one_folder(asked, tmp_path):
    """Started at once: both work, each model is trained once in all, and both end when all are there."""
    command = [sys.executable, "-m", "noted_sweep", "sweep", *map(str, asked), *LONGER, "--seeds", "2"]
    both = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "out"), "--quiet"],
            env=environment(tmp_path / "work", 2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        stdout, stderr = process.communicate()
        assert (process.returncode, stdout, stderr) == (0, f"{tmp_path / 'out' / 'sweep.nc'}\n", "")
    runs = trained(tmp_path / "work")
    assert len(runs) == len({run["what"] for run in runs}) == 3 * 2 + 2 * 3
    assert len({run["process"] for run in runs}) == 2
    assert SweepLosses.load(tmp_path / "out" / "sweep.nc").data["nll"].notnull().all()
    assert len(list((tmp_path / "out" / "models").iterdir())) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), [("--multi_gpu", 2), ("--cpu", 1)])
def test_accelerate_launch_shares_the_models_out(asked, tmp_path, kind, processes):
    """Its processes train models of their own, none of them together; the first one says where the result is.

    With `--cpu`, accelerate starts one process whatever it is told, unless it has mpirun.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", kind, "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "noted_sweep", "sweep", *map(str, asked)]
    settings = ["--lr", "0.01", "--seeds", "2", "--loops", "1,2"]
    done = subprocess.run(
        [*launch, *settings, "--out", str(tmp_path / "out")],
        env=environment(tmp_path / "work", processes),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out' / 'sweep.nc'}\n"
    assert done.stderr.count("6 still to train") == 1
    runs = trained(tmp_path / "work")
    assert len(runs) == len({run["what"] for run in runs}) == 6
    assert len({run["process"] for run in runs}) == processes
    # As one process makes them.
    alone = run("sweep", *asked, *settings, "--out", tmp_path / "alone", "--quiet")
    assert alone.exit_code == 0, alone.output
    assert_same_numbers(tmp_path / "out", tmp_path / "alone")


@pytest.mark.slow
def test_a_process_of_mpi_trains_alone(asked, tmp_path):
    """It waits for none of the others, and only the first one speaks."""
    command = [sys.executable, "-m", "noted_sweep", "sweep", *map(str, asked), "--lr", "0.01", "--loops", "1", "--out"]
    for rank in (1, 0):
        ours = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
        done = subprocess.run(
            [*command, str(tmp_path / "out")],
            env=environment(tmp_path / "work") | ours,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (done.stdout == "", "still to train" in done.stderr) == (rank == 1, rank == 0)
    assert len(trained(tmp_path / "work")) == 1


def test_rates_at_the_end_of_those_tried_are_told(asked, tmp_path):
    """Of two rates either is the last one on its side; of one there is nothing to tell."""
    places = ["--loops", "2", "--offset", "off", "--memory", "own", "--search-tokens", "128"]
    result = run("sweep", *asked, *places, "--lr", "0.001,0.01", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert re.search(r"learning rates: 0\.0?01 for 2 loops", said)
    assert "of loop counts 2 that is the last one tried: a wider --lr in a new folder may do better" in said
    # A process that comes when the rates are chosen has nothing to search.
    (cell,) = (tmp_path / "cells").glob("*.nc")
    cell.unlink()
    result = run("sweep", *asked, *places, "--lr", "0.001,0.01", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert cell.is_file()
