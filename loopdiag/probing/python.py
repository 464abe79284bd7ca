"""Where in a Python program each token stands, by Python's own tokenizer."""

from __future__ import annotations

import io
import keyword
import tokenize
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from loopdiag.probing.reading import Reading

KINDS = ("space", "keyword", "name", "number", "string", "operator", "comment")
DEEPEST = 4  # this deep and deeper is one class
LEVELS = (*map(str, range(DEEPEST)), f"{DEEPEST} and more")
INSIDE = ("code", "string or comment")
_SPACE, _STRING, _COMMENT = KINDS.index("space"), KINDS.index("string"), KINDS.index("comment")
# From Python 3.12 on an f-string comes in parts. Here it is one string, as before, whatever its braces hold.
_OPENS, _CLOSES = (
    {getattr(tokenize, f"{letter}STRING_{end}", None) for letter in "FT"} - {None} for end in ("START", "END")
)


@dataclass(frozen=True, eq=False)
class CodeLabels:
    """Labels of every character of a text.

    Attributes:
        kind: Index into `KINDS`: of the Python token that it is part of, or space.
        indentation: Of the logical line, in levels from 0.
        depth: Brackets that are open after it.
        reach: Characters from the start that have labels; the tokenizer gave up after them.
    """

    kind: Int[np.ndarray, " character"]
    indentation: Int[np.ndarray, " character"]
    depth: Int[np.ndarray, " character"]
    reach: int


def code_labels(text: str, upto: int | None = None) -> CodeLabels:
    """Label the characters of a text, as far as Python's tokenizer can read it, or as far as is asked for."""
    upto = len(text) if upto is None else upto
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    kind, indentation, depth = (np.zeros(len(text), int) for _ in range(3))
    level = brackets = strings = string_start = reach = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
            start, end = (min(starts[row - 1] + column, len(text)) for row, column in (token.start, token.end))
            if token.type == tokenize.ERRORTOKEN:
                break
            if start >= upto and not strings:
                reach = upto
                break
            if token.type in (tokenize.INDENT, tokenize.DEDENT):
                level += 1 if token.type == tokenize.INDENT else -1
                continue
            if token.type in _OPENS:
                string_start, strings = (start if not strings else string_start), strings + 1
            elif token.type in _CLOSES:
                strings -= 1
                if not strings:
                    kind[string_start:end] = _STRING
            elif not strings:
                kind[start:end] = _kind(token)
                if token.type == tokenize.OP:
                    brackets += (token.string in "([{") - (token.string in ")]}")
            # To the end of the text, of which the next token takes its own: white space is of the token before.
            if token.type not in (tokenize.NL, tokenize.ENDMARKER):
                indentation[start:] = level
            depth[max(end - 1, 0) :] = brackets
            reach = max(reach, end)
    except (tokenize.TokenError, SyntaxError):
        pass
    return CodeLabels(kind, indentation, depth, int(reach))


def _kind(token: tokenize.TokenInfo) -> int:
    if token.type == tokenize.NAME:
        return KINDS.index("keyword" if keyword.iskeyword(token.string) else "name")
    named = {
        tokenize.NUMBER: "number",
        tokenize.STRING: "string",
        tokenize.OP: "operator",
        tokenize.COMMENT: "comment",
    }
    return KINDS.index(named.get(token.type, "space"))


def token_labels(reading: Reading) -> dict[str, Int[np.ndarray, " pos"]]:
    """`kind`, `indentation`, `depth` and `inside` of every model token; -1 where it has none.

    A token that is part of several things has the label of its first character that is not white space, or of its first
    where all are; `depth` is that after its last. Nothing has a label in a text that Python cannot tokenise as far as
    the model reads it.

    Raises:
        ValueError: The tokenizer does not say where its tokens stand.
    """
    if reading.spans is None:
        raise ValueError("token_labels: the tokenizer does not say where in the text its tokens stand.")
    spans, text = reading.spans, reading.text
    labels = code_labels(text, int(spans[:, 1].max()))
    there = spans[:, 1] > spans[:, 0]  # special tokens are no part of the text
    found = {name: np.full(len(spans), -1) for name in ("kind", "indentation", "depth", "inside")}
    if labels.reach < spans[:, 1].max():
        return found
    firsts = [start + len(piece) - len(piece.lstrip()) for start, piece in ((s, text[s:e]) for s, e in spans)]
    first = np.where(np.array(firsts) < spans[:, 1], firsts, spans[:, 0])[there]
    found["kind"][there] = labels.kind[first]
    found["indentation"][there] = np.minimum(labels.indentation[first], DEEPEST)
    found["depth"][there] = np.clip(labels.depth[spans[there, 1] - 1], 0, DEEPEST)
    found["inside"][there] = np.isin(labels.kind[first], (_STRING, _COMMENT))
    return found
