"""When a model with an exit gate would stop looping by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class EarlyExit:
    """What a model gives when its gate says, token by token, after which loop to leave.

    Attributes:
        logits: Of the loop that each token leaves after [batch, pos, vocab].
        loop: That loop, from 1 [batch, pos].
        probabilities: Of leaving after each loop [batch, pos, loop]; they sum to 1.
    """

    logits: Float[Tensor, "batch pos vocab"]
    loop: Int[Tensor, "batch pos"]
    probabilities: Float[Tensor, "batch pos loop"]


def exit_probabilities(leave: Float[Tensor, "*batch loop"]) -> Float[Tensor, "*batch loop"]:
    """Probability of leaving after each loop, from that of leaving once there.

    p_r = leave_r * prod_{j<r} (1 - leave_j), and the last loop takes what is left. 0 to 1, summing to 1.

    Source: arXiv 2510.25741.
    """
    stay = torch.cat((torch.ones_like(leave[..., :1]), (1 - leave[..., :-1]).cumprod(-1)), dim=-1)
    return torch.cat((leave[..., :-1], torch.ones_like(leave[..., :1])), dim=-1) * stay


def exit_loop(probabilities: Float[Tensor, "*batch loop"], threshold: float) -> Int[Tensor, "*batch"]:
    """The first loop, from 1, at which the cumulative probability reaches `threshold`; the last where none does.

    Source: arXiv 2510.25741.
    """
    reached = probabilities.cumsum(-1) >= threshold
    reached[..., -1] = True
    return reached.int().argmax(-1) + 1
