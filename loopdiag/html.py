"""Results as compact HTML, for notebooks: tables without colours, so that light and dark themes both show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

_LEFT = ' style="text-align: left"'


def number(value: float, digits: int = 3) -> str:
    """So many digits after the point, no -0.000; a dash where it is undefined."""
    return f"{value:z.{digits}f}" if math.isfinite(value) else "-"


def between(mean: float, low: float, high: float, digits: int = 3) -> str:
    """A number with its interval, where it has one; it does not break over lines."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return number(mean, digits)
    return f"{number(mean, digits)}\u00a0[{number(low, digits)},\u00a0{number(high, digits)}]"


class Numbers(Protocol):
    """Numbers with their intervals, of one length; NaN where there is none."""

    @property
    def mean(self) -> np.ndarray: ...
    @property
    def low(self) -> np.ndarray: ...
    @property
    def high(self) -> np.ndarray: ...


def rows(names: Iterable[object], columns: Iterable[Numbers]) -> list[list[str]]:
    """Rows of a table: a name, then a number of each column with its interval."""
    cells = [[between(*ends) for ends in zip(each.mean, each.low, each.high, strict=True)] for each in columns]
    return [[str(name), *row] for name, *row in zip(names, *cells, strict=True)]


def starred(loops: Iterable[int], trained: int) -> list[str]:
    """Loop numbers, those beyond the trained count with a star."""
    return [f"{loop}*" if loop > trained else str(loop) for loop in loops]


def beyond(names: Iterable[str]) -> str:
    """What a star means, where there is one."""
    return "*: beyond training." if any(name.endswith("*") for name in names) else ""


def card(
    title: str, headings: Sequence[str] = (), body: Iterable[Sequence[str]] = (), notes: Iterable[str] = ()
) -> str:
    """A title, a table and small print under it; every text is escaped.

    Args:
        title: In bold.
        headings: Of the columns; none where empty.
        body: Rows of cells as text, the first of each to the left.
        notes: A line each; empty ones are left out.
    """
    parts = [f"<div><b>{escape(title)}</b></div>"]
    inside = "".join(_row("td", row) for row in body)
    if inside:
        head = f"<thead>{_row('th', headings)}</thead>" if headings else ""
        parts.append(f'<table style="margin: 0.4em 0">{head}<tbody>{inside}</tbody></table>')
    parts += [f'<div style="font-size: smaller">{escape(note)}</div>' for note in notes if note]
    return f"<div>{''.join(parts)}</div>"


def _row(cell: str, texts: Sequence[str]) -> str:
    cells = (f"<{cell}{'' if index else _LEFT}>{escape(text)}</{cell}>" for index, text in enumerate(texts))
    return f"<tr>{''.join(cells)}</tr>"
