"""The command line: arguments in, calls, tables out."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loopdiag.errors import InputError
from loopdiag.files import whole

if TYPE_CHECKING:
    from loopdiag.diagnosis import Diagnosis
    from loopdiag.gaincost import Recommendation

MOST_LOOPS = 64
DEFAULT_MODEL, BUNDLED_DATA = "tiny-plt-4", "bundled"

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(
    help="How many loops are worth it? Diagnoses of looped language models, loop by loop.",
    epilog="Try: loopdiag recommend    loopdiag recommend tiny-plt-2 --loops 4 --json -    loopdiag models",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Exit(IntEnum):
    """What the exit code says."""

    ANSWERED = 0
    FAILED = 1
    WRONG_INPUT = 2
    UNDETERMINED = 3


class Device(StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """What the model computes in."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[str, typer.Argument(help="A bundled model, a folder, a hub id, or a saved diagnosis.")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="Text file, JSON lines, parquet, source tree or hub data set; half is fitted on, half reported."
    ),
]
DocumentsOption = Annotated[
    int | None, typer.Option("--documents", help="Use this many documents, half of them to fit on.")
]
TokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="Cut documents here; what the model allows if not given.")
]
LoopsOption = Annotated[int | None, typer.Option("--loops", help="Loops to run; the trained number if not given.")]
PriceOption = Annotated[
    float,
    typer.Option(
        "--price", help="Nats per token that an extra loop must bring; also how finely the answer must be told."
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Documents of a batch.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the fits and the bootstrap.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Commit or tag of a model on the hub.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="What the model computes in.")]
JsonOption = Annotated[
    str | None, typer.Option("--json", help="Write the answer as JSON to this file, or - for stdout.")
]
FiguresOption = Annotated[Path | None, typer.Option("--figures", help="Draw the figures into this folder.")]
SaveOption = Annotated[Path | None, typer.Option("--save", help="Keep the diagnosis in this file (netCDF).")]
QuietOption = Annotated[bool, typer.Option("--quiet/--no-quiet", help="No progress and no notes on stderr.")]


@app.command()
def recommend(
    model: ModelArgument = DEFAULT_MODEL,
    data: DataOption = BUNDLED_DATA,
    documents: DocumentsOption = None,
    max_tokens: TokensOption = None,
    loops: LoopsOption = None,
    price: PriceOption = 0.01,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    json: JsonOption = None,
    figures: FiguresOption = None,
    save: SaveOption = None,
    quiet: QuietOption = False,
) -> None:
    """Recommend how many loops to run a checkpoint with, and predict how many to train with.

    Exit codes: 0 answered, 1 failed while running, 2 wrong input, 3 the data cannot tell how many loops to run.
    """
    with reported_errors():
        if not (math.isfinite(price) and price >= 0):
            raise InputError(
                f"--price {price} is out of range: allowed is a number >= 0, in nats per token and loop. Try 0.01."
            )
        to_json = None if json in (None, "-") else Path(json)
        places = [Path(place).resolve() for place in (to_json, save) if place is not None]
        if len(set(places)) < len(places) or (to_json and to_json.resolve() == Path(model).resolve()):
            raise InputError("--json, --save and a saved diagnosis that is read must be different files.")
        _check_outputs(to_json, save, folder=figures, quiet=quiet)
        run = Run(model, data, documents, max_tokens, loops, batch_size, seed, revision, device, dtype, quiet)
        diagnosis = run.diagnosis()

        from loopdiag import gaincost
        from loopdiag.gaincost.answer import answer, dumps

        recommendation = gaincost.recommend(diagnosis, price, seed=seed)
        told = answer(diagnosis, recommendation)
        if save:
            diagnosis.save(save)
        if figures:
            from loopdiag import plots

            plots.draw(diagnosis, recommendation, figures)
        if json == "-":
            sys.stdout.write(dumps(told))
        else:
            if to_json:
                with whole(to_json) as partial:
                    partial.write_text(dumps(told), encoding="utf-8")
            _print_answer(told, recommendation)
        raise typer.Exit(Exit.UNDETERMINED if recommendation.recommended_loops is None else Exit.ANSWERED)


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder or a hub id.")] = DEFAULT_MODEL,
    data: DataOption = BUNDLED_DATA,
    documents: DocumentsOption = None,
    max_tokens: TokensOption = None,
    loops: LoopsOption = None,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    save: Annotated[Path, typer.Option("--save", help="Where the diagnosis goes (netCDF).")] = Path("diagnosis.nc"),
    quiet: QuietOption = False,
) -> None:
    """Measure a model and keep the diagnosis; `loopdiag recommend FILE` answers from it without the model."""
    with reported_errors():
        if Path(model).is_file():
            raise InputError(
                f"{model} is a file: give a model. To answer from a saved diagnosis: loopdiag recommend {model}"
            )
        _check_outputs(save, quiet=quiet)
        run = Run(model, data, documents, max_tokens, loops, batch_size, seed, revision, device, dtype, quiet)
        run.diagnosis().save(save)
        stdout.print(str(save), markup=False, highlight=False, soft_wrap=True)


@app.command()
def models() -> None:
    """List the bundled models and the supported families."""
    with reported_errors():
        from loopdiag.model.checkpoints import FAMILIES
        from loopdiag.model.loading import bundled_models, find, read_config

        table = Table("bundled model", "loops", "layers", "d_model", "context", "vocabulary", title="Bundled models")
        for name in bundled_models():
            cfg, _ = read_config(find(name))
            table.add_row(name, *map(str, (cfg.n_loops, cfg.n_layers, cfg.d_model, cfg.n_ctx, cfg.vocab_size)))
        stdout.print(table)
        table = Table("model_type", "what it is", title="Supported families (a folder or a hub id)")
        for model_type, family in FAMILIES.items():
            table.add_row(model_type, family.DESCRIPTION)
        stdout.print(table)


@dataclass(frozen=True)
class Run:
    """The arguments that a diagnosis comes from."""

    model: str
    data: str
    documents: int | None
    max_tokens: int | None
    loops: int | None
    batch_size: int
    seed: int
    revision: str | None
    device: Device
    dtype: Dtype
    quiet: bool

    def diagnosis(self) -> Diagnosis:
        """Read a saved diagnosis, or make one; everything that can be wrong is found before the model runs."""
        for flag, value, least, most in (
            ("--documents", self.documents, 16, None),
            ("--max-tokens", self.max_tokens, 16, None),
            ("--loops", self.loops, 1, MOST_LOOPS),
            ("--batch-size", self.batch_size, 1, None),
            ("--seed", self.seed, 0, None),
        ):
            if value is not None and (value < least or (most is not None and value > most)):
                allowed = f"{least} to {most}" if most else f"{least} or more"
                raise InputError(f"{flag} {value} is out of range: allowed {allowed}.")
        if Path(self.model).is_file():
            return self._saved()
        if self.model.endswith(".nc"):
            raise InputError(f"There is no file {self.model}: a saved diagnosis comes from `loopdiag diagnose --save`.")
        return self._made()

    def _saved(self) -> Diagnosis:
        given = [flag for flag, value, default in self._of_a_run() if value != default]
        if given:
            raise InputError(
                f"{', '.join(given)} cannot change the saved diagnosis {self.model}: diagnose again, or leave them out."
            )
        from loopdiag.diagnosis import Diagnosis

        return Diagnosis.load(self.model)

    def _of_a_run(self) -> tuple[tuple[str, Any, Any], ...]:
        """Options that a saved diagnosis has settled, with their values and defaults."""
        return (
            ("--data", self.data, BUNDLED_DATA),
            ("--documents", self.documents, None),
            ("--max-tokens", self.max_tokens, None),
            ("--loops", self.loops, None),
            ("--batch-size", self.batch_size, 8),
            ("--revision", self.revision, None),
            ("--device", self.device, Device.auto),
            ("--dtype", self.dtype, Dtype.float32),
        )

    def _made(self) -> Diagnosis:
        from loopdiag import corpus

        text = corpus.bundled() if self.data == BUNDLED_DATA else corpus.read(self.data)
        if self.documents:
            text = text.take(self.documents)

        with nullcontext() if self.quiet else stderr.status("loading the model"):
            import torch

            from loopdiag import diagnosis
            from loopdiag.model.loading import load

            if self.device == Device.cuda and not torch.cuda.is_available():
                raise InputError("--device cuda: torch sees no GPU here. Use --device cpu or auto.")
            device = "cuda" if self.device != Device.cpu and torch.cuda.is_available() else "cpu"
            net = load(self.model, n_loops=self.loops, dtype=self.dtype.value, device=device, revision=self.revision)
        with _progress(self.quiet) as progress:
            made = diagnosis.diagnose(
                net,
                text,
                n_loops=self.loops,
                max_tokens=self.max_tokens,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=progress,
            )
        if not self.quiet:
            _print_notes(made)
        return made


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


def _check_outputs(*files: Path | None, folder: Path | None = None, quiet: bool) -> None:
    """Refuse outputs that cannot be written, and say which will be replaced, before any work."""
    for file in (file for file in files if file is not None):
        if file.is_dir():
            raise InputError(f"{file} is a folder: give the name of a file.")
        if not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
            raise InputError(f"{file} cannot be written: {file.absolute().parent} is no folder that can be written to.")
        if file.exists() and not quiet:
            _note(f"{file} is there and will be replaced")
    if folder is not None:
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(f"{folder} cannot be made: {nearest} is no folder that can be written to.")
        if nearest == folder.absolute() and any(folder.iterdir()) and not quiet:
            _note(f"figures of the same names in {folder} will be replaced")


def _note(message: str) -> None:
    stderr.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
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


def _print_notes(diagnosis: Diagnosis) -> None:
    """What happened to the documents, on stderr."""
    about = diagnosis.provenance
    if about["documents_cut"]:
        _note(f"{about['documents_cut']} of {about['documents']} documents were cut at {about['max_tokens']} tokens")
    if about["documents_too_short"]:
        _note(f"{about['documents_too_short']} documents were left out: too short")


def _print_answer(told: dict[str, Any], recommendation: Recommendation) -> None:
    """The evidence by loop and both answers, on stdout."""
    from loopdiag.gaincost.decision import describe

    beyond = ", the loops with a star beyond training" if told["run_loops"] > told["trained_loops"] else ""
    model, corpus = escape(told["model"]), escape(told["provenance"]["corpus"])
    table = Table(
        title=f"{model}: trained with {told['trained_loops']} loops, run with {told['run_loops']}{beyond}",
        caption=f"{told['documents']} documents, {told['tokens']:,} predicted tokens of corpus {corpus}. "
        "NLL, gain and cost in nats per token. Intervals are over documents; they leave out the training seed.",
        box=None,  # at three digits the columns just fit into 80 characters
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    headings = "loop|exit NLL [95 %]|gain|cost|cost/\ngain|usable\nNLL|eff.\nrank|cos (ref.)"
    for heading in escape(headings).split("|"):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for row in told["loops"]:
        ratio = row["cost"] / row["gain"] if row["gain"] else None
        cos = f"{_cell(row['cos_update'], 2)} ({_cell(row['cos_reference'], 2)})" if row["loop"] > 1 else ""
        table.add_row(
            f"{row['loop']}{'*' if row['extrapolated'] else ''}",
            f"{row['nll_exit']:.3f} [{row['nll_exit_low']:.3f}, {row['nll_exit_high']:.3f}]",
            *(_cell(row["gain"], 3), _cell(row["cost"], 3), _cell(ratio, 2)),
            *(_cell(row["nll_usable"], 3), _cell(row["effective_rank"], 1), cos),
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


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """The console script."""
    app()
