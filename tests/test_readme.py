"""The README is true: its Python runs, and its numbers are those of the commands it names."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from test_measured import SEVERAL, made_up

from loopdiag import __version__
from loopdiag.corpus import Corpus

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = [
    pytest.param(name, block, id=f"{name}-{index}")
    for name, text in PAGES.items()
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_the_python_of_a_page_runs(page, block, monkeypatch, capsys, tmp_path):
    """Word for word, on 16 of the bundled documents; what the page says that it prints, it prints."""
    matplotlib.use("Agg")
    from loopdiag import corpus

    whole: Corpus = corpus.bundled()
    monkeypatch.setattr(corpus, "bundled", lambda: whole.take(16))
    monkeypatch.chdir(tmp_path)
    if page == "sweep.md":  # as the commands above would leave it
        (tmp_path / "sweeps" / "mine").mkdir(parents=True)
        made_up(SEVERAL).save(tmp_path / "sweeps" / "mine" / "sweep.nc")
    exec(block, {})
    plt.close("all")
    printed = capsys.readouterr().out
    if "recommend" in block:
        assert re.search(r"with how many loops[^?]*\? Measured", printed)
    shown = re.search(re.escape(block) + r"```\n\n```text\n(.*?)```", PAGES[page], flags=re.DOTALL)
    if shown and page != "README.md":  # whose output is that of `make demo`
        assert printed == shown[1]


def test_the_citation_is_of_this_version():
    """In the README and in the file that reference managers read."""
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in cited
    assert f"version = {{{__version__}}}" in README


def test_the_quickstart_explains_the_answer_of_the_readme():
    """Word for word the same one."""
    shown = [re.search(r"```text\n(tiny-plt-4: trained.*?)```", PAGES[page], flags=re.DOTALL) for page in PAGES]
    answers = [answer[1] for answer in shown if answer]
    assert len(answers) == 2
    assert len(set(answers)) == 1


def test_there_are_pages_with_python():
    """Not an empty list of blocks."""
    assert {"README.md", "your_model.md", "transformer_lens.md"} <= {block.values[0] for block in BLOCKS}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_a_page_links_to_is_there(page):
    """No dead link inside the repository."""
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []


def test_every_make_target_of_the_readme_exists():
    """The commands are the Makefile's."""
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"and", "on"}
    assert {name for name in named if f"\n{name}:" not in makefile} == set()
