"""Planted diagnoses: results in the form that `diagnose` gives them, with a truth that the test chose."""

import json
from types import SimpleNamespace

import numpy as np
import xarray as xr

from loopdiag.diagnosis import SCHEMA, Diagnosis
from loopdiag.measures import DEFAULT_GROUPS, DEFINITIONS, GROUPS, absent, dimensions
from loopdiag.measures.attention import octaves

EMBEDDING_NLL = 12.0
LAYERS, HEADS = 2, 4
POSITIONS = octaves(64)

# The first loop at which a measure is defined; 0 for those not named.
FIRST_LOOP = {
    **dict.fromkeys(("gain", "cost", "output_shift", "output_shift_reverse", "output_shift_js"), 1),
    **dict.fromkeys(("step_size", "relative_step", "radial_share", "state_cosine", "exit_probability"), 1),
    **dict.fromkeys(("changed", "fixed", "broken"), 1),
    **dict.fromkeys(("acceleration", "breadth"), 2),
    **dict.fromkeys(("cos_update", "cos_reference", "withheld", "gate_mean"), 2),
    **dict.fromkeys(("omega", "omega_relative", "omega_random", "gate_by_position"), 2),
    **{name: 1 + name.endswith(("_global", "_local", "_window")) for name in GROUPS["attention"] if "gate" not in name},
    **{"attention_kl": 2, "attention_kl_global": 2, "attention_kl_local": 3},
}


def planted(nll, *, documents=64, noise=0.0, difficulty=0.5, seed=0, **form):
    """A diagnosis drawn from a truth.

    Args:
        nll: True exit NLL of loops 1..R.
        documents: Documents.
        noise: Standard deviation of each document's NLL at each loop, independent between loops: two loops differ
            with a paired error of noise * sqrt(2 / documents).
        difficulty: Standard deviation of what a document adds to all its loops; large beside differences between
            loops, as in real text, so that a comparison that is not paired sees nothing.
        seed: Of both.
        form: See `diagnosis_of`.
    """
    rng = np.random.default_rng(seed)
    shared = difficulty * rng.standard_normal((documents, 1))
    return diagnosis_of(np.asarray(nll) + shared + noise * rng.standard_normal((documents, len(nll))), **form)


def diagnosis_of(
    nll,
    *,
    sources=None,
    trained_loops=None,
    churn=0.05,
    readouts=True,
    offset=True,
    gated=True,
    coda=False,
    exit_gate=False,
    curves=None,
):
    """A diagnosis with exactly these NLLs.

    Args:
        nll: Exit NLL [document, loop], loops 1..R.
        sources: Each document's cluster; each its own when None.
        trained_loops: As in the provenance; R when None.
        churn: Nats that a loop takes from some tokens and gives to others, beside its net; a number, or one per loop.
        readouts: Whether `nll_usable` and `withheld` were measured.
        offset, gated, coda, exit_gate: What the model has.
        curves: Truth over loops 0..R of measures other than the NLL, gain and cost.
    """
    nll = np.asarray(nll, dtype=float)
    documents, n_loops = nll.shape
    nll = np.column_stack((np.full(documents, EMBEDDING_NLL), nll))
    cost = np.maximum(0, np.diff(nll)) + churn
    gain = cost - np.diff(nll)
    undefined = np.full((documents, 1), np.nan)
    values = {"nll_exit": nll, "gain": np.hstack((undefined, gain)), "cost": np.hstack((undefined, cost))}
    # What documents differ by, in every measure but the NLL's; 1 on average, so that means are the truth.
    scale = 1 + 0.1 * np.sin(np.arange(documents))
    scale /= scale.mean()
    truths = _truths(nll.mean(0)) | dict(curves or {})
    for name, truth in truths.items():
        values[name] = scale[:, None] * np.asarray(truth, dtype=float)
    for name in GROUPS["attention"]:
        last = len(POSITIONS) if name == "gate_by_position" else HEADS
        values[name] = values[name][:, :, None, None] * np.linspace(0.9, 1.1, last) * np.ones((LAYERS, 1))
    values["motion_label"] = np.zeros(documents)
    values["hsic"] = scale[:, None, None] * 0.8 ** abs(
        np.subtract.outer(np.arange(n_loops + 1), np.arange(n_loops + 1))
    )
    groups = [group for group in DEFAULT_GROUPS if readouts or group != "readouts"]
    has = {"omega": offset, "withheld": offset, "gate": gated, "nll_lens": coda, "exit_probability": exit_gate}
    taken = [
        name
        for group in groups
        for name in GROUPS[group]
        if all(there or not name.startswith(part) for part, there in has.items())
        and (gated or not name.endswith(("_global", "_local", "_window")))
    ]
    parts = {"offset": int(offset), "gate": gated or None, "coda": coda or None, "leave": exit_gate or None}
    left_out = absent(SimpleNamespace(readable=True, at=None, **parts), taken, groups)
    about = _provenance(documents, n_loops, trained_loops or n_loops) | {"measures": groups, "absent": left_out}
    names = [f"document {document}" for document in range(documents)]
    return Diagnosis(
        xr.Dataset(
            {
                name: (
                    dimensions(name, values[name].ndim),
                    values[name],
                    {"units": units, "state": state, "long_name": long_name},
                )
                for name, (units, state, long_name) in DEFINITIONS.items()
                if name in taken
            },
            coords={
                "document": names,
                "source": ("document", names if sources is None else list(sources)),
                "loop": np.arange(n_loops + 1),
                "loop_b": np.arange(n_loops + 1),
                **({"position": POSITIONS} if gated else {}),
            },
            attrs={"provenance": json.dumps(about, sort_keys=True)},
        )
    )


def _truths(nll):
    """A plausible mean curve over loops 0..R of every measure but `nll_exit`, `gain` and `cost`."""
    loop = np.arange(len(nll))
    with np.errstate(divide="ignore"):
        shrinking = 1 / loop
    curves = {
        "rank": np.exp(nll - 2),
        "log_rank": np.maximum(0, nll - 2),
        "confidence": np.exp(-nll / 2),
        "accuracy": np.exp(-nll / 2),
        "changed": 0.5 * shrinking,
        "fixed": 0.2 * shrinking,
        "broken": 0.1 * shrinking,
        "settled": (1 + loop) / len(nll),
        "breadth": np.full(len(nll), 1 / max(1, len(nll) - 2)),
        "entropy": nll - 0.1,
        "output_shift": 2 * shrinking,
        "output_shift_reverse": 3 * shrinking,
        "output_shift_js": 0.3 * shrinking,
        "nll_usable": nll - 0.05,
        "withheld": 0.7 + 0.0 * loop,
        "step_size": 40 * shrinking,
        "relative_step": 2 * shrinking,
        "radial_share": 0.3 * shrinking,
        "acceleration": 3 * shrinking,
        "state_cosine": 1 - 0.5 * shrinking,
        "cos_update": -0.8 * shrinking,
        "cos_reference": -0.5 + 0.0 * loop,
        "effective_rank": 100.0 + 5 * loop,
        "effective_rank_centred": 90.0 + 5 * loop,
        "participation_ratio": 20.0 + 2 * loop,
        "omega": 11.0 + 0.0 * loop,
        "omega_relative": 0.9 + 0.0 * loop,
        "omega_random": 12.0 + 0.0 * loop,
        "gate_mean": 0.6 + 0.0 * loop,
        "gate_by_position": 0.6 + 0.0 * loop,
        **{name: 2.0 - 0.1 * loop for name in GROUPS["attention"] if name.startswith("attention_entropy")},
        **{name: 0.3 + 0.0 * loop for name in GROUPS["attention"] if "relative" in name or "sink" in name},
        **dict.fromkeys(("attention_window", "attention_window_global"), 0.5 + 0.0 * loop),
        **dict.fromkeys(("attention_kl", "attention_kl_global", "attention_kl_local"), 0.4 * shrinking),
        "nll_lens": nll + 0.2,
        "exit_probability": np.full(len(nll), 1 / (len(nll) - 1)),
    }
    return {name: np.where(loop < FIRST_LOOP.get(name, 0), np.nan, curve) for name, curve in curves.items()}


def _provenance(documents, run_loops, trained_loops):
    return {
        "schema": SCHEMA,
        "model": "a planted model",
        "weights_sha256": "0" * 64,
        "config": {"n_loops": trained_loops},
        "trained_loops": trained_loops,
        "run_loops": run_loops,
        "measured_loops": list(range(1, run_loops + 1)),
        "corpus": "a planted corpus",
        "corpus_sha256": "0" * 64,
        "documents": documents,
        "documents_cut": 0,
        "documents_fit": documents,
        "documents_too_short": 0,
        "tokens": 100 * documents,
        "max_tokens": 128,
        "rank_tokens": 64,
        "seed": 0,
        "batch_size": 8,
        "dtype": "float64",
        "device": "cpu",
        "threads": 1,
        "versions": {"loopdiag": "0"},
    }
