"""`loopdiag probe`: what linear probes read from the states of each loop."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from loopdiag.cli.options import (
    BUNDLED_DATA,
    DEFAULT_MODEL,
    SUITES,
    BatchOption,
    DataOption,
    Device,
    DeviceOption,
    DocumentsOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LoopsOption,
    OfflineOption,
    OnlyModelArgument,
    QuietOption,
    RevisionOption,
    TokensOption,
    in_range,
)
from loopdiag.cli.output import between, cell, check_outputs, json_file, reported_errors, stdout, tell
from loopdiag.cli.runs import Checkpoint, Run
from loopdiag.errors import InputError

if TYPE_CHECKING:
    from loopdiag.scores import ProbeScores

MEANING = {
    "accuracy": "Loop 0: the embedding. Change: from the loop before. Control: labels drawn at random for "
    "each token of the vocabulary; select.: accuracy less control. Floor: random weights.",
    "information": "Nats by which a state of the loop tells of the state that the loop before handed on, and of how "
    "many, which the embeddings leave open. Control: states of other places. Random: random weights, whose states "
    "have clusters of their own.",
}
# Columns, and what of a row stands in them.
ACCURACY = {
    "accuracy [95 %]": "score",
    "change [95 %]": "change",
    "control": "control",
    "select.": "selectivity",
    "floor": "floor",
}
INFORMATION = {
    "nats [95 %]": "score",
    "of": "baseline_nll",
    "control": "control",
    "above it": "selectivity",
    "random": "floor",
    "of ": "floor_baseline_nll",
}


def probe(
    suite: Annotated[str, typer.Argument(help=f"What to read: {', '.join(SUITES)}.")],
    model: OnlyModelArgument = DEFAULT_MODEL,
    data: DataOption = BUNDLED_DATA,
    documents: DocumentsOption = None,
    max_tokens: TokensOption = None,
    loops: LoopsOption = None,
    hook: Annotated[
        list[str] | None,
        typer.Option("--hook", help="Where to read, such as hook_carry or blocks.0.attn.hook_z; may be repeated."),
    ] = None,
    places: Annotated[int, typer.Option("--places", help="Places of a document that are probed, at most.")] = 32,
    classes: Annotated[int, typer.Option("--classes", help="Labels, the most frequent ones.")] = 64,
    batch_size: BatchOption = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn, and of the bootstrap.")] = 0,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    json: JsonOption = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Draw the figure, and write its table, into this folder.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Keep the scores in this file (netCDF).")] = None,
    quiet: QuietOption = False,
) -> None:
    """Read from the states of every loop, by linear probes, what they know: where they are, what is to come.

    Probes are fitted on one half of the documents and scored on the other.
    """
    with reported_errors():
        if suite not in SUITES:
            raise InputError(f"There is no suite {suite!r}: there are {', '.join(SUITES)}.")
        if Path(model).is_file():
            raise InputError(f"{model} is a file: give a model.")
        in_range("--places", places, 1)
        in_range("--classes", classes, 2)
        to_json = json_file(json, save, of="--json and --save")
        check_outputs(to_json, save, folder=figures, quiet=quiet)
        checkpoint = Checkpoint(model, revision, offline, device, dtype)
        run = Run(checkpoint, data, documents, max_tokens, loops, batch_size, seed, quiet)
        scores = run.probed(suite, hook, places, classes)
        told = scores_answer(scores, seed)
        if save:
            scores.save(save)
        if figures:
            draw(scores, figures, seed)
        tell(told, json, partial(print_scores, told))


def draw(scores: ProbeScores, folder: Path, seed: int) -> None:
    """The figure and its table as files named for suite and model."""
    from loopdiag import plots, report
    from loopdiag.files import write_all

    about = scores.provenance
    name = f"{about['suite']}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(about['model']).name)}"
    contents = {**plots.pictures_of_probes(scores, seed=seed), "csv": report.probe_table(scores, seed)}
    write_all(folder, {f"{name}.{form}": content for form, content in contents.items()})


def scores_answer(scores: ProbeScores, seed: int) -> dict[str, Any]:
    """Everything that is said, ready for JSON: undefined numbers are None."""
    from loopdiag.bootstrap import DRAWS
    from loopdiag.scores import SCHEMA

    about = scores.provenance
    rows = [asdict(row) for row in scores.table(seed)]
    return {
        "schema": SCHEMA,
        **{key: about[key] for key in ("suite", "unit", "model", "trained_loops", "run_loops", "documents", "targets")},
        "bootstrap": {"seed": seed, "draws": DRAWS},
        "absent": about["absent"],
        "scores": [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for row in rows
        ],
        "provenance": about,
    }


def print_scores(told: dict[str, Any]) -> None:
    """A table for each target, and what its columns are, on stdout."""
    from loopdiag.scores import INTERVALS

    beyond = ", the loops with a star beyond training" if told["run_loops"] > told["trained_loops"] else ""
    title = f"{told['model']}: trained with {told['trained_loops']}, run with {told['run_loops']} loops{beyond}"
    stdout.print(title, markup=False, highlight=False, style="italic")
    for target in told["targets"]:
        rows = [row for row in told["scores"] if row["target"] == target["target"]]
        stdout.print(_table(target, rows, told["unit"]))
    about = told["provenance"]
    lines = [
        f"Fitted on {about['documents_fit']} documents of corpus {about['corpus']}, scored on {told['documents']} "
        f"others, at up to {about['places']} places of each. "
        f"{MEANING[told['unit']]} {INTERVALS}"
    ]
    if about["documents_unlabelled"]:
        lines.append(f"{about['documents_unlabelled']} documents have no labels and are left out.")
    if about["unconverged"]:
        lines.append(f"{about['unconverged']} fits of probes did not converge, and are scored as they are.")
    for line in lines:
        stdout.print(line, markup=False, highlight=False)


def _table(target: dict[str, Any], rows: list[dict[str, Any]], unit: str) -> Table:
    guess = f", most frequent {cell(rows[0]['baseline'])}" if unit == "accuracy" else ""
    covered = f", {target['coverage']:.0%} of the places" if target["coverage"] < 1 else ""
    table = Table(
        title=f"{escape(target['target'])}: {target['classes']} classes{covered}{guess}",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
    )
    columns = ACCURACY if unit == "accuracy" else INFORMATION
    table.add_column("hook", no_wrap=True)
    for heading in ("loop", *columns):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    hook = None
    for row in rows:
        table.add_row(
            "" if row["hook"] == hook else escape(row["hook"]),
            f"{row['loop']}{'*' if row['extrapolated'] else ''}",
            *(between(row, name) if "[" in heading else cell(row[name]) for heading, name in columns.items()),
        )
        hook = row["hook"]
    return table
