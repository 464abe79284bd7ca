"""States on their way from loop to loop: the first one, and the shift of the carry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loopdiag.model.config import LoopedConfig

State = Float[Tensor, "batch pos d_model"]

# Positions drawn at a time. Another number is another draw for every seed.
BLOCK = 64


def random_state(cfg: LoopedConfig, positions: Int[Tensor, "#batch pos"], seed: int) -> State:
    """The random state that the loops of some families start from, in float32.

    Normal with `cfg.initial_std`, cut at three standard deviations. Every document has the same draw at the same
    position, so that neither padding, nor the rest of a batch, nor later tokens change what a token starts from.

    Raises:
        ValueError: `seed` is out of range.

    Source: arXiv 2502.05171.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed!r} is not allowed: it must be an integer from 0 to 2**32 - 1.")
    first, last = int(positions.min()) // BLOCK, int(positions.max()) // BLOCK
    drawn = []
    for block in range(first, last + 1):
        # On the CPU, so that a seed means the same state on every device.
        generator = torch.Generator().manual_seed((seed << 20) + block)
        rows = torch.empty(BLOCK, cfg.d_model)
        std = cfg.initial_std
        drawn.append(nn.init.trunc_normal_(rows, std=std, a=-3 * std, b=3 * std, generator=generator))
    return torch.cat(drawn).to(positions.device)[positions - first * BLOCK]


def shift(
    carry: State, offset: int, real: Bool[Tensor, "batch pos"] | None = None, before: State | None = None
) -> State:
    """`carry` moved `offset` tokens to the right within each document.

    Args:
        carry: [batch, pos, d_model].
        offset: Tokens, >= 0.
        real: False on padding; None when there is none.
        before: The last `offset` states of the tokens that go before; zeros, as at a document's start, when None.
    """
    if offset == 0:
        return carry
    if real is not None:
        carry = carry.masked_fill(~real.unsqueeze(-1), 0)
    joined = F.pad(carry, (0, 0, offset, 0)) if before is None else torch.cat((before, carry), dim=1)
    return joined[:, : carry.shape[1]]
