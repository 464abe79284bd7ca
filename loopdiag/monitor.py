"""Measures by loop while a model trains: when does each loop start to pay?"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from loopdiag.corpus import Batch, TokenDocument
from loopdiag.corpus import batches as in_batches
from loopdiag.diagnosis import matched_tokens
from loopdiag.errors import InputError
from loopdiag.measures import GROUPS, absent, is_by_loop, take
from loopdiag.measures.attention import AttentionMeasures
from loopdiag.model.decoder import LoopedLM
from loopdiag.trace import LoopTrace
from loopdiag.trace import record as run

logger = logging.getLogger(__name__)

MEASURES = ("nll_exit", "gain", "cost")
# Groups that a few documents tell of in one run, without a fit; the last is taken while the model runs.
_GROUPS = ("prediction", "motion", "diversity", "offset", "attention")
BATCH_SIZE = 8
MOST_DOCUMENTS = 64

Recorder = Callable[[Module, Batch], LoopTrace]


def loop_numbers(
    model: Module,
    batches: Iterable[TokenDocument] | Iterable[Batch],
    measures: Sequence[str] = MEASURES,
    n_loops: int | None = None,
    *,
    record: Recorder | None = None,
) -> dict[str, float]:
    """Some measures of a model as it stands, by loop, on a few documents.

    The model is run in evaluation mode, without gradients and without autocast: in the dtype of its weights. Afterwards
    it is as it was: the mode of each of its modules, its hooks, its gradients, and all random states.

    Args:
        model: A model of this toolkit, bare or as training wraps it: compiled, in (Distributed)DataParallel, or
            prepared by accelerate. With `record`, any model.
        batches: Documents as tokens, or batches of them; at most 64 documents.
        measures: Names, of the groups prediction, motion, diversity, offset and attention, that are by loop.
        n_loops: Loops to run; the trained number when None.
        record: Runs a model that is not ours on a batch and gives its states, by `LoopTrace.from_states`.

    Returns:
        `loop_2/gain` and so on: means over documents (and over layers and heads), in the units of
        `loopdiag.measures.DEFINITIONS`, loops 0..R. What is not defined is left out, such as the gain of loop 0. Ranks
        look at the first tokens of each document: as many as nine of ten documents have, at most 256, as in `diagnose`.

    Raises:
        InputError: A measure that is unknown, not by loop or not taken here; no or too many documents; a model that is
            not ours without `record`, or `n_loops` with it; a measure that the model lacks.
    """
    return _look(model, _as_batches(batches), _checked(measures, n_loops, record), n_loops, record)


def _look(
    model: Module, batches: Sequence[Batch], measures: tuple[str, ...], n_loops: int | None, record: Recorder | None
) -> dict[str, float]:
    bare = _unwrapped(model)
    groups = tuple(group for group in _GROUPS if set(GROUPS[group]) & set(measures))
    rank_tokens = matched_tokens(int(length) for batch in batches for length in batch.attention_mask.sum(1))
    parts: list[dict[str, Tensor]] = []
    with undisturbed(bare):
        for batch in batches:
            watch = AttentionMeasures(groups)
            if record is not None:
                trace = record(bare, batch)
            elif isinstance(bare, LoopedLM):
                trace = run(bare, batch, n_loops, on_attention=watch if "attention" in groups else None)
            else:
                raise InputError(
                    f"The model is a {type(bare).__name__}: give a LoopedLM, or record=, which runs a model of another "
                    "kind on a batch and gives its LoopTrace."
                )
            part = take(trace, groups, rank_tokens) | watch.result()
            if missing := {name: why for name, why in absent(trace, part, groups).items() if name in measures}:
                raise InputError("; ".join(f"no {name}: {why}" for name, why in missing.items()) + ".")
            parts.append({name: part[name].cpu().double() for name in measures})
    found = {name: torch.cat([part[name] for part in parts]) for name in measures}
    means = {
        f"loop_{loop}/{name}": values[:, place].nanmean().item()
        for place, loop in enumerate(trace.loops)
        for name, values in found.items()
    }
    return {name: mean for name, mean in means.items() if not np.isnan(mean)}


class LoopMonitor(TrainerCallback):
    """Logs measures by loop on a few held-out documents while transformers' Trainer trains.

    It is given to the Trainer::

        trainer = Trainer(..., callbacks=[LoopMonitor(documents, every=100)])

    Every look is an entry of its own in `trainer.state.log_history`, with `step`, `epoch` and the names of
    `loop_numbers`, so that checkpoints keep it. That is as far as a callback reaches: the Trainer hands its logs to the
    reporters (TensorBoard, Weights & Biases, ...) before it comes to other callbacks. A monitor that is attached
    instead, after the Trainer was made, sends its looks through `Trainer.log`, and so to the reporters and the
    console::

        LoopMonitor(documents, every=100).attach(trainer)

    Looks are taken before the first update, after every `every` updates and after the last one, once each, also where
    a stopped run goes on. Training is not disturbed: it gives the same weights, to the bit, as without the monitor. Of
    several processes the first one measures, alone, while the others wait.

    Args:
        documents: Documents as tokens or batches of them, at most 64: `corpus.tokenize`, `corpus.batches`. They should
            not be trained on.
        every: Updates from one look to the next.
        measures, n_loops, record: As for `loop_numbers`.

    Raises:
        InputError: As `loop_numbers` raises it, here for what can be seen without a model; `every` below 1. When
            training begins: weights that no process holds whole (FSDP, DeepSpeed ZeRO-3).
    """

    def __init__(
        self,
        documents: Iterable[TokenDocument] | Iterable[Batch],
        every: int,
        measures: Sequence[str] = MEASURES,
        n_loops: int | None = None,
        *,
        record: Recorder | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every = {every!r} is not allowed: it must be an integer >= 1, in updates.")
        self.measures = _checked(measures, n_loops, record)
        self.batches = _as_batches(documents)
        self.every, self.n_loops, self.record = every, n_loops, record
        self._log: Callable[[dict[str, float]], None] | None = None
        self._last: int | None = None  # the update of the last look

    def attach(self, trainer: Trainer) -> LoopMonitor:
        """Watch a Trainer, and log as it does; instead of `callbacks=[...]`."""
        trainer.add_callback(self)
        self._log = trainer.log
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fsdp or is_deepspeed_zero3_enabled():
            raise InputError("LoopMonitor: FSDP and DeepSpeed ZeRO-3 split weights, so that no process can measure.")
        if self._log is None and args.report_to and state.is_world_process_zero:
            logger.warning(
                "The looks of this LoopMonitor go to trainer.state.log_history only: for %s, use "
                "LoopMonitor(...).attach(trainer) instead of callbacks=[...].",
                ", ".join(args.report_to),
            )
        # A run that goes on has the looks of before in its history.
        before = (int(entry["step"]) for entry in reversed(state.log_history) if self._is_look(entry))
        self._last = next(before, None)
        self._look(state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last update is looked at here, where it can be, since then a checkpoint follows and keeps it.
        if state.global_step % self.every == 0 or control.should_training_stop:
            self._look(state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._look(state, control, **kwargs)

    def _look(self, state: TrainerState, control: TrainerControl, *, model: Module, **kwargs: Any) -> None:
        """Measure and log, unless there was a look at this step."""
        if not state.is_world_process_zero or self._last == state.global_step:
            return
        self._last = state.global_step
        numbers = _look(model, self.batches, self.measures, self.n_loops, self.record)
        if self._log is None:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            state.log_history.append({**numbers, **epoch, "step": state.global_step})
            return
        should_log = control.should_log
        self._log(numbers)
        control.should_log = should_log  # the Trainer takes the loss as logged, too

    def _is_look(self, entry: dict[str, Any]) -> bool:
        named = {name.partition("/")[2] for name in entry if name.startswith("loop_")}
        return bool(named) and named <= set(self.measures)  # what is undefined is not logged


def _checked(measures: Sequence[str], n_loops: int | None, record: Recorder | None) -> tuple[str, ...]:
    """The measures, all of which can be taken here."""
    allowed = [
        name
        for group in _GROUPS
        if group != "attention" or record is None  # taken while a model of ours runs
        for name in GROUPS[group]
        if is_by_loop(name)
    ]
    if isinstance(measures, str) or not measures:
        raise InputError(f"measures = {measures!r} is not allowed: give a list of names, such as {list(MEASURES)}.")
    for name in measures:
        if name not in allowed:
            of = [group for group, names in GROUPS.items() if name in names]
            if not of:
                why = "there is no such measure"
            elif not is_by_loop(name):
                why = "it is not one number for each loop"
            elif of[0] == "attention":
                why = "attention is captured of models of this toolkit only"
            else:
                why = f"the group {of[0]} takes more than one run over a few documents"
            raise InputError(f"measures: {name!r} cannot be logged: {why}. Allowed are {', '.join(allowed)}.")
    if record is not None and n_loops is not None:
        raise InputError("n_loops goes with models of this toolkit: a record= runs as many loops as it likes.")
    if n_loops is not None and (isinstance(n_loops, bool) or not isinstance(n_loops, int) or n_loops < 1):
        raise InputError(f"n_loops = {n_loops!r} is not allowed: it must be an integer >= 1.")
    return tuple(measures)


def _as_batches(documents: Iterable[TokenDocument] | Iterable[Batch]) -> list[Batch]:
    given: list[Any] = list(documents)
    if given and all(isinstance(item, TokenDocument) for item in given):
        given = list(in_batches(given, BATCH_SIZE))
    if not given or not all(isinstance(item, Batch) for item in given):
        kinds = ", ".join(sorted({type(item).__name__ for item in given})) or "nothing"
        raise InputError(f"documents holds {kinds}: give what loopdiag.corpus.tokenize or batches makes, not empty.")
    count = sum(len(batch.names) for batch in given)
    if count > MOST_DOCUMENTS:
        raise InputError(f"{count} documents at every look would slow training down: give at most {MOST_DOCUMENTS}.")
    return given


def _unwrapped(model: Module) -> Module:
    """What training has compiled or spread over devices."""
    while True:
        if "_orig_mod" in model._modules:  # of torch.compile
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


@contextmanager
def undisturbed(model: Module) -> Iterator[None]:
    """Evaluation without gradients and autocast; afterwards all is as it was."""
    modes = {module: module.training for module in model.modules()}
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    # accelerate puts autocast into the forward of the instance, and keeps the forward that it found.
    forward, original = (model.__dict__.get(name) for name in ("forward", "_original_forward"))
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (others may draw from it)
    try:
        model.eval()
        if forward is not None and original is not None:
            model.forward = original
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if forward is not None:
            model.forward = forward
        for module, training in modes.items():
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 (as above)
