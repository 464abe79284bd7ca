"""`loopdiag intervene`: table, JSON, file, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from test_cli import run

from loopdiag import cli
from loopdiag import interventions as iv
from loopdiag.cli.effects import print_effects
from loopdiag.cli.options import INTERVENTIONS

SMALL = ("--documents", "16", "--max-tokens", "32", "--loops", "3", "--quiet")


def test_the_groups_are_those_of_the_package():
    """The command line knows them without loading torch."""
    assert INTERVENTIONS == iv.GROUPS


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """One small run with everything written."""
    folder = tmp_path_factory.mktemp("effects")
    result = run("intervene", *SMALL, "--json", folder / "e.json", "--save", folder / "e.nc")
    assert result.exit_code == cli.Exit.ANSWERED, result.output
    return folder, result.stdout


def test_the_table_fits_and_says_what_it_does_not_show(answered):
    """80 columns, every intervention, the laws and the caveat."""
    folder, printed = answered
    assert max(map(len, printed.splitlines())) <= 80
    said = " ".join(printed.split())
    assert "what the trained model relies on, not what training without it would give" in said
    assert "swapping two changes nothing" in said
    assert "the half that a diagnosis reports on" in said
    assert "The document mean of the carries is over later tokens, too." in said
    assert max(map(len, printed.splitlines())) > 72  # what goes with the table is not wrapped to its width
    rows = json.loads((folder / "e.json").read_text())["interventions"]
    for row in rows:
        assert f"{row['effect']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in printed
        assert row["change"] in printed
    assert "a loop skipped any" in said
    assert "window halved all" in said


def test_few_sources_are_told(answered, capsys):
    """Of fewer than five, the intervals say little."""
    told = json.loads((answered[0] / "e.json").read_text())
    assert told["provenance"]["sources"] >= 5
    assert "intervals say little" not in answered[1]
    for count, said in ((1, "from 1 source:"), (4, "from 4 sources:")):
        print_effects({**told, "provenance": {**told["provenance"], "sources": count}})
        printed = " ".join(capsys.readouterr().out.split())
        assert f"The documents come {said} with fewer than 5, the intervals say little" in printed


def test_json_and_file_hold_the_same(answered):
    """The JSON's rows are the table of the saved effects, in the documented keys."""
    folder, _ = answered
    told, effects = json.loads((folder / "e.json").read_text()), iv.Effects.load(folder / "e.nc")
    assert set(told) == {
        *("schema", "model", "trained_loops", "run_loops", "documents", "tokens", "nll", "caveat", "bootstrap"),
        *("documents_not_finite", "absent", "interventions", "provenance"),
    }
    assert told["interventions"] == [vars(row) for row in effects.table()]
    assert told["provenance"] == effects.provenance
    assert (told["trained_loops"], told["run_loops"], told["documents"], told["tokens"]) == (4, 3, 8, 8 * 31)
    assert told["nll"] == pytest.approx(float(effects.data["nll"].mean()))


def test_json_on_stdout_and_a_choice_of_groups(answered):
    """Nothing else is on stdout; groups that are left out are not told to be absent."""
    result = run("intervene", *SMALL, "--only", "window, loops", "--json", "-")
    told = json.loads(result.stdout)
    assert {row["group"] for row in told["interventions"]} == {"window", "loops"}
    assert told["absent"] == {}
    assert result.stderr == ""
    whole = json.loads((answered[0] / "e.json").read_text())["interventions"]
    assert told["interventions"] == [row for row in whole if row["group"] in ("window", "loops")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "gates"], "--only has 'gates': allowed are offset, carry"),
        (["--only", ""], "--only has ''"),
        (["--loops", "0"], "--loops 0 is out of range"),
        (["--documents", "3"], "--documents 3 is out of range"),
        (["--seed", "-1"], "--seed -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--json", "same", "--save", "same"], "must be different files"),
        (["--save", "no/such/folder/e.nc"], "cannot be written"),
        ([__file__], "is a file: give a model"),
        (["no-such-model"], "no-such-model"),
        (["tiny-plt-1", "--documents", "16"], "Nothing to intervene on.*this run has one loop"),
    ],
)
def test_wrong_input(arguments, message):
    """Exit code 2 and one message."""
    result = run("intervene", *arguments)
    assert result.exit_code == cli.Exit.WRONG_INPUT, result.output
    assert re.search(message, result.stderr.replace("\n", " "))


def test_inputs_are_checked_before_torch_is_loaded():
    """A slip of the pen is told at once."""
    code = "import sys; from loopdiag.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "intervene", "--only", "gates"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (2, "False")
