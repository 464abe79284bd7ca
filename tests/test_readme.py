"""The README is true: its Python runs, and its numbers are those of the commands it names."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

from loopdiag.corpus import Corpus

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["use", "hooks"])
def test_the_python_of_the_readme_runs(block, monkeypatch, capsys):
    """Word for word, on 16 of the bundled documents."""
    matplotlib.use("Agg")
    from loopdiag import corpus

    whole: Corpus = corpus.bundled()
    monkeypatch.setattr(corpus, "bundled", lambda: whole.take(16))
    exec(block, {})
    plt.close("all")
    if "recommend" in block:
        assert "with how many loops? Measured" in capsys.readouterr().out


def test_every_file_the_readme_links_to_is_there():
    """No dead link inside the repository."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (Path(__file__).parents[1] / link).exists()] == []


def test_every_make_target_of_the_readme_exists():
    """The commands are the Makefile's."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"and", "on"}
    assert {name for name in named if f"\n{name}:" not in makefile} == set()
