"""What each exit says of each token of a document, to be read beside the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loopdiag.measures.prediction import nll_of, per_token
from loopdiag.trace import LoopTrace

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character yet
MOST_PIECES = 4  # bytes of a character in UTF-8, so the tokens that it can fall on
NO_NUL = {0: "\N{SYMBOL FOR NULL}"}  # files of results end a text at a NUL


@dataclass(frozen=True)
class TokenExits:
    """The tokens of one document, and what each exit says of them. Token 0 is given, and nothing is said of it.

    Attributes:
        loops: Numbers of the exits, 0 first, as the trace kept them.
        text: Each token's text; together they are the document, as far as the tokenizer gives it back. A character of
            several tokens stands at the last of them, and "" at the others. NUL reads ␀.
        nll: -log p^(r)(token), given the tokens before it, in nats; NaN at token 0.
        top: By loop, the likeliest token in each place (the first of equals); "" at token 0 and where the prediction is
            not finite, � where the token is a piece of a character.
    """

    loops: tuple[int, ...]
    text: tuple[str, ...]
    nll: Float[Tensor, "loop token"]
    top: tuple[tuple[str, ...], ...]


@torch.no_grad()
def by_token(trace: LoopTrace, tokenizer: Any) -> list[TokenExits]:
    """Every document of a batch, token by token; padding is left out.

    Args:
        trace: The batch.
        tokenizer: The model's, of transformers.

    Raises:
        ValueError: The trace has no head or no tokens.
    """
    series = per_token(trace, trace.readout, _exits_of)
    ids = trace.input_ids
    assert ids is not None  # else `per_token` has refused

    @cache
    def alone(token: int) -> str:
        # The second of two: in front of the first, some tokenizers leave out the space.
        once, twice = (_decoded(tokenizer, [token] * count) for count in (1, 2))
        return twice[len(once) :]

    found = []
    for document, real in enumerate(trace.mask):
        nll, best = (series[name][:, document, real][:, :-1].cpu() for name in ("nll", "best"))
        first = torch.full((len(nll), 1), float("nan"), dtype=nll.dtype)
        top = tuple(
            ("", *(alone(token) if known else "" for token, known in zip(row, finite, strict=True)))
            for row, finite in zip(best.tolist(), nll.isfinite().tolist(), strict=True)
        )
        text = tuple(token_texts(ids[document, real].tolist(), tokenizer))
        found.append(TokenExits(trace.loops, text, torch.cat((first, nll), dim=1), top))
    return found


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token's text in a document, as in `TokenExits`."""
    texts: list[str] = []
    told = 0  # tokens whose text is out
    before = 0  # where the tokens begin that the next are decoded after: a space may depend on them
    for place in range(1, len(ids) + 1):
        known = _decoded(tokenizer, ids[before:told])
        now = _decoded(tokenizer, ids[before:place])
        waits = now.endswith(UNFINISHED) and place - told < MOST_PIECES and place < len(ids)
        if waits or len(now) <= len(known):
            texts.append("")
        else:
            texts.append(now[len(known) :])
            before, told = told, place
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).translate(NO_NUL) if ids else ""


def _exits_of(logits: Float[Tensor, "loop token vocab"], targets: Tensor) -> dict[str, Tensor]:
    return {"nll": nll_of(logits.log_softmax(-1), targets), "best": logits.argmax(-1)}
