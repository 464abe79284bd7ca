"""Decoding as Parallel Loop Transformers are made for it: all loops of a token side by side, in one pass.

Loop r of a token starts from its embedding and from loop r - 1 of the token `offset` places before. So when a token
comes, none of its loops waits for another, but for the keys and values of loop 1, which each layer makes first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopdiag.errors import InputError
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.layers import Attention, KeyValue, Layer, Layout, rotate
from loopdiag.model.past import Past
from loopdiag.model.states import State


class ParallelLoops:
    """Runs the next tokens of texts whose beginning left a `Past`, one pass of the layers for all loops of a token.

    The numbers are those of running loop after loop, to rounding. Hook points do not fire.

    Args:
        model: The model.
        past: Of the texts so far; it is copied, and not kept up to date.
        n_loops: Loops to run, as in the run that made the past.
        longest: Tokens of the longest text to come; memory for them is taken at once.

    Raises:
        InputError: The model cannot be run so, see `check_parallel`; the past is of no text, of another number of
            loops, or as long as `longest`.
        ValueError: `longest` is beyond the rotations that the model stores.

    Source: arXiv 2510.24824.
    """

    def __init__(self, model: LoopedLM, past: Past, n_loops: int, longest: int) -> None:
        check_parallel(model)
        if not past.seen:
            raise InputError("The parallel schedule goes on from a past, and this one is of no text: run the prompt.")
        if longest <= past.seen:
            raise InputError(f"longest = {longest} leaves no room after the {past.seen} tokens of the past: give more.")
        if n_loops != past.n_loops:
            raise InputError(
                f"n_loops = {n_loops}, and the past is of a run with {past.n_loops}: give the same number."
            )
        model.check_length(longest)
        cfg = model.cfg
        self.model, self.seen, self.longest = model, past.seen, longest
        shared, later = cfg.memory == "first", range(2, n_loops + 1)
        remembered = (1,) if shared else (1, *later)
        self.memory = [
            _Store([past.kept((turn, layer)) for turn in remembered], longest) for layer in range(cfg.n_layers)
        ]
        self.windows = [
            _Store([past.kept((turn, layer)) for turn in later], min(cfg.window, longest), past.seen)
            if shared and later
            else None
            for layer in range(cfg.n_layers)
        ]
        # What loops 2.. start from, [text, loop, token, d_model], the oldest token first.
        self.carries = torch.stack([past.carried(turn) for turn in later], dim=1) if later else None

    @torch.no_grad()
    def step(self, input_ids: Int[Tensor, "batch 1"]) -> Float[Tensor, "batch vocab"]:
        """Run one token of each text; the logits of what follows.

        Raises:
            InputError: The text is as long as `longest`.
        """
        model = self.model
        if self.seen == self.longest:
            raise InputError(f"The text has its {self.longest} tokens: start with a larger `longest`.")
        layout = Layout.of(model.cfg, input_ids, None, model.embed.weight.dtype, model.rope_table, self.seen)
        start = model.embedded(input_ids)
        x = start
        if self.carries is not None:
            arriving = self.carries[:, :, 0]
            x = torch.cat((start, model.injected(start.expand_as(arriving), arriving)), dim=1)  # [text, loop, d_model]
        for layer, block in enumerate(model.blocks):
            # A ModuleList does not know of what kind its modules are.
            x = self._layer(block, x, layout, layer)  # type: ignore[arg-type]
        if self.carries is not None:
            handed = x[:, :-1]
            handed = model.ln_final(handed) if model.cfg.norm_between_loops else handed
            self.carries = torch.cat((self.carries[:, :, 1:], handed.unsqueeze(2)), dim=2)
        self.seen += 1
        return model.unembed(model.ln_final(x[:, -1]))

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept, room for tokens to come included."""
        stores = [store for store in (*self.memory, *self.windows) if store is not None]
        tensors = [x for store in stores for x in (store.k, store.v)]
        tensors += [] if self.carries is None else [self.carries]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _layer(self, block: Layer, x: State, layout: Layout, layer: int) -> State:
        x = block.add(x, self._attention(block.attn, block.ln1(x), x, layout, layer), block.ln1_post)
        return block.add(x, block.mlp(block.ln2(x)), block.ln2_post)

    def _attention(self, attention: Attention, normed: State, resid_pre: State, layout: Layout, layer: int) -> State:
        q, k, v = (
            project(normed).unflatten(-1, (-1, attention.d_head))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # [text, loop, head, d_head]
        q, k = (rotate(x, layout, attention.rope_pairs) for x in (q, k))
        memory, windows = self.memory[layer], self.windows[layer]
        if windows is None:
            z = memory.attended(q, k, v)
        else:
            everywhere = memory.attended(q, k[:, :1], v[:, :1])
            nearby = windows.attended(q[:, 1:], k[:, 1:], v[:, 1:])
            gate = attention.gate(resid_pre[:, 1:], q[:, 1:]).unsqueeze(-1)
            z = torch.cat((everywhere[:, :1], gate * everywhere[:, 1:] + (1 - gate) * nearby), dim=1)
        return attention.o_proj(z.flatten(-2))


class _Store:
    """Keys and values of one layer, with room for tokens to come: of each text, or of each text and loop apart.

    When it is full the next token takes the place of the oldest; attention does not mind the order.

    Args:
        kept: Of each loop, what a past keeps: [text, token, head, d_head].
        room: Tokens that fit in.
        seen: Tokens that went before, where the past keeps only the last of them; what it keeps is all when None.
    """

    def __init__(self, kept: list[KeyValue], room: int, seen: int | None = None) -> None:
        self.loops = len(kept)
        tokens = kept[0][0].shape[1]
        self.seen = tokens if seen is None else seen
        slots = torch.arange(self.seen - tokens, self.seen, device=kept[0][0].device) % room
        self.k, self.v = (
            self._roomy(torch.stack(each, dim=1).flatten(0, 1), room, slots) for each in zip(*kept, strict=True)
        )

    @staticmethod
    def _roomy(old: Tensor, room: int, slots: Tensor) -> Float[Tensor, "row head token d_head"]:
        rows, _, heads, d_head = old.shape
        roomy = old.new_zeros(rows, heads, room, d_head)
        roomy[:, :, slots] = old.transpose(1, 2)
        return roomy

    def attended(
        self,
        q: Float[Tensor, "text query head d_head"],
        k: Float[Tensor, "text loop kv_head d_head"],
        v: Float[Tensor, "text loop kv_head d_head"],
    ) -> Float[Tensor, "text query head d_head"]:
        """Take in the next token's keys and values, and attend to all that is there.

        With one loop's, all queries attend to them; else each to its own loop's.
        """
        room, queries = self.k.shape[2], q.shape[1] // self.loops
        for kept, new in ((self.k, k), (self.v, v)):
            kept[:, :, self.seen % room] = new.flatten(0, 1)
        self.seen += 1
        there = min(self.seen, room)
        q = q.unflatten(1, (self.loops, queries)).flatten(0, 1).transpose(1, 2)  # [row, head, query, d_head]
        z = F.scaled_dot_product_attention(q, self.k[:, :, :there], self.v[:, :, :there], enable_gqa=True)
        return z.transpose(1, 2).unflatten(0, (-1, self.loops)).flatten(1, 2)


def check_parallel(model: LoopedLM) -> None:
    """Refuse a model that cannot be run so.

    Raises:
        InputError: It has no offset, other layers than the looped ones, a random initial state, interventions, hooks,
            or layers on several devices.
    """
    cfg = model.cfg
    hooked = next((name for name, point in model.hook_dict.items() if point.has_hooks()), None)
    for wrong, why in (
        (not cfg.offset, "without an offset each loop waits for the same token's loop before"),
        (cfg.n_prelude or cfg.n_coda, "the model has layers before or after its loops"),
        (cfg.initial_state != "embedding", "its loops start from a random state"),
        (model.wiring.ongoing, "interventions are going on"),
        (len({weight.device for weight in model.parameters()}) > 1, "its layers stand on several devices"),
        (hooked, f"{hooked} has hooks, and none fires in it"),
    ):
        if wrong:
            raise InputError(f"The parallel schedule is not for this run: {why}. Use the sequential one.")
