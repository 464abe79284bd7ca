"""The way of each token's state from loop to loop, in the plane that shows most of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from loopdiag.trace import LoopTrace


@dataclass(frozen=True)
class Trajectories:
    """States of one document in the plane of their first two principal components.

    Attributes:
        loops: Numbers of the loops.
        tokens: Places of the tokens in the document.
        points: Where each token's state is, in the unit of N(Y).
        share: Of the variance of these states, what each of the two directions holds, 0 to 1. What happens in the other
            directions is not seen: two states that are close in the plane need not be close.
    """

    loops: tuple[int, ...]
    tokens: tuple[int, ...]
    points: Float[np.ndarray, "loop token plane"]
    share: Float[np.ndarray, " plane"]


def trajectories(
    trace: LoopTrace, document: int = 0, *, tokens: Sequence[int] | None = None, start: bool = False
) -> Trajectories:
    """States N(Y) of a document's tokens after every kept loop, in the plane that holds most of their variance.

    One plane for these tokens and loops: principal components (scikit-learn, in float64) of the states less their mean.

    Args:
        trace: The batch.
        document: Which of it.
        tokens: Places of the tokens, from 0; all real ones when None.
        start: Whether loop 0, what loop 1 starts from, is there, too. It is far from the others, and takes the plane.

    Raises:
        ValueError: Places that the document does not have, or states that do not span a plane, such as those of one
            token after one loop.
    """
    from sklearn.decomposition import PCA

    loops = trace.loops if start else trace.loops[1:]
    states = trace.normed[0 if start else 1 :, document, trace.mask[document]].double().cpu().numpy()
    places = range(states.shape[1]) if tokens is None else tokens
    if not set(places) <= set(range(states.shape[1])):
        raise ValueError(f"tokens = {list(places)} is not allowed: places here are 0 to {states.shape[1] - 1}.")
    states = states[:, list(places)]
    flat = states.reshape(-1, states.shape[-1])
    if min(len(flat) - 1, flat.shape[1]) < 2:
        raise ValueError(
            f"{states.shape[1]} tokens after {len(loops)} loops in {flat.shape[1]} dimensions do not span a plane: "
            "give more tokens, or more loops."
        )
    plane = PCA(2, svd_solver="full").fit(flat)
    points = plane.transform(flat).reshape(*states.shape[:2], 2)
    return Trajectories(loops, tuple(places), points, plane.explained_variance_ratio_)
