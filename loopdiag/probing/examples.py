"""Labelled places of both halves: probes are fitted on the one and scored on the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from sklearn.dummy import DummyClassifier
from sklearn.pipeline import make_pipeline

from loopdiag.probing.linear import FOLDS, Probe, fit_probe
from loopdiag.probing.reading import (
    BothPlaces,
    Halves,
    Pair,
    Places,
    Reading,
    at_places,
    document_means,
    draw_places,
)
from loopdiag.probing.suites import Target
from loopdiag.scores import ScoresError


@dataclass(frozen=True, eq=False)
class Read:
    """What a probe reads on the `report` documents.

    Attributes:
        accuracy: Share of a document's places whose likeliest class is the label.
        nll: Mean negative log probability of the label, in nats.
        C: The probe's inverse strength of the regularisation; NaN of one without a state.
        unconverged: How many of its fits did not converge.
    """

    accuracy: Float[np.ndarray, " document"]
    nll: Float[np.ndarray, " document"]
    C: float
    unconverged: int


@dataclass(frozen=True, eq=False)
class Examples:
    """Places of both halves and their labels.

    Attributes:
        places: By half and document.
        labels: 0 to n_classes - 1, one document after the other.
        sources: Cluster of each of the fitted places.
        n_classes: Classes in all.
    """

    places: BothPlaces
    labels: Pair
    sources: np.ndarray
    n_classes: int

    def probe(self, states: Pair) -> Read:
        """Fit on the one half and read the other."""
        probe = fit_probe(states[0], self.labels[0], self.sources, self.n_classes)
        return self._read(probe, states[1])

    def frequencies(self) -> Read:
        """What the classes' frequencies in the fitted half say, without a state."""
        nothing = [np.zeros((len(labels), 1)) for labels in self.labels]
        guess = make_pipeline(DummyClassifier()).fit(nothing[0], self.labels[0])
        return self._read(Probe(guess, np.nan, self.n_classes), nothing[1])

    def control(self, tokens: Pair, vocabulary: int, seed: Sequence[int]) -> Examples:
        """The control task of Hewitt and Liang (2019): every token of the vocabulary has a label drawn at random.

        It is drawn from the frequencies of the labels in the fitted half, once for all places, so that it can be
        learned by heart and in no other way.

        Args:
            tokens: The tokens at the places.
            vocabulary: Its size.
            seed: Of the draws.
        """
        share = np.bincount(self.labels[0], minlength=self.n_classes) / len(self.labels[0])
        label = np.random.default_rng(seed).choice(self.n_classes, size=vocabulary, p=share)
        return replace(self, labels=(label[tokens[0]], label[tokens[1]]))

    def _read(self, probe: Probe, states: np.ndarray) -> Read:
        right, nll = probe.score(states, self.labels[1])
        places = self.places[1]
        return Read(document_means(right, places), document_means(nll, places), probe.C, probe.unconverged)


def draw_examples(target: Target, halves: Halves, *, most: int, classes: int, seed: int) -> tuple[Examples, float]:
    """Places to probe for a target, the same for every state; and the share of its labels that are among the classes.

    The most frequent labels of the `fit` documents are the classes; places with another one are left out.

    Args:
        target: What to read.
        halves: Documents to fit on and to report on.
        most: Places of a document at most.
        classes: Classes at most.
        seed: Of the draws.

    Raises:
        ScoresError: The target has fewer than two labels in the `fit` documents, or those have too few sources.
    """
    labels = [[target.labels(reading) for reading in half] for half in halves]
    counts = Counter(label for each in labels[0] for label in each[each >= 0].tolist())
    kept = sorted(counts, key=lambda label: (-counts[label], label))[:classes]
    index = {label: place for place, label in enumerate(kept)}
    known = [[np.array([index.get(label, -1) for label in each.tolist()]) for each in half] for half in labels]
    covered, labelled = (sum(int((each >= 0).sum()) for each in half) for half in (known[1], labels[1]))
    if len(kept) < 2 or not covered:
        raise ScoresError(
            f"{target.name!r} has {len(kept)} labels in the fit documents, and {covered} places with one of them in "
            "the report documents: a probe needs two labels, and places to read them at. Is this the right text?"
        )
    places = [draw_places([each >= 0 for each in half], most, (seed, at)) for at, half in enumerate(known)]
    y = [at_places(half, here) for half, here in zip(known, places, strict=True)]
    sources = sources_of(halves[0], places[0])
    return Examples((places[0], places[1]), (y[0], y[1]), sources, len(kept)), covered / labelled


def sources_of(readings: Sequence[Reading], places: Places) -> np.ndarray:
    """The cluster of each place.

    Raises:
        ScoresError: There are too few for folds.
    """
    sources = np.repeat([reading.document.source for reading in readings], [len(each) for each in places])
    if len(set(sources)) < FOLDS:
        raise ScoresError(
            f"Probes are fitted on documents of at least {FOLDS} sources, and were given {len(set(sources))}: "
            "give more."
        )
    return sources
