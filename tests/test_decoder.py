"""The hooked model: every state against the plain implementation, padding, hooks, caches, memory, gradients."""

from dataclasses import replace

import pytest
import torch
from plain_looped import plain_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens import ActivationCache

from loopdiag.model.cache import ONE_PASS_HELPERS, WORK_ON_A_LOOP
from loopdiag.model.config import LoopedConfig, RopeScaling
from loopdiag.model.decoder import LoopedLM

BASE = LoopedConfig(
    vocab_size=29, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_mlp=20, n_ctx=64, n_loops=3, window=3
)
IDS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(1))

# Changes to BASE, and loops to run: fewer than trained, as many, and more.
CONFIGS = [
    ({}, 3),
    ({"n_loops": 1, "carry_scale": 1.0}, 1),
    ({"n_loops": 1, "offset": 2, "window": 1, "gate_input": "query", "carry_scale": 0.5}, 4),
    ({"n_loops": 4, "offset": 0, "injection": "none", "memory": "own", "norm_between_loops": False}, 2),
    (
        {"n_loops": 2, "offset": 2, "window": 5, "gate_input": "query", "norm_between_loops": False, "n_kv_heads": 4}
        | {"tie_embeddings": False},
        5,
    ),
    ({"n_loops": 2, "window": 99, "embed_scale": 1.0, "carry_scale": 1.0, "tie_embeddings": False}, 2),
    ({"memory": "own", "carry_scale": -0.7, "norm_eps": 1e-2}, 3),
    ({"injection": "none", "window": 2, "gate_input": "query", "rope_base": 100.0}, 3),
    ({"n_layers": 1, "offset": 0, "window": 4, "n_kv_heads": 4, "carry_scale": 0.3}, 3),
    ({"offset": 2, "injection": "none", "memory": "own", "n_kv_heads": 1, "norm_between_loops": False}, 4),
    ({"n_loops": 4, "offset": 0, "injection": "none", "window": 1, "norm_between_loops": False, "n_layers": 3}, 4),
    ({"offset": 99, "carry_scale": 1.0, "gate_input": "query", "window": 2}, 3),
]

# With d_head = 6 and a base of 100: one pair that is kept, one that is blended, one that is slowed.
STRETCH = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_n_ctx=60)

# The same for the wirings of other families, and for pairs of choices that none of them makes.
HUGINN_LIKE = (
    {"n_prelude": 1, "n_coda": 1, "initial_state": "random", "injection": "concat", "offset": 0, "memory": "own"}
    | {"norms": "pre_post", "rope_pairs": "adjacent", "rope_table": True, "qk_bias": True, "embed_multiplier": 3.5}
    | {"n_kv_heads": 4, "norm_before_coda": True}
)
OURO_LIKE = {
    "n_loops": 4,
    "injection": "none",
    "offset": 0,
    "memory": "own",
    "norms": "sandwich",
    "exit_gate": True,
} | {"tie_embeddings": False, "n_kv_heads": 4}
RANDOM_PLT = {"initial_state": "random", "carry_scale": 0.9, "n_prelude": 2, "gate_input": "query"}
POST_CODA = {
    "norms": "post",
    "offset": 2,
    "n_coda": 2,
    "memory": "own",
    "norm_between_loops": False,
    "carry_scale": 0.8,
} | {"tie_embeddings": False}
RETROFITTED = {
    "n_prelude": 1,
    "n_coda": 1,
    "injection": "concat",
    "offset": 0,
    "memory": "own",
    "norm_before_coda": True,
} | {"norm_between_loops": False, "rope_base": 100.0, "rope_scaling": STRETCH, "n_layers": 1}
NEW_CONFIGS = [
    (HUGINN_LIKE, 4),
    (OURO_LIKE, 2),
    (POST_CODA, 3),
    (RANDOM_PLT, 3),
    (RETROFITTED, 4),
    ({"n_loops": 1, "rope_base": 100.0, "rope_scaling": STRETCH, "qk_bias": True, "injection": "none"}, 1),
    (
        {"initial_state": "random", "injection": "concat", "offset": 2, "window": 1, "n_coda": 1, "exit_gate": True}
        | {"norms": "sandwich", "qk_bias": True, "norm_before_coda": True, "n_loops": 2},
        3,
    ),
    (
        {"n_loops": 2, "rope_table": True, "rope_pairs": "adjacent", "norms": "post", "gate_input": "query"}
        | {"exit_gate": True, "embed_multiplier": -0.3, "carry_scale": 0.6, "norm_between_loops": False},
        5,
    ),
    (
        {"norms": "pre_post", "offset": 0, "n_prelude": 2, "n_coda": 1, "window": 2, "rope_pairs": "adjacent"}
        | {"rope_base": 100.0, "rope_scaling": STRETCH, "carry_scale": 1.0},
        2,
    ),
    (
        {"n_loops": 4, "injection": "concat", "rope_table": True, "n_coda": 1, "window": 4, "n_kv_heads": 1}
        | {"norm_between_loops": False, "initial_state": "random", "exit_gate": True, "n_layers": 1},
        3,
    ),
]


def make_model(seed=0, dtype=torch.float64, **changes):
    """A model with random weights, peaky attention, norms and gates far from neutral."""
    model = LoopedLM(replace(BASE, **changes))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "ln" in name or "norm" in name:
            weight.data = 1 + 0.1 * noise
        elif name.endswith(("gate.weight", "q_proj.weight", "k_proj.weight")):
            weight.data = 1.5 * noise * weight.shape[-1] ** -0.5
        elif name.endswith("bias") or name == "embed.weight":
            weight.data = noise
        else:
            weight.data = noise * weight.shape[-1] ** -0.5
    if model.cfg.rope_table:
        # Angles of no base, so that only who reads the table knows them.
        angle = 3 * torch.randn(model.rope_table.table.shape[:2], generator=generator)
        model.rope_table.table.copy_(torch.stack((angle.cos(), angle.sin()), dim=-1))
    return model.to(dtype)


def random_start(model, ids, seed=0):
    """Arguments that give a model with a random initial state a Z_0 of ours; none for others."""
    if model.cfg.initial_state != "random":
        return {}
    shape, generator = (*ids.shape, model.cfg.d_model), torch.Generator().manual_seed(seed)
    return {"initial_state": torch.randn(shape, dtype=torch.float64, generator=generator).to(model.embed.weight.dtype)}


def everything(name):
    """A filter that asks for every hook point, patterns included."""
    return True


def assert_same(ours, expected, atol, what=""):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0, msg=lambda text: f"{what}: {text}")


@torch.no_grad()
def all_states(model, ids, **kwargs):
    """Every state of a run by hook name, patterns included, and the logits."""
    logits, cache = model.run_with_cache(ids, names_filter=everything, **kwargs)
    return dict(cache.items()) | {"logits": logits}


# -- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Measured over all states of these configurations: float64 4e-14, float32 2e-5.
    ("dtype", "atol"),
    [(torch.float64, 1e-10), (torch.float32, 2e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("case", range(len(CONFIGS) + len(NEW_CONFIGS)))
def test_every_state_equals_the_plain_implementation(case, dtype, atol):
    """Each state of each loop, patterns included, and no state more or less; fewer and more loops than trained."""
    changes, n_loops = (CONFIGS + NEW_CONFIGS)[case]
    model = make_model(seed=case, dtype=dtype, **changes)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    start = random_start(model, IDS)
    ours = all_states(model, IDS, n_loops=n_loops, **start)
    for row, tokens in enumerate(IDS.tolist()):
        given = [z[row].double() for z in start.values()]
        plain = plain_run(model.cfg, weights, tokens, n_loops, *given)
        assert set(ours) == set(plain)
        for name, expected in plain.items():
            assert ours[name].dtype == dtype
            assert_same(ours[name][row].double(), expected, atol, name)


# Measured: float64 7e-15, float32 4e-6.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("memory", ["own", "first"])
@torch.no_grad()
def test_asking_for_patterns_changes_nothing(memory, dtype, atol):
    """Patterns take another road through attention: it must lead to the same logits."""
    model = make_model(dtype=dtype, memory=memory)
    assert_same(all_states(model, IDS)["logits"], model(IDS), atol)


# Real tokens of each row among ten positions: padding on the left, on the right, on both sides, and none.
SPANS = [(3, 10), (0, 4), (9, 10), (0, 1), (2, 8), (0, 10)]


def padded_batch():
    """Documents of mixed lengths, padding of arbitrary tokens, and the mask."""
    ids = torch.randint(29, (len(SPANS), 10), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    for row, (start, end) in enumerate(SPANS):
        mask[row, start:end] = 1
    return ids, mask


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"offset": 2, "gate_input": "query"}, {"memory": "own", "carry_scale": 1.0}),
        *(HUGINN_LIKE, RANDOM_PLT, POST_CODA, RETROFITTED | {"offset": 1}),
    ],
)
def test_padded_documents_get_the_states_they_get_alone(changes):
    """No state of a real token depends on padding, its side, or neighbours in the batch; a drawn Z_0 neither."""
    model = make_model(**changes)
    ids, mask = padded_batch()
    batch = all_states(model, ids, attention_mask=mask, seed=5)
    for row, (start, end) in enumerate(SPANS):
        alone = all_states(model, ids[row : row + 1, start:end], seed=5)
        for name, expected in alone.items():
            ours = batch[name][row]
            ours = ours[:, start:end, start:end] if "pattern" in name else ours[start:end]
            assert_same(ours, expected[0], 1e-10, f"{name}, row {row}")


@torch.no_grad()
def test_masks_of_any_dtype_and_full_masks():
    """Boolean and integer masks mean the same, a float mask is refused; a mask without padding is no mask."""
    model = make_model()
    ids, mask = padded_batch()
    assert torch.equal(model(ids, mask.bool()), model(ids, mask))
    with pytest.raises(ValueError, match="additive masks mean the opposite"):
        model(ids, mask.float())
    assert torch.equal(model(ids, torch.ones_like(ids)), model(ids))


@pytest.mark.parametrize(
    "changes",
    [{"window": 5, "carry_scale": 1.0}, HUGINN_LIKE, OURO_LIKE, RANDOM_PLT | {"offset": 2}, POST_CODA, RETROFITTED],
)
@torch.no_grad()
def test_a_later_token_changes_no_earlier_state(changes):
    """Causal in every loop, carry and window included, and in prelude and coda."""
    model = make_model(**changes)
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 29
    before, after = all_states(model, IDS), all_states(model, changed)
    for name, state in before.items():
        earlier = (..., slice(None, 5), slice(None, 5)) if "pattern" in name else (slice(None), slice(None, 5))
        assert torch.equal(state[earlier], after[name][earlier]), name
    assert not torch.equal(before["logits"][:, 5], after["logits"][:, 5])


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"norm_between_loops": False}, {"memory": "own"}, HUGINN_LIKE, OURO_LIKE, RANDOM_PLT, POST_CODA),
        *(RETROFITTED, RETROFITTED | {"norm_between_loops": True}, POST_CODA | {"memory": "first", "window": 1}),
    ],
)
@torch.no_grad()
def test_stopping_after_a_loop_is_reading_out_after_it(changes):
    """Exit after loop r of a long run = a run of r loops in all."""
    model = make_model(**changes)
    _, cache = model.run_with_cache(IDS, n_loops=5)
    for loop in range(1, 6):
        # Measured: 0.
        assert_same(model(IDS, n_loops=loop), model.unembed(cache[f"loops.{loop}.hook_readout"]), 1e-12)


@torch.no_grad()
def test_loops_grow_on_demand():
    """Hook points appear when a run, a cache or a hook needs them; the numbers are those of a model made so."""
    model = make_model(n_loops=2)
    long = make_model(n_loops=5)
    assert torch.equal(model(IDS, n_loops=5), long(IDS))
    assert set(model.hook_dict) == set(long.hook_dict)
    assert torch.equal(model(IDS), long(IDS, n_loops=2))
    fired = []
    make_model(n_loops=2).run_with_hooks(
        IDS, n_loops=4, fwd_hooks=[("loops.4.hook_out", lambda x, hook: fired.append(hook.name))]
    )
    assert fired == ["loops.4.hook_out"]


@pytest.mark.parametrize("changes", [{}, HUGINN_LIKE, OURO_LIKE, POST_CODA])
def test_weights_stand_once(changes):
    """Loops add hook points, never parameters; fresh weights are the same for every loop count."""
    one, four = (LoopedLM(replace(BASE, **changes | {"n_loops": n_loops})) for n_loops in (1, 4))
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in four.parameters())
    assert list(one.state_dict()) == list(four.state_dict())
    assert not any("loops" in name for name in four.state_dict())
    one.init_weights(seed=3)
    four.init_weights(seed=3)
    torch.testing.assert_close(dict(one.state_dict()), dict(four.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_loss_by_hand(dtype):
    """Mean over pairs of neighbouring real tokens, in nats, in float32 at least."""
    model = make_model(dtype=dtype)
    ids, mask = padded_batch()
    logits = model(ids, mask)
    assert logits.dtype == dtype
    terms = []
    for row, (start, end) in enumerate(SPANS):
        for pos in range(start, end - 1):
            scores = logits[row, pos].double()
            terms.append(scores.exp().sum().log() - scores[ids[row, pos + 1]])
    loss = model(ids, mask, return_type="loss")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(loss.double(), torch.stack(terms).mean(), 1e-10 if dtype == torch.float64 else 1e-5)
    whole = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].double().flatten(0, 1), IDS[:, 1:].flatten())
    assert_same(model(IDS, return_type="loss").double(), whole, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"gate_input": "query", "tie_embeddings": False}, {"memory": "own"}),
        *(HUGINN_LIKE, OURO_LIKE, RANDOM_PLT, POST_CODA, RETROFITTED),
    ],
)
def test_gradient_reaches_every_weight(changes):
    """Every parameter gets a finite gradient that is not zero, padding or not; with one loop the gates get none.

    The exit gate has no say in the logits and gets none at all; the adapter where loop 1 passes E as it is.
    """
    ids, mask = padded_batch()
    for args in ((IDS,), (ids, mask)):
        model = make_model(**changes)
        model(*args, return_type="loss").backward()
        for name, weight in model.named_parameters():
            if name.startswith("exit_gate."):
                assert weight.grad is None, name
                continue
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
            assert weight.grad.abs().max() > 0, name
    model = make_model(**changes)
    model(IDS, n_loops=1, return_type="loss").backward()
    unused = ["exit_gate.", ".gate."] + (["adapter."] if model.cfg.initial_state == "embedding" else [])
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == {
        name for name, _ in model.named_parameters() if any(part in name for part in unused)
    }


@pytest.mark.parametrize("changes", [{}, HUGINN_LIKE])
@torch.no_grad()
def test_logits_of_the_last_position(changes):
    """The last row of all logits, without the others. Measured: 3e-15."""
    model = make_model(**changes)
    assert_same(model(IDS, return_type="last"), model(IDS)[:, -1], 1e-12)


@pytest.mark.parametrize("changes", [{}, {"rope_table": True, "rope_pairs": "adjacent"}])
@torch.no_grad()
def test_half_precision_is_turned_in_float32(changes):
    """Queries and keys of a bfloat16 model: turned by angles that are not rounded, then rounded once."""
    model = make_model(dtype=torch.bfloat16, **changes)
    whole = make_model(dtype=torch.float32, **changes)
    for point in ("q", "k"):
        before, after = (f"loops.1.blocks.0.attn.hook_{turn}{point}" for turn in ("", "rot_"))
        _, ours = model.run_with_cache(IDS, names_filter=[before, after])
        with whole.hooks(fwd_hooks=[(before, lambda x, hook, ours=ours: ours[hook.name].float())]):
            _, expected = whole.run_with_cache(IDS, names_filter=after)
        assert ours[after].dtype == torch.bfloat16
        assert torch.equal(ours[after], expected[after].bfloat16())


# -- memory -----------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("train", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("memory", ["own", "first"])
def test_no_attention_matrix_unless_asked_for(memory, padded, train):
    """Three documents need no more than [3, 1, S, S] masks; [3, heads, S, S] is there once a pattern is named."""
    length = 257
    model = make_model(dtype=torch.float32, memory=memory, window=65)
    ids = torch.randint(29, (3, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :100] = 0
        mask[1, 200:] = 0
    pattern = "loops.3.blocks.1.attn.hook_pattern" + ("" if memory == "own" else "_local")
    with torch.set_grad_enabled(train):
        with LargestTensor() as plain:
            model(ids, mask)
        with LargestTensor() as default_cache:
            model.run_with_cache(ids, attention_mask=mask)
        with LargestTensor() as asked:
            model.run_with_cache(ids, attention_mask=mask, names_filter=pattern)
    # Without padding and windows plain causality needs no mask either.
    assert plain.numel < length**2 if memory == "own" and not padded else plain.numel <= 3 * length**2
    assert default_cache.numel <= 3 * length**2
    assert asked.numel == 3 * model.cfg.n_heads * length**2


# -- hooks ------------------------------------------------------------------------------------------


def nudge(x, hook):
    """Another state of the same shape; gates and patterns too have no symmetry against it."""
    return x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))


def is_side_exit(name, n_loops=3):
    """The exit gate and, before the last loop, what the head would read: nothing that goes on reads them."""
    early = any(name.startswith(f"loops.{loop}.") for loop in range(1, n_loops))
    return name.endswith("hook_exit_gate") or (early and name.endswith(("hook_coda_out", "hook_readout")))


@pytest.mark.parametrize(
    "changes",
    [
        *({"memory": "own"}, {}, HUGINN_LIKE, OURO_LIKE | {"n_loops": 3}, RANDOM_PLT, POST_CODA),
        RETROFITTED | {"exit_gate": True},
    ],
)
@torch.no_grad()
def test_an_edit_flows_on_and_never_back(changes):
    """For each hook point: states that fired before are untouched to the bit, and the logits change."""
    model = make_model(**changes)
    clean = all_states(model, IDS)
    order = list(clean)
    assert set(order) == {*model.hook_dict, "logits"}
    for name in model.hook_dict:
        with model.hooks(fwd_hooks=[(name, nudge)]):
            edited = all_states(model, IDS)
        for earlier in order[: order.index(name)]:
            assert torch.equal(edited[earlier], clean[earlier]), f"{name} changed {earlier}"
        assert not torch.equal(edited[name], clean[name])
        assert torch.equal(edited["logits"], clean["logits"]) == is_side_exit(name), name


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "loops.1.hook_in",
        "loops.1.blocks.1.hook_resid_mid",
        "loops.1.hook_out_pre_norm",
        "loops.1.hook_out",
        "loops.2.blocks.0.hook_resid_pre",
        "loops.2.blocks.1.hook_resid_post",
        "loops.3.hook_in",
        "loops.3.hook_out",
    ],
)
@torch.no_grad()
def test_an_edit_of_the_stream_reaches_everything_after(name):
    """On the main road there is no state after the edit that does not feel it."""
    model = make_model(carry_scale=1.0)
    clean = all_states(model, IDS)
    with model.hooks(fwd_hooks=[(name, nudge)]):
        edited = all_states(model, IDS)
    order = list(clean)
    for later in order[order.index(name) :]:
        assert not torch.equal(edited[later], clean[later]), f"{name} did not change {later}"


@pytest.mark.parametrize(
    "name",
    [
        *("hook_embed", "prelude.blocks.0.hook_resid_pre", "prelude.blocks.0.hook_resid_post", "prelude.hook_out"),
        *("hook_initial_state", "loops.2.hook_out", "loops.3.hook_out"),
        *("coda.hook_in", "coda.blocks.0.hook_resid_mid", "loops.3.hook_coda_out", "loops.3.hook_readout"),
    ],
)
@torch.no_grad()
def test_an_edit_before_or_after_the_loops_reaches_everything_after(name):
    """So in a model with prelude, random start and coda; what loop 2 hands over is felt by no exit of loop 2."""
    model = make_model(**HUGINN_LIKE)
    clean = all_states(model, IDS)
    with model.hooks(fwd_hooks=[(name, nudge)]):
        edited = all_states(model, IDS)
    order = list(clean)
    # Prelude and random start know nothing of one another.
    apart = {"hook_initial_state", "loops.1.hook_carry"} if "embed" in name or "prelude" in name else set()
    if name == "hook_initial_state":
        apart = {other for other in order if other.startswith("prelude.")}
    for later in order[order.index(name) :]:
        assert torch.equal(edited[later], clean[later]) == (later in apart), f"{name}, {later}"


@torch.no_grad()
def test_the_coda_fires_for_the_exit_of_the_run_only():
    """Once, on the way to the run's own logits, even where earlier exits are asked for; those never touch the run."""
    model = make_model(**POST_CODA)
    clean, fired = model(IDS), []

    def note(x, hook):
        fired.append(hook.name)

    own = [name for name in model.hook_dict if name.startswith("coda.")]
    exits = [f"loops.{loop}.{point}" for loop in (1, 2, 3) for point in ("hook_coda_out", "hook_readout")]
    for asked in (own, own + exits):
        for n_loops in (1, 3):
            fired.clear()
            reached = [name for name in asked if name.startswith("coda.") or int(name.split(".")[1]) <= n_loops]
            model.run_with_hooks(IDS, n_loops=n_loops, fwd_hooks=[(name, note) for name in reached])
            assert sorted(fired) == sorted(reached)
    assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=[(exits[0], nudge), (exits[1], nudge)]), clean)
    edited = model.run_with_cache(IDS, names_filter="loops.1.hook_readout")[1]["loops.1.hook_readout"]
    with model.hooks(fwd_hooks=[("coda.hook_in", nudge)]):
        assert not torch.equal(model(IDS), clean)
        _, cache = model.run_with_cache(IDS, names_filter="loops.1.hook_readout")
    assert torch.equal(cache["loops.1.hook_readout"], edited)


@pytest.mark.parametrize("changes", [{}, {"norm_between_loops": False}, POST_CODA, HUGINN_LIKE])
@torch.no_grad()
def test_what_is_handed_on_is_not_what_is_read_out(changes):
    """An edit of `hook_out` moves the loops after, and of the readouts only theirs; a coda's exit can be edited."""
    model = make_model(**changes)
    clean = all_states(model, IDS)
    for loop in (1, 2):
        with model.hooks(fwd_hooks=[(f"loops.{loop}.hook_out", nudge)]):
            edited = all_states(model, IDS)
        for other in (1, 2, 3):
            name = f"loops.{other}.hook_readout"
            assert torch.equal(edited[name], clean[name]) == (other <= loop), name
    with model.hooks(fwd_hooks=[("loops.3.hook_out", nudge)]):
        assert not torch.equal(all_states(model, IDS)["loops.3.hook_readout"], clean["loops.3.hook_readout"])
    if model.cfg.n_coda:
        with model.hooks(fwd_hooks=[("loops.1.hook_coda_out", nudge)]):
            edited = all_states(model, IDS)
        assert_same(edited["loops.1.hook_readout"], model.ln_final(edited["loops.1.hook_coda_out"]), 0)
        assert not torch.equal(edited["loops.1.hook_readout"], clean["loops.1.hook_readout"])


@pytest.mark.parametrize("changes", [POST_CODA, HUGINN_LIKE, RETROFITTED])
@torch.no_grad()
def test_the_coda_of_any_state(changes):
    """`coda_out` of what a loop hands over is its `hook_coda_out`, padded or not, and fires no hook."""
    model = make_model(**changes | {"norm_between_loops": True})
    ids, mask = padded_batch()
    clean, fired = all_states(model, ids, attention_mask=mask), []
    model.add_hook(lambda name: name.startswith("coda."), lambda x, hook: fired.append(hook.name))
    for loop in (1, 3):
        ours = model.coda_out(clean[f"loops.{loop}.hook_out"], mask)
        # Measured: 2e-15.
        assert_same(ours[mask.bool()], clean[f"loops.{loop}.hook_coda_out"][mask.bool()], 1e-12)
    assert not fired
    with pytest.raises(ValueError, match="no coda"):
        make_model().coda_out(clean["loops.3.hook_out"])


def test_a_hook_fires_once_in_its_own_loop_only():
    """The same layer runs in every loop; its hook points do not."""
    model = make_model()
    fired = []
    for n_loops in (1, 2, 3):
        with model.hooks(fwd_hooks=[("loops.2.blocks.0.hook_resid_pre", lambda x, hook: fired.append(hook.name))]):
            model(IDS, n_loops=n_loops)
    assert fired == ["loops.2.blocks.0.hook_resid_pre"] * 2


@torch.no_grad()
def test_keys_edited_in_loop_one_are_the_memory_of_later_loops():
    """The memory is loop 1's keys and values as its hooks left them, and is no other loop's."""
    model = make_model()
    clean = all_states(model, IDS)

    def z_global(name):
        with model.hooks(fwd_hooks=[(name, nudge)]):
            return all_states(model, IDS)["loops.3.blocks.0.attn.hook_z_global"]

    # Replacing what enters loop 3 leaves its query as it was, so that only the memory can differ.
    fixed = ("loops.3.hook_in", lambda x, hook: clean["loops.3.hook_in"])
    with model.hooks(fwd_hooks=[fixed]):
        for point in ("hook_v", "hook_rot_k"):
            assert not torch.equal(
                z_global(f"loops.1.blocks.0.attn.{point}"), clean["loops.3.blocks.0.attn.hook_z_global"]
            )
            assert torch.equal(z_global(f"loops.2.blocks.0.attn.{point}"), clean["loops.3.blocks.0.attn.hook_z_global"])


@pytest.mark.parametrize(("gate", "branch"), [(0.0, "local"), (1.0, "global")])
@torch.no_grad()
def test_the_gate_weighs_the_global_branch(gate, branch):
    """g = 0 is the window alone, g = 1 loop 1's memory alone."""
    model = make_model()
    at = "loops.2.blocks.1.attn."
    with model.hooks(fwd_hooks=[(at + "hook_gate", lambda x, hook: torch.full_like(x, gate))]):
        states = all_states(model, IDS)
    assert torch.equal(states[at + "hook_z"], states[at + f"hook_z_{branch}"])


@torch.no_grad()
def test_a_pattern_edit_weighs_the_values():
    """With every query looking at itself only, each head's output is its own key/value head's value."""
    model = make_model()
    at = "loops.2.blocks.0.attn."
    with model.hooks(fwd_hooks=[(at + "hook_pattern_local", lambda x, hook: torch.eye(9).to(x).expand_as(x))]):
        states = all_states(model, IDS)
    assert_same(states[at + "hook_z_local"], states[at + "hook_v"].repeat_interleave(2, dim=2), 1e-14)


def fail(x, hook):
    raise RuntimeError("a hook failed")


@pytest.mark.parametrize("why", ["forward", "hook"])
def test_hooks_come_off_when_a_run_fails(why):
    """Whatever raises, the run's hooks go and the caller's own stay, permanent or not."""
    model = make_model()
    clean = model(IDS)
    own = []
    model.add_perma_hook("hook_embed", lambda x, hook: own.append("permanent"))
    model.add_hook("loops.1.hook_in", lambda x, hook: own.append("added"))
    ids, function, error = (IDS.double(), nudge, ValueError) if why == "forward" else (IDS, fail, RuntimeError)
    hooks = [(name, function) for name in ("loops.2.hook_in", "loops.1.blocks.0.attn.hook_pattern")]

    def run_within_hooks(run, **kwargs):
        with model.hooks(fwd_hooks=hooks):
            run(ids, **kwargs)

    for run in (
        lambda: model.run_with_hooks(ids, fwd_hooks=hooks),
        lambda: run_within_hooks(model.run_with_cache, names_filter=everything),
        lambda: run_within_hooks(model),
    ):
        with pytest.raises(error):
            run()
        assert set(model.list_hooks()) == {"hook_embed", "loops.1.hook_in"}
    own.clear()
    assert torch.equal(model(IDS), clean)
    assert own == ["permanent", "added"]


@pytest.mark.parametrize(
    "name",
    [
        *("loops.9.hook_out", "loops.0.hook_in", "blocks.0", "blocks.0.hook_resid_post", ""),
        *("prelude.hook_out", "coda.hook_in", "loops.1.hook_coda_out", "loops.1.hook_exit_gate", "hook_initial_state"),
    ],
)
@torch.no_grad()
def test_unknown_names_say_the_range(name):
    """A name that could never fire is refused by every door, and the message says what there is."""
    model = make_model()
    doors = [
        lambda: model.run_with_hooks(IDS, fwd_hooks=[(name, nudge)]),
        lambda: model.add_hook(name, nudge),
        lambda: model.add_perma_hook(name, nudge),
        lambda: model.hooks(fwd_hooks=[(name, nudge)]).__enter__(),
        lambda: model.run_with_cache(IDS, names_filter=name),
        lambda: model.run_with_cache(IDS, names_filter=["hook_embed", name]),
    ]
    for door in doors:
        with pytest.raises(KeyError, match="loops 1 to 3 and layers 0 to 1"):
            door()
    assert not model.list_hooks()


def in_place(x, hook):
    """Silences the third token, or query head, of the first document."""
    x[0, 2] = 0.0
    return x


@pytest.mark.parametrize(
    "changes", [{}, {"norm_between_loops": False}, HUGINN_LIKE, OURO_LIKE, RANDOM_PLT, POST_CODA, RETROFITTED]
)
@torch.no_grad()
def test_an_edit_in_place_is_an_edit(changes):
    """`x[0, 2] = 0; return x` is how many hooks are written: it does what returning a changed copy does."""
    model = make_model(**changes)
    for name in model.hook_dict:
        edited = model.run_with_hooks(IDS, fwd_hooks=[(name, in_place)])
        expected = model.run_with_hooks(IDS, fwd_hooks=[(name, lambda x, hook: in_place(x.clone(), hook))])
        assert torch.equal(edited, expected), name


@torch.no_grad()
def test_an_edit_in_place_of_a_drawn_initial_state():
    """It silences a token of the first document and no other's."""
    model = make_model(dtype=torch.float32, **RANDOM_PLT)
    edited = model.run_with_hooks(IDS, fwd_hooks=[("hook_initial_state", in_place)])
    assert torch.equal(edited[1], model(IDS)[1])


@torch.no_grad()
def test_an_edit_in_place_leaves_the_callers_initial_state():
    """What was given is the caller's."""
    model = make_model(**RANDOM_PLT)
    given = random_start(model, IDS)
    kept = given["initial_state"].clone()
    model.run_with_hooks(IDS, fwd_hooks=[("hook_initial_state", in_place)], **given)
    assert torch.equal(given["initial_state"], kept)


@torch.no_grad()
def test_a_hook_beyond_the_run_is_refused():
    """A name that this run will not reach is as wrong as one that is not there."""
    model = make_model()
    for door in (
        lambda: model.run_with_hooks(IDS, n_loops=2, fwd_hooks=[("loops.3.hook_out", nudge)]),
        lambda: model.run_with_cache(IDS, n_loops=2, names_filter="loops.3.hook_out"),
        lambda: model.run_with_cache(IDS, n_loops=2, names_filter=["hook_embed", "loops.3.hook_out"]),
    ):
        with pytest.raises(KeyError, match="loops 1 to 2"):
            door()


# -- wrong input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_loops", [0, -1, True, 1.5, "2"])
def test_wrong_loop_counts(n_loops):
    """The message says what came, what is allowed and what the model was trained with."""
    model = make_model()
    for door in (model, model.run_with_hooks, model.run_with_cache):
        with pytest.raises(ValueError, match=rf"n_loops = {n_loops!r} .*integer >= 1 .*trained with 3"):
            door(IDS, n_loops=n_loops)
    with pytest.raises(ValueError, match="n_loops"):
        model.ensure_loops(n_loops)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]] * 2), "hole"),
        (torch.tensor([[1] * 9, [0, 1, 1, 0, 0, 0, 0, 0, 1]]), "hole"),
        (torch.ones(2, 8), r"\(2, 8\).*\(2, 9\)"),
        (torch.ones(9), r"\(9,\)"),
        (torch.ones(2, 1, 9, 9), r"\(2, 1, 9, 9\)"),
    ],
    ids=["hole", "hole_in_second_row", "short", "flat", "matrix"],
)
def test_wrong_masks(mask, message):
    """A mask that cannot be meant is refused, not bent into shape."""
    with pytest.raises(ValueError, match=f"attention_mask.*{message}"):
        make_model()(IDS, mask)


@pytest.mark.parametrize("ids", [IDS[0], IDS[None], IDS.double(), IDS[:, :0], IDS[:0]])
def test_wrong_tokens(ids):
    """Tokens are a non-empty integer [batch, pos]."""
    with pytest.raises(ValueError, match="input_ids"):
        make_model()(ids)


@pytest.mark.parametrize("token", [29, -1])
def test_tokens_beyond_the_vocabulary(token):
    """The docstring promises a ValueError."""
    with pytest.raises(ValueError, match="input_ids"):
        make_model()(torch.full((1, 3), token))


def test_int32_tokens_have_a_loss():
    """What gives logits gives a loss."""
    model = make_model()
    assert torch.equal(model(IDS.int(), return_type="loss"), model(IDS, return_type="loss"))


def test_wrong_return_type():
    """The message says what there is."""
    with pytest.raises(ValueError, match="return_type = 'both'"):
        make_model()(IDS, return_type="both")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp")),
        *((name, bad) for name in ("n_ctx", "n_loops", "window") for bad in (0, -1, 2.0, True, "3")),
        *(("offset", bad) for bad in (-1, 1.0, True, None)),
        *((name, bad) for name in ("injection", "memory", "gate_input") for bad in ("other", None, 1)),
        *((name, bad) for name in ("embed_scale", "carry_scale") for bad in (float("nan"), float("inf"))),
        *((name, bad) for name in ("rope_base", "norm_eps") for bad in (0.0, -1.0, float("nan"), float("inf"))),
        ("n_kv_heads", 3),
        ("n_kv_heads", 8),
        ("d_head", 5),
        *((name, bad) for name in ("n_prelude", "n_coda") for bad in (-1, 1.0, True, None, "1")),
        *((name, bad) for name in ("initial_state", "norms", "rope_pairs") for bad in ("other", None, 1, True)),
        *((name, bad) for name in ("initial_std", "exit_threshold") for bad in (0.0, -1.0, float("nan"), "1", None)),
        *(("embed_multiplier", bad) for bad in (float("nan"), float("inf"), None, "1", True)),
        *((name, bad) for name in ("norm_before_coda", "qk_bias", "rope_table", "exit_gate") for bad in (None, 1, "")),
        *(("rope_scaling", bad) for bad in (8.0, "llama3", {"factor": 8.0}, True)),
    ],
)
def test_wrong_configuration(field, value):
    """Every field refuses what it cannot mean, by name and with the value that came."""
    with pytest.raises(ValueError, match=rf"^LoopedConfig: {field} = {value!r} is not allowed"):
        replace(BASE, **{field: value})


@pytest.mark.parametrize("value", [None, "0.5"])
@pytest.mark.parametrize(
    "field", ["embed_scale", "carry_scale", "rope_base", "norm_eps", "norm_between_loops", "tie_embeddings"]
)
def test_wrong_types_in_a_configuration(field, value):
    """A null or a string from a JSON file is refused by name."""
    with pytest.raises(ValueError, match=rf"^LoopedConfig: {field} = {value!r} is not allowed"):
        replace(BASE, **{field: value})


def test_a_random_state_has_to_enter_with_the_tokens():
    """Without an injection no token would ever reach the loops."""
    with pytest.raises(ValueError, match=r"initial_state = 'random' .*injection = 'none'"):
        replace(BASE, initial_state="random", injection="none")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, bad) for name in vars(STRETCH) for bad in (0, -1.0, float("nan"), float("inf"), None, "8", True)),
        *(("high_freq_factor", bad) for bad in (1.0, 0.5)),
    ],
)
def test_wrong_rope_scaling(field, value):
    """Every value is a number above 0, and the blend goes from slow to fast."""
    with pytest.raises(ValueError, match=rf"rope_scaling\.{field} = {value!r} is not allowed"):
        replace(STRETCH, **{field: value})


@pytest.mark.parametrize(
    ("changes", "state", "message"),
    [
        ({}, torch.zeros(2, 9, 12), "starts from its embedding"),
        (RANDOM_PLT, torch.zeros(2, 9, 11), r"\(2, 9, 11\): it must be \(2, 9, 12\)"),
        (RANDOM_PLT, torch.zeros(1, 9, 12), r"\(1, 9, 12\): it must be \(2, 9, 12\)"),
        (RANDOM_PLT, torch.zeros(12), r"\(12,\)"),
    ],
)
def test_wrong_initial_states(changes, state, message):
    """One row per token, and only where there is one."""
    with pytest.raises(ValueError, match=f"initial_state.*{message}"):
        make_model(**changes)(IDS, initial_state=state)


@torch.no_grad()
def test_a_given_initial_state():
    """It is what enters loop 1, in the model's dtype; with none given, a seed decides."""
    model = make_model(dtype=torch.float32, **RANDOM_PLT)
    given = random_start(model, IDS)["initial_state"].double()
    states = all_states(model, IDS, initial_state=given)
    assert_same(states["hook_initial_state"], given.float(), 0)
    assert torch.equal(model(IDS), model(IDS, seed=0))
    assert not torch.equal(model(IDS), model(IDS, seed=1))
    drawn = all_states(model, IDS, seed=3)["hook_initial_state"]
    assert torch.equal(model(IDS, initial_state=drawn), model(IDS, seed=3))


@torch.no_grad()
def test_the_end_of_a_stored_table():
    """As many tokens as it has rotations for run, one more is refused; computed rotations have no end."""
    model = make_model(rope_table=True, n_ctx=9)
    model(IDS)
    with pytest.raises(ValueError, match=r"10 tokens .*table of rotations.* 9"):
        model(torch.zeros(1, 10, dtype=torch.long))
    make_model(n_ctx=9)(torch.zeros(1, 10, dtype=torch.long))


@torch.no_grad()
def test_a_stored_table_stays_as_stored():
    """Float32 through every cast, to the bit, and carried along to another device and by the state dict."""
    model = make_model(dtype=torch.float32, rope_table=True, rope_pairs="adjacent")
    table = model.rope_table.table.clone()
    for cast in (
        *(lambda net: net.to(torch.bfloat16), lambda net: net.half(), lambda net: net.double()),
        *(lambda net: net.to("cpu", torch.bfloat16), lambda net: net.float()),
    ):
        dtype = cast(model).embed.weight.dtype
        assert model.rope_table.table.dtype == torch.float32
        assert torch.equal(model.rope_table.table, table)
        assert model(IDS).dtype == dtype
    assert torch.equal(model.state_dict()["rope_table.table"], table)
    assert model.to("meta", torch.bfloat16).rope_table.table.device.type == "meta"
    assert model.rope_table.table.dtype == torch.float32
    assert not list(model.rope_table.parameters())


# -- caches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["own", "first"])
def test_what_a_cache_keeps(memory):
    """By default everything but patterns; with a filter exactly what it names, patterns included."""
    model = make_model(memory=memory)
    patterns = {name for name in model.hook_dict if "pattern" in name}
    assert len(patterns) == (6 if memory == "own" else 2 + 4 * 2)
    assert set(model.run_with_cache(IDS)[1]) == set(model.hook_dict) - patterns
    assert set(model.run_with_cache(IDS, names_filter=everything)[1]) == set(model.hook_dict)
    one, *_, other = sorted(patterns)
    assert set(model.run_with_cache(IDS, names_filter=one)[1]) == {one}
    assert set(model.run_with_cache(IDS, names_filter=[one, other])[1]) == {one, other}
    assert model.run_with_cache(IDS, names_filter=one)[1][one].shape == (2, 4, 9, 9)
    readout = "loops.1.hook_readout"
    silent = make_model(memory=memory, norm_between_loops=False)
    assert set(silent.run_with_cache(IDS, names_filter=readout)[1]) == {readout}


@torch.no_grad()
def test_one_loop_of_a_cache():
    """`cache.loop(r)` answers like the cache of an ordinary run, for that loop."""
    model = make_model()
    _, cache = model.run_with_cache(IDS)
    second = cache.loop(2)
    assert second["resid_post", -1] is cache["loops.2.blocks.1.hook_resid_post"]
    assert second["q", 0] is cache["loops.2.blocks.0.attn.hook_q"]
    assert second["hook_out"] is cache["loops.2.hook_out"]
    assert second["embed"] is cache["hook_embed"] is cache["embed"]
    names = {name.removeprefix("loops.2.") for name in cache if name.startswith("loops.2.")}
    assert set(second) == names | {"hook_embed"}
    for loop in (0, 4, 9, -1):
        with pytest.raises(KeyError, match="1 to 3"):
            cache.loop(loop)
    with pytest.raises(KeyError, match="1 to 2"):
        model.run_with_cache(IDS, n_loops=2)[1].loop(3)
    for key in (("resid_post", 0), "resid_post", "hook_out", "blocks.0.hook_resid_post"):
        with pytest.raises(KeyError, match=r"cache\.loop\(r\)"):
            cache[key]


@torch.no_grad()
def test_accumulated_resid_of_a_loop():
    """TransformerLens' stack of the residual stream holds that loop's states, normed by the final norm if asked."""
    model = make_model()
    _, cache = model.run_with_cache(IDS)
    at = "loops.2.blocks."
    names = ["0.hook_resid_pre", "0.hook_resid_mid", "1.hook_resid_pre", "1.hook_resid_mid", "1.hook_resid_post"]
    expected = torch.stack([cache[at + name] for name in names])
    stack, labels = cache.loop(2).accumulated_resid(incl_mid=True, return_labels=True)
    assert torch.equal(stack, expected)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    scale = (expected.pow(2).mean(-1, keepdim=True) + model.cfg.norm_eps).sqrt()
    normed = cache.loop(2).accumulated_resid(incl_mid=True, apply_ln=True)
    assert_same(normed, expected / scale * model.ln_final.weight, 1e-12)
    assert_same(normed[-1], cache["loops.2.hook_readout"], 1e-12)


@pytest.mark.parametrize("helper", ONE_PASS_HELPERS)
def test_helpers_that_would_answer_for_the_wrong_layer_raise(helper):
    """On the whole run all of them; within a loop those that need what a looped model has not."""
    _, cache = make_model().run_with_cache(IDS)
    with pytest.raises(NotImplementedError, match=rf"{helper}.*cache\.loop\(r\)"):
        getattr(cache, helper)()
    if helper not in WORK_ON_A_LOOP:
        with pytest.raises(NotImplementedError, match=helper):
            getattr(cache.loop(1), helper)()


def test_no_helper_is_forgotten():
    """A helper that a new TransformerLens brings has to be looked at before loops offer it."""
    as_a_dict = {"keys", "values", "items", "to", "remove_batch_dim", "apply_slice_to_batch_dim", "toggle_autodiff"}
    public = {name for name in dir(ActivationCache) if not name.startswith("_")}
    assert public - as_a_dict == set(ONE_PASS_HELPERS)


@torch.no_grad()
def test_batch_dimension_of_a_cache():
    """It can be left out from the start, removed, or sliced; the loops follow."""
    model = make_model()
    _, cache = model.run_with_cache(IDS[:1])
    _, without = model.run_with_cache(IDS[:1], remove_batch_dim=True)
    _, both = model.run_with_cache(IDS)
    removed, sliced = model.run_with_cache(IDS[:1])[1].remove_batch_dim(), both.apply_slice_to_batch_dim(0)
    for bare in (without, removed, sliced):
        assert not bare.has_batch_dim
        assert bare["loops.2.blocks.0.attn.hook_gate"].shape == (9, 4)
        for name, state in cache.items():
            assert_same(bare[name], state[0], 1e-12, name)
        assert_same(bare.loop(3).accumulated_resid(apply_ln=True)[-1], bare["loops.3.hook_readout"], 1e-12)


def test_pos_slice_is_refused():
    """It would cut heads where it should cut positions; the message shows what to write."""
    with pytest.raises(ValueError, match=r"pos_slice.*\[:, -1\]"):
        make_model().run_with_cache(IDS, pos_slice=-1)


def test_a_sliced_loop_still_refuses():
    """Slicing the batch does not bring back helpers that would answer wrongly."""
    sliced = make_model().run_with_cache(IDS)[1].loop(2).apply_slice_to_batch_dim(0)
    with pytest.raises(NotImplementedError):
        sliced.decompose_resid()
