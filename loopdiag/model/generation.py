"""Text, token by token."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopdiag.errors import InputError
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.parallel import ParallelLoops, check_parallel
from loopdiag.model.past import Past


@torch.no_grad()
def generate(
    model: LoopedLM,
    input_ids: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    *,
    n_loops: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    schedule: Literal["sequential", "parallel"] = "sequential",
) -> Int[Tensor, "batch longer"]:
    """Go on with texts of one length, each token from the keys and values that the ones before it left behind.

    A text ends at one of the model's `stop_tokens`; the rest of its row repeats that token. Hooks on the model fire in
    every run, the first one over the prompt, the others over one token each.

    Args:
        model: The model.
        input_ids: The prompts.
        max_new_tokens: Tokens to add at most.
        n_loops: Loops to run; the trained number when None.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: Of the draws, and of the initial state of models that start from a random one.
        schedule: Whether a new token's loops run one after the other, or side by side in one pass
            (`ParallelLoops`), which takes an offset. The numbers are the same to rounding, and so is the text, but
            where two tokens are nearly as likely: in half precision some are.

    Returns:
        The prompts and what follows.

    Raises:
        InputError: A setting out of range, or a model or hooks that the parallel schedule is not for; the message says
            what is allowed.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise InputError("input_ids must be a tensor [batch, pos]; for text, model.tokenizer(text)['input_ids'].")
    for name, value, fits, allowed in (
        ("max_new_tokens", max_new_tokens, _whole(max_new_tokens) and max_new_tokens >= 1, "an integer >= 1"),
        ("temperature", temperature, _number(temperature) and _temperate(temperature), "0, or a number from 1e-4 on"),
        ("top_p", top_p, _number(top_p) and 0 < top_p <= 1, "a number above 0, at most 1"),
        ("schedule", schedule, schedule in ("sequential", "parallel"), "'sequential' or 'parallel'"),
        ("seed", seed, _whole(seed) and 0 <= seed < 2**32, "an integer from 0 to 2**32 - 1"),
    ):
        if not fits:
            raise InputError(f"{name} = {value!r} is out of range: allowed is {allowed}.")
    longest = input_ids.shape[1] + max_new_tokens
    if model.cfg.rope_table and longest > model.cfg.n_ctx:
        raise InputError(
            f"{input_ids.shape[1]} + {max_new_tokens} tokens are more than the {model.cfg.n_ctx} that this model has "
            "rotations for: give fewer."
        )
    if schedule == "parallel":
        check_parallel(model)
    # Drawn on the CPU, so that a seed means the same text on every device.
    generator = torch.Generator().manual_seed(seed)
    past, ids, new = Past(), input_ids, input_ids
    loops: ParallelLoops | None = None
    stops = torch.tensor(model.stop_tokens, dtype=ids.dtype, device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        if loops is not None:
            logits = loops.step(new)
        else:
            logits = model(new, n_loops=n_loops, return_type="last", seed=seed, past=past)
            if schedule == "parallel":
                loops = ParallelLoops(model, past, n_loops or model.cfg.n_loops, longest)
        chosen = logits.argmax(-1) if temperature == 0 else _drawn(logits, temperature, top_p, generator)
        new = torch.where(ended, ids[:, -1], chosen.to(ids)).unsqueeze(1)
        ids = torch.cat((ids, new), dim=1)
        ended |= torch.isin(new[:, 0], stops)
        if ended.all():
            break
    return ids


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _temperate(temperature: float) -> bool:
    """Neither so low that logits overflow, nor endless."""
    return temperature == 0 or 1e-4 <= temperature < float("inf")


def _drawn(
    logits: Float[Tensor, "batch vocab"], temperature: float, top_p: float, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    p, order = (logits.double().cpu() / temperature).softmax(-1).sort(descending=True, stable=True)
    # The likeliest token always stays: before it stands a probability of 0.
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)
