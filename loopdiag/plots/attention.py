"""Where loops attend, how their heads differ, and how much they ask the first loop's memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.loops import lines_by_loop
from loopdiag.plots.panels import Panel, canvas, grid, several
from loopdiag.plots.parts import GREY, figure_legend, intervals, short, star

BRANCHES = {"": "effective map", "_global": "global branch", "_local": "local branch"}
LOG = ("attention_kl",)  # falls by orders of magnitude from loop to loop


def attention(diagnoses: Diagnosis | Sequence[Diagnosis], *, figure: FigureBase | None = None) -> np.ndarray:
    """Entropy of attention, over its most, and its KL from the loop before, with 95 % bands over documents.

    Of the map that the model really applies, and of its two branches where a model blends them.

    Args:
        diagnoses: One or several.
        figure: Where to draw, with a constrained layout; a new one when None.
    """
    kinds = {
        "attention_entropy_relative": ("attention entropy", "over log of visible keys"),
        "attention_kl": ("attention KL from loop before", "nats"),
    }
    return _by_branch(diagnoses, kinds, figure)


def heads(diagnoses: Diagnosis | Sequence[Diagnosis], *, figure: FigureBase | None = None) -> np.ndarray:
    """How alike a layer's heads attend: their mean cosine and effective rank, with 95 % bands over documents.

    Of the map that the model really applies, and of its two branches where a model blends them.

    Args:
        diagnoses: One or several.
        figure: Where to draw, with a constrained layout; a new one when None.
    """
    kinds = {
        "head_cosine": ("likeness of heads", "mean cosine"),
        "head_rank": ("effective rank of heads", "heads"),
    }
    return _by_branch(diagnoses, kinds, figure)


def gate(diagnosis: Diagnosis, *, figure: FigureBase | None = None) -> np.ndarray:
    """Weight of the global attention branch by layer and by position, a line for each loop, with 95 % bands.

    0.5 is its value at the start of training. Positions stand in bins of octaves, at the first of each.

    Args:
        diagnosis: With `gate_mean`.
        figure: Where to draw, with a constrained layout; a new one when None.

    Returns:
        Two axes.

    Raises:
        DiagnosisError: There is no gate, or it was not measured.
    """
    diagnosis.require("gate_mean", "gate_by_position")
    by_layer = diagnosis.data["gate_mean"].mean("head")
    by_position = diagnosis.data["gate_by_position"].mean("layer")
    about = diagnosis.provenance
    with canvas(figure, 1) as figure:
        left, right = axes = figure.subplots(1, 2, sharey=True)
        for ax, values, x in (
            (left, by_layer, np.arange(by_layer.sizes["layer"])),
            (right, by_position, np.arange(by_position.sizes["position"])),
        ):
            lines_by_loop(ax, values, x, about["trained_loops"])
            ax.axhline(0.5, color=GREY, linestyle=":", linewidth=1.0, zorder=1, label="start of training")
            ax.set_ylim(0, 1)
            ax.set_ylabel("gate\n(weight of the global branch)")
        left.set_xlabel("layer (from 0)")
        left.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        right.set_xlabel("position (tokens before; first of each octave)")
        right.set_xticks(np.arange(by_position.sizes["position"]), by_position["position"].values)
        told = star(diagnosis.loops, about["trained_loops"])
        title = " ".join((f"{short(about['model'])}.", intervals(about["documents"]), *told))
        figure_legend(figure, left.get_legend_handles_labels()[0], title)
    return axes


def _by_branch(
    diagnoses: Diagnosis | Sequence[Diagnosis], kinds: dict[str, tuple[str, str]], figure: FigureBase | None
) -> np.ndarray:
    """A row for each measure, whose panels have one range, or where no model has branches, one row for all."""
    models = several(diagnoses)
    ends = [end for end in BRANCHES if any(f"{name}{end}" in model.data for model in models for name in kinds)]
    panels = [
        Panel(f"{name}{end}", f"{said}\n({unit})", title=BRANCHES[end] if len(ends) > 1 else "", log=name in LOG)
        for name, (said, unit) in kinds.items()
        for end in ends
    ]
    if len(ends) > 1:
        return grid(models, panels, columns=len(ends), share_rows=True, figure=figure)
    return grid(models, panels, columns=len(kinds), figure=figure)
