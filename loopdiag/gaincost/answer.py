"""The JSON answer: a contract, described in docs/json.md."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from loopdiag.bootstrap import DRAWS
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost.curve import gain_cost
from loopdiag.gaincost.decision import Recommendation
from loopdiag.measures import DEFINITIONS, is_by_loop

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
        "tokens": about["tokens"],
        "price_nats_per_loop": recommendation.price,
        "verdict": recommendation.verdict,
        "recommended_loops": recommendation.recommended_loops,
        "why_undetermined": recommendation.why or None,
        "bootstrap": {"seed": recommendation.seed, "draws": DRAWS},
        "support": {str(loop): share for loop, share in recommendation.support.items()},
        "contenders": list(recommendation.contenders),
        "break_even": [asdict(step) for step in recommendation.break_even],
        "predicted_training_loops": recommendation.predicted_training_loops,
        "lenses": recommendation.lenses,
        "absent": about["absent"],
        "loops": loop_rows(diagnosis, recommendation.seed),
        "provenance": about,
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
            "nll_exit_low": float(curve.nll_exit.low[index]),
            "nll_exit_high": float(curve.nll_exit.high[index]),
            "net_gain": float(curve.net.mean[index]),
            **{
                f"{name}_{end}": float(getattr(estimate, end)[index])
                for name, estimate in (("gain", curve.gain), ("cost", curve.cost), ("net_gain", curve.net))
                for end in ("low", "high")
            },
            **{str(name): _number(mean[index + 1]) for name, mean in means.items()},
            **dict.fromkeys(name for name in DEFINITIONS if is_by_loop(name) and name not in means),
        }
        for index, loop in enumerate(curve.loop)
    ]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def dumps(answer: dict[str, Any]) -> str:
    """The answer as text; NaN is refused, since JSON has none."""
    return json.dumps(answer, indent=2, allow_nan=False) + "\n"
