"""All figures of a diagnosis as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from loopdiag.diagnosis import Diagnosis
from loopdiag.files import whole
from loopdiag.gaincost import Recommendation
from loopdiag.gaincost import gain_cost as curve_of
from loopdiag.plots.dynamics import hidden_states, shift_against_offset
from loopdiag.plots.nats import gain_cost, readability
from loopdiag.plots.parts import COLUMN, PAGE, PAPER

DPI = 200
# The same picture must give the same bytes: no random ids, no date.
REPRODUCIBLE: dict[Any, Any] = {"svg.hashsalt": "loopdiag"}
METADATA: dict[str, Any] = {"png": None, "svg": {"Date": None}}


def draw(diagnosis: Diagnosis, recommendation: Recommendation, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every figure into a folder as PNG and SVG; files of these names are replaced.

    Nothing is written unless all figures can be drawn, and each file is written whole or not at all. `readability` is
    left out where the diagnosis has no readouts.

    Args:
        diagnosis: What to draw.
        recommendation: Gives the price and the loop count to mark.
        folder: Made if needed.

    Returns:
        The files.
    """
    folder = Path(folder)
    with matplotlib.rc_context(PAPER | REPRODUCIBLE):
        # Not through pyplot, which would keep the figures and may want a display.
        figures = {"gain_cost": Figure(COLUMN, layout="constrained")}
        gain_cost(
            curve_of(diagnosis, seed=recommendation.seed),
            price=recommendation.price,
            recommended=recommendation.recommended_loops,
            ax=figures["gain_cost"].subplots(),
        )
        figures["shift_against_offset"] = Figure(COLUMN, layout="constrained")
        shift_against_offset(diagnosis, ax=figures["shift_against_offset"].subplots())
        figures["hidden_states"] = Figure(PAGE, layout="constrained")
        hidden_states(diagnosis, axes=figures["hidden_states"].subplots(2, 2))
        if "nll_usable" in diagnosis.data:
            figures["readability"] = Figure(COLUMN, layout="constrained")
            readability(diagnosis, ax=figures["readability"].subplots())
        folder.mkdir(parents=True, exist_ok=True)
        return [_write(figure, folder / f"{name}.{form}") for name, figure in figures.items() for form in METADATA]


def _write(figure: Figure, target: Path) -> Path:
    form = target.suffix[1:]
    with whole(target) as partial:
        figure.savefig(partial, format=form, dpi=DPI, metadata=METADATA[form])
    return target
