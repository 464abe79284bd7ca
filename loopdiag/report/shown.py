"""Documents token by token: what each loop changed, for the page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopdiag.diagnosis import Diagnosis

SMALL, LARGE = 0.1, 1.0  # nats; below the first nothing changed, from the second on much did
DIGITS = 2  # of nats, after the point
MOST_TOKENS = 600  # of a document on a page
KINDS = {"H": "helped much", "h": "helped", "": "unchanged", "b": "harmed", "B": "harmed much"}


@dataclass(frozen=True)
class Token:
    """A token's text, and a class for each loop that changed its NLL: its kind and the loop."""

    text: str
    classes: str


@dataclass(frozen=True)
class ShownDocument:
    """A document as the page shows it.

    Attributes:
        name: The document's.
        tokens: Its first tokens.
        left_out: How many follow.
        shares: By loop, the share of each kind of `KINDS` among the tokens that are shown.
        data: What the page looks up when a token is chosen: by exit and token `nll` and `top`.
    """

    name: str
    tokens: tuple[Token, ...]
    left_out: int
    shares: dict[int, dict[str, float]]
    data: dict[str, Any]


def kind_of_change(change: float) -> str:
    """A key of `KINDS` for a change of the NLL in nats; unchanged where it is undefined."""
    size = abs(change)
    if not size >= SMALL:
        return ""
    return ("hH" if change < 0 else "bB")[int(size >= LARGE)]


def shown_documents(diagnosis: Diagnosis) -> list[ShownDocument]:
    """The documents that a diagnosis keeps token by token; none without the group `tokens`."""
    if "token_nll" not in diagnosis.data:
        return []
    return [_shown(diagnosis, place) for place in range(diagnosis.data.sizes["shown"])]


def _shown(diagnosis: Diagnosis, place: int) -> ShownDocument:
    data = diagnosis.data.isel(shown=place)
    loops = data["loop"].values.tolist()
    known = np.isfinite(data["token_nll"].values).any(0) | (data["token_text"].values != "")
    length = int(np.flatnonzero(known)[-1]) + 1
    end = min(length, MOST_TOKENS)
    # As the page prints them, so that a token's colour is that of the change that stands beside it.
    nll = data["token_nll"].values[:, :end].astype(float).round(DIGITS)
    changes = np.diff(nll, axis=0).round(DIGITS)
    kinds = np.array([[kind_of_change(each) for each in row] for row in changes])  # [loop - 1, token]
    tokens = tuple(
        Token(text, " ".join(f"{kind}{loop}" for kind, loop in zip(kinds[:, index], loops[1:], strict=True) if kind))
        for index, text in enumerate(data["token_text"].values[:end].tolist())
    )
    shares = {}
    for row, loop in zip(kinds[:, 1:], loops[1:], strict=True):
        counted = Counter(row.tolist())
        shares[int(loop)] = {kind: counted[kind] / max(1, len(row)) for kind in KINDS}
    told = {
        "nll": [[value if np.isfinite(value) else None for value in row] for row in nll.tolist()],
        "top": data["token_top"].values[:, :end].tolist(),
    }
    return ShownDocument(str(data["shown"].item()), tokens, length - end, shares, told)
