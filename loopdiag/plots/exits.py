"""Rules for leaving token by token: what they save against what they lose."""

from __future__ import annotations

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.panels import MARKERS
from loopdiag.plots.parts import BLACK, GREY, Style, intervals, legend, note, short, single
from loopdiag.summary import exit_trade_off

RING: Style = {"marker": "o", "markersize": 9, "markerfacecolor": "none"}


def exit_rules(diagnosis: Diagnosis, *, price: float = 0.01, ax: Axes | None = None) -> Axes:
    """NLL above that of the last loop against the mean loops that a token takes, a line for each rule.

    Every marker is a threshold. The published one of a rule is filled; the one chosen on the `fit` documents at a price
    is ringed and has its 95 % interval. The oracle takes each token's best exit; the grey line runs every token with
    the same number of loops, and leaves the axes where that is worse than any rule.

    Args:
        diagnosis: With the group `exit_rules`.
        price: Nats per token that an extra loop must bring.
        ax: Where to draw; a new figure when None.

    Raises:
        DiagnosisError: Exit rules were not measured.
    """
    found = exit_trade_off(diagnosis, price)
    about = diagnosis.provenance
    with single(ax) as ax:
        ax.set(xlabel="loops that a token takes (mean)", ylabel="NLL above that of the last loop\n(nats per token)")
        always: Style = {"color": GREY, "marker": "s", "linestyle": ":"}
        ax.plot(found.always.loop, found.always.mean, label="all tokens alike", **always)
        ax.fill_between(found.always.loop, found.always.low, found.always.high, color=GREY, alpha=0.15, linewidth=0)
        colours = seaborn.color_palette("colorblind", len(found.rules))
        for rule, colour, marker in zip(found.rules, colours, MARKERS[: len(found.rules)], strict=True):
            look: Style = {"color": colour, "marker": marker, "markerfacecolor": "white"}
            ax.plot(rule.loops.mean, rule.excess.mean, label=rule.name, linewidth=0.9, **look)
            if rule.usual is not None:
                ax.plot(rule.loops.mean[rule.usual], rule.excess.mean[rule.usual], color=colour, marker=marker)
            at, value = rule.loops.mean[rule.chosen], rule.excess.mean[rule.chosen]
            ax.vlines(at, rule.excess.low[rule.chosen], rule.excess.high[rule.chosen], color=colour, linewidth=0.9)
            ax.plot(at, value, label="_", **RING, color=colour)
        ax.plot(found.oracle.loops.mean, found.oracle.excess.mean, "*", color=BLACK, markersize=8, label="oracle")
        # Loop 1 may be far worse than any rule: the line of all tokens alike leaves the axes for it.
        shown = np.concatenate([rule.excess.mean for rule in (*found.rules, found.oracle)])
        margin = 0.1 * max(np.ptp(shown), 1e-3)
        ax.set_ylim(shown.min() - margin, shown.max() + margin)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        handles = [
            *ax.get_legend_handles_labels()[0],
            Line2D([], [], linestyle="none", marker="o", color=GREY, label="published"),
            Line2D([], [], linestyle="none", label="chosen", color=GREY, **RING),
        ]
        legend(ax, handles, title=short(about["model"]))
        beyond = [f"Trained with {about['trained_loops']} loops."] if found.always.beyond.any() else []
        note(ax, intervals(about["documents"]), f"Chosen on the fit documents, at the price {price:g}.", *beyond)
    return ax
