"""The command line: arguments in, calls, tables out."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import asdict
from functools import partial
from json import dumps as as_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from loopdiag.cli.effects import effects_answer, print_effects
from loopdiag.cli.figures import figures as draw_figures
from loopdiag.cli.options import (
    BUNDLED_DATA,
    DEFAULT_MODEL,
    INTERVENTIONS,
    LARGEST_SEED,
    MOST_LOOPS,
    AtOption,
    BatchOption,
    DataOption,
    Device,
    DeviceOption,
    DocumentsOption,
    Dtype,
    DtypeOption,
    FiguresOption,
    JsonOption,
    LoopsOption,
    MeasuresOption,
    ModelArgument,
    OfflineOption,
    OnlyModelArgument,
    PriceOption,
    QuietOption,
    RevisionOption,
    SaveOption,
    Schedule,
    SeedOption,
    TokensOption,
    check_price,
    in_range,
)
from loopdiag.cli.output import (
    Exit,
    check_outputs,
    json_file,
    model_facts,
    note,
    print_answer,
    print_info,
    reported_errors,
    stdout,
    tell,
)
from loopdiag.cli.probes import probe as run_probe
from loopdiag.cli.processes import refuse_group, together
from loopdiag.cli.report import report as make_report
from loopdiag.cli.runs import SWEEP, Checkpoint, Run
from loopdiag.cli.sweep import recommend_from_sweep
from loopdiag.cli.sweep import sweep as run_sweep
from loopdiag.errors import InputError

if TYPE_CHECKING:
    from loopdiag.model import LoopedLM
    from loopdiag.model.decoding import DecodingCost

app = typer.Typer(
    help="How many loops are worth it? Diagnoses of looped language models, loop by loop.",
    epilog="Try: loopdiag recommend    loopdiag recommend tiny-plt-2 --loops 4 --json -    loopdiag info tiny-plt-4    "
    "loopdiag models",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
GROUPED = ("diagnose", "sweep")  # know what to do where a launcher started several processes


@app.callback()
def one_process(context: typer.Context) -> None:
    with reported_errors():
        if (command := context.invoked_subcommand) and command not in GROUPED:
            refuse_group(command)


app.command(name="figures")(draw_figures)
app.command(name="report")(make_report)
app.command(name="sweep")(run_sweep)
app.command(name="probe")(run_probe)


@app.command()
def recommend(
    model: ModelArgument = DEFAULT_MODEL,
    data: DataOption = BUNDLED_DATA,
    documents: DocumentsOption = None,
    max_tokens: TokensOption = None,
    loops: LoopsOption = None,
    at: AtOption = None,
    measures: MeasuresOption = "default",
    price: PriceOption = 0.01,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    json: JsonOption = None,
    figures: FiguresOption = None,
    save: SaveOption = None,
    decoding: Annotated[
        bool,
        typer.Option("--decoding/--no-decoding", help="Also time a new token under each loop count, on this machine."),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Recommend how many loops to run a checkpoint with, and predict how many to train with.

    Exit codes: 0 answered, 1 failed while running, 2 wrong input, 3 the data cannot tell how many loops to run.
    """
    with reported_errors():
        check_price(price)
        to_json = json_file(json, save, Path(model), Path(model) / SWEEP, of="--json, --save and what is read")
        check_outputs(to_json, save, folder=figures, quiet=quiet)
        checkpoint = Checkpoint(model, revision, offline, device, dtype)
        run = Run(checkpoint, data, documents, max_tokens, loops, batch_size, seed, quiet, measures, at)
        if losses := run.losses():
            if save or decoding:
                raise InputError(f"--save and --decoding are of one model, and {model} is a sweep: leave them out.")
            answered = recommend_from_sweep(losses, run.kept(), price, seed, json, figures, quiet)
            raise typer.Exit(Exit.ANSWERED if answered else Exit.UNDETERMINED)
        costs: list[DecodingCost] = []

        def time_decoding(net: LoopedLM) -> None:
            from loopdiag.model.decoding import decoding_costs

            costs.extend(decoding_costs(net, run.kept() or range(1, (loops or net.cfg.n_loops) + 1), seed=seed))

        diagnosis = run.diagnosis(needs="prediction", also=time_decoding if decoding else None)

        from loopdiag import gaincost
        from loopdiag.gaincost.answer import answer

        recommendation = gaincost.recommend(diagnosis, price, seed=seed)
        told = answer(diagnosis, recommendation) | ({"decoding": [asdict(cost) for cost in costs]} if decoding else {})
        if save:
            diagnosis.save(save)
        if figures:
            from loopdiag import plots

            plots.draw([diagnosis], [recommendation], figures)
        tell(told, json, partial(print_answer, told, recommendation))
        raise typer.Exit(Exit.UNDETERMINED if recommendation.recommended_loops is None else Exit.ANSWERED)


@app.command()
def diagnose(
    model: OnlyModelArgument = DEFAULT_MODEL,
    data: DataOption = BUNDLED_DATA,
    documents: DocumentsOption = None,
    max_tokens: TokensOption = None,
    loops: LoopsOption = None,
    at: AtOption = None,
    measures: MeasuresOption = "default",
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    save: Annotated[Path, typer.Option("--save", help="Where the diagnosis goes (netCDF).")] = Path("diagnosis.nc"),
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from what a stopped run left in FILE.parts, if it did.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model and keep the diagnosis; `loopdiag recommend FILE` answers from it without the model.

    What is measured is kept in the folder FILE.parts as it appears, until the diagnosis is whole. Under `accelerate
    launch` or `torchrun`, the processes share the documents.
    """
    with reported_errors():
        if Path(model).is_file():
            raise InputError(
                f"{model} is a file: give a model. To answer from a saved diagnosis: loopdiag recommend {model}"
            )
        with together(quiet) as first:
            quiet = quiet or not first
            check_outputs(save, quiet=quiet)

            from loopdiag.parts import Parts

            parts = Parts(save.with_name(f"{save.name}.parts"), resume=resume)
            checkpoint = Checkpoint(model, revision, offline, device, dtype)
            run = Run(checkpoint, data, documents, max_tokens, loops, batch_size, seed, quiet, measures, at)
            made = run.diagnosis(parts=parts)
            if first:
                made.save(save)
                parts.remove()
                stdout.print(str(save), markup=False, highlight=False, soft_wrap=True)


@app.command()
def intervene(
    model: OnlyModelArgument = DEFAULT_MODEL,
    data: DataOption = BUNDLED_DATA,
    documents: DocumentsOption = None,
    max_tokens: TokensOption = None,
    loops: LoopsOption = None,
    only: Annotated[
        str | None, typer.Option("--only", help=f"Groups of interventions, with commas: {','.join(INTERVENTIONS)}.")
    ] = None,
    batch_size: BatchOption = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap and of a random initial state.")] = 0,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    json: JsonOption = None,
    save: Annotated[Path | None, typer.Option("--save", help="Keep the effects in this file (netCDF).")] = None,
    quiet: QuietOption = False,
) -> None:
    """Change a trained model in one place at a time, and measure what that does to its loss: what it relies on.

    It is measured on the half of the documents that a diagnosis reports on, although nothing is fitted on the other.
    """
    with reported_errors():
        groups = [group.strip() for group in only.split(",")] if only is not None else None
        if unknown := [group for group in groups or () if group not in INTERVENTIONS]:
            raise InputError(f"--only has {unknown[0]!r}: allowed are {', '.join(INTERVENTIONS)}, with commas between.")
        if Path(model).is_file():
            raise InputError(f"{model} is a file: give a model.")
        to_json = json_file(json, save, of="--json and --save")
        check_outputs(to_json, save, quiet=quiet)
        checkpoint = Checkpoint(model, revision, offline, device, dtype)
        effects = Run(checkpoint, data, documents, max_tokens, loops, batch_size, seed, quiet).effects(groups)
        told = effects_answer(effects, seed)
        if save:
            effects.save(save)
        tell(told, json, partial(print_effects, told))


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
        table = Table("model_type", "what it is, and where", title="Supported families (a folder or a hub id)")
        for family in FAMILIES:
            table.add_row(family.MODEL_TYPE, f"{family.DESCRIPTION}\n{family.HUB}".strip())
        stdout.print(table)


@app.command()
def info(
    model: OnlyModelArgument = DEFAULT_MODEL,
    loops: LoopsOption = None,
    context: Annotated[int | None, typer.Option("--context", help="Tokens that a token sees; as FLOPs grow.")] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What keys and values are kept in.")] = Dtype.bfloat16,
    json: Annotated[bool, typer.Option("--json/--no-json", help="JSON with exact numbers instead of tables.")] = False,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Say what a model's configuration tells: wiring, parameters, and what each loop count costs. Needs no weights."""
    with reported_errors():
        in_range("--loops", loops, 1, MOST_LOOPS)
        in_range("--context", context, 1)

        from loopdiag.model.loading import find, read_config

        cfg, family = read_config(find(model, revision=revision, local_files_only=offline))
        facts = model_facts(cfg, family, loops or cfg.n_loops, context or min(cfg.n_ctx, 2048), dtype.value)
        if json:
            sys.stdout.write(as_json({"model": model, **facts}, indent=2) + "\n")
        else:
            print_info(model, facts)


@app.command()
def generate(
    model: OnlyModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on with.")],
    loops: LoopsOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to add at most.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens of this much probability.")
    ] = 1.0,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Put the prompt into the chat template.")] = False,
    schedule: Annotated[
        Schedule,
        typer.Option("--schedule", help="Run a token's loops in turn, or all in one pass, as an offset allows."),
    ] = Schedule.sequential,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws, and of a random initial state.")] = 0,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    quiet: QuietOption = False,
) -> None:
    """Go on with a text, with as many loops as you like: see what a loop count does."""
    with reported_errors():
        in_range("--loops", loops, 1, MOST_LOOPS)
        in_range("--max-new-tokens", max_new_tokens, 1)
        in_range("--seed", seed, 0, LARGEST_SEED)
        if temperature and not 1e-4 <= temperature < math.inf:
            raise InputError(f"--temperature {temperature} is out of range: allowed is 0, or a number from 1e-4 on.")
        if not 0 < top_p <= 1:
            raise InputError(f"--top-p {top_p} is out of range: allowed is a number above 0, at most 1.")
        net = Checkpoint(model, revision, offline, device, dtype).load(loops, quiet)

        import torch

        if net.tokenizer is None:
            raise InputError(f"{model} has no tokenizer, so it cannot read text.")
        if chat and not net.tokenizer.chat_template:
            raise InputError(f"{model} has no chat template: leave --chat out.")
        if re.search("[\ud800-\udfff]", prompt):
            raise InputError(
                "The prompt is not valid Unicode: give it in the encoding of the terminal, UTF-8 as a rule."
            )
        text = prompt
        if chat:
            message = [{"role": "user", "content": prompt}]
            try:
                text = net.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # of many kinds: a template can do anything that Jinja's sandbox lets it
                raise InputError(
                    f"{model}: its chat template fails ({type(error).__name__}: {error}): leave --chat out."
                ) from None
        ids = net.tokenizer(text, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise InputError("The prompt is empty: give at least one token.")
        if loops and loops > net.cfg.n_loops and not quiet:
            note(f"{loops} loops are beyond the {net.cfg.n_loops} that {model} was trained with")
        if len(ids) + max_new_tokens > net.cfg.n_ctx and not quiet:
            note(f"{len(ids)} + {max_new_tokens} tokens may go beyond the {net.cfg.n_ctx} that {model} was made for")
        prompts = torch.tensor([ids], device=net.embed.weight.device)
        settings = {"n_loops": loops, "temperature": temperature, "top_p": top_p, "seed": seed}
        written = net.generate(prompts, max_new_tokens, schedule=schedule.value, **settings)[0].tolist()
        sys.stdout.write(net.tokenizer.decode(written, skip_special_tokens=True) + "\n")


def main() -> None:
    """The console script."""
    app()
