"""What commands say: tables on stdout; errors, notes and progress on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loopdiag.errors import InputError
from loopdiag.files import refuse_special, whole

if TYPE_CHECKING:
    from loopdiag.diagnosis import Diagnosis
    from loopdiag.gaincost import Recommendation
    from loopdiag.interventions import Effects
    from loopdiag.model import LoopedConfig
    from loopdiag.scores import ProbeScores

stdout, stderr = Console(), Console(stderr=True)

_BYTES = (1024, (" B", " KiB", " MiB", " GiB"))
LISTED = 4  # names of a note; the JSON has all of them


class Exit(IntEnum):
    """What the exit code says."""

    ANSWERED = 0
    FAILED = 1
    WRONG_INPUT = 2
    UNDETERMINED = 3


@contextmanager
def reported_errors() -> Iterator[None]:
    """One message on stderr and the right exit code; no traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except InputError as error:
        _stop(str(error), Exit.WRONG_INPUT)
    except Exception as error:
        if os.environ.get("LOOPDIAG_TRACEBACK"):
            raise
        _stop(f"{type(error).__name__}: {error} (LOOPDIAG_TRACEBACK=1 shows where)", Exit.FAILED)


def _stop(message: str, code: Exit) -> None:
    stderr.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def check_outputs(*files: Path | None, folder: Path | None = None, quiet: bool) -> None:
    """Refuse outputs that cannot be written, and say which will be replaced, before any work."""
    for file in (file for file in files if file is not None):
        refuse_special(file)
        if not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
            raise InputError(f"{file} cannot be written: {file.absolute().parent} is no folder that can be written to.")
        if file.exists() and not quiet:
            note(f"{file} is there and will be replaced")
    if folder is not None:
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(f"{folder} cannot be made: {nearest} is no folder that can be written to.")
        if nearest == folder.absolute() and any(folder.iterdir()) and not quiet:
            note(f"figures of the same names in {folder} will be replaced")


def json_file(json: str | None, *others: Path | None, of: str) -> Path | None:
    """The file that --json names, None where it names none; refused where it is one of the command's others, `of`."""
    if json is None or json == "-":
        return None
    if Path(json).resolve() in [other.resolve() for other in others if other is not None]:
        raise InputError(f"{of} must be different files.")
    return Path(json)


def tell(told: dict[str, Any], json: str | None, show: Callable[[], None]) -> None:
    """JSON alone on stdout for `--json -`; else what `show` prints, and JSON in the file that --json names."""
    from loopdiag.gaincost.answer import dumps

    if json == "-":
        sys.stdout.write(dumps(told))
        return
    if json is not None:
        with whole(Path(json)) as partial_file:
            partial_file.write_text(dumps(told), encoding="utf-8")
    show()


def note(message: str) -> None:
    stderr.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each kind of work, on stderr."""
    if quiet:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield tell


def print_notes(result: Diagnosis | Effects | ProbeScores) -> None:
    """What happened to the documents, on stderr."""
    about = result.provenance
    if about["documents_cut"]:
        note(f"{about['documents_cut']} of {about['documents']} documents were cut at {about['max_tokens']} tokens")
    if about["documents_too_short"]:
        note(f"{about['documents_too_short']} documents were left out: too short")
    for key, what in (("documents_not_finite", "documents"), ("documents_fit_not_finite", "documents to fit on")):
        if lost := about.get(key):
            few = ", ".join(lost[:LISTED]) + (f" and {len(lost) - LISTED} more" if len(lost) > LISTED else "")
            note(f"{len(lost)} {what} were left out: their numbers are not finite ({few})")
    if "," in (about["device"] or ""):
        note(f"the model is on {about['device']}: the GPUs had no room for all of it, so it is slow")
    if about["dtype"] in ("bfloat16", "float16") and "noise_step" in about["absent"]:
        note(f"small changes may be rounding in {about['dtype']}: --measures default,noise says how small")
    reasons: dict[str, list[str]] = {}
    for name, why in about["absent"].items():
        if not why.endswith("was not asked for"):
            reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        note(f"absent: {', '.join(names[:LISTED])}{more} ({why})")


def print_answer(told: dict[str, Any], recommendation: Recommendation) -> None:
    """The evidence by loop and both answers, on stdout."""
    from loopdiag.gaincost.rule import describe

    lens = "nll_lens" not in told["absent"]  # beside the exits of a model with a coda
    beyond = ", the loops with a star beyond training" if told["run_loops"] > told["trained_loops"] else ""
    some = len(told["measured_loops"]) < told["run_loops"]
    model, corpus = escape(told["model"]), escape(told["provenance"]["corpus"])
    table = Table(
        title=f"{model}: trained with {_loops(told['trained_loops'])}, run with {told['run_loops']}{beyond}",
        caption=("Some loops were measured: gain, cost and cos are from one of them to the next. " if some else "")
        + f"{told['documents']} documents, {told['tokens']:,} predicted tokens of corpus {corpus}. "
        + (f"{told['documents_not_finite']} more gave no finite numbers. " if told["documents_not_finite"] else "")
        + "NLL, gain and cost in nats per token. Intervals are over documents; they leave out the training seed.",
        box=None,  # at three digits the columns just fit into 80 characters
        padding=(0, 1 if lens else 2, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    headings = "loop|exit NLL [95 %]|gain|cost|cost/\ngain|usable\nNLL|eff.\nrank|cos (ref.)"
    headings += "|logit\nlens" if lens else ""
    for heading in escape(headings).split("|"):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for row in told["loops"]:
        ratio = row["cost"] / row["gain"] if row["gain"] else None
        turn, reference = (cell(row.get(name), 2) for name in ("cos_update", "cos_reference"))
        table.add_row(
            f"{row['loop']}{'*' if row['extrapolated'] else ''}",
            between(row, "nll_exit"),
            *(cell(row["gain"]), cell(row["cost"]), cell(ratio, 2)),
            *(cell(row.get("nll_usable")), cell(row.get("effective_rank"), 1)),
            f"{turn} ({reference})" if row["loop"] > 1 else "",
            *([cell(row["nll_lens"])] if lens else []),
        )
    stdout.print(table)

    support = ", ".join(f"{loop}: {share:.0%}" for loop, share in recommendation.support.items())
    run = recommendation.recommended_loops or f"undetermined: {recommendation.why}"
    lines = [
        f"Run this checkpoint with how many loops? (measured)  {run}",
        f"    support  {support}",
        f"    price    {recommendation.price:g} nats per token and extra loop",
        f"    break-even prices, by mean utility: {describe(recommendation.break_even)}",
        "Train with how many loops? (predicted, provisional: the combination is not backtested)  "
        f"{recommendation.predicted_training_loops or 'no lens has an opinion'}",
    ]
    agree = [name for name, pick in recommendation.lenses.items() if pick == recommendation.predicted_training_loops]
    differ = [f"{name} ({pick})" for name, pick in recommendation.lenses.items() if name not in agree]
    lines.append(f"    lenses   agree: {', '.join(agree) or 'none'}; differ: {', '.join(differ) or 'none'}")
    for line in lines:
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    if "decoding" in told:
        _print_decoding(told["decoding"], told["provenance"])


def _print_decoding(costs: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """What a new token takes under each loop count."""
    table = _by_count(("loops in turn", "side by side", "KV / token", "KV fixed"))
    table.title = f"A new token after {costs[0]['prompt']}, on {about['device']} in {about['dtype']}, timed"
    for cost in costs:
        times = (cost["sequential"], cost["parallel"])
        table.add_row(
            str(cost["loops"]),
            *("-" if seconds is None else f"{1e3 * seconds:.3g} ms" for seconds in times),
            *(_short(cost["kv"][of], *_BYTES) for of in ("per_token", "fixed")),
        )
    stdout.print(table)


def _by_count(headings: tuple[str, ...]) -> Table:
    """An empty table of numbers, with a row for each loop count."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    for heading in ("loops", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _loops(count: int) -> str:
    return f"{count} loop{'s' if count > 1 else ''}"


def cell(value: float | None, digits: int = 3) -> str:
    """A number of a table; a dash where it is undefined."""
    return "-" if value is None else f"{value:z.{digits}f}"  # z: no -0.000


def between(row: dict[str, Any], name: str) -> str:
    """The number of that name with its interval, where it has one."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return cell(row[name]) if low is None else f"{cell(row[name])} [{cell(low)}, {cell(high)}]"


def model_facts(cfg: LoopedConfig, family: ModuleType, n_loops: int, context: int, dtype: str) -> dict[str, Any]:
    """What a configuration says: the wiring, and what each loop count up to `n_loops` costs."""
    from loopdiag.model import facts
    from loopdiag.model.dtypes import as_dtype

    counts = facts.parameters(cfg)
    loops = []
    # All counts up to eight, then powers of two, and the last.
    for count in sorted({*range(1, min(n_loops, 8) + 1), *(c for c in (16, 32) if c < n_loops), n_loops}):
        kv = facts.kv_bytes(cfg, count, as_dtype(dtype).itemsize)
        loops.append(
            {
                "loops": count,
                "extrapolated": count > cfg.n_loops,
                "parameters_if_unshared": counts.effective(count),
                "flops_per_token": facts.flops(cfg, count, context),
                "kv_bytes_per_token": kv.per_token,
                "kv_bytes_fixed": kv.fixed,
            }
        )
    return {
        "model_type": family.MODEL_TYPE,
        "family": family.DESCRIPTION,
        "trained_loops": cfg.n_loops,
        "parameters": counts.once,
        "sizes": f"width {cfg.d_model}, {cfg.n_heads} heads of {cfg.d_head} ({cfg.n_kv_heads} of keys and values), "
        f"MLP {cfg.d_mlp}, vocabulary {cfg.vocab_size}, context {cfg.n_ctx}",
        "wiring": facts.wiring(cfg),
        "context": context,
        "kv_dtype": dtype,
        "loops": loops,
    }


def print_info(model: str, told: dict[str, Any]) -> None:
    """What `model_facts` says, on stdout."""
    lines = {
        "family": f"{told['model_type']}: {told['family']}",
        "trained with": _loops(told["trained_loops"]),
        "parameters": f"{told['parameters']:,}",
        "sizes": told["sizes"],
        **told["wiring"],
    }
    table = Table(title=escape(model), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in lines.items():
        table.add_row(name, escape(text))
    stdout.print(table)
    table = _by_count(("unshared", "FLOPs / token", "KV / token", "KV fixed"))
    for row in told["loops"]:
        table.add_row(
            f"{row['loops']}{'*' if row['extrapolated'] else ''}",
            _short(row["parameters_if_unshared"], 1000, ("", " k", " M", " B", " T")),
            _short(row["flops_per_token"], 1000, ("", " k", " M", " G", " T", " P")),
            _short(row["kv_bytes_per_token"], *_BYTES),
            _short(row["kv_bytes_fixed"], *_BYTES),
        )
    stdout.print(table)
    stdout.print(
        "unshared: parameters of a model as deep that shares nothing. FLOPs: matrix products, for a token that sees "
        f"{told['context']:,} tokens. KV: keys and values in {told['kv_dtype']}, what each token adds, and what "
        "windows and carries hold. *: beyond training. Exact numbers: --json.",
        markup=False,
        highlight=False,
    )


def _short(number: float, base: int, units: tuple[str, ...]) -> str:
    """Three digits and a unit."""
    power = 0
    while float(f"{number:.3g}") >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return (f"{number:.0f}" if number >= 999.5 else f"{number:.3g}") + units[power]
