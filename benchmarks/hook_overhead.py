"""What hook points cost when nobody hooks: a forward of the same module with and without them.

    python benchmarks/hook_overhead.py

Prints the ratio of the two (median of paired runs, in turn, of one process) for a bundled model. Goal: at most 1.05.
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

import loopdiag as ld

PAIRS = 60


class NoHookPoint:
    """The identity, and nothing else."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def has_hooks(self) -> bool:
        return False


def without_hook_points(model: nn.Module) -> nn.Module:
    """A copy of a model with every hook point replaced by the plain identity."""
    bare = copy.deepcopy(model)
    for module in list(bare.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HookPoint):
                delattr(module, name)
                setattr(module, name, NoHookPoint())
    return bare


def seconds(model: nn.Module, input_ids: Tensor) -> float:
    start = time.perf_counter()
    model(input_ids)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    model = ld.load("tiny-plt-4")
    bare = without_hook_points(model)
    print(f"{len(model.hook_dict)} hook points, {torch.get_num_threads()} threads, median of {PAIRS} pairs")
    for documents in (1, 8):
        input_ids = torch.randint(0, model.cfg.vocab_size, (documents, model.cfg.n_ctx))
        assert torch.equal(model(input_ids), bare(input_ids))
        pairs = [(seconds(model, input_ids), seconds(bare, input_ids)) for _ in range(PAIRS)]
        ratio = statistics.median(hooked / plain for hooked, plain in pairs)
        milliseconds = 1e3 * statistics.median(plain for _, plain in pairs)
        print(f"{documents} x {model.cfg.n_ctx} tokens: with / without = {ratio:.3f} (without: {milliseconds:.1f} ms)")


if __name__ == "__main__":
    main()
