"""Figures in nats per token: what each loop gives and takes, and how well each exit can be read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import SymmetricalLogLocator

from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import Estimate, GainCost
from loopdiag.plots.parts import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PLAIN,
    Style,
    band,
    intervals,
    legend,
    line,
    loop_axis,
    message,
    note,
    short,
    single,
)

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
        first = ", ".join(
            f"{label}\u00a0{_number(estimate, 0)}"
            for label, estimate in (("gain", curve.gain), ("cost", curve.cost), ("exit NLL", curve.nll_exit))
        )
        notes = [f"Loop 1, from the embedding: {first} nats per token."]
        if recommended == 1:
            notes.append("Recommended: 1 loop.")
        if len(curve.loop) == 1:
            loop_axis(ax, 1, 1, curve.trained_loops)
            ax.set_yticks([])
            message(ax, "one loop: no extra loop to judge")
            note(ax, intervals(curve.documents), *notes)
            return ax
        loop_axis(ax, 2, int(curve.loop[-1]), curve.trained_loops)
        linear = _signed_log_axis(ax, curve, price)
        lines: tuple[tuple[str, Estimate, Style], ...] = (
            ("gain", curve.gain, {"color": BLUE, "marker": "o"}),
            ("cost", curve.cost, {"color": ORANGE, "marker": "s", "linestyle": "--"}),
            ("net gain", curve.net, {"color": BLACK, "marker": "D"}),
        )
        for label, estimate, style in lines:
            extra = Estimate(estimate.mean[1:], estimate.low[1:], estimate.high[1:])
            line(ax, curve.loop[1:], extra, **{"label": label, **style, **line_kw})
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        if price is not None:
            ax.axhline(price, color=GREY, linestyle=":", label=f"price {price:g}")
        if recommended is not None and recommended > 1:
            ax.axvline(recommended, color=GREY, linewidth=0.8, zorder=1, label=f"recommended: {recommended} loops")
        legend(ax, title=short(curve.model))
        note(ax, intervals(curve.documents), *notes, f"Axis linear within ±{linear:g}.")
    return ax


def _number(estimate: Estimate, index: int) -> str:
    number = f"{estimate.mean[index]:.2f} [{estimate.low[index]:.2f}, {estimate.high[index]:.2f}]"
    return number.replace(" ", "\u00a0")  # An interval does not break over lines.


def _signed_log_axis(ax: Axes, curve: GainCost, price: float | None) -> float:
    """A y axis logarithmic to both sides; returns the power of ten within which it is linear."""
    largest = max(np.abs(estimate.mean[1:]).max() for estimate in (curve.gain, curve.cost, curve.net))
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
        ValueError: The diagnosis holds no `nll_usable`.
    """
    if "nll_usable" not in diagnosis.data:
        raise ValueError("The diagnosis holds no nll_usable, which needs readouts: diagnose with readouts=True.")
    about = diagnosis.provenance
    with single(ax) as ax:
        loop_axis(ax, 1, int(diagnosis.loops[-1]), about["trained_loops"])
        ax.set_ylabel("exit NLL (nats per token)")
        line(ax, *band(diagnosis, "nll_exit"), color=BLUE, marker="o", label="as it is")
        usable: Style = {"color": ORANGE, "marker": "s", "linestyle": "--", "label": "usable (translator)"}
        line(ax, *band(diagnosis, "nll_usable"), **usable)
        legend(ax, title=short(about["model"]))
        loops, withheld = band(diagnosis, "withheld")
        notes = ["They hold the spread between documents, which all loops share."]
        if len(loops):
            where = f"loops {loops[0]} to {loops[-1]}" if len(loops) > 1 else f"loop {loops[0]}"
            span = f"{withheld.low.min():.2f} to {withheld.high.max():.2f}"
            notes.append(f"The offset withholds {span} nats per token from {where} (95 %).")
        note(ax, intervals(about["documents"]), *notes)
    return ax
