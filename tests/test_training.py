"""Training is resumable, seeded, and differs between loop counts in nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopdiag.model import LoopedConfig, LoopedLM
from loopdiag.sweep import sources
from loopdiag.sweep.family import RECIPE, config
from loopdiag.sweep.training import LoopedTrainer, Packed, Recipe, train

TINY = LoopedConfig(
    vocab_size=32, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_mlp=24, n_ctx=16, n_loops=2, window=5
)
SHORT = Recipe(tokens=16 * 4 * 8, sequence=16, batch_size=4, bf16=False, compile=False, evaluate_every=4)
STREAM = np.random.default_rng(0).integers(0, 32, 4096).astype(np.uint16)
HELD_OUT = STREAM[-64:].reshape(4, 16)


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
    with pytest.raises(ValueError, match="asks for 512 tokens and the stream has 100"):
        train(TINY, SHORT, STREAM[:100], HELD_OUT, tmp_path)


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
