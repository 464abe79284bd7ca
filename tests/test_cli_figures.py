"""`loopdiag figures`: files, notes, refusals. Pictures are made small: what they show, tests/test_plots.py tells."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from synthetic import make
from test_cli import expect_refusal, run

from loopdiag import cli, report
from loopdiag.plots import files
from loopdiag.plots.files import FIGURES


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(files, "rendered", lambda figure, form: form.encode())


@pytest.fixture
def saved(tmp_path):
    """Two models' diagnoses."""
    paths = [tmp_path / f"{loops}.nc" for loops in (3, 4)]
    for loops, path in zip((3, 4), paths, strict=True):
        make(loops, model=f"plt-{loops}", documents=8).save(path)
    return paths


def test_every_figure_and_table_is_written_and_told(saved, tmp_path):
    """PNG, SVG and CSV, each on a line of stdout; the folder is made."""
    out, page = tmp_path / "new" / "figures", tmp_path / "page.md"
    result = run("figures", *saved, "--out", out, "--against-paper", page, "--quiet")
    assert (result.exit_code, result.stderr) == (cli.Exit.ANSWERED, "")
    pictures = [f"{name}.{form}" for name in FIGURES for form in ("png", "svg")]
    names = [*pictures, "summary.csv", "refinement_shares.csv", "exit_rules.csv"]
    assert result.stdout.splitlines() == [str(out / name) for name in names] + [str(page)]
    assert sorted(file.name for file in out.iterdir()) == sorted(names)
    with (out / "summary.csv").open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"plt-3", "plt-4"}
    assert "| plt-3 | plt-4 |" in page.read_text()


def test_without_a_page_none_is_written(saved, tmp_path):
    result = run("figures", saved[0], "--out", tmp_path / "figures")
    assert result.exit_code == 0
    assert not list(tmp_path.glob("*.md"))


def test_what_is_left_out_is_said_with_what_would_bring_it(tmp_path):
    make(groups=("prediction", "motion", "diversity"), documents=8).save(tmp_path / "few.nc")
    result = run("figures", tmp_path / "few.nc", "--out", tmp_path / "figures")
    assert "no figure heads: head_cosine was not measured: diagnose with --measures default,heads" in result.stderr
    assert not (tmp_path / "figures" / "heads.png").exists()
    assert (tmp_path / "figures" / "hidden_states.png").exists()


def test_other_documents_are_said(saved, tmp_path):
    other = make(4, model="other", documents=8)
    about = other.data.attrs["provenance"]
    other.data.attrs["provenance"] = about.replace('"corpus_sha256": "00', '"corpus_sha256": "11')
    other.save(tmp_path / "other.nc")
    result = run("figures", saved[0], tmp_path / "other.nc", "--out", tmp_path / "figures")
    assert "note: the diagnoses are of different documents" in result.stderr


@pytest.mark.parametrize(("field", "value"), [("tokens", 801), ("max_tokens", 128), ("tokens", 800)])
def test_other_token_counts_are_said(field, value, saved, tmp_path):
    """Of the same documents: another tokenizer or another cut; `saved` has 800 tokens of documents of 256 at most."""
    other = make(4, model="other", documents=8)
    about = other.provenance
    equal = about[field] == value
    other.data.attrs["provenance"] = json.dumps(about | {field: value})
    other.save(tmp_path / "other.nc")
    result = run("figures", saved[0], tmp_path / "other.nc", "--out", tmp_path / "figures")
    assert result.exit_code == 0
    said = "note: the diagnoses read the documents in different tokens: nats per token do not compare"
    assert (said in result.stderr) is not equal
    assert "of different documents" not in result.stderr


def test_tables_without_rows_are_not_written(tmp_path):
    """One loop has nothing to share or to leave by; without a measure by loop alone there is no summary either."""
    cases = {
        "motion": (make(groups=("motion",), documents=8), ["summary.csv"]),
        "one": (make(1, documents=8), ["summary.csv"]),
        "rarefaction": (make(groups=("rarefaction",), documents=8), []),
    }
    for name, (diagnosis, tables) in cases.items():
        out = tmp_path / name
        diagnosis.save(tmp_path / f"{name}.nc")
        result = run("figures", tmp_path / f"{name}.nc", "--out", out)
        assert result.exit_code == 0, name
        assert [file.name for file in out.glob("*.csv")] == tables, name
        assert [line for line in result.stdout.splitlines() if line.endswith(".csv")] == [str(out / t) for t in tables]
        assert all(len((out / table).read_text().splitlines()) > 1 for table in tables), name


def test_wrong_input_is_refused_before_anything_is_written(saved, tmp_path):
    """No file, no diagnosis, one run twice, a page over what is read, a folder that cannot be."""
    (tmp_path / "text.nc").write_text("no diagnosis")
    before = saved[0].read_bytes()
    for arguments, said in (
        ([tmp_path / "none.nc"], "is no file"),
        ([tmp_path / "text.nc"], "holds no diagnosis"),
        ([saved[0], saved[0]], "Two diagnoses are of the same model and run (plt-3): give each once"),
        ([saved[0], "--against-paper", saved[0]], "must be different files"),
        ([saved[0], "--against-paper", tmp_path / "no" / "page.md"], "cannot be written"),
        ([saved[0], "--out", saved[1]], "no folder that can be written to"),
    ):
        out = () if "--out" in arguments else ("--out", tmp_path / "figures")
        expect_refusal(run("figures", *arguments, *out), said)
    assert not (tmp_path / "figures").exists()
    assert saved[0].read_bytes() == before


def test_a_model_that_cannot_be_read_off_is_drawn_without_a_price(tmp_path):
    """An NLL that is not finite leaves nothing to recommend."""
    broken = make(4, documents=8)
    broken.data["nll_exit"][0, 2] = float("inf")
    broken.save(tmp_path / "broken.nc")
    assert report.recommendation(broken) is None
    assert report.recommendation(make(4)) is not None


def test_the_command_is_light_until_its_arguments_stand():
    """A missing argument is answered without loading what it takes to draw."""
    asked = [sys.executable, "-X", "importtime", "-m", "loopdiag", "figures"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert told.returncode == 2
    assert "matplotlib" not in told.stderr
