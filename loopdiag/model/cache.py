"""Activations of a run, loop by loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache

# Helpers of TransformerLens that walk over layers 0..n_layers-1 of a single pass.
ONE_PASS_HELPERS = (
    "accumulated_resid",
    "apply_ln_to_stack",
    "compute_head_results",
    "compute_ssm_effective_attention",
    "compute_ssm_state",
    "decompose_resid",
    "get_full_resid_decomposition",
    "get_neuron_results",
    "logit_attrs",
    "logit_lens",
    "ssm_layers",
    "stack_activation",
    "stack_head_results",
    "stack_neuron_results",
)
# Of these, what works on the hook points that a loop has.
WORK_ON_A_LOOP = ("accumulated_resid", "apply_ln_to_stack", "stack_activation")


def _refusing(helper: str, reason: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"ActivationCache.{helper} {reason}")

    refuse.__name__ = helper
    refuse.__doc__ = f"Not available: it {reason}"
    return refuse


class LoopCache(ActivationCache):
    """Activations of all loops of a run, under their full names.

    `cache["loops.2.hook_out"]` and `cache["hook_embed"]` read one tensor; `cache.loop(r)` is an ordinary
    `ActivationCache` of loop r (`cache.loop(2)["resid_post", -1]`). Helpers that expect a single pass
    raise here and name the way.

    Attributes:
        n_loops: Loops that were run.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, n_loops: int, has_batch_dim: bool = True) -> None:
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.n_loops = n_loops

    def loop(self, loop: int) -> OneLoopCache:
        """The activations of one loop under the names of an ordinary run (`blocks.{layer}...`).

        The loop's own points (`hook_carry`, `hook_in`, `hook_out_pre_norm`, `hook_out`, `hook_readout`) keep their
        names; `hook_embed` is the embedding in every loop.

        Raises:
            KeyError: `loop` is outside 1..n_loops.
        """
        if loop not in range(1, self.n_loops + 1):
            raise KeyError(f"loop {loop!r} is not in this run: it has loops 1 to {self.n_loops}.")
        prefix = f"loops.{int(loop)}."
        own = {name.removeprefix(prefix): value for name, value in self.cache_dict.items() if name.startswith(prefix)}
        if "hook_embed" in self.cache_dict:
            own["hook_embed"] = self.cache_dict["hook_embed"]
        return OneLoopCache(own, self.model, has_batch_dim=self.has_batch_dim)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> LoopCache:
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return LoopCache(sliced.cache_dict, self.model, self.n_loops, has_batch_dim=sliced.has_batch_dim)

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        if key in ("embed", ("embed",)):
            return self.cache_dict["hook_embed"]
        raise KeyError(
            f"{key!r} is not in the cache of this run. Full names look like 'loops.2.hook_out'; "
            "for a name within one loop use cache.loop(r)[...], r from 1 to "
            f"{self.n_loops}."
        )


class OneLoopCache(ActivationCache):
    """Activations of one loop. Helpers that need hook points or weights a loop lacks raise."""

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> OneLoopCache:
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return OneLoopCache(sliced.cache_dict, self.model, has_batch_dim=sliced.has_batch_dim)


for _helper in ONE_PASS_HELPERS:
    setattr(LoopCache, _helper, _refusing(_helper, "expects a single pass: choose a loop, cache.loop(r)."))
    if _helper not in WORK_ON_A_LOOP:
        setattr(
            OneLoopCache,
            _helper,
            _refusing(_helper, "needs hook points or weights that looped models do not have."),
        )
