"""Interventions: each against wiring done by hand, the laws they obey, padding, nesting, refusals."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from plain_looped import norm, one_layer
from test_decoder import (
    HUGINN_LIKE,
    OURO_LIKE,
    POST_CODA,
    RANDOM_PLT,
    RETROFITTED,
    SPANS,
    all_states,
    assert_same,
    fail,
    make_model,
    nudge,
    padded_batch,
    random_start,
)
from tiny import random_corpus, word_tokenizer, words

from loopdiag import interventions as iv
from loopdiag.bootstrap import interval, resampled_means
from loopdiag.interventions import contexts
from loopdiag.model.past import Past
from loopdiag.results import weights_hash

IDS = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(1))
WIRINGS = [{}, {"offset": 2, "gate_input": "query", "norm_between_loops": False}, HUGINN_LIKE, OURO_LIKE, RANDOM_PLT]
WIRINGS += [POST_CODA, RETROFITTED]


def plt(**changes):
    """A Parallel Loop Transformer whose carry matters, with four loops."""
    return make_model(**({"carry_scale": 0.8, "n_loops": 4} | changes))


# -- by hand -----------------------------------------------------------------------------------------


def by_hand(model, batch, n_loops=4, *, offsets=None, edit=None, gate=None, own=(), order=None):
    """The last state N(Y_R) of every document of a batch, loop by loop with the plain layers of `plain_looped`.

    All documents go through a loop before the next, so that one may take another's carry. `edit(loop, carries)` changes
    the list of unshifted carries, `gate(loop)` fixes the gate, `own` are loops that remember themselves.
    """
    cfg, weights = model.cfg, {name: weight.double() for name, weight in model.state_dict().items()}
    starts = [weights["embed.weight"][torch.tensor(tokens)] * cfg.embed_multiplier for tokens in batch]
    memory = [[None] * cfg.n_layers for _ in batch]
    carries = None
    for turn, loop in enumerate(order or range(1, n_loops + 1)):
        inputs = starts
        if turn:
            k = (offsets or {}).get(loop, cfg.offset)
            shifted = [torch.cat((torch.zeros(k, cfg.d_model), z))[: len(z)].double() for z in carries]
            shifted = shifted if edit is None else edit(loop, shifted, k)
            inputs = [cfg.embed_scale * e + cfg.carry_scale * s for e, s in zip(starts, shifted, strict=True)]
        carries = []
        for document, x in enumerate(inputs):
            for layer in range(cfg.n_layers):
                name, shared = f"blocks.{layer}.", memory[document][layer]
                fixed = dict(weights)
                if turn and gate is not None and gate(loop, layer) is not None:
                    value = torch.tensor(gate(loop, layer), dtype=torch.float64)
                    fixed[name + "attn.gate.weight"] = torch.zeros_like(weights[name + "attn.gate.weight"])
                    bias = torch.special.logit(value).clamp(-1e4, 1e4)
                    fixed[name + "attn.gate.bias"] = bias.expand(cfg.n_heads)
                if turn and loop in own:
                    # Its own keys and values, which do not depend on what it remembers.
                    _, shared = one_layer(cfg, fixed, name, x, shared, {}, "")
                x, made = one_layer(cfg, fixed, name, x, shared, {}, "")
                if not turn:
                    memory[document][layer] = made
            carries.append(norm(x, weights["ln_final.weight"], cfg))
    return carries


def same_as_by_hand(model, intervention, changed=True, **wiring):
    """Whether an intervention gives what wiring by hand gives, for a padded batch; and does change something."""
    ids, mask = padded_batch()
    batch = [ids[row, start:end].tolist() for row, (start, end) in enumerate(SPANS)]
    name = "loops.4.hook_readout"
    _, clean = model.run_with_cache(ids, mask, names_filter=name)
    with intervention:
        _, ours = model.run_with_cache(ids, mask, names_filter=name)
    for row, (expected, (start, end)) in enumerate(zip(by_hand(model, batch, **wiring), SPANS, strict=True)):
        assert_same(ours[name][row, start:end], expected, 1e-10, f"document {row}")
    assert torch.equal(ours[name], clean[name]) != changed


def means(carries, k):
    """Every carry that is handed over, by the mean of them."""
    out = []
    for carry in carries:
        carry = carry.clone()
        if len(carry) > k:
            carry[k:] = sum(carry[k:]) / len(carry[k:])
        out.append(carry)
    return out


def others(carries, k):
    """The next document's carry at the same place, from the start again where it ends."""
    out = []
    for i, carry in enumerate(carries):
        donor, carry = carries[(i + 1) % len(carries)][k:], carry.clone()
        for pos in range(k, len(carry)):
            carry[pos] = donor[(pos - k) % len(donor)] if len(donor) else 0
        out.append(carry)
    return out


CARRIES = [
    (iv.drop_carry, lambda carries, k: [torch.zeros_like(z) for z in carries]),
    (iv.mean_carry, means),
    (iv.other_carry, others),
]


@pytest.mark.parametrize("k", [0, 1, 2, 4, 50])
@pytest.mark.parametrize("loop", [None, 2, 3, 4])
@torch.no_grad()
def test_offset(k, loop):
    """Every boundary or one; more tokens than a document has leave no carry."""
    model = plt()
    offsets = dict.fromkeys(range(2, 5) if loop is None else [loop], k)
    same_as_by_hand(model, iv.shift_offset(model, k, loop), changed=k != 1, offsets=offsets)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("loop", [None, 2, 4])
@pytest.mark.parametrize("case", range(3))
@torch.no_grad()
def test_carry(case, loop, offset):
    """Zeros, the document's mean, the next document's; documents of one token and of ten in one batch."""
    intervene, reference = CARRIES[case]
    model = plt(offset=offset)

    def edit(r, carries, k):
        return reference(carries, k) if loop in (None, r) else carries

    same_as_by_hand(model, intervene(model, loop), edit=edit)


@pytest.mark.parametrize(
    ("context", "order"),
    [
        (lambda m: iv.skip_loop(m, 3), (1, 2, 4)),
        (lambda m: iv.repeat_loop(m, 2), (1, 2, 2, 3, 4)),
        (lambda m: iv.swap_loops(m, 2, 4), (1, 4, 3, 2)),
    ],
)
@torch.no_grad()
def test_order(context, order):
    """What is tied to a loop's name goes where the loop goes: here loop 2 alone has an offset of 3."""
    model = plt()
    ids, batch = IDS, IDS.tolist()
    with iv.shift_offset(model, 3, loop=2), context(model):
        logits, cache = model.run_with_cache(ids)
    expected = by_hand(model, batch, offsets={2: 3}, order=order)
    for row, state in enumerate(expected):
        assert_same(cache[f"loops.{order[-1]}.hook_readout"][row], state, 1e-10)
    assert torch.equal(logits, model.unembed(cache[f"loops.{order[-1]}.hook_readout"]))
    assert {int(name.split(".")[1]) for name in cache if name.startswith("loops")} == set(order)


@pytest.mark.parametrize("value", [0, 1, 0.25])
@pytest.mark.parametrize(("loop", "layer"), [(None, None), (3, None), (None, 1), (4, 0)])
@torch.no_grad()
def test_gate(value, loop, layer):
    """Every gate, or that of a loop or layer."""
    model = plt()

    def gate(r, at):
        return float(value) if loop in (None, r) and layer in (None, at) else None

    same_as_by_hand(model, iv.clamp_gate(model, value, loop, layer), gate=gate)


@torch.no_grad()
def test_gate_of_a_head():
    """One head's gate, the others' untouched."""
    model = plt()
    with iv.clamp_gate(model, 0.5, loop=2, layer=1, head=3):
        states = all_states(model, IDS)
    clean, name = all_states(model, IDS), "loops.2.blocks.1.attn.hook_gate"
    assert (states[name][..., 3] == 0.5).all()
    assert torch.equal(states[name][..., :3], clean[name][..., :3])
    assert torch.equal(states["loops.2.blocks.0.attn.hook_gate"], clean["loops.2.blocks.0.attn.hook_gate"])


@pytest.mark.parametrize("window", [1, 2, 99])
@torch.no_grad()
def test_window(window):
    """As a model that was made with it."""
    model, other = plt(), plt(window=window)
    with iv.set_window(model, window):
        states = all_states(model, IDS)
    for name, expected in all_states(other, IDS).items():
        assert torch.equal(states[name], expected), name


@pytest.mark.parametrize("loop", [None, 2, 4])
@torch.no_grad()
def test_memory(loop):
    """The global branch reads the loop's own keys and values; later loops that are not named still read loop 1's."""
    model = plt()
    same_as_by_hand(model, iv.own_memory(model, loop), own=range(2, 5) if loop is None else [loop])


@torch.no_grad()
def test_memory_under_hooks():
    """Edited keys and the pattern of the global branch are those that count, and the hook of the pattern fires once."""
    model, fired = plt(), []
    at = "loops.3.blocks.0.attn."

    def twice(k, hook):
        return 2 * k

    def note(pattern, hook):
        fired.append(pattern.shape)

    with iv.own_memory(model, 3):
        _, cache = model.run_with_cache(IDS, names_filter=lambda name: name.startswith(at))
        hooks = [(at + "hook_rot_k", twice), (at + "hook_pattern_global", note)]
        with model.hooks(hooks):
            _, edited = model.run_with_cache(IDS, names_filter=lambda name: name.startswith(at))
    assert len(fired) == 1
    for states in (cache, edited):
        shares = (states[at + "hook_rot_q"][0, :, 0] @ states[at + "hook_rot_k"][0, :, 0].T) / 6**0.5
        shares = shares.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf).softmax(-1)
        assert_same(states[at + "hook_z_global"][0, :, 0], shares @ states[at + "hook_v"][0, :, 0], 1e-12)
    assert not torch.equal(cache[at + "hook_z_global"], edited[at + "hook_z_global"])


# -- laws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", WIRINGS)
@torch.no_grad()
def test_what_changes_nothing(changes):
    """The model's own offset and window, swapped loops, a run's own states: bit for bit the untouched run."""
    model = make_model(**({"n_loops": 4} | changes))
    start = random_start(model, IDS)
    clean, cache = model.run_with_cache(IDS, n_loops=4, **start)
    own = [iv.shift_offset(model, model.cfg.offset), iv.swap_loops(model, 2, 4)]
    own += [iv.shift_offset(model, model.cfg.offset, loop) for loop in (2, 3, 4)]
    own += [iv.patch(model, cache, loop, later=later) for loop in (1, 2, 4) for later in (False, True)]
    own += [iv.patch(model, cache["loops.2.hook_out_pre_norm"], 2, positions=[0, -1])]
    if model.cfg.memory == "first":
        own.append(iv.set_window(model, model.cfg.window))
    for context in own:
        with context:
            assert torch.equal(model(IDS, n_loops=4, **start), clean)


@pytest.mark.parametrize("changes", WIRINGS)
@pytest.mark.parametrize("loop", [2, 3, 4])
@torch.no_grad()
def test_skipping_is_one_loop_fewer_and_repeating_one_more(changes, loop):
    """All loops share their weights: bit for bit, whichever loop it is."""
    model = make_model(**({"n_loops": 4} | changes))
    start = random_start(model, IDS)
    for context, count in ((iv.skip_loop, 3), (iv.repeat_loop, 5)):
        expected = model(IDS, n_loops=count, **start)
        with context(model, loop):
            assert torch.equal(model(IDS, n_loops=4, **start), expected)


@torch.no_grad()
def test_orders_compose():
    """An inner change of the order starts from the outer one's."""
    model = plt()
    with iv.skip_loop(model, 2), iv.swap_loops(model, 3, 4), iv.repeat_loop(model, 3):
        assert model._order(5) == (1, 4, 3, 3, 5)
    with iv.repeat_loop(model, 2), iv.skip_loop(model, 2):
        assert model._order(3) == (1, 3)
    with iv.repeat_loop(model, 2), iv.repeat_loop(model, 2):
        assert model._order(2) == (1, 2, 2, 2, 2)
    assert model._order(2) == (1, 2)


@torch.no_grad()
def test_a_clamped_gate_silences_a_branch():
    """At 1 the window counts for nothing, at 0 loop 1's memory."""
    model = plt()
    for value, silent in ((1, "hook_z_local"), (0, "hook_z_global")):
        with iv.clamp_gate(model, value):
            expected = model(IDS)
            hooks = [(lambda name, silent=silent: name.endswith(silent), nudge)]
            assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), expected)
        hooks = [(lambda name: name.endswith("hook_gate"), lambda g, hook, value=value: torch.full_like(g, value))]
        assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), expected)


@pytest.mark.parametrize("changes", WIRINGS)
@torch.no_grad()
def test_the_last_loops_state_is_the_answer(changes):
    """Patching Y_R gives the other prompt's logits; patching earlier loops does where nothing else knows the text."""
    model = make_model(**changes)
    other = IDS.flip(0)
    start = random_start(model, IDS)
    expected, cache = model.run_with_cache(other, **start)
    clean = model(IDS, **start)
    alone = model.cfg.memory == "own" and model.cfg.injection == "none"
    for loop in (1, 2, 3):
        with iv.patch(model, cache, loop):
            one = model(IDS, **start)
        with iv.patch(model, cache, loop, later=True):
            many = model(IDS, **start)
        assert_same(many, expected, 1e-12)
        assert not torch.equal(one, clean)
        assert torch.allclose(one, expected, atol=1e-12) == (alone or loop == 3)


@torch.no_grad()
def test_chosen_positions():
    """States of the positions that are named, and of no other, become the other run's."""
    model, name = plt(), "loops.2.hook_out_pre_norm"
    _, cache = model.run_with_cache(IDS.flip(0))
    clean = model.run_with_cache(IDS)[1][name]
    cases = [(4, [4]), ([0, -1], [0, 8]), ([], []), (range(9), list(range(9)))]
    cases += [
        (torch.tensor([0, -1]), [0, 8]),
        (np.array([2, 3]), [2, 3]),
        (torch.tensor(4), [4]),
        (np.int64(4), [4]),
        ({1, 3}, [1, 3]),
    ]
    for positions, named in cases:
        with iv.patch(model, cache, 2, positions):
            state = model.run_with_cache(IDS)[1][name]
        expected = clean.clone()
        expected[:, named] = cache[name][:, named]
        assert torch.equal(state, expected)


# -- as context managers --------------------------------------------------------------------------------


def kinds(model):
    """One of each kind, on all loops and on one, by name."""
    _, cache = model.run_with_cache(IDS.flip(0))
    kinds = {
        "patch one": lambda: iv.patch(model, cache, 2, positions=3),
        "patch later": lambda: iv.patch(model, cache, 1, positions=[0, 3], later=True),
        "skip_loop": lambda: iv.skip_loop(model, 3),
        "repeat_loop": lambda: iv.repeat_loop(model, 3),
        "set_window": lambda: iv.set_window(model, 1),
    }
    for where in ((), (3,)):
        kinds |= {
            f"shift_offset {where}": partial(iv.shift_offset, model, 2, *where),
            f"drop_carry {where}": partial(iv.drop_carry, model, *where),
            f"mean_carry {where}": partial(iv.mean_carry, model, *where),
            f"other_carry {where}": partial(iv.other_carry, model, *where),
            f"clamp_gate {where}": partial(iv.clamp_gate, model, 0, *where),
            f"own_memory {where}": partial(iv.own_memory, model, *where),
        }
    return kinds


def test_every_kind_is_among_them():
    """The tests below go through every context manager there is; swapping alone changes nothing."""
    named = {name.split()[0] for name in kinds(plt())} | {"swap_loops"}
    assert named == {name for name in iv.__all__ if name in vars(contexts)}


def state_of(model):
    """Everything that an intervention may touch."""
    points = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks}
    return model.cfg, model.wiring, model.layout, list(model.on_growth), points, model.context_level


@torch.no_grad()
def test_everything_is_as_before():
    """After the block and after a hook that fails in it; whatever ran in between; hooks of the user stay."""
    model, seen = plt(), []
    model.add_hook("loops.3.hook_carry", lambda x, hook: seen.append("hook"))
    model.add_perma_hook("loops.3.blocks.0.attn.hook_gate", lambda x, hook: seen.append("permanent"))
    clean, before = model(IDS), state_of(model)
    for make in kinds(model).values():
        with make():
            changed = model(IDS)
        assert not torch.equal(changed, clean)
        assert state_of(model) == before
        with pytest.raises(RuntimeError, match="a hook failed"), make():
            model.run_with_hooks(IDS, fwd_hooks=[("loops.4.hook_in", fail)])
        assert state_of(model) == before
        seen.clear()
        assert torch.equal(model(IDS), clean)
        assert sorted(seen) == ["hook", "permanent"]


@torch.no_grad()
def test_every_way_to_run_is_intervened_on():
    """Runs, runs with hooks, runs with a cache, one after the other in one block: TransformerLens' resets spare it."""
    model, hooks = plt(), [("hook_embed", lambda x, hook: None)]
    for make in kinds(model).values():
        with make():
            expected = model(IDS)
            for _ in range(2):
                assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), expected)
                assert torch.equal(model.run_with_cache(IDS)[0], expected)
            model.reset_hooks()
            assert torch.equal(model(IDS), expected)


@torch.no_grad()
def test_nesting_with_itself():
    """Two of the same are one, but for two repeats, which are two, and for the carry of the next document's next."""
    model = plt()
    for name, make in kinds(model).items():
        with make():
            once = model(IDS)
            with make():
                twice = model(IDS)
            assert torch.equal(model(IDS), once)
        same = torch.allclose(twice, once, atol=1e-12, rtol=0)
        assert same != name.startswith(("other_carry", "repeat_loop")), name
    clean = model(IDS)
    with iv.other_carry(model), iv.other_carry(model), iv.other_carry(model):  # around the batch of three
        assert torch.equal(model(IDS), clean)


@torch.no_grad()
def test_different_ones_compose():
    """Each does its part, in either order where they touch different things."""
    model = plt()

    def both(*makes):
        with ExitStack() as stack:
            for make in makes:
                stack.enter_context(make())
            return model(IDS)

    pairs = [
        (lambda: iv.shift_offset(model, 2), lambda: iv.clamp_gate(model, 0, 3)),
        (lambda: iv.drop_carry(model, 2), lambda: iv.set_window(model, 1)),
        (lambda: iv.own_memory(model, 2), lambda: iv.own_memory(model, 4)),
        (lambda: iv.shift_offset(model, 2, 2), lambda: iv.shift_offset(model, 0, 4)),
    ]
    for one, other in pairs:
        assert torch.equal(both(one, other), both(other, one))
        assert not torch.equal(both(one, other), both(one))
        assert not torch.equal(both(one, other), both(other))
    # The inner one wins: all boundaries set over one, and one over all.
    one, every = (lambda: iv.shift_offset(model, 2, 3)), (lambda: iv.shift_offset(model, 0))
    assert torch.equal(both(one, every), both(every))
    assert not torch.equal(both(every, one), both(every))
    # Of states, the inner one acts on what the outer one left.
    assert torch.equal(
        both(lambda: iv.drop_carry(model), lambda: iv.mean_carry(model)), both(lambda: iv.drop_carry(model))
    )


@torch.no_grad()
def test_the_cache_holds_what_was_changed():
    """And hooks of the run see it, too."""
    model = plt()
    with iv.drop_carry(model, 2), iv.clamp_gate(model, 1, 3, 0):
        _, cache = model.run_with_cache(IDS)
    assert (cache["loops.2.hook_carry"] == 0).all()
    assert cache["loops.3.hook_carry"].any()
    assert (cache["loops.3.blocks.0.attn.hook_gate"] == 1).all()
    assert (cache["loops.3.blocks.1.attn.hook_gate"] < 1).all()


@pytest.mark.parametrize("order", ["grown before", "grown inside"])
@torch.no_grad()
def test_loops_beyond_training(order):
    """`loop=None` reaches loops that had no hook points when the block began; a single loop must have them."""
    model = plt(n_loops=2)
    reference = plt(n_loops=6)
    reference.load_state_dict(model.state_dict())
    _, cache = reference.run_with_cache(IDS.flip(0))
    makes = [iv.drop_carry, iv.mean_carry, iv.other_carry, iv.own_memory]
    makes += [lambda m: iv.clamp_gate(m, 0), lambda m: iv.shift_offset(m, 2), lambda m: iv.patch(m, cache, 2, 1, True)]
    for make in makes:
        model = plt(n_loops=2)
        if order == "grown before":
            model.ensure_loops(6)
        with make(reference):
            expected = reference(IDS)
        with make(model):
            assert torch.equal(model.run_with_hooks(IDS, n_loops=6), expected)
            assert torch.equal(model.run_with_cache(IDS, n_loops=6)[0], expected)
        assert not model.on_growth
        assert not model.list_hooks()
    with pytest.raises(ValueError, match=r"from 2 to 2.*ensure_loops"):
        iv.drop_carry(plt(n_loops=2), 3)
    model.ensure_loops(6)
    with iv.drop_carry(model, 6), iv.drop_carry(reference, 6):
        assert torch.equal(model(IDS, n_loops=6), reference(IDS))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(left):
    """A padded batch gives each document what it gets in a batch of its own."""
    model = plt()
    lists = [row[:length] for row, length in zip(IDS.tolist(), (9, 4, 6), strict=True)]
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, tokens in enumerate(lists):
        start = 9 - len(tokens) if left else 0
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, start : start + len(tokens)] = 1
    for name, make in kinds(model).items():
        if name.startswith(("patch", "other_carry")):
            continue  # the states of another run; another document (held against wiring by hand)
        with make():
            padded = model(ids, mask)
            for row, tokens in enumerate(lists):
                assert_same(padded[row][mask[row].bool()], model(torch.tensor([tokens]))[0], 1e-12)


@torch.no_grad()
def test_numbers_of_numpy_are_numbers():
    """As those of Python, and none of them stays in the configuration."""
    model, two, four = plt(), np.int64(2), np.int32(4)
    pairs = [
        (iv.shift_offset(model, two), iv.shift_offset(model, 2)),
        (iv.shift_offset(model, two, four), iv.shift_offset(model, 2, 4)),
        (iv.set_window(model, two), iv.set_window(model, 2)),
        (iv.drop_carry(model, four), iv.drop_carry(model, 4)),
        (iv.skip_loop(model, four), iv.skip_loop(model, 4)),
        (iv.clamp_gate(model, np.float32(0.25), four, np.int64(1), two), iv.clamp_gate(model, 0.25, 4, 1, 2)),
    ]
    for ours, expected in pairs:
        with ours:
            found = model(IDS)
            assert type(model.cfg.offset) is type(model.cfg.window) is int
        with expected:
            assert torch.equal(found, model(IDS))


@pytest.mark.parametrize("changes", [{}, RANDOM_PLT], ids=["whole", "in pieces"])
@torch.no_grad()
def test_a_compiled_model_is_intervened_on(changes):
    """Compiled before the block: hooks reach it, more of them than code is compiled anew for, and leave it again."""
    model = make_model(**({"n_loops": 4, "carry_scale": 0.8} | changes))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    clean = compiled(IDS)
    assert torch.equal(clean, model(IDS))
    for make in (*kinds(model).values(), partial(iv.clamp_gate, model, 1), partial(iv.drop_carry, model, 2)):
        with make():
            found = compiled(IDS)
            assert torch.equal(found, model(IDS))
        assert not torch.equal(found, clean)
        assert torch.equal(compiled(IDS), clean)


def test_what_is_rewired():
    """Order, offset or memory of loops; not hooks and not a changed configuration."""
    model = plt()
    for name, make in kinds(model).items():
        with make():
            offset = name == "shift_offset (3,)"
            assert model.wiring.rewired == (offset or name.startswith(("skip", "repeat", "own"))), name
            assert model.wiring.ongoing == 1
            with iv.drop_carry(model):
                assert model.wiring.ongoing == 2
        assert not model.wiring.rewired
        assert model.wiring.ongoing == 0


def test_a_changed_model_is_not_saved(tmp_path):
    """Its configuration may be another one; after the block it is saved."""
    model = plt()
    for make in kinds(model).values():
        with make(), pytest.raises(ValueError, match="An intervention is going on"):
            model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save(tmp_path / "model")


# -- refusals ------------------------------------------------------------------------------------------

PLAIN = {"n_loops": 4}
NO_MEMORY = {"memory": "own", "n_loops": 4}
STATES = {f"loops.{r}.hook_out_pre_norm": torch.zeros(3, 9, 12, dtype=torch.float64) for r in (1, 2, 3)}
REFUSED = [
    (PLAIN, lambda m: iv.shift_offset(m, -1), "k = -1 .*integer >= 0"),
    (PLAIN, lambda m: iv.shift_offset(m, 1.5), "k = 1.5"),
    (PLAIN, lambda m: iv.shift_offset(m, True), "k = True"),
    (PLAIN, lambda m: iv.shift_offset(m, 2, loop=1), r"loop = 1 .*from 2 to 4.*ensure_loops"),
    *((PLAIN, lambda m, f=f: f(m, 1), "loop = 1 .*from 2 to 4") for f, _ in CARRIES),
    *((PLAIN, lambda m, f=f: f(m, 5), "loop = 5 .*from 2 to 4") for f, _ in CARRIES),
    (PLAIN, lambda m: iv.drop_carry(m, "2"), "loop = '2'"),
    (PLAIN, lambda m: iv.skip_loop(m, 1), "loop = 1"),
    (PLAIN, lambda m: iv.skip_loop(m, None), "loop = None"),
    (PLAIN, lambda m: iv.repeat_loop(m, 5), "loop = 5"),
    (PLAIN, lambda m: iv.swap_loops(m, 1, 2), "a = 1"),
    (PLAIN, lambda m: iv.swap_loops(m, 2, 9), "b = 9"),
    (PLAIN, lambda m: iv.swap_loops(m, 3, 3), "a = 3 and b = 3 are the same"),
    (PLAIN, lambda m: iv.clamp_gate(m, 1.1), "value = 1.1 .*from 0 to 1"),
    (PLAIN, lambda m: iv.clamp_gate(m, True), "value = True"),
    (PLAIN, lambda m: iv.clamp_gate(m, float("nan")), "value = nan"),
    (PLAIN, lambda m: iv.clamp_gate(m, 0, loop=1), "loop = 1"),
    (PLAIN, lambda m: iv.clamp_gate(m, 0, layer=2), "layer = 2 .*from 0 to 1"),
    (PLAIN, lambda m: iv.clamp_gate(m, 0, head=4), "head = 4 .*from 0 to 3"),
    (NO_MEMORY, lambda m: iv.clamp_gate(m, 0), "no gate.*'own'"),
    (NO_MEMORY, lambda m: iv.set_window(m, 2), "no sliding window"),
    (NO_MEMORY, lambda m: iv.own_memory(m), "no shared memory"),
    (PLAIN, lambda m: iv.set_window(m, 0), "window = 0"),
    (PLAIN, lambda m: iv.own_memory(m, 1), "loop = 1"),
    (PLAIN, lambda m: iv.patch(m, STATES, 0), "loop = 0 .*from 1 to 4"),
    (PLAIN, lambda m: iv.patch(m, STATES, 4), "states has no 'loops.4.hook_out_pre_norm'"),
    (PLAIN, lambda m: iv.patch(m, STATES["loops.1.hook_out_pre_norm"][0], 1), r"shape \(9, 12\): .*\[batch, pos"),
    (PLAIN, lambda m: iv.patch(m, STATES, 1, torch.tensor([True, False])), "positions = True"),
    (PLAIN, lambda m: iv.patch(m, STATES, 1, 9), "positions = 9 .*from -9 to 8"),
    (PLAIN, lambda m: iv.patch(m, STATES, 1, [0, -10]), "positions = -10"),
    (PLAIN, lambda m: iv.patch(m, STATES["loops.1.hook_out_pre_norm"], 1, later=True), "give a cache or a dict"),
    ({"n_loops": 1}, lambda m: iv.drop_carry(m, 2), "this model has one loop.*ensure_loops"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused_at_once(case):
    """Before the block begins; the message says what was given and what is allowed, and the model is untouched."""
    changes, make, message = REFUSED[case]
    model = make_model(**changes)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        make(model)
    assert state_of(model) == before


RUNS = [
    (lambda m: iv.patch(m, STATES, 1), {"input_ids": IDS[:, :5]}, r"shape \(3, 9, 12\), this run's have \(3, 5, 12\)"),
    (lambda m: iv.patch(m, STATES, 2, later=True), {"input_ids": IDS}, "passes loop 4, but states has no"),
    (lambda m: iv.other_carry(m), {"input_ids": IDS[:1]}, "batch of 1 document"),
    (lambda m: iv.skip_loop(m, 4), {"input_ids": IDS, "n_loops": 3}, "loop 4 is skipped.* loops 1 to 3.*n_loops=4"),
    (lambda m: iv.swap_loops(m, 2, 4), {"input_ids": IDS, "n_loops": 2}, "loop 4 is .*swapped.*loops 1 to 2"),
    (lambda m: iv.own_memory(m), {"input_ids": IDS, "past": Past()}, "own_memory does not go with a past"),
]


@pytest.mark.parametrize("case", range(len(RUNS)))
@torch.no_grad()
def test_runs_that_do_not_fit(case):
    """What only a run can tell is told by the run; the next one is fine."""
    make, settings, message = RUNS[case]
    model = plt()
    before = state_of(model)
    with make(model):
        with pytest.raises(ValueError, match=message):
            model(**settings)
        assert model.layout is None
    assert state_of(model) == before


@pytest.mark.parametrize("order", [(), (2, 1, 3), (1, 2, 1), (1, 5), (2, 3)])
def test_orders_that_do_not_fit(order):
    """Loop 1 goes first and only once where it starts from E or makes the memory, and every loop is one of the run."""
    model = plt()
    model.wiring = replace(model.wiring, order=lambda loops: order)
    with pytest.raises(ValueError, match=r"order of loops .* loops 1 to 4, loop 1 first and only once"):
        model(IDS)
    free = make_model(**HUGINN_LIKE)
    free.wiring = replace(free.wiring, order=lambda loops: (2, 1, 1, 3))
    assert torch.isfinite(free(IDS)).all()
    gated = make_model(**OURO_LIKE)
    with iv.skip_loop(gated, 2), pytest.raises(ValueError, match="early_exit"):
        gated.early_exit(IDS)


# -- decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"offset": 2}, POST_CODA])
@torch.no_grad()
def test_decoding_goes_on_as_the_whole_run(changes):
    """In pieces as in one: offsets, order, window, dropped carries, gates. What needs the whole text refuses."""
    model = make_model(**({"n_loops": 4, "carry_scale": 0.8} | changes))
    makes = [lambda: iv.shift_offset(model, 3), lambda: iv.shift_offset(model, 0), lambda: iv.shift_offset(model, 2, 3)]
    makes += [lambda: iv.drop_carry(model, 2), lambda: iv.skip_loop(model, 3), lambda: iv.repeat_loop(model, 3)]
    if model.cfg.memory == "first":
        makes += [lambda: iv.clamp_gate(model, 0), lambda: iv.set_window(model, 2)]
    for make in makes:
        with make():
            past = Past()
            pieces = [model(part, n_loops=4, past=past) for part in IDS.split([4, 1, 4], dim=1)]
            assert_same(torch.cat(pieces, dim=1), model(IDS, n_loops=4), 1e-10)
    for make in (iv.mean_carry, iv.other_carry):
        past = Past()
        with make(model):
            model(IDS[:, :4], past=past)
            with pytest.raises(ValueError, match="goes on from a past"):
                model(IDS[:, 4:], past=past)


@torch.no_grad()
def test_a_past_keeps_its_wiring():
    """A text that was begun with one wiring does not go on with another."""
    model = plt()
    for make in (
        lambda: iv.shift_offset(model, 2, 3),
        lambda: iv.set_window(model, 2),
        lambda: iv.swap_loops(model, 2, 3),
    ):
        past = Past()
        model(IDS[:, :4], past=past)
        with make(), pytest.raises(ValueError, match="within the same interventions"):
            model(IDS[:, 4:], past=past)
        model(IDS[:, 4:], past=past)


@torch.no_grad()
def test_the_layout_is_there_while_a_run_goes_on():
    """For hooks that must know which positions are real; of the inner run, where a hook runs the model again."""
    model, seen = plt(), []
    ids, mask = padded_batch()

    def note(x, hook):
        seen.append(model.layout.real)
        if x.shape[1] == 10:
            model(IDS)
            seen.append(model.layout.real)

    model.run_with_hooks(ids, mask, fwd_hooks=[("hook_embed", note)])
    assert torch.equal(seen[0], mask.bool())
    assert seen[1] is None
    assert torch.equal(seen[2], mask.bool())
    with pytest.raises(RuntimeError):
        model.run_with_hooks(IDS, fwd_hooks=[("loops.2.hook_carry", fail)])
    assert model.layout is None


@pytest.mark.parametrize("changes", WIRINGS)
@torch.no_grad()
def test_the_last_carry_is_all_that_the_last_loop_knows_of_loops_from_two_on(changes):
    """Dropping the carry into the last loop is dropping all."""
    model = make_model(**changes)
    with iv.drop_carry(model, 3):
        one = model(IDS)
    with iv.drop_carry(model):
        assert torch.equal(model(IDS), one)


# -- patching effects ------------------------------------------------------------------------------------

OTHER = IDS.flip(0).flip(1)
ANSWERS = [(3, 7), (1, 2), (28, 0)]


@pytest.mark.parametrize("changes", [{}, HUGINN_LIKE, OURO_LIKE])
@torch.no_grad()
def test_patching_effects_by_hand(changes):
    """Each number against a run with an explicit hook, in both directions, for one loop and all later ones."""
    model = make_model(**changes)
    effects = iv.patching_effects(model, IDS, OTHER, ANSWERS, positions="each", n_loops=4, seed=5)
    assert effects["log_odds"].dims == ("direction", "span", "loop", "position", "prompt")
    assert effects["log_odds"].shape == (2, 2, 4, 9, 3)

    def score(logits):
        log_p = logits[:, -1].log_softmax(-1)
        return [float(log_p[row, right] - log_p[row, wrong]) for row, (right, wrong) in enumerate(ANSWERS)]

    for name, ids in (("clean", IDS), ("corrupted", OTHER)):
        np.testing.assert_allclose(effects[name], score(model(ids, n_loops=4, seed=5)), atol=1e-12)
    for direction, source, into in (("restores", IDS, OTHER), ("breaks", OTHER, IDS)):
        _, cache = model.run_with_cache(source, n_loops=4, seed=5)
        for span, loop, position in (("loop", 1, 8), ("loop", 2, 0), ("later", 2, 5), ("later", 4, 8), ("loop", 4, 8)):
            hooks = []
            for r in range(loop, 5 if span == "later" else loop + 1):

                def put(y, hook, r=r, position=position, cache=cache):
                    y[:, position] = cache[f"loops.{r}.hook_out_pre_norm"][:, position]
                    return y

                hooks.append((f"loops.{r}.hook_out_pre_norm", put))
            expected = score(model.run_with_hooks(into, n_loops=4, seed=5, fwd_hooks=hooks))
            found = effects["log_odds"].sel(direction=direction, span=span, loop=loop, position=position)
            np.testing.assert_allclose(found, expected, atol=1e-12)


@torch.no_grad()
def test_patching_the_last_loop_swaps_the_prompts():
    """At all positions the last loop, and so every `later`, gives the other prompt's value; texts work as tokens do."""
    model = plt()
    model.tokenizer = word_tokenizer()
    effects = iv.patching_effects(model, IDS, OTHER, ANSWERS)
    assert effects["log_odds"].dims == ("direction", "span", "loop", "prompt")
    for direction, other in (("restores", "clean"), ("breaks", "corrupted")):
        for found in (effects["log_odds"].sel(span="later"), effects["log_odds"].sel(span="loop", loop=[4])):
            values = found.sel(direction=direction).values
            np.testing.assert_allclose(values, np.broadcast_to(effects[other], values.shape), atol=1e-12)
    texts = [[words(row) for row in ids.tolist()] for ids in (IDS, OTHER)]
    answers = [(f"w{right}", f"w{wrong}") for right, wrong in ANSWERS]
    assert iv.patching_effects(model, *texts, answers).identical(effects)


@torch.no_grad()
def test_a_changed_order_is_patched_by_running():
    """The loop that is passed last need not be among the later ones, so that nothing is filled in."""
    model = plt()
    with iv.swap_loops(model, 2, 4):
        effects = iv.patching_effects(model, IDS, OTHER, ANSWERS)
        with iv.patch(model, model.run_with_cache(IDS)[1], 3, later=True):
            logits = model(OTHER, return_type="last")
    expected = [float(logits[row, right] - logits[row, wrong]) for row, (right, wrong) in enumerate(ANSWERS)]
    found = effects["log_odds"].sel(direction="restores", span="later", loop=3)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not np.allclose(found, effects["clean"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS, OTHER[:, 1:], ANSWERS), r"clean has .*\(3, 9\), corrupted \(3, 8\)"),
        ((IDS, OTHER[1:], ANSWERS), "as many tokens"),
        ((IDS, OTHER, ANSWERS[1:]), "answers has 2 entries.* 3 prompts"),
        ((IDS, OTHER, [(1, 2, 3)] * 3), "a pair"),
        ((IDS, OTHER, [(1, 29)] * 3), "answer 29 is no token.* 0 to 28"),
        ((["w1 w2", "w1"], ["w1 w2", "w2"], ANSWERS[1:]), r"clean has prompts of \[1, 2\] tokens"),
        (("w1 w2", "w1 w3", ANSWERS[:1]), "list of one or more texts"),
        ((IDS[0], OTHER[0], ANSWERS[:1]), r"clean has shape \(9,\): .*\[prompt, pos\]"),
        ((IDS.tolist(), OTHER.tolist(), ANSWERS), r"clean must be a tensor of tokens \[prompt, pos\]"),
        ((IDS, OTHER, [(1, 2), (3, 3), (4, 5)]), "prompt 1: right and wrong are the same token, 3"),
        ((["w1 w2"], ["w1 w3"], [("w1", "w1 w2")]), "'w1 w2' is 2 tokens"),
    ],
)
def test_patching_effects_refuse(arguments, message):
    """Prompts and answers that do not go together."""
    model = plt()
    model.tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=message):
        iv.patching_effects(model, *arguments)
    with pytest.raises(ValueError, match="use 'all' or 'each'"):
        iv.patching_effects(model, IDS, OTHER, ANSWERS, positions="some")
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        iv.patching_effects(model, ["w1"], ["w2"], [(1, 2)])


# -- effects on the loss -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """A small model and what every intervention does to its loss."""
    model = plt()
    model.tokenizer = word_tokenizer()
    return model, iv.intervene(model, random_corpus(report=5), batch_size=2)


@torch.no_grad()
def test_effects_are_differences_of_documents_losses(measured):
    """Document by document against runs by hand; the last of five documents joins the batch before."""
    model, effects = measured
    documents = [torch.tensor(word_tokenizer()(d.text)["input_ids"]) for d in random_corpus(report=5).report]

    def nll(logits, document):
        return torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none")

    data = effects.data
    assert data["document"].values.tolist() == [f"report/{i}" for i in range(5)]
    assert data["source"].values.tolist() == [f"report {i % 2}" for i in range(5)]
    for i, document in enumerate(documents):
        clean = nll(model(document[None])[0], document)
        np.testing.assert_allclose(data["nll"][i], clean.mean(), atol=1e-12)
        for name, make in (
            ("offset 2", lambda: iv.shift_offset(model, 2)),
            ("offset 0, loop 3", lambda: iv.shift_offset(model, 0, 3)),
            ("carry dropped, loop 2", lambda: iv.drop_carry(model, 2)),
            ("carry: document mean", lambda: iv.mean_carry(model)),
            ("a loop skipped", lambda: iv.skip_loop(model, 2)),
            ("a loop repeated", lambda: iv.repeat_loop(model, 4)),
            ("gate at 0", lambda: iv.clamp_gate(model, 0)),
            ("gate at 1, loop 4", lambda: iv.clamp_gate(model, 1, 4)),
            ("window halved", lambda: iv.set_window(model, 1)),
            ("memory: own loop's, loop 2", lambda: iv.own_memory(model, 2)),
        ):
            with make():
                change = nll(model(document[None])[0], document) - clean
            here = data.sel(intervention=name).isel(document=i)
            np.testing.assert_allclose(here["effect"], change.mean().item(), atol=1e-12, err_msg=name)
            np.testing.assert_allclose(here["harmed"], change.clamp(min=0).mean().item(), atol=1e-12)
            np.testing.assert_allclose(here["helped"], (-change).clamp(min=0).mean().item(), atol=1e-12)
    # Batches (0, 1) and (2, 3, 4): the last document's other one is the first of its batch.
    ids = torch.nn.utils.rnn.pad_sequence(documents[2:], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents[2:]], batch_first=True)
    with iv.other_carry(model):
        other = nll(model(ids, mask)[2][: len(documents[4])], documents[4]).mean()
    effect = data["effect"].sel(intervention="carry: other document")[4]
    np.testing.assert_allclose(effect + data["nll"][4], other, atol=1e-12)


def test_the_catalogue_is_whole(measured):
    """Everything at all boundaries and at each, once; what the model does not have has its reason."""
    _, effects = measured
    names = effects.data["intervention"].values.tolist()
    assert len(names) == len(set(names)) == 39
    changes = {(row.group, row.change): [] for row in effects.table()}
    for row in effects.table():
        changes[row.group, row.change].append(row.loop)
    everywhere = [None, 2, 3, 4]
    assert changes == {
        **{("offset", f"offset {k}"): everywhere for k in (0, 2, 4)},
        **{("carry", f"carry{what}"): everywhere for what in (" dropped", ": document mean", ": other document")},
        **{("loops", what): [None] for what in ("a loop skipped", "a loop repeated")},
        **{("gate", f"gate at {value}"): everywhere for value in (0, 1)},
        ("window", "window halved"): [None],
        ("memory", "memory: own loop's"): everywhere,
    }
    assert effects.provenance["absent"] == {"offset 1": "it is the model's own"}


@pytest.mark.parametrize(
    ("changes", "settings", "absent", "loops"),
    [
        (OURO_LIKE, {}, {"offset 0", "gate at 0", "gate at 1", "window halved", "memory: own loop's"}, {None, 2, 3, 4}),
        ({"window": 1}, {"n_loops": 2}, {"offset 1", "window halved"}, {None}),
        ({"window": 40}, {"max_tokens": 21}, {"offset 1", "window halved", "memory: own loop's"}, {None, 2, 3}),
        ({"window": 20}, {"max_tokens": 22}, {"offset 1"}, {None, 2, 3}),
        ({"window": 21}, {"max_tokens": 22}, {"offset 1", "memory: own loop's"}, {None, 2, 3}),
        ({}, {"batch_size": 1}, {"offset 1", "carry: other document"}, {None, 2, 3}),
    ],
)
def test_what_a_model_does_not_have_is_absent(changes, settings, absent, loops):
    """Not measured, not zero, and told; of two loops there is one boundary, which is all of them."""
    model = make_model(**changes)
    model.tokenizer = word_tokenizer()
    effects = iv.intervene(model, random_corpus(report=3), **settings)
    assert set(effects.provenance["absent"]) == absent
    assert all(effects.provenance["absent"].values())
    assert {row.loop for row in effects.table()} == loops
    assert not absent & {row.change for row in effects.table()}


def test_table_and_files(measured, tmp_path):
    """Means with clustered intervals; a file gives back what was saved; provenance says what was measured."""
    model, effects = measured
    for row, values in zip(effects.table(seed=3), effects.data["effect"].values, strict=True):
        low, high = interval(resampled_means(values[:, None], effects.data["source"].values, seed=3))
        assert (row.effect, row.low, row.high) == (pytest.approx(values.mean()), low[0], high[0])
        assert row.effect == pytest.approx(row.harmed - row.helped)
    effects.save(tmp_path / "e.nc")
    again = iv.Effects.load(tmp_path / "e.nc")
    assert again.data.identical(effects.data)
    assert repr(again) == repr(effects)
    assert "39 interventions on a model made here (trained with 4 loops, run with 4): 5 documents" in repr(effects)
    about = effects.provenance
    assert about["weights_sha256"] == weights_hash(model)
    assert about["corpus_sha256"] == random_corpus(report=5).fingerprint
    assert (about["batch_size"], about["seed"], about["documents"]) == (2, 0, 5)
    for file in (tmp_path / "none.nc", tmp_path / "text.nc", tmp_path / "other.nc"):
        if file.name == "text.nc":
            file.write_text("text")
        if file.name == "other.nc":
            effects.data[["nll"]].to_netcdf(file, engine="h5netcdf")
        with pytest.raises(iv.EffectsError, match=f"{file.name} (is no file|holds no effects)"):
            iv.Effects.load(file)


def test_choosing(measured):
    """Groups by name, and interventions of one's own, get the numbers of the whole catalogue."""
    model, effects = measured
    mine = iv.Intervention("mine", "half gate", 3, lambda model: iv.clamp_gate(model, 0.5, 3))
    told = []
    few = iv.intervene(
        model, random_corpus(report=5), ["window", mine], batch_size=2, progress=lambda *step: told.append(step)
    )
    assert few.data["intervention"].values.tolist() == ["window halved", "half gate, loop 3"]
    np.testing.assert_array_equal(
        few.data["effect"].sel(intervention="window halved"), effects.data["effect"].sel(intervention="window halved")
    )
    assert told[-1] == ("intervening", 15, 15)
    assert few.provenance["absent"] == {}


def test_what_intervene_refuses(measured):
    """Before anything runs."""
    model, corpus = measured[0], random_corpus(report=5)
    cases = [
        ({"which": ["gates"]}, "'gates' is no group.*offset, carry, loops, gate, window, memory"),
        ({"which": []}, "Nothing to intervene on: which is empty"),
        ({"which": "offset"}, "'offset' is one alone: give a list"),
        ({"n_loops": 1}, "Nothing to intervene on.*this run has one loop"),
        ({"n_loops": 0}, "n_loops = 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"max_tokens": 65}, "max_tokens = 65 is beyond.*64"),
        ({"corpus": replace(corpus, report=())}, "no report documents"),
        ({"which": [iv.Intervention("a", "b", None, nullcontext)] * 2}, "same name"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            iv.intervene(**({"model": model, "corpus": corpus} | settings))
    bare = plt()
    with pytest.raises(iv.EffectsError, match="no tokenizer"):
        iv.intervene(bare, corpus)


def test_an_interventions_own_refusal_comes_as_it_is(measured):
    """It says what is wrong better than a wrapping error would."""
    narrow = iv.Intervention("mine", "narrow", None, lambda model: iv.set_window(model, 0))
    with pytest.raises(ValueError, match=r"^window = 0"):
        iv.intervene(measured[0], random_corpus(report=5), [narrow])


def test_a_failing_intervention_is_named(measured):
    """It is not dropped, and the model is as it was."""
    model = measured[0]
    broken = iv.Intervention("mine", "broken", None, lambda model: model.hooks([("hook_embed", fail)]))
    with pytest.raises(RuntimeError, match="broken failed: RuntimeError: a hook failed"):
        iv.intervene(model, random_corpus(report=5), [broken])
    assert not model.list_hooks()
