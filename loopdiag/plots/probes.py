"""What linear probes read from the states of each loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from loopdiag.plots.files import METADATA, REPRODUCIBLE, rendered
from loopdiag.plots.panels import DODGE, canvas, height, styles
from loopdiag.plots.parts import (
    BEYOND,
    GREY,
    PAGE,
    PAPER,
    SHADE,
    Style,
    figure_legend,
    intervals,
    line,
    loop_axis,
    short,
)
from loopdiag.scores import UNITS, ProbeScores

# Beside the scores: grey, and by their dashes told apart; the hook's marker says whose they are.
BESIDE: dict[str, tuple[str, Style]] = {
    "control": ("control task", {"color": GREY, "linestyle": "--", "linewidth": 0.8, "markersize": 2.5}),
    "floor": ("random weights", {"color": GREY, "linestyle": ":", "linewidth": 1.0, "markersize": 2.5}),
}
_BASELINE: Style = {"color": GREY, "linestyle": "-", "linewidth": 0.6}


def probes(scores: ProbeScores, *, seed: int = 0, figure: FigureBase | None = None) -> np.ndarray:
    """Scores against loops, a panel for each target and a line for each hook, with 95 % bands over documents.

    Beside them in grey: of accuracies, control task and random weights, with the marker of their hook, and what the
    most frequent class gets; of information, the control, and what the embeddings leave open. Random weights have
    clusters of their own, with more or less to inform of, so they are not on this scale. Loop 0 is the embedding.

    Args:
        scores: What to draw.
        seed: Of the bootstrap.
        figure: Where to draw, a figure or part of one, with a constrained layout; a new one when None.

    Returns:
        The axes, in the order of the targets.
    """
    rows, columns = _shape(scores)
    informs = scores.provenance["unit"] == "information"
    beside = {name: look for name, look in BESIDE.items() if name != "floor" or not informs}
    baseline = ("baseline_nll", "left open by the embeddings") if informs else ("baseline", "most frequent class")
    looks = dict(zip(scores.hooks, styles(len(scores.hooks)), strict=True))
    with canvas(figure, rows) as figure:
        axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for ax in axes[len(scores.targets) :]:
            ax.remove()
        for ax, target in zip(axes, scores.targets, strict=False):
            loop_axis(ax, scores.data["loop"].values, scores.provenance["trained_loops"], label=None)
            ax.set(title=target, ylabel=UNITS[scores.provenance["unit"]])
            for place, (hook, look) in enumerate(looks.items()):
                for name, (label, style) in beside.items():
                    curve = scores.curve(name, target, hook, seed=seed)
                    ax.plot(curve.loop, curve.mean, label=f"{hook}: {label}", **{**style, "marker": look["marker"]})
                dodge = DODGE * (place - (len(looks) - 1) / 2)
                line(ax, scores.curve("score", target, hook, seed=seed), dodge=dodge, label=hook, **look)
            curve = scores.curve(baseline[0], target, seed=seed)
            alone: Style = (
                {"marker": "_", "markersize": 40} if len(curve.loop) == 1 else {}
            )  # no line through one point
            ax.plot(curve.loop, curve.mean, label=baseline[1], **_BASELINE, **alone)
            if informs:
                ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        handles: list[Artist] = [Line2D([], [], label=hook, **look) for hook, look in looks.items()]
        handles += [Line2D([], [], label=label, **style) for label, style in beside.values()]
        handles.append(Line2D([], [], label=baseline[1], **_BASELINE))
        about = scores.provenance
        if about["run_loops"] > about["trained_loops"]:
            handles.append(Patch(color=SHADE, label=BEYOND))
        figure_legend(figure, handles, f"{about['suite']}, {short(about['model'])}. {intervals(about['documents'])}")
    return axes[: len(scores.targets)]


def _shape(scores: ProbeScores) -> tuple[int, int]:
    """Rows and columns of panels."""
    count = len(scores.targets)
    columns = min(count, 2 if count in (2, 4) else 3)
    return -(-count // columns), columns


def pictures_of_probes(
    scores: ProbeScores, forms: Sequence[str] = tuple(METADATA), *, seed: int = 0
) -> dict[str, bytes]:
    """The figure by file form, of `png` and `svg`; the seed is that of the bootstrap."""
    with rc_context(PAPER | REPRODUCIBLE):
        figure = Figure((PAGE[0], height(_shape(scores)[0])), layout="constrained")
        probes(scores, seed=seed, figure=figure)
        return {form: rendered(figure, form) for form in forms}
