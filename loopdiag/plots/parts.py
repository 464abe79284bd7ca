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
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from loopdiag.bootstrap import interval, resampled_means
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import Estimate

Style = dict[str, Any]

COLUMN = (3.5, 3.2)  # inches, as wide as one column of a paper
PAGE = (7.0, 4.8)  # as wide as both
BLUE, ORANGE = seaborn.color_palette("colorblind", 2)
BLACK, GREY, SHADE = "0.1", "0.4", "0.92"
MARGIN = 0.4  # loops, left and right of the outermost
LONGEST_NAME = 40

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
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


@contextmanager
def single(ax: Axes | None) -> Iterator[Axes]:
    """The given axes in the caller's style, or new ones as wide as a column in the paper's."""
    if ax is not None:
        yield ax
        return
    with matplotlib.rc_context(PAPER):
        yield plt.subplots(figsize=COLUMN, layout="constrained")[1]


def band(diagnosis: Diagnosis, name: str) -> tuple[np.ndarray, Estimate]:
    """The loops >= 1 at which a measure is defined, and its mean there with the 95 % interval over documents.

    Documents without the measure, such as those too short for a rank, are left out. No loops where the diagnosis does
    not hold the measure.
    """
    nowhere = np.empty(0)
    if name not in diagnosis.data or diagnosis.data[name].isnull().all():
        return nowhere, Estimate(nowhere, nowhere, nowhere)
    values = diagnosis.data[name].sel(loop=slice(1, None)).dropna("loop", how="all").dropna("document")
    draws = resampled_means(values.values, values["source"].values)
    return values["loop"].values, Estimate(values.values.mean(0), *interval(draws))


def line(ax: Axes, loops: np.ndarray, estimate: Estimate, **style: Any) -> None:
    """Means as a line over the loops and intervals as a band around it; nothing where there are no loops.

    What a log axis cannot hold is marked at its foot.
    """
    if not len(loops):
        return
    mean, low, high = estimate.mean, estimate.low, estimate.high
    zero = (mean <= 0) & (ax.get_yscale() == "log")
    mean, low, high = (np.where(zero, np.nan, values) for values in (mean, low, high))
    (drawn,) = ax.plot(loops, mean, **style)
    if zero.any():
        at_the_foot: Style = {"transform": ax.get_xaxis_transform(), "color": drawn.get_color(), "clip_on": False}
        ax.plot(loops[zero], np.zeros(zero.sum()), "v", label="zero", **at_the_foot)
    if len(loops) == 1:  # A band as wide as its one point could not be seen.
        loops, low, high = loops + np.array((-0.05, 0.05)), low.repeat(2), high.repeat(2)
    ax.fill_between(loops, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)


def loop_axis(ax: Axes, first: int, last: int, trained: int, label: str | None = "beyond training") -> None:
    """Whole loops along the x axis; those beyond the trained count stand on a shade, which the label names."""
    ax.set(xlabel="loop", xlim=(first - MARGIN, last + MARGIN))
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if last > trained:
        start = max(trained + 0.5, first - MARGIN)
        ax.axvspan(start, last + MARGIN, color=SHADE, linewidth=0, zorder=0, label=label)


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


def legend(ax: Axes, *others: Axes, title: str | None = None) -> None:
    """A legend above the axes, where no data can be under it; shades last."""
    handles = [handle for each in (ax, *others) for handle in each.get_legend_handles_labels()[0]]
    place: Style = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "borderpad": 0.2}
    spacing: Style = {"columnspacing": 1.2, "handlelength": 2.2, "handletextpad": 0.5, "labelspacing": 0.3}
    if handles or title:
        handles.sort(key=lambda handle: isinstance(handle, Patch))
        ax.legend(handles=handles, title=title, ncols=2, frameon=False, alignment="left", **place, **spacing)


def short(model: str) -> str:
    """A name that fits; of a long path, the end says most."""
    return model if len(model) <= LONGEST_NAME else "…" + model[1 - LONGEST_NAME :]


def intervals(documents: int) -> str:
    """What bands and brackets are."""
    return f"Intervals: 95 % over {documents} documents."


def note(ax: Axes, *sentences: str) -> None:
    """Small print below the axes."""
    text = textwrap.fill(" ".join(sentences), 50)
    under: Style = {"xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
    ax.annotate(text, (0.5, 0), xycoords=ax.xaxis.label, color=GREY, **under)


def message(ax: Axes, text: str) -> None:
    """Why the axes are empty, in their middle."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)
