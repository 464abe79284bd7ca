"""Classes of tokens in the spellings of tokenizers, and what the exits say class by class."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import make_model
from tiny import assert_same, padded, random_trace, token_lists, trace_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import loopdiag
from loopdiag.corpus import TOKEN_CLASSES, token_classes
from loopdiag.measures.prediction import by_class, exit_series, exits
from loopdiag.trace import record

calm = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 10**6)

# Text, its class, and how a byte-level and a SentencePiece tokenizer write it; None where one would not.
VOCABULARY = [
    (" ", "space", "Ġ", "▁"),
    ("    ", "space", "ĠĠĠĠ", "▁▁▁▁"),
    ("\n", "space", "Ċ", "\n"),
    ("\r\n\t", "space", "čĊĉ", "\r\n\t"),
    ("\n    ", "space", "ĊĠĠĠĠ", None),
    (" return", "word", "Ġreturn", "▁return"),
    (" _private2", "word", "Ġ_private2", "▁_private2"),
    ("\treturn", "word", "ĉreturn", "\treturn"),
    ("ing", "piece", "ing", "ing"),
    ("_", "piece", "_", "_"),
    ("x1", "piece", "x1", "x1"),
    ("7", "number", "7", "7"),
    (" 42", "number", "Ġ42", "▁42"),
    ("1_000.5", "number", "1_000.5", "1_000.5"),
    ("(", "punctuation", "(", "("),
    (" ==", "punctuation", "Ġ==", "▁=="),
    ("):\n", "punctuation", "):Ċ", "):\n"),
    ("é", "piece", "Ã©", "é"),
    (" 中", "word", "Ġä¸Ń", "▁中"),
    ("≤", "punctuation", "âī¤", "≤"),
    ("2nd", "other", "2nd", "2nd"),
    (".append", "other", ".append", ".append"),
    (" a b", "other", "ĠaĠb", "▁a▁b"),
]


def tokenizer_of(tokens, decoder=None):
    """A tokenizer of transformers with these tokens, and one special token behind them."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.mark.parametrize(("spelling", "decoder"), [(2, decoders.ByteLevel()), (3, decoders.Metaspace())])
def test_a_vocabulary_by_hand(spelling, decoder):
    """Every class in both spellings; special tokens and ids beyond the tokenizer's are `other`."""
    known = [row for row in VOCABULARY if row[spelling] is not None]
    tokenizer = tokenizer_of([row[spelling] for row in known], decoder)
    found = token_classes(tokenizer, len(known) + 4)
    expected = [row[1] for row in known] + ["other"] * 4
    assert [TOKEN_CLASSES[index] for index in found] == expected
    assert found.dtype == torch.int64
    assert {row[1] for row in VOCABULARY} == set(TOKEN_CLASSES)


@pytest.mark.parametrize("token", ["Ã", "ä¸", "Ġâ"])
def test_bytes_that_are_no_text_alone(token):
    """Part of a character, as a byte-level tokenizer writes it: no text, whatever letters spell it."""
    tokenizer = tokenizer_of(["Ġa", token], decoders.ByteLevel())
    assert TOKEN_CLASSES[token_classes(tokenizer, 2)[1]] == "other"


def test_tokens_that_were_added():
    """They are written as they are, in a byte-level vocabulary too."""
    tokenizer = tokenizer_of(["Ġa", "b"], decoders.ByteLevel())
    tokenizer.add_tokens(["    ", "\n\n"])
    assert [TOKEN_CLASSES[index] for index in token_classes(tokenizer, 5)] == [
        "word",
        "piece",
        "other",
        "space",
        "space",
    ]


def test_a_model_with_fewer_tokens_than_its_tokenizer():
    """As many as the model has."""
    tokenizer = tokenizer_of([row[2] for row in VOCABULARY])
    assert torch.equal(token_classes(tokenizer, 3), token_classes(tokenizer, 30)[:3])


def test_classes_of_the_bundled_tokenizer():
    """Byte-level in earnest: of the tokens of a line of Python, spelled as its tokenizer spells them."""
    tokenizer = loopdiag.load("tiny-plt-1").tokenizer
    of_token = token_classes(tokenizer, len(tokenizer))
    assert set(of_token.tolist()) == set(range(len(TOKEN_CLASSES)))
    ids = tokenizer("def area(self):\n    return 12", add_special_tokens=False)["input_ids"]
    told = {tokenizer.decode([i]): TOKEN_CLASSES[of_token[i]] for i in ids}
    assert told[" return"] == "word"
    assert told["def"] == "piece"
    assert {told[text] for text in told if not text.strip()} <= {"space"}
    assert all(kind == "number" for text, kind in told.items() if text.strip().isdigit())


# -- numbers by class -----------------------------------------------------------------------------------


def test_by_class_by_hand():
    """Three next tokens, of classes 1, 0 and 1: shares are thirds, and each NLL that of its own tokens.

    Logits in halvings, as for the exits; no token is of class 2.
    """
    first, second, even = [1.0, 2.0, 3.0, 3.0], [3.0, 1.0, 2.0, 3.0], [2.0] * 4
    logits = -torch.log(torch.tensor(2.0, dtype=torch.float64)) * torch.tensor(
        [[row] * 4 for row in (first, second, even)], dtype=torch.float64
    )
    trace = trace_of(logits[:, None], input_ids=torch.tensor([[3, 1, 0, 1]]), head=lambda h: h)
    found = by_class(exit_series(trace), trace, torch.tensor([0, 1, 2, 2]), 3)
    nan, log2 = float("nan"), torch.tensor(2.0).double().log()
    assert_same(found["class_share"], torch.tensor([[1 / 3, 2 / 3, 0]], dtype=torch.float64), 1e-15)
    nll = torch.tensor([[[1, 2, nan], [3, 1, nan], [2, 2, nan]]], dtype=torch.float64) * log2
    assert_same(found["nll_by_class"], nll, 1e-15)
    gain = torch.tensor([[[nan] * 3, [0, 1, nan], [1, 0, nan]]], dtype=torch.float64) * log2
    cost = torch.tensor([[[nan] * 3, [2, 0, nan], [0, 1, nan]]], dtype=torch.float64) * log2
    assert_same(found["gain_by_class"], gain, 1e-15)
    assert_same(found["cost_by_class"], cost, 1e-15)


@given(seed=seeds, classes=st.integers(1, 4))
@calm
def test_classes_add_up(seed, classes):
    """Weighted by its share, what a class has sums to the whole: NLL, gain and cost of every loop. Measured: 1e-15."""
    trace = random_trace(seed)
    of_token = torch.randint(classes, (7,), generator=torch.Generator().manual_seed(seed))
    found, whole = by_class(exit_series(trace), trace, of_token, classes), exits(trace)
    share = found["class_share"]
    assert_same(share.sum(1), torch.ones(4).double(), 1e-14)
    for name, of in (("nll_by_class", "nll_exit"), ("gain_by_class", "gain"), ("cost_by_class", "cost")):
        weighed = torch.where(share[:, None] > 0, share[:, None] * found[name], 0.0).sum(2)
        assert_same(weighed, whole[of], 1e-13, name)
        assert torch.equal(found[name][:, 1:].isnan().any(1), share == 0)
    net = (found["gain_by_class"] - found["cost_by_class"])[:, 1:]
    assert_same(net, -found["nll_by_class"].diff(dim=1), 1e-13)


@torch.no_grad()
def test_classes_against_plain_python():
    """Token by token, with padding on both sides: the class is that of the next token. Measured: 2e-15."""
    documents = token_lists(seed=3, lengths=(9, 1, 6))
    trace = record(make_model(), padded(documents, left=(2,)))
    of_token = torch.arange(29) % 3
    found = by_class(exit_series(trace), trace, of_token, 3)
    log_p = trace.head(trace.readout).log_softmax(-1)
    for row, document in enumerate(documents):
        where = trace.mask[row].nonzero()[:, 0].tolist()
        for number in range(3):
            losses = [
                -log_p[:, row, pos, token]
                for pos, token in zip(where, document[1:], strict=False)
                if of_token[token] == number
            ]
            expected = sum(losses) / len(losses) if losses else torch.full((4,), float("nan"), dtype=torch.float64)
            assert_same(found["nll_by_class"][row, :, number], expected, 1e-12)
            share = len(losses) / (len(document) - 1) if len(document) > 1 else float("nan")
            assert found["class_share"][row, number].item() == pytest.approx(share, abs=1e-15, nan_ok=True)


def test_added_tokens_say_nothing_of_the_others():
    """A marker with a SentencePiece space in a byte-level vocabulary; and the bytes of SentencePiece."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"Ġword": 0, "Ċ": 1, "word": 2}, unk_token="word"))
    )
    tokenizer.add_tokens(["<begin▁of▁text>"])
    assert [TOKEN_CLASSES[index] for index in token_classes(tokenizer, 4)[:3]] == ["word", "space", "piece"]
    spelled = {"▁word": 0, "<0x0A>": 1, "<0xE2>": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(spelled, unk_token="▁word")))
    assert [TOKEN_CLASSES[index] for index in token_classes(tokenizer, 3)] == ["word", "space", "other"]


def test_no_tokens_no_classes():
    """Refused in words."""
    with pytest.raises(ValueError, match="lacks tokens"):
        by_class({}, trace_of(torch.zeros(2, 1, 3, 4)), torch.zeros(4), 1)
