"""From per-token values to one number per document."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def over_tokens(
    values: Float[Tensor, "loop document pos"], kept: Bool[Tensor, "*loop document pos"]
) -> Float[Tensor, "document loop"]:
    """Mean over the kept tokens of each document; NaN for a document without any."""
    return torch.where(kept, values, 0.0).sum(-1).div(kept.sum(-1)).T


def undefined(like: Float[Tensor, "loop document pos"], loops: int) -> Float[Tensor, "loops document pos"]:
    """NaN for the first loops, where a measure needs more history than there is."""
    return like.new_full((loops, *like.shape[1:]), float("nan"))
