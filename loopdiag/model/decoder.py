"""The looped decoder: embed, loops over one shared block, readout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import _GeneratorContextManager
from numbers import Integral
from os import PathLike
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from loopdiag.model.cache import LoopCache
from loopdiag.model.config import LoopedConfig
from loopdiag.model.exit_gate import EarlyExit, exit_loop, exit_probabilities
from loopdiag.model.layers import CodaHooks, Gate, KeyValue, Layer, Layout, LoopHooks, PreludeHooks, RopeTable
from loopdiag.model.past import Past
from loopdiag.model.states import State, random_state, shift
from loopdiag.model.wiring import Wiring

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


class LoopedLM(HookedRootModule):
    """A looped language model with hook points by loop.

    Weights stand once, under `blocks.{layer}`; hook points once per loop, under `loops.{loop}`, loops
    numbered from 1. E is the embedding, after the prelude where there is one. Loop 1 passes E through the
    layers; loop r >= 2 passes B_r = a*E + b*S_r (see `LoopedConfig.injection`), S_r = shift(Z_{r-1}) being the carry
    as it enters the loop: `loops.{r}.hook_carry`. Models with a random initial state Z_0 pass B_1, made alike. Three
    states leave a loop:

    - Y_r, the raw output of the last layer: `loops.{r}.hook_out_pre_norm`;
    - Z_r, what is handed on: `loops.{r}.hook_out`, which is N(Y_r) in the last loop before the head, and in every
      loop of a model that normalises between loops, else Y_r;
    - what the head reads when the run stops after loop r: `loops.{r}.hook_readout`. It is N(Y_r), or with a
      coda N(coda(Z_r)).

    Hooks of prelude and coda have no loop number; those of the coda fire on the way to the run's own logits only.
    Attention patterns, exit gates, and the readouts of loops before the last are computed only when hooked.

    Attributes:
        cfg: The configuration.
        tokenizer: The tokenizer that the model was trained with, or None for a model made from a
            configuration alone.
        stop_tokens: Tokens that end a generated text.
        source: Name, folder or hub id that it was loaded from.
        wiring: What single loops do otherwise than `cfg` says; see `loopdiag.interventions`.
        layout: While a run is going on, where its tokens stand and which are real, for hooks that must know; else None.
        on_growth: Called with the number of every loop that gets hook points later.

    Source: arXiv 2510.24824 (Parallel Loop Transformers), arXiv 2606.18023 (LoopCoder-v2), 2502.05171 (Huginn),
    2510.25741 (Ouro).
    """

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer: Any = None
        self.stop_tokens: tuple[int, ...] = ()
        self.source = "a model made here"
        self.wiring = Wiring()
        self.layout: Layout | None = None
        self.on_growth: list[Callable[[int], None]] = []
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.hook_embed = HookPoint()
        self.rope_table = RopeTable(cfg) if cfg.rope_table else None
        if cfg.n_prelude:
            self.prelude_blocks = nn.ModuleList(Layer(cfg, looped=False) for _ in range(cfg.n_prelude))
            self.prelude = PreludeHooks(cfg)
        if cfg.initial_state == "random":
            self.hook_initial_state = HookPoint()
        if cfg.injection == "concat":
            self.adapter = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.blocks = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        if cfg.n_coda:
            self.coda_blocks = nn.ModuleList(Layer(cfg, looped=False) for _ in range(cfg.n_coda))
            self.coda = CodaHooks(cfg)
            # For exits before the last; in a tuple, so that its hook points are not found.
            self._silent_coda = (CodaHooks(cfg),)
        self.ln_final = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        if cfg.exit_gate:
            self.exit_gate = nn.Linear(cfg.d_model, 1)
        if not cfg.tie_embeddings:
            self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.loops = nn.ModuleDict()
        self.ensure_loops(cfg.n_loops)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights for training from scratch, the same for every loop count.

        Matrices are normal with standard deviation 1/sqrt(inputs), those that write to the residual stream
        smaller by sqrt(2 n_layers). Embeddings have 0.05, so that the carry, of unit scale times
        `carry_scale`, does not drown the token in loops >= 2.
        """
        generator = torch.Generator().manual_seed(seed)
        into_stream = (2 * self.cfg.n_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Gate):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear | nn.Embedding):
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
                std = 0.05
                if isinstance(module, nn.Linear) and name != "head":
                    std = module.in_features**-0.5 * (into_stream if name.endswith(("o_proj", "down_proj")) else 1.0)
                # Drawn on the CPU, so that a seed means the same weights on every device.
                module.weight.copy_(std * torch.randn(module.weight.shape, generator=generator))
        if self.rope_table is not None:
            self.rope_table.fill(self.cfg)

    def ensure_loops(self, n_loops: int) -> None:
        """Grow the hook points to `n_loops` loops; more than trained is allowed.

        Raises:
            ValueError: `n_loops` is not an integer >= 1.
        """
        if isinstance(n_loops, bool) or not isinstance(n_loops, Integral) or n_loops < 1:
            raise ValueError(
                f"n_loops = {n_loops!r} is not allowed: it must be an integer >= 1 "
                f"(this model was trained with {self.cfg.n_loops})."
            )
        new = range(len(self.loops) + 1, n_loops + 1)
        for loop in new:
            self.loops[str(loop)] = LoopHooks(self.cfg, loop).train(self.training)
        if new:
            self.setup()
        for loop in new:
            for tell in self.on_growth:
                tell(loop)

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        n_loops: int | None = None,
        return_type: Literal["logits", "last", "loss"] = "logits",
        *,
        initial_state: State | None = None,
        seed: int = 0,
        past: Past | None = None,
    ) -> Tensor:
        """Run the model.

        Args:
            input_ids: Tokens.
            attention_mask: 1 or True on tokens, 0 or False on padding, left or right. A padded document gets the
                numbers that it gets alone.
            n_loops: Loops to run; the trained number when None. An exit gate has no say in it: see `early_exit`.
            return_type: `"logits"`: [batch, pos, vocab], meaningless on padding. `"last"`: those of the last position
                alone [batch, vocab]. `"loss"`: mean negative log likelihood of the real next tokens, in nats.
            initial_state: Z_0 of a model with a random initial state; drawn from `seed` when None.
            seed: Of that draw.
            past: What earlier tokens of the same texts left behind; this run's are added to it.

        Raises:
            ValueError: `input_ids` of the wrong shape or beyond the vocabulary, a mask of another shape or
                with a hole in a row, `n_loops` below 1, an unknown `return_type`, an initial state of another
                shape or of a model that has none, a past of other texts or loops, an order of
                loops that does not fit, or tokens beyond a stored RoPE table.
        """
        if return_type not in ("logits", "last", "loss"):
            raise ValueError(f"return_type = {return_type!r} is not allowed: use 'logits', 'last' or 'loss'.")
        n_loops = self.cfg.n_loops if n_loops is None else n_loops
        self.ensure_loops(n_loops)
        mask = self._checked(input_ids, attention_mask)
        if return_type == "loss" and input_ids.shape[1] < 2:
            raise ValueError("return_type='loss' needs at least 2 tokens, one to predict from and one to predict.")
        if past is not None and mask is not None:
            raise ValueError("past goes with texts of one length: attention_mask must be all 1, or left out.")
        order = self._order(n_loops)
        seen = 0 if past is None else past.seen
        self.check_length(seen + input_ids.shape[1])
        outer = self.layout  # of a run whose hook runs the model again
        self.layout = Layout.of(self.cfg, input_ids, mask, self.embed.weight.dtype, self.rope_table, seen)
        try:
            # torch.compile does not notice hooks that come or go, so that compiled code would pass over them.
            run = torch.compiler.disable(self._run) if self.wiring.ongoing else self._run
            readout = run(input_ids, order, self.layout, past, initial_state, seed)
        finally:
            self.layout = outer
        if past is not None:
            past.end(input_ids.shape[1])
        if return_type == "last":
            return self.unembed(readout[:, -1])
        logits = self.unembed(readout)
        return logits if return_type == "logits" else next_token_loss(logits, input_ids, mask)

    def offset_into(self, loop: int) -> int:
        """Tokens by which the carry is shifted on its way into `loop`."""
        return self.wiring.offsets.get(loop, self.cfg.offset)

    def generate(self, input_ids: Int[Tensor, "batch pos"], max_new_tokens: int, **settings: Any) -> Tensor:
        """Go on with texts, token by token; see `loopdiag.model.generation.generate`."""
        from loopdiag.model.generation import generate

        return generate(self, input_ids, max_new_tokens, **settings)

    def save(self, folder: str | PathLike[str], dtype: torch.dtype | str | None = None) -> None:
        """Write a folder that `loopdiag.load` reads; see `loopdiag.model.saving.save`."""
        from loopdiag.model.saving import save

        save(self, folder, dtype)

    def unembed(self, readout: State) -> Float[Tensor, "batch pos vocab"]:
        """Logits of what the head reads: through the head, or the embedding matrix when the two are tied."""
        return F.linear(readout, self.embed.weight if self.cfg.tie_embeddings else self.head.weight)

    @torch.no_grad()
    def coda_out(self, handed: State, attention_mask: Tensor | None = None) -> State:
        """Raw output of the coda when the loops hand over `handed`; the final norm of it is what the head reads.

        Raises:
            ValueError: The model has no coda.
        """
        if not self.cfg.n_coda:
            raise ValueError("coda_out: this model has no coda; its head reads ln_final of the last state.")
        self.check_length(handed.shape[1])
        places = handed.new_zeros(handed.shape[:2], dtype=torch.long)
        layout = Layout.of(self.cfg, places, self._checked(places, attention_mask), handed.dtype, self.rope_table)
        return self._coda(handed, layout, self._silent_coda[0])

    @torch.no_grad()
    def early_exit(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        threshold: float | None = None,
        n_loops: int | None = None,
    ) -> EarlyExit:
        """What the model gives when its exit gate decides, token by token, after which loop to leave.

        All loops are run, as in the released code; the gate chooses whose logits count.

        Args:
            input_ids, attention_mask: As for the model itself.
            threshold: Cumulative probability at which to leave; the configuration's when None.
            n_loops: Loops to run at most; the trained number when None.

        Raises:
            ValueError: The model has no exit gate, `threshold` is not above 0, or the order of loops is changed.
        """
        if not self.cfg.exit_gate:
            raise ValueError("early_exit: this model has no exit gate; model(ids, n_loops=r) stops after loop r.")
        threshold = self.cfg.exit_threshold if threshold is None else threshold
        if not threshold > 0:
            raise ValueError(
                f"threshold = {threshold} is not allowed: it must be a number > 0; from 1 on, none leaves early."
            )
        if self.wiring.order is not None:
            raise ValueError(
                "early_exit: loops are skipped, repeated or swapped, so exits have no order to choose from."
            )
        n_loops = self.cfg.n_loops if n_loops is None else n_loops
        self.ensure_loops(n_loops)
        points = [
            f"loops.{loop}.{point}" for loop in range(1, n_loops + 1) for point in ("hook_exit_gate", "hook_readout")
        ]
        _, kept = self.run_with_cache(input_ids, attention_mask, n_loops=n_loops, names_filter=points)
        leave, readouts = (torch.stack([kept[name] for name in points[first::2]], dim=2) for first in (0, 1))
        probabilities = exit_probabilities(leave)
        loop = exit_loop(probabilities, threshold)
        chosen = readouts.gather(2, (loop - 1)[:, :, None, None].expand(-1, -1, 1, readouts.shape[3])).squeeze(2)
        return EarlyExit(self.unembed(chosen), loop, probabilities)

    def _order(self, n_loops: int) -> tuple[int, ...]:
        """The loops to pass, by name."""
        loops = tuple(range(1, n_loops + 1))
        if self.wiring.order is None:
            return loops
        order = tuple(self.wiring.order(loops))
        # Loop 1 starts from E, or makes what later loops remember.
        bound = self.cfg.initial_state == "embedding" or self.cfg.memory == "first"
        if not order or not set(order) <= set(loops) or (bound and (order[0] != 1 or 1 in order[1:])):
            first = ", loop 1 first and only once" if bound else ""
            raise ValueError(f"The order of loops {order} is not allowed: it must be of loops 1 to {n_loops}{first}.")
        return order

    def _run(
        self,
        input_ids: Tensor,
        order: tuple[int, ...],
        layout: Layout,
        past: Past | None,
        initial_state: State | None,
        seed: int,
    ) -> State:
        """What the head reads after the loops of `order`.

        What a past keeps goes by the turn of a pass, which differs from the loop's name where the order is changed.
        """
        embedding = self.hook_embed(self.embedded(input_ids))
        carry = self._initial(embedding, layout, initial_state, seed)
        if past is not None:
            # Only now, when nothing else can be wrong with this run: a run that fails half-way spoils its past.
            turns = enumerate(order[:-1], start=1)
            exits = [turn for turn, loop in turns if self.cfg.n_coda and self._hooks(loop).reads_out()]
            past.begin(len(input_ids), len(order), exits, self._memorable(order))
        start = self._prelude(embedding, layout, past)
        memory: list[KeyValue | None] = [None] * self.cfg.n_layers
        for turn, loop in enumerate(order, start=1):
            hooks = self._hooks(loop)
            # A copy: hooks that edit in place must not reach the E that later loops inject.
            x = start.clone() if carry is None else self._inject(start, carry, layout, past, loop, turn)
            x = hooks.hook_in(x)
            for layer, block in enumerate(self.blocks):
                shared = memory[layer]
                extend = None
                if past is not None:
                    extend = past.extend((turn, layer), None if shared is None else self.cfg.window - 1)
                own = shared is not None and self.wiring.remembers_itself(loop)
                x, made = block(x, layout, hooks.blocks[layer], "own" if own else shared, extend)
                if turn == 1 and self.cfg.memory == "first":
                    memory[layer] = made
            raw = hooks.hook_out_pre_norm(x)
            if self.cfg.exit_gate and hooks.hook_exit_gate.has_hooks():
                hooks.hook_exit_gate(torch.sigmoid(self.exit_gate(self.ln_final(raw))).squeeze(-1))
            last = turn == len(order)
            handed = self.ln_final(raw) if self.cfg.norm_between_loops or (last and not self.cfg.n_coda) else raw
            if not last and hooks.reads_out():
                self._exit(handed if self.cfg.n_coda else self.ln_final(raw), loop, turn, layout, past, silent=True)
            carry = handed = hooks.hook_out(handed)
        return self._exit(handed, loop, turn, layout, past)

    def _memorable(self, order: tuple[int, ...]) -> tuple:
        """The wiring that all runs of one past must share."""
        if self.cfg.memory == "first" and any(self.wiring.remembers_itself(loop) for loop in order[1:]):
            raise ValueError(
                "own_memory does not go with a past, which keeps no more than the window of later loops: "
                "run the whole text at once."
            )
        return order, self.cfg.window, tuple(self.offset_into(loop) for loop in order)

    def embedded(self, input_ids: Tensor) -> State:
        """Token embeddings, as the model scales them."""
        if input_ids.is_cuda and not torch.compiler.is_compiling():
            # There, a wrong index would take the whole device down instead of raising.
            low, high = (int(end) for end in input_ids.aminmax())
            if low < 0 or high >= self.cfg.vocab_size:
                raise ValueError(self._beyond(low, high))
        try:
            return self.cfg.embed_multiplier * self.embed(input_ids)
        except IndexError:
            raise ValueError(self._beyond(int(input_ids.min()), int(input_ids.max()))) from None

    def _beyond(self, low: int, high: int) -> str:
        return f"input_ids run from {low} to {high}: tokens of this model are 0 to {self.cfg.vocab_size - 1}."

    def _prelude(self, embedding: State, layout: Layout, past: Past | None) -> State:
        """E, where the loops start."""
        if not self.cfg.n_prelude:
            return embedding
        x = embedding
        for layer, block in enumerate(self.prelude_blocks):
            extend = None if past is None else past.extend(("prelude", layer))
            x, _ = block(x, layout, self.prelude.blocks[layer], extend=extend)
        return self.prelude.hook_out(x)

    def _coda(self, handed: State, layout: Layout, hooks: CodaHooks, past: Past | None = None, turn: int = 0) -> State:
        x = hooks.hook_in(self.ln_final(handed) if self.cfg.norm_before_coda else handed)
        for layer, block in enumerate(self.coda_blocks):
            extend = None if past is None else past.extend(("coda", turn, layer))
            x, _ = block(x, layout, hooks.blocks[layer], extend=extend)
        return x

    def _exit(
        self, state: State, loop: int, turn: int, layout: Layout, past: Past | None, silent: bool = False
    ) -> State:
        """What the head reads after `loop`; `state` is what the coda reads, or without one N(Y)."""
        hooks = self._hooks(loop)
        if self.cfg.n_coda:
            coda = self._silent_coda[0] if silent else self.coda
            state = self.ln_final(hooks.hook_coda_out(self._coda(state, layout, coda, past, turn)))
        return hooks.hook_readout(state)

    def _initial(self, embedding: State, layout: Layout, given: State | None, seed: int) -> State | None:
        """Z_0, or None where loop 1 starts from E."""
        if self.cfg.initial_state == "embedding":
            if given is not None:
                raise ValueError("initial_state was given, but this model starts from its embedding.")
            return None
        if given is None:
            given = random_state(self.cfg, layout.positions, seed).expand_as(embedding)
        elif given.shape != embedding.shape:
            raise ValueError(f"initial_state has shape {tuple(given.shape)}: it must be {tuple(embedding.shape)}.")
        # A copy: hooks that edit in place must not reach the caller's tensor.
        return self.hook_initial_state(given.to(embedding).clone())

    def _inject(self, start: State, carry: State, layout: Layout, past: Past | None, loop: int, turn: int) -> State:
        """B of the loop that takes over `carry`."""
        offset = self.offset_into(loop)
        before = None if past is None or not offset else past.before(turn, carry, offset)
        return self.injected(start, self._hooks(loop).hook_carry(shift(carry, offset, layout.real, before)))

    def injected(self, start: State, shifted: State) -> State:
        """B, made of E and the carry as it enters the loop."""
        if self.cfg.injection == "none":
            return shifted
        if self.cfg.injection == "concat":
            return self.adapter(torch.cat((shifted, start), dim=-1))
        return self.cfg.embed_scale * start + self.cfg.carry_scale * shifted

    def check_length(self, tokens: int) -> None:
        if self.rope_table is not None and tokens > self.cfg.n_ctx:
            raise ValueError(f"{tokens} tokens are more than this model's table of rotations has: {self.cfg.n_ctx}.")

    def _hooks(self, loop: int) -> LoopHooks:
        # A ModuleDict does not know of what kind its modules are.
        return self.loops[str(loop)]  # type: ignore[return-value]

    def _checked(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask as booleans, or None when nothing is padded."""
        if not isinstance(input_ids, Tensor):
            raise ValueError(
                f"input_ids is a {type(input_ids).__name__}: it must be a tensor [batch, pos]. For text, "
                "torch.tensor([model.tokenizer(text)['input_ids']])."
            )
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64) or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}: it must be a non-empty "
                "int64 or int32 tensor [batch, pos]."
            )
        if attention_mask is None:
            return None
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: it must be that of input_ids, "
                f"{tuple(input_ids.shape)}."
            )
        if attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask has dtype {attention_mask.dtype}: it must be boolean or integer, 1 on tokens and 0 "
                "on padding (additive masks mean the opposite)."
            )
        mask = attention_mask.bool()
        if mask.all():
            return None
        if not _one_run(mask):
            raise ValueError(
                "attention_mask has a hole: the tokens of a row must stand together, padding left or right."
            )
        return mask

    # -- hooks by name ------------------------------------------------------------------------------

    def hooks(
        self,
        fwd_hooks: list[tuple[str | Callable, Callable]] = [],  # noqa: B006 (TransformerLens' signature)
        bwd_hooks: list[tuple[str | Callable, Callable]] = [],  # noqa: B006
        *args: Any,
        **kwargs: Any,
    ) -> _GeneratorContextManager:
        """As in TransformerLens; a name that is no hook point raises a KeyError that says the range."""
        self._check_names(name for name, _ in (*fwd_hooks, *bwd_hooks) if isinstance(name, str))
        return super().hooks(fwd_hooks, bwd_hooks, *args, **kwargs)

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; a name that is no hook point raises a KeyError that says the range."""
        if isinstance(name, str):
            self._check_names([name])
        super().add_hook(name, *args, **kwargs)

    def run_with_hooks(self, *model_args: Any, n_loops: int | None = None, **kwargs: Any) -> Any:
        """As in TransformerLens; hook points for `n_loops` loops are there before hooks are placed."""
        n_loops = self.cfg.n_loops if n_loops is None else n_loops
        self.ensure_loops(n_loops)
        placed = (*kwargs.get("fwd_hooks", ()), *kwargs.get("bwd_hooks", ()))
        self._check_names((name for name, _ in placed if isinstance(name, str)), n_loops)
        return super().run_with_hooks(*model_args, n_loops=n_loops, **kwargs)

    def run_with_cache(
        self, *model_args: Any, names_filter: NamesFilter = None, n_loops: int | None = None, **kwargs: Any
    ) -> tuple[Any, LoopCache]:
        """Run the model and keep activations of every loop.

        Args:
            model_args: As for the model itself.
            names_filter: A hook name, several, or a predicate. None keeps everything but the attention
                patterns, which are built only when a name or a predicate asks for them.
            n_loops: Loops to run; the trained number when None.
            kwargs: As in TransformerLens, `pos_slice` excepted: slice the cached tensors instead.

        Returns:
            What the model returned, and a cache of the whole run; `cache.loop(r)` is an ordinary
            `ActivationCache` of loop r.

        Raises:
            KeyError: A name that is no hook point of this run.
            ValueError: `pos_slice` was given.
        """
        if kwargs.pop("pos_slice", None) is not None:
            raise ValueError(
                "pos_slice is not supported: it would slice the heads of gates and rotated queries. "
                "Slice the cached tensors instead, for example cache['loops.1.hook_out'][:, -1]."
            )
        n_loops = self.cfg.n_loops if n_loops is None else n_loops
        self.ensure_loops(n_loops)
        if names_filter is not None and not callable(names_filter):
            self._check_names([names_filter] if isinstance(names_filter, str) else names_filter, n_loops)
        out, cache = super().run_with_cache(*model_args, names_filter=names_filter, n_loops=n_loops, **kwargs)
        return out, LoopCache(cache, self, n_loops, has_batch_dim=not kwargs.get("remove_batch_dim", False))

    def get_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; None is everything but the attention patterns."""
        return super().get_caching_hooks(self._predicate(names_filter), *args, **kwargs)

    def add_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; None is everything but the attention patterns."""
        return super().add_caching_hooks(self._predicate(names_filter), *args, **kwargs)

    def _predicate(self, names_filter: NamesFilter) -> Callable[[str], bool]:
        if names_filter is None:
            return lambda name: "hook_pattern" not in name
        if callable(names_filter):
            return names_filter
        names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
        self._check_names(names)
        return names.__contains__

    def _check_names(self, names: Iterable[str], n_loops: int | None = None) -> None:
        """Refuse names that are no hook point, or whose loop a run of `n_loops` does not reach."""
        n_loops = n_loops or len(self.loops)
        for name in names:
            loop = re.match(r"loops\.(\d+)\.", name)
            if name not in self.hook_dict or (loop and int(loop[1]) > n_loops):
                raise KeyError(
                    f"{name!r} is no hook point of this run. There are hook_embed and, for loops 1 to {n_loops} and "
                    f"layers 0 to {self.cfg.n_layers - 1}, names such as 'loops.1.blocks.0.hook_resid_post' and "
                    "'loops.1.hook_out'; `model.hook_dict` lists them all. More loops: n_loops= or "
                    "model.ensure_loops(n)."
                )


def _one_run(mask: Tensor) -> bool:
    """Whether the True entries of every row stand together."""
    starts = mask[:, :1].long().sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    return bool((starts <= 1).all())


def next_token_loss(logits: Tensor, input_ids: Tensor, real: Tensor | None) -> Tensor:
    """Mean negative log likelihood of the real next tokens, in nats, computed in float32 at least."""
    targets = input_ids[:, 1:].long()
    if real is not None:
        targets = targets.masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    logits = logits[:, :-1]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
