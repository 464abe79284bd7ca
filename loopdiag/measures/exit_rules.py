"""When to stop looping, token by token: known rules side by side, on what they save and what they lose.

Every rule looks at a token's states or predictions up to loop r and says whether to leave after it; a token that no
loop satisfies takes the last. The oracle knows the answer and takes the best loop: no rule can do better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopdiag.measures.motion import accelerations, relative_steps
from loopdiag.measures.prediction import leaving
from loopdiag.measures.reduce import over_tokens, undefined
from loopdiag.trace import LoopTrace

Series = Float[Tensor, "loop document pos"]  # loops 0..R, NaN where undefined
_SMALL = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Rule:
    """A rule with a threshold.

    Attributes:
        leaves: From the series of a batch and a threshold to where a token would leave.
        thresholds: Those that are swept.
        usual: The one that it is commonly used with; None where there is none.
        what: What is held against the threshold.
    """

    leaves: Callable[[Mapping[str, Series], float], Bool[Tensor, "loop document pos"]]
    thresholds: tuple[float, ...]
    usual: float | None
    what: str


def _below(name: str) -> Callable[[Mapping[str, Series], float], Tensor]:
    return lambda series, threshold: series[name] < threshold


def _twice_below(series: Mapping[str, Series], threshold: float) -> Tensor:
    """Two hits in a row."""
    hits = series["acceleration"] < threshold
    return hits & torch.cat((torch.zeros_like(hits[:1]), hits[:-1]))


def _stable(series: Mapping[str, Series], times: float) -> Tensor:
    """The likeliest token has stayed for so many loops."""
    same = series["changed"] == 0
    held = torch.zeros_like(series["changed"])
    for loop in range(1, len(same)):
        held[loop] = torch.where(same[loop], held[loop - 1] + 1, 0)
    return held >= times


RULES: dict[str, Rule] = {
    "latent": Rule(_below("relative_step"), _SMALL, 0.03, "relative latent change"),
    "kl": Rule(_below("output_shift"), _SMALL, 1e-3, "KL between successive exits"),
    "entropy": Rule(
        lambda series, threshold: (series["entropy"] - series["entropy"].roll(1, 0)).abs() < threshold,
        _SMALL,
        1e-3,
        "change of the exit's entropy",
    ),
    "argmax": Rule(_stable, (1, 2, 3), 1, "likeliest token unchanged"),
    "acceleration": Rule(_twice_below, _SMALL, None, "second difference small twice in a row"),
    "confidence": Rule(
        lambda series, threshold: series["confidence"] >= threshold,
        (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
        None,
        "probability of the likeliest token",
    ),
    "gate": Rule(
        lambda series, threshold: series["gate"] >= threshold,
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        1.0,
        "the model's own exit gate, cumulative",
    ),
}
ORACLE = "oracle"
SETTINGS = max(len(rule.thresholds) for rule in RULES.values())


def exit_loops(leaves: Bool[Tensor, "loop document pos"]) -> Int[Tensor, "document pos"]:
    """The first place >= 1 among the loops after which a token leaves; the last where none lets it."""
    allowed = leaves[1:].clone()
    allowed[-1] = True
    return allowed.int().argmax(0) + 1


def state_series(trace: LoopTrace) -> dict[str, Series]:
    """What rules read off the states: `relative_step`, `acceleration` and, with an exit gate, `gate`."""
    series = {"relative_step": relative_steps(trace), "acceleration": accelerations(trace)}
    if trace.leave is not None:
        reached = leaving(trace).cumsum(0)
        series["gate"] = torch.cat((undefined(reached, 1), reached))
    return series


def trade_off(
    series: Mapping[str, Series], kept: Bool[Tensor, "document pos"], loops: Sequence[int]
) -> dict[str, Tensor]:
    """Mean loops used and mean NLL of every rule and threshold, over a document's predicting tokens.

    Args:
        series: `state_series` and `prediction.exit_series`.
        kept: Tokens that have a next token.
        loops: Numbers of the loops, 0 first. Rules leave after one of these only.

    Returns:
        `exit_rule_loops` and `exit_rule_nll` [document, rule, setting], NaN beyond a rule's thresholds and for rules
        that the model cannot follow; the last rule is the oracle.
    """
    nll = series["nll_exit"]
    shape = (nll.shape[1], len(RULES) + 1, SETTINGS)
    used, losses = (torch.full(shape, float("nan"), dtype=torch.float64, device=nll.device) for _ in range(2))

    numbers = torch.tensor(loops, dtype=torch.float64, device=nll.device)

    def put(rule: int, setting: int, chosen: Int[Tensor, "document pos"]) -> None:
        taken = nll.gather(0, chosen[None])[0]
        used[:, rule, setting] = over_tokens(numbers[chosen][None], kept)[:, 0]
        losses[:, rule, setting] = over_tokens(taken[None].double(), kept)[:, 0]

    for index, (name, rule) in enumerate(RULES.items()):
        if name != "gate" or "gate" in series:
            for setting, threshold in enumerate(rule.thresholds):
                put(index, setting, exit_loops(rule.leaves(series, threshold)))
    put(len(RULES), 0, nll[1:].argmin(0) + 1)
    return {"exit_rule_loops": used, "exit_rule_nll": losses}


def thresholds() -> Float[Tensor, "rule setting"]:
    """The thresholds of every rule, NaN beyond its own and for the oracle."""
    table = torch.full((len(RULES) + 1, SETTINGS), float("nan"), dtype=torch.float64)
    for index, rule in enumerate(RULES.values()):
        table[index, : len(rule.thresholds)] = torch.tensor(rule.thresholds, dtype=torch.float64)
    return table
