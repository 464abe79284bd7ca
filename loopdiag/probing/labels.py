"""Probes for labels of the text: accuracy by hook and loop."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopdiag.probing.examples import Examples, Read
from loopdiag.probing.reading import at_places, together
from loopdiag.probing.runs import BASELINE, CONTROL, SCORE, Found, Run
from loopdiag.probing.states import EMBEDDING


def read_labels(run: Run, tasks: dict[str, Examples]) -> Iterator[Found]:
    """Accuracies of every target at every hook and loop, of its control task, and with random weights.

    Args:
        run: The model and its documents.
        tasks: Places and labels of each target.
    """
    points = [EMBEDDING, *((hook, loop) for hook, loops in run.loops_of.items() for loop in loops)]
    controls = {}
    for index, (name, examples) in enumerate(tasks.items()):
        plain = examples.frequencies()
        yield Found(BASELINE, name, None, None, plain.accuracy, plain.nll)
        fit, report = (
            at_places([reading.ids for reading in half], here)
            for half, here in zip(run.halves, examples.places, strict=True)
        )
        controls[name] = examples.control((fit, report), run.model.cfg.vocab_size, (run.seed, index))
    for kind, states in run.states(together(*(examples.places for examples in tasks.values())), points):
        for name, examples in tasks.items():
            asked = {kind: examples} | ({CONTROL: controls[name]} if kind == SCORE else {})
            embedding = states.at(EMBEDDING, examples.places)
            of_embedding: dict[str, Read] = {}
            for hook, loop in points:
                x = states.at((hook, loop), examples.places)
                known = bool(of_embedding) and all(map(np.array_equal, x, embedding))  # what enters loop 1
                for what, labelled in asked.items():
                    read = of_embedding[what] if known else labelled.probe(x)
                    of_embedding.setdefault(what, read)
                    run.count("probing", of=3 * len(tasks) * len(points))
                    unconverged = 0 if known else read.unconverged
                    yield Found(what, name, hook or None, loop, read.accuracy, read.nll, read.C, unconverged)
