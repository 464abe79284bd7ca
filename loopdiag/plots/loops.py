"""Figures of one model with a line for each loop, over something else than loops."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.panels import MARKERS
from loopdiag.plots.parts import GREY, PLAIN, intervals, legend, log_axis, note, short, single, star
from loopdiag.summary import estimate

MOST_LINES = 8


def rarefaction(diagnosis: Diagnosis, *, ax: Axes | None = None) -> Axes:
    """Effective rank of a document's first tokens against their number, a line for each loop, with 95 % bands.

    A rank that still rises with the tokens is a number about the tokens taken. The dotted line is the most there can
    be: a direction for each token, or as many as a state has entries. A star marks loops beyond training.

    Args:
        diagnosis: With the group `rarefaction`.
        ax: Where to draw; a new figure when None.

    Raises:
        DiagnosisError: It was not measured.
    """
    diagnosis.require("effective_rank_by_tokens")
    values = diagnosis.data["effective_rank_by_tokens"]
    tokens = values["tokens"].values
    about = diagnosis.provenance
    with single(ax) as ax:
        log_axis(ax)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(tokens.tolist()))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(PLAIN)
        ax.set(xlabel="first tokens of a document (tokens)", ylabel="effective rank (directions)")
        lines_by_loop(ax, values, tokens, about["trained_loops"])
        most = np.minimum(tokens, (about["config"] or {}).get("d_model", tokens[-1]))
        ax.plot(tokens, most, color=GREY, linestyle=":", linewidth=1.0, label="most possible")
        legend(ax, title=short(about["model"]), columns=3)
        note(ax, intervals(about["documents"]), *star(diagnosis.loops, about["trained_loops"]))
    return ax


def lines_by_loop(ax: Axes, values: xr.DataArray, x: np.ndarray, trained: int) -> None:
    """A line with its band for each loop, from dark to light; of many loops, powers of two and the last.

    Args:
        ax: Where to draw.
        values: By document, loop and one more dimension, that of `x`.
        x: Where the values stand.
        trained: Loops of the training; those beyond have a star.
    """
    loops = [int(loop) for loop in values.dropna("loop", how="all")["loop"].values if loop >= 1]
    if len(loops) > MOST_LINES:
        loops = [loop for loop in loops if loop & (loop - 1) == 0 or loop == loops[-1]]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.7, len(loops)))  # lighter ones are lost on white
    for index, (loop, colour) in enumerate(zip(loops, colours, strict=True)):
        found = estimate(values.sel(loop=loop))
        ax.plot(
            x,
            found.mean,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            label=f"loop {loop}{'*' if loop > trained else ''}",
        )
        ax.fill_between(x, found.low, found.high, color=colour, alpha=0.2, linewidth=0)
