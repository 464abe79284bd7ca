"""What a trained model relies on: changed offsets, carries, loops, gates, windows and memories, and patched states."""

from loopdiag.interventions.contexts import (
    clamp_gate,
    drop_carry,
    mean_carry,
    other_carry,
    own_memory,
    patch,
    repeat_loop,
    set_window,
    shift_offset,
    skip_loop,
    swap_loops,
)
from loopdiag.interventions.effects import (
    CAVEAT,
    GROUPS,
    Effect,
    Effects,
    EffectsError,
    Intervention,
    catalogue,
    intervene,
)
from loopdiag.interventions.patching import patching_effects

__all__ = [
    "CAVEAT",
    "GROUPS",
    "Effect",
    "Effects",
    "EffectsError",
    "Intervention",
    "catalogue",
    "clamp_gate",
    "drop_carry",
    "intervene",
    "mean_carry",
    "other_carry",
    "own_memory",
    "patch",
    "patching_effects",
    "repeat_loop",
    "set_window",
    "shift_offset",
    "skip_loop",
    "swap_loops",
]
