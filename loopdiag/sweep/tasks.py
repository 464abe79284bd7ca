"""Synthetic token tasks for training sweeps over loop counts: some where depth is known to help, one where it cannot.

Every row starts with `words[0]` and mixes tokens that nothing can predict (inputs) with answers that follow from the
tokens before them, so that the best possible loss of a row is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopdiag.corpus import Corpus, Document

ROWS = 1024  # drawn at a time
TRAINING, HELD_OUT = 0, 1  # spawn keys

LETTERS, HOPS = 4, 2
# A Latin square whose rows generate S5: under a random one of them any point goes to any other equally likely.
PERMUTATIONS = ((0, 1, 2, 3, 4), (1, 0, 3, 4, 2), (2, 3, 4, 0, 1), (3, 4, 1, 2, 0), (4, 2, 0, 1, 3))
DIGITS, PROBLEMS = 5, 7
KINDS, DEEPEST, PERSISTENCE = 3, 8, 0.75
ZIPF = 1 / np.arange(1, 64) / (1 / np.arange(1, 64)).sum()
UNIGRAM_ENTROPY = float(-(ZIPF * np.log(ZIPF)).sum())  # nats of a token of the task `unigram`


@dataclass(frozen=True)
class Task:
    """A distribution over rows of tokens.

    Attributes:
        name: Key in `TASKS`.
        words: The vocabulary: token t is words[t], and words[0] is the filler that starts every row.
        sequence: Tokens of a row, which is one training sequence; at most 128.
        draw: (generator, n rows) -> [n, sequence] token ids, int64 in [0, len(words)).
        floor: Lowest expected next-token loss of a row, in nats per predicted token: the entropy of the rows.
        description: One line, with source.
    """

    name: str
    words: tuple[str, ...]
    sequence: int
    draw: Callable[[np.random.Generator, int], np.ndarray]
    floor: float
    description: str


def stream(task: Task, tokens: int, seed: int) -> np.ndarray:
    """Training rows, one after the other.

    Args:
        task: What to draw from.
        tokens: At least 1; rounded up to whole rows.
        seed: At least 0; the same seed gives the same rows, and a longer stream starts with the shorter one.

    Returns:
        uint16 token ids [tokens].

    Raises:
        ValueError: No tokens are asked for.
    """
    return _rows(task, math.ceil(tokens / task.sequence), seed, TRAINING).astype(np.uint16).reshape(-1)


def corpus(task: Task, n_documents: int = 512, seed: int = 0) -> Corpus:
    """Held-out rows as documents, each its own source; the first half to fit on, the rest to report on.

    Training and held-out rows come from generators with different spawn keys, which are independent whatever the
    two seeds. That they share no row is as good as sure: in every task two rows are the same with a probability below
    2^-99, so a hundred million training tokens (2^20 rows) meet one of 128 (2^7) held-out rows with one below 2^-72.

    Args:
        task: What to draw from.
        n_documents: In both halves together, at least 1; an odd one is to report on.
        seed: Of the held-out rows, at least 0.

    Raises:
        ValueError: No documents are asked for.
    """
    rows = _rows(task, n_documents, seed, HELD_OUT)
    texts = [" ".join(task.words[token] for token in row) for row in rows]
    names = [f"{task.name}:{index}" for index in range(n_documents)]
    documents = tuple(Document(text, name, source=name) for text, name in zip(texts, names, strict=True))
    return Corpus(task.name, documents[: n_documents // 2], documents[n_documents // 2 :])


def tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """Words between white space to tokens, and nothing added: the text of a document gives its row back."""
    backend = Tokenizer(models.WordLevel({word: token for token, word in enumerate(task.words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def _rows(task: Task, n_rows: int, seed: int, key: int) -> np.ndarray:
    if n_rows < 1:
        raise ValueError(f"{n_rows} rows of {task.name} asked for: allowed are 1 and more.")
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))
    # Always whole chunks, so that the first rows do not depend on how many are wanted.
    chunks = [task.draw(generator, ROWS) for _ in range(math.ceil(n_rows / ROWS))]
    return np.concatenate(chunks)[:n_rows]


def _started(tokens: np.ndarray) -> np.ndarray:
    """[n, pos] with the filler before it: every other token is predicted from something."""
    return np.pad(tokens, ((0, 0), (1, 0)))


def _interleaved(inputs: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """[n, step] inputs and answers, each answer behind its input."""
    return _started(np.stack([inputs, answers], axis=2).reshape(len(inputs), -1))


def _p_hop(generator: np.random.Generator, n_rows: int) -> np.ndarray:
    # No letter twice in a row: a hop from the second would stay where it is.
    steps = generator.integers(1, LETTERS, size=(n_rows, 63))
    steps[:, 0] = generator.integers(LETTERS, size=n_rows)
    letters = steps.cumsum(axis=1) % LETTERS
    # Positions count from 1 and 0 is nowhere, from where every hop leads nowhere.
    rows, after = np.arange(n_rows), np.zeros((n_rows, LETTERS), dtype=np.int64)
    hop = np.zeros((n_rows, 64), dtype=np.int64)
    for position in range(1, 64):
        letter = letters[:, position - 1]
        hop[:, position] = after[rows, letter]
        after[rows, letter] = position + 1
    found = hop
    for _ in range(HOPS - 1):
        found = np.take_along_axis(hop, found, axis=1)
    answers = np.take_along_axis(np.pad(1 + LETTERS + letters, ((0, 0), (1, 0))), found, axis=1)
    return _interleaved(1 + letters, answers[:, 1:])


def _permutations(generator: np.random.Generator, n_rows: int) -> np.ndarray:
    images = np.array(PERMUTATIONS)
    inputs = generator.integers(len(images), size=(n_rows, 63))
    product = np.tile(np.arange(5), (n_rows, 1))
    answers = np.empty_like(inputs)
    for step in range(63):
        # The newest is applied first. Applied last, it would map one answer to the next, and no depth be needed.
        product = np.take_along_axis(product, images[inputs[:, step]], axis=1)
        answers[:, step] = product[:, 0]
    return _interleaved(1 + inputs, 1 + len(images) + answers)


def _addition(generator: np.random.Generator, n_rows: int) -> np.ndarray:
    digits = generator.integers(10, size=(n_rows, PROBLEMS, 2, DIGITS))
    totals = (digits * 10 ** np.arange(DIGITS)).sum(axis=(2, 3))
    answers = totals[..., None] // 10 ** np.arange(DIGITS + 1) % 10
    plus, equals = (np.full((n_rows, PROBLEMS, 1), sign) for sign in (11, 12))
    problems = [1 + digits[:, :, 0], plus, 1 + digits[:, :, 1], equals, 1 + answers]
    return _started(np.concatenate(problems, axis=2).reshape(n_rows, -1))


def _opening(depth: np.ndarray, rising: np.ndarray, left: int) -> np.ndarray:
    """Probability that the next of `left` brackets opens, at a depth, after an opening one (`rising`) or not."""
    free = np.where(rising, PERSISTENCE, 1 - PERSISTENCE)
    return np.where(depth == 0, 1.0, np.where((depth == DEEPEST) | (depth == left), 0.0, free))


def _brackets(generator: np.random.Generator, n_rows: int) -> np.ndarray:
    rows, depth = np.arange(n_rows), np.zeros(n_rows, dtype=np.int64)
    opens = np.ones(n_rows, dtype=bool)
    stack = np.zeros((n_rows, DEEPEST), dtype=np.int64)
    tokens = np.empty((n_rows, 126), dtype=np.int64)
    for position in range(126):
        opens = generator.random(n_rows) < _opening(depth, opens, 126 - position)
        place = np.where(opens, depth, depth - 1)
        stack[rows, place] = np.where(opens, generator.integers(KINDS, size=n_rows), stack[rows, place])
        tokens[:, position] = 1 + stack[rows, place] + np.where(opens, 0, KINDS)
        depth = place + opens
    return _started(tokens)


def _brackets_floor() -> float:
    """Entropy of the kinds of the brackets that open, and of which ones do, by the chances of (depth, rising)."""
    chances = np.zeros((DEEPEST + 1, 2))
    chances[0, 1] = 1.0
    depth, rising = np.arange(DEEPEST + 1)[:, None], np.array([[False, True]])
    nats = 63 * math.log(KINDS)
    for left in range(126, 0, -1):
        opening = _opening(depth, rising, left)
        for chance in (opening, 1 - opening):
            nats -= (chances * chance * np.log(np.maximum(chance, 1e-300))).sum()
        up, down = ((chances * chance).sum(axis=1) for chance in (opening, 1 - opening))
        chances = np.stack([np.roll(down, -1), np.roll(up, 1)], axis=1)
    return nats / 126


def _unigram(generator: np.random.Generator, n_rows: int) -> np.ndarray:
    return _started(generator.choice(np.arange(1, len(ZIPF) + 1), p=ZIPF, size=(n_rows, 126)))


_TASKS = (
    Task(
        "p_hop",
        (".", *"abcdefgh"[:LETTERS], *"ABCDEFGH"[:LETTERS]),
        127,
        _p_hop,
        (62 * math.log(LETTERS - 1) + math.log(LETTERS)) / 126,
        f"A letter, then the one found by going {HOPS} times to the last earlier occurrence of the letter and one "
        "further; p-hop induction, Sanford et al. 2024 (arXiv 2402.09268), Saunshi et al. 2025 (arXiv 2502.17416).",
    ),
    Task(
        "permutations",
        (".", *("".join(map(str, images)) for images in PERMUTATIONS), *"01234"),
        127,
        _permutations,
        math.log(len(PERMUTATIONS)) / 2,
        "A permutation of 01234, then where all so far, the newest applied first, take 0; word problem of S5, "
        "Liu et al. 2022 (arXiv 2210.10749).",
    ),
    Task(
        "addition",
        (".", *"0123456789+="),
        1 + PROBLEMS * (3 * DIGITS + 3),
        _addition,
        2 * DIGITS * math.log(10) / (3 * DIGITS + 3),
        f"{PROBLEMS} sums of two numbers of {DIGITS} digits, the last digit first; addition in reverse, "
        "Lee et al. 2023 (arXiv 2307.03381); Saunshi et al. 2025 (arXiv 2502.17416) add more numbers by looping.",
    ),
    Task(
        "brackets",
        (".", *"([{<"[:KINDS], *")]}>"[:KINDS]),
        127,
        _brackets,
        _brackets_floor(),
        f"Balanced brackets of {KINDS} kinds, at most {DEEPEST} deep, in long runs of opening or closing ones; "
        "Dyck-(k, m), Hewitt et al. 2020 (arXiv 2010.07515), Yao et al. 2021 (arXiv 2105.11115).",
    ),
    Task(
        "unigram",
        (".", *(f"w{rank}" for rank in range(1, len(ZIPF) + 1))),
        127,
        _unigram,
        UNIGRAM_ENTROPY,
        "Independent words by Zipf's law (Zipf 1949): no context helps, and no depth can.",
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
