"""Training is resumable, seeded, and differs between loop counts in nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopdiag.corpus import Batch
from loopdiag.model import LoopedConfig, LoopedLM
from loopdiag.sweep import sources
from loopdiag.sweep.family import RECIPE, config
from loopdiag.sweep.training import LoopedTrainer, Packed, Recipe, rows_as_batches, token_losses, train

TINY = LoopedConfig(
    vocab_size=32, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_mlp=24, n_ctx=16, n_loops=2, window=5
)
SHORT = Recipe(tokens=16 * 4 * 8, sequence=16, batch_size=4, bf16=False, compile=False, evaluate_every=4)
STREAM = np.random.default_rng(0).integers(0, 32, 4096).astype(np.uint16)
HELD_OUT = rows_as_batches(STREAM[-64:].reshape(4, 16))


def test_initial_weights_are_the_familys():
    """Every loop count starts from the same weights; another seed from others; gates start at an even blend."""
    states = []
    for n_loops, seed in ((1, 0), (4, 0), (4, 1)):
        model = LoopedLM(config(n_loops))
        model.init_weights(seed)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[1]["embed.weight"], states[2]["embed.weight"])
    assert states[0]["embed.weight"].std() == pytest.approx(0.05, rel=0.02)
    assert not states[0]["blocks.0.attn.gate.weight"].any()


def test_the_budget_is_ten_million_tokens():
    """Each member sees at least 10M tokens, each once."""
    assert RECIPE.batches * RECIPE.batch_size * RECIPE.sequence == RECIPE.tokens >= 10_000_000


def test_packing_loses_only_the_tail():
    """Rows joined again are the stream."""
    packed = Packed(STREAM[:100], 16)
    rows = [packed[index]["input_ids"] for index in range(len(packed))]
    assert torch.cat(rows).tolist() == STREAM[:96].tolist()


def test_no_package_is_in_both_lists():
    """Held-out text comes from packages that no training file came from."""
    assert not set(sources.TRAINING_PACKAGES) & set(sources.HELD_OUT_PACKAGES)


def test_files_that_copy_held_out_text_are_dropped(monkeypatch):
    """Five lines in a row shared with a held-out document keep a file out of the training text."""
    shared = "\n".join(f"line number {n} of five" for n in range(5))
    texts = {"copy.py": f"import os\n{shared}\n", "own.py": "x = 1\n" * 9}
    files = [sources.SourceFile("p", path, text) for path, text in texts.items()]
    monkeypatch.setattr(sources, "TRAINING_PACKAGES", ("p",))
    monkeypatch.setattr(sources, "package_files", lambda package: iter(files))
    assert [file.path for file in sources.training_files([shared], 1000)] == ["own.py"]
    assert len(sources.training_files(["something else"], 1000)) == 2


def test_a_stream_that_is_too_short_is_refused(tmp_path):
    """Before anything is trained."""
    with pytest.raises(ValueError, match="batch of the recipe has 64 tokens and the stream 60"):
        train(TINY, SHORT, STREAM[:60], HELD_OUT, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Stopped in the sixth batch and called again, training ends as an unbroken run does; a third call does nothing."""
    whole = train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "whole").state_dict()

    step, seen = LoopedTrainer.training_step, []

    def stopping(self, *arguments, **keywords):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(LoopedTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "log.json").exists()
    again = train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "stopped").state_dict()
    assert len(seen) == 6 + 4
    finished = train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "stopped").state_dict()
    assert len(seen) == 6 + 4
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], rtol=0, atol=0)
        assert torch.equal(finished[name], whole[name])
    log = json.loads((tmp_path / "stopped" / "log.json").read_text())
    assert len([entry for entry in log if "eval_loss" in entry]) == 2


def test_a_folder_holds_one_training_run(tmp_path):
    """Another budget or model would go on from its checkpoints and take its name; speed alone may change."""
    train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "run")
    for cfg, recipe in ((TINY, replace(SHORT, tokens=16 * 4 * 4)), (replace(TINY, n_loops=3), SHORT)):
        with pytest.raises(ValueError, match="holds another training run"):
            train(cfg, recipe, STREAM, HELD_OUT, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ValueError, match="checkpoints of an unknown training run"):
        train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "run")


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    """Killed while it wrote its last checkpoint, a run goes on from the one before, to the same weights."""
    whole = train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "whole").state_dict()
    train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "killed")
    (last,) = (tmp_path / "killed").glob("checkpoint-*")
    for content in (None, '{"global_step": 8', '{"global_step": 4}'):
        state = last / "trainer_state.json"
        state.unlink() if content is None else state.write_text(content)
        again = train(TINY, SHORT, STREAM, HELD_OUT, tmp_path / "killed").state_dict()
        assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_token_losses_are_the_models_own_loss():
    """Averaged, they are what the model calls its loss; padding has none, and dtype and mode stay."""
    model = LoopedLM(TINY).train()
    model.init_weights(0)
    ids = torch.from_numpy(STREAM[:48].astype(np.int64)).reshape(3, 16)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 9:] = False
    batch = Batch(ids, mask, ("a", "b", "c"), ("a", "b", "c"))
    losses = token_losses(model, [batch])
    assert [len(row) for row in losses] == [15, 15, 8]
    expected = model(ids, mask, return_type="loss").item()
    assert np.concatenate(losses).mean() == pytest.approx(expected, rel=1e-6)
    assert losses[2].mean() == pytest.approx(model(ids[2:, :9], return_type="loss").item(), rel=1e-5)
    assert model.training


def test_training_on_starts_from_given_weights(tmp_path):
    """With a learning rate of zero a model stays what it started from; weights it lacks are fresh."""
    given = LoopedLM(replace(TINY, memory="own"))
    given.init_weights(7)
    still = replace(SHORT, learning_rate=0.0)
    model = train(TINY, still, STREAM, HELD_OUT, tmp_path, start=given.state_dict())
    for name, weight in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert not model.state_dict()["blocks.0.attn.gate.weight"].any()
