"""How states and outputs move from loop to loop, in the forms of arXiv 2606.18023."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import FigureBase

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.panels import Panel, grid, several


def hidden_states(diagnoses: Diagnosis | Sequence[Diagnosis], *, figure: FigureBase | None = None) -> np.ndarray:
    """Step size, angular change, effective rank and fixed-point gap, with 95 % bands over documents.

    In the form of the paper's Figure 2, with the relative step and the centred rank beside. The angular change stands
    beside that of unrelated states, the fixed-point gap beside its literal form, of the layers alone. Where no gap was
    measured, the cosine with the state before takes its place.

    Args:
        diagnoses: One or several.
        figure: Where to draw, with a constrained layout; a new one when None.

    Returns:
        Six axes.
    """
    models = several(diagnoses)
    counted = _counted(models)
    gap = any("fixed_point_gap" in model.data for model in models)
    panels = (
        Panel("step_size", "step size\n(norm in the residual stream)", log=True),
        Panel("relative_step", "relative step\n(share of the state's norm)", log=True),
        Panel(
            "cos_update",
            "angular change\n(cosine of successive updates)",
            reference=("cos_reference", "unrelated states"),
            limits=(-1.05, 1.05),
            why_empty="one loop: no successive updates",
        ),
        Panel("effective_rank", f"effective rank\n(directions of {counted})"),
        Panel("effective_rank_centred", f"centred effective rank\n(directions of {counted})"),
        Panel(
            "fixed_point_gap",
            "fixed-point gap\n(norm in the residual stream)",
            first="one more loop",
            second=("fixed_point_gap_layers", "layers alone"),
            log=True,
        )
        if gap
        else Panel("state_cosine", "state cosine\n(with the loop before)", limits=(None, 1.05)),
    )
    return grid(models, panels, columns=3, figure=figure)


def _counted(models: Sequence[Diagnosis]) -> str:
    """The tokens that ranks are taken of, and the most that they and the width allow, where the models share it."""
    abouts = [model.provenance for model in models]
    tokens = sorted({about["rank_tokens"] for about in abouts})
    most = {min(about["rank_tokens"], (about["config"] or {}).get("d_model", about["rank_tokens"])) for about in abouts}
    of_tokens = " or ".join(map(str, tokens)) + " tokens"
    return f"{of_tokens},\nat most {most.pop()}" if len(most) == 1 else of_tokens


def shift_against_offset(diagnoses: Diagnosis | Sequence[Diagnosis], *, figure: FigureBase | None = None) -> np.ndarray:
    """The paper's Figure 3: output shift Dp(r) and offset distance Omega(r), with 95 % bands.

    The paper draws both into one panel; here each has its own, since they have different units and a crossing of their
    lines means nothing. Omega stands beside the distance of any two tokens of a document. Dp does not say whether a
    shift helps.

    Args:
        diagnoses: One or several.
        figure: Where to draw, with a constrained layout; a new one when None.

    Returns:
        Two axes.
    """
    panels = (
        Panel("output_shift", "output shift Dp\n(nats, unsigned)", log=True),
        Panel(
            "omega",
            "offset distance Ω\n(norm in the carry)",
            reference=("omega_random", "any two tokens"),
            limits=(0, None),
            why_empty="no loop has an offset",
        ),
    )
    return grid(diagnoses, panels, columns=2, figure=figure)
