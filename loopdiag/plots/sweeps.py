"""What matched models lose that differ in loop count, offset and memory: figures of a sweep."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation, Transform

from loopdiag.files import write_all
from loopdiag.gaincost import Decomposition, decompose
from loopdiag.gaincost.measured import LossCurve, OverTraining, loss_curves, over_training
from loopdiag.losses import SweepLosses
from loopdiag.plots.files import METADATA, REPRODUCIBLE, rendered
from loopdiag.plots.panels import canvas, styles
from loopdiag.plots.parts import (
    BLACK,
    BLUE,
    COLUMN,
    GREY,
    ORANGE,
    PAGE,
    PAPER,
    Style,
    figure_legend,
    legend,
    loop_axis,
    message,
    note,
    short,
    single,
)
from loopdiag.summary import Estimate

DODGE = 5.0  # points between lines that stand side by side
BESIDE = 3.0  # points from a mean to its seeds
TRAINED = "loops in training"
WIDEST_NOTE = 105  # characters, on a page
EARLY = 0.25  # of the budget: what differs there by nats would flatten all that follows


def measured_gain_cost(decomposition: Decomposition, *, price: float | None = None, ax: Axes | None = None) -> Axes:
    """Gain, rise of the tax and net of each loop count after the first, in nats per token, with 95 % intervals.

    Net is gain - rise of the tax, so where the black point is below the blue one, the offset takes more from this loop
    count than from the one before. The tax itself stands below the axes.

    Args:
        decomposition: What to draw.
        price: Nats per token that an extra loop must bring: a horizontal line.
        ax: Where to draw; a new figure when None.
    """
    parts = decomposition
    lines: tuple[tuple[str, Estimate, Style], ...] = (
        ("gain (no offset)", parts.gain, {"color": BLUE, "marker": "o"}),
        ("rise of the tax", parts.rise, {"color": ORANGE, "marker": "s", "linestyle": "--"}),
        ("net (with offset)", parts.net, {"color": BLACK, "marker": "D"}),
    )
    later = parts.loops[1:]
    with single(ax) as ax:
        loop_axis(ax, later if len(later) else parts.loops, None)
        ax.set(xlabel=TRAINED, ylabel="gain and tax (nats per token)")
        if any(np.isfinite(estimate.mean[1:]).any() for _, estimate, _ in lines):
            for (label, estimate, style), dodge in zip(lines, _dodges(len(lines)), strict=True):
                _points(ax, later, _after_first(estimate), dodge, label=label, **style)
            ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
            if price is not None:
                ax.axhline(price, color=GREY, linestyle=":", zorder=1, label=f"price {price:g}")
        else:
            ax.set_yticks([])
            message(ax, "no two loop counts to compare" if len(later) else "one loop count: no other to compare")
        legend(ax, title=f"memory {parts.memory}")
        note(
            ax,
            _intervals(parts.over, parts.seeds),
            *_without_interval(parts.over, [estimate for _, estimate, _ in lines]),
            "Each count against the one before; net = gain - rise of the tax.",
            *_taxes(parts),
            *_absent(parts),
        )
    return ax


def _after_first(estimate: Estimate) -> Estimate:
    return Estimate(estimate.mean[1:], estimate.low[1:], estimate.high[1:])


def _taxes(parts: Decomposition) -> list[str]:
    """What the offset costs at each loop count beyond one, which has none."""
    told = [
        f"{parts.tax.mean[index]:.3f} [{parts.tax.low[index]:.3f}, {parts.tax.high[index]:.3f}] at {loops}"
        if np.isfinite(parts.tax.low[index])
        else f"{parts.tax.mean[index]:.3f} at {loops}"
        for index, loops in enumerate(parts.loops)
        if loops > 1 and np.isfinite(parts.tax.mean[index])
    ]
    if not told:
        return []
    # An interval does not break over lines.
    return ["Tax: " + ", ".join(each.replace(" ", "\u00a0") for each in told) + "\u00a0loops."]


def _absent(parts: Decomposition) -> list[str]:
    """Models that no seed has yet."""
    told = [
        f"{loops} loops {name} offset"
        for name, loss in (("with", parts.loss_on), ("without", parts.loss_off))
        for loops in parts.loops[np.isnan(loss.mean)]
    ]
    return [f"Not trained yet: {', '.join(told)}."] if told else []


def trained_losses(losses: SweepLosses, *, memory: str | None = None, seed: int = 0, ax: Axes | None = None) -> Axes:
    """Held-out loss of each loop count, a line for each offset and memory: means of the seeds with 95 % intervals.

    Each training is a faint point. Lines stand side by side at the loop count that they are of.

    Args:
        losses: A sweep.
        memory: Only models of this one; of all, told apart by line styles, when None.
        seed: Of the bootstrap over documents.
        ax: Where to draw; a new figure when None.

    Raises:
        SweepError: The sweep has no such memory.
    """
    curves = loss_curves(losses, memory, seed=seed)
    memories = list(dict.fromkeys(curve.memory for curve in curves))
    about = losses.provenance
    with single(ax) as ax:
        loop_axis(ax, curves[0].loops, None)
        ax.set(xlabel=TRAINED, ylabel="held-out loss (nats per token)")
        for curve, dodge in zip(curves, _dodges(len(curves), DODGE + BESIDE), strict=True):
            name = _offset(curve.offset) + (f", memory {curve.memory}" if len(memories) > 1 else "")
            style = _look(curve, memories)
            _points(ax, curve.loops, curve.nll, dodge, label=name, **style)
            if len(curve.by_seed) > 1:
                faint: Style = {"linestyle": "none", "markersize": 2.5, "markeredgewidth": 0, "alpha": 0.6}
                at = _beside(ax, dodge + BESIDE)
                for one in curve.by_seed:
                    _reach(ax, curve.loops, one)
                    ax.plot(curve.loops, one, label="_", transform=at, **style | faint)
        if not any(np.isfinite(curve.nll.mean).any() for curve in curves):
            message(ax, "no model is trained yet")
        legend(ax, title=short(about["data"]), columns=2 if len(memories) == 1 else 1)
        over, seeds = curves[0].over, len(curves[0].by_seed)
        shared = ["They hold the spread between documents, which all models share."] if over == "documents" else []
        note(
            ax,
            _intervals(over, seeds),
            *_without_interval(over, [curve.nll for curve in curves]),
            *shared,
            *(["Faint: each seed."] if seeds > 1 else []),
            *_unfinished(losses, memory),
            f"{about['recipe']['tokens'] / 1e6:.3g}M training tokens each.",
        )
    return ax


def _look(curve: LossCurve, memories: Sequence[str]) -> Style:
    """Colours tell offsets apart, line styles memories, markers both."""
    second = memories.index(curve.memory) > 0
    colour, marker = (ORANGE, "s^"[second]) if curve.offset == 0 else (BLUE, "oD"[second])
    return {"color": colour, "marker": marker, "linestyle": "--" if second else "-"}


def losses_over_training(
    losses: SweepLosses, *, memory: str | None = None, seed: int = 0, figure: FigureBase | None = None
) -> np.ndarray:
    """Loss of each loop count above that of the smallest while training, by offset, and what the offset costs.

    The lowest line is the best loop count at so many tokens; 0 is the smallest. Intervals are 95 % bands.

    Args:
        losses: A sweep.
        memory: Of several in the sweep, which; the first when None.
        seed: Of the bootstrap over documents.
        figure: Where to draw, with a constrained layout; a new one when None.

    Returns:
        Axes for each offset and, where the sweep has two, one more for the tax.

    Raises:
        SweepError: The sweep has no such memory.
    """
    found = over_training(losses, memory, seed=seed)
    fewest = found.loops[0]
    looks = dict(zip(found.loops.tolist(), styles(len(found.loops)), strict=True))
    reference = "one loop's" if fewest == 1 else f"that of {fewest} loops"
    columns = len(found.above) + (found.tax is not None)
    with canvas(figure, 1) as figure:
        axes = np.atleast_1d(figure.subplots(1, columns))
        for ax, (offset, estimate) in zip(axes, found.above.items(), strict=False):
            _over_tokens(ax, found, estimate, looks, found.loops > fewest, "one loop count")
            ax.set(title=_offset(offset), ylabel=f"loss above {reference}\n(nats per token)")
        _limit(axes[: len(found.above)], found, found.above.values(), found.loops > fewest)
        if found.tax is not None:
            _over_tokens(axes[-1], found, found.tax, looks, found.loops > 1, "no tax to tell")
            axes[-1].set(title="tax: offset on - off", ylabel="tax (nats per token)")
            _limit(axes[-1:], found, [found.tax], found.loops > 1)
        handles: list[Artist] = [
            Line2D([], [], label=f"{loops} loop{'s' if loops > 1 else ''}", **look)
            for loops, look in looks.items()
            if loops > 1 or fewest > 1
        ]
        title = f"Trained on {short(losses.provenance['data'])}, memory {found.memory}."
        figure_legend(figure, handles, title) if handles else None
        told = (
            _intervals(found.over, found.seeds),
            *_unfinished(losses, found.memory),
            "One schedule that anneals to the full budget: an earlier look is not what a shorter training would give.",
            "The first quarter may leave the axes.",
        )
        text = textwrap.fill(" ".join(told), WIDEST_NOTE, break_on_hyphens=False)
        figure.supxlabel(text, color=GREY, fontsize=matplotlib.rcParams["font.size"])
    return axes


def _over_tokens(
    ax: Axes, found: OverTraining, estimate: Estimate, looks: dict[int, Style], shown: np.ndarray, why_empty: str
) -> None:
    """A line with a band for each loop count that is shown."""
    tokens = found.tokens / 1e6
    ax.set_xlabel("million training tokens")
    for index, loops in enumerate(found.loops.tolist()):
        if shown[index] and np.isfinite(estimate.mean[:, index]).any():
            look = looks[loops]
            ax.plot(tokens, estimate.mean[:, index], label=f"{loops} loops", **look)
            low, high = estimate.low[:, index], estimate.high[:, index]
            ax.fill_between(tokens, low, high, color=look["color"], alpha=0.2, linewidth=0)
    if ax.lines:
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
    else:
        ax.set(xticks=[], yticks=[])
        message(ax, why_empty)


def _limit(axes: Iterable[Axes], found: OverTraining, estimates: Iterable[Estimate], shown: np.ndarray) -> None:
    """One range of y for axes, which holds zero and all lines and bands but for the early looks."""
    late = found.tokens >= EARLY * found.tokens[-1]
    ends = [end[late][:, shown].ravel() for each in estimates for end in (each.mean, each.low, each.high)]
    values = np.concatenate([[0.0], *ends])
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.08 * (high - low) or 0.01
    for ax in axes:
        ax.set_ylim(low - margin, high + margin)


def _offset(offset: int) -> str:
    return {0: "offset off", 1: "offset on"}.get(offset, f"offset {offset}")


def _dodges(count: int, apart: float = DODGE) -> np.ndarray:
    """How far each of several lines stands beside its loop counts, in points."""
    return apart * (np.arange(count) - (count - 1) / 2)


def _beside(ax: Axes, points: float) -> Transform:
    """In the transform, not in the data: these stay the loop counts that were trained."""
    return ax.transData + ScaledTranslation(points / 72, 0, ax.figure.dpi_scale_trans)


def _points(ax: Axes, loops: np.ndarray, estimate: Estimate, dodge: float, **style: Any) -> None:
    """Means as a line with markers and intervals as bars: each model is a training of its own, with none between."""
    at: Style = {"transform": _beside(ax, dodge)}
    ax.plot(loops, estimate.mean, **style, **at)
    for values in (estimate.mean, estimate.low, estimate.high):
        _reach(ax, loops, values)
    known = np.isfinite(estimate.low)
    if known.any():
        ax.vlines(loops[known], estimate.low[known], estimate.high[known], color=style["color"], linewidth=0.9, **at)


def _reach(ax: Axes, loops: np.ndarray, values: np.ndarray) -> None:
    """Let the axes reach what is drawn beside its place, of which matplotlib does not see how far it goes."""
    there = np.isfinite(values)
    ax.update_datalim(np.column_stack([loops[there], values[there]]), updatex=False)
    ax.autoscale_view(scalex=False)


def _intervals(over: str, seeds: int) -> str:
    """What intervals are over, and what they leave out."""
    if over == "seeds":
        return f"Intervals: 95 % t over {seeds} seeds, on these documents."
    trainings = "one seed" if seeds == 1 else f"the mean of {seeds} seeds"
    return f"Intervals: 95 % over documents, of {trainings}; they leave out what another training would give."


def _without_interval(over: str, estimates: Sequence[Estimate]) -> list[str]:
    """Why points have none, if any do."""
    alone = any((np.isfinite(each.mean) & np.isnan(each.low)).any() for each in estimates)
    return [f"No interval: fewer than {'two seeds' if over == 'seeds' else 'two sources'} there."] if alone else []


def _unfinished(losses: SweepLosses, memory: str | None) -> list[str]:
    nll = losses.data["nll"] if memory is None else losses.data["nll"].sel(memory=memory)
    return ["Some models are not trained yet."] if bool(nll.isnull().any()) else []


def left_out_of_sweep(losses: SweepLosses) -> dict[str, str]:
    """Figures that a sweep does not allow, each with the reason and what would bring it."""
    if losses.data.sizes["loops"] < 2:
        return dict.fromkeys(("measured_gain_cost", "losses_over_training"), "it needs models of two loop counts")
    if losses.data.sizes["offset"] < 2:
        return {"measured_gain_cost": "it needs models with the offset and without: sweep with --offset on,off"}
    return {}


def draw_sweep(
    losses: SweepLosses, folder: str | os.PathLike[str], *, price: float | None = None, seed: int = 0
) -> list[Path]:
    """Write `pictures_of_sweep` into a folder; files of these names are replaced.

    Nothing is written unless all figures can be drawn, and each file is written whole or not at all.

    Args:
        losses: A sweep.
        folder: Made if needed.
        price: Nats per token that an extra loop must bring, to draw a line there.
        seed: Of the bootstrap over documents.

    Returns:
        The files.
    """
    return write_all(Path(folder), pictures_of_sweep(losses, price=price, seed=seed))


def pictures_of_sweep(
    losses: SweepLosses, *, price: float | None = None, seed: int = 0, forms: Sequence[str] = tuple(METADATA)
) -> dict[str, bytes]:
    """Every figure that a sweep allows, by file name; what is not trained yet is left out of each.

    Args:
        losses: A sweep.
        price: Nats per token that an extra loop must bring, to draw a line there.
        seed: Of the bootstrap over documents.
        forms: `png`, `svg` or both.
    """
    memories = [str(name) for name in losses.data["memory"].values]
    missing = left_out_of_sweep(losses)
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(PAPER | REPRODUCIBLE):
        if "measured_gain_cost" not in missing:
            figure = figures["measured_gain_cost"] = _new(COLUMN[0] * len(memories), 3.6)
            parts = figure.subfigures(1, len(memories), squeeze=False).ravel()
            for part, memory in zip(parts, memories, strict=True):
                measured_gain_cost(decompose(losses, memory, seed=seed), price=price, ax=part.subplots())
        figure = figures["trained_losses"] = _new(COLUMN[0], 3.6)
        trained_losses(losses, seed=seed, ax=figure.subplots())
        if "losses_over_training" not in missing:
            figure = figures["losses_over_training"] = _new(PAGE[0], 3.0 * len(memories))
            parts = figure.subfigures(len(memories), 1, squeeze=False).ravel()
            for part, memory in zip(parts, memories, strict=True):
                losses_over_training(losses, memory=memory, seed=seed, figure=part)
        return {f"{name}.{form}": rendered(figure, form) for name, figure in figures.items() for form in forms}


def _new(width: float, height: float) -> Figure:
    return Figure((width, height), layout="constrained")  # not through pyplot, which would keep it
