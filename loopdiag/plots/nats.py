"""Figures in nats per token: what each loop gives and takes, and how well each exit can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import SymmetricalLogLocator

from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import GainCost
from loopdiag.plots.parts import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PLAIN,
    Style,
    intervals,
    legend,
    line,
    loop_axis,
    message,
    note,
    short,
    single,
)
from loopdiag.summary import ByLoop, Estimate, by_loop

SMALL = 0.01  # nats per token: what counts as small where no price says it


def gain_cost(
    curve: GainCost,
    *,
    price: float | None = None,
    recommended: int | None = None,
    ax: Axes | None = None,
    **line_kw: Any,
) -> Axes:
    """Gain, cost and net gain of loops 2..R in nats per token, with 95 % bands over documents.

    Gains fall by orders of magnitude from loop to loop, and a net gain may be negative: so the y axis is logarithmic to
    both sides and linear around zero, where gains are too small to matter at the price. Loop 1, which starts from the
    embedding, is off this scale: its numbers stand below the axes.

    Args:
        curve: What to draw.
        price: Nats per token that an extra loop must bring: a horizontal line.
        recommended: A loop count to mark.
        ax: Where to draw; a new figure when None.
        line_kw: For the three lines, as in `Axes.plot`.
    """
    with single(ax) as ax:
        ax.set_ylabel("gain and cost (nats per token)")
        notes = [f"Loop 1, from the embedding: {_first(curve)} nats per token."]
        if recommended == 1:
            notes.append("Recommended: 1 loop.")
        extra = curve.loop >= 2
        if not extra.any():
            loop_axis(ax, curve.loop, curve.trained_loops)
            ax.set_yticks([])
            message(ax, "one loop: no extra loop to judge")
            legend(ax, title=short(curve.model))
            note(ax, intervals(curve.documents), *notes)
            return ax
        loop_axis(ax, curve.loop[extra], curve.trained_loops)
        linear = _signed_log_axis(ax, [_of(each, extra) for each in (curve.gain, curve.cost, curve.net)], price)
        lines: tuple[tuple[str, Estimate, Style], ...] = (
            ("gain", curve.gain, {"color": BLUE, "marker": "o"}),
            ("cost", curve.cost, {"color": ORANGE, "marker": "s", "linestyle": "--"}),
            ("net gain", curve.net, {"color": BLACK, "marker": "D"}),
        )
        for label, estimate, style in lines:
            of = _of(estimate, extra)
            loops = curve.loop[extra]
            drawn = ByLoop(of.mean, of.low, of.high, loops, loops > curve.trained_loops, np.zeros(len(loops), bool))
            line(ax, drawn, **{"label": label, **style, **line_kw})
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        if price is not None:
            ax.axhline(price, color=GREY, linestyle=":", label=f"price {price:g}")
        if recommended is not None and recommended > 1:
            ax.axvline(recommended, color=GREY, linewidth=0.8, zorder=1, label=f"recommended: {recommended} loops")
        legend(ax, title=short(curve.model))
        note(ax, intervals(curve.documents), *notes, f"Axis linear within ±{linear:g}.")
    return ax


def _first(curve: GainCost) -> str:
    """The numbers of loop 1."""
    shown = (("gain", curve.gain), ("cost", curve.cost), ("exit NLL", curve.nll_exit))
    return ", ".join(f"{label}\u00a0{_number(estimate, 0)}" for label, estimate in shown)


def _of(estimate: Estimate, loops: np.ndarray) -> Estimate:
    return Estimate(estimate.mean[loops], estimate.low[loops], estimate.high[loops])


def _number(estimate: Estimate, index: int) -> str:
    number = f"{estimate.mean[index]:.2f} [{estimate.low[index]:.2f}, {estimate.high[index]:.2f}]"
    return number.replace(" ", "\u00a0")  # An interval does not break over lines.


def _signed_log_axis(ax: Axes, estimates: Sequence[Estimate], price: float | None) -> float:
    """A y axis logarithmic to both sides; returns the power of ten within which it is linear."""
    largest = max(np.abs(estimate.mean).max() for estimate in estimates)
    linear = 10.0 ** math.floor(math.log10(min(price or SMALL, largest or SMALL)))
    ax.set_yscale("symlog", linthresh=linear)
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=range(2, 10)))
    return linear


def readability(diagnosis: Diagnosis, *, ax: Axes | None = None) -> Axes:
    """NLL of each exit as it is and through the exit's fitted translator, with 95 % bands over documents.

    Where the translator is better, the exit holds the right content in a basis that the head cannot read. What the
    offset withholds stands below the axes, as the span of its intervals over the loops.

    Raises:
        DiagnosisError: The diagnosis holds no `nll_usable`.
    """
    diagnosis.require("nll_exit", "nll_usable")
    about = diagnosis.provenance
    with single(ax) as ax:
        loop_axis(ax, diagnosis.loops, about["trained_loops"])
        ax.set_ylabel("exit NLL (nats per token)")
        line(ax, by_loop(diagnosis, "nll_exit"), color=BLUE, marker="o", label="as it is")
        usable: Style = {"color": ORANGE, "marker": "s", "linestyle": "--", "label": "usable (translator)"}
        line(ax, by_loop(diagnosis, "nll_usable"), **usable)
        legend(ax, title=short(about["model"]))
        withheld = by_loop(diagnosis, "withheld")
        loops = withheld.loop
        notes = ["They hold the spread between documents, which all loops share."]
        if len(loops):
            where = f"loops {loops[0]} to {loops[-1]}" if len(loops) > 1 else f"loop {loops[0]}"
            span = f"{withheld.low.min():.2f} to {withheld.high.max():.2f}"
            notes.append(f"The offset withholds {span} nats per token from {where} (95 %).")
        note(ax, intervals(about["documents"]), *notes)
    return ax
