"""What a trace holds: against the plain implementation, without a model of ours, and what it refuses."""

import pytest
import torch
from plain_looped import norm, plain_run
from test_decoder import CONFIGS, HUGINN_LIKE, OURO_LIKE, POST_CODA, make_model
from tiny import assert_same, padded, token_lists, trace_of

from loopdiag.corpus import Batch
from loopdiag.measures.motion import step_size
from loopdiag.measures.offset import omega, omega_random, omega_relative
from loopdiag.measures.prediction import exits
from loopdiag.trace import LoopTrace, kept_loops, record

DOCUMENTS = token_lists(seed=1, lengths=(5, 2, 4, 1))


# Measured: float64 8e-15, float32 2e-6. Every state of more configurations: test_decoder.py.
@pytest.mark.parametrize(
    ("case", "dtype", "atol"),
    [(0, torch.float32, 2e-4), *((case, torch.float64, 1e-12) for case in (0, 2, 3, 4, 9))],
)
def test_recorded_states_equal_the_plain_implementation(case, dtype, atol):
    """Y, Z, N(Y) and gates of every loop, each under its own name, padded left and right; any number of loops."""
    changes, n_loops = CONFIGS[case]
    model = make_model(seed=case, dtype=dtype, **changes)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    batch = padded(DOCUMENTS, left=(2,))
    trace = record(model, batch, n_loops)
    assert trace.n_loops == n_loops
    assert trace.offset == model.cfg.offset
    assert torch.equal(trace.input_ids, batch.input_ids)
    assert torch.equal(trace.mask, batch.attention_mask)
    for row, tokens in enumerate(DOCUMENTS):
        plain, real = plain_run(model.cfg, weights, tokens, n_loops), trace.mask[row]
        embedding = plain["hook_embed"]
        starts = (embedding, embedding, norm(embedding, weights["ln_final.weight"], model.cfg))
        for name, hook, start in zip(
            ("raw", "carry", "readout"), ("hook_out_pre_norm", "hook_out", "hook_readout"), starts, strict=True
        ):
            ours = getattr(trace, name)
            assert ours.dtype == dtype
            expected = torch.stack([start, *(plain[f"loops.{loop}.{hook}"] for loop in range(1, n_loops + 1))])
            assert_same(ours[:, row, real].double(), expected, atol, name)
        if trace.gate is not None:
            for loop in range(2, n_loops + 1):
                for layer in range(model.cfg.n_layers):
                    expected = plain[f"loops.{loop}.blocks.{layer}.attn.hook_gate"]
                    assert_same(trace.gate[loop, layer, row, real].double(), expected, atol, "gate")


def test_where_there_are_gates():
    """A gate for every loop, layer, document, position and head; NaN where a loop has none, None where no loop has."""
    batch = padded(DOCUMENTS)
    gate = record(make_model(), batch, n_loops=4).gate
    assert gate.shape == (5, 2, 4, 5, 4)
    assert gate[:2].isnan().all()
    assert ((gate[2:] > 0) & (gate[2:] < 1)).all()
    assert record(make_model(memory="own"), batch).gate is None
    assert record(make_model(), batch, n_loops=1).gate is None


def test_trained_number_of_loops_unless_told():
    """More loops than trained can be recorded, and asking once does not change what the default is."""
    model, batch = make_model(n_loops=2), padded(DOCUMENTS)
    assert [record(model, batch, n).n_loops for n in (None, 5, None)] == [2, 5, 2]
    with pytest.raises(ValueError, match="n_loops = 0"):
        record(model, batch, 0)


# Measured: 0.
@pytest.mark.parametrize("changes", [{}, {"norm_between_loops": False}, {"memory": "own", "tie_embeddings": False}])
@torch.no_grad()
def test_an_exit_is_a_shorter_run(changes):
    """The head on N(Y_r) gives the logits of a run of r loops, and on N(E) the prediction p^(0)."""
    model, batch = make_model(**changes), padded(DOCUMENTS, left=(1,))
    trace = record(model, batch)
    for loop in range(1, 4):
        logits = model(batch.input_ids, batch.attention_mask, n_loops=loop)
        assert_same(trace.head(trace.readout[loop])[trace.mask], logits[trace.mask], 1e-12)
        assert_same(trace.norm(trace.raw[loop]), trace.readout[loop], 1e-12)
    assert_same(trace.head(trace.readout[0]), model.unembed(model.ln_final(model.embed(batch.input_ids))), 1e-12)


def test_recording_leaves_nothing_behind():
    """No hooks of its own stay, no graph is kept, and hooks of the caller are felt by everything after them."""
    model, batch = make_model(), padded(DOCUMENTS)
    clean = record(model, batch)
    assert model.list_hooks() == {}
    assert not any(states.requires_grad for states in (clean.raw, clean.carry, clean.readout, clean.gate))
    with model.hooks(fwd_hooks=[("loops.2.hook_out", lambda z, hook: z + 1)]):
        edited = record(model, batch)
    assert_same(edited.carry[2], clean.carry[2] + 1)
    assert torch.equal(edited.raw[:3], clean.raw[:3])
    assert not torch.equal(edited.raw[3], clean.raw[3])
    assert_same(record(model, batch).raw, clean.raw)


def test_a_mask_of_integers_is_a_mask():
    """The model takes 0 and 1 as a mask, so the trace has to mean the same by them."""
    batch = padded(DOCUMENTS)
    trace = record(make_model(), Batch(batch.input_ids, batch.attention_mask.long(), batch.names, batch.sources))
    assert trace.mask.dtype == torch.bool
    assert torch.equal(trace.predicts, record(make_model(), batch).predicts)


def test_which_tokens_predict():
    """Those whose right neighbour is real; a document's last token has no next one, nor has the end of the row."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0] * 4])
    predicts = [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    trace = trace_of(torch.zeros(2, 7, 4, 3), mask=mask)
    assert trace.predicts.dtype == torch.bool
    assert trace.predicts.tolist() == torch.tensor(predicts).bool().tolist()


# -- with a coda, an exit gate, a random start ---------------------------------------------------------

CODA = {"n_coda": 1, "offset": 0, "memory": "own", "norm_between_loops": False}
HUGINN = CODA | {"n_prelude": 1, "initial_state": "random", "injection": "concat", "norm_before_coda": True}


# Measured: 0.
@pytest.mark.parametrize("changes", [CODA, CODA | {"norm_between_loops": True}, HUGINN, {"n_coda": 2}])
@torch.no_grad()
def test_an_exit_through_a_coda_is_a_shorter_run(changes):
    """The readout is N of the coda's raw output, and the head on it gives the logits of a run of r loops.

    Y stays what it is without the coda, and so does what the plain lens reads.
    """
    model, batch = make_model(**changes), padded(DOCUMENTS, left=(1,))
    trace = record(model, batch)
    assert trace.coda.shape == trace.raw.shape
    assert trace.exit_state is trace.coda
    real = trace.mask
    for loop in range(1, 4):
        logits = model(batch.input_ids, batch.attention_mask, n_loops=loop)
        assert_same(trace.head(trace.readout[loop])[real], logits[real], 1e-12)
    assert_same(model.ln_final(trace.coda), trace.readout)
    assert_same(model.ln_final(trace.raw), trace.normed)
    _, kept = model.run_with_cache(batch.input_ids, batch.attention_mask)
    assert_same(trace.raw[3][real], kept["loops.3.hook_out_pre_norm"][real])
    # Before any loop the coda reads what loop 1 starts from.
    assert_same(trace.coda[0][real], model.coda_out(trace.raw[0], batch.attention_mask)[real], 1e-12)


def test_without_a_coda_the_readout_is_n_of_y():
    """Then the lens and the exit are one: nothing is computed or kept twice."""
    trace = record(make_model(), padded(DOCUMENTS))
    assert trace.coda is None
    assert trace.normed is trace.readout
    assert trace.exit_state is trace.raw


def test_what_loop_1_starts_from():
    """State 0 is the embedding, what the prelude makes of it, or the random initial state; the same for Y and Z."""
    batch = padded(DOCUMENTS, left=(1,))
    for changes, point in (
        ({}, "hook_embed"),
        ({"n_prelude": 1}, "prelude.hook_out"),
        (HUGINN, "hook_initial_state"),
    ):
        model = make_model(**changes)
        _, kept = model.run_with_cache(batch.input_ids, batch.attention_mask)
        trace = record(model, batch)
        assert_same(trace.raw[0], kept[point])
        assert_same(trace.carry[0], kept[point])


def test_the_seed_is_that_of_the_initial_state():
    """The same seed, the same trace; another seed moves every state, and nothing where there is no random start."""
    batch = padded(DOCUMENTS)
    for changes, moved in ((HUGINN, True), ({}, False)):
        first, again, other = (record(make_model(**changes), batch, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.raw, again.raw)
        assert torch.equal(first.raw, record(make_model(**changes), batch).raw)
        assert bool((first.raw != other.raw).any((1, 2, 3)).all()) is moved


def test_what_the_exit_gate_says():
    """The probability of leaving once there: sigmoid of a linear map of N(Y_r); NaN before any loop."""
    model, batch = make_model(exit_gate=True), padded(DOCUMENTS, left=(1,))
    trace = record(model, batch, 4)
    assert trace.leave.shape == (5, *trace.mask.shape)
    assert trace.leave[0].isnan().all()
    by_hand = 1 / (1 + torch.exp(-(trace.normed[1:] @ model.exit_gate.weight[0] + model.exit_gate.bias)))
    assert_same(trace.leave[1:], by_hand, 1e-14)  # measured: 1e-16
    assert record(make_model(), batch).leave is None


def test_the_exit_gate_reads_past_the_coda():
    """It stands at the loop and not at the head."""
    model, batch = make_model(exit_gate=True, n_coda=1), padded(DOCUMENTS)
    trace = record(model, batch)
    assert_same(trace.leave[1:], torch.sigmoid(model.exit_gate(model.ln_final(trace.raw[1:]))).squeeze(-1), 1e-14)


# -- some of the loops -----------------------------------------------------------------------------------

SOME = [[1], [1, 2], [1, 4], [1, 3, 4], [1, 2, 3, 4]]


@pytest.mark.parametrize("at", SOME)
@pytest.mark.parametrize("changes", [{}, {"offset": 2, "norm_between_loops": False}, HUGINN_LIKE, OURO_LIKE, POST_CODA])
def test_kept_loops_are_those_of_the_whole_run(changes, at):
    """Y, N(Y), gates and the coda's output to the bit; the carry is what was handed into the next kept loop."""
    model, batch = make_model(**changes), padded(DOCUMENTS, left=(2,))
    whole, some = record(model, batch, at[-1]), record(model, batch, at=at)
    assert some.loops == (0, *at)
    kept = None if len(at) == at[-1] else (0, *at)
    assert (some.n_loops, some.at) == (at[-1], kept)
    for name in ("raw", "readout", "gate", "coda"):
        ours, expected = getattr(some, name), getattr(whole, name)
        if expected is None:
            assert ours is None
        else:
            assert_same(ours, expected[list(some.loops)], what=name)
    handed_on = [0, *(following - 1 for following in at[1:]), at[-1]]
    assert_same(some.carry, whole.carry[handed_on])
    assert some.leave is None or kept is None  # whether a token is still there depends on every loop
    assert (whole.leave is not None) == model.cfg.exit_gate


@pytest.mark.parametrize("offset", [1, 2])
def test_what_kept_loops_say_of_the_offset(offset):
    """Omega of a kept loop is that of the whole run: what the offset displaces on the way into it."""
    model, batch = make_model(offset=offset), padded(DOCUMENTS, left=(2,))
    whole, some = record(model, batch, 5), record(model, batch, at=[1, 2, 5])
    for of in (omega, omega_relative, omega_random):
        assert_same(of(some)[:, 2:], of(whole)[:, [2, 5]], 1e-13)
        assert of(some)[:, :2].isnan().all()


def test_changes_between_kept_loops():
    """From the kept loop before: gain less cost is the fall of the NLL between them, a step their distance."""
    model, batch = make_model(), padded(DOCUMENTS, left=(2,))
    whole, some = record(model, batch, 5), record(model, batch, at=[1, 3, 5])
    ours, nll = exits(some), exits(whole)["nll_exit"]
    assert_same(ours["nll_exit"], nll[:, [0, 1, 3, 5]])
    assert_same((ours["gain"] - ours["cost"])[:, 1:], -nll[:, [0, 1, 3, 5]].diff(dim=1), 1e-13)
    far = torch.where(whole.mask, (whole.raw[5] - whole.raw[3]).norm(dim=-1), 0.0).sum(1) / whole.mask.sum(1)
    assert_same(step_size(some)[:, 3], far, 1e-13)


@pytest.mark.parametrize(
    ("n_loops", "at"),
    [
        *((4, at) for at in ([2, 4], [1, 3], [1, 2, 5], [1, 4, 2], [1, 1, 4], [0, 1, 4], [4], [])),
        *((4, at) for at in ([1, 2.0, 4], ["1", "4"], [True, 4])),
        (1, [True]),
    ],
)
def test_loops_that_cannot_be_kept(n_loops, at):
    """Refused with what was given and an example; also by `record`, before anything is run."""
    with pytest.raises(ValueError, match=r"at = .* is not allowed: .* rise from 1 to the last loop of the run, \d"):
        kept_loops(n_loops, at)
    if at:
        with pytest.raises(ValueError, match="at = "):
            record(make_model(), padded(DOCUMENTS), n_loops, at=at)


def test_loops_that_can_be_kept():
    """All of them unless told; a list, a tuple or a range; and the run is as long as the last of them."""
    assert kept_loops(3, None) == (1, 2, 3)
    assert kept_loops(4, (1, 2, 4)) == kept_loops(4, [1, 2, 4]) == (1, 2, 4)
    assert kept_loops(4, range(1, 5)) == (1, 2, 3, 4)
    model, batch = make_model(n_loops=2), padded(DOCUMENTS)
    assert record(model, batch, at=[1, 4]).n_loops == 4
    assert record(model, batch).loops == (0, 1, 2)


# -- states from elsewhere -----------------------------------------------------------------------------


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_from_states_alone():
    """States are all that a foreign model must give: then nothing is padding, Z is Y, N the identity, no coda."""
    embed, states = drawn(2, 5, 3), drawn(3, 2, 5, 3, seed=1)
    trace = LoopTrace.from_states(embed, states)
    assert trace.n_loops == 3
    assert trace.offset == 0
    assert torch.equal(trace.raw, torch.cat((embed[None], states)))
    assert trace.carry is trace.raw
    assert torch.equal(trace.readout, trace.raw)
    assert trace.mask.dtype == torch.bool
    assert trace.mask.all()
    assert trace.mask.shape == (2, 5)
    assert trace.input_ids is trace.head is trace.gate is trace.coda is trace.leave is None
    assert not trace.readable
    assert repr(trace) == "LoopTrace of 3 loops: 2 documents of up to 5 tokens, width 3"


def test_from_states_with_everything():
    """Each argument arrives where it belongs; the norm makes N(Y) of Y and not of Z."""
    embed, states, carry = drawn(2, 5, 4), drawn(2, 2, 5, 4, seed=1), drawn(2, 2, 5, 4, seed=2)
    ids, mask = torch.arange(10).reshape(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    norm, head = torch.nn.RMSNorm(4, elementwise_affine=False), torch.nn.Linear(4, 10)
    trace = LoopTrace.from_states(embed, states, head, input_ids=ids, mask=mask, carry=carry, norm=norm, offset=2)
    assert torch.equal(trace.raw, torch.cat((embed[None], states)))
    assert torch.equal(trace.carry, torch.cat((embed[None], carry)))
    assert torch.equal(trace.readout, norm(trace.raw))
    assert trace.normed is trace.readout
    assert trace.norm is norm
    assert trace.head is head
    assert trace.offset == 2
    assert torch.equal(trace.input_ids, ids)
    assert torch.equal(trace.mask, mask == 1)
    assert trace.readable


def test_from_states_with_a_coda():
    """Its raw output has a state for loop 0, too; the readout is N of it, and N(Y) stays that of Y."""
    embed, states, coda = drawn(2, 5, 4), drawn(2, 2, 5, 4, seed=1), drawn(3, 2, 5, 4, seed=2)
    norm = torch.nn.RMSNorm(4, elementwise_affine=False)
    trace = LoopTrace.from_states(embed, states, norm=norm, coda=coda)
    assert trace.coda is trace.exit_state is coda
    assert torch.equal(trace.readout, norm(coda))
    assert torch.equal(trace.normed, norm(trace.raw))
    assert torch.equal(trace.raw, trace.carry)


def test_states_one_by_one_or_stacked():
    """A list of tensors, as hooks leave them, or one tensor: the same trace."""
    embed, states, coda = drawn(2, 5, 4), drawn(2, 2, 5, 4, seed=1), drawn(3, 2, 5, 4, seed=2)
    stacked = LoopTrace.from_states(embed, states, carry=states + 1, coda=coda)
    listed = LoopTrace.from_states(embed, list(states), carry=tuple(states + 1), coda=list(coda))
    for name in ("raw", "carry", "readout", "coda"):
        assert torch.equal(getattr(listed, name), getattr(stacked, name)), name


@pytest.mark.parametrize(
    ("given", "readable"), [({}, False), ({"head": True}, False), ({"input_ids": True}, False), (None, True)]
)
def test_predictions_need_head_and_tokens(given, readable):
    """Either alone cannot tell what the next token was thought to be."""
    both = {"head": torch.nn.Identity(), "input_ids": torch.zeros(2, 5).long()}
    chosen = both if given is None else {name: both[name] for name in given}
    assert LoopTrace.from_states(drawn(2, 5, 3), drawn(3, 2, 5, 3), **chosen).readable is readable


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embed": torch.zeros(2, 5)}, r"embed has shape \(2, 5\).*must be \[document, pos, d_model\]"),
        ({"embed": torch.zeros(1, 2, 5, 3)}, r"embed has shape \(1, 2, 5, 3\)"),
        ({"embed": [[[0.0]]]}, "embed holds a list: it must be a torch tensor"),
        ({"states": torch.zeros(0, 2, 5, 3)}, "states is empty.*at least one"),
        ({"states": []}, "states is empty"),
        ({"states": torch.zeros(4, 2, 5)}, r"states has states of shape \(2, 5\): they must be \(2, 5, 3\)"),
        ({"states": torch.zeros(4, 2, 6, 3)}, r"states has states of shape \(2, 6, 3\)"),
        ({"states": [torch.zeros(2, 5, 3), torch.zeros(2, 4, 3)]}, r"states has states of shape \(2, 4, 3\)"),
        (
            {"states": [torch.zeros(2, 5, 3), (torch.zeros(2, 5, 3),)]},
            "states holds a tuple: it must be a torch tensor",
        ),
        ({"input_ids": torch.zeros(2, 4).long()}, r"input_ids has shape \(2, 4\).*must be \(2, 5\)"),
        ({"mask": torch.zeros(5, 2)}, r"mask has shape \(5, 2\).*must be \(2, 5\)"),
        ({"mask": torch.zeros(5)}, r"mask has shape \(5,\)"),
        ({"carry": torch.zeros(3, 2, 5, 3)}, "carry is of 3 loops: with these states it must be of 4"),
        ({"carry": torch.zeros(5, 2, 5, 3)}, "carry is of 5 loops: with these states it must be of 4"),
        ({"carry": torch.zeros(4, 2, 5, 2)}, r"carry has states of shape \(2, 5, 2\)"),
        ({"coda": torch.zeros(4, 2, 5, 3)}, "coda is of 4 loops: with these states it must be of 5"),
        ({"coda": torch.zeros(5, 1, 5, 3)}, r"coda has states of shape \(1, 5, 3\)"),
        ({"offset": -1}, "offset = -1 is not allowed"),
        ({"offset": 0.5}, "offset = 0.5 is not allowed: it must be an integer >= 0"),
    ],
)
def test_states_that_do_not_belong_together(given, message):
    """Given and allowed shape in the message, before any number is made of them."""
    with pytest.raises(ValueError, match=message):
        LoopTrace.from_states(**{"embed": torch.zeros(2, 5, 3), "states": torch.zeros(4, 2, 5, 3)} | given)
