"""Every command of `loopdiag` with its arguments and options, from the commands themselves: for `{{ commands }}`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from typer.main import get_command

from loopdiag.cli import app as loopdiag

PLACE = "{{ commands }}"


def sections() -> Iterator[str]:
    """One section of Markdown for each command, in the order of `loopdiag --help`."""
    root = get_command(loopdiag)
    with root.make_context("loopdiag", [], resilient_parsing=True) as context:
        for name, command in root.commands.items():
            usage = " ".join(("loopdiag", name, *command.collect_usage_pieces(context)))
            yield "\n\n".join((f"## {name}", command.help, f"```text\n{usage}\n```", *described(command, context)))


def described(command: Any, context: Any) -> Iterator[str]:
    """Arguments and options as a definition list, in the words of `--help`."""
    for parameter in command.params:
        name, text = parameter.get_help_record(context)
        yield f"`{name}`\n: {text}"


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    if PLACE in source[0]:
        source[0] = source[0].replace(PLACE, "\n\n".join(sections()))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
