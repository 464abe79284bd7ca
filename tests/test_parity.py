"""LoopedLM against numbers that other people's code produced for the released Parallel Loop Transformer."""

import json
from pathlib import Path

import pytest
import torch
from plain_looped import plain_run
from safetensors.torch import load_file

from loopdiag.model.checkpoints.iquestpltcoder import read_config, weight_names
from loopdiag.model.decoder import LoopedLM

DATA = Path(__file__).parent / "data" / "parity" / "iquestpltcoder"
CASES = sorted(path.name for path in DATA.iterdir())
# The data was computed in float64 and rounded once to float32. Measured over all cases, in absolute terms:
# float64 5e-7, float32 2e-5. A wiring mistake moves some tensor by 0.2 to 20.
TOLERANCE = {torch.float64: {"atol": 2e-6, "rtol": 1e-6}, torch.float32: {"atol": 2e-4, "rtol": 1e-4}}

LOOP_STATES = {
    "loop_input": "hook_in",
    "loop_state_pre_norm": "hook_out_pre_norm",
    "loop_state": "hook_out",
    "logits": "hook_readout",
}


def load_case(case, dtype):
    """Configuration, weights under our names, and reference tensors in `dtype`."""
    cfg = read_config(json.loads((DATA / case / "config.json").read_text()))
    released = load_file(DATA / case / "model.safetensors")
    weights = {ours: released.pop(theirs).to(dtype) for ours, theirs in weight_names(cfg).items()}
    assert not released, f"weights that nobody reads: {sorted(released)}"
    reference = load_file(DATA / case / "reference.safetensors")
    return cfg, weights, {name: x if name == "input_ids" else x.to(dtype) for name, x in reference.items()}


def our_name(reference_name):
    """Hook point of a reference tensor; logits are read from the readout."""
    kind, *numbers = reference_name.split(".")
    if kind == "embed":
        return "hook_embed"
    if kind == "gate":
        return "loops.{}.blocks.{}.attn.hook_gate".format(*numbers)
    return f"loops.{numbers[0]}.{LOOP_STATES[kind]}"


def test_the_data_is_there():
    """An oracle that is missing protects nobody."""
    assert len(CASES) == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_reference_tensor(case, dtype):
    """Embedding, input, output and hand-over of every loop, gates, and logits of every loop count."""
    cfg, weights, reference = load_case(case, dtype)
    model = LoopedLM(cfg).to(dtype)
    model.load_state_dict(weights)
    logits, cache = model.run_with_cache(reference.pop("input_ids"))
    torch.testing.assert_close(logits, reference.pop("logits"), **TOLERANCE[dtype])
    for name, expected in reference.items():
        ours = cache[our_name(name)]
        if name.startswith("logits."):
            ours = model.unembed(ours)
        elif name.startswith("gate."):
            ours = ours.transpose(1, 2)
        torch.testing.assert_close(ours, expected, **TOLERANCE[dtype], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_the_plain_implementation_is_right_too(case):
    """The oracle of `test_decoder.py` stands on the same outside numbers (causal, so a prefix will do)."""
    cfg, weights, reference = load_case(case, torch.float64)
    length = 14
    states = plain_run(cfg, weights, reference.pop("input_ids")[1, :length].tolist(), cfg.n_loops)
    torch.testing.assert_close(states["logits"], reference.pop("logits")[1, :length], **TOLERANCE[torch.float64])
    for name, expected in reference.items():
        ours, expected = states[our_name(name)], expected[1]
        if name.startswith("logits."):
            ours = ours @ weights["head.weight"].T
        elif name.startswith("gate."):
            expected = expected.T
        torch.testing.assert_close(ours, expected[:length], **TOLERANCE[torch.float64])
