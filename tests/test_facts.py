"""What a configuration says without weights, against models that are made, run and counted."""

from dataclasses import replace

import pytest
import torch
from test_decoder import BASE, HUGINN_LIKE, OURO_LIKE, POST_CODA, RANDOM_PLT, RETROFITTED, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.facts import flops, kv_bytes, parameters, wiring
from loopdiag.model.past import Past

DENSE = {"n_loops": 1, "injection": "none", "offset": 0, "memory": "own"}
CONCAT_PLT = {
    "injection": "concat",
    "initial_state": "random",
    "offset": 2,
    "n_coda": 1,
    "window": 5,
    "exit_gate": True,
}
WIRINGS = {
    "plt": {},
    "plt of queries": {"gate_input": "query", "window": 1, "n_kv_heads": 1, "tie_embeddings": False},
    "dense": DENSE,
    "huginn": HUGINN_LIKE,
    "ouro": OURO_LIKE,
    "random plt": RANDOM_PLT,
    "post coda": POST_CODA,
    "retrofitted": RETROFITTED | {"offset": 1},
    "concat plt": CONCAT_PLT,
}
each_wiring = pytest.mark.parametrize("changes", WIRINGS.values(), ids=WIRINGS)

LOOPCODER_V2 = LoopedConfig(
    **{"vocab_size": 76800, "d_model": 5120, "n_layers": 14, "n_heads": 40, "n_kv_heads": 8, "d_head": 128},
    **{"d_mlp": 27648, "n_ctx": 131072, "n_loops": 2, "tie_embeddings": False},
)
OURO = LoopedConfig(
    **{"vocab_size": 49152, "d_model": 2048, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16, "d_head": 128},
    **{"d_mlp": 5632, "n_ctx": 65536, "n_loops": 4, "tie_embeddings": False, "injection": "none", "offset": 0},
    **{"memory": "own", "norms": "sandwich", "exit_gate": True},
)


def numbers_of_a_layer(cfg, looped=True):
    """Parameters of one layer, by hand."""
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    gate = 0
    if looped and cfg.memory == "first":
        read = cfg.d_model if cfg.gate_input == "hidden" else cfg.d_head
        gate = cfg.n_heads * (read + 1) + (cfg.d_model if cfg.gate_input == "hidden" else 0)
    return (
        cfg.d_model * (2 * heads + 2 * kv_heads + 3 * cfg.d_mlp)
        + (heads + kv_heads if cfg.qk_bias else 0)
        + cfg.d_model * {"pre": 2, "sandwich": 4, "pre_post": 4, "post": 2}[cfg.norms]
        + gate
    )


# -- parameters -------------------------------------------------------------------------------------


@each_wiring
def test_parameters_are_those_of_the_model(changes):
    """As stored: the numbers that an optimizer would be given; a stored table of rotations is not learned."""
    cfg = replace(BASE, **changes)
    assert parameters(cfg).once == sum(weight.numel() for weight in LoopedLM(cfg).parameters())
    assert parameters(replace(cfg, n_loops=7)) == parameters(cfg)


@each_wiring
def test_effective_parameters_by_hand(changes):
    """Of a model whose every loop has a block, and an adapter, of its own."""
    cfg = replace(BASE, **changes)
    adapter = 2 * cfg.d_model**2 if cfg.injection == "concat" else 0
    outside = (
        cfg.d_model * cfg.vocab_size * (1 if cfg.tie_embeddings else 2)
        + cfg.d_model
        + (cfg.d_model + 1 if cfg.exit_gate else 0)
        + (cfg.n_prelude + cfg.n_coda) * numbers_of_a_layer(cfg, looped=False)
    )
    looped = cfg.n_layers * numbers_of_a_layer(cfg) + adapter
    ours = parameters(cfg)
    assert (ours.once, ours.looped) == (outside + looped, looped)
    for n_loops in (1, 2, 5):
        assert ours.effective(n_loops) == outside + n_loops * looped


class NothingAllocated(TorchDispatchMode):
    """Fails when an operation makes a tensor that holds numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert all(x.device.type == "meta" for x in tree_leaves(out) if isinstance(x, torch.Tensor)), func
        return out


# Tensors of the released checkpoints, by the shapes of their configurations.
@pytest.mark.parametrize(
    ("cfg", "expected", "billions"),
    [
        (
            LOOPCODER_V2,
            14 * (5120 * (2 * 5120 + 2 * 1024 + 3 * 27648) + 3 * 5120 + 40 * 5121) + 2 * 76800 * 5120 + 5120,
            7.6,
        ),
        (OURO, 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 4 * 2048) + 2 * 49152 * 2048 + 2048 + 2049, 1.4),
    ],
    ids=["LoopCoder-V2", "Ouro-1.4B"],
)
def test_released_sizes(cfg, expected, billions):
    """Counted by shape: nothing is allocated, however large the model."""
    with NothingAllocated():
        once = parameters(cfg).once
    assert once == expected
    assert round(once / 1e9, 1) == billions
    with pytest.raises(AssertionError), NothingAllocated():
        torch.zeros(1)


# -- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_wiring
@torch.no_grad()
def test_memory_of_decoding_is_what_a_past_holds(changes, dtype):
    """To the byte, for texts at and beyond the window, run with one loop and with more than trained."""
    model = make_model(dtype=dtype, **changes)
    for n_loops in (1, 2, 4):
        expected = kv_bytes(model.cfg, n_loops, dtype.itemsize)
        past, ids = Past(), torch.zeros(1, 17, dtype=torch.long)
        for piece in (ids[:, :6], *ids[:, 6:].split(1, dim=1)):
            model(piece, n_loops=n_loops, past=past)
            assert past.nbytes == expected.fixed + past.seen * expected.per_token


def test_numbers_take_two_bytes_unless_told():
    """A 16-bit cache is the common one."""
    assert kv_bytes(BASE, 3) == kv_bytes(BASE, 3, 2)
    assert kv_bytes(BASE, 3, 4).per_token == 2 * kv_bytes(BASE, 3).per_token
    # LoopCoder-V2: 14 layers of 8 key and 8 value heads of 128 numbers; its second loop adds 64 tokens of those, once.
    cache = kv_bytes(LOOPCODER_V2, 2)
    assert (cache.per_token, cache.fixed) == (14 * 2048 * 2, (14 * 2048 * 64 + 5120) * 2)


# -- work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 2, 3, 11])
@each_wiring
@torch.no_grad()
def test_work_of_a_token_is_what_a_counter_sees(changes, context):
    """The matrix products of one decoding step, exactly, with contexts below, at and beyond the window."""
    model = make_model(dtype=torch.float32, **changes)
    for n_loops in (1, 2, 4):
        model.ensure_loops(n_loops)
        past = Past()
        if context > 1:
            model(torch.zeros(1, context - 1, dtype=torch.long), n_loops=n_loops, past=past)
        # Hooked, attention runs as the two products that it is.
        with (
            model.hooks(fwd_hooks=[(lambda name: "hook_pattern" in name, lambda x, hook: x)]),
            FlopCounterMode(display=False) as counter,
        ):
            model(torch.zeros(1, 1, dtype=torch.long), n_loops=n_loops, past=past)
        assert past.seen == context
        assert flops(model.cfg, n_loops, context) == counter.get_total_flops()


def test_work_of_a_released_model():
    """LoopCoder-V2 with one loop and without context: twice its matrices, the embedding aside."""
    gates_and_norms = 14 * (3 * 5120 + 40 * 5121) + 5120
    matrices = parameters(LOOPCODER_V2).once - 76800 * 5120 - gates_and_norms
    assert flops(LOOPCODER_V2, 1, 0) == 2 * matrices
    # A token more of context costs every layer of every loop two products of 5120; the window costs no more.
    assert flops(LOOPCODER_V2, 2, 1001) - flops(LOOPCODER_V2, 2, 1000) == 2 * 14 * 4 * 5120


# -- words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, "prelude, coda, exit gate"),
        (DENSE, "offset, shared memory and gate, prelude, coda, exit gate"),
        (HUGINN_LIKE, "offset, shared memory and gate, exit gate"),
        (OURO_LIKE, "offset, shared memory and gate, prelude, coda"),
        (POST_CODA, "shared memory and gate, prelude, exit gate"),
        (CONCAT_PLT | {"n_prelude": 1}, "nothing"),
    ],
)
def test_wiring_names_what_is_absent(changes, absent):
    """A part that a model lacks is said to be absent, and nothing else is."""
    assert wiring(replace(BASE, **changes))["absent"] == absent


def test_wiring_of_a_parallel_loop_transformer():
    """What the reader of a report sees first."""
    words = wiring(LOOPCODER_V2)
    assert words["layers"] == "14 in the loop"
    assert words["loop 1 starts from"] == "the embedding"
    assert words["later loops start from"] == (
        "0.707 x the embedding + 0.053 x the previous token's normed state after the previous loop"
    )
    assert words["keys and values"] == (
        "loop 1's for all loops, blended by a gate (it reads the layer input) with a window of 65 tokens over the "
        "loop's own"
    )
    assert (words["norms"], words["exit"]) == ("before attention and MLP", "a head of its own")


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        (HUGINN_LIKE, "layers", "2 in the loop, 1 before, 1 after"),
        (HUGINN_LIKE, "loop 1 starts from", "a random state of standard deviation 1, injected as in every loop"),
        (
            *(HUGINN_LIKE, "later loops start from"),
            "a linear map of [the token's own normed state after the previous loop; the output of the prelude]",
        ),
        (HUGINN_LIKE, "keys and values", "of every loop its own"),
        (HUGINN_LIKE, "norms", "before attention and MLP, and of the stream after each"),
        (HUGINN_LIKE, "exit", "through the coda, the embedding as head"),
        (OURO_LIKE, "loop 1 starts from", "the embedding"),
        (OURO_LIKE, "later loops start from", "the token's own normed state after the previous loop"),
        (OURO_LIKE, "norms", "before and after attention and MLP"),
        (OURO_LIKE, "exit", "a head of its own, exit gate (threshold 1)"),
        (POST_CODA, "norms", "of the stream after attention and MLP"),
        (
            *(POST_CODA, "later loops start from"),
            "0.707 x the embedding + 0.8 x the token 2 places before's raw state after the previous loop",
        ),
        (
            *(RANDOM_PLT | {"window": 7}, "keys and values"),
            "loop 1's for all loops, blended by a gate (it reads the query) with a window of 7 tokens over the "
            "loop's own",
        ),
    ],
)
def test_wiring_of_other_models(changes, key, expected):
    """Every choice has its words."""
    assert wiring(replace(BASE, **changes))[key] == expected
