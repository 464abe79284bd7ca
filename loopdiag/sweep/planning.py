"""From what a user asks for to the plan of a sweep, and how long it will take."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock

from loopdiag.losses import SweepError
from loopdiag.model.checkpoints import native
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.loading import LoadError, find, load, read_config, read_tokenizer
from loopdiag.results import weights_hash
from loopdiag.sweep import family, tasks
from loopdiag.sweep.gathering import SETTINGS, cell_file, chosen_rates, search_file
from loopdiag.sweep.grid import SEARCH_SEED, Cell, Grid
from loopdiag.sweep.running import Plan
from loopdiag.sweep.text import prepare
from loopdiag.sweep.training import Recipe

TOKENIZER = "tiny-plt-1"  # whose tokenizer reads text unless told
UPDATES = 1600  # of a training, unless told: far fewer do not leave the plateau on which only word counts are learnt
LONGEST_SEQUENCE = 2048
ROUNDS = 4  # how often a text may be seen: beyond it, models learn it by heart
LOOKS = 10  # at the held-out loss of each model

# At one loop; the vocabulary is the tokenizer's.
SIZES = {
    "tiny": family.config(1),
    "small": LoopedConfig(
        vocab_size=2048,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=4,
        d_head=64,
        d_mlp=1536,
        n_ctx=512,
        n_loops=1,
    ),
}


def plan(
    data: str,
    folder: Path,
    grid: Grid,
    *,
    tokens: int,
    size: str | LoopedConfig = "tiny",
    rates: Sequence[float] = (3e-3,),
    search_tokens: int | None = None,
    batch_size: int | None = None,
    tokenizer: str = TOKENIZER,
    origin: str | None = None,
    measures: Sequence[str] = (),
    bf16: bool = True,
    compiled: bool = False,
    offline: bool = False,
) -> Plan:
    """What the models of a sweep share.

    Args:
        data: What they are trained and measured on, see `text.prepare`.
        folder: The sweep's; the text is kept in it.
        grid: What the models differ in.
        tokens: Training tokens of each model, cut to whole batches.
        size: `tiny`, `small`, a JSON file of the fields of `LoopedConfig`, a model, or the configuration itself.
        rates: Learning rates to choose from.
        search_tokens: Training tokens of each model that is trained to choose; a quarter of `tokens` when None.
        batch_size: Sequences of a batch; such that there are about 1,600 updates when None.
        tokenizer: A model whose tokenizer reads the text.
        origin: A model to train on from, instead of `size` and `tokenizer`.
        measures: Groups of measures of which each finished model is diagnosed.
        bf16, compiled: How to train.
        offline: Take hub ids from the hub's cache.

    Raises:
        InputError: Anything that does not exist, does not fit together, or is too little.
    """
    start = None
    if origin is not None:
        model = load(origin, local_files_only=offline)
        base, reads, start = model.cfg, model.tokenizer, model.state_dict()
        own = {"--loops": base.n_loops in grid.loops}
        if base.n_loops > 1:
            own |= {"--memory": base.memory in grid.memories, "--offset": base.offset in grid.offsets}
        if missing := [flag for flag, there in own.items() if not there]:
            raise SweepError(
                f"{origin} has {base.n_loops} loops, offset {base.offset} and memory {base.memory!r}, and {missing[0]} "
                "leaves that out: what is changed can only be compared with a model that is trained on unchanged."
            )
        if base.injection == "none":
            raise SweepError(f"{origin} is no Parallel Loop Transformer: its offset and memory cannot be changed.")
    else:
        reads = read_tokenizer(find(tokenizer, local_files_only=offline))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".text.lock"):  # of several processes the first one makes it
        text = prepare(data, tokens, reads, folder / "text", settled=(folder / SETTINGS).is_file())
    if origin is None:
        base = replace(_configuration(size, offline), vocab_size=len(text.tokenizer))
    if base.initial_state == "random":
        raise SweepError(
            f"{origin or size} starts from random states, so that one loop is not one model: give another."
        )
    row = tasks.TASKS[data].sequence if data in tasks.TASKS else min(base.n_ctx, LONGEST_SEQUENCE)
    if row > base.n_ctx:
        base = replace(base, n_ctx=row)
    batch_size = batch_size or max(tokens // UPDATES // row, 1)
    search_tokens = search_tokens or tokens // 4
    batch = row * batch_size
    least = min(tokens, search_tokens) if len(rates) > 1 else tokens
    if least < batch:
        raise SweepError(
            f"{least:,} training tokens do not fill a batch of {batch_size} x {row}: ask for more, or smaller batches."
        )
    if len(text.stream) < batch:
        raise SweepError(
            f"{data} has {len(text.stream):,} tokens to train on, which do not fill a batch of {batch_size} x {row}: "
            "give more text, or smaller batches."
        )
    if text.stream.max() >= base.vocab_size:
        raise SweepError(
            f"{origin} knows {base.vocab_size:,} tokens, and {data} has token {text.stream.max():,}: train on text, or "
            "on what this model was made for."
        )
    if tokens > ROUNDS * len(text.stream):
        raise SweepError(
            f"{data} has {len(text.stream):,} tokens to train on, of which {tokens:,} are more than {ROUNDS} rounds: "
            "ask for fewer, or give more text."
        )
    recipe = Recipe(
        tokens=tokens // batch * batch,
        sequence=row,
        batch_size=batch_size,
        bf16=bf16,
        compile=compiled,
        evaluate_every=max(tokens // batch // LOOKS, 1),
        monitor_every=None,
    )
    origin = None if start is None else f"{origin}, weights {weights_hash(model):.16}"
    return Plan(base, recipe, tuple(rates), search_tokens // batch * batch, text, start, origin, tuple(measures))


def _configuration(size: str | LoopedConfig, offline: bool) -> LoopedConfig:
    if isinstance(size, LoopedConfig):
        return size
    if size in SIZES:
        return SIZES[size]
    if not size.endswith(".json"):
        try:
            return read_config(find(size, local_files_only=offline))[0]
        except LoadError as error:
            raise SweepError(f"{error} A size is also {', '.join(SIZES)}, or a JSON file of settings.") from None
    try:
        return native.read_config({"n_loops": 1, "vocab_size": 1} | json.loads(Path(size).read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SweepError(
            f"{size} holds no settings of a model: {type(error).__name__}: {error}. Allowed are {', '.join(SIZES)}, a "
            "JSON file of the fields of LoopedConfig, or a model."
        ) from None


def waiting(plan: Plan, grid: Grid, folder: Path) -> dict[Cell, int]:
    """Models that a sweep has yet to train, with training tokens, those of the search for their rates included."""
    tokens = {cell: plan.recipe.tokens for cell in grid.cells() if not cell_file(folder, cell).is_file()}
    if len(plan.rates) > 1:
        _, chosen = chosen_rates(folder)
        for cell in (cell for cell in grid.cells([SEARCH_SEED]) if cell.n_loops not in chosen):
            rates = [rate for rate in plan.rates if not search_file(folder, cell, rate).is_file()]
            if rates:
                tokens[cell] = len(rates) * plan.search_tokens
    return tokens


def estimated_seconds(plan: Plan, tokens: dict[Cell, int]) -> float:
    """How long one process takes to train models, from two steps of each loop count; compiled it takes less."""
    seconds = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequence = plan.recipe.sequence
    rows = max(min(plan.recipe.batch_size, 2048 // sequence), 1)
    ids = torch.zeros(rows, sequence, dtype=torch.long, device=device)
    for n_loops in {cell.n_loops for cell in tokens}:
        model = LoopedLM(replace(plan.base, n_loops=n_loops)).to(device)
        model.init_weights(0)
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=plan.recipe.bf16):
                loss = model(ids, return_type="loss")
            loss.backward()
            loss.item()  # waits for the device
            seconds[n_loops] = (time.perf_counter() - start) / ids.numel()
    return sum(seconds[cell.n_loops] * count for cell, count in tokens.items())
