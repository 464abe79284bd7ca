"""Diagnoses with every measure, around levels that stand below: for figures, tables and summaries."""

import json

import numpy as np
import xarray as xr

from loopdiag.diagnosis import SCHEMA, Diagnosis
from loopdiag.measures.definitions import DEFINITIONS, DIMENSIONS, GROUPS
from loopdiag.measures.exit_rules import ORACLE, RULES, SETTINGS

NAN = np.nan
LEVELS = {  # by loop 1, 2, ...: a half-trained model with a useless last loop
    "gain": (11.0, 0.45, 0.11, 0.03, 0.02, 0.01),
    "cost": (0.01, 0.14, 0.065, 0.04, 0.05, 0.06),
    "rank": (40.0, 12.0, 9.0, 8.5, 8.6, 8.8),
    "log_rank": (3.2, 2.3, 2.1, 2.05, 2.06, 2.1),
    "confidence": (0.2, 0.4, 0.45, 0.46, 0.47, 0.47),
    "accuracy": (0.15, 0.35, 0.4, 0.41, 0.4, 0.39),
    "changed": (0.9, 0.4, 0.2, 0.1, 0.1, 0.1),
    "fixed": (0.15, 0.22, 0.07, 0.03, 0.02, 0.02),
    "broken": (NAN, 0.02, 0.02, 0.02, 0.03, 0.03),
    "settled": (0.3, 0.6, 0.8, 0.9, 0.95, 1.0),
    "entropy": (3.9, 2.8, 2.5, 2.4, 2.35, 2.3),
    "output_shift": (12.0, 0.5, 0.07, 0.01, 0.01, 0.01),
    "output_shift_reverse": (14.0, 0.6, 0.08, 0.01, 0.01, 0.01),
    "output_shift_js": (0.6, 0.1, 0.02, 0.003, 0.003, 0.003),
    "breadth": (NAN, 0.7, 0.2, 0.05, 0.03, 0.02),
    "nll_usable": (4.4, 4.0, 3.9, 3.9, 3.9, 4.0),
    "withheld": (NAN, 1.4, 1.6, 1.6, 1.6, 1.6),
    "step_size": (25.0, 12.0, 4.0, 1.6, 0.8, 0.4),
    "relative_step": (24.0, 0.5, 0.18, 0.06, 0.03, 0.02),
    "radial_share": (0.3, 0.2, 0.1, 0.1, 0.1, 0.1),
    "acceleration": (NAN, 1.0, 0.4, 0.1, 0.06, 0.04),
    "state_cosine": (0.1, 0.86, 0.98, 0.99, 0.99, 0.99),
    "cos_update": (NAN, -0.26, -0.08, 0.04, 0.03, 0.02),
    "cos_reference": (NAN, -0.64, -0.48, -0.49, -0.5, -0.5),
    "effective_rank": (77.0, 79.0, 78.0, 77.0, 76.0, 75.0),
    "effective_rank_centred": (80.0, 82.0, 81.0, 80.0, 79.0, 78.0),
    "participation_ratio": (20.0, 22.0, 21.0, 20.0, 19.0, 18.0),
    "fixed_point_gap": (12.0, 4.0, 1.6, 0.8, 0.4, 0.2),
    "fixed_point_gap_relative": (0.5, 0.18, 0.06, 0.03, 0.02, 0.01),
    "fixed_point_gap_layers": (30.0, 9.0, 7.0, 6.0, 6.0, 6.0),
    "noise_step": (0.6, 0.5, 0.5, 0.5, 0.5, 0.5),
    "noise_shift": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4),
    "omega": (NAN, 20.0, 18.5, 18.0, 18.0, 18.0),
    "omega_relative": (NAN, 0.9, 0.85, 0.8, 0.8, 0.8),
    "omega_random": (NAN, 21.0, 20.5, 20.0, 20.0, 20.0),
    "gate_mean": (NAN, 0.55, 0.6, 0.62, 0.63, 0.64),
    "gate_by_position": (NAN, 0.55, 0.6, 0.62, 0.63, 0.64),
    "attention_entropy": (2.4, 2.2, 2.1, 2.05, 2.0, 2.0),
    "attention_entropy_relative": (0.6, 0.55, 0.52, 0.5, 0.5, 0.5),
    "attention_kl": (NAN, 0.8, 0.2, 0.1, 0.08, 0.06),
    "attention_sink": (0.2, 0.25, 0.3, 0.32, 0.33, 0.34),
    "attention_window": (0.3, 0.5, 0.5, 0.5, 0.5, 0.5),
    "head_cosine": (0.35, 0.4, 0.45, 0.47, 0.48, 0.48),
    "head_rank": (2.6, 2.4, 2.2, 2.1, 2.1, 2.1),
}
LAYERS, HEADS = 2, 4
POSITIONS, TOKENS = (1, 2, 4, 8, 16, 32, 64, 128), (16, 32, 64, 128, 256)


def make(
    n_loops=4,
    *,
    at=None,
    trained=None,
    without=(),
    groups=tuple(GROUPS),
    model="tiny",
    documents=12,
    spread=0.05,
    seed=0,
    offset=True,
    gated=True,
):
    """A diagnosis of `documents` documents, two to a source, around LEVELS.

    Args:
        n_loops: Loops run; beyond six, the levels of the sixth go on.
        at: Loops recorded; all when None.
        trained: Loops of the training; those run when None.
        without: Measures that are left out.
        groups: Those that were asked for.
        model: Its name.
        documents: Documents.
        spread: Between documents, as a share.
        seed: Of the spread.
        offset, gated: What the model has.
    """
    noise = np.random.default_rng(seed)
    gated = gated and n_loops > 1  # loop 1 blends nothing
    loops = [0, *(range(1, n_loops + 1) if at is None else at)]

    def around(levels, *shape):
        levels = np.array((NAN, *(levels[min(loop, len(levels)) - 1] for loop in loops[1:])))
        scale = np.exp(spread * noise.standard_normal((documents, 1)))
        values = levels * scale * np.exp(spread / 5 * noise.standard_normal((documents, len(levels))))
        return values.reshape(documents, len(loops), *[1] * len(shape)) * np.ones(shape)

    values = {name: around(levels) for name, levels in LEVELS.items()}
    fall = np.nan_to_num(values["cost"] - values["gain"])
    values["nll_exit"] = 15.5 + fall.cumsum(1)
    by_layer = np.linspace(0.9, 1.1, LAYERS)[:, None] * np.linspace(0.95, 1.05, HEADS)
    for name in ("gate_mean", *GROUPS["attention"], *GROUPS["heads"]):
        branch = {"_global": 1.1, "_local": 0.8}.get(name[name.rfind("_") :], 1.0)
        of = name.removesuffix("_global").removesuffix("_local")
        if name != "gate_by_position":
            values[name] = around(LEVELS[of])[:, :, None, None] * by_layer * branch
            if of != name:
                values[name][:, :2] = NAN  # loop 1 has one map
    values["gate_by_position"] = (
        around(LEVELS["gate_by_position"])[:, :, None, None]
        * np.linspace(0.9, 1.1, LAYERS)[:, None]
        * np.linspace(0.8, 1.2, len(POSITIONS))
    )
    # States that forget: CKA of 0.8 per loop between them.
    apart = 0.8 ** np.abs(np.subtract.outer(loops, loops))
    values["hsic"] = around((1.0,))[:, -1:, None] * apart
    tokens = np.array(TOKENS)
    values["effective_rank_by_tokens"] = values["effective_rank"][:, :, None] * tokens / (tokens + 60)
    for name in GROUPS["pooled"]:
        values[name] = values[name.removesuffix("_pooled")].mean(0) * 1.5
    rules = [*RULES, ORACLE]
    thresholds = np.full((len(rules), SETTINGS), NAN)
    taken, nll = np.full((2, documents, len(rules), SETTINGS), NAN)
    for index, rule in enumerate(RULES.values()):
        count = len(rule.thresholds)
        if index < len(RULES) - 1:  # no exit gate
            thresholds[index, :count] = rule.thresholds
            share = np.linspace(0, 1, count)
            taken[:, index, :count] = 1 + (max(loops) - 1) * share
            nll[:, index, :count] = values["nll_exit"][:, -1:] + (0.3 + 0.1 * index) * (1 - share) ** 2
    taken[:, -1, 0], nll[:, -1, 0] = 1.7, values["nll_exit"][:, -1] - 0.2
    values |= {"exit_rule_loops": taken, "exit_rule_nll": nll}
    values |= {"exit_rule_loops_fit": taken.mean(0), "exit_rule_nll_fit": nll.mean(0)}

    gone = dict.fromkeys(without, "left out here")
    for group, names in GROUPS.items():
        for name in names:
            if group not in groups:
                gone[name] = f"the group {group} was not asked for"
            elif name not in values:
                gone[name] = "the model has none"
            elif not offset and (name.startswith("omega") or name == "withheld"):
                gone[name] = "the model has no cross-loop position offset"
            elif not gated and (name.startswith("gate") or name.endswith(("_global", "_local", "_window"))):
                gone[name] = "no loop of this run blends attention, so there is no gate and one map"
    about = {
        "schema": SCHEMA,
        "model": model,
        "weights_sha256": f"{seed:064d}",
        "trained_loops": trained or n_loops,
        "run_loops": n_loops,
        "corpus": "made",
        "corpus_sha256": "0" * 64,
        "documents": documents,
        "rank_tokens": 256,
        "tokens": 100 * documents,
        "max_tokens": 256,
        "measured_loops": list(range(1, n_loops + 1)),
        "batch_size": 8,
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "config": {"d_model": 128},
        "measures": list(groups),
        "absent": gone,
    }
    dataset = xr.Dataset(
        {
            name: (
                DIMENSIONS.get(name, ("document", "loop", "layer", "head")[: values[name].ndim]),
                values[name],
                {"units": units, "state": state, "long_name": said},
            )
            for name, (units, state, said) in DEFINITIONS.items()
            if name in values and name not in gone
        },
        coords={
            "document": [f"d{index}" for index in range(documents)],
            "source": ("document", [f"s{index // 2}" for index in range(documents)]),
            "loop": loops,
        },
        attrs={"provenance": json.dumps(about)},
    )
    of_dimensions = {
        "loop_b": ("loop_b", loops),
        "tokens": ("tokens", list(TOKENS)),
        "position": ("position", list(POSITIONS)),
        "rule": ("rule", rules),
        "exit_rule_threshold": (("rule", "setting"), thresholds),
    }
    there = {name: value for name, value in of_dimensions.items() if set(np.atleast_1d(value[0])) <= set(dataset.dims)}
    return Diagnosis(dataset.assign_coords(there))


def change(diagnosis, name, loop, value):
    """The same with other values of a measure at a loop."""
    data = diagnosis.data.copy(deep=True)
    data[name].loc[{"loop": loop}] = value
    return Diagnosis(data)
