"""Figures of how states and outputs move from loop to loop, in the forms of arXiv 2606.18023."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.parts import (
    BLUE,
    GREY,
    ORANGE,
    PAGE,
    PAPER,
    REFERENCE,
    Style,
    band,
    intervals,
    legend,
    line,
    log_axis,
    loop_axis,
    message,
    note,
    short,
    single,
)

FIRST: Style = {"color": BLUE, "marker": "o"}
SECOND: Style = {"color": ORANGE, "marker": "s", "linestyle": "--"}


def shift_against_offset(diagnosis: Diagnosis, *, ax: Axes | None = None) -> Axes:
    """The paper's Figure 3: output shift Dp(r) on a log axis against offset distance Omega(r), with 95 % bands.

    Omega has a twin axis in its own unit, from zero, and beside it the distance of any two tokens of a document. Where
    the lines cross means nothing, since the units differ, and Dp does not say whether a shift helps.

    Returns:
        The axes of Dp; those of Omega are the figure's last.
    """
    about = diagnosis.provenance
    with single(ax) as ax:
        loop_axis(ax, 1, int(diagnosis.loops[-1]), about["trained_loops"])
        log_axis(ax)
        ax.set_ylabel("output shift Dp (nats)", color=BLUE)
        line(ax, *band(diagnosis, "output_shift"), label="shift Dp", **FIRST)
        notes = ["Dp is unsigned: a harmful shift counts too."]
        right = []
        loops, omega = band(diagnosis, "omega")
        if len(loops):
            twin = _twin(ax, "offset distance Ω (carry units)")
            line(twin, loops, omega, label="offset Ω", **SECOND)
            line(twin, *band(diagnosis, "omega_random"), label="Ω, random pairs", **REFERENCE)
            twin.set_ylim(0, 1.1 * twin.get_ylim()[1])
            right.append(twin)
            notes.insert(0, "The axes have different units: a crossing means nothing.")
        else:
            notes.append("No loop here has an offset distance Ω.")
        legend(ax, *right, title=short(about["model"]))
        note(ax, intervals(about["documents"]), *notes)
    return ax


def hidden_states(diagnosis: Diagnosis, *, axes: np.ndarray | None = None) -> np.ndarray:
    """Step size, angular change, effective rank and state cosine, with 95 % bands over documents.

    In the form of the paper's Figure 2. The angular change stands beside that of unrelated states, the rank beside the
    most that its token count allows.

    Args:
        diagnosis: What to draw.
        axes: Four axes; a new figure when None.

    Raises:
        ValueError: `axes` are not four.
    """
    if axes is None:
        with matplotlib.rc_context(PAPER):
            return hidden_states(diagnosis, axes=plt.subplots(2, 2, figsize=PAGE, layout="constrained")[1])
    if np.size(axes) != 4:
        raise ValueError(f"hidden_states draws on 4 axes and was given {np.size(axes)}: try plt.subplots(2, 2)[1].")
    about = diagnosis.provenance
    step, turn, rank, cosine = np.ravel(axes)
    for ax in np.ravel(axes):
        label = "beyond training" if ax is cosine else None
        loop_axis(ax, 1, int(diagnosis.loops[-1]), about["trained_loops"], label)

    log_axis(step)
    step.set_ylabel("step size\n(norm in the residual stream)", color=BLUE)
    line(step, *band(diagnosis, "step_size"), label="step size", **FIRST)
    relative = _twin(step, "relative step\n(share of the state's norm)")
    log_axis(relative)
    relative.margins(y=0.3)  # Both lines fall: on full axes each they would lie on each other and seem one.
    line(relative, *band(diagnosis, "relative_step"), label="relative", **SECOND)
    legend(step, relative, title=short(about["model"]))

    turn.set(ylabel="angular change\n(cosine of successive updates)", ylim=(-1.05, 1.05))
    loops, updates = band(diagnosis, "cos_update")
    line(turn, loops, updates, label="measured", **FIRST)
    line(turn, *band(diagnosis, "cos_reference"), label="unrelated states", **REFERENCE)
    if len(loops):
        turn.axhline(0, color=GREY, linewidth=0.6, zorder=1)
    else:
        message(turn, "one loop: no successive updates")

    tokens = about["rank_tokens"]
    ceiling = min(tokens, (about["config"] or {}).get("d_model", tokens))
    rank.set_ylabel(f"effective rank of {tokens} tokens\n(directions, at most {ceiling})")
    line(rank, *band(diagnosis, "effective_rank"), label="raw", **FIRST)
    line(rank, *band(diagnosis, "effective_rank_centred"), label="centred", **SECOND)

    loops, cosines = band(diagnosis, "state_cosine")
    cosine.set(ylabel="state cosine\n(with the loop before)", ylim=(-1.05 if (cosines.low < 0).any() else 0, 1.05))
    line(cosine, loops, cosines, **FIRST)
    legend(turn)
    legend(rank)
    legend(cosine, title=intervals(about["documents"]))
    return axes


def _twin(ax: Axes, label: str) -> Axes:
    """A second y axis on the right, in the colour of its line."""
    twin = ax.twinx()
    twin.spines["right"].set_visible(True)
    twin.set_ylabel(label, color=ORANGE)
    return twin
