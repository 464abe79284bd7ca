"""How alike the states of every two loops are."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.parts import intervals, note, short, single, star
from loopdiag.summary import loop_cka

MOST_NUMBERS = 8  # loops, beyond which numbers would not fit into the cells


def similarity(diagnosis: Diagnosis, *, ax: Axes | None = None) -> Axes:
    """Debiased linear CKA of the states of every two loops as a heat map; loop 0 is what loop 1 starts from.

    Args:
        diagnosis: With `hsic`.
        ax: Where to draw; a new figure when None.

    Raises:
        DiagnosisError: The diagnosis holds no `hsic`.
    """
    found = loop_cka(diagnosis)
    loops = diagnosis.data["loop"].values
    about = diagnosis.provenance
    with single(ax) as ax:
        # Unrelated states scatter around 0: what is below says no more than 0 does.
        image = ax.imshow(found.mean, vmin=0, vmax=1, cmap="viridis", origin="lower")
        kept = np.arange(len(loops))[:: -(-len(loops) // 12)]
        ax.set(xlabel="loop", ylabel="loop (0: the start)", xticks=kept, yticks=kept)
        names = [f"{loop}*" if loop > about["trained_loops"] else str(loop) for loop in loops[kept]]
        ax.set_xticklabels(names)
        ax.set_yticklabels(names)
        ax.set_title(short(about["model"]))
        ax.figure.colorbar(image, ax=ax, label="CKA (1: the same up to rotation)", shrink=0.8)
        if len(loops) <= MOST_NUMBERS:
            for row, column in np.argwhere(np.isfinite(found.mean)):
                value = found.mean[row, column]
                colour = "black" if value > 0.6 else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        widest = np.nanmax((found.high - found.low) / 2)
        told = star(loops, about["trained_loops"])
        note(ax, intervals(about["documents"]), f"Half-widths: at most {widest:.2f}.", *told, characters=40)
    return ax
