"""All loops of a token side by side: the numbers and the text of running them one after the other."""

import pytest
import torch
from test_decoder import BASE, IDS, assert_same, make_model
from test_generation import writer

import loopdiag as ld
from loopdiag.errors import InputError
from loopdiag.interventions import shift_offset
from loopdiag.model import facts
from loopdiag.model.parallel import ParallelLoops
from loopdiag.model.past import Past

# Changes to BASE, and loops to run: fewer than trained, as many, and more.
CONFIGS = [
    ({}, 3),
    ({"window": 1, "offset": 2, "gate_input": "query", "carry_scale": 1.0}, 4),
    ({"window": 99, "carry_scale": 0.5, "n_kv_heads": 1}, 2),
    ({"n_loops": 1, "rope_table": True, "rope_pairs": "adjacent"}, 1),
    ({"memory": "own", "offset": 1}, 3),
    ({"memory": "own", "offset": 3, "norms": "sandwich", "qk_bias": True}, 4),
    ({"injection": "concat", "norms": "post", "window": 2}, 2),
    ({"injection": "none", "norms": "pre_post"}, 3),
    ({"offset": 99, "carry_scale": 1.0, "norm_between_loops": False}, 3),
]


@pytest.mark.parametrize("case", range(len(CONFIGS)))
@pytest.mark.parametrize("prompt", [1, 3])
@torch.no_grad()
def test_logits_are_those_of_loop_after_loop(case, prompt):
    """Of every token after the prompt, whatever the wiring. Measured: 5e-15."""
    changes, n_loops = CONFIGS[case]
    model, past = writer(seed=case, **changes), Past()
    model(IDS[:, :prompt], n_loops=n_loops, past=past)
    loops = ParallelLoops(model, past, n_loops, longest=IDS.shape[1])
    found = [loops.step(IDS[:, place : place + 1]) for place in range(prompt, IDS.shape[1])]
    assert len(found) > 5
    assert_same(torch.stack(found, dim=1), model(IDS, n_loops=n_loops)[:, prompt:], 1e-10)


@pytest.mark.parametrize("case", range(len(CONFIGS)))
def test_the_text_is_the_same(case):
    """Token for token, drawn ones too."""
    changes, n_loops = CONFIGS[case]
    model = writer(seed=case, **changes)
    for drawn in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}):
        texts = [
            model.generate(IDS[:, :5], 20, n_loops=n_loops, schedule=schedule, **drawn)
            for schedule in ("sequential", "parallel")
        ]
        assert torch.equal(*texts)
        assert len(texts[0][:, 5:].unique()) > 2


@pytest.mark.parametrize("n_loops", [None, 1, 4])
def test_the_text_of_a_trained_model(n_loops):
    """In float32, longer than the window."""
    model = ld.load("tiny-plt-2")
    prompt = torch.tensor([model.tokenizer("class Shape:\n    def area(self):\n        return")["input_ids"]])
    one, other = (
        model.generate(prompt, 60, n_loops=n_loops, schedule=schedule) for schedule in ("sequential", "parallel")
    )
    assert torch.equal(one, other)
    assert one.shape[1] > model.cfg.window + 5


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 0.15), ("float16", 0.02)])
@torch.no_grad()
def test_half_precision_is_the_same_to_rounding(dtype, rounding):
    """Logits of a trained model; texts may part where two tokens are nearly as likely."""
    model = ld.load("tiny-plt-4", dtype=dtype)
    ids = torch.tensor([model.tokenizer("class Shape:\n    def area(self):\n        return self.width")["input_ids"]])
    past = Past()
    model(ids[:, :4], past=past)
    loops = ParallelLoops(model, past, model.cfg.n_loops, longest=ids.shape[1])
    found = torch.stack([loops.step(ids[:, place : place + 1]) for place in range(4, ids.shape[1])], dim=1).double()
    exact = ld.load("tiny-plt-4")(ids)[:, 4:]
    difference = (found - model(ids)[:, 4:].double()).abs().max()
    assert 0 < difference <= rounding, difference
    assert (found - exact).abs().max() < 2 * rounding


def test_a_past_of_another_run_is_refused():
    """Of other loops, and rotations that the model does not have."""
    model, past = make_model(rope_table=True), Past()
    model(IDS[:, :4], n_loops=2, past=past)
    with pytest.raises(InputError, match="n_loops = 3, and the past is of a run with 2"):
        ParallelLoops(model, past, 3, longest=6)
    with pytest.raises(ValueError, match="more than this model's table of rotations has"):
        ParallelLoops(model, past, 2, longest=model.cfg.n_ctx + 1)


def test_room_for_a_window_is_no_longer_than_the_text():
    model, past = make_model(window=2**20), Past()
    model(IDS[:, :4], past=past)
    loops = ParallelLoops(model, past, model.cfg.n_loops, longest=6)
    assert max(store.k.shape[2] for store in loops.windows) == 6


def test_a_tokens_loops_take_one_pass_of_the_layers():
    """Each layer is entered once a token, with a row for every loop."""
    model, past = make_model(), Past()
    model(IDS[:, :4], past=past)
    loops = ParallelLoops(model, past, model.cfg.n_loops, longest=6)
    rows = []
    handles = [block.mlp.register_forward_hook(lambda *at: rows.append(at[-1].shape[1])) for block in model.blocks]
    loops.step(IDS[:, 4:5])
    for handle in handles:
        handle.remove()
    assert rows == [model.cfg.n_loops] * model.cfg.n_layers


@pytest.mark.parametrize("changes", [{}, {"memory": "own", "offset": 1}, {"offset": 2}])
@torch.no_grad()
def test_memory_is_that_of_the_closed_form(changes):
    """Keys and values for the longest text, window and carries; a window holds the token itself, too."""
    model, past = make_model(**changes), Past()
    ids = torch.arange(40)[None] % model.cfg.vocab_size
    model(ids, past=past)
    loops = ParallelLoops(model, past, 3, longest=50)
    told = facts.kv_bytes(model.cfg, 3, loops.memory[0].k.element_size())
    itself = 0
    if model.cfg.memory == "first":
        per_token = 2 * model.cfg.n_kv_heads * model.cfg.d_head * loops.memory[0].k.element_size()
        itself = 2 * model.cfg.n_layers * per_token
    before = loops.nbytes
    assert before == 50 * told.per_token + told.fixed + itself
    loops.step(ids[:, :1])
    assert loops.nbytes == before


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"offset": 0}, "without an offset"),
        ({"n_prelude": 1}, "layers before or after"),
        ({"n_coda": 1}, "layers before or after"),
        ({"initial_state": "random"}, "start from a random state"),
    ],
)
def test_models_that_it_is_not_for(changes, why):
    """Refused before anything runs; the message says what to do."""
    model = make_model(**changes)
    with pytest.raises(InputError, match=f"not for this run: .*{why}.*Use the sequential one"):
        model.generate(IDS, 2, schedule="parallel")


def test_hooks_and_interventions_are_refused():
    """They would do nothing."""
    model = make_model()
    with model.hooks([("loops.2.hook_in", lambda x, hook: x)]), pytest.raises(InputError, match=r"loops\.2\.hook_in"):
        model.generate(IDS, 2, schedule="parallel")
    with shift_offset(model, 2), pytest.raises(InputError, match="interventions are going on"):
        model.generate(IDS, 2, schedule="parallel")
    model.generate(IDS, 2, schedule="parallel")


@torch.no_grad()
def test_no_more_tokens_than_there_is_room_for():
    """Refused: the oldest token would be forgotten in silence."""
    model, past = make_model(), Past()
    model(IDS[:, :4], past=past)
    with pytest.raises(InputError, match="longest = 4 leaves no room after the 4 tokens"):
        ParallelLoops(model, past, 3, longest=4)
    loops = ParallelLoops(model, past, 3, longest=5)
    loops.step(IDS[:, 4:5])
    with pytest.raises(InputError, match="has its 5 tokens"):
        loops.step(IDS[:, 5:6])


def test_a_past_of_no_text_and_a_schedule_of_no_name():
    """Both are refused."""
    with pytest.raises(InputError, match="run the prompt"):
        ParallelLoops(make_model(), Past(), BASE.n_loops, 9)
    with pytest.raises(InputError, match="'sequential' or 'parallel'"):
        make_model().generate(IDS, 2, schedule="both")
