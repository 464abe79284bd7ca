"""From a name, a folder or a hub id to a model, and back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import loopdiag as ld
from loopdiag.model import LoadError, LoopedConfig, LoopedLM, save
from loopdiag.model.loading import BUNDLED, as_dtype

IDS = torch.tensor([[5, 9, 1, 30, 2, 7]])


def small(**settings) -> LoopedLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 4, "d_mlp": 24}
    model = LoopedLM(LoopedConfig(**(sizes | {"n_ctx": 32, "n_loops": 3, "window": 4} | settings)))
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", ["tiny-plt-1", "tiny-plt-2", "tiny-plt-3", "tiny-plt-4"])
def test_bundled_models_load(name):
    """Each has the loops its name says, the tokenizer it was trained with, and is ready to be measured."""
    model = ld.load(name)
    assert model.cfg.n_loops == int(name[-1])
    assert model.source == name
    assert len(model.tokenizer) == model.cfg.vocab_size
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_family_differs_in_the_loop_count_alone():
    """Same configuration but for n_loops, same tokenizer file."""
    configs = [json.loads((BUNDLED / name / "config.json").read_text()) for name in ld.bundled_models()]
    assert [keys.pop("plt_num_loops") for keys in configs] == [1, 2, 3, 4]
    assert all(keys == configs[0] for keys in configs)
    assert len({(BUNDLED / name / "tokenizer.json").read_bytes() for name in ld.bundled_models()}) == 1


@pytest.mark.parametrize(
    "settings", [{}, {"tie_embeddings": False}, {"gate_input": "query", "norm_between_loops": False}]
)
def test_save_and_load_give_the_same_model(tmp_path, settings):
    """Configuration and logits survive; nothing but whole files is left."""
    model = small(**settings)
    save(model, tmp_path / "model")
    again = ld.load(tmp_path / "model")
    assert again.cfg == model.cfg
    assert torch.equal(again(IDS), model(IDS))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    """A model without the offset is no PLT: refused before a file is written."""
    with pytest.raises(ValueError, match="cannot store offset = 0"):
        save(small(offset=0), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_dtypes(tmp_path):
    """Stored in bfloat16, computed in what is asked for; integers are refused."""
    model = small()
    save(model, tmp_path, dtype="bfloat16")
    assert ld.load(tmp_path, dtype="bfloat16").embed.weight.dtype == torch.bfloat16
    assert ld.load(tmp_path, dtype=torch.float64).embed.weight.dtype == torch.float64
    rounded = model.embed.weight.bfloat16().float()
    assert torch.equal(ld.load(tmp_path).embed.weight, rounded)
    with pytest.raises(LoadError, match="dtype 'int8' is not allowed: use float32"):
        as_dtype("int8")


def test_more_loops_at_once():
    """`load(..., n_loops=6)` has hook points of six loops, and fewer loops take none away."""
    assert "loops.6.hook_out" in ld.load("tiny-plt-2", n_loops=6).hook_dict
    assert "loops.4.hook_out" in ld.load("tiny-plt-4", n_loops=1).hook_dict


def test_sharded_weights(tmp_path):
    """An index with two files reads as one file does; a missing shard is named."""
    model = small()
    save(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(ld.load(tmp_path)(IDS), model(IDS))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(LoadError, match=r"b\.safetensors is damaged or cut short"):
        ld.load(tmp_path)


def test_a_hub_id_goes_through_the_hub_with_its_revision(tmp_path, monkeypatch):
    """`owner/name` is fetched at the revision asked for, and only files that hold no code."""
    asked = {}

    def fetched(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(BUNDLED / "tiny-plt-2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert ld.load("somebody/some-plt", revision="abc").cfg.n_loops == 2
    assert (asked["repo_id"], asked["revision"]) == ("somebody/some-plt", "abc")
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked["patterns"])


def test_a_hub_that_does_not_answer_is_told(monkeypatch):
    """One message with the reason, not the client's traceback."""

    def unreachable(*_, **__):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(LoadError, match=r"is no folder here, and the hub did not give it: OSError: no route to host$"):
        ld.load("somebody/some-plt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"plt_window_size": [8, 8]}, "looks ahead"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"plt_num_loops": 0}, "n_loops = 0 is not allowed"),
        ({"num_key_value_heads": 3}, "a divisor of n_heads"),
    ],
)
def test_configurations_that_cannot_be_run(tmp_path, change, said):
    """A setting that would compute something else is refused by name."""
    folder = shutil.copytree(BUNDLED / "tiny-plt-2", tmp_path / "model")
    keys = json.loads((folder / "config.json").read_text()) | change
    keys = {key: value for key, value in keys.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(LoadError, match=said):
        ld.load(folder)


def test_an_unexpected_tensor_is_an_error(tmp_path):
    """Exact key coverage: a checkpoint with more than its configuration says is another model."""
    save(small(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"model.extra.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"unexpected \['model.extra.weight'\]"):
        ld.load(tmp_path)
