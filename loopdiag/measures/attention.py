"""What attention does, loop by loop."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loopdiag.measures.reduce import at_least_float32
from loopdiag.trace import LoopTrace


def gate_mean(trace: LoopTrace) -> Float[Tensor, "document loop layer head"]:
    """Mean weight of the global branch over a document's tokens; 0 to 1, NaN where a loop has no gate.

    Raises:
        ValueError: The model has no gates.

    Source: arXiv 2606.18023, gate.
    """
    if trace.gate is None:
        raise ValueError("gate_mean: this model has no gated attention, so there is no gate to average.")
    real = trace.mask[None, None, :, :, None]
    total = torch.where(real, at_least_float32(trace.gate), 0.0).sum(3)
    return (total / trace.mask.sum(1)[:, None]).permute(2, 0, 1, 3)
