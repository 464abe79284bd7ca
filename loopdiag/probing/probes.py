"""Probe a model: every target at every hook and loop, beside a control task and random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr

from loopdiag.corpus import Corpus
from loopdiag.diagnosis import checked_max_tokens
from loopdiag.model.decoder import LoopedLM
from loopdiag.probing.carried import CLUSTERS, read_carried
from loopdiag.probing.examples import draw_examples, sources_of
from loopdiag.probing.labels import read_labels
from loopdiag.probing.linear import FOLDS, STRENGTHS
from loopdiag.probing.reading import Halves, Pair, Reading, draw_places, read
from loopdiag.probing.runs import BASELINE, CONTROL, FLOOR, FLOOR_BASELINE, SCORE, Found, Run
from loopdiag.probing.states import points_of
from loopdiag.probing.suites import SUITES, Target
from loopdiag.results import about_machine, about_model
from loopdiag.scores import SCHEMA, UNITS, ProbeScores, ScoresError

HOOKS = ("hook_in", "hook_out")


def probe(
    model: LoopedLM,
    corpus: Corpus,
    suite: str | Sequence[Target],
    *,
    hooks: Sequence[str] = HOOKS,
    n_loops: int | None = None,
    places: int = 32,
    classes: int = 64,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProbeScores:
    """Read targets from the states of each loop by linear probes.

    Probes are fitted on the corpus' `fit` documents, where their regularisation is chosen, too, and scored on its
    `report` documents. Every loop, hook, control task and random model is probed at the same places in the same way, so
    that scores are paired.

    Args:
        model: A model with a tokenizer.
        corpus: Documents; those longer than `max_tokens` are cut and counted.
        suite: A name of `SUITES`, or targets of your own.
        hooks: Where to read, by names without the loop; each is read in every loop that has it.
        n_loops: Loops to run; the trained number when None.
        places: Places of a document at most, drawn once for each target.
        classes: Labels of a target at most, the most frequent of the `fit` documents; of the rest, no place is taken.
        max_tokens: Longest document in tokens; what the model was made for, at most 2,048, when None.
        batch_size: Documents of a batch.
        seed: Of places, control tasks, random weights and clusters, and of a random initial state.
        progress: Called with (what is being done, documents or probes done, of how many).

    Raises:
        ValueError: `n_loops` or `batch_size` below 1, or `places` or `classes` out of range.
        ScoresError: An unknown suite or hook, no tokenizer, `max_tokens` beyond the model, text without labels, or too
            few sources.
    """
    targets = _targets(suite)
    name = suite if isinstance(suite, str) else "targets of your own"
    n_loops = model.cfg.n_loops if n_loops is None else n_loops
    if places < 1 or classes < 2:
        raise ValueError(f"places = {places}, classes = {classes} are not allowed: give 1 and 2, or more.")
    if model.wiring.rewired:
        raise ScoresError("The model is inside an intervention that changes its loops: probe it outside.")
    if not targets and n_loops < 2:
        raise ScoresError(f"{name} needs two loops or more, and this run has {n_loops}.")
    model.ensure_loops(n_loops)
    loops_of = points_of(model, n_loops, hooks)
    max_tokens = checked_max_tokens(model, corpus, max_tokens, ScoresError)
    everything = (
        read(corpus.fit, model.tokenizer, max_tokens),
        read(corpus.report, model.tokenizer, max_tokens),
    )
    halves, unlabelled = _labelled(everything, targets)
    run = Run(model, n_loops, halves, loops_of, batch_size, seed, progress or (lambda what, done, of: None))
    probes, said = _labels(run, targets, places, classes) if targets else _carried(run, places)
    found = list(probes)
    fit, report = halves
    provenance = {
        "schema": SCHEMA,
        "suite": name,
        "unit": "accuracy" if targets else "information",
        "model": model.source,
        **about_model(model),
        "trained_loops": model.cfg.n_loops,
        "run_loops": n_loops,
        "hooks": list(hooks),
        "targets": said,
        "places": places,
        "strengths": STRENGTHS,
        "folds": FOLDS,
        "unconverged": sum(each.unconverged for each in found),
        "absent": {
            hook: f"loops {', '.join(map(str, sorted(missing)))} have no {hook}"
            for hook, loops in loops_of.items()
            if (missing := set(range(1, n_loops + 1)) - set(loops))
        },
        "corpus": corpus.name,
        "corpus_sha256": corpus.fingerprint,
        "documents": len(report),
        "documents_fit": len(fit),
        "documents_cut": sum(reading.document.cut for reading in report),
        "documents_too_short": len(corpus) - sum(map(len, everything)),
        "documents_unlabelled": unlabelled,
        "sources": len({reading.document.source for reading in report}),
        "max_tokens": max_tokens,
        "seed": seed,
        "batch_size": batch_size,
        **about_machine(),
    }
    return ProbeScores(_dataset(found, report, list(loops_of), provenance))


def _targets(suite: str | Sequence[Target]) -> tuple[Target, ...]:
    """The targets of a suite, checked; none where its labels are made of the states."""
    if isinstance(suite, str):
        if suite not in SUITES:
            raise ScoresError(f"There is no suite {suite!r}: there are {', '.join(SUITES)}.")
        return SUITES[suite]
    targets = tuple(suite)
    if not targets or len({target.name for target in targets}) < len(targets):
        raise ScoresError("suite must be a name, or a list of one target or more, each with its own name.")
    return targets


def _labelled(everything: Halves, targets: Sequence[Target]) -> tuple[Halves, int]:
    """The documents with a label of any target, and how many have none."""
    if not targets:
        return everything, 0
    fit, report = (
        [reading for reading in half if any((target.labels(reading) >= 0).any() for target in targets)]
        for half in everything
    )
    return (fit, report), sum(map(len, everything)) - len(fit) - len(report)


def _labels(run: Run, targets: Sequence[Target], most: int, classes: int) -> tuple[Iterator[Found], list[dict]]:
    """Probes for labels of the text, and what they are asked."""
    drawn = [draw_examples(target, run.halves, most=most, classes=classes, seed=run.seed) for target in targets]
    tasks = {target.name: examples for target, (examples, _) in zip(targets, drawn, strict=True)}
    said = [
        _said(name, examples.n_classes, covered, examples.labels)
        for (name, examples), (_, covered) in zip(tasks.items(), drawn, strict=True)
    ]
    return read_labels(run, tasks), said


def _carried(run: Run, most: int) -> tuple[Iterator[Found], list[dict]]:
    """Probes for the state of the loop before, and what they are asked."""
    left = max(1, run.model.cfg.offset)
    whose = {"Z(i)": 0, f"Z(i-{left})": left}
    fit, report = (
        draw_places([np.arange(len(reading.ids)) >= left for reading in half], most, (run.seed, index))
        for index, half in enumerate(run.halves)
    )
    sources = sources_of(run.halves[0], fit)
    asked = (sources, np.concatenate(report))
    return read_carried(run, (fit, report), sources, whose), [_said(name, CLUSTERS, 1.0, asked) for name in whose]


def _said(name: str, classes: int, coverage: float, rows: Pair) -> dict[str, Any]:
    fit, report = map(len, rows)
    return {"target": name, "classes": classes, "coverage": coverage, "places_fit": fit, "places_report": report}


def _dataset(
    found: Sequence[Found], report: Sequence[Reading], hooks: list[str], provenance: dict[str, Any]
) -> xr.Dataset:
    """Everything that the probes gave as one dataset."""
    targets = list(dict.fromkeys(each.target for each in found))
    loops = sorted({each.loop for each in found if each.loop is not None})
    sizes = {"target": len(targets), "hook": len(hooks), "loop": len(loops), "document": len(report)}
    unit = UNITS[provenance["unit"]]
    variables: dict[str, Any] = {}
    for each in found:
        place: dict[str, Any] = {
            "target": targets.index(each.target),
            "hook": slice(None) if each.hook is None else hooks.index(each.hook),
            "loop": slice(None) if each.loop is None else loops.index(each.loop),
        }
        if each.kind in (BASELINE, FLOOR_BASELINE):
            del place["hook"]
        what, prefix = _MEANING[each.kind], "" if each.kind == SCORE else f"{each.kind}_"
        for name, values, dims, about in (
            (each.kind, each.score, (*place, "document"), {"units": unit, "long_name": f"score of {what}"}),
            (
                f"{prefix}nll",
                each.nll,
                (*place, "document"),
                {"units": "nats per token", "long_name": f"loss of {what}"},
            ),
            (f"{prefix}C", each.C, tuple(place), {"units": "1", "long_name": f"inverse regularisation of {what}"}),
        ):
            if values is not None:
                new = (dims, np.full([sizes[dim] for dim in dims], np.nan), about)
                variables.setdefault(name, new)[1][tuple(place.values())] = values
    coords = {
        "target": targets,
        "hook": hooks,
        "loop": loops,
        "document": [reading.document.name for reading in report],
        "source": ("document", [reading.document.source for reading in report]),
    }
    return xr.Dataset(variables, coords, {"provenance": json.dumps(provenance, sort_keys=True)})


_MEANING = {
    SCORE: "the probe",
    CONTROL: "the same probe on the control task",
    FLOOR: "the same probe on random weights",
    BASELINE: "a reader without the state",
    FLOOR_BASELINE: "a reader without the state, on random weights",
}
