"""How much memory loading takes beyond the model that it leaves: a synthetic checkpoint, loaded in fresh processes.

    python benchmarks/loading_memory.py [--gb 1.0]

Makes a checkpoint in the layout of LoopCoder-V2 with an index and four shards, of about `--gb` gigabytes, once in
bfloat16 and once in float32, and loads each in processes of their own. Prints the peak of resident memory above what
the process held before, as a share of the larger of what is stored and what is loaded. Goal: at most 1.20. Works on
Linux; the files are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import loopdiag as ld
from loopdiag.model.checkpoints.iquestpltcoder import weight_names, write_config
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM

GOAL = 1.2
SHARDS = 4
# Stored as, loaded as.
CASES = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float32")]


def checkpoint(folder: Path, stored: torch.dtype, n_bytes: float) -> None:
    """A model of the proportions of LoopCoder-V2 with as many layers as fit; shards are written one at a time."""
    sizes: dict[str, Any] = {
        "vocab_size": 32000,
        "d_model": 1024,
        "n_heads": 8,
        "n_kv_heads": 2,
        "d_head": 128,
        "d_mlp": 5504,
    }
    settings = sizes | {"n_ctx": 4096, "n_loops": 2, "tie_embeddings": False}
    with torch.device("meta"):
        shapes = {n: LoopedLM(LoopedConfig(n_layers=n, **settings)).state_dict() for n in (1, 2)}
    one, two = (sum(x.numel() for x in state.values()) * stored.itemsize for state in shapes.values())
    cfg = LoopedConfig(n_layers=max(1, round((n_bytes - one) / (two - one)) + 1), **settings)
    with torch.device("meta"):
        state = LoopedLM(cfg).state_dict()
    names, generator = weight_names(cfg), torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    total, held = sum(x.numel() for x in state.values()), 0
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    for ours, like in state.items():
        shards[SHARDS * held // total].append(ours)
        held += like.numel()
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        weights = {}
        for ours in members:
            # No need for normal numbers; a page of zeros, though, might not be kept.
            drawn = torch.randint(1, 255, tuple(state[ours].shape), generator=generator, dtype=torch.uint8)
            weights[str(names[ours])] = drawn.to(stored) / 128 - 1
        save_file(weights, folder / file)
        where |= dict.fromkeys(weights, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(write_config(cfg)))


def resident(field: str) -> int:
    """Bytes of this process, as `VmRSS` (now) or `VmHWM` (the most there was)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def in_fresh_process(script: str, *arguments: str, **environment: str) -> Any:
    """What a script prints as JSON when it is started anew: memory that was held before is not counted."""
    command, settings = [sys.executable, script, *arguments], os.environ | environment
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=settings).stdout)


def measure(folder: str, dtype: str) -> dict[str, int]:
    """Load once, in this process; the peak counts from here."""
    ld.load("tiny-plt-2")  # whatever is imported or set up on the way belongs to no model
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
    except OSError:
        before = resident("VmHWM")
    model = ld.load(folder, dtype=dtype)
    peak = resident("VmHWM") - before
    return {
        "stored": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
        "loaded": sum(x.numel() * x.element_size() for x in model.state_dict().values()),
        "peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="gigabytes of the checkpoint as stored")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one)))
        return
    print("stored     loaded     stored GB  loaded GB  peak GB  peak / larger")
    worst, made = 0.0, None
    with tempfile.TemporaryDirectory() as temporary:
        for stored, loaded in CASES:
            if stored != made:
                for file in Path(temporary).iterdir():
                    file.unlink()
                checkpoint(Path(temporary), getattr(torch, stored), given.gb * 1e9)
                made = stored
            found = in_fresh_process(__file__, "--one", temporary, loaded)
            ratio = found["peak"] / max(found["stored"], found["loaded"])
            worst = max(worst, ratio)
            sizes = "  ".join(f"{found[key] / 1e9:9.3f}" for key in ("stored", "loaded"))
            print(f"{stored:9}  {loaded:9}  {sizes}  {found['peak'] / 1e9:7.3f}  {ratio:13.2f}", flush=True)
    print(f"worst {worst:.2f}, goal at most {GOAL:.2f}")


if __name__ == "__main__":
    main()
