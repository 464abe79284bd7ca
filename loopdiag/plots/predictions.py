"""What the exits predict, loop by loop, and how the loops share in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import FigureBase

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.panels import Panel, grid, several
from loopdiag.summary import NOWHERE, SHARES, ByLoop, has_shares, refinement_shares

_EQUAL = " equal"


def predictions(diagnoses: Diagnosis | Sequence[Diagnosis], *, figure: FigureBase | None = None) -> np.ndarray:
    """NLL of each exit, rank of the next token, entropy and output shift, with 95 % bands over documents.

    Args:
        diagnoses: One or several.
        figure: Where to draw, with a constrained layout; a new one when None.

    Returns:
        Four axes.
    """
    panels = (
        Panel("nll_exit", "exit NLL\n(nats per token)"),
        Panel("rank", "rank of the next token\n(median; 1 is the best)", log=True),
        Panel("entropy", "entropy of the exit\n(nats)"),
        Panel("output_shift", "output shift Dp\n(nats, unsigned)", log=True),
    )
    return grid(diagnoses, panels, columns=2, figure=figure)


def shares(diagnoses: Diagnosis | Sequence[Diagnosis], *, figure: FigureBase | None = None) -> np.ndarray:
    """The paper's Table 3: each loop's share of output shift, attention re-routing and token breadth, with 95 % bands.

    Args:
        diagnoses: One or several; those that have no shares, such as a model of two loops, have no line.
        figure: Where to draw, with a constrained layout; a new one when None.

    Returns:
        An axes for each measure that a model has.

    Raises:
        DiagnosisError: No model has shares.
    """
    models = several(diagnoses)
    found = {id(model): refinement_shares(model) if has_shares(model) else {} for model in models}
    if not any(found.values()):
        refinement_shares(models[0])  # says why
    panels = [
        Panel(name, f"{said}\n(share of loops 2 on)", reference=(f"{name}{_EQUAL}", "equal shares"), limits=(0, 1.05))
        for name, said in SHARES.items()
        if any(name in of_model for of_model in found.values())
    ]

    def curve(model: Diagnosis, name: str) -> ByLoop:
        share = found[id(model)].get(name.removesuffix(_EQUAL), NOWHERE)
        if not name.endswith(_EQUAL) or not len(share.loop):
            return share
        level = np.full(len(share.loop), 1 / len(share.loop))
        return replace(share, mean=level, low=level, high=level)

    return grid(models, panels, columns=len(panels), figure=figure, curve=curve)
