"""The documentation builds without a warning, hangs together, is complete, and asks no other machine for anything."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from typer.main import get_command

import loopdiag
from loopdiag.cli import app

ROOT = Path(__file__).parents[1]
# Sphinx makes these itself; the search page is a form's target.
MADE = {"genindex.html", "py-modindex.html", "search.html"}
# What a browser fetches by itself when it shows a page.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """Anchors, links and what is fetched of one page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.fetches = set(), [], []
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found["id"]} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if FETCHED.get(tag) in found:
            self.fetches.append(found[FETCHED[tag]])


def outside(address: str) -> bool:
    return address.startswith("//") or (":" in address.split("/")[0] and not address.startswith("data:"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does it, elsewhere."""
    out = tmp_path_factory.mktemp("docs")
    dry = ["make", "--dry-run", "--old-file=.venv/.installed-dev", "docs"]
    recipe = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    (command,) = (shlex.split(line) for line in recipe.splitlines() if "sphinx" in line)
    assert "--fail-on-warning" in command
    command = [sys.executable, *(word.replace("build/docs", str(out)) for word in command[1:])]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {str(file.relative_to(site)): Page(file) for file in site.rglob("*.html")}


def target(page: str, link: str) -> tuple[str, str]:
    """The file that a link of a page leads to, from the site's root, and the anchor in it."""
    path, anchor = urldefrag(link)
    base = Path("/site", page)
    file = (base.parent / unquote(path) if path else base).resolve()
    return str(file.relative_to("/site")), unquote(anchor)


def test_every_link_leads_somewhere(site, pages):
    """To a file of the site, and to an anchor that the page has."""
    dead = []
    for name, page in pages.items():
        for link in page.links:
            if outside(link):
                continue
            file, anchor = target(name, link)
            there = (site / file).is_file() and (not anchor or file not in pages or anchor in pages[file].anchors)
            dead += [] if there else [f"{name}: {link}"]
    assert dead == []
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_every_page_can_be_reached(pages):
    """By links from the first one."""
    reached, waiting = set(), ["index.html"]
    while waiting:
        name = waiting.pop()
        if name in pages and name not in reached:
            reached.add(name)
            waiting += [target(name, link)[0] for link in pages[name].links if not outside(link)]
    assert set(pages) - reached - MADE == set()
    sources = {str(file.relative_to(ROOT / "docs").with_suffix(".html")) for file in (ROOT / "docs").rglob("*.md")}
    assert sources <= reached


def test_nothing_is_fetched_from_elsewhere(site, pages):
    """No script, style, font or picture of another machine."""
    assert [f"{name}: {address}" for name, page in pages.items() for address in page.fetches if outside(address)] == []
    for style in site.rglob("*.css"):
        imported = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s;]+)", style.read_text(encoding="utf-8"))
        assert [address for address in imported if outside(address)] == [], style
    assert "<math" in pages["concepts.html"].text


@pytest.mark.parametrize("name", get_command(app).commands)
def test_the_reference_has_every_command_and_option(name, pages):
    """With each of its names, in the section of the command."""
    sections = pages["cli.html"].text.split('<section id="')
    (section,) = (text for text in sections if text.startswith(f'{name}"'))
    text = re.sub(r"<[^>]+>", "", section)
    for parameter in get_command(app).commands[name].params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert option in text, f"{name} {option}"


def test_the_reference_has_every_public_name(pages):
    """Where it is defined, and in the list of names."""
    anchors = {anchor for name, page in pages.items() if name.startswith("api/") for anchor in page.anchors}
    listed = re.sub(r"<[^>]+>", "", pages["api/index.html"].text)
    for name in set(loopdiag.__all__) - {"__version__"}:
        # A class may be listed with the room that gives it rather than with the one that defines it.
        places = [anchor for anchor in anchors if re.fullmatch(rf"loopdiag(\.\w+)*\.{name}", anchor)]
        assert places if name in loopdiag._PUBLIC else f"module-loopdiag.{name}" in anchors, name
        assert f"ld.{name}" in listed
