"""Rules for leaving token by token: what they save against what they lose."""

from __future__ import annotations

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from loopdiag.diagnosis import Diagnosis
from loopdiag.plots.panels import MARKERS
from loopdiag.plots.parts import GREY, Style, intervals, legend, note, short, single
from loopdiag.summary import ExitRule, exit_trade_off

RING: Style = {"marker": "o", "markersize": 9, "markerfacecolor": "none"}


def exit_rules(diagnosis: Diagnosis, *, price: float = 0.01, ax: Axes | None = None) -> Axes:
    """NLL above that of the last loop against the mean loops that a token takes, a line for each rule.

    Every marker is a threshold. The published one of a rule is filled; the one chosen on the `fit` documents at a price
    is ringed and has its 95 % interval. The grey line runs every token with the same number of loops, and leaves the
    axes where that is worse than any rule. The oracle, which takes each token's best exit, is so far below all rules
    that it would flatten them: its numbers stand below the axes.

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
        # Loop 1 may be far worse than any rule: the line of all tokens alike leaves the axes for it.
        shown = np.concatenate([_shown(rule) for rule in found.rules])
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
        chosen = f"Chosen on the fit documents, at the price {price:g}."
        note(ax, _oracle(found.oracle), intervals(about["documents"]), chosen, *beyond)
    return ax


def _shown(rule: ExitRule) -> np.ndarray:
    """What of a rule must be on the y axis: its points, and the interval of the one chosen."""
    excess = rule.excess
    return np.append(excess.mean, (excess.low[rule.chosen], excess.high[rule.chosen]))


def _oracle(oracle: ExitRule) -> str:
    loops, nll, excess = (float(each.mean[0]) for each in (oracle.loops, oracle.nll, oracle.excess))
    return f"Oracle, not drawn: {loops:.2f} loops, {nll:.2f} nats, {abs(excess):.2f} below the last loop."
