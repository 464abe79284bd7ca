"""What a loop costs while decoding: a token's loops one after the other, or side by side as the offset allows.

    python benchmarks/decoding.py [--prompt 1024] [--new 24] [--loops 1 2 3 4] [--device cuda] [--dtype bfloat16]

Prints for each loop count the median time of a new token (one text, random weights of 95M parameters, in turn, of one
process) and the bytes of keys and values, for

- looped: no offset and keys and values of every loop its own, so that loops can only follow each other;
- PLT, one by one: offset and shared memory, loops run in order as `model(ids, past=past)` does;
- PLT, side by side: the same model under the parallel schedule (`ParallelLoops`), which writes the same text.

arXiv 2606.18023 gives these in O-notation: time O(R) and memory O(R) for looped, about O(1) for the last.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import torch
from overhead import LARGE, worded

from loopdiag.model.decoding import DecodingCost, decoding_costs

WIRINGS = {"looped": replace(LARGE, offset=0, memory="own"), "PLT": LARGE}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=24, help="new tokens, of whose times the median is taken")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    print(
        f"{asked.device}, {asked.dtype}, {torch.get_num_threads()} threads, prompt of {asked.prompt} tokens,", end=" "
    )
    print(f"load of the machine {os.getloadavg()[0]:.1f}")
    print(f"{'loops':>5} {'':18} {'ms/token':>9} {'over one loop':>13} {'KV bytes/token':>14} {'fixed bytes':>11}")
    for name, cfg in WIRINGS.items():
        model = worded(cfg).to(asked.device, getattr(torch, asked.dtype))
        costs = decoding_costs(model, asked.loops, prompt=asked.prompt, new=asked.new)
        for schedule, shown in (("sequential", ", one by one"), ("parallel", ", side by side")):
            for cost in costs:
                print_row(name + shown, cost, getattr(cost, schedule), getattr(costs[0], schedule))


def print_row(name: str, cost: DecodingCost, seconds: float | None, first: float | None) -> None:
    """A row of the table, where the model allows the schedule."""
    if seconds is None or first is None:
        return
    kv = cost.kv
    print(f"{cost.loops:5} {name:18} {1e3 * seconds:9.1f} {seconds / first:13.2f} {kv.per_token:14,} {kv.fixed:11,}")


if __name__ == "__main__":
    main()
