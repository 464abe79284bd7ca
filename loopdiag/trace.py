"""What one batch left behind, loop by loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from loopdiag.corpus import Batch
    from loopdiag.model.decoder import LoopedLM

States = Float[Tensor, "loop document pos d_model"]


@dataclass(frozen=True)
class LoopTrace:
    """Hidden states of one batch at every loop boundary.

    The first axis of the states is the loop, 0..R; 0 is the embedding E, for which all three states start.

    Attributes:
        input_ids: Tokens [document, pos]; None where only states are known, which measures of the prediction refuse.
        mask: True on real tokens [document, pos].
        raw: Y_r, the output of the last layer; Y_0 = E.
        carry: Z_r, what loop r hands to the next loop before the offset; Z_0 = E.
        readout: N(Y_r), what a head reads after loop r; N(E) at 0.
        offset: Cross-loop position offset of the model, in tokens.
        norm: The model's final norm, Y to N(Y).
        head: N(Y) to logits; None where there is no head.
        gate: Weight of the global attention branch [loop, layer, document, pos, head], NaN where a
            loop has none; None where none has.
    """

    input_ids: Int[Tensor, "document pos"] | None
    mask: Bool[Tensor, "document pos"]
    raw: States
    carry: States
    readout: States
    offset: int
    norm: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None
    gate: Float[Tensor, "loop layer document pos head"] | None = None

    def __repr__(self) -> str:
        documents, pos, d_model = self.raw.shape[1:]
        return f"LoopTrace of {self.n_loops} loops: {documents} documents of up to {pos} tokens, width {d_model}"

    @property
    def n_loops(self) -> int:
        """R, the loops that were run."""
        return len(self.raw) - 1

    @property
    def predicts(self) -> Bool[Tensor, "document pos"]:
        """True on the real tokens that have a real next token."""
        following = torch.zeros_like(self.mask)
        following[:, :-1] = self.mask[:, 1:]
        return self.mask & following

    @classmethod
    def from_states(
        cls,
        states: States,
        *,
        input_ids: Int[Tensor, "document pos"] | None = None,
        mask: Bool[Tensor, "document pos"] | None = None,
        carry: States | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        offset: int = 0,
    ) -> LoopTrace:
        """A trace of a model that is not ours.

        Args:
            states: Y, the state after each loop [loop, document, pos, d_model]; index 0 is the embedding.
            input_ids: Tokens; needed by measures of the prediction.
            mask: True on real tokens; all True when None.
            carry: Z, when it differs from Y.
            norm: Final norm; the identity when None.
            head: N(Y) to logits.
            offset: Cross-loop position offset in tokens.

        Raises:
            ValueError: States that are no tensor, a negative offset, shapes that do not belong together, or fewer than
                two states.
        """
        if not isinstance(offset, int) or offset < 0:
            raise ValueError(f"offset = {offset!r} is not allowed: it must be an integer >= 0.")
        if not isinstance(states, Tensor):
            raise ValueError(f"states is a {type(states).__name__}: it must be a torch tensor.")
        if states.ndim != 4 or len(states) < 2:
            raise ValueError(
                f"states has shape {tuple(states.shape)}: it must be [loop, document, pos, d_model] with the embedding "
                "and at least one loop."
            )
        documents, pos = states.shape[1:3]
        if mask is None:
            mask = torch.ones(documents, pos, dtype=torch.bool, device=states.device)
        carry = states if carry is None else carry
        for name, given, wanted in (
            ("mask", mask, states.shape[1:3]),
            ("input_ids", mask if input_ids is None else input_ids, states.shape[1:3]),
            ("carry", carry, states.shape),
        ):
            if given.shape != wanted:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}: with these states it must be {tuple(wanted)}."
                )
        norm = norm or torch.nn.Identity()
        return cls(input_ids, mask.bool(), states, carry, norm(states), offset, norm, head)


@torch.no_grad()
def record(model: LoopedLM, batch: Batch, n_loops: int | None = None) -> LoopTrace:
    """Run a model on a batch and keep what left each loop.

    Args:
        model: The model.
        batch: Padded tokens with their mask.
        n_loops: Loops to run; the trained number when None.

    Raises:
        ValueError: `n_loops` below 1.
    """
    n_loops = model.cfg.n_loops if n_loops is None else n_loops
    model.ensure_loops(n_loops)
    device = model.embed.weight.device
    input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device).bool()
    gated = [loop for loop in range(2, n_loops + 1) if model.cfg.memory == "first"]
    layers = range(model.cfg.n_layers)
    names = {"hook_embed"} | {
        f"loops.{loop}.{point}"
        for loop in range(1, n_loops + 1)
        for point in ("hook_out_pre_norm", "hook_out", "hook_readout")
    }
    names |= {f"loops.{loop}.blocks.{layer}.attn.hook_gate" for loop in gated for layer in layers}
    _, kept = model.run_with_cache(input_ids, mask, n_loops=n_loops, names_filter=list(names))
    embedding = kept["hook_embed"]

    def states(point: str, first: Tensor) -> Tensor:
        return torch.stack([first, *(kept[f"loops.{loop}.{point}"] for loop in range(1, n_loops + 1))])

    gate = None
    if gated:
        gate = embedding.new_full((n_loops + 1, len(layers), *mask.shape, model.cfg.n_heads), float("nan"))
        for loop in gated:
            for layer in layers:
                gate[loop, layer] = kept[f"loops.{loop}.blocks.{layer}.attn.hook_gate"]
    return LoopTrace(
        input_ids=input_ids,
        mask=mask,
        raw=states("hook_out_pre_norm", embedding),
        carry=states("hook_out", embedding),
        readout=states("hook_readout", model.ln_final(embedding)),
        offset=model.cfg.offset,
        norm=model.ln_final,
        head=model.unembed,
        gate=gate,
    )
