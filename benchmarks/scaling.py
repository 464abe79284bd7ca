"""How the time and memory of measuring grow with tokens, loops, documents and width: fitted exponents.

    python benchmarks/scaling.py [--axes tokens loops documents width] [--measures default heads] [--repeats 3]

A random model of 2 layers, width 128, 4 loops and a vocabulary of 2,048 is measured on a document of 512 tokens; one
of these is varied at a time. Each row is a whole `diagnose` of a group of measures, its forward included, so that
"bare" (the forward alone) and "attention alone" (a call of `F.scaled_dot_product_attention` for every layer and loop)
stand beside it. Time is of the processor (the least of the repeats). Memory is the peak of a fresh process above what
it held after a small run, of the default measures.

Printed are the values and two exponents of each row: least squares over all points in log-log, and of the last two
points, where constant parts weigh least. Goal: in tokens, no row grows faster than attention alone. Works on Linux.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from loading_memory import in_fresh_process, resident
from overhead import APART, TOGETHER, random_words, worded

import loopdiag as ld
from loopdiag.measures import GROUPS
from loopdiag.model import LoopedConfig

BASE = LoopedConfig(
    vocab_size=2048,
    d_model=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    d_head=32,
    d_mlp=384,
    n_ctx=8192,
    n_loops=4,
    window=64,
)
TOKENS = 512
AXES = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
    "loops": (1, 2, 4, 8),
    "documents": (1, 2, 4, 8),
    "width": (128, 256, 512, 1024),
}


def setting(axis: str, value: int) -> tuple[LoopedConfig, int, int]:
    """Model, documents and tokens of each where one thing is varied."""
    if axis == "loops":
        return replace(BASE, n_loops=value), 1, TOKENS
    if axis == "width":
        return replace(BASE, d_model=value, d_head=value // BASE.n_heads, d_mlp=3 * value), 1, TOKENS
    return BASE, value if axis == "documents" else 1, value if axis == "tokens" else TOKENS


def rows(axis: str, value: int, groups: list[str]) -> dict[str, Callable[[], object]]:
    """What is timed."""
    cfg, count, tokens = setting(axis, value)
    model, corpus = worded(cfg), random_words(cfg.vocab_size, count, tokens)
    ids = torch.zeros(count, tokens, dtype=torch.long)
    q = torch.randn(count, cfg.n_heads, tokens, cfg.d_head)

    def attention() -> None:
        for _ in range(cfg.n_layers * cfg.n_loops):
            F.scaled_dot_product_attention(q, q, q, is_causal=True)

    def diagnose(measures: tuple[str, ...]) -> Callable[[], object]:
        return lambda: ld.diagnose(model, corpus, max_tokens=tokens, batch_size=1, measures=measures)

    return {
        "attention alone": attention,
        "bare": lambda: model(ids, return_type="last"),
        **{group: diagnose(TOGETHER.get(group, (group,))) for group in groups},
    }


def least_seconds(run: Callable[[], object], repeats: int) -> float:
    """On the processor."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def peak(axis: str, value: int) -> float:
    """Megabytes of a fresh process with the default measures."""
    return in_fresh_process(__file__, "--axes", axis, "--memory", str(value))


def exponents(values: tuple[int, ...], found: list[float]) -> tuple[float, float]:
    """Over all points, and of the last two."""
    x, y = np.log(values), np.log(found)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    allowed = [*(group for group in GROUPS if group not in APART), *TOGETHER]
    parser.add_argument("--measures", nargs="+", choices=allowed, default=allowed, metavar="GROUP")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        run = rows(given.axes[0], given.memory, ["default"])["default"]
        rows("tokens", 64, ["default"])["default"]()  # whatever is set up once
        before = resident("VmRSS")
        run()
        print((resident("VmHWM") - before) / 1e6)
        return
    print(f"{torch.get_num_threads()} threads, {given.repeats} repeats; seconds of the processor, MB of memory")
    for axis, values in AXES.items():
        if axis not in given.axes:
            continue
        print(f"\n{axis:16}" + "".join(f"{value:9,}" for value in values) + "   exponent   of the last two")
        taken: dict[str, list[float]] = {}
        for value in values:
            for name, run in rows(axis, value, given.measures).items():
                taken.setdefault(name, []).append(least_seconds(run, given.repeats))
        taken["memory"] = [peak(axis, value) for value in values]
        for name, found in taken.items():
            over_all, last = exponents(values, found)
            print(
                f"{name:16}" + "".join(f"{each:9.3g}" for each in found) + f"{over_all:11.2f}{last:18.2f}", flush=True
            )


if __name__ == "__main__":
    main()
