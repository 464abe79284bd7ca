"""The command line as a user meets it: answers, exit codes, messages, files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import loopdiag as ld
from loopdiag import cli
from loopdiag.model.loading import BUNDLED

SMALL = ["--documents", "16", "--max-tokens", "48", "--quiet"]


def run(*arguments: str | Path):
    """The command line in this process; a traceback would show as an exception."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """One small run with everything written."""
    folder = tmp_path_factory.mktemp("answer")
    result = run("recommend", *SMALL, "--json", folder / "a.json", "--save", folder / "d.nc", "--figures", folder / "f")
    assert result.exit_code in (cli.Exit.ANSWERED, cli.Exit.UNDETERMINED), result.output
    return folder, result


def test_the_json_file_is_the_answer(answered):
    """`--json FILE` holds the whole contract (tests/test_answer.py), measured on the half that was not fitted on."""
    told = json.loads((answered[0] / "a.json").read_text())
    assert [row["loop"] for row in told["loops"]] == [1, 2, 3, 4]
    assert (told["documents"], told["provenance"]["documents_fit"], told["tokens"]) == (8, 8, 8 * 47)
    assert all(row["nll_usable"] is not None for row in told["loops"])


def test_the_table_shows_the_evidence_and_both_answers(answered):
    """A person reads per-loop evidence, both answers, support, price, break-evens and lenses on stdout."""
    _, result = answered
    columns = ("exit NLL [95 %]", "gain", "cost/", "usable", "rank", "cos (ref.)")
    for said in (*columns, "support", "price", "break-even", "lenses"):
        assert said in result.stdout
    assert "Run this checkpoint with how many loops? (measured)" in result.stdout
    assert "Train with how many loops? (predicted, provisional" in result.stdout


def test_figures_are_written(answered):
    """--figures draws the gain-cost curve and its companions."""
    written = {file.name for file in (answered[0] / "f").iterdir()}
    assert {"gain_cost.png", "gain_cost.svg", "hidden_states.png", "shift_against_offset.png"} <= written


def test_a_saved_diagnosis_answers_the_same_without_the_model(answered):
    """`recommend FILE` gives the JSON of the run that saved it, and refuses options that it cannot honour."""
    folder, _ = answered
    again = run("recommend", folder / "d.nc", "--json", "-", "--quiet")
    assert again.stdout == (folder / "a.json").read_text()
    for option, value in (("--loops", "2"), ("--dtype", "bfloat16"), ("--batch-size", "4"), ("--device", "cpu")):
        refused = run("recommend", folder / "d.nc", option, value)
        expect_refusal(refused, f"{option} cannot change the saved diagnosis")


def test_outputs_that_would_eat_each_other(answered):
    """One path for two outputs, or the JSON over the diagnosis that is read, is refused and nothing is touched."""
    folder, _ = answered
    before = (folder / "d.nc").read_bytes()
    for arguments in (["--json", folder / "d.nc"], ["--json", folder / "new", "--save", folder / "new"]):
        expect_refusal(run("recommend", folder / "d.nc", *arguments), "must be different files")
    assert (folder / "d.nc").read_bytes() == before
    assert not (folder / "new").exists()


def test_same_seed_same_json(answered):
    """Same seed, threads and machine: the same bytes; and stdout holds nothing but the JSON."""
    again = run("recommend", *SMALL, "--json", "-")
    assert again.stdout == (answered[0] / "a.json").read_text()


def test_replacing_a_file_is_told(answered):
    """Nothing a user has is overwritten without being told."""
    folder, _ = answered
    kept = folder / "kept.json"
    kept.write_text("mine")
    result = run("recommend", folder / "d.nc", "--json", kept)
    assert f"note: {kept} is there and will be replaced" in result.stderr
    assert json.loads(kept.read_text())["schema"] == 1


def test_undetermined_has_its_own_exit_code(answered):
    """A price that the data cannot resolve: exit 3, null, and the reason."""
    folder, _ = answered
    for price in ("0.05", "0.02", "0.01", "0.005", "0"):
        result = run("recommend", folder / "d.nc", "--json", "-", "--price", price)
        told = json.loads(result.stdout)
        assert result.exit_code == (3 if told["verdict"] == "undetermined" else 0)
        assert (told["why_undetermined"] is None) == (result.exit_code == 0)


def test_diagnose_then_recommend(tmp_path):
    """`diagnose` writes a Diagnosis, prints where, and one loop, or more loops than trained, are no special case."""
    for model, loops in (("tiny-plt-1", "1"), ("tiny-plt-2", "4")):
        file = tmp_path / f"{model}.nc"
        result = run("diagnose", model, *SMALL, "--loops", loops, "--save", file)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == str(file)
        answer = run("recommend", file, "--json", "-")
        assert answer.exit_code in (0, 3), answer.output
        rows = json.loads(answer.stdout)["loops"]
        assert [row["extrapolated"] for row in rows] == [row["loop"] > int(model[-1]) for row in rows]
        assert "*" in run("recommend", file).stdout or model == "tiny-plt-1"


def test_models_lists_bundled_and_supported():
    """`loopdiag models` names every bundled model and every family."""
    result = run("models")
    assert result.exit_code == 0
    for name in (*ld.bundled_models(), "iquestpltcoder"):
        assert name in result.stdout


def test_quiet_and_notes(tmp_path):
    """--quiet says nothing on stderr; without it, cut documents are reported."""
    assert run("recommend", *SMALL, "--json", "-").stderr == ""
    (tmp_path / "a.json").touch()
    assert run("recommend", *SMALL, "--json", tmp_path / "a.json").stderr == ""
    loud = run("recommend", *SMALL[:-1], "--json", "-")
    assert "documents were cut at 48 tokens" in loud.stderr


def copy_of(folder: Path, name: str = "tiny-plt-2") -> Path:
    return Path(shutil.copytree(BUNDLED / name, folder / name))


def no_weights(folder: Path) -> Path:
    model = copy_of(folder)
    (model / "model.safetensors").unlink()
    return model


def pickled_weights(folder: Path) -> Path:
    model = no_weights(folder)
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    return model


def truncated_weights(folder: Path) -> Path:
    model = copy_of(folder)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return model


def broken_config(folder: Path) -> Path:
    model = copy_of(folder)
    (model / "config.json").write_text("{not json")
    return model


def other_family(folder: Path) -> Path:
    model = copy_of(folder)
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"model_type": "gpt2"}))
    return model


def other_shape(folder: Path) -> Path:
    model = copy_of(folder)
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"intermediate_size": 100}))
    return model


def more_layers(folder: Path) -> Path:
    model = copy_of(folder)
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"num_hidden_layers": 3}))
    return model


BAD_MODELS = {
    no_weights: "has no weights",
    pickled_weights: "is a pickle, which can run code",
    truncated_weights: "is damaged, cut short or missing",
    broken_config: "is not readable as JSON",
    other_family: "model_type 'gpt2' is not supported; supported are iquestpltcoder",
    other_shape: "but config.json asks for",
    more_layers: "missing model.layers.2.",
}


@pytest.mark.parametrize("make", BAD_MODELS, ids=lambda make: make.__name__)
def test_bad_models(tmp_path, make):
    """A model that cannot be loaded: one message, exit 2, no traceback."""
    expect_refusal(run("recommend", make(tmp_path), *SMALL), BAD_MODELS[make])


def empty_file(folder: Path) -> Path:
    (folder / "empty.jsonl").touch()
    return folder / "empty.jsonl"


def binary_file(folder: Path) -> Path:
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    return folder / "binary.txt"


def broken_lines(folder: Path) -> Path:
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    return folder / "broken.jsonl"


def few_documents(folder: Path) -> Path:
    (folder / "few.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(3)))
    return folder / "few.jsonl"


def short_documents(folder: Path) -> Path:
    (folder / "short.jsonl").write_text("".join(f'{{"text": "x{n}"}}\n' for n in range(30)))
    return folder / "short.jsonl"


BAD_DATA = {
    empty_file: "empty",
    binary_file: "binary",
    broken_lines: "line 2",
    few_documents: "16",
    short_documents: "16 tokens",
    (lambda folder: folder / "missing.jsonl"): "missing.jsonl",
}


@pytest.mark.parametrize("make", BAD_DATA, ids=lambda make: make.__name__)
def test_bad_data(tmp_path, make):
    """Data that cannot be read: one message, exit 2, no traceback."""
    expect_refusal(run("recommend", "--data", make(tmp_path), "--quiet"), BAD_DATA[make])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.nc"], "There is no file missing.nc"),
        ([""], "There is no model ''"),
        (["no-such-model"], "There is no model 'no-such-model': bundled are tiny-plt-1"),
        (["--loops", "0"], "--loops 0 is out of range: allowed 1 to 64"),
        (["--price", "nan"], "--price nan is out of range"),
        (["--price", "-1"], "--price -1.0 is out of range"),
        (["--documents", "3"], "--documents 3 is out of range: allowed 16 or more"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
        (["--max-tokens", "100000"], "is beyond this model, which was made for 256"),
        (["--max-tokens", "2"], "--max-tokens 2 is out of range"),
        (["--json", "no/such/folder/a.json"], "cannot be written"),
        (["--save", "."], "is a folder: give the name of a file"),
        (["--figures", "pyproject.toml/figures"], "cannot be made"),
        (["--dtype", "int8"], "int8"),
        (["README.md"], "is not a diagnosis"),
        (["loopdiag"], "has no config.json"),
    ],
)
def test_bad_arguments(arguments, said, monkeypatch):
    """Wrong arguments: one message that says what is allowed, exit 2, before any work."""
    monkeypatch.chdir(Path(__file__).parents[1])
    expect_refusal(run("recommend", *arguments), said)


def expect_refusal(result, said: str) -> None:
    message = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == cli.Exit.WRONG_INPUT, result.output
    assert said in message
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_a_failure_while_running_is_exit_1(monkeypatch):
    """What breaks in the middle is told as such, in one line."""

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("loopdiag.diagnosis.diagnose", broken)
    result = run("recommend", *SMALL)
    assert result.exit_code == cli.Exit.FAILED
    assert "error: RuntimeError: out of memory" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["loopdiag"], [sys.executable, "-m", "loopdiag"]], ids=["script", "module"])
def test_help_without_torch(command):
    """Both ways in give help, quickly: torch is not imported for it."""
    if command == ["loopdiag"]:
        command = [str(Path(sys.executable).with_name("loopdiag"))]
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, env=environment)
    assert "recommend" in done.stdout
    assert "typer" in done.stderr
    assert " torch\n" not in done.stderr
