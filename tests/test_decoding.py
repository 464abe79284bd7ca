"""What a loop costs when a model writes: which schedules are timed, and that the command line tells it."""

import json

import pytest
import torch
from test_cli import SMALL, expect_refusal, run
from test_generation import writer

from loopdiag.errors import InputError
from loopdiag.model import facts
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.decoding import decoding_costs
from loopdiag.model.parallel import ParallelLoops


def test_every_count_and_schedule_is_timed():
    """In the order asked for, with the bytes of the model's own dtype."""
    model = writer().double()
    costs = decoding_costs(model, [3, 1], prompt=5, new=2)
    assert [(cost.loops, cost.prompt) for cost in costs] == [(3, 5), (1, 5)]
    for cost in costs:
        assert cost.sequential > 0
        assert (cost.parallel or 0) > 0
        assert cost.kv == facts.kv_bytes(model.cfg, cost.loops, 8)


@pytest.mark.parametrize("changes", [{"offset": 0}, {"n_coda": 1}])
def test_a_model_whose_loops_wait_for_each_other_is_timed_in_turn_alone(changes):
    (cost,) = decoding_costs(writer(**changes), [2], prompt=5, new=1)
    assert cost.sequential > 0
    assert cost.parallel is None


def test_both_schedules_run_the_same_tokens(monkeypatch):
    """Each gets every token of the text behind the prompt, once, and the loops that are said to be timed."""
    seen = {"sequential": [], "parallel": []}
    forward, step = LoopedLM.forward, ParallelLoops.step

    def told_forward(self, ids, *rest, n_loops, **settings):
        if ids.shape[1] == 1:
            seen["sequential"].append((n_loops, ids.item()))
        return forward(self, ids, *rest, n_loops=n_loops, **settings)

    def told_step(self, ids):
        seen["parallel"].append((1 if self.carries is None else 1 + self.carries.shape[1], ids.item()))
        return step(self, ids)

    monkeypatch.setattr(LoopedLM, "forward", told_forward)
    monkeypatch.setattr(ParallelLoops, "step", told_step)
    decoding_costs(writer(), [1, 3], prompt=4, new=3, seed=7)
    text = torch.randint(0, writer().cfg.vocab_size, (9,), generator=torch.Generator().manual_seed(7))[4:].tolist()
    expected = sorted((count, token) for count in (1, 3) for token in text)
    assert sorted(seen["sequential"]) == sorted(seen["parallel"]) == expected


@pytest.mark.parametrize(("settings", "said"), [({"prompt": 0}, "at least 1"), ({"new": 0}, "at least 1")])
def test_what_cannot_be_timed_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        decoding_costs(writer(), [1], **settings)


def test_a_text_beyond_the_rotations_is_refused():
    model = writer(rope_table=True)
    with pytest.raises(InputError, match="rotations"):
        decoding_costs(model, [1], prompt=model.cfg.n_ctx, new=1)


def test_the_command_line_tells_it(tmp_path):
    """Beside the answer, which stays what it is without."""
    command = ["recommend", "tiny-plt-2", *SMALL, "--measures", "prediction", "--json"]
    plain, timed = (json.loads(run(*command, "-", *more).stdout) for more in ([], ["--decoding"]))
    costs = timed.pop("decoding")
    assert timed == plain
    assert [cost["loops"] for cost in costs] == [1, 2]
    assert all(cost["parallel"] > 0 and cost["kv"]["per_token"] == 1024 for cost in costs)
    shown = run(*command[:-1], "--decoding")
    assert "A new token after 128" in shown.stdout
    assert "side by side" in shown.stdout


def test_a_saved_diagnosis_has_no_model_to_time(tmp_path):
    file = tmp_path / "d.nc"
    run("recommend", "tiny-plt-2", *SMALL, "--measures", "prediction", "--save", file)
    expect_refusal(run("recommend", file, "--decoding"), "give the model")
