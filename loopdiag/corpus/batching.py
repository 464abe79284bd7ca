"""Documents to tokens, tokens to padded batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loopdiag.corpus.documents import CorpusError, Document

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

LONGEST_TOKEN = 256  # characters; hardly any vocabulary has longer ones


@dataclass(frozen=True)
class TokenDocument:
    """One document as tokens.

    Attributes:
        name: The document's name.
        source: The document's source.
        input_ids: Its tokens, special tokens included.
        cut: Whether tokens at its end were left out.
    """

    name: str
    source: str
    input_ids: tuple[int, ...]
    cut: bool


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents of a batch, padded on the right to the longest.

    Attributes:
        input_ids: Tokens, int64, 0 where padded.
        attention_mask: True at real tokens; 0 is an ordinary token id, so only this tells padding.
        names: The documents' names, in the order of the rows.
        sources: The documents' sources, likewise.
    """

    input_ids: Int[Tensor, "document pos"]
    attention_mask: Bool[Tensor, "document pos"]
    names: tuple[str, ...]
    sources: tuple[str, ...]


def tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, max_tokens: int, min_tokens: int = 16
) -> list[TokenDocument]:
    """Tokenise documents, in their order.

    Args:
        documents: Texts.
        tokenizer: The model's; it adds the special tokens that it was made to add.
        max_tokens: Longest document, special tokens included; longer ones keep their first tokens.
        min_tokens: Shortest document; shorter ones are left out, how many is logged.

    Raises:
        CorpusError: `max_tokens` is below `min_tokens`, or every document is too short.
    """
    if max_tokens < min_tokens:
        raise CorpusError(
            f"max_tokens {max_tokens} is out of range: allowed {min_tokens} (the shortest document used) and more."
        )
    if not documents:
        return []
    # verbose=False: documents beyond the model's length are expected, and cut below.
    texts = [beginning(document.text, max_tokens) for document in documents]
    encoded = tokenizer(texts, add_special_tokens=True, verbose=False)
    tokenized = [
        TokenDocument(
            document.name,
            document.source,
            tuple(ids[:max_tokens]),
            cut=len(ids) > max_tokens or len(text) < len(document.text),
        )
        for document, text, ids in zip(documents, texts, encoded["input_ids"], strict=True)
        if len(ids) >= min_tokens
    ]
    if not tokenized:
        raise CorpusError(
            f"none of the {len(documents)} documents has {min_tokens} tokens or more. Give longer documents."
        )
    if n_short := len(documents) - len(tokenized):
        logger.info("%d of %d documents left out: shorter than %d tokens", n_short, len(documents), min_tokens)
    return tokenized


def beginning(text: str, max_tokens: int) -> str:
    """As much of a text as can fall on so many tokens: a giant one is not tokenised for its first page."""
    return text[: max_tokens * LONGEST_TOKEN]


def batches(documents: Sequence[TokenDocument], batch_size: int) -> Iterator[Batch]:
    """Padded batches of `batch_size` documents in the given order; the last may be smaller.

    Raises:
        CorpusError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise CorpusError(f"batch_size {batch_size} is out of range: allowed 1 and more. Try 8.")
    return (_pad(documents[start : start + batch_size]) for start in range(0, len(documents), batch_size))


def one_text(text: str, tokenizer: PreTrainedTokenizerFast | None) -> Batch:
    """A batch of one document, a text as it stands, however short.

    Raises:
        CorpusError: There is no tokenizer, or the text has no token.
    """
    if tokenizer is None:
        raise CorpusError("The model has no tokenizer, so text cannot be read: give a Batch of tokens.")
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise CorpusError("The text is empty: give one of a token or more.")
    return _pad([TokenDocument("text", "text", tuple(ids), cut=False)])


def _pad(documents: Sequence[TokenDocument]) -> Batch:
    import torch

    rows = [torch.tensor(document.input_ids) for document in documents]
    return Batch(
        input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        attention_mask=torch.nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True),
        names=tuple(document.name for document in documents),
        sources=tuple(document.source for document in documents),
    )
