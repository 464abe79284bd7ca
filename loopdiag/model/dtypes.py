"""What models are stored in and run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loopdiag.errors import InputError

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
# How safetensors files name them.
STORED = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """`"bfloat16"` to `torch.bfloat16`; None is float32.

    Raises:
        InputError: Not a floating type that models run in.
    """
    if dtype is None:
        return torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise InputError(f"dtype {dtype!r} is not allowed: use {', '.join(DTYPES)}.")
    return chosen


@contextmanager
def higher_precision(model: nn.Module) -> Iterator[None]:
    """The model with the same weights in the next higher precision: half as float32, anything else as float64.

    Afterwards every weight is what it was, to the bit. Takes the memory of the weights in the higher precision.
    """
    kept = [(weight, weight.dtype) for weight in model.parameters()]
    try:
        for weight, dtype in kept:
            weight.data = weight.data.to(torch.float32 if dtype.itemsize == 2 else torch.float64)
        yield
    finally:
        for weight, dtype in kept:
            weight.data = weight.data.to(dtype)
