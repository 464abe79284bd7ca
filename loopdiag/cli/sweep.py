"""`loopdiag sweep`: matched models trained from scratch."""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from loopdiag.cli.options import BUNDLED_DATA, MOST_LOOPS, OfflineOption, QuietOption, in_range
from loopdiag.cli.output import between, cell, check_outputs, note, reported_errors, stderr, stdout, tell
from loopdiag.cli.processes import apart
from loopdiag.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopdiag.losses import SweepLosses
    from loopdiag.sweep.grid import Grid
    from loopdiag.sweep.running import Plan

MOST_SEEDS = 100
RATES = "0.0015,0.003,0.006"
LOOK_AGAIN = 2.0  # seconds from one look at what other processes have finished to the next


def sweep(
    out: Annotated[Path, typer.Option("--out", help="Folder of the sweep; one that is there goes on.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Text to train on, some of it held out: file, folder, hub data set, a task (p_hop, permutations, "
            "addition, brackets, unigram), or bundled: the Python source installed here.",
        ),
    ] = BUNDLED_DATA,
    loops: Annotated[str, typer.Option("--loops", help="Loop counts, with commas.")] = "1,2,3,4",
    offset: Annotated[str, typer.Option("--offset", help="Cross-loop offset: on, off, or on,off.")] = "on,off",
    memory: Annotated[
        str, typer.Option("--memory", help="Later loops read the first one's keys and values, or their own: first,own.")
    ] = "first",
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds; a claim needs three.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", help="Training tokens of each model.")] = 3_276_800,
    size: Annotated[
        str, typer.Option("--size", help="tiny (0.7M parameters), small (26M), a JSON file of settings, or a model.")
    ] = "tiny",
    lr: Annotated[
        str, typer.Option("--lr", help="Peak learning rates; of several, a short search chooses for each loop count.")
    ] = RATES,
    search_tokens: Annotated[
        int | None, typer.Option("--search-tokens", help="Training tokens of each search; a quarter if not given.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences of a batch; about 1,600 batches if not given.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A model whose tokenizer reads the text; the bundled if not given."),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option("--from", help="Train on from this model, with its factors changed and unchanged."),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option("--diagnose", help="Diagnose each finished model: groups of measures, such as default."),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16/--no-bf16", help="Autocast to bfloat16.")] = True,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile; where there is a C compiler.")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan/--no-plan", help="Say what would be trained, and stop.")] = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train matched models that differ in loop count, offset and memory alone, and measure what each factor costs.

    The same command goes on where a stopped one was; `loopdiag recommend FOLDER` answers from what is there. Under
    `accelerate launch`, or started several times, each process takes models that no other has.
    """
    with reported_errors():
        rank = apart()
        rates, grid = _rates(lr), _grid(loops, offset, memory, seeds)
        in_range("--tokens", tokens, 1)
        in_range("--batch-size", batch_size, 1)
        in_range("--search-tokens", search_tokens, 1, tokens)
        if origin is not None and (size != "tiny" or tokenizer is not None):
            raise InputError("--from brings its own size and tokenizer: leave --size and --tokenizer out.")
        if origin is not None and lr == RATES:
            raise InputError(
                "--from needs --lr: the rates of a training from scratch would undo what the model learnt."
            )
        if importlib.util.find_spec("accelerate") is None:
            raise InputError('Training needs accelerate, which is not installed: pip install "loopdiag[train]".')
        check_outputs(folder=out, quiet=True)
        with nullcontext() if quiet or rank > 0 else stderr.status("preparing the text"):
            from loopdiag.measures import chosen
            from loopdiag.sweep import planning

            plan = planning.plan(
                data,
                out,
                grid,
                tokens=tokens,
                size=size,
                rates=rates,
                search_tokens=search_tokens,
                batch_size=batch_size,
                tokenizer=tokenizer or planning.TOKENIZER,
                origin=origin,
                measures=chosen([name.strip() for name in measures.split(",")]) if measures is not None else (),
                bf16=bf16,
                compiled=bool(shutil.which("c++") or shutil.which("g++")) if compiled is None else compiled,
                offline=offline,
            )
        if rank == 0 and (plan_only or not quiet):
            _describe(plan, grid, out)
        if plan_only:
            return

        from loopdiag.sweep.running import RESULT
        from loopdiag.sweep.running import sweep as run

        with _silent_trainer(), _bars(quiet or rank > 0, plan, grid, out) as progress:
            losses = run(plan, grid, out, progress)
        if rank == 0:
            if not quiet:
                note(repr(losses))
                _note_rates(losses, rates)
            stdout.print(str(out / RESULT), markup=False, highlight=False, soft_wrap=True)


def _note_rates(losses: SweepLosses, rates: tuple[float, ...]) -> None:
    """Say which learning rates were chosen, and where a better one may lie beyond those that were tried."""
    if len(rates) == 1:
        return
    chosen = losses.data["learning_rate"]
    note("learning rates: " + ", ".join(f"{float(rate):g} for {int(rate.loops)} loops" for rate in chosen))
    if at_end := [str(int(rate.loops)) for rate in chosen if float(rate) in (rates[0], rates[-1])]:
        note(
            f"of loop counts {', '.join(at_end)} that is the last one tried: a wider --lr in a new folder may do better"
        )


def recommend_from_sweep(
    losses: SweepLosses,
    loops: list[int] | None,
    price: float,
    seed: int,
    json: str | None,
    figures: Path | None,
    quiet: bool,
) -> bool:
    """Answer how many loops to train with from measured losses; whether the first wiring there has an answer."""
    from loopdiag.gaincost import TrainingRecommendation, recommend_training
    from loopdiag.gaincost.answer import sweep_answer
    from loopdiag.losses import SweepError

    answers: list[TrainingRecommendation] = []
    missing: list[SweepError] = []
    for memory in losses.data["memory"].values:
        for offset in losses.data["offset"].values:
            try:
                answer = recommend_training(
                    losses, price, offset=int(offset), memory=str(memory), loops=loops, seed=seed
                )
                answers.append(answer)
            except SweepError as error:
                missing.append(error)
    if not answers:
        raise missing[0]
    if not quiet:
        for unfinished in missing:
            note(str(unfinished))
    told = sweep_answer(losses, answers, seed)
    if figures:
        from loopdiag import plots

        plots.draw_sweep(losses, figures, price=price, seed=seed)
        if not quiet:
            for name, why in plots.left_out_of_sweep(losses).items():
                note(f"no figure {name}: {why}")
    tell(told, json, lambda: _print_sweep(told))
    return answers[0].recommended_loops is not None


def _print_sweep(told: dict[str, Any]) -> None:
    """The losses with each answer, and what the offset costs."""
    from loopdiag.gaincost.rule import BreakEven, describe

    for answer in told["answers"]:
        seeds = f"{answer['seeds']} seed{'s' if answer['seeds'] > 1 else ''}"
        table = _table(
            f"Trained on {told['data']}, offset {answer['offset']}, memory {answer['memory']}, {seeds}",
            "Held-out loss in nats per token; at equal work: with no more training FLOPs than the first row. "
            "Of a token: FLOPs of a forward, keys and values in 16 bits.",
            (
                "loops",
                "loss [95 %]",
                "at equal\nwork",
                "MFLOP/\ntoken",
                "KV bytes/\ntoken",
                "fixed\nbytes",
                "learning\nrate",
            ),
        )
        for row in answer["loops"]:
            table.add_row(
                *(str(row["loops"]), between(row, "nll"), cell(row["nll_equal_work"])),
                *(f"{row['flops'] / 1e6:,.1f}", f"{row['kv_bytes']:,.0f}", f"{row['kv_bytes_fixed']:,.0f}"),
                f"{row['learning_rate']:g}",
            )
        stdout.print(table)
        verdict = answer["recommended_loops"] or f"undetermined: {answer['why_undetermined']}"
        support = ", ".join(f"{loops}: {share:.0%}" for loops, share in answer["support"].items())
        steps = tuple(BreakEven(**step) for step in answer["break_even"])
        for line in (
            f"Train with how many loops? (measured)  {verdict}",
            f"    support  {support}",
            f"    price    {told['price_nats_per_loop']:g} nats per token and extra loop",
            f"    break-even prices, by mean loss: {describe(steps, answer['loops'][0]['loops'])}",
            f"    left out: {answer['leaves_out']}\n",
        ):
            stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    for parts in told["decompositions"]:
        over = {"seeds": "over seeds, on these documents", "documents": "over documents; they leave out the seed"}
        table = _table(
            f"What a loop brings without the offset (gain), what the offset costs (tax), and both (net); memory "
            f"{parts['memory']}",
            f"Nats per token, from the loop count above. 95 % intervals {over[parts['intervals_over']]}.",
            ("loops", "gain", "tax", "net"),
        )
        for row in parts["loops"]:
            table.add_row(str(row["loops"]), *(between(row, name) for name in ("gain", "tax", "net")))
        stdout.print(table)
    worth = told["recurrence_exponent"]
    said = f"unknown: {worth['why']}" if worth["why"] else f"{worth['phi']:.2f}"
    stdout.print(f"What a loop is worth in parameters (phi)  {said}", highlight=False, soft_wrap=True)


def _table(title: str, caption: str, headings: tuple[str, ...]) -> Table:
    table = Table(
        title=escape(title), caption=caption, box=None, title_justify="left", caption_justify="left", pad_edge=False
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _describe(plan: Plan, grid: Grid, out: Path) -> None:
    """What will be trained, and about how long that takes."""
    from loopdiag.model.facts import parameters
    from loopdiag.sweep.planning import estimated_seconds, waiting

    left = waiting(plan, grid, out)
    models = [cell for cell in left if cell.seed in grid.seeds]
    note(
        f"{plan.text.corpus.name}: {len(plan.text.stream):,} tokens to train on; held out are "
        f"{len(plan.text.corpus.fit)} documents to choose learning rates on, {len(plan.text.corpus.report)} to report"
    )
    note(
        f"{len(grid.cells())} models of {parameters(plan.base).once:,} parameters, {plan.recipe.tokens:,} tokens each, "
        f"in batches of {plan.recipe.batch_size} x {plan.recipe.sequence}; {len(models)} still to train"
    )
    if left:
        hours, minutes = divmod(round(estimated_seconds(plan, left) / 60), 60)
        faster = ", less since it is compiled" if plan.recipe.compile else ""
        note(f"{sum(left.values()):,} tokens in all: about {hours} h {minutes:02d} min by one process{faster}")


@contextmanager
def _silent_trainer() -> Iterator[None]:
    """Without what the Trainer warns of, such as file systems whose times are coarse."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _bars(quiet: bool, plan: Plan, grid: Grid, out: Path) -> Iterator[Callable[[str, int, int], None] | None]:
    """The whole grid as one bar, by training tokens, and below it what this process trains now."""
    if quiet:
        yield None
        return

    from loopdiag.sweep.planning import waiting

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bars:
        left = waiting(plan, grid, out)
        whole = bars.add_task(f"{len(left)} models", total=sum(left.values()))
        now = bars.add_task("")
        doing, looked = "", 0.0

        def tell(what: str, done: int, of: int) -> None:
            nonlocal doing, looked
            if what != doing:
                doing = what
                bars.reset(now, description=what, total=of)
            bars.update(now, completed=done, total=of)
            if time.monotonic() < looked + LOOK_AGAIN and done < of:
                return
            looked = time.monotonic()
            # Models of other processes count when they are finished.
            waits = waiting(plan, grid, out)
            current = next((count for cell, count in waits.items() if cell.name == what), 0)
            finished = sum(left.values()) - sum(waits.values())
            bars.update(
                whole, completed=finished + current * done / of, description=f"{len(waits)} of {len(left)} left"
            )

        yield tell


def _rates(lr: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in lr.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates) or len(set(rates)) < len(rates):
        raise InputError(f"--lr {lr} is not allowed: give different numbers above 0, with commas, such as 0.001,0.003.")
    return tuple(sorted(rates))


def _grid(loops: str, offset: str, memory: str, seeds: int) -> Grid:
    in_range("--seeds", seeds, 1, MOST_SEEDS)
    counts = [int(count) if count.strip().isdecimal() else 0 for count in loops.split(",")]
    if any(not 1 <= count <= MOST_LOOPS for count in counts) or counts != sorted(set(counts)):
        raise InputError(f"--loops {loops} is not allowed: give loop counts that rise, such as 1,2,3,4.")
    chosen = {}
    for flag, value, allowed in (("--offset", offset, ("on", "off")), ("--memory", memory, ("first", "own"))):
        chosen[flag] = [choice.strip() for choice in value.split(",")]
        if not set(chosen[flag]) <= set(allowed) or len(set(chosen[flag])) < len(chosen[flag]):
            raise InputError(f"{flag} {value} is not allowed: give {allowed[0]}, {allowed[1]}, or both with a comma.")

    from loopdiag.sweep.grid import MEMORIES, OFFSETS, Grid

    return Grid(
        loops=tuple(counts),
        # The standard first, however they were given.
        offsets=tuple(tokens for name, tokens in OFFSETS.items() if name in chosen["--offset"]),
        memories=tuple(name for name in MEMORIES if name in chosen["--memory"]),
        seeds=tuple(range(seeds)),
    )
