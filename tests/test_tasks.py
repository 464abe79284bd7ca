"""Synthetic tasks against straightforward references; streams and corpora by seed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import entropy
from sympy.combinatorics import Permutation, PermutationGroup

from loopdiag.corpus import tokenize
from loopdiag.sweep import tasks
from loopdiag.sweep.tasks import TASKS, UNIGRAM_ENTROPY, Task, corpus, stream, tokenizer

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def written(task: Task, n_rows: int = 20) -> list[list[str]]:
    """The words of a few rows, without the filler at their start."""
    rows = stream(task, n_rows * task.sequence, seed=3).reshape(-1, task.sequence)
    return [[task.words[token] for token in row[1:]] for row in rows]


def hopped(letters: str, hops: int) -> str:
    """p-hop induction by its words: search back for the same letter, go to the one after, as often as asked."""
    answers = ""
    for start in range(len(letters)):
        place: int | None = start
        for _ in range(hops):
            if place is not None:
                earlier = [other for other in range(place) if letters[other] == letters[place]]
                place = max(earlier) + 1 if earlier else None
        answers += "." if place is None else letters[place].upper()
    return answers


def test_p_hop_by_hand():
    """In "abcab" the last b goes to c, which stands nowhere before; in "abab" one hop from it goes to a, two to b."""
    assert hopped("abcab", 1) == "...BC"
    assert hopped("abab", 1) == "..BA"
    assert hopped("abab", 2) == "...B"


def test_p_hop_answers_are_found_by_searching():
    """Every answer, most of which are letters; no letter stands twice in a row."""
    for row in written(TASKS["p_hop"]):
        letters = "".join(row[::2])
        assert "".join(row[1::2]) == hopped(letters, tasks.HOPS)
        assert row.count(".") < 20
        assert all(one != other for one, other in itertools.pairwise(letters))


def test_permutations_are_products():
    """Every answer is where sympy's product takes 0; sympy applies the left factor first."""
    for row in written(TASKS["permutations"]):
        product = Permutation(4)
        for images, answer in zip(row[::2], row[1::2], strict=True):
            product = Permutation([int(image) for image in images]) * product
            assert product(0) == int(answer)


def test_permutations_generate_s5():
    """The word problem is that of the whole group, and each point goes everywhere under the permutations given."""
    assert PermutationGroup([Permutation(list(images)) for images in tasks.PERMUTATIONS]).order() == 120
    assert all(sorted(column) == [0, 1, 2, 3, 4] for column in zip(*tasks.PERMUTATIONS, strict=True))


def test_sums_are_pythons():
    """Digits stand in reverse, as many in each number, one more in each sum."""
    digits = tasks.DIGITS
    for row in written(TASKS["addition"]):
        problems = "".join(row)
        for start in range(0, len(problems), 3 * digits + 3):
            problem = problems[start : start + 3 * digits + 3]
            (one, other), total = problem.split("=")[0].split("+"), problem.split("=")[1]
            assert (len(one), len(other), len(total)) == (digits, digits, digits + 1)
            assert int(one[::-1]) + int(other[::-1]) == int(total[::-1])


def test_brackets_are_balanced():
    """A stack takes every bracket, is never higher than allowed, gets there, and is empty in the end."""
    task = TASKS["brackets"]
    pairs = dict(zip(task.words[1 : tasks.KINDS + 1], task.words[tasks.KINDS + 1 :], strict=True))
    assert set(pairs.items()) <= {("(", ")"), ("[", "]"), ("{", "}"), ("<", ">")}
    highest, distances = 0, []
    for row in written(task, 100):
        stack: list[tuple[str, int]] = []
        for place, bracket in enumerate(row):
            if bracket in pairs:
                stack.append((pairs[bracket], place))
            else:
                closing, opened = stack.pop()
                assert closing == bracket
                distances.append(place - opened)
            highest = max(highest, len(stack))
        assert not stack
    assert highest == tasks.DEEPEST
    assert np.mean(np.array(distances) > 8) > 0.2


def test_the_floor_of_brackets_is_their_entropy():
    """The mean of -log p of many rows, p by the rule that they are drawn by, is the floor within chance."""
    task = TASKS["brackets"]
    nats = []
    for row in written(task, 1000):
        depth, opened, total = 0, True, 0.0
        for place, bracket in enumerate(row):
            opens = bracket in task.words[1 : tasks.KINDS + 1]
            if 0 < depth < min(tasks.DEEPEST, len(row) - place):
                total -= math.log(tasks.PERSISTENCE if opens == opened else 1 - tasks.PERSISTENCE)
            total += math.log(tasks.KINDS) * opens
            depth, opened = depth + (1 if opens else -1), opens
        nats.append(total / len(row))
    assert np.mean(nats) == pytest.approx(task.floor, abs=4 * np.std(nats) / math.sqrt(len(nats)))


def test_unigram_entropy_is_known():
    """The constant is scipy's entropy of Zipf's law, and the words drawn follow that, whatever stands before them."""
    zipf = np.array([1 / rank for rank in range(1, 64)])
    assert pytest.approx(entropy(zipf), abs=1e-12) == UNIGRAM_ENTROPY == TASKS["unigram"].floor
    rows = stream(TASKS["unigram"], 200_000, seed=0).reshape(-1, 127)[:, 1:]
    counts = np.bincount(rows.reshape(-1), minlength=64)
    assert counts[0] == 0
    assert counts[1:] / counts.sum() == pytest.approx(zipf / zipf.sum(), abs=0.005)
    after_first = np.bincount(rows[:, 1:][rows[:, :-1] == 1], minlength=64)[1:]
    assert after_first / after_first.sum() == pytest.approx(zipf / zipf.sum(), abs=0.01)


@every_task
def test_rows_are_as_said(task):
    """Every row starts with the filler, has the length said, and uses every word; the floor is below the loss of a
    model that ignores the context, by a third of it where context helps."""
    rows = stream(task, 40_000, seed=0).reshape(-1, task.sequence)
    assert task.sequence <= 128
    assert not rows[:, 0].any()
    counts = np.bincount(rows[:, 1:].reshape(-1))
    assert len(counts) == len(task.words) == len(set(task.words))
    assert counts[1:].all()
    least = 0 if task.name == "unigram" else 1 / 3
    assert task.floor < (1 - least) * entropy(counts) + 0.01
    assert TASKS[task.name] is task
    assert "\n" not in task.description


@every_task
def test_streams_are_seeded(task):
    """One seed, one stream, of whole rows; a longer one starts with the shorter one; another seed differs."""
    first = stream(task, 100 * task.sequence - 5, seed=1)
    assert first.dtype == np.uint16
    assert len(first) == 100 * task.sequence
    longer = stream(task, (tasks.ROWS + 1) * task.sequence, seed=1)
    assert np.array_equal(longer[: len(first)], first)
    assert not np.array_equal(stream(task, len(first), seed=2), first)


@every_task
def test_corpora_are_seeded_halves(task):
    """Half to fit on and half to report on, of one source each; text follows the seed."""
    held_out = corpus(task, 32)
    assert (len(held_out.fit), len(held_out.report)) == (16, 16)
    documents = held_out.fit + held_out.report
    assert len({document.text for document in documents}) == 32
    assert len({document.source for document in documents}) == len({document.name for document in documents}) == 32
    assert corpus(task, 32).fingerprint == held_out.fingerprint != corpus(task, 32, seed=1).fingerprint


@every_task
def test_no_row_is_held_out_and_trained_on(task):
    """Nor twice in either, even where both have the same seed."""
    trained = stream(task, 4096 * task.sequence, seed=0).reshape(-1, task.sequence)
    documents = corpus(task, 128, seed=0)
    texts = {" ".join(task.words[token] for token in row) for row in trained}
    assert len(texts) == 4096
    assert texts.isdisjoint(document.text for document in documents.fit + documents.report)


@every_task
def test_text_gives_the_tokens_back(task):
    """A document's tokens are its row, with none added; decoded they are its text."""
    words = tokenizer(task)
    documents = corpus(task, 16).report
    for document, tokens in zip(documents, tokenize(documents, words, max_tokens=task.sequence), strict=True):
        assert tokens.input_ids == tuple(task.words.index(word) for word in document.text.split(" "))
        assert len(tokens.input_ids) == task.sequence
        assert not tokens.cut
        assert words.decode(tokens.input_ids) == document.text


def test_nothing_asked_for_is_refused():
    """Neither an empty stream nor an empty corpus."""
    for ask in (stream, corpus):
        with pytest.raises(ValueError, match="0 rows of unigram asked for"):
            ask(TASKS["unigram"], 0, seed=0)
