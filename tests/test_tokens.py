"""What each exit says of each token: against the model's own loss, and text that is put together again."""

import numpy as np
import pytest
import torch
from test_decoder import make_model
from tiny import padded, random_corpus, word_tokenizer

import loopdiag as ld
from loopdiag.diagnosis import SHOWN_DOCUMENTS, Diagnosis, diagnose
from loopdiag.measures.tokens import by_token, token_texts
from loopdiag.trace import LoopTrace, record

CORPUS = random_corpus()


@pytest.fixture(scope="module")
def model():
    made = make_model(dtype=torch.float32).requires_grad_(False)
    made.tokenizer = word_tokenizer()
    return made


@pytest.fixture(scope="module")
def bundled_tokenizer():
    return ld.load("tiny-plt-1").tokenizer


def test_each_token_has_the_nll_that_the_model_gives_it(model):
    """Cross-entropy of the logits of a run of so many loops, document by document. Measured: 1e-6 nats."""
    ids = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2]]
    documents = by_token(record(model, padded(ids)), model.tokenizer)
    for tokens, found in zip(ids, documents, strict=True):
        assert found.loops == (0, 1, 2, 3)
        assert found.nll.shape == (4, len(tokens))
        assert len(found.text) == len(tokens)
        assert found.nll[:, 0].isnan().all()
        assert {row[0] for row in found.top} == {""}
        for loop in (1, 2, 3):
            logits = model(torch.tensor([tokens]), n_loops=loop)[0, :-1]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
            torch.testing.assert_close(found.nll[loop, 1:], expected, rtol=0, atol=1e-5)
            best = [model.tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]
            assert [text.strip() for text in found.top[loop][1:]] == best


def test_padding_is_left_out_on_either_side(model):
    """To the bit, what a document has from the right it has from the left."""
    right = record(model, padded([[3, 1, 4, 1, 5], [2, 7, 1]]))
    flipped = LoopTrace(
        **{
            **vars(right),
            "input_ids": right.input_ids.roll(2, 1),
            "mask": right.mask.roll(2, 1),
            "readout": right.readout.roll(2, 2),
        }
    )
    one, other = (by_token(trace, model.tokenizer)[1] for trace in (right, flipped))
    assert one.text == other.text
    assert one.top == other.top
    torch.testing.assert_close(one.nll, other.nll, rtol=0, atol=0, equal_nan=True)


def test_a_prediction_that_is_not_finite_has_no_likeliest_token(model):
    """NaN logits have a first of equals, which no one predicted."""
    trace = record(model, padded([[3, 1, 4, 1, 5]]))
    trace.readout[2, 0, 1] = float("nan")
    (found,) = by_token(trace, model.tokenizer)
    assert found.nll[2].isnan().tolist() == [True, False, True, False, False]
    assert [text == "" for text in found.top[2]] == [True, False, True, False, False]


@pytest.mark.parametrize(
    "text",
    [
        "def area(self):\n    return self.width  * 2\n\n\n# done\t",
        "é漢字 🙂 naïve — “quoted”",
        "👩‍👩‍👧 and \N{REPLACEMENT CHARACTER} stays",
        "",
    ],
)
def test_texts_put_together_are_the_document(bundled_tokenizer, text):
    """Law: byte pieces, combined characters and a real replacement character included."""
    ids = bundled_tokenizer(text)["input_ids"]
    texts = token_texts(ids, bundled_tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_pieces_of_a_character_stand_at_the_last_of_its_tokens(bundled_tokenizer):
    """Hand-worked: this tokenizer has no 漢, which is three bytes; cut short, they are what cannot be read."""
    ids = bundled_tokenizer("a漢b")["input_ids"]
    assert len(ids) == 5
    assert token_texts(ids, bundled_tokenizer) == ["a", "", "", "漢", "b"]
    assert token_texts(ids[:3], bundled_tokenizer) == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert len(token_texts([ids[1]] * 9, bundled_tokenizer)) == 9  # bytes that never become one are not waited for
    assert token_texts([ids[1]] * 9, bundled_tokenizer)[3]


def test_spaces_before_words_are_kept():
    """A tokenizer that leaves out the first space gives later ones to their words, here and in what is likeliest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"▁the": 0, "▁cat": 1, "s": 2, "▁sat": 3, "<unk>": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts([0, 1, 2, 3], tokenizer) == ["the", " cat", "s", " sat"]
    # A head that always sees token 1 ahead.
    always = torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0])
    states = torch.zeros(1, 3, 2)
    trace = LoopTrace.from_states(
        states, [states], lambda x: always.expand(*x.shape[:-1], 5), input_ids=torch.tensor([[0, 1, 2]])
    )
    assert by_token(trace, tokenizer)[0].top == (("", " cat", " cat"),) * 2


def test_a_nul_is_shown_as_one(bundled_tokenizer):
    """Files of results would end the text there."""
    assert "".join(token_texts(bundled_tokenizer("a\0b")["input_ids"], bundled_tokenizer)) == "a␀b"


def test_a_trace_without_a_head_is_refused():
    trace = LoopTrace.from_states(torch.zeros(1, 3, 2), [torch.zeros(1, 3, 2)])
    with pytest.raises(ValueError, match="lacks head or tokens"):
        by_token(trace, None)


def test_a_diagnosis_keeps_a_few_documents(model, tmp_path):
    """Four, of as many sources as there are; what is no token is NaN or empty; a file gives them back, texts too."""
    made = diagnose(model, CORPUS, measures=["tokens"], batch_size=3)
    data = made.data
    assert data["token_text"].dims == ("shown", "token")
    assert data["token_nll"].dims == data["token_top"].dims == ("shown", "loop", "token")
    assert data.sizes["shown"] == SHOWN_DOCUMENTS
    texts = {document.name: document.text for document in CORPUS.report}
    for name in data["shown"].values.tolist():
        shown = data.sel(shown=name)
        assert "".join(shown["token_text"].values.tolist()) == texts[name]
        assert int(shown["token_nll"].sel(loop=3).notnull().sum()) == len(texts[name].split()) - 1
    made.save(tmp_path / "made.nc")
    again = Diagnosis.load(tmp_path / "made.nc").data
    assert again["token_text"].values.tolist() == data["token_text"].values.tolist()
    assert again["token_top"].values.tolist() == data["token_top"].values.tolist()
    np.testing.assert_array_equal(again["token_nll"], data["token_nll"])
    assert again["shown"].values.tolist() == data["shown"].values.tolist()
