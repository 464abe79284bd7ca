"""What a trace holds: against the plain implementation, without a model of ours, and what it refuses."""

import pytest
import torch
from plain_looped import norm, plain_run
from test_decoder import CONFIGS, make_model
from tiny import assert_same, padded, token_lists

from loopdiag.corpus import Batch
from loopdiag.trace import LoopTrace, record

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
    trace = LoopTrace.from_states(torch.zeros(2, 7, 4, 3), mask=mask)
    assert trace.predicts.dtype == torch.bool
    assert trace.predicts.tolist() == torch.tensor(predicts).bool().tolist()


def test_from_states_alone():
    """States are all that a foreign model must give: then nothing is padding, Z is Y, N the identity."""
    states = torch.randn(4, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    trace = LoopTrace.from_states(states)
    assert trace.n_loops == 3
    assert trace.offset == 0
    assert trace.raw is trace.carry is states
    assert torch.equal(trace.readout, states)
    assert trace.mask.dtype == torch.bool
    assert trace.mask.all()
    assert trace.mask.shape == (2, 5)
    assert trace.input_ids is trace.head is trace.gate is None


def test_from_states_with_everything():
    """Each argument arrives where it belongs; the norm makes N(Y) of Y and not of Z."""
    states, carry = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.arange(10).reshape(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    norm, head = torch.nn.RMSNorm(4, elementwise_affine=False), torch.nn.Linear(4, 10)
    trace = LoopTrace.from_states(states, input_ids=ids, mask=mask, carry=carry, norm=norm, head=head, offset=2)
    assert trace.raw is states
    assert trace.carry is carry
    assert torch.equal(trace.readout, norm(states))
    assert trace.norm is norm
    assert trace.head is head
    assert trace.offset == 2
    assert torch.equal(trace.input_ids, ids)
    assert torch.equal(trace.mask, mask == 1)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((4, 2, 5), {}, r"states has shape \(4, 2, 5\)"),
        ((4, 2, 5, 3, 1), {}, r"states has shape \(4, 2, 5, 3, 1\)"),
        ((1, 2, 5, 3), {}, r"states has shape \(1, 2, 5, 3\).*at least one loop"),
        ((0, 2, 5, 3), {}, r"states has shape \(0, 2, 5, 3\)"),
        ((4, 2, 5, 3), {"input_ids": (2, 4)}, r"input_ids has shape \(2, 4\).*must be \(2, 5\)"),
        ((4, 2, 5, 3), {"mask": (5, 2)}, r"mask has shape \(5, 2\).*must be \(2, 5\)"),
        ((4, 2, 5, 3), {"mask": (5,)}, r"mask has shape \(5,\)"),
        ((4, 2, 5, 3), {"carry": (3, 2, 5, 3)}, r"carry has shape \(3, 2, 5, 3\).*must be \(4, 2, 5, 3\)"),
    ],
)
def test_states_that_do_not_belong_together(shape, given, message):
    """Given and allowed shape in the message, before any number is made of them."""
    with pytest.raises(ValueError, match=message):
        LoopTrace.from_states(torch.zeros(shape), **{name: torch.zeros(size) for name, size in given.items()})
