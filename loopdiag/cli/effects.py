"""What `loopdiag intervene` says: the JSON and the table."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from loopdiag.cli.output import cell, stdout

if TYPE_CHECKING:
    from loopdiag.interventions import Effects

LAWS = (
    "Loops share their weights: a run with one skipped is a run of one loop fewer, whichever it is; with one repeated, "
    "of one more; swapping two changes nothing."
)


def effects_answer(effects: Effects, seed: int) -> dict[str, Any]:
    """Everything that is said, ready for JSON: undefined numbers are None."""
    from loopdiag.bootstrap import DRAWS
    from loopdiag.interventions import CAVEAT
    from loopdiag.interventions.effects import SCHEMA

    about = effects.provenance
    rows = [asdict(row) for row in effects.table(seed)]
    return {
        "schema": SCHEMA,
        **{key: about[key] for key in ("model", "trained_loops", "run_loops", "documents", "tokens")},
        "documents_not_finite": len(about.get("documents_not_finite", ())),
        "nll": _number(float(effects.data["nll"].mean())),
        "caveat": CAVEAT,
        "bootstrap": {"seed": seed, "draws": DRAWS},
        "absent": about["absent"],
        "interventions": [
            {key: _number(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows
        ],
        "provenance": about,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def print_effects(told: dict[str, Any]) -> None:
    """The effect of each intervention, and what it does not show, on stdout."""
    from loopdiag.interventions.effects import FEWEST_SOURCES

    nll = "undefined" if told["nll"] is None else f"{told['nll']:.3f}"
    table = Table(
        title=f"{escape(told['model'])}: trained with {told['trained_loops']}, run with {told['run_loops']} loops"
        + (", beyond its training" if told["run_loops"] > told["trained_loops"] else ""),
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title_justify="left",
    )
    table.add_column("intervention", no_wrap=True)
    for heading in ("loop", "change of the NLL [95 %]", "helped", "harmed"):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for row in told["interventions"]:
        where = row["loop"] or ("any" if row["group"] == "loops" else "all")
        table.add_row(
            escape(row["change"]) if row["loop"] is None else "",
            str(where),
            f"{cell(row['effect'])} [{cell(row['low'])}, {cell(row['high'])}]",
            cell(row["helped"]),
            cell(row["harmed"]),
        )
    stdout.print(table)
    lost = f"; {told['documents_not_finite']} more gave no finite numbers" if told["documents_not_finite"] else ""
    about, groups = told["provenance"], {row["group"] for row in told["interventions"]}
    lines = [
        f"{told['documents']} documents, {told['tokens']:,} predicted tokens of corpus {about['corpus']} (the half "
        f"that a diagnosis reports on{lost}); NLL untouched {nll}. Nats per token; above 0 is worse. Helped and "
        "harmed: taken off some tokens, added to others. Intervals are over documents; they leave out the training "
        "seed."
    ]
    if about["sources"] < FEWEST_SOURCES:
        lines.append(
            f"The documents come from {about['sources']} source{'s' * (about['sources'] > 1)}: with fewer than "
            f"{FEWEST_SOURCES}, the intervals say little and come out too small."
        )
    if "carry" in groups:
        lines.append("The document mean of the carries is over later tokens, too.")
    if "loops" in groups:
        lines.append(LAWS)
    for line in (*lines, told["caveat"]):
        stdout.print(line, markup=False, highlight=False)
