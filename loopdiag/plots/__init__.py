"""Figures: one function each, which takes results, draws them and returns the axes.

A figure of one model draws on axes (`ax=`), one of several panels into a figure or a part of one (`figure=`). Without
either, a figure in the style of a paper is made through pyplot. On what is given the caller's style stays; legends and
small print stand around the axes, so the figure needs a layout: `plt.subplots(layout="constrained")`.
"""

from loopdiag.plots.attention import attention, gate, heads
from loopdiag.plots.dynamics import hidden_states, shift_against_offset
from loopdiag.plots.exits import exit_rules
from loopdiag.plots.files import draw, left_out, pictures
from loopdiag.plots.loops import rarefaction
from loopdiag.plots.nats import gain_cost, readability
from loopdiag.plots.predictions import predictions, shares
from loopdiag.plots.probes import pictures_of_probes, probes
from loopdiag.plots.prompts import changes, logit_lens, trajectories
from loopdiag.plots.similarity import similarity
from loopdiag.plots.sweeps import (
    draw_sweep,
    left_out_of_sweep,
    losses_over_training,
    measured_gain_cost,
    pictures_of_sweep,
    trained_losses,
)
from loopdiag.plots.training import emergence

__all__ = [
    "attention",
    "changes",
    "draw",
    "draw_sweep",
    "emergence",
    "exit_rules",
    "gain_cost",
    "gate",
    "heads",
    "hidden_states",
    "left_out",
    "left_out_of_sweep",
    "logit_lens",
    "losses_over_training",
    "measured_gain_cost",
    "pictures",
    "pictures_of_probes",
    "pictures_of_sweep",
    "predictions",
    "probes",
    "rarefaction",
    "readability",
    "shares",
    "shift_against_offset",
    "similarity",
    "trained_losses",
    "trajectories",
]
