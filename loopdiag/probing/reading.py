"""Documents as a model reads them, and which places of them are probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from loopdiag.corpus import Document, TokenDocument, tokenize
from loopdiag.corpus.batching import beginning


@dataclass(frozen=True, eq=False)
class Reading:
    """One document as the model reads it.

    Attributes:
        document: Its tokens, cut where the model stops reading.
        text: The whole text.
        ids: The tokens [pos].
        spans: Where each token starts and ends in the text, in characters; None where the tokenizer cannot say.
    """

    document: TokenDocument
    text: str
    ids: Int[np.ndarray, " pos"]
    spans: Int[np.ndarray, "pos 2"] | None


def read(documents: Sequence[Document], tokenizer: Any, max_tokens: int) -> list[Reading]:
    """Tokenise documents as a diagnosis does, and say where in the text each token stands."""
    tokens = tokenize(documents, tokenizer, max_tokens)
    texts = {document.name: document.text for document in documents}
    spans: list[np.ndarray | None] = [None] * len(tokens)
    if tokens and tokenizer.is_fast:
        read_of = [beginning(texts[each.name], max_tokens) for each in tokens]
        encoded = tokenizer(read_of, return_offsets_mapping=True, verbose=False)
        ends = (len(each.input_ids) for each in tokens)
        spans = [np.array(each[:end]) for each, end in zip(encoded["offset_mapping"], ends, strict=True)]
    return [
        Reading(each, texts[each.name], np.array(each.input_ids), span)
        for each, span in zip(tokens, spans, strict=True)
    ]


Places = list[Int[np.ndarray, " place"]]  # of each document, ascending
BothPlaces = tuple[Places, Places]  # of the documents to fit on, and of those to report on
Halves = tuple[list[Reading], list[Reading]]
Pair = tuple[np.ndarray, np.ndarray]  # likewise, a row for each place of all documents


def draw_places(eligible: Sequence[np.ndarray], most: int, seed: Sequence[int]) -> Places:
    """At most so many places of each document, drawn without repetition among those that are eligible [pos] (bool)."""
    drawn = []
    for index, mask in enumerate(eligible):
        there = np.flatnonzero(mask)
        picks = np.random.default_rng((*seed, index)).permutation(len(there))[:most]
        drawn.append(np.sort(there[picks]))
    return drawn


def at_places(values: Sequence[np.ndarray], places: Places) -> np.ndarray:
    """What stands at the places of each document [pos], one document after the other."""
    return np.concatenate([each[here] for each, here in zip(values, places, strict=True)])


def moved(places: BothPlaces, left: int) -> BothPlaces:
    """The places so many tokens to the left."""
    fit, report = ([here - left for here in half] for half in places)
    return fit, report


def together(*places: BothPlaces) -> BothPlaces:
    """All places that are in any, by half and document."""
    fit, report = (
        [np.unique(np.concatenate(each)) for each in zip(*half, strict=True)] for half in zip(*places, strict=True)
    )
    return fit, report


def document_means(values: np.ndarray, places: Places) -> np.ndarray:
    """Means by document of one value for each place; NaN where a document has no place."""
    counts = np.array([len(each) for each in places])
    sums = np.bincount(np.repeat(np.arange(len(places)), counts), values, minlength=len(places))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
