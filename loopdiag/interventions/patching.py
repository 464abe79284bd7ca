"""Activation patching between loops: what a prompt's state after a loop carries of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from loopdiag.interventions.contexts import patch
from loopdiag.model.decoder import LoopedLM

Prompts = Int[Tensor, "prompt pos"] | Sequence[str]
Answers = Sequence[tuple[int, int]] | Sequence[tuple[str, str]]


@torch.no_grad()
def patching_effects(
    model: LoopedLM,
    clean: Prompts,
    corrupted: Prompts,
    answers: Answers,
    *,
    positions: Literal["all", "each"] = "all",
    n_loops: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Put the state after each loop of one prompt into the run of another, and see which answer it brings.

    What is patched is Y, the raw output of a loop; see `patch`.

    Args:
        model: The model.
        clean: Prompts whose answer is the right one: tokens, or texts for the model's tokenizer.
        corrupted: The same prompts with what decides the answer changed; as many, all of as many tokens.
        answers: For each prompt the right and the wrong next token: ids, or texts that are one token each.
        positions: `"all"` positions at once, or `"each"` alone, which takes as many runs as there are tokens.
        n_loops: Loops to run; the trained number when None.
        seed: Of the initial state, where a model draws one.

    Returns:
        `log_odds` by direction, span, loop, (position,) prompt: log p(right) - log p(wrong) after the last token, in
        nats. Direction `"restores"` puts clean states into the corrupted prompt, `"breaks"` corrupted ones into the
        clean prompt. Span `"loop"` patches this loop alone, `"later"` this one and all later ones. `clean` and
        `corrupted`, by prompt, are the same of the untouched runs. With all positions, the last loop gives the other
        prompt's value, and so does every `"later"`, which is filled in without a run.

    Raises:
        ValueError: Prompts that differ in number or tokens or are of no known kind, an answer that is not one token,
            two answers that are the same token, or unknown `positions`.
    """
    if positions not in ("all", "each"):
        raise ValueError(f"positions = {positions!r} is not allowed: use 'all' or 'each'.")
    prompts = {"clean": _tokens(model, clean, "clean"), "corrupted": _tokens(model, corrupted, "corrupted")}
    if prompts["clean"].shape != prompts["corrupted"].shape:
        raise ValueError(
            f"clean has (prompts, tokens) {tuple(prompts['clean'].shape)}, corrupted "
            f"{tuple(prompts['corrupted'].shape)}: each clean prompt needs a corrupted one with as many tokens."
        )
    count, length = prompts["clean"].shape
    pairs = _pairs(model, answers, count)
    n_loops = model.cfg.n_loops if n_loops is None else n_loops
    model.ensure_loops(n_loops)
    loops = range(1, n_loops + 1)
    points = [f"loops.{loop}.hook_out_pre_norm" for loop in loops]

    def log_odds(logits: Float[Tensor, "prompt vocab"]) -> np.ndarray:
        right, wrong = logits.double().gather(1, pairs).unbind(1)
        return (right - wrong).cpu().numpy()

    settings: dict[str, Any] = {"n_loops": n_loops, "return_type": "last", "seed": seed}
    runs = {name: model.run_with_cache(ids, names_filter=points, **settings) for name, ids in prompts.items()}
    places = [None] if positions == "all" else list(range(length))
    directions = {"restores": ("clean", "corrupted"), "breaks": ("corrupted", "clean")}
    values = np.empty((2, 2, n_loops, len(places), count))
    # A changed order may put a loop last that is not among the later ones.
    settled = positions == "all" and model.wiring.order is None
    for d, (source, into) in enumerate(directions.values()):
        for s, later in enumerate((False, True)):
            if later and settled:
                values[d, s] = log_odds(runs[source][0])
                continue
            for loop in loops:
                for p, place in enumerate(places):
                    with patch(model, runs[source][1], loop, place, later):
                        values[d, s, loop - 1, p] = log_odds(model(prompts[into], **settings))
    dims = ("direction", "span", "loop", "position", "prompt")
    about = {"units": "nats", "long_name": "log p(right) - log p(wrong) of the next token"}
    data = xr.Dataset(
        {
            "log_odds": (dims, values, about),
            **{name: ("prompt", log_odds(logits), about) for name, (logits, _) in runs.items()},
        },
        coords={"direction": list(directions), "span": ["loop", "later"], "loop": list(loops)},
    )
    return data.squeeze("position") if positions == "all" else data.assign_coords(position=places)


def _tokens(model: LoopedLM, prompts: Prompts, name: str) -> Int[Tensor, "prompt pos"]:
    device = model.embed.weight.device
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(prompts.shape)}: tokens must be a tensor [prompt, pos].")
        return prompts.to(device)
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{name} must be a tensor of tokens [prompt, pos], or a list of one or more texts.")
    rows = _tokenizer(model)(list(prompts))["input_ids"]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name} has prompts of {sorted({len(row) for row in rows})} tokens: all must have as many.")
    return torch.tensor(rows, device=device)


def _pairs(model: LoopedLM, answers: Answers, count: int) -> Int[Tensor, "prompt 2"]:
    if len(answers) != count or any(len(pair) != 2 for pair in answers):
        raise ValueError(f"answers has {len(answers)} entries: give a pair (right, wrong) for each of {count} prompts.")
    pairs = [[_token(model, answer) for answer in pair] for pair in answers]
    for number, (right, wrong) in enumerate(pairs):
        if right == wrong:
            raise ValueError(f"answers of prompt {number}: right and wrong are the same token, {right}.")
    return torch.tensor(pairs, device=model.embed.weight.device)


def _token(model: LoopedLM, answer: int | str) -> int:
    if isinstance(answer, str):
        ids = _tokenizer(model)(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"The answer {answer!r} is {len(ids)} tokens of this model: it must be one.")
        return ids[0]
    if not 0 <= answer < model.cfg.vocab_size:
        raise ValueError(f"The answer {answer} is no token of this model: they are 0 to {model.cfg.vocab_size - 1}.")
    return int(answer)


def _tokenizer(model: LoopedLM) -> Any:
    if model.tokenizer is None:
        raise ValueError("This model has no tokenizer: give tokens instead of texts.")
    return model.tokenizer
