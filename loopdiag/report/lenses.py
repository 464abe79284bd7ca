"""Every measure by loop, beside what tells whether its number means anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loopdiag import html
from loopdiag.diagnosis import Diagnosis
from loopdiag.measures.definitions import DEFINITIONS, GROUPS, is_by_loop
from loopdiag.summary import ByLoop, Estimate, by_loop, estimate


@dataclass(frozen=True)
class Lens:
    """A part of the page.

    Attributes:
        title: Its heading.
        says: What it is for, and how it misleads.
        groups: Of measures, whose numbers are tabled.
        figures: Of `plots.pictures`.
    """

    title: str
    says: str
    groups: tuple[str, ...]
    figures: tuple[str, ...]


LENSES = (
    Lens(
        "What each exit predicts",
        "Reading out after each loop. An output shift has no sign: whether it helps, gain and cost say.",
        ("prediction",),
        ("predictions", "shares"),
    ),
    Lens(
        "Readability",
        "A fitted translator reads what stands in another basis than the head's. What the offset withholds is not "
        "by itself a cost: the loop may recover it.",
        ("readouts",),
        ("readability",),
    ),
    Lens(
        "How the states move",
        "A minus sign is no oscillation: states that have nothing to do with each other turn back, too, often by about "
        "-0.5. Read the angle beside that of unrelated states.",
        ("motion", "fixed_point", "noise"),
        ("hidden_states",),
    ),
    Lens(
        "Offset",
        "How far the offset displaces what a loop is handed, beside the distance of any two tokens of a document.",
        ("offset",),
        ("shift_against_offset",),
    ),
    Lens(
        "Diversity and likeness",
        "Ranks grow with the tokens they are taken of: all are of the same number, and the rarefaction curve says "
        "whether they have levelled off. Likeness is debiased: unrelated states have 0.",
        ("diversity", "rarefaction", "pooled", "layers"),
        ("similarity", "rarefaction"),
    ),
    Lens(
        "Attention",
        "Of the map that the model really applies, and of each branch alone. Read a move of attention beside the "
        "output shift: it may change nothing.",
        ("attention", "attention_pairs", "heads"),
        ("attention", "gate", "heads"),
    ),
    Lens(
        "Leaving token by token",
        "What known exit rules save against what they lose, beside running every token alike and beside an oracle. "
        "Thresholds are chosen on documents that are not reported.",
        ("exit_rules",),
        ("exit_rules",),
    ),
    Lens(
        "Classes of tokens",
        "Where gain and cost fall: by the kind of the next token.",
        ("classes",),
        (),
    ),
)
# What a measure is read beside.
BESIDE = {
    "gain": "cost",
    "cost": "gain: near it, a loop only moves things",
    "confidence": "accuracy: a calibrated model has the same of both",
    "settled": "changed; it depends on the last loop",
    "breadth": "output_shift: how large it is",
    "output_shift": "gain and cost: it has no sign",
    "output_shift_reverse": "gain and cost: it has no sign",
    "output_shift_js": "gain and cost; at most 0.69",
    "nll_lens": "nll_exit: the difference is what the coda adds",
    "exit_probability": "nll_exit: whether the gate leaves where it pays",
    "nll_usable": "nll_exit: the difference stands in another basis",
    "withheld": "no cost: see above",
    "step_size": "relative_step and noise_step",
    "radial_share": "1 / width, what unrelated directions give",
    "acceleration": "relative_step: twice it is going back and forth, 0 steady motion",
    "cos_update": "cos_reference, unrelated states",
    "effective_rank": "effective_rank_centred and the number of tokens",
    "participation_ratio": "effective_rank_centred: it weighs small directions more",
    "fixed_point_gap": "noise_step",
    "fixed_point_gap_layers": "fixed_point_gap: no loop computes this map",
    "omega": "omega_random, any two tokens",
    "gate_mean": "0.5, the start of training",
    "attention_entropy": "attention_entropy_relative",
    "attention_kl": "output_shift: whether it moves the prediction",
    "head_rank": "the number of heads",
    **dict.fromkeys(GROUPS["pooled"], "no interval: documents are not drawn again"),
}
_MOTIONS = ("settling", "orbiting", "drifting")


@dataclass(frozen=True)
class Cell:
    """A number with its interval, as text; marked where it is beyond training or lost in rounding."""

    mean: str
    interval: str = ""
    beyond: bool = False
    in_noise: bool = False


@dataclass(frozen=True)
class Row:
    """A measure of one model at each loop; cells are None where it is not defined."""

    measure: str
    beside: str
    model: int
    cells: tuple[Cell | None, ...]

    @property
    def in_noise(self) -> bool:
        """Whether any of them is."""
        return any(cell is not None and cell.in_noise for cell in self.cells)


def number(value: float) -> str:
    """A measure of any size in four digits or so; a dash where it is undefined."""
    if not np.isfinite(value):
        return html.number(value)
    size = abs(value)
    if size and (size < 0.0005 or size >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.{3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0}f}"


def span(low: float, high: float, written: Callable[[float], str] = html.number) -> str:
    """The ends of an interval; empty where there is none."""
    return f"{written(low)} to {written(high)}" if np.isfinite(low) and np.isfinite(high) else ""


def every_loop(diagnoses: Sequence[Diagnosis]) -> list[int]:
    """Loops that any of the diagnoses has, from 1."""
    return sorted({int(loop) for diagnosis in diagnoses for loop in diagnosis.loops})


def rows(lens: Lens, diagnoses: Sequence[Diagnosis], seed: int) -> list[Row]:
    """The measures of a lens that have one number a loop: a row for each model that has it."""
    loops = every_loop(diagnoses)
    found = []
    for name in (name for group in lens.groups for name in GROUPS[group] if is_by_loop(name)):
        for index, diagnosis in enumerate(diagnoses):
            curve = by_loop(diagnosis, name, seed=seed)
            if len(curve.loop):
                at = {int(loop): _cell(curve, place) for place, loop in enumerate(curve.loop)}
                cells = tuple(at.get(loop) for loop in loops)
                found.append(Row(name, BESIDE.get(name, ""), index, cells))
    return found


def _cell(curve: ByLoop, place: int) -> Cell | None:
    if not np.isfinite(curve.mean[place]):
        return None
    ends = span(curve.low[place], curve.high[place], number)
    return Cell(number(curve.mean[place]), ends, bool(curve.beyond[place]), bool(curve.in_noise[place]))


@dataclass(frozen=True)
class ClassRow:
    """One class of tokens: its share, and gain and cost at each loop of the diagnosis."""

    name: str
    share: str
    cells: tuple[tuple[Cell, Cell], ...]


def class_rows(diagnosis: Diagnosis, seed: int) -> list[ClassRow]:
    """The classes that the documents have; none where they were not measured."""
    if "gain_by_class" not in diagnosis.data:
        return []
    data = diagnosis.data.sel(loop=diagnosis.loops)
    share = data["class_share"].mean("document").values
    gain, cost = (estimate(data[name], seed=seed) for name in ("gain_by_class", "cost_by_class"))

    def cell(of: Estimate, *place: int) -> Cell:
        return Cell(html.number(of.mean[place]), span(of.low[place], of.high[place]))

    return [
        ClassRow(
            str(name),
            f"{share[place]:.0%}",
            tuple((cell(gain, loop, place), cell(cost, loop, place)) for loop in range(len(diagnosis.loops))),
        )
        for place, name in enumerate(data["token_class"].values)
        if share[place] > 0
    ]


def motions(diagnosis: Diagnosis) -> str:
    """What the documents' states do at the run's end, in words; empty where that was not measured."""
    if "motion_label" not in diagnosis.data or bool(diagnosis.data["motion_label"].isnull().all()):
        return ""
    labels = diagnosis.data["motion_label"].dropna("document").values
    shares = [f"{said} in {float((labels == label).mean()):.0%}" for label, said in enumerate(_MOTIONS)]
    return f"At the run's end the states are {', '.join(shares)} of the documents."


def present(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """Measures that any of the diagnoses holds, in the order of their definitions."""
    return [name for name in DEFINITIONS if any(name in diagnosis.data for diagnosis in diagnoses)]
