"""Linear probes: scikit-learn's logistic regression on standardised states, its strength chosen by folds of sources."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C: the larger, the weaker the regularisation
FOLDS = 2
ITERATIONS = 500
TOLERANCE = 1e-3  # ten times scikit-learn's: below, losses move in the fourth digit only
# Probability that every probe leaves to all classes alike, so that one that a fold lacks costs some nats, not infinity.
SPARED = 1e-3


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        pipeline: Standardisation and classifier.
        C: The chosen inverse strength of the regularisation.
        n_classes: Classes 0 to n_classes - 1, whether or not all of them were seen.
        unconverged: How many of its fits, those of the folds included, did not converge.
    """

    pipeline: Pipeline
    C: float
    n_classes: int
    unconverged: int = 0

    def log_probabilities(self, x: Float[np.ndarray, "token width"]) -> Float[np.ndarray, "token class"]:
        """Log probability of every class, in nats."""
        p = np.zeros((len(x), self.n_classes))
        p[:, self.pipeline.classes_] = self.pipeline.predict_proba(x)
        return np.log((1 - SPARED) * p + SPARED / self.n_classes)

    def score(
        self, x: Float[np.ndarray, "token width"], y: Int[np.ndarray, " token"]
    ) -> tuple[Float[np.ndarray, " token"], Float[np.ndarray, " token"]]:
        """Whether the likeliest class is the label (1 or 0), and the label's negative log probability in nats."""
        log_p = self.log_probabilities(x)
        return (log_p.argmax(1) == y).astype(float), -log_p[np.arange(len(y)), y]


def fit_probe(
    x: Float[np.ndarray, "token width"],
    y: Int[np.ndarray, " token"],
    sources: Sequence[str] | np.ndarray,
    n_classes: int,
) -> Probe:
    """Fit a probe.

    The strength is the one of `STRENGTHS` with the least held-out loss over folds that share no source; states are
    standardised anew in each.

    Args:
        x: States.
        y: Their labels, 0 to n_classes - 1.
        sources: Each token's cluster, at least two different ones.
        n_classes: Classes in all.
    """
    losses, unconverged = dict.fromkeys(STRENGTHS, 0.0), 0
    for inside, outside in GroupKFold(FOLDS).split(x, groups=sources):
        for C in STRENGTHS:
            probe = _fit(x[inside], y[inside], C, n_classes)
            losses[C] += probe.score(x[outside], y[outside])[1].sum()
            unconverged += probe.unconverged
    probe = _fit(x, y, min(STRENGTHS, key=lambda C: losses[C]), n_classes)
    return replace(probe, unconverged=unconverged + probe.unconverged)


def _fit(x: np.ndarray, y: np.ndarray, C: float, n_classes: int) -> Probe:
    one_class = len(np.unique(y)) == 1
    classifier: Any = DummyClassifier() if one_class else LogisticRegression(C=C, tol=TOLERANCE, max_iter=ITERATIONS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # few places, not a regression
        pipeline = make_pipeline(StandardScaler(), classifier).fit(x, y)
    # What has not converged is scored as it is, like everything else, on other documents; and counted.
    unconverged = [each for each in told if issubclass(each.category, ConvergenceWarning)]
    for other in (each for each in told if each not in unconverged):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return Probe(pipeline, C, n_classes, len(unconverged))
