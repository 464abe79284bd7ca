"""Figures of several panels: a measure in each, over the loops, with a line for every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.parts import (
    BEYOND,
    GREY,
    NOISE,
    PAGE,
    SHADE,
    Style,
    figure_legend,
    intervals,
    legend,
    line,
    log_axis,
    loop_axis,
    message,
    paper,
    short,
)
from loopdiag.summary import ByLoop, by_loop, labels

MARKERS = "osD^vP*X<>"
# A dash as wide as two markers and above them: where the two coincide, both are seen.
_REFERENCE: Style = {"linestyle": ":", "linewidth": 1.0, "marker": "_", "markersize": 11, "zorder": 3}
_SECOND: Style = {"linestyle": "--", "linewidth": 1.0, "marker": "."}
DODGE = 0.08  # loops between lines of two models, so that marks that coincide are seen
WIDEST_DODGE = 0.3  # between the first and the last
_LEVEL: Style = {"color": GREY, "linestyle": ":", "linewidth": 1.0}


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    Attributes:
        measure: A solid line for every model.
        label: Of the y axis, with the unit.
        title: Above the axes.
        reference: What it is read beside, and its name: dotted lines.
        second: Another measure in the same unit, and its name: dashed lines.
        first: The name of `measure` beside `second`.
        level: A constant to read it beside, and its name.
        log: A logarithmic axis.
        limits: Of the y axis; as the data are when None.
        why_empty: What to say where no model has the measure.
    """

    measure: str
    label: str
    title: str = ""
    reference: tuple[str, str] | None = None
    second: tuple[str, str] | None = None
    first: str = "measured"
    level: tuple[float, str] | None = None
    log: bool = False
    limits: tuple[float | None, float | None] | None = None
    why_empty: str = "not measured"


def several(diagnoses: Diagnosis | Sequence[Diagnosis]) -> list[Diagnosis]:
    """One diagnosis or several, as a list."""
    return [diagnoses] if isinstance(diagnoses, Diagnosis) else list(diagnoses)


def styles(count: int) -> list[Style]:
    """A colour and a marker for each of several lines, told apart without colours, too."""
    colours = seaborn.color_palette("colorblind", count)
    return [{"color": colour, "marker": MARKERS[index % len(MARKERS)]} for index, colour in enumerate(colours)]


def height(rows: int) -> float:
    """Of a figure with so many rows of panels, in inches."""
    return 0.6 + 2.2 * rows


@contextmanager
def canvas(figure: FigureBase | None, rows: int) -> Iterator[FigureBase]:
    """The given figure in the caller's style, or a new one as wide as a page in the paper's."""
    if figure is not None:
        yield figure
        return
    with paper():
        yield plt.figure(figsize=(PAGE[0], height(rows)), layout="constrained")


def grid(
    diagnoses: Diagnosis | Sequence[Diagnosis],
    panels: Sequence[Panel],
    *,
    columns: int,
    share_rows: bool = False,
    figure: FigureBase | None = None,
    curve: Callable[[Diagnosis, str], ByLoop] = by_loop,
) -> np.ndarray:
    """Draw panels with a line for every model, and what all share into a legend above them.

    Args:
        diagnoses: One or several.
        panels: What to draw.
        columns: Panels in a row.
        share_rows: Whether the panels of a row have one range of y, which must be of one unit.
        figure: Where to draw, a figure or part of one, with a constrained layout; a new one when None.
        curve: From a diagnosis and the name of a measure to what is drawn.

    Returns:
        The axes, in the order of the panels.
    """
    models = several(diagnoses)
    looks = styles(len(models))
    with canvas(figure, -(-len(panels) // columns)) as figure:
        axes = np.atleast_1d(
            figure.subplots(-(-len(panels) // columns), columns, sharey="row" if share_rows else "none")
        ).ravel()
        for ax in axes[len(panels) :]:
            ax.remove()
        curves = [_draw(ax, panel, models, looks, curve) for ax, panel in zip(axes, panels, strict=False)]
        _shared_legend(figure, models, looks, curves)
    return axes[: len(panels)]


def common_training(models: Sequence[Diagnosis]) -> int | None:
    """Loops that all models were trained with; None where they differ."""
    trained = {model.provenance["trained_loops"] for model in models}
    return trained.pop() if len(trained) == 1 else None


def _draw(
    ax: Axes,
    panel: Panel,
    models: Sequence[Diagnosis],
    looks: Sequence[Style],
    curve: Callable[[Diagnosis, str], ByLoop],
) -> list[ByLoop]:
    """One panel; returns the curves of its measure."""
    trained = common_training(models)
    loops = np.unique(np.concatenate([model.loops for model in models]))
    loop_axis(ax, loops, trained, label=None)
    if panel.log:
        log_axis(ax)
    ax.set_ylabel(panel.label)
    ax.tick_params(labelleft=True)  # in a row of one range, too, where matplotlib leaves them to the first panel
    ax.set_title(panel.title)
    drawn = []
    for model, name, look, dodge in zip(models, labels(models), looks, _dodges(ax, len(models)), strict=True):
        measured = curve(model, panel.measure)
        line(ax, measured, shaded=trained is not None, dodge=dodge, label=name, **look)
        drawn.append(measured)
        for extra, style in ((panel.second, _SECOND), (panel.reference, _REFERENCE)):
            if extra:
                line(ax, curve(model, extra[0]), dodge=dodge, label=f"{name}: {extra[1]}", **look | style)
    if not ax.lines:
        message(ax, panel.why_empty)
    if panel.level and ax.lines:
        ax.axhline(panel.level[0], label=panel.level[1], zorder=1, **_LEVEL)
    if panel.limits and ax.lines:
        ax.set_ylim(*panel.limits)
    _own_legend(ax, panel)
    return drawn


def _dodges(ax: Axes, count: int) -> np.ndarray:
    """How far each of several lines stands beside its loops; on a logarithmic axis, none does."""
    step = 0.0 if ax.get_xscale() == "log" else min(DODGE, WIDEST_DODGE / max(count - 1, 1))
    return step * (np.arange(count) - (count - 1) / 2)


def _own_legend(ax: Axes, panel: Panel) -> None:
    """What the kinds of line mean, where a panel has more than one."""
    there = " ".join(str(each.get_label()) for each in ax.lines)
    extras = [(panel.second, _SECOND), (panel.reference, _REFERENCE), (panel.level, _LEVEL)]
    handles = [
        Line2D([], [], label=extra[1], **{"color": GREY} | style)
        for extra, style in extras
        if extra is not None and extra[1] in there
    ]
    if handles and panel.second:
        handles.insert(0, Line2D([], [], color=GREY, label=panel.first))
    legend(ax, handles, columns=1)


def _shared_legend(
    figure: FigureBase, models: Sequence[Diagnosis], looks: Sequence[Style], panels: Sequence[Sequence[ByLoop]]
) -> None:
    """Above all panels: the models that have a line in any, the marks that occur, and what the bands are."""
    curves = [each for panel in panels for each in panel]
    handles: list[Artist] = [
        Line2D([], [], label=short(name), **look)
        for name, look, of_model in zip(labels(models), looks, zip(*panels, strict=True), strict=True)
        if any(len(each.loop) for each in of_model)
    ]
    if any(each.beyond.any() for each in curves):
        if common_training(models) is None:
            hollow: Style = {"color": GREY, "linestyle": "none", "marker": "o", "markerfacecolor": "white"}
            handles.append(Line2D([], [], label=BEYOND, **hollow))
        else:
            handles.append(Patch(color=SHADE, label=BEYOND))
    if any(each.in_noise.any() for each in curves):
        handles.append(Line2D([], [], **NOISE))
    figure_legend(figure, handles, intervals(*(model.provenance["documents"] for model in models)))
