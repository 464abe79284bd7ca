"""What a loop costs when a model writes: measured time of a new token, and what decoding keeps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from loopdiag.errors import InputError
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.facts import KeyValueBytes, kv_bytes
from loopdiag.model.parallel import ParallelLoops
from loopdiag.model.past import Past

PROMPT, NEW = 512, 16  # tokens that are there (of short models half their context), and tokens that are timed
WARM_UP = 2


@dataclass(frozen=True)
class DecodingCost:
    """Of one loop count.

    Attributes:
        loops: Loops run.
        prompt: Tokens before the first new one.
        sequential: Median seconds of a new token whose loops run one after the other.
        parallel: Of one whose loops run side by side (`ParallelLoops`); None where the model does not allow it.
        kv: Bytes of keys, values and carries, in the model's dtype.
    """

    loops: int
    prompt: int
    sequential: float
    parallel: float | None
    kv: KeyValueBytes


@torch.no_grad()
def decoding_costs(
    model: LoopedLM, loops: Sequence[int], *, prompt: int | None = None, new: int = NEW, seed: int = 0
) -> list[DecodingCost]:
    """Time new tokens of one text, of random tokens, for several loop counts.

    Each token is timed under all counts and schedules before the next, so that whatever else the machine does falls on
    all of them alike; what they keep of the text is there for all at once. The times are of this machine, device, dtype
    and thread count.

    Args:
        model: The model.
        loops: Loop counts.
        prompt: Tokens before the first new one; 512, or half the model's context where that is shorter, when None.
        new: Tokens that are timed, after two that warm up.
        seed: Of the text, and of the initial state of models that start from a random one.

    Raises:
        InputError: `prompt` and `new` are not positive, or together longer than the model has rotations for.

    Source: arXiv 2510.24824 and 2606.18023 give these in O-notation.
    """
    prompt = min(PROMPT, max(1, model.cfg.n_ctx // 2)) if prompt is None else prompt
    tokens = prompt + WARM_UP + new
    if prompt < 1 or new < 1:
        raise InputError(f"prompt = {prompt} and new = {new} are not allowed: both must be at least 1.")
    if model.cfg.rope_table and tokens > model.cfg.n_ctx:
        raise InputError(f"{tokens} tokens are more than the {model.cfg.n_ctx} that this model has rotations for.")
    device = model.embed.weight.device
    random = torch.Generator().manual_seed(seed)
    text = torch.randint(0, model.cfg.vocab_size, (1, tokens), generator=random).to(device)
    steps = {}
    for count in loops:
        for name, step in _schedules(model, text[:, :prompt], tokens, count, seed).items():
            steps[count, name] = step
    taken: dict[tuple[int, str], list[float]] = {place: [] for place in steps}
    for ids in text[:, prompt:].split(1, dim=1):
        for place, step in steps.items():
            taken[place].append(_seconds(step, ids))
    median = {place: statistics.median(times[WARM_UP:]) for place, times in taken.items()}
    size = model.embed.weight.element_size()
    return [
        DecodingCost(
            count,
            prompt,
            median[count, "sequential"],
            median.get((count, "parallel")),
            kv_bytes(model.cfg, count, size),
        )
        for count in loops
    ]


def _schedules(
    model: LoopedLM, prompt: Tensor, longest: int, n_loops: int, seed: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What runs one more token behind the prompt, by each schedule that the model allows."""
    past = Past()
    model(prompt, n_loops=n_loops, return_type="last", seed=seed, past=past)
    steps: dict[str, Callable[[Tensor], Tensor]] = {}
    with suppress(InputError):
        steps["parallel"] = ParallelLoops(model, past, n_loops, longest).step
    steps["sequential"] = lambda ids: model(ids, n_loops=n_loops, return_type="last", seed=seed, past=past)
    return steps


def _seconds(step: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
