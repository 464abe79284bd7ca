"""Tiny documents, batches, traces and corpora for the tests of numbers. Models: `test_decoder.make_model`."""

from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopdiag.corpus import Batch, Corpus, Document
from loopdiag.trace import LoopTrace

VOCABULARY = 29  # that of test_decoder.BASE


def padded(documents, left=()):
    """A batch of token lists, padded with arbitrary tokens; on the left where the index is in `left`."""
    longest = max(map(len, documents))
    ids = torch.randint(VOCABULARY, (len(documents), longest), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, document in enumerate(documents):
        start = longest - len(document) if row in left else 0
        ids[row, start : start + len(document)] = torch.tensor(document)
        mask[row, start : start + len(document)] = True
    names = tuple(f"d{row}" for row in range(len(documents)))
    return Batch(ids, mask, names, names)


def token_lists(seed, lengths):
    """Random documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def trace_of(states, carry=None, **parts):
    """A trace of stacked states, loop 0 first."""
    return LoopTrace.from_states(states[0], states[1:], carry=None if carry is None else carry[1:], **parts)


def random_trace(
    seed=0,
    *,
    n_loops=3,
    spans=((0, 9), (2, 9), (0, 5), (3, 8)),
    width=6,
    dtype=torch.float64,
    offset=1,
    coda=False,
    exit_gate=False,
):
    """A trace without a model: random states, Y, Z and N(Y) all different, padding on every side, seven tokens.

    With a coda, its output is one more random state, whatever it read.
    """
    generator = torch.Generator().manual_seed(seed)
    length = max(end for _, end in spans)
    mask = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight, unembedding = 1 + 0.3 * draw(width), draw(7, width)
    trace = trace_of(
        draw(n_loops + 1, *mask.shape, width),
        input_ids=torch.randint(7, mask.shape, generator=generator),
        mask=mask,
        carry=draw(n_loops + 1, *mask.shape, width),
        norm=lambda y: torch.nn.functional.rms_norm(y, (width,), weight, 1e-5),
        head=lambda h: h @ unembedding.T,
        offset=offset,
        coda=draw(n_loops + 1, *mask.shape, width) if coda else None,
    )
    if not exit_gate:
        return trace
    leave = torch.rand(n_loops + 1, *mask.shape, generator=generator, dtype=torch.float64).to(dtype)
    leave[0] = float("nan")
    return replace(trace, leave=leave)


def word_tokenizer():
    """One token per word: "w0" is 0, "w1" is 1 and so on."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def words(ids):
    """The text that `word_tokenizer` reads as these tokens."""
    return " ".join(f"w{i}" for i in ids)


def random_corpus(seed=0, fit=6, report=5):
    """Documents of 20 to 30 words, two or three of each source, no source in both halves."""
    random = np.random.default_rng(seed)

    def half(name, count):
        return tuple(
            Document(words(random.integers(VOCABULARY, size=random.integers(20, 31))), f"{name}/{i}", f"{name} {i % 2}")
            for i in range(count)
        )

    return Corpus("random words", half("fit", fit), half("report", report))


def assert_same(ours, expected, atol=0.0, what=""):
    """Equal numbers of one dtype, NaN where NaN."""
    torch.testing.assert_close(
        ours, expected, atol=atol, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}" if what else text
    )


def assert_all_same(ours, expected, atol=0.0):
    """Equal dicts of measures."""
    assert set(ours) == set(expected)
    for name in expected:
        assert_same(ours[name], expected[name], atol, name)
