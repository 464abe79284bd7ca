"""All measures of one batch, and why some are missing."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from loopdiag.measures import attention, diversity, exit_rules, motion, offset, prediction, similarity
from loopdiag.measures.definitions import GROUPS, RAREFACTION
from loopdiag.trace import LoopTrace

# Groups that read the exits' distributions token by token.
_OF_EXITS = {"prediction", "exit_rules", "classes"}


@torch.no_grad()
def take(
    trace: LoopTrace,
    groups: Collection[str],
    rank_tokens: int,
    longest: int | None = None,
    token_class: tuple[Tensor, int] | None = None,
) -> dict[str, Tensor]:
    """The measures of some groups, each with the document first; what the model or the trace lacks is left out.

    Not here: `readouts`, which `Readouts.measure` takes; attention beside the gate, `heads` and `layers`, which are
    taken while the model runs (`AttentionMeasures`, `LayerSimilarity`); `pooled` (`PooledRank`), `noise`
    and `tokens` (`by_token`).

    Args:
        trace: The batch; with what `with_maps` adds for `fixed_point`.
        groups: Of `GROUPS`.
        rank_tokens: Tokens of a document that ranks and HSIC look at.
        longest: Tokens of the corpus' longest document; the batch's when None.
        token_class: Each token's class and how many there are, for `classes`.
    """
    found: dict[str, Tensor] = {}
    if trace.readable and _OF_EXITS & set(groups):
        series = prediction.exit_series(trace)
        if "prediction" in groups:
            found |= prediction.averaged(series, trace.predicts)
        if "exit_rules" in groups:
            found |= exit_rules.trade_off(series | exit_rules.state_series(trace), trace.predicts, trace.loops)
        if "classes" in groups and token_class is not None:
            found |= prediction.by_class(series, trace, *token_class)
    if "prediction" in groups:
        if trace.readable and trace.coda is not None:
            found |= prediction.lens(trace)
        if trace.leave is not None:
            found["exit_probability"] = prediction.exit_probability(trace)
    if "motion" in groups:
        found |= {
            "step_size": motion.step_size(trace),
            "relative_step": motion.relative_step(trace),
            "radial_share": motion.radial_share(trace),
            "acceleration": motion.acceleration(trace),
            "state_cosine": motion.state_cosine(trace),
            "cos_update": motion.cos_update(trace),
            "cos_reference": motion.cos_reference(trace),
            "motion_label": motion.label(trace),
        }
    if "fixed_point" in groups and trace.following is not None:
        found |= {
            "fixed_point_gap": motion.fixed_point_gap(trace),
            "fixed_point_gap_relative": motion.fixed_point_gap_relative(trace),
            "fixed_point_gap_layers": motion.fixed_point_gap_layers(trace),
        }
    if "diversity" in groups:
        found |= {
            "effective_rank": diversity.document_rank(trace, rank_tokens),
            "effective_rank_centred": diversity.document_rank(trace, rank_tokens, centred=True),
            "participation_ratio": diversity.document_rank(
                trace, rank_tokens, centred=True, of=diversity.participation_ratio
            ),
            "hsic": similarity.loop_hsic(trace, rank_tokens),
        }
    if "rarefaction" in groups:
        by_tokens = [diversity.document_rank(trace, tokens) for tokens in rarefied(rank_tokens)]
        found["effective_rank_by_tokens"] = torch.stack(by_tokens, dim=-1)
    if "offset" in groups and trace.offset:
        found |= {
            "omega": offset.omega(trace),
            "omega_relative": offset.omega_relative(trace),
            "omega_random": offset.omega_random(trace),
        }
    if "attention" in groups and trace.gate is not None:
        longest = trace.mask.shape[1] if longest is None else longest
        found |= {
            "gate_mean": attention.gate_mean(trace),
            "gate_by_position": attention.gate_by_position(trace, longest),
        }
    return found


def rarefied(rank_tokens: int) -> list[int]:
    """Token counts of the rarefaction curve: those of `RAREFACTION` that documents reach, and their matched count."""
    return sorted({*(tokens for tokens in RAREFACTION if tokens < rank_tokens), rank_tokens})


def absent(trace: LoopTrace, taken: Collection[str], groups: Collection[str]) -> dict[str, str]:
    """Measures of a batch that are left out, each with the reason: what a model lacks is absent, not zero."""

    def reason(group: str, name: str) -> str:
        if group not in groups:
            return f"the group {group} was not asked for"
        if name == "nll_lens" and trace.coda is None:
            return "no coda stands before the head, so exits are the plain logit lens"
        if name == "exit_probability":
            return "the model has no exit gate" if trace.at is None else "no exit gate, or not every loop was kept"
        if name.endswith("_fit") and trace.readable:
            return "the corpus has no fit documents"
        if group == "readouts" and "nll_usable" not in taken:
            return "the trace has no head or no tokens, or the corpus has no documents to fit on"
        if group in ("prediction", "tokens", "classes", "exit_rules"):
            return "the trace has no head or no tokens"
        if group == "offset" or name == "withheld":
            return "the model has no cross-loop position offset"
        if trace.gate is None and (name.startswith("gate_") or name.endswith(("_global", "_local", "_window"))):
            return "no loop of this run blends attention, so there is no gate and one map"
        if group in ("attention", "attention_pairs", "heads"):
            return "attention was not captured, or the run has too few loops"
        return "only models of this toolkit can be run again for it"

    return {name: reason(group, name) for group, names in GROUPS.items() for name in names if name not in taken}
