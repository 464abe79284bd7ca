"""All figures of one or several diagnoses as files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure, FigureBase

from loopdiag.diagnosis import Diagnosis
from loopdiag.files import write_all
from loopdiag.gaincost import Recommendation
from loopdiag.gaincost import gain_cost as curve_of
from loopdiag.measures.definitions import GROUPS
from loopdiag.plots.attention import attention, gate, heads
from loopdiag.plots.dynamics import hidden_states, shift_against_offset
from loopdiag.plots.exits import exit_rules
from loopdiag.plots.loops import rarefaction
from loopdiag.plots.nats import gain_cost, readability
from loopdiag.plots.panels import height
from loopdiag.plots.parts import COLUMN, PAGE, PAPER
from loopdiag.plots.predictions import predictions, shares
from loopdiag.plots.similarity import similarity
from loopdiag.summary import has_shares

DPI = 200
# The same picture must give the same bytes: no random ids, no date.
REPRODUCIBLE: dict[Any, Any] = {"svg.hashsalt": "loopdiag"}
METADATA: dict[str, Any] = {"png": None, "svg": {"Date": None}}


@dataclass(frozen=True)
class Together:
    """A figure with a line for every model.

    Attributes:
        draws: From diagnoses and a figure to its axes.
        needs: A model has part in it with all of these.
        fits: And with this.
    """

    draws: Callable[..., np.ndarray]
    needs: tuple[str, ...]
    fits: Callable[[Diagnosis], bool] = lambda diagnosis: True


@dataclass(frozen=True)
class Apart:
    """A figure with axes for every model.

    Attributes:
        draws: From a diagnosis, its recommendation if there is one, and a part of a figure.
        size: Of that part, in inches.
        needs, fits: As above.
    """

    draws: Callable[[Diagnosis, Recommendation | None, FigureBase], Any]
    size: tuple[float, float]
    needs: tuple[str, ...]
    fits: Callable[[Diagnosis], bool] = lambda diagnosis: True


def _gain_cost(diagnosis: Diagnosis, recommendation: Recommendation | None, part: FigureBase) -> None:
    gain_cost(
        curve_of(diagnosis, seed=recommendation.seed if recommendation else 0),
        price=recommendation.price if recommendation else None,
        recommended=recommendation.recommended_loops if recommendation else None,
        ax=part.subplots(),
    )


def _on_axes(draws: Callable[..., Any]) -> Callable[[Diagnosis, Recommendation | None, FigureBase], Any]:
    return lambda diagnosis, _, part: draws(diagnosis, ax=part.subplots())


def _exit_rules(diagnosis: Diagnosis, recommendation: Recommendation | None, part: FigureBase) -> None:
    told = {"price": recommendation.price} if recommendation else {}
    exit_rules(diagnosis, ax=part.subplots(), **told)


FIGURES: dict[str, Together | Apart] = {
    "gain_cost": Apart(_gain_cost, COLUMN, ("gain", "cost", "nll_exit")),
    "hidden_states": Together(hidden_states, ("step_size", "effective_rank")),
    "shift_against_offset": Together(shift_against_offset, ("output_shift",)),
    "predictions": Together(predictions, ("nll_exit",)),
    "shares": Together(shares, ("output_shift", "breadth"), has_shares),
    "attention": Together(attention, ("attention_entropy_relative",)),
    "heads": Together(heads, ("head_cosine",)),
    "gate": Apart(
        lambda diagnosis, _, part: gate(diagnosis, figure=part), (PAGE[0], 2.8), ("gate_mean", "gate_by_position")
    ),
    "readability": Apart(_on_axes(readability), COLUMN, ("nll_exit", "nll_usable")),
    "similarity": Apart(_on_axes(similarity), (COLUMN[0], 3.5), ("hsic",)),
    "rarefaction": Apart(_on_axes(rarefaction), COLUMN, ("effective_rank_by_tokens",)),
    "exit_rules": Apart(
        _exit_rules, (COLUMN[0], 4.2), ("nll_exit", "exit_rule_nll", "exit_rule_nll_fit"), lambda it: len(it.loops) > 1
    ),
}


def left_out(diagnoses: Sequence[Diagnosis]) -> dict[str, str]:
    """Figures that no diagnosis allows, each with the reason and what would bring it."""
    return {
        name: _why(figure, diagnoses)
        for name, figure in FIGURES.items()
        if not any(_takes_part(figure, diagnosis) for diagnosis in diagnoses)
    }


def _why(figure: Together | Apart, diagnoses: Sequence[Diagnosis]) -> str:
    missing = [need for need in figure.needs if not any(_holds(diagnosis, need) for diagnosis in diagnoses)]
    if not missing:
        return "no run has enough loops for it"
    (group,) = (group for group, names in GROUPS.items() if missing[0] in names)
    if all(group not in diagnosis.provenance["measures"] for diagnosis in diagnoses):
        return f"{missing[0]} was not measured: diagnose with --measures default,{group}"
    absent = {diagnosis.provenance["absent"].get(missing[0], "not defined in this run") for diagnosis in diagnoses}
    return f"no {missing[0]}: {'; '.join(sorted(absent))}"


def _takes_part(figure: Together | Apart, diagnosis: Diagnosis) -> bool:
    return all(_holds(diagnosis, need) for need in figure.needs) and figure.fits(diagnosis)


def _holds(diagnosis: Diagnosis, name: str) -> bool:
    return name in diagnosis.data and not bool(diagnosis.data[name].isnull().all())


def pictures(
    diagnoses: Sequence[Diagnosis],
    recommendations: Sequence[Recommendation | None] = (),
    forms: Sequence[str] = tuple(METADATA),
) -> dict[str, bytes]:
    """Every figure that the diagnoses allow, by file name.

    Args:
        diagnoses: One, or several to draw together.
        recommendations: One for each diagnosis gives the price and the loop count to mark.
        forms: `png`, `svg` or both.
    """
    told = recommendations or [None] * len(diagnoses)
    found: dict[str, bytes] = {}
    with matplotlib.rc_context(PAPER | REPRODUCIBLE):
        for name, kind in FIGURES.items():
            taking_part = [pair for pair in zip(diagnoses, told, strict=True) if _takes_part(kind, pair[0])]
            if taking_part:
                drawn = _together(kind, diagnoses) if isinstance(kind, Together) else _apart(kind, taking_part)
                found |= {f"{name}.{form}": rendered(drawn, form) for form in forms}
    return found


def draw(
    diagnoses: Sequence[Diagnosis],
    recommendations: Sequence[Recommendation | None],
    folder: str | os.PathLike[str],
) -> list[Path]:
    """Write `pictures` into a folder; files of these names are replaced.

    Nothing is written unless all figures can be drawn, and each file is written whole or not at all.

    Args:
        diagnoses: One, or several to draw together.
        recommendations: One for each diagnosis gives the price and the loop count to mark; none are needed.
        folder: Made if needed.

    Returns:
        The files.
    """
    return write_all(Path(folder), pictures(diagnoses, recommendations))


# Figures are not made through pyplot, which would keep them and may want a display.


def _together(kind: Together, diagnoses: Sequence[Diagnosis]) -> Figure:
    figure = Figure(PAGE, layout="constrained")
    axes = kind.draws(diagnoses, figure=figure)
    figure.set_size_inches(PAGE[0], height(axes[0].get_gridspec().nrows))
    return figure


def _apart(kind: Apart, pairs: Sequence[tuple[Diagnosis, Recommendation | None]]) -> Figure:
    columns = min(len(pairs), int(PAGE[0] / kind.size[0]))
    rows = -(-len(pairs) // columns)
    figure = Figure((columns * kind.size[0], rows * kind.size[1]), layout="constrained")
    parts = figure.subfigures(rows, columns, squeeze=False).ravel()
    for (diagnosis, recommendation), part in zip(pairs, parts, strict=False):
        kind.draws(diagnosis, recommendation, part)
    return figure


def rendered(figure: Figure, form: str) -> bytes:
    """A figure as the bytes of a file of that form."""
    into = io.BytesIO()
    figure.savefig(into, format=form, dpi=DPI, metadata=METADATA[form])
    return into.getvalue()
