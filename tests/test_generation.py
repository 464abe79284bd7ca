"""Decoding token by token: the same text as running everything again, and a memory of the promised size."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from test_decoder import (
    BASE,
    HUGINN_LIKE,
    IDS,
    OURO_LIKE,
    POST_CODA,
    RANDOM_PLT,
    RETROFITTED,
    all_states,
    assert_same,
    make_model,
    random_start,
)
from torch.utils._pytree import tree_leaves

import loopdiag as ld
from loopdiag.errors import InputError
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.past import Past

# Changes to BASE, and loops to run: fewer than trained, as many, and more.
CONFIGS = [
    ({}, 3),
    ({"window": 1, "offset": 2, "gate_input": "query", "carry_scale": 1.0}, 4),
    ({"window": 99, "offset": 0, "carry_scale": 0.5, "n_kv_heads": 1}, 2),
    ({"n_loops": 1, "rope_table": True, "rope_pairs": "adjacent"}, 1),
    (HUGINN_LIKE, 5),
    (OURO_LIKE, 2),
    (RANDOM_PLT, 3),
    (RANDOM_PLT | {"offset": 2, "injection": "concat", "n_coda": 1, "window": 2, "norm_before_coda": True}, 4),
    (POST_CODA, 3),
    (RETROFITTED | {"offset": 1}, 3),
    ({"n_prelude": 1, "n_coda": 2, "rope_table": True, "gate_input": "query", "norms": "sandwich", "qk_bias": True}, 2),
    ({"offset": 99, "carry_scale": 1.0, "norm_between_loops": False}, 3),
]


def writer(seed=0, **changes):
    """A random model with a head of its own; with tied embeddings it would say one token over and over."""
    return make_model(seed, **{"tie_embeddings": False} | changes)


@torch.no_grad()
def greedy(model, ids, new, **kwargs):
    """The likeliest tokens, every one from a run over everything before it."""
    for _ in range(new):
        ids = torch.cat((ids, model(ids, **kwargs)[:, -1:].argmax(-1)), dim=1)
    return ids


def chunks(ids, *lengths):
    """Texts cut after one token, three more, and so on; the rest last."""
    return torch.split(ids, [*lengths, ids.shape[1] - sum(lengths)], dim=1)


def kept(past):
    """Tensors that a past holds."""
    return [x for x in tree_leaves(list(vars(past).values())) if isinstance(x, torch.Tensor)]


# -- the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(len(CONFIGS)))
def test_greedy_text_is_that_of_whole_runs(case):
    """Token for token, in every wiring; the text is no single token over and over."""
    changes, n_loops = CONFIGS[case]
    model = writer(seed=case, **changes)
    text = model.generate(IDS[:, :5], 20, n_loops=n_loops, seed=4)
    assert torch.equal(text, greedy(model, IDS[:, :5], 20, n_loops=n_loops, seed=4))
    assert len(text[:, 5:].unique()) > 2


@pytest.mark.parametrize("n_loops", [None, 1, 4])
def test_greedy_text_of_a_trained_model(n_loops):
    """In float32, with a prompt and a text longer than the window; the closest that two tokens come is 0.002 nats."""
    model = ld.load("tiny-plt-2")
    prompt = torch.tensor(
        [model.tokenizer("class Shape:\n    def area(self):\n        return self.width *")["input_ids"]]
    )
    text = model.generate(prompt, 60, n_loops=n_loops)
    assert text.shape[1] > model.cfg.window + 5
    assert torch.equal(text, greedy(model, prompt, text.shape[1] - prompt.shape[1], n_loops=n_loops))


@pytest.mark.parametrize("case", range(len(CONFIGS)))
@pytest.mark.parametrize("lengths", [(1, 3), (4,), (1, 1, 1, 1, 1), ()])
@torch.no_grad()
def test_runs_in_pieces_equal_the_whole_run(case, lengths):
    """Logits of every token, whatever the pieces; with a Z_0 of one's own given piece by piece. Measured: 6e-14."""
    changes, n_loops = CONFIGS[case]
    model, past = writer(seed=case, **changes), Past()
    start = random_start(model, IDS)
    pieces = []
    for part in chunks(IDS, *lengths):
        given = {name: z[:, past.seen : past.seen + part.shape[1]] for name, z in start.items()}
        pieces.append(model(part, n_loops=n_loops, past=past, **given))
    assert past.seen == IDS.shape[1]
    assert_same(torch.cat(pieces, dim=1), model(IDS, n_loops=n_loops, **start), 1e-10)


@pytest.mark.parametrize("case", [0, 1, 4, 7, 8])
@torch.no_grad()
def test_every_state_of_a_piece(case):
    """States, gates and patterns of the last token alone are those that it has in the whole run."""
    changes, n_loops = CONFIGS[case]
    model, past = writer(seed=case, **changes), Past()
    for part in chunks(IDS, 8):
        piece = all_states(model, part, n_loops=n_loops, past=past)
    whole = all_states(model, IDS, n_loops=n_loops)
    assert set(piece) == set(whole)
    for name, state in piece.items():
        expected = whole[name][:, :, -1:] if "pattern" in name else whole[name][:, -1:]
        # A window has columns for what it can see only.
        assert_same(state, expected[..., -state.shape[-1] :], 1e-10, name)


@torch.no_grad()
def test_an_earlier_exit_in_pieces():
    """Readouts of loops before the last go through the coda with keys and values of their own."""
    model, past = writer(**POST_CODA), Past()
    name = "loops.1.hook_readout"
    pieces = [model.run_with_cache(part, names_filter=name, past=past)[1][name] for part in chunks(IDS, 1, 3)]
    assert_same(torch.cat(pieces, dim=1), model.run_with_cache(IDS, names_filter=name)[1][name], 1e-10)


# -- memory -----------------------------------------------------------------------------------------


def after(model, tokens, n_loops, pieces=(7,), batch=2):
    """What is left of texts of this length."""
    past = Past()
    with torch.no_grad():
        for part in chunks(torch.zeros(batch, tokens, dtype=torch.long), *pieces):
            model(part, n_loops=n_loops, past=past)
    return past


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("pieces", [(7,), (1, 3, 1), ()])
def test_a_parallel_loop_transformer_holds_one_set_of_keys_and_values(window, offset, pieces):
    """Loop 1's in full; of later loops `window - 1` tokens and `offset` carries each, whatever the length."""
    model = writer(window=window, offset=offset, dtype=torch.float32)
    cfg = model.cfg
    pair = 2 * cfg.n_kv_heads * cfg.d_head * cfg.n_layers
    for n_loops in (1, 2, 5):
        for tokens in (9, 20):
            carried = (n_loops - 1) * ((window - 1) * pair + offset * cfg.d_model)
            past = after(model, tokens, n_loops, pieces)
            assert past.nbytes == 2 * 4 * (tokens * pair + carried)
            assert sum(x.untyped_storage().nbytes() for x in kept(past)) == past.nbytes


def test_growth_is_the_same_whatever_the_loop_count():
    """A token more costs as much with one loop as with five; where each loop has its own memory, five times as much."""
    for changes, factor in (({}, 1), ({"memory": "own"}, 5)):
        model = writer(**changes)
        one, five = (after(model, 21, n_loops).nbytes - after(model, 20, n_loops).nbytes for n_loops in (1, 5))
        assert five == factor * one > 0


@pytest.mark.parametrize("case", range(len(CONFIGS)))
def test_nothing_hides_behind_what_is_kept(case):
    """No view onto a longer tensor: what is allocated is what is counted, token by token and from the prompt on."""
    changes, n_loops = CONFIGS[case]
    model = writer(seed=case, **changes)
    for pieces in ((), (9,), (6, *[1] * 9)):
        past = after(model, 18, n_loops, pieces)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept(past) if x.numel()}
        assert sum(storages.values()) == past.nbytes


# -- misuse -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_past_goes_on_as_it_began():
    """Other texts, other loop counts and padding are refused, and the past can still be gone on from."""
    model, past = writer(), Past()
    model(IDS[:, :4], past=past)
    mask = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"2 texts, 3 loops .*; 1 texts, 3 loops"):
        model(IDS[:1, 4:], past=past)
    with pytest.raises(ValueError, match=r"2 texts, 3 loops .*; 2 texts, 2 loops"):
        model(IDS[:, 4:], n_loops=2, past=past)
    padding = mask.clone()
    padding[1, 0] = 0
    with pytest.raises(ValueError, match=r"past .*attention_mask"):
        model(IDS[:, 4:], padding, past=past)
    assert past.seen == 4
    assert_same(model(IDS[:, 4:], mask, past=past), model(IDS)[:, 4:], 1e-10)
    assert past.seen == 9


@torch.no_grad()
def test_a_past_ends_with_the_table():
    """Tokens of earlier runs count."""
    model, past = writer(rope_table=True, n_ctx=9), Past()
    model(IDS[:, :8], past=past)
    model(IDS[:, 8:], past=past)
    with pytest.raises(ValueError, match=r"10 tokens .*table of rotations.* 9"):
        model(IDS[:, :1], past=past)


def fail(x, hook):
    raise RuntimeError("a hook failed")


@torch.no_grad()
def test_a_failed_run_ends_a_past():
    """What is half written gives no numbers, whatever failed; a run that never began leaves the past as it was."""
    model = writer(**RANDOM_PLT)
    past = Past()
    with pytest.raises(RuntimeError):
        model.run_with_hooks(IDS, past=past, fwd_hooks=[("loops.2.hook_in", fail)])
    with pytest.raises(ValueError, match="half written"):
        model(IDS, past=past)
    past = Past()
    for ids, settings in (
        (IDS.double(), {}),
        (IDS + 10_000, {}),
        (IDS, {"n_loops": 0}),
        (IDS, {"return_type": "both"}),
        (IDS, {"initial_state": torch.zeros(3)}),
        (IDS, {"seed": -1}),
    ):
        with pytest.raises(ValueError, match=r"input_ids|n_loops|return_type|initial_state|seed"):
            model(ids, past=past, **settings)
    assert_same(model(IDS, past=past), model(IDS), 1e-10)


@torch.no_grad()
def test_early_exits_through_a_coda_are_asked_for_from_the_start():
    """Their keys and values are missing else; without a coda they have none, and can be asked for at any time."""
    name = "loops.1.hook_readout"
    for changes in ({}, OURO_LIKE, POST_CODA):
        model, past = writer(**changes), Past()
        model(IDS[:, :4], past=past)
        if not model.cfg.n_coda:
            _, cache = model.run_with_cache(IDS[:, 4:], names_filter=name, past=past)
            assert_same(cache[name], model.run_with_cache(IDS, names_filter=name)[1][name][:, 4:], 1e-10)
            continue
        with pytest.raises(ValueError, match=r"early exits \[\]; .*early exits \[1\]"):
            model.run_with_cache(IDS[:, 4:], names_filter=name, past=past)
        assert_same(model(IDS[:, 4:], past=past), model(IDS)[:, 4:], 1e-10)


# -- the end of a text ------------------------------------------------------------------------------


@torch.no_grad()
def test_stop_tokens_end_a_row():
    """The row repeats its stop token, others go on as if nothing had happened; any of the stop tokens ends it."""
    model = writer()
    free = model.generate(IDS, 12)
    new = free[:, 9:].tolist()
    # A token that the first text says before the second does.
    stop = next(token for token in new[0] if token not in new[1][: new[0].index(token) + 1])
    at = new[0].index(stop)
    model.stop_tokens = (stop,)
    other = new[1].index(stop) if stop in new[1] else 12
    ended = model.generate(IDS, 12)[:, 9:].tolist()
    longest = len(ended[0])
    assert ended[0] == new[0][: at + 1] + [stop] * (longest - at - 1)
    assert ended[1][: other + 1] == new[1][: other + 1][:longest]
    assert longest == min(12, other + 1)
    model.stop_tokens = (stop, new[1][0])
    both = model.generate(IDS, 12)
    first = next(i for i, token in enumerate(new[0]) if token in model.stop_tokens)
    assert both.shape[1] == 9 + first + 1
    assert both[1, 9:].tolist() == [new[1][0]] * (first + 1)
    assert both[0, 9:].tolist() == new[0][: first + 1]


@torch.no_grad()
def test_all_ended_is_the_end():
    """No run after the last row has ended; a stop token of the prompt ends nothing."""
    model = writer()
    model.stop_tokens = tuple(set(range(29)) - {int(model(IDS)[0, -1].argmax())})
    lengths = []
    model.add_hook("hook_embed", lambda x, hook: lengths.append(x.shape[1]))
    text = model.generate(IDS[:1], 50)
    assert 2 <= len(lengths) == text.shape[1] - 9 < 50
    assert lengths == [9] + [1] * (len(lengths) - 1)
    assert torch.equal(text, torch.cat((IDS[:1], text[:, 9:]), dim=1))
    assert int(text[0, -1]) in model.stop_tokens


# -- drawing ----------------------------------------------------------------------------------------


def three_words(seed=0):
    """A model of a three-token vocabulary and many copies of a prompt for it."""
    return writer(seed=seed, vocab_size=3), torch.tensor([[0, 2, 1]]).expand(4000, 3)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.5, 1.0), (2.5, "two")])
@torch.no_grad()
def test_tokens_come_as_often_as_their_probability_says(temperature, top_p):
    """Counts of 4000 draws against softmax(logits / T), cut to the likeliest tokens and rescaled where asked."""
    model, prompts = three_words()
    expected = (model(prompts[:1])[0, -1] / temperature).softmax(-1)
    if top_p == "two":
        ordered = expected.sort(descending=True).values
        top_p = float(ordered[0] + 0.5 * ordered[1])
        expected = expected.masked_fill(expected == expected.min(), 0) / (1 - expected.min())
    drawn = model.generate(prompts, 1, temperature=temperature, top_p=top_p, seed=1)[:, 3]
    counts = drawn.bincount(minlength=3).tolist()
    assert (expected > 0.02).sum() == (3 if top_p == 1.0 else 2)
    for count, p in zip(counts, expected.tolist(), strict=True):
        assert stats.binomtest(count, 4000, p).pvalue > 0.01


@pytest.mark.parametrize("changes", [{}, RANDOM_PLT])
@torch.no_grad()
def test_a_seed_means_a_text(changes):
    """The same seed the same text, another another; a prompt of two rows draws for each."""
    model = writer(**changes)
    text = model.generate(IDS, 20, temperature=1.5, seed=3)
    assert torch.equal(text, model.generate(IDS, 20, temperature=1.5, seed=3))
    assert not torch.equal(text, model.generate(IDS, 20, temperature=1.5, seed=4))
    twins = model.generate(IDS[:1].expand(2, 9), 20, temperature=1.5)
    assert not torch.equal(twins[0], twins[1])


@torch.no_grad()
def test_the_likeliest_token_is_always_left():
    """A tiny top_p is greedy, and so is a tiny temperature; without a temperature top_p has nothing to do."""
    model = writer()
    likeliest = greedy(model, IDS, 20)
    for settings in ({"temperature": 3.0, "top_p": 1e-9}, {"temperature": 1e-4}, {"top_p": 0.5}, {}):
        assert torch.equal(model.generate(IDS, 20, **settings), likeliest)


@torch.no_grad()
def test_top_p_keeps_no_more_than_it_takes():
    """A top_p that the likeliest token reaches by itself draws that one; one just above draws another, too."""
    model, prompts = three_words()
    likeliest = float(model(prompts[:1])[0, -1].softmax(-1).max())
    for top_p, kinds in ((likeliest - 1e-6, 1), (likeliest + 1e-6, 2)):
        assert len(model.generate(prompts, 1, temperature=1.0, top_p=top_p)[:, 3].unique()) == kinds


# -- settings ---------------------------------------------------------------------------------------


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_new_tokens", bad) for bad in (0, -1)),
        *(("temperature", bad) for bad in (-0.1, NAN, INF)),
        *(("top_p", bad) for bad in (0.0, -0.5, 1.1, NAN)),
        ("seed", -1),
    ],
)
def test_settings_out_of_range(name, value):
    """Named, with what came, before anything runs."""
    model, fired = writer(), []
    model.add_hook("hook_embed", lambda x, hook: fired.append(hook.name))
    with pytest.raises(InputError, match=rf"^{name} = {value} is out of range: allowed is"):
        model.generate(IDS, **({"max_new_tokens": 2} | {name: value}))
    with pytest.raises(ValueError, match="n_loops = 0"):
        model.generate(IDS, 2, n_loops=0)
    assert not fired


@pytest.mark.parametrize("prompt", ["def area", [[1, 2]], IDS[0]])
def test_prompts_are_a_batch_of_tokens(prompt):
    """Neither text, nor lists, nor a single row."""
    with pytest.raises(InputError, match=r"input_ids .*\[batch, pos\]"):
        writer().generate(prompt, 2)


@torch.no_grad()
def test_a_text_longer_than_the_stored_table():
    """Refused before any run; one that just fits is not, and computed rotations have no end."""
    model, fired = writer(rope_table=True, n_ctx=12), []
    model.add_hook("hook_embed", lambda x, hook: fired.append(hook.name))
    with pytest.raises(InputError, match=r"9 \+ 4 tokens are more than the 12"):
        model.generate(IDS, 4)
    assert not fired
    assert model.generate(IDS, 3).shape == (2, 12)
    assert writer(n_ctx=12).generate(IDS, 9).shape == (2, 18)


# -- hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loops.2.hook_in", "loops.3.blocks.1.attn.hook_gate", "loops.1.hook_out"])
@torch.no_grad()
def test_hooks_of_the_model_fire_while_it_writes(name):
    """Once per run, over the prompt and then token by token; what they change, the text feels."""
    model = writer(carry_scale=1.0)
    clean, widths = model.generate(IDS, 10), []

    def silence(x, hook):
        widths.append(x.shape[1])
        return torch.zeros_like(x)

    with model.hooks(fwd_hooks=[(name, silence)]):
        edited = model.generate(IDS, 10)
        whole = greedy(model, IDS, 10)
    assert widths[:10] == [9] + [1] * 9
    assert not torch.equal(edited, clean)
    assert torch.equal(edited, whole)
    assert torch.equal(model.generate(IDS, 10), clean)


def test_writing_leaves_nothing_behind():
    """No hook, no graph and no gradient; prompts stay as they were, and the dtype of tokens is kept."""
    model, prompt = writer(), IDS.int()
    text = model.generate(prompt, 3, temperature=1.0)
    assert text.dtype == torch.int32
    assert torch.equal(text[:, :9], prompt)
    assert torch.equal(prompt, IDS.int())
    assert model.list_hooks() == {}
    assert all(weight.grad is None for weight in model.parameters())
    kept_by = []
    model.add_hook("loops.1.hook_out", lambda x, hook: kept_by.append(x.requires_grad))
    model.generate(prompt, 2)
    assert kept_by == [False, False]
    assert torch.is_grad_enabled()


def test_a_model_made_here_has_no_stop_tokens():
    """So a text has the length that was asked for."""
    model = LoopedLM(replace(BASE, n_layers=1))
    model.init_weights(0)
    assert model.stop_tokens == ()
    assert model.generate(IDS, 7).shape == (2, 16)
