"""What each loop brings while a model trains: of the looks that a `LoopMonitor` logged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loopdiag.files import write_all
from loopdiag.plots.files import METADATA, REPRODUCIBLE, rendered
from loopdiag.plots.nats import SMALL
from loopdiag.plots.panels import MARKERS
from loopdiag.plots.parts import COLUMN, GREY, PAPER, PLAIN, legend, message, note, single

_GAIN = re.compile(r"loop_(\d+)/gain")


def emergence(
    history: Sequence[Mapping[str, Any]] | Any,
    *,
    tokens_per_update: int | None = None,
    price: float = SMALL,
    ax: Axes | None = None,
) -> Axes:
    """Net gain of loops 2..R in nats per token against training: when does each loop start to pay?

    A loop pays from the first look at which its net gain is above the price and stays so to the last. The y axis is
    logarithmic to both sides and linear around zero. Loop 1, which starts from the embedding, is off this scale. There
    are no intervals: a look is a mean over a few documents of one training run.

    Args:
        history: `trainer.state.log_history`, or a table of it (whatever has `to_dict("records")`, as pandas' has).
            Entries without `loop_2/gain` and so on are passed over.
        tokens_per_update: Training tokens of an update; updates are along the x axis when None.
        price: Nats per token that a loop must bring to pay.
        ax: Where to draw; a new figure when None.

    Raises:
        ValueError: Two looks at one update, as where two runs are in one history.
    """
    nets = net_gains(history)
    with single(ax) as ax:
        ax.set(xlabel="updates" if tokens_per_update is None else "million training tokens")
        ax.set_ylabel("net gain of the loop (nats per token)")
        extra = sorted(loop for loop in nets if loop >= 2)
        if not extra:
            message(ax, "no look at a loop beyond the first")
            return ax
        linear = max(SMALL, price)
        ax.set_yscale("symlog", linthresh=linear)
        ax.yaxis.set_major_formatter(PLAIN)
        scale = 1.0 if tokens_per_update is None else tokens_per_update / 1e6
        starts = pays_from(history, price)
        ax.axhline(price, color=GREY, linewidth=0.8, linestyle=":")
        said = []
        for loop, colour in zip(extra, seaborn.color_palette("colorblind", len(extra)), strict=True):
            marker, (update, net) = MARKERS[loop % len(MARKERS)], nets[loop]
            start = starts[loop]
            pays = np.zeros(len(update), bool) if start is None else update >= start
            (drawn,) = ax.plot(scale * update, net, color=colour, marker=marker, label=f"loop {loop}")
            # Hollow as long as the loop does not pay.
            drawn.set_markevery(np.flatnonzero(pays).tolist())
            ax.plot(scale * update[~pays], net[~pays], marker, color=colour, markerfacecolor="white", label="_")
            when = f"{start} updates" if tokens_per_update is None else f"{scale * (start or 0):.2f}M tokens"
            said.append(f"loop {loop} {'never' if start is None else f'at {when}'}")
        legend(ax, columns=3)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        told = f"Net gain above the price of {price:g} for good (filled): {', '.join(said)}."
        note(ax, told, f"One run, no intervals. Axis linear within ±{linear:g}.")
    return ax


def net_gains(history: Sequence[Mapping[str, Any]] | Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By loop, the updates at which was looked, ascending, and the net gain, gain - cost, in nats per token.

    Raises:
        ValueError: Two looks at one update, as where two runs are in one history.
    """
    entries = history.to_dict("records") if hasattr(history, "to_dict") else history
    found: dict[int, dict[int, float]] = {}
    for entry in entries:
        for name in entry:
            told = _GAIN.fullmatch(name)
            if told is None:
                continue
            loop, update = int(told[1]), int(entry["step"])
            net = entry[name] - entry[f"loop_{loop}/cost"]
            if np.isnan(net):  # a table has every column in every row
                continue
            if update in found.setdefault(loop, {}):
                raise ValueError(f"The history has two looks at update {update}: give that of one run.")
            found[loop][update] = net
    return {loop: (np.array(sorted(nets)), np.array([nets[at] for at in sorted(nets)])) for loop, nets in found.items()}


def pays_from(history: Sequence[Mapping[str, Any]] | Any, price: float = SMALL) -> dict[int, int | None]:
    """By loop, the update of the first look at which its net gain is above the price and stays so; None where none is.

    Raises:
        ValueError: Two looks at one update, as where two runs are in one history.
    """
    starts: dict[int, int | None] = {}
    for loop, (update, net) in net_gains(history).items():
        below = np.flatnonzero(net <= price)
        first = below[-1] + 1 if len(below) else 0
        starts[loop] = int(update[first]) if first < len(update) else None
    return starts


def draw_emergence(saved: str | os.PathLike[str], folder: str | os.PathLike[str]) -> list[Path]:
    """Write `emergence.png` and `.svg` into a folder, from the looks that `loopdiag.sweep.family --looks` saved."""
    told = json.loads(Path(saved).read_text())
    with matplotlib.rc_context(PAPER | REPRODUCIBLE):
        figure = Figure(COLUMN, layout="constrained")
        emergence(told["log"], tokens_per_update=told["tokens_per_update"], ax=figure.subplots())
        return write_all(Path(folder), {f"emergence.{form}": rendered(figure, form) for form in METADATA})
