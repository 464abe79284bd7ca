"""What kind of text a token stands for, whatever the tokenizer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

# Byte-level tokenizers write a byte as the character of its number where that is one to see, the others as those from
# 256 on, so a space as Ġ; SentencePiece writes a space as ▁.
_SEEN = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(byte): byte for byte in _SEEN}
_BYTES |= {chr(256 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(_SEEN)))}
# The first pattern that the whole token matches is its class.
_PATTERNS = (
    ("space", r"\s+"),
    ("word", r"\s+[^\W\d]\w*"),
    ("piece", r"[^\W\d]\w*"),
    ("number", r"\s*\d[\d._]*"),
    ("punctuation", r"\s*[^\w\s]+\s*"),
)
TOKEN_CLASSES = (*(name for name, _ in _PATTERNS), "other")


def token_classes(tokenizer: Any, vocab_size: int) -> Int[Tensor, " vocab"]:
    """The class of every token, as an index into `TOKEN_CLASSES`.

    `word` starts with white space and `piece` goes on with (or starts, after punctuation) a word; `number` and
    `punctuation` may have white space before them; `space` is nothing else. Special tokens, bytes that are no text
    alone, mixtures and ids that the tokenizer does not know are `other`.

    Args:
        tokenizer: Of transformers.
        vocab_size: Of the model.
    """
    import torch

    found = torch.full((vocab_size,), len(_PATTERNS))
    written = {token: spelled for spelled, token in tokenizer.get_vocab().items() if token < vocab_size}
    # Tokens that were added are written as they are, and say nothing of how the others are.
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    learned = [spelled for token, spelled in written.items() if token not in added]
    by_bytes = any("Ġ" in spelled for spelled in learned) and not any("▁" in spelled for spelled in learned)
    for token, spelled in written.items():
        text = None if token in tokenizer.all_special_ids else _text(spelled, by_bytes)
        if text is not None:
            matches = (index for index, (_, form) in enumerate(_PATTERNS) if re.fullmatch(form, text))
            found[token] = next(matches, len(_PATTERNS))
    return found


def _text(spelled: str, by_bytes: bool) -> str | None:
    """The text of a token; None for bytes that are no text alone."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", spelled):  # SentencePiece's last resort
        return chr(int(byte[1], 16)) if int(byte[1], 16) < 128 else None
    if not by_bytes or not _BYTES.keys() >= set(spelled):  # tokens that were added are written as they are
        return spelled.replace("▁", " ")
    try:
        return bytes(_BYTES[byte] for byte in spelled).decode()
    except UnicodeDecodeError:
        return None
