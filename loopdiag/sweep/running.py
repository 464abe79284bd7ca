"""Running a sweep: every model of a grid trained once, by as many processes as there are, and what was measured."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from filelock import FileLock, Timeout
from torch import Tensor

from loopdiag.corpus import batches, tokenize
from loopdiag.diagnosis import diagnose
from loopdiag.files import whole
from loopdiag.losses import SCHEMA, SweepError, SweepLosses
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.loading import load
from loopdiag.model.saving import save
from loopdiag.monitor import BATCH_SIZE
from loopdiag.results import about_machine, save_dataset, weights_hash
from loopdiag.sweep.gathering import GRID, RATES, SETTINGS, cell_file, chosen_rates, gather, search_file
from loopdiag.sweep.grid import SEARCH_SEED, Cell, Grid
from loopdiag.sweep.text import Text
from loopdiag.sweep.training import Recipe, token_losses, train

RESULT = "sweep.nc"
# Nats that a rate of its own must bring a loop count: less is taken for what another seed would change.
RATE_MARGIN = 0.05
POLL = 2.0  # seconds between two looks for what other processes have left

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """A sweep, as far as its models share it.

    Attributes:
        base: The configuration; loop count, offset and memory are the grid's.
        recipe: The training run; learning rate and seed are the cell's.
        rates: Learning rates to choose from, for each loop count.
        search_tokens: Training tokens of each model that is trained to choose a rate.
        text: What is trained and measured on.
        start: Weights that training starts from, by name; fresh ones when None.
        origin: Where those come from.
        measures: Groups of measures of which each finished model is diagnosed; none when empty.
    """

    base: LoopedConfig
    recipe: Recipe
    rates: tuple[float, ...]
    search_tokens: int
    text: Text
    start: Mapping[str, Tensor] | None = None
    origin: str | None = None
    measures: tuple[str, ...] = ()

    def said(self) -> dict[str, Any]:
        """What all models of a sweep share, for its folder to say: a result of anything else is not comparable."""
        recipe = asdict(self.recipe)
        for name in ("learning_rate", "seed", "compile", "monitor_every"):
            del recipe[name]
        config = asdict(self.base)
        for name in ("n_loops", "offset", "memory"):
            del config[name]
        return {
            "schema": SCHEMA,
            "data": self.text.corpus.name,
            "text_sha256": self.text.fingerprint,
            "config": config,
            "recipe": recipe,
            "rates": list(self.rates),
            "search_tokens": self.search_tokens if len(self.rates) > 1 else 0,
            "from": self.origin,
        }


@dataclass(frozen=True)
class _Job:
    """A training run and the file that says it is done."""

    cell: Cell
    recipe: Recipe
    done: Path


_Finish = Callable[[_Job, LoopedLM, list[dict[str, Any]]], None]


def sweep(plan: Plan, grid: Grid, folder: Path, progress: Progress | None = None) -> SweepLosses:
    """Train every model of a grid that is not trained yet, and gather what was measured.

    Any number of processes may work in one folder, on one machine or on several that share it: each takes models that
    no other has taken, and takes over from one that died. All end when all models are there.

    Args:
        plan: What the models share.
        grid: What they differ in; that of a finished sweep may be extended.
        folder: `cells/` measured losses, `models/`, `sweep.nc`; `runs/` checkpoints of unfinished models.
        progress: Called with (what is trained, updates or models done, of how many).

    Returns:
        The losses, as in `sweep.nc`, which is written anew after each model.

    Raises:
        SweepError: The folder holds another sweep.
    """
    run = _Run(plan, grid, folder, progress)
    run.claim()
    rates = run.choose_rates()
    jobs = [
        _Job(cell, replace(plan.recipe, learning_rate=rates[cell.n_loops], seed=cell.seed), cell_file(folder, cell))
        for cell in grid.cells()
    ]
    run.work("models", jobs, lambda job: run.train(job, run.finish))
    if plan.measures:  # of models that were finished without
        run.work("diagnoses", run.without_diagnosis(jobs), run.diagnose_again)
    return run.gather()


class _Run:
    """One process at work on a sweep."""

    def __init__(self, plan: Plan, grid: Grid, folder: Path, progress: Progress | None) -> None:
        self.plan, self.grid, self.folder = plan, grid, folder
        self.tell = progress or (lambda what, done, of: None)
        corpus, longest = plan.text.corpus, plan.recipe.sequence
        self.fit, self.report = (
            tokenize(half, plan.text.tokenizer, longest, min(16, longest)) for half in (corpus.fit, corpus.report)
        )
        for name in ("cells", "search", "locks", *(["diagnoses"] if plan.measures else [])):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def claim(self) -> None:
        """Say in the folder which sweep it is; refuse one of another."""
        said, ours = self.folder / SETTINGS, json.loads(json.dumps(self.plan.said()))
        with FileLock(self.folder / "locks" / "settings"):
            if not said.is_file():
                with whole(said) as partial:
                    partial.write_text(json.dumps(ours, indent=1) + "\n")
            theirs = json.loads(said.read_text())
            if theirs != ours:
                other = ", ".join(name for name in ours if theirs.get(name) != ours[name])
                raise SweepError(
                    f"{self.folder} holds another sweep ({SETTINGS} says which; {other} differs): give another folder, "
                    "or the settings of this one."
                )
            # A grid that is extended keeps what it had.
            asked, grid = self.folder / GRID, self.grid
            before = json.loads(asked.read_text()) if asked.is_file() else {}
            now = {"seed": grid.seeds, "memory": grid.memories, "offset": grid.offsets, "loops": grid.loops}
            places = {name: sorted({*before.get(name, ()), *values}) for name, values in now.items()}
            with whole(asked) as partial:
                partial.write_text(json.dumps(places) + "\n")

    def choose_rates(self) -> dict[int, float]:
        """The learning rate of every loop count, of short trainings at each rate.

        One rate serves all, that of least mean loss, so that a loop count is not compared with another one's rate; a
        loop count for which a rate of its own is better by more than `RATE_MARGIN` has that. All offsets and memories
        of a loop count share it. Losses are those of the documents to choose on. Rates that were chosen stay, when a
        grid is extended.
        """
        plan, grid = self.plan, self.grid
        if len(plan.rates) == 1:
            return dict.fromkeys(grid.loops, plan.rates[0])
        common, chosen = chosen_rates(self.folder)
        cells = [cell for cell in grid.cells([SEARCH_SEED]) if cell.n_loops not in chosen]
        recipe = replace(plan.recipe, tokens=plan.search_tokens, seed=SEARCH_SEED, evaluate_every=plan.search_tokens)
        jobs = [
            _Job(cell, replace(recipe, learning_rate=rate), search_file(self.folder, cell, rate))
            for cell in cells
            for rate in plan.rates
        ]
        self.work("learning rates", jobs, lambda job: self.train(job, self.note_search))
        losses: dict[int, dict[float, list[float]]] = {}
        for job in jobs:
            nll = json.loads(job.done.read_text())["nll_fit"]
            by_rate = losses.setdefault(job.cell.n_loops, {})
            # A training that diverged has no loss at all.
            by_rate.setdefault(job.recipe.learning_rate, []).append(nll if math.isfinite(nll) else math.inf)
        means = {loops: {rate: sum(nll) / len(nll) for rate, nll in found.items()} for loops, found in losses.items()}
        if common is None:
            common = min(plan.rates, key=lambda rate: sum(found[rate] for found in means.values()))
        for loops, found in means.items():
            best = min(plan.rates, key=lambda rate: found[rate])
            chosen[loops] = best if found[best] < found[common] - RATE_MARGIN else common
        with FileLock(self.folder / "locks" / RATES):
            before, rates = chosen_rates(self.folder)  # a process with another grid may have been first
            chosen |= rates
            kept = {"common": common if before is None else before, "loops": dict(sorted(chosen.items()))}
            with whole(self.folder / RATES) as partial:
                partial.write_text(json.dumps(kept) + "\n")
        return {loops: chosen[loops] for loops in grid.loops}

    def work(self, what: str, jobs: Sequence[_Job], do: Callable[[_Job], None]) -> None:
        """Do what is not done, and what no other process is doing, until all is there."""
        while pending := [job for job in jobs if not job.done.is_file()]:
            self.tell(what, len(jobs) - len(pending), len(jobs))
            for job in pending:
                try:
                    with FileLock(self.folder / "locks" / job.done.name, blocking=False):
                        if not job.done.is_file():
                            do(job)
                        break
                except Timeout:
                    continue
            else:
                time.sleep(POLL)
        for job in jobs:  # of a process that was killed after its model was done
            shutil.rmtree(self._runs(job), ignore_errors=True)
        if jobs:
            self.tell(what, len(jobs), len(jobs))

    def _runs(self, job: _Job) -> Path:
        """Checkpoints of a training run."""
        return self.folder / "runs" / job.done.stem

    def train(self, job: _Job, finish: _Finish) -> None:
        runs = self._runs(job)
        model = train(
            job.cell.config(self.plan.base),
            job.recipe,
            self.plan.text.stream,
            list(batches(self.report, BATCH_SIZE)),
            runs,
            start=self.plan.start,
            progress=lambda done, of: self.tell(job.done.stem, done, of),
        )
        finish(job, model, json.loads((runs / "log.json").read_text()))
        shutil.rmtree(runs, ignore_errors=True)

    def note_search(self, job: _Job, model: LoopedLM, log: list[dict[str, Any]]) -> None:
        losses = token_losses(model, list(batches(self.fit, BATCH_SIZE)))
        found = {"nll_fit": float(np.mean([row.mean() for row in losses])), "rate": job.recipe.learning_rate}
        with whole(job.done) as partial:
            partial.write_text(json.dumps(found | asdict(job.cell)) + "\n")

    def finish(self, job: _Job, model: LoopedLM, log: list[dict[str, Any]]) -> None:
        """Keep a model and what every held-out token costs it; the losses last, since they say that it is done."""
        model.tokenizer = self.plan.text.tokenizer
        save(model, self.folder / "models" / job.cell.name)
        if self.plan.measures:
            self.diagnose(job.cell, model)
        losses = token_losses(model, list(batches(self.report, BATCH_SIZE)))
        by_token = np.full((len(losses), max(map(len, losses))), np.nan, dtype=np.float32)
        for row, values in zip(by_token, losses, strict=True):
            row[: len(values)] = values
        looks = [entry for entry in log if "eval_nll" in entry]
        batch = job.recipe.sequence * job.recipe.batch_size
        provenance = {
            "cell": asdict(job.cell),
            "recipe": asdict(job.recipe),
            "weights_sha256": weights_hash(model),
            "device": model.embed.weight.device.type,
            "training_loss": [(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
            **about_machine(),
        }
        data = xr.Dataset(
            {
                "nll_token": (("document", "pos"), by_token),
                "nll_look": (("look", "document"), np.array([entry["eval_nll"] for entry in looks], dtype=np.float32)),
            },
            {
                "document": [document.name for document in self.report],
                "source": ("document", [document.source for document in self.report]),
                "look": [entry["step"] * batch for entry in looks],
            },
            {"provenance": json.dumps(provenance, sort_keys=True)},
        )
        save_dataset(data, job.done)
        self.gather()

    def without_diagnosis(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Of the finished models that are still there, those that have none."""
        files = [replace(job, done=self.folder / "diagnoses" / f"{job.cell.name}.nc") for job in jobs]
        return [job for job in files if (self.folder / "models" / job.cell.name).is_dir()]

    def diagnose_again(self, job: _Job) -> None:
        self.diagnose(job.cell, load(self.folder / "models" / job.cell.name))

    def diagnose(self, cell: Cell, model: LoopedLM) -> None:
        """What the finished model shows of itself, beside what the sweep measures."""
        model.source = cell.name
        made = diagnose(
            model,
            self.plan.text.corpus,
            max_tokens=self.plan.recipe.sequence,
            measures=self.plan.measures,
            progress=lambda what, done, of: self.tell(f"{cell.name}: {what}", done, of),
        )
        made.save(self.folder / "diagnoses" / f"{cell.name}.nc")

    def gather(self) -> SweepLosses:
        """Everything that was measured so far, as `sweep.nc`."""
        with FileLock(self.folder / "locks" / RESULT):
            losses = gather(self.folder)
            losses.save(self.folder / RESULT)
        return losses
