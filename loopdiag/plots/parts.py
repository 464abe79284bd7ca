"""What the figures share: the paper's style, axes, lines with their bands, what is said around them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D

from loopdiag.summary import ByLoop

Style = dict[str, Any]

COLUMN = (3.5, 3.2)  # inches, as wide as one column of a paper
PAGE = (7.0, 4.8)  # as wide as both
BLUE, ORANGE = seaborn.color_palette("colorblind", 2)
BLACK, GREY, SHADE = "0.1", "0.4", "0.92"
MARGIN = 0.4  # loops, left and right of the outermost
MOST_TICKS = 8
LONGEST_NAME = 40
WIDEST_LEGEND = 95  # characters, on a page
BEYOND = "beyond training"

PAPER: dict[Any, Any] = {
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize"), 8),
    **dict.fromkeys(("legend.fontsize", "legend.title_fontsize"), 8),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

REFERENCE: Style = {"color": GREY, "linestyle": ":", "marker": "."}
NOISE: Style = {"color": GREY, "linestyle": "none", "marker": "x", "label": "lost in rounding"}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


@contextmanager
def paper() -> Iterator[None]:
    """The paper's style, for figures made through pyplot.

    pyplot starts its backend at the first figure, and what the backend sets then (in a notebook, to show every figure)
    would be undone with the style. So it is started before.
    """
    plt.draw_if_interactive()
    with matplotlib.rc_context(PAPER):
        yield


@contextmanager
def single(ax: Axes | None, size: tuple[float, float] = COLUMN) -> Iterator[Axes]:
    """The given axes in the caller's style, or new ones in the paper's; of so many inches, a column of a paper."""
    if ax is not None:
        yield ax
        return
    with paper():
        yield plt.subplots(figsize=size, layout="constrained")[1]


def line(ax: Axes, curve: ByLoop, *, shaded: bool = True, dodge: float = 0.0, **style: Any) -> None:
    """Means as a line over the loops and intervals as a band around it; nothing where there are no loops.

    What a log axis cannot hold is marked at its foot; loops lost in the run's noise are crossed, and those beyond
    training hollow where no shade says it. All of it is shifted by `dodge` loops to the right.
    """
    loops, mean, low, high = curve.loop, curve.mean, curve.low, curve.high
    if not len(loops):
        return
    zero = (mean <= 0) & (ax.get_yscale() == "log")
    mean, low, high = (np.where(zero, np.nan, values) for values in (mean, low, high))
    # In the transform, not in the data: these stay the loops that were run.
    dodged = Affine2D().translate(dodge, 0)
    at: Style = {"transform": dodged + ax.transData}
    (drawn,) = ax.plot(loops, mean, **style, **at)
    colour = drawn.get_color()
    if zero.any():
        at_the_foot: Style = {"transform": dodged + ax.get_xaxis_transform(), "color": colour, "clip_on": False}
        ax.plot(loops[zero], np.zeros(zero.sum()), "v", label="zero", **at_the_foot)
    hollow = curve.beyond & ~curve.in_noise & (not shaded)
    if style.get("marker"):
        drawn.set_markevery(np.flatnonzero(~hollow & ~curve.in_noise).tolist())
        open_marker: Style = {"color": colour, "marker": style["marker"], "markerfacecolor": "white"}
        for where, marker in ((hollow, open_marker), (curve.in_noise, {"color": colour, "marker": NOISE["marker"]})):
            if where.any():
                ax.plot(loops[where], mean[where], linestyle="none", label="_", **marker, **at)
    if len(loops) == 1:  # A band as wide as its one point could not be seen.
        loops, low, high = loops + np.array((-0.05, 0.05)), low.repeat(2), high.repeat(2)
    ax.fill_between(loops, low, high, color=colour, alpha=0.2, linewidth=0, **at)


def loop_axis(ax: Axes, loops: np.ndarray, trained: int | None, label: str | None = BEYOND) -> None:
    """Loops along the x axis; those beyond the trained count stand on a shade, which the label names.

    Where loops were left out, they were recorded ever more sparsely: the axis is logarithmic then.

    Args:
        ax: Where to draw.
        loops: All that are drawn, ascending.
        trained: Loops of the training; None where curves differ in them.
        label: Of the shade.
    """
    sparse = len(loops) > 1 and np.diff(loops).max() > 1
    # As far from the outermost loops on a sparse axis as on another.
    low, high = (loops[0] / 1.2, loops[-1] * 1.2) if sparse else (loops[0] - MARGIN, loops[-1] + MARGIN)
    ax.set(xlabel="loop", xlim=(low, high))
    if sparse:
        ax.set_xscale("log", base=2)
        ax.set_xlim(low, high)
        ax.xaxis.set_major_locator(FixedLocator(_thinned(loops)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(PLAIN)
    elif len(loops) <= MOST_TICKS:
        ax.xaxis.set_major_locator(FixedLocator(loops.tolist()))
    else:
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if trained is not None and loops[-1] > trained:
        start = max(trained * 1.1 if sparse else trained + 0.5, low)
        ax.axvspan(start, high, color=SHADE, linewidth=0, zorder=0, label=label)


def _thinned(loops: np.ndarray) -> list[int]:
    """Loops that have room for a tick on a logarithmic axis."""
    kept = [int(loops[0])]
    for loop in loops[1:]:
        if loop >= 1.3 * kept[-1]:
            kept.append(int(loop))
    return kept


class _Decades(LogLocator):
    """Ticks at 1, 2 and 5 times powers of ten, or at powers of ten only where these would crowd."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        self.set_params(subs=(1, 2, 5) if vmax < 1000 * vmin else (1,))
        return super().tick_values(vmin, vmax)


def log_axis(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(_Decades())
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_formatter(NullFormatter())


def legend(ax: Axes, handles: Sequence[Artist] | None = None, *, title: str | None = None, columns: int = 2) -> None:
    """A legend above the axes, where no data can be under it: of what has a label if not told; shades last."""
    found = list(ax.get_legend_handles_labels()[0] if handles is None else handles)
    place: Style = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "borderpad": 0.2}
    spacing: Style = {"columnspacing": 1.2, "handlelength": 2.2, "handletextpad": 0.5, "labelspacing": 0.3}
    if found or title:
        found.sort(key=lambda handle: isinstance(handle, Patch))
        ax.legend(handles=found, title=title, ncols=columns, frameon=False, alignment="left", **place, **spacing)


def figure_legend(figure: FigureBase, handles: Sequence[Artist], title: str) -> None:
    """A legend above all axes of a figure, in as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), WIDEST_LEGEND // (longest + 7)))
    place: Style = {"loc": "outside upper left", "frameon": False, "alignment": "left"}
    figure.legend(handles=list(handles), title=title, ncols=columns, **place)


def star(loops: np.ndarray, trained: int) -> list[str]:
    """What small print says of the stars at loops beyond training, if there are any."""
    return [f"*: {BEYOND}."] if loops[-1] > trained else []


def short(model: str) -> str:
    """A name that fits; of a long path, the end says most."""
    return model if len(model) <= LONGEST_NAME else "…" + model[1 - LONGEST_NAME :]


def intervals(*documents: int) -> str:
    """What bands and brackets are, of one model or of several."""
    least, most = min(documents), max(documents)
    return f"Intervals: 95 % over {least if least == most else f'{least} to {most}'} documents."


def note(ax: Axes, *sentences: str, characters: int = 50) -> None:
    """Small print below the axes, in lines of so many characters."""
    text = textwrap.fill(" ".join(sentences), characters, break_on_hyphens=False)
    under: Style = {"xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
    ax.annotate(text, (0.5, 0), xycoords=ax.xaxis.label, color=GREY, **under)


def message(ax: Axes, text: str) -> None:
    """Why the axes are empty, in their middle."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)
