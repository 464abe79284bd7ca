"""The JSON answer: a contract, described in docs/json.md."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loopdiag.bootstrap import DRAWS
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost.curve import gain_cost
from loopdiag.gaincost.decision import Recommendation
from loopdiag.gaincost.measured import Decomposition, TrainingRecommendation, decompose, equal_work
from loopdiag.gaincost.rule import Decision
from loopdiag.gaincost.scaling import exponent_of
from loopdiag.losses import SweepLosses
from loopdiag.measures import DEFINITIONS, is_by_loop
from loopdiag.summary import Estimate

SCHEMA = 1


def answer(diagnosis: Diagnosis, recommendation: Recommendation) -> dict[str, Any]:
    """Everything that `loopdiag recommend` says, ready for JSON: undefined numbers are None."""
    about = diagnosis.provenance
    return {
        "schema": SCHEMA,
        "model": about["model"],
        "trained_loops": about["trained_loops"],
        "run_loops": about["run_loops"],
        "measured_loops": about["measured_loops"],
        "documents": about["documents"],
        "documents_not_finite": len(about.get("documents_not_finite", ())),
        "tokens": about["tokens"],
        "price_nats_per_loop": recommendation.price,
        "bootstrap": {"seed": recommendation.seed, "draws": DRAWS},
        **_decided(recommendation),
        "predicted_training_loops": recommendation.predicted_training_loops,
        "predicted_support": {str(loop): share for loop, share in recommendation.predicted_support.items()},
        "lenses": recommendation.lenses,
        "absent": about["absent"],
        "loops": loop_rows(diagnosis, recommendation.seed),
        "provenance": about,
    }


def _decided(decision: Decision) -> dict[str, Any]:
    return {
        "verdict": decision.verdict,
        "recommended_loops": decision.recommended_loops,
        "why_undetermined": decision.why or None,
        "support": {str(loops): share for loops, share in decision.support.items()},
        "contenders": list(decision.contenders),
        "break_even": [asdict(step) for step in decision.break_even],
    }


def loop_rows(diagnosis: Diagnosis, seed: int) -> list[dict[str, Any]]:
    """One row per loop that was measured: every measure's mean over documents, the NLL with its 95 % interval.

    Measures by other dimensions than the loop are left out.
    """
    curve = gain_cost(diagnosis, seed=seed)
    means = {
        name: values.mean([dim for dim in values.dims if dim != "loop"]).values
        for name, values in diagnosis.data.data_vars.items()
        if is_by_loop(str(name))
    }
    return [
        {
            "loop": int(loop),
            "extrapolated": bool(loop > curve.trained_loops),
            "nll_exit_low": _number(curve.nll_exit.low[index]),
            "nll_exit_high": _number(curve.nll_exit.high[index]),
            "net_gain": _number(curve.net.mean[index]),
            **{
                f"{name}_{end}": _number(getattr(estimate, end)[index])
                for name, estimate in (("gain", curve.gain), ("cost", curve.cost), ("net_gain", curve.net))
                for end in ("low", "high")
            },
            **{str(name): _number(mean[index + 1]) for name, mean in means.items()},
            **dict.fromkeys(name for name in DEFINITIONS if is_by_loop(name) and name not in means),
        }
        for index, loop in enumerate(curve.loop)
    ]


def sweep_answer(losses: SweepLosses, answers: Sequence[TrainingRecommendation], seed: int) -> dict[str, Any]:
    """Everything that `loopdiag recommend SWEEP` says, ready for JSON: undefined numbers are None.

    Args:
        losses: A sweep.
        answers: The recommendation for each memory and offset that has one, the standard one first.
        seed: Of the draws.
    """
    return {
        "schema": SCHEMA,
        "kind": losses.KIND,
        "data": losses.provenance["data"],
        "price_nats_per_loop": answers[0].price,
        "draws": {"seed": seed, "draws": DRAWS},
        "answers": [_trained(losses, answer) for answer in answers],
        "decompositions": [
            _decomposed(decompose(losses, str(memory), seed=seed)) for memory in losses.data["memory"].values
        ]
        if losses.data.sizes["offset"] > 1
        else [],
        "recurrence_exponent": _exponent(losses, answers[0]),
        "provenance": losses.provenance,
    }


def _exponent(losses: SweepLosses, answer: TrainingRecommendation) -> dict[str, Any]:
    some = SweepLosses(losses.data.sel(loops=list(answer.loops)))
    found = exponent_of([some], offset=answer.offset, memory=answer.memory)
    return {"phi": found.phi, "low": found.low, "high": found.high, "why": found.why or None}


def _trained(losses: SweepLosses, answer: TrainingRecommendation) -> dict[str, Any]:
    place = losses.data.sel(memory=answer.memory, offset=answer.offset)
    worked = equal_work(losses, offset=answer.offset, memory=answer.memory)
    at_equal_work = dict(zip(place["loops"].values.tolist(), worked, strict=True))
    return {
        "offset": answer.offset,
        "memory": answer.memory,
        "seeds": answer.seeds,
        **_decided(answer),
        "leaves_out": answer.leaves_out,
        "loops": [
            {
                "loops": loops,
                **_estimated("nll", answer.nll, index),
                "nll_equal_work": _number(at_equal_work[loops]),
                **{
                    name: _number(place[name].sel(loops=loops).item())
                    for name in ("learning_rate", "flops", "kv_bytes", "kv_bytes_fixed")
                },
            }
            for index, loops in enumerate(answer.loops)
        ],
    }


def _decomposed(parts: Decomposition) -> dict[str, Any]:
    estimates = {name: getattr(parts, name) for name in ("loss_on", "loss_off", "gain", "tax", "net")}
    for name in ("gain", "tax", "net"):
        estimates |= {f"{name}_helped": parts.helped[name], f"{name}_harmed": parts.harmed[name]}
    return {
        "memory": parts.memory,
        "seeds": parts.seeds,
        "intervals_over": parts.over,
        "loops": [
            {"loops": int(loops)}
            | {key: value for name, each in estimates.items() for key, value in _estimated(name, each, index).items()}
            for index, loops in enumerate(parts.loops)
        ],
    }


def _estimated(name: str, values: Estimate, index: int) -> dict[str, float | None]:
    ends = {"": values.mean, "_low": values.low, "_high": values.high}
    return {f"{name}{end}": _number(array[index]) for end, array in ends.items()}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def dumps(answer: dict[str, Any]) -> str:
    """The answer as text; NaN is refused, since JSON has none."""
    return json.dumps(answer, indent=2, allow_nan=False) + "\n"
