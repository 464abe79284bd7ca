"""What a loop costs while decoding: a token's loops one after the other, or side by side as the offset allows.

    python benchmarks/decoding.py [--prompt 1024] [--new 24] [--loops 1 2 3 4] [--device cuda] [--dtype bfloat16]

Prints for each loop count the median time of a new token (one text, random weights of 95M parameters, in turn, of one
process) and the bytes of keys and values, for

- looped: no offset and keys and values of every loop its own, so that loops can only follow each other;
- PLT, one by one: offset and shared memory, loops run in order as `model(ids, past=past)` does;
- PLT, side by side: the same model under the parallel schedule (`ParallelLoops`), whose logits are asserted to be the
  same.

arXiv 2606.18023 gives these in O-notation: time O(R) and memory O(R) for looped, about O(1) for the last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from overhead import LARGE
from torch import Tensor

from loopdiag.model import LoopedConfig, LoopedLM, facts
from loopdiag.model.parallel import ParallelLoops
from loopdiag.model.past import Past

WIRINGS = {
    "looped": replace(LARGE, offset=0, memory="own"),
    "PLT, one by one": LARGE,
    "PLT, side by side": LARGE,
}


def made(cfg: LoopedConfig, device: str, dtype: torch.dtype) -> LoopedLM:
    model = LoopedLM(cfg).eval()
    model.init_weights(0)
    return model.to(device, dtype)


def stepper(name: str, model: LoopedLM, prompt: Tensor, new: int, n_loops: int) -> Callable[[Tensor], Tensor]:
    """What runs one more token, the prompt behind it."""
    past = Past()
    model(prompt, n_loops=n_loops, return_type="last", past=past)
    if name == "PLT, side by side":
        return ParallelLoops(model, past, n_loops, prompt.shape[1] + new).step
    return lambda ids: model(ids, n_loops=n_loops, return_type="last", past=past)


def seconds(step: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[float, Tensor]:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    logits = step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, logits


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=24, help="new tokens, of whose times the median is taken")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, LARGE.vocab_size, (1, asked.prompt + asked.new), generator=random).to(asked.device)
    prompt, following = ids[:, : asked.prompt], ids[:, asked.prompt :].split(1, dim=1)
    models = {cfg: made(cfg, asked.device, dtype) for cfg in set(WIRINGS.values())}
    print(f"{asked.device}, {asked.dtype}, {torch.get_num_threads()} threads, prompt of {asked.prompt} tokens")
    print(f"{'loops':>5} {'':20} {'ms/token':>9} {'over one loop':>13} {'KV bytes/token':>14} {'fixed bytes':>11}")
    one: dict[str, float] = {}
    for n_loops in asked.loops:
        steps = {name: stepper(name, models[cfg], prompt, asked.new, n_loops) for name, cfg in WIRINGS.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for token in following:
            logits = {}
            for name, step in steps.items():
                taken, logits[name] = seconds(step, token)
                times[name].append(taken)
            if dtype == torch.float32:
                torch.testing.assert_close(logits["PLT, side by side"], logits["PLT, one by one"], atol=1e-3, rtol=1e-3)
        for name, cfg in WIRINGS.items():
            median = 1e3 * statistics.median(times[name][2:])  # the first ones warm up
            kv = facts.kv_bytes(cfg, n_loops, dtype.itemsize)
            ratio = median / one.setdefault(name, median)
            print(f"{n_loops:5} {name:20} {median:9.1f} {ratio:13.2f} {kv.per_token:14,} {kv.fixed:11,}")


if __name__ == "__main__":
    main()
