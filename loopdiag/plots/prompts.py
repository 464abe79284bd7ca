"""Figures of one text, token by token: what each loop reads, what it changed, and where the states go."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from loopdiag.measures.tokens import TokenExits
from loopdiag.measures.trajectories import Trajectories
from loopdiag.plots.parts import BLUE, COLUMN, GREY, ORANGE, Style, legend, note, single

MOST_TOKENS = 24  # that fit beside each other
LONGEST_TOKEN = 9  # characters of a label, and of a cell
GLYPHS = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "→"})
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
PLAIN_TEXT: Style = {"parse_math": False, "fontfamily": "monospace"}  # a dollar is a dollar


def visible(text: str) -> str:
    """A token's text with glyphs for white space (↵ for a newline, ·₈ for eight spaces, → for a tab), cut where long.

    ‥ stands for a token that is a piece of a character.
    """
    counted = re.sub(" {3,}", lambda run: "·" + str(len(run[0])).translate(SUBSCRIPTS), text)
    seen = counted.translate(GLYPHS)
    if not seen:
        return "‥"
    return seen if len(seen) <= LONGEST_TOKEN else seen[: LONGEST_TOKEN - 1] + "…"


def logit_lens(
    exits: TokenExits, *, tokens: Sequence[int] | None = None, start: bool = False, ax: Axes | None = None
) -> Axes:
    """What each exit makes of each token of a text: a heat map of its NLL, with the likeliest token in each cell.

    A column is a token of the text, predicted from those before it; the first one is given. Bold where the likeliest
    token is the right one. A newline reads ↵, a space ·, a tab →.

    Args:
        exits: Of a text, see `loopdiag.measures.tokens.by_token`.
        tokens: Places of the tokens to show, from 1; the first 24 when None.
        start: Whether loop 0, read out before any loop, is there, too; its NLL is far above the others.
        ax: Where to draw; a new figure when None.

    Raises:
        ValueError: Places that the text does not have.
    """
    places = _places(exits, tokens)
    rows = np.array([row for row, loop in enumerate(exits.loops) if loop > 0 or start])
    nll = exits.nll.numpy()[rows][:, places]
    with single(ax, _for_tokens(len(places), 1.1 + 0.3 * len(rows))) as ax:
        image = ax.pcolormesh(nll, cmap="cividis_r", vmin=0, vmax=np.nanmax(nll), edgecolors="white", linewidth=0.5)
        for row, column in np.ndindex(*nll.shape):
            guess = exits.top[rows[row]][places[column]]
            dark = nll[row, column] > 0.5 * np.nanmax(nll)
            right = guess == exits.text[places[column]]
            style: Style = {"color": "white" if dark else "black", "fontweight": "bold" if right else "normal"}
            ax.text(
                column + 0.5, row + 0.5, visible(guess), ha="center", va="center", fontsize=7, **style, **PLAIN_TEXT
            )
        ax.set_yticks(np.arange(len(rows)) + 0.5, [str(exits.loops[row]) for row in rows])
        ax.set_ylabel("loop")
        _token_axis(ax, exits, places, 0.5)
        ax.figure.colorbar(image, ax=ax, label="NLL of the token\n(nats)", pad=0.01)
    return ax


def changes(exits: TokenExits, loop: int, *, tokens: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
    """What a loop changed, and where: the change of each token's NLL from the exit before, in nats.

    Below 0 the loop helped. Where the likeliest token changed, it says from what to what; bold where it became right.

    Args:
        exits: Of a text, see `loopdiag.measures.tokens.by_token`.
        loop: Which; the exit before is that of the kept loop before.
        tokens: Places of the tokens to show, from 1; the first 24 when None.
        ax: Where to draw; a new figure when None.

    Raises:
        ValueError: Places or a loop that are not there.
    """
    if loop not in exits.loops[1:]:
        raise ValueError(f"loop = {loop} is not there: it must be one of {', '.join(map(str, exits.loops[1:]))}.")
    places, after = _places(exits, tokens), exits.loops.index(loop)
    before = after - 1
    change = (exits.nll[after] - exits.nll[before]).numpy()[places]
    with single(ax, _for_tokens(len(places), 3.0)) as ax:
        ax.bar(np.arange(len(places)), change, color=[ORANGE if each > 0 else BLUE for each in change], width=0.8)
        ax.axhline(0, color=GREY, linewidth=0.6)
        ax.margins(x=0.01)
        ax.set_ylabel(f"change of the NLL\nin loop {loop} (nats)")
        _token_axis(ax, exits, places, 0.0)
        changed = [column for column, place in enumerate(places) if exits.top[before][place] != exits.top[after][place]]
        moves = [
            f"{visible(exits.top[before][place])} ▸ {visible(exits.top[after][place])}" for place in places[changed]
        ]
        above = ax.secondary_xaxis("top")
        above.set_xticks(changed, moves, rotation=90, **PLAIN_TEXT)
        for label, place in zip(above.get_xticklabels(), places[changed], strict=True):
            label.set_fontweight("bold" if exits.top[after][place] == exits.text[place] else "normal")
        note(
            ax,
            "Blue: helped. Orange: harmed. Above: from which likeliest token to which; bold: to the right one.",
            characters=110,
        )
    return ax


def trajectories(paths: Trajectories, text: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """The states of a text's tokens from loop to loop, in the plane that shows most of them.

    Every token's path leads from its first loop, a ring, over the others to its last. Equal tokens have one colour, and
    their text stands once, beside the outermost of their ends.

    Args:
        paths: See `loopdiag.measures.trajectories`.
        text: The text of each token of the document.
        ax: Where to draw; a new figure when None.

    Raises:
        ValueError: Paths of tokens that the text does not have.
    """
    _checked(np.array(paths.tokens), 0, len(text))
    with single(ax, (COLUMN[0] * 1.4, COLUMN[1] * 1.3)) as ax:
        tokens = [text[place] for place in paths.tokens]
        distinct = list(dict.fromkeys(tokens))
        labels = []
        for token, colour in zip(distinct, seaborn.husl_palette(len(distinct), l=0.5), strict=True):
            columns = [column for column, each in enumerate(tokens) if each == token]
            for column in columns:
                x, y = paths.points[:, column].T
                name = f"{paths.tokens[column]}: {visible(token)}"
                ax.plot(x, y, color=colour, marker="o", markevery=slice(1, None), label=name)
                ax.plot(x[:1], y[:1], "o", color=colour, markerfacecolor="white", label="_")
            ends = paths.points[-1, columns]
            side = 1 if (ends - paths.points[0, columns])[:, 0].sum() >= 0 else -1  # where the paths do not come from
            at = ends[np.argmax(side * ends[:, 0])]
            style: Style = {"color": colour, "va": "center", "ha": "left" if side > 0 else "right", **PLAIN_TEXT}
            labels.append(ax.annotate(visible(token), at, (6 * side, 0), textcoords="offset points", **style))
        for axis, rank, share in zip((ax.xaxis, ax.yaxis), ("first", "second"), paths.share, strict=True):
            axis.set_label_text(f"{rank} principal component ({share:.0%} of the variance)")
        ax.margins(0.1)
        ax.set_aspect("equal", adjustable="datalim")
        mark: Style = {"color": GREY, "marker": "o"}
        first = Line2D([], [], label=f"loop {paths.loops[0]}", linestyle="none", markerfacecolor="white", **mark)
        others = Line2D([], [], label=f"later loops, to {paths.loops[-1]}", **mark)
        legend(ax, [first, others] if len(paths.loops) > 1 else [first])
        ax.figure.canvas.figure.draw_without_rendering()  # lays it out
        _spread(labels)
    return ax


def _spread(labels: Sequence[Annotation]) -> None:
    """Move texts up until none stands on another."""
    taken: list[Bbox] = []
    for label in sorted(labels, key=lambda each: each.get_window_extent().y0):
        box = label.get_window_extent()
        while blocking := [other.y1 for other in taken if box.overlaps(other)]:
            box = box.translated(0, max(blocking) - box.y0 + 1)
        x, y = label.xyann
        label.xyann = (x, y + (box.y0 - label.get_window_extent().y0) * 72 / label.figure.dpi)
        taken.append(box)


def _places(exits: TokenExits, tokens: Sequence[int] | None) -> np.ndarray:
    """Places of tokens that are predicted."""
    count = len(exits.text)
    if tokens is None:
        tokens = range(1, min(count, MOST_TOKENS + 1))
    return _checked(np.array(tokens, dtype=int), 1, count)


def _checked(places: np.ndarray, first: int, count: int) -> np.ndarray:
    if not len(places) or places.min() < first or places.max() >= count:
        raise ValueError(f"tokens = {places.tolist()} is not allowed: places of this text are {first} to {count - 1}.")
    return places


def _for_tokens(count: int, height: float) -> tuple[float, float]:
    """Size of a figure with a column for each token, in inches."""
    return max(COLUMN[0], 1.6 + 0.42 * count), height


def _token_axis(ax: Axes, exits: TokenExits, places: np.ndarray, middle: float) -> None:
    labels = [visible(exits.text[place]) for place in places]
    ax.set_xticks(np.arange(len(places)) + middle)
    ax.set_xticklabels(labels, rotation=90, **PLAIN_TEXT)
    ax.set_xlabel("token of the text")
