"""What of loop r-1 survives in loop r beyond what the embeddings give, in nats.

The state that loop r-1 handed on falls into one of a few clusters. With E the embeddings of a token and of the one
before, and S a state of loop r,

    information = NLL(cluster | E) - NLL(cluster | E, S),

both losses held out and both of linear probes: conditional information as far as a linear reader can use it (Xu et al.
2020). It misses what such a reader cannot use, and it counts what E holds in a form that it cannot use, where S repeats
that in another form.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from loopdiag.probing.examples import Examples, Read
from loopdiag.probing.reading import BothPlaces, Pair, moved, together
from loopdiag.probing.runs import BASELINE, CONTROL, FLOOR_BASELINE, SCORE, Found, Run
from loopdiag.probing.states import EMBEDDING

CLUSTERS = 32
HANDED_ON = "hook_out"


class Clusters:
    """k-means clusters of standardised states.

    Args:
        states: What to find the centres on [place, width].
        seed: Of the first centres.
    """

    def __init__(self, states: np.ndarray, seed: int) -> None:
        self.count = min(CLUSTERS, len(np.unique(states, axis=0)))
        self._found = make_pipeline(StandardScaler(), KMeans(self.count, n_init=3, random_state=seed)).fit(states)

    def __call__(self, states: Pair) -> Pair:
        """The cluster of each state, of both halves."""
        fit, report = (self._found.predict(half) for half in states)
        return fit, report


def beside(*states: Pair) -> Pair:
    """Several states of each place as one."""
    fit, report = (np.hstack(each) for each in zip(*states, strict=True))
    return fit, report


def dealt(states: Pair, seed: int) -> Pair:
    """The states of each half at other places of it, drawn at random: they say nothing of where they stand."""
    random = np.random.default_rng(seed)
    fit, report = (half[random.permutation(len(half))] for half in states)
    return fit, report


def information(examples: Examples, given: Read, known: Pair, states: Pair) -> tuple[Read, np.ndarray]:
    """What a probe reads that is given states beside what is known, and its information in nats by document.

    Args:
        examples: Labels of the places.
        given: What is read from what is known alone.
        known: What is known of each place.
        states: What is asked for its information.
    """
    read = examples.probe(beside(known, states))
    return read, given.nll - read.nll


def read_carried(run: Run, places: BothPlaces, sources: np.ndarray, whose: dict[str, int]) -> Iterator[Found]:
    """Information of every hook of loops 2.. on the state that the loop before handed on.

    Args:
        run: The model and its documents.
        places: Where.
        sources: Cluster of each of the fitted places.
        whose: Names of the targets: the state of the token so many to the left.
    """
    later = range(2, run.n_loops + 1)
    points = [(hook, loop) for hook, loops in run.loops_of.items() for loop in loops if loop > 1]
    of = len(whose) * (3 * len(points) + 2 * len(later))
    kept = sorted({EMBEDDING, *points, *((HANDED_ON, loop - 1) for loop in later)})
    from_where = {name: moved(places, left) for name, left in whose.items()}
    for kind, states in run.states(together(*from_where.values()), kept):
        known = beside(*(states.at(EMBEDDING, there) for there in from_where.values()))
        for loop in later:
            handed = (HANDED_ON, loop - 1)
            clusters = Clusters(states.at(handed, places)[0], run.seed)
            for name, there in from_where.items():
                examples = Examples(places, clusters(states.at(handed, there)), sources, clusters.count)
                given = examples.probe(known)
                run.count("probing", of=of)
                alone = BASELINE if kind == SCORE else FLOOR_BASELINE
                yield Found(alone, name, None, loop, None, given.nll, given.C, given.unconverged)
                for hook in (hook for hook, at in points if at == loop):
                    x = states.at((hook, loop), places)
                    asked = {kind: x} | ({CONTROL: dealt(x, run.seed)} if kind == SCORE else {})
                    for what, state in asked.items():
                        read, nats = information(examples, given, known, state)
                        run.count("probing", of=of)
                        yield Found(what, name, hook, loop, nats, read.nll, read.C, read.unconverged)
