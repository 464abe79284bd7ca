"""What is probed for: labels of every token, and the suites that `loopdiag probe` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int

from loopdiag.probing.python import INSIDE, KINDS, LEVELS, token_labels
from loopdiag.probing.reading import Reading
from loopdiag.scores import ScoresError


@dataclass(frozen=True)
class Target:
    """Something to read from a state.

    Attributes:
        name: In tables and figures.
        labels: From a document to the label of every token, an integer >= 0, or -1 where it has none.
        names: Of the labels, where they have names.
    """

    name: str
    labels: Callable[[Reading], Int[np.ndarray, " pos"]]
    names: tuple[str, ...] | None = None


def token_at(reading: Reading, distance: int) -> Int[np.ndarray, " pos"]:
    """The token so many places to the right of each (to the left where negative); -1 where the document has none."""
    labels = np.full(len(reading.ids), -1)
    places = np.arange(len(reading.ids)) + distance
    there = (places >= 0) & (places < len(reading.ids))
    labels[there] = reading.ids[places[there]]
    return labels


def code_label(reading: Reading, name: str) -> Int[np.ndarray, " pos"]:
    """One of the labels of `python.token_labels`.

    Raises:
        ScoresError: The tokenizer does not say where its tokens stand.
    """
    if reading.spans is None:
        raise ScoresError("code_structure needs a tokenizer that says where its tokens stand (a fast one).")
    return token_labels(reading)[name]


def _token(distance: int) -> Target:
    return Target(f"token i{distance:+d}" if distance else "token i", partial(token_at, distance=distance))


def _code(title: str, name: str, names: tuple[str, ...]) -> Target:
    return Target(title, partial(code_label, name=name), names)


SUITES: dict[str, tuple[Target, ...]] = {
    "position_identity": tuple(_token(distance) for distance in (0, -1, 1)),
    "code_structure": (
        _code("bracket depth", "depth", LEVELS),
        _code("indentation", "indentation", LEVELS),
        _code("token kind", "kind", KINDS),
        _code("in string or comment", "inside", INSIDE),
    ),
    "lookahead": tuple(_token(distance) for distance in (2, 3)),
    "carried_information": (),  # its labels are made of the states themselves
}
