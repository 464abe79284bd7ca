"""`loopdiag probe`: tables, JSON, files, refusals."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import pytest
from test_cli import run

from loopdiag import cli, plots
from loopdiag.cli.options import SUITES
from loopdiag.cli.probes import print_scores, scores_answer
from loopdiag.scores import ProbeScores

SMALL = ("--documents", "16", "--max-tokens", "32", "--places", "6", "--classes", "6", "--quiet")


def test_the_suites_are_those_of_the_package():
    """The command line knows them without loading torch."""
    from loopdiag import probing

    assert tuple(probing.SUITES) == SUITES


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """One small run, beyond training, with everything written."""
    folder = tmp_path_factory.mktemp("probes")
    files = ("--json", folder / "p.json", "--save", folder / "p.nc", "--figures", folder / "figures")
    what = ("position_identity", "tiny-plt-1", "--loops", "2", "--hook", "hook_out", "--seed", "3")
    result = run("probe", *what, *SMALL, *files)
    assert result.exit_code == cli.Exit.ANSWERED, result.output
    return folder, result.stdout


def test_the_tables_fit_and_say_what_they_are(answered):
    """80 columns, a table for each target, every loop, and what the columns mean."""
    folder, printed = answered
    assert max(map(len, printed.splitlines())) <= 80
    said = " ".join(printed.split())
    assert "tiny-plt-1: trained with 1, run with 2 loops, the loops with a star beyond training" in said
    assert "Fitted on 8 documents of corpus bundled, scored on 8 others, at up to 6 places of each." in said
    assert "Loop 0: the embedding" in said
    assert "labels drawn at random for each token of the vocabulary" in said
    assert "they leave out the training seed" in said
    rows = json.loads((folder / "p.json").read_text())["scores"]
    assert [(row["target"], row["loop"]) for row in rows] == [
        (target, loop) for target in ("token i", "token i-1", "token i+1") for loop in (0, 1, 2)
    ]
    for row in rows:
        assert f"{row['score']:.3f} [{row['score_low']:.3f}, {row['score_high']:.3f}]" in printed
        assert f"{row['target']}: 6 classes" in printed
        if row["loop"]:
            assert f"{row['change']:.3f} [{row['change_low']:.3f}, {row['change_high']:.3f}]" in printed
    assert re.search(r"\n\s+2\* ", printed)


def test_json_file_table_and_figure_hold_the_same(answered):
    """The JSON's rows are the table of the saved scores; undefined is null, or empty in the CSV."""
    folder, _ = answered
    told, scores = json.loads((folder / "p.json").read_text()), ProbeScores.load(folder / "p.nc")
    assert set(told) == {
        *("schema", "suite", "unit", "model", "trained_loops", "run_loops", "documents", "targets"),
        *("bootstrap", "absent", "scores", "provenance"),
    }
    assert told == json.loads(json.dumps(scores_answer(scores, 3)))
    assert told["scores"][0]["change"] is None
    assert told["scores"][0]["floor_baseline_nll"] is None
    assert told["provenance"] == scores.provenance
    name = "position_identity-tiny-plt-1"
    assert {file.name for file in (folder / "figures").iterdir()} == {
        f"{name}.{form}" for form in ("csv", "png", "svg")
    }
    lines = list(csv.DictReader((folder / "figures" / f"{name}.csv").read_text().splitlines()))
    assert [float(line["score"]) for line in lines] == pytest.approx([row["score"] for row in told["scores"]], rel=1e-4)
    assert lines[0]["change"] == ""


def test_the_seed_reaches_table_and_figure(answered):
    """Their intervals are those of the JSON, and not those of seed 0."""
    folder, _ = answered
    rows, scores = json.loads((folder / "p.json").read_text())["scores"], ProbeScores.load(folder / "p.nc")
    csv_file, png = (folder / "figures" / f"position_identity-tiny-plt-1.{form}" for form in ("csv", "png"))
    lines = list(csv.DictReader(csv_file.read_text().splitlines()))
    lows = [row["score_low"] for row in rows]
    assert [float(line["score_low"]) for line in lines] == pytest.approx(lows, rel=1e-4)
    assert lows != pytest.approx([row.score_low for row in scores.table(0)], rel=1e-3)
    drawn = {seed: plots.pictures_of_probes(scores, ["png"], seed=seed)["png"] for seed in (0, 3)}
    assert png.read_bytes() == drawn[3] != drawn[0]


def test_information_says_of_how_much():
    """JSON alone on stdout; the table has what is left open, and no change from loop to loop."""
    result = run("probe", "carried_information", "tiny-plt-2", "--hook", "hook_in", *SMALL, "--json", "-")
    assert result.stderr == ""
    told = json.loads(result.stdout)
    assert [(row["target"], row["hook"], row["loop"]) for row in told["scores"]] == [
        ("Z(i)", "hook_in", 2),
        ("Z(i-1)", "hook_in", 2),
    ]
    for row in told["scores"]:
        assert row["score"] == pytest.approx(row["baseline_nll"] - row["nll"])
        assert row["change"] is None


def test_the_table_of_information(capsys):
    """Columns of its own, which fit; what was left out is told."""
    row = {"target": "Z(i)", "hook": "hook_in", "loop": 2, "extrapolated": False, "change": None}
    row |= {"score": -0.25, "score_low": -0.375, "score_high": -0.125, "selectivity": 0.5}
    row |= {"control": 0.125, "floor": 1.5, "baseline_nll": 1.25, "floor_baseline_nll": 3.25}
    told = {"unit": "information", "model": "m", "trained_loops": 2, "run_loops": 2, "documents": 7, "scores": [row]}
    told["targets"] = [{"target": "Z(i)", "classes": 32, "coverage": 1.0}]
    told["provenance"] = {"documents_fit": 8, "corpus": "c", "places": 4}
    told["provenance"] |= {"documents_unlabelled": 3, "unconverged": 2}
    print_scores(told)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert re.search(r"hook_in +2 +-0\.250 \[-0\.375, -0\.125\] +1\.250 +0\.125 +0\.500 +1\.500 +3\.250", printed)
    assert "which the embeddings leave open" in " ".join(printed.split())
    assert "Random: random weights" in " ".join(printed.split())
    assert "3 documents have no labels and are left out." in printed
    assert "2 fits of probes did not converge, and are scored as they are." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["positions"], "There is no suite 'positions': there are position_identity, code_structure"),
        (["lookahead", "--places", "0"], "--places 0 is out of range"),
        (["lookahead", "--classes", "1"], "--classes 1 is out of range"),
        (["lookahead", "--loops", "0"], "--loops 0 is out of range"),
        (["lookahead", "--documents", "3"], "--documents 3 is out of range"),
        (["lookahead", "--seed", "-1"], "--seed -1"),
        (["lookahead", "--json", "same", "--save", "same"], "must be different files"),
        (["lookahead", "--save", "no/such/folder/p.nc"], "cannot be written"),
        (["lookahead", __file__], "is a file: give a model"),
        (["lookahead", "no-such-model"], "no-such-model"),
        (["lookahead", "--hook", "hook_inn"], "No loop of this model has a hook 'hook_inn': there are"),
        (["carried_information", "tiny-plt-1"], "needs two loops or more, and this run has 1"),
    ],
)
def test_wrong_input(arguments, message):
    """Exit code 2 and one message."""
    result = run("probe", *arguments, "--quiet")
    assert result.exit_code == cli.Exit.WRONG_INPUT, result.output
    assert re.search(message, result.stderr.replace("\n", " "))


def test_inputs_are_checked_before_torch_is_loaded():
    """A slip of the pen is told at once."""
    code = "import sys; from loopdiag.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "probe", "positions"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (2, "False")
