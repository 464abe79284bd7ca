"""Intervals: over documents a percentile bootstrap, clustered by source and paired across loops; over seeds t."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

DRAWS = 2000


def resampled_means(
    values: Float[np.ndarray, "document ..."], sources: Sequence[str] | np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, "draw ..."]:
    """Means over documents of bootstrap resamples of whole sources.

    The same seed draws the same sources, so columns are paired, and so are calls. What the spread leaves out: the
    training seed, and everything else that made the model.

    Args:
        values: One row per document; NaN stays NaN in its column.
        sources: Each document's cluster.
        draws: Resamples.
        seed: Of the draws.

    Example:
        Two sources of two documents: only their means, 1.5 and 3.5, and the mean of both can come out.

        >>> draws = resampled_means(np.array([1.0, 2.0, 3.0, 4.0]), ["a", "a", "b", "b"])
        >>> np.unique(draws)
        array([1.5, 2.5, 3.5])
    """
    _, cluster = np.unique(np.asarray(sources), return_inverse=True)
    n_clusters = int(cluster.max()) + 1
    picks = np.random.default_rng(seed).multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws)
    sums = np.zeros((n_clusters, *values.shape[1:]))
    np.add.at(sums, cluster, values)
    counts = picks @ np.bincount(cluster)
    return np.tensordot(picks, sums, axes=1) / counts.reshape(-1, *[1] * (values.ndim - 1))


def resampled_nanmeans(
    values: Float[np.ndarray, "document ..."], sources: Sequence[str] | np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, "draw ..."]:
    """`resampled_means` over the documents that have a value; NaN where a resample has none of them."""
    there = ~np.isnan(values)
    if there.all():
        return resampled_means(values, sources, draws, seed)
    sums, counts = (
        resampled_means(part.astype(float), sources, draws, seed) for part in (np.where(there, values, 0.0), there)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts


def interval(draws: Float[np.ndarray, "draw ..."]) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval."""
    low, high = np.percentile(draws, (2.5, 97.5), axis=0)
    return low, high


def student_interval(values: Float[np.ndarray, "seed ..."]) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % t interval of the mean over seeds; NaN where fewer than two seeds have a value.

    Args:
        values: One row per seed, NaN where a seed has none.

    Example:
        Three seeds with mean 2 and standard error 1 / sqrt(3); t with two degrees of freedom is 4.303.

        >>> low, high = student_interval(np.array([1.0, 2.0, 3.0]))
        >>> f"{low:.2f} to {high:.2f}"
        '-0.48 to 4.48'
    """
    there = np.isfinite(values)
    n = there.sum(0)
    enough = n > 1
    filled = np.where(there, values, 0.0)
    mean = filled.sum(0) / np.maximum(n, 1)
    squares = np.where(there, (filled - mean) ** 2, 0.0).sum(0)
    n = np.where(enough, n, 2)
    half = np.where(enough, stats.t.ppf(0.975, n - 1) * np.sqrt(squares / (n - 1) / n), np.nan)
    return mean - half, mean + half
