"""Figures: one function each, which takes a result, draws it on axes and returns them.

Without axes, a figure in the style of a paper is made through pyplot. On given axes the caller's style stays; legends
and small print stand around them, so their figure needs a layout: `plt.subplots(layout="constrained")`.
"""

from loopdiag.plots.dynamics import hidden_states, shift_against_offset
from loopdiag.plots.files import draw
from loopdiag.plots.nats import gain_cost, readability

__all__ = ["draw", "gain_cost", "hidden_states", "readability", "shift_against_offset"]
