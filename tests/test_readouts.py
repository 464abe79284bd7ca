"""Readouts find what was planted, nothing in noise, and are fitted on what they are given only.

The planted traces have no model: eight tokens, a head that reads the state as logits, and states that say what the
next token is, four times in five truly, in the head's basis or in one that the head does not read.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from test_decoder import make_model
from tiny import assert_all_same, assert_same, padded, random_trace, token_lists, trace_of

from loopdiag import readouts
from loopdiag.measures.prediction import exits
from loopdiag.readouts import fit_readouts
from loopdiag.trace import record

TOKENS, TRUE = 8, 0.8
CHANCE = math.log(TOKENS)
ATTAINABLE = CHANCE - sum(  # the entropy of the next token once it is told, right four times in five
    p * math.log(TOKENS * p) for p in [TRUE + (1 - TRUE) / TOKENS] + [(1 - TRUE) / TOKENS] * (TOKENS - 1)
)
TURN = torch.linalg.qr(torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(99))).Q


@dataclass(frozen=True)
class Planted:
    """Documents that a trace is made of; one source for every four of them."""

    seed: int
    source: str


DOCUMENTS = [Planted(seed, f"source {seed % 4}") for seed in range(100)]


def planted_trace(seed, documents=8, length=33, successor=False):
    """Loop 0 says nothing, loop 1 tells the next token in the turned basis, loop 2 in the head's own.

    Tokens are independent, or each the successor of the one before it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS, (documents, length), generator=generator)
    if successor:
        ids = (ids[:, :1] + torch.arange(length)) % TOKENS
    other = torch.randint(TOKENS, ids.shape, generator=generator)
    told = torch.where(torch.rand(ids.shape, generator=generator) < TRUE, ids.roll(-1, 1), other)
    signal = 4 * torch.eye(TOKENS)[told]
    noise = torch.randn(*ids.shape, TOKENS, generator=generator)
    return trace_of(torch.stack([noise, signal @ TURN, signal]), input_ids=ids, head=torch.nn.Identity(), offset=1)


def planted_traces(documents):
    return (planted_trace(document.seed) for document in documents)


@pytest.fixture(scope="module")
def fitted():
    """Readouts of the planted traces."""
    return fit_readouts(DOCUMENTS, planted_traces)


@pytest.fixture(scope="module")
def unseen():
    """A planted trace that nothing was fitted on, 3,200 predictions."""
    return planted_trace(seed=1000, documents=100)


# -- what is found ----------------------------------------------------------------------------------


def test_a_planted_signal_is_found(fitted, unseen):
    """What stands in a basis that the head does not read is usable, and what stands in the head's stays so."""
    usable, nll = (values.mean(0) for values in (fitted.measure(unseen)["nll_usable"], exits(unseen)["nll_exit"]))
    assert ATTAINABLE < 0.81
    assert nll[1] > CHANCE
    # Measured above what is attainable: 0.01 at loop 1, -0.02 at loop 2; the noise of these documents is 0.015.
    assert usable[1:].tolist() == pytest.approx([ATTAINABLE] * 2, abs=0.04)
    # The noise of the embedding's exit is taken away, down to chance. Measured: 0.01 above it.
    assert usable[0].item() == pytest.approx(CHANCE, abs=0.03)


def test_withheld_is_what_the_own_carry_knows_alone(fitted, unseen):
    """Tokens are independent, so that the neighbour's carry is worth nothing. Measured: 0.015 off."""
    withheld = fitted.measure(unseen)["withheld"]
    assert withheld[:, :2].isnan().all()
    assert withheld[:, 2].mean().item() == pytest.approx(CHANCE - ATTAINABLE, abs=0.05)


def test_nothing_is_withheld_from_a_token_that_can_be_known():
    """Where each token follows from the last, the carry of the last knows it too, but at a document's start."""

    def traces(documents):
        return (planted_trace(document.seed, successor=True) for document in documents)

    unseen = planted_trace(seed=1000, documents=100, successor=True)
    # Told twice, the neighbour's carry is no worse: only the first of 32 predictions has none to look at.
    withheld = fit_readouts(DOCUMENTS[:60], traces).measure(unseen)["withheld"][:, 2].mean().item()
    assert -0.01 < withheld < 0.15 < CHANCE - ATTAINABLE


def test_noise_gives_nothing():
    """States that know nothing of the tokens: no readout is better than the tokens' frequencies, on unseen ones."""
    frequencies = torch.tensor([8.0, 4, 2, 1, 1, 1, 1, 1])

    def trace(seed, documents=8):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.multinomial(frequencies.repeat(documents, 1), 33, replacement=True, generator=generator)
        states = torch.randn(3, *ids.shape, TOKENS, generator=generator)
        return trace_of(states, input_ids=ids, head=torch.nn.Identity(), offset=1)

    unseen = trace(1000, documents=100)
    values = fit_readouts(DOCUMENTS, lambda documents: (trace(document.seed) for document in documents)).measure(unseen)
    log_p = (frequencies / frequencies.sum()).log()
    unigram = -log_p[unseen.input_ids[unseen.predicts]].mean()
    excess = values["nll_usable"].mean(0) - unigram
    # Falls with more documents.
    assert ((excess > 0) & (excess < 0.1)).all()
    assert values["withheld"][:, 2].mean().abs() < 0.02


def test_it_starts_at_the_models_own_exit(monkeypatch):
    """Untrained, an exit's translator changes nothing to the bit, and the two carries are as ignorant as each other."""
    monkeypatch.setattr(readouts, "PASSES", 0)
    trace = random_trace(dtype=torch.float32, spans=((0, 9), (2, 9), (0, 5)))
    untrained = fit_readouts(DOCUMENTS[:2], lambda documents: [trace])
    for loop in range(4):
        state = trace.raw[loop, trace.mask]
        assert torch.equal(untrained.translators["exit", loop](trace.readout[loop, trace.mask], state), state)
    assert_same(untrained.measure(trace)["nll_usable"], exits(trace)["nll_exit"], 1e-6)  # measured: 0
    for kind, carry in (("carry", trace.carry[1:3]), ("shifted", torch.zeros(2, *trace.carry.shape[1:]))):
        if kind == "shifted":
            carry[:, :, 1:] = torch.where(trace.mask[:, :-1, None], trace.carry[1:3, :, :-1], 0)
        for loop in (2, 3):
            read = untrained.translators[kind, loop](carry[loop - 2][trace.predicts], None)
            mean = carry[loop - 2][trace.predicts].mean(0)
            assert_same(read, mean.expand_as(read), 1e-6)


def test_with_a_coda_it_starts_at_the_models_own_exit(monkeypatch):
    """Untrained, it changes nothing about what leaves the coda, and so nothing about the exit. Measured: 0."""
    monkeypatch.setattr(readouts, "PASSES", 0)
    trace = random_trace(dtype=torch.float32, coda=True)
    untrained = fit_readouts(DOCUMENTS[:2], lambda documents: [trace])
    for loop in range(4):
        state = trace.coda[loop, trace.mask]
        assert torch.equal(untrained.translators["exit", loop](trace.readout[loop, trace.mask], state), state)
    assert_same(untrained.measure(trace)["nll_usable"], exits(trace)["nll_exit"], 1e-6)


def test_with_a_coda_exits_are_read_behind_it():
    """Translators stand where the head reads: fitted and measured as on a model whose Y is the coda's output.

    What Y itself is has no say, nor has it where nothing can be read but behind the coda.
    """
    trace = planted_trace(0, documents=8)
    behind = replace(trace, coda=trace.raw, raw=torch.zeros_like(trace.raw))
    assert_all_same(fit_on(behind).measure(behind), fit_on(trace).measure(trace))
    assert_all_same(fit_on(replace(behind, raw=trace.carry + 9)).measure(behind), fit_on(trace).measure(trace))


def test_without_an_offset_nothing_is_fitted_on_carries():
    """No carry is handed over, so there is no translator for one."""
    trace = planted_trace(0)
    assert {kind for kind, _ in fit_on(trace).translators} == {"exit", "carry", "shifted"}
    without = fit_on(replace(trace, offset=0))
    assert set(without.translators) == set(without.ridges) == {("exit", 0), ("exit", 1), ("exit", 2)}


# -- the choice of the ridge ------------------------------------------------------------------------


def test_each_ridge_is_chosen_by_unseen_documents():
    """A signal wants a weak ridge; where there is nothing to learn, a weak one fits the seen documents only."""
    planted = fit_readouts(DOCUMENTS[:60], planted_traces, ridges=(1e-5, 3.0))
    assert set(planted.ridges) == set(planted.translators)
    assert planted.ridges["exit", 1] == planted.ridges["carry", 2] == 1e-5
    assert planted.ridges["shifted", 2] == 3.0


def test_folds_are_dealt_by_source():
    """Every call records one fold or all; folds are equal and share no source, and judge fits made on the other."""
    calls = []
    trace = random_trace(dtype=torch.float32)

    def spy(documents):
        calls.append(frozenset(documents))
        return [trace]

    documents = [Planted(seed, f"source {'abcdab'[seed % 6]}") for seed in range(12)]
    fit_readouts(documents, spy)
    one, other = calls[0], calls[readouts.PASSES + 1]
    assert one | other == set(documents)
    assert sorted(len({document.source for document in fold}) for fold in (one, other)) == [2, 2]
    assert not {document.source for document in one} & {document.source for document in other}
    recorded = readouts.PASSES + 1  # once for the moments
    assert calls == [*[one] * recorded, other, *[other] * recorded, one, *[one | other] * recorded]
    assert sum(documents[0] in call for call in calls) == readouts.RECORDINGS


@pytest.mark.parametrize("count", [0, 1, 2])
def test_one_source_cannot_be_dealt(count):
    """Two folds need two sources; the message says how many there were."""
    with pytest.raises(ValueError, match=f"at least 2 sources, and were given {min(1, count)}"):
        fit_readouts([Planted(0, "same")] * count, planted_traces)


# -- what it must not depend on ---------------------------------------------------------------------


def fit_on(trace, updates=3):
    """Readouts of one trace in both folds, so many updates a pass."""
    return fit_readouts(DOCUMENTS[:2], lambda documents: [trace] * updates)


def test_the_same_documents_give_the_same_readouts():
    """No hidden randomness: equal to the bit; another order is another fit."""
    first, again, turned = (
        fit_readouts(documents, planted_traces).measure(planted_trace(7))
        for documents in (DOCUMENTS[:6], DOCUMENTS[:6], DOCUMENTS[5::-1])
    )
    assert_all_same(again, first)
    assert not torch.equal(turned["nll_usable"], first["nll_usable"])


def test_units_of_the_states():
    """Inputs are standardised: scaled or moved, feature by feature, the same can be read. Measured: 5e-7."""
    trace = planted_trace(0, documents=8)
    scale, move = torch.logspace(-2, 2, TOKENS), torch.linspace(-3, 3, TOKENS)
    expected = fit_on(trace).measure(trace)
    moved = replace(trace, readout=trace.readout * scale + move)
    assert_all_same(fit_on(moved).measure(moved), expected, 1e-4)
    # An offset-free norm forgets the length of what it is given, so that a longer carry tells as much.
    normed = replace(trace, norm=torch.nn.RMSNorm(TOKENS, eps=0, elementwise_affine=False))
    longer = replace(normed, carry=normed.carry * 50)
    assert_all_same(fit_on(longer).measure(longer), fit_on(normed).measure(normed), 1e-4)


@pytest.mark.parametrize("garbage", [100.0, float("nan")])
def test_what_stands_on_padding_is_never_seen(garbage):
    """Neither the fit nor the numbers know what padding holds."""
    trace = random_trace(dtype=torch.float32, spans=((0, 9), (0, 5), (0, 8)))
    soiled = with_padding(trace, garbage)
    assert_all_same(fit_on(soiled).measure(soiled), fit_on(trace).measure(trace))


@pytest.mark.parametrize(
    "garbage",
    [
        100.0,
        float("nan"),
    ],
)
def test_what_stands_on_the_left_is_never_seen(garbage):
    """The offset hands a document's first token nothing of the padding before it."""
    trace = random_trace(dtype=torch.float32, spans=((0, 9), (4, 9), (1, 9)))
    soiled = with_padding(trace, garbage)
    assert_all_same(fit_on(soiled).measure(soiled), fit_on(trace).measure(trace))


def with_padding(trace, value):
    """The trace with another value in all states of padding."""
    fields = {name: torch.where(trace.mask[..., None], getattr(trace, name), value) for name in STATES}
    return replace(trace, **fields, input_ids=torch.where(trace.mask, trace.input_ids, 0))


STATES = ("raw", "carry", "readout")


@pytest.mark.parametrize("changes", [{}, {"n_coda": 1}], ids=["plt", "coda"])
@torch.no_grad()
def test_documents_get_the_numbers_they_get_alone(changes, monkeypatch):
    """Measured with fitted readouts, padding and neighbours do not matter, nor how many tokens are read at a time."""
    model = make_model(dtype=torch.float32, **changes)
    documents = token_lists(seed=3, lengths=(9, 2, 6))
    together = record(model, padded(documents, left=(2,)))
    fitted = fit_on(together)
    whole = fitted.measure(together)
    for row, document in enumerate(documents):
        alone = fitted.measure(record(model, padded([document])))
        assert_all_same(alone, {name: values[row : row + 1] for name, values in whole.items()}, 5e-5)  # measured: 2e-6
    monkeypatch.setattr(readouts, "TOKENS_PER_UPDATE", 3)
    assert_all_same(fitted.measure(together), whole, 5e-5)


def test_the_model_stays_as_it_is():
    """No weight moves and none gets a gradient, even where the caller trains the model."""
    model = make_model(dtype=torch.float32).requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batch = padded(token_lists(seed=5, lengths=(9, 6)))
    trace = record(model, batch)
    values = fit_on(trace).measure(trace)
    assert not values["nll_usable"].requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float64,
    ],
)
def test_models_of_any_precision(dtype):
    """Translators learn in float32 at least, whatever the model runs in: near the numbers of the float32 model."""
    model = make_model(dtype=torch.float32)
    batch = padded(token_lists(seed=6, lengths=(20, 25)))
    expected = fit_on(record(model, batch)).measure(record(model, batch))
    trace = record(model.to(dtype), batch)
    values = fit_on(trace).measure(trace)
    assert {value.dtype for value in values.values()} == {torch.promote_types(dtype, torch.float32)}
    for name in expected:  # of at most 10 nats. Measured: 0.04 in bfloat16, 0.005 in float16
        torch.testing.assert_close(values[name].float(), expected[name], atol=0.2, rtol=0, equal_nan=True)


# -- shapes and refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n_loops", "withheld"), [(1, [False, False]), (3, [False, False, True, True])])
def test_loops_of_readouts(n_loops, withheld):
    """An exit for every loop and the embedding; a carry is handed on from loop 1 to 2 for the first time."""
    trace = random_trace(n_loops=n_loops, dtype=torch.float32)
    values = fit_on(trace).measure(trace)
    assert values["nll_usable"].shape == values["withheld"].shape == (4, n_loops + 1)
    assert values["nll_usable"].isfinite().all()
    assert values["withheld"].isfinite().tolist() == [withheld] * 4


def test_the_offset_of_the_trace():
    """The carry that is handed over is that of the token `offset` places before; without an offset, none is."""
    trace = planted_trace(0, documents=8)
    # A carry tells the token after the next but one: two places on, that is the next token.
    carry = 4 * torch.eye(TOKENS)[trace.input_ids.roll(-3, 1)].expand_as(trace.carry)
    traces = [replace(trace, carry=carry, offset=offset) for offset in (1, 2)]
    one, two = (fit_on(trace, 12).measure(trace)["withheld"][:, 2] for trace in traces)
    assert one.mean().abs() < 0.1  # measured: -0.01
    assert two.mean() < -0.3  # measured: -0.70
    none, shifted = (fit_on(each).measure(each) for each in (replace(trace, offset=0), trace))
    assert set(none) == {"nll_usable"}
    assert torch.equal(none["nll_usable"], shifted["nll_usable"])


def test_a_trace_without_a_head():
    """The message says what to give."""
    with pytest.raises(ValueError, match=r"head.*from_states"):
        fit_on(replace(random_trace(dtype=torch.float32), head=None))
