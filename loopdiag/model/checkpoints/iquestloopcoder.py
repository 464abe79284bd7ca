"""IQuest-Coder-V1-Loop (`IQuestLab/IQuest-Coder-V1-40B-Loop-Instruct` and `-Loop-Thinking`).

The layer of LoopCoder-V2 with gates that read the query, but nothing shifted, nothing injected, and no norm between
loops. Its window counts the token itself, unlike LoopCoder-V2's.
"""

from __future__ import annotations

from loopdiag.model.checkpoints.common import Keys, Names, llama_names, llama_sizes
from loopdiag.model.config import LoopedConfig

MODEL_TYPE = "iquestloopcoder"
DESCRIPTION = "IQuest-Coder-V1-Loop: loops on shared keys and values"
HUB = "IQuestLab/IQuest-Coder-V1-40B-Loop-Instruct"


def read_config(keys: Keys) -> LoopedConfig:
    """The configuration that a `config.json` of this family describes; see `checkpoints`."""
    return LoopedConfig(
        **llama_sizes(keys),
        n_loops=keys["loop_num"],
        offset=0,
        injection="none",
        memory="first",
        window=keys["loop_window_size"],
        gate_input="query",
        norm_between_loops=False,
    )


def weight_names(cfg: LoopedConfig) -> Names:
    """Our parameter names, each with the released tensor's name."""
    gates: Names = {
        f"blocks.{layer}.attn.gate.{part}": f"model.gate_projections.{layer}.{part}"
        for layer in range(cfg.n_layers)
        for part in ("weight", "bias")
    }
    return llama_names(cfg) | gates
