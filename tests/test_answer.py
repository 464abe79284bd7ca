"""The JSON answer and its contract, and the decision on a real model."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from planted import FIRST_LOOP, diagnosis_of, planted

import loopdiag
from loopdiag.diagnosis import Diagnosis, diagnose
from loopdiag.gaincost import gain_cost, recommend
from loopdiag.gaincost.answer import answer, dumps
from loopdiag.gaincost.lenses import LENSES
from loopdiag.measures import DEFAULT_GROUPS, DEFINITIONS, GROUPS, is_by_loop

DOCUMENTED = Path(__file__).parents[1] / "docs" / "json.md"

# Every key of the answer; a row of `loops` has those of ROW. A number that may be undefined is a float or None.
ANSWER = {
    "schema": int,
    "model": str,
    "trained_loops": int,
    "run_loops": int,
    "measured_loops": list,
    "documents": int,
    "documents_not_finite": int,
    "tokens": int,
    "price_nats_per_loop": float,
    "verdict": str,
    "recommended_loops": int | None,
    "why_undetermined": str | None,
    "bootstrap": dict,
    "support": dict,
    "contenders": list,
    "break_even": list,
    "predicted_training_loops": int | None,
    "predicted_support": dict,
    "lenses": dict,
    "absent": dict,
    "loops": list,
    "provenance": dict,
}
ROW = {
    "loop": int,
    "extrapolated": bool,
    "nll_exit_low": float,
    "nll_exit_high": float,
    "net_gain": float,
    **{f"{name}_{end}": float for name in ("gain", "cost", "net_gain") for end in ("low", "high")},
    "nll_exit": float,
    "gain": float,
    "cost": float,
} | dict.fromkeys({name for name in DEFINITIONS if is_by_loop(name)} - {"nll_exit", "gain", "cost"}, float | None)

DEFAULT_NAMES = [name for group in DEFAULT_GROUPS for name in GROUPS[group]]

# Named by the issue, whatever else a row may hold.
ROW_OF_THE_ISSUE = {
    *("loop", "nll_exit", "nll_exit_low", "nll_exit_high", "gain", "cost", "net_gain", "nll_usable", "withheld"),
    *("effective_rank", "step_size", "cos_update", "cos_reference", "omega", "output_shift"),
}


def told(diagnosis, *args, **kwargs):
    """The answer as somebody who reads the JSON gets it."""
    return json.loads(dumps(answer(diagnosis, recommend(diagnosis, *args, **kwargs))))


def is_a(value, kind):
    """`isinstance`, but a bool is no int."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def assert_contract(given):
    """Exactly the documented keys, with their types."""
    assert set(given) == set(ANSWER)
    for key, kind in ANSWER.items():
        assert is_a(given[key], kind), key
    assert given["verdict"] in ("recommended", "undetermined")
    assert (given["verdict"] == "undetermined") == (given["recommended_loops"] is None)
    assert (given["verdict"] == "undetermined") == (given["why_undetermined"] is not None)
    assert list(given["support"]) == [str(row["loop"]) for row in given["loops"]]
    assert all(is_a(share, float) for share in given["support"].values())
    assert all(is_a(loop, int) for loop in given["contenders"])
    for step in given["break_even"]:
        assert set(step) == {"loops", "below"}
        assert is_a(step["loops"], int)
        assert is_a(step["below"], float)
    assert all(is_a(pick, int) for pick in given["lenses"].values())
    assert given["absent"] == given["provenance"]["absent"]
    assert set(given["absent"]) <= set(DEFINITIONS)
    assert all(is_a(why, str) for why in given["absent"].values())
    for row in given["loops"]:
        assert set(row) == set(ROW)
        for key, kind in ROW.items():
            assert is_a(row[key], kind), key
            assert row[key] is None or key not in given["absent"], key
    assert [row["loop"] for row in given["loops"]] == list(range(1, given["run_loops"] + 1))


# -- planted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("n_loops", [1, 2, 4])
def test_contract(n_loops, has):
    """Every key of the contract with its type, whatever was fitted and whatever the model has."""
    parts = dict.fromkeys(("readouts", "gated", "offset", "coda", "exit_gate"), has)
    diagnosis = planted(4 - 0.1 * np.arange(n_loops), noise=0.05, **parts)
    assert_contract(told(diagnosis))
    assert set(ROW) >= ROW_OF_THE_ISSUE
    # As Python objects too: numpy's numbers are not what callers expect, though JSON may take some of them.
    assert_contract(answer(diagnosis, recommend(diagnosis)))


def test_contract_is_what_the_documentation_says():
    """The keys of the tables in docs/json.md, first those of the answer (`decoding` on demand), then those of a row."""
    text, _, _ = DOCUMENTED.read_text(encoding="utf-8").partition("`loopdiag info MODEL --json`")
    tables = text.split("A row of `loops`")
    documented = [re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.M))) for table in tables]
    assert [sorted(keys) for keys in documented] == [sorted({*ANSWER, "decoding"}), sorted(ROW)]


def test_answer_by_hand():
    """Nothing is renamed, shifted by a loop, or rounded on the way from diagnosis and recommendation to the answer."""
    curves = {"effective_rank": [1.0, 50.0, 70.0, 60.0], "output_shift": [math.nan, 9.0, 2.0, 1.0]}
    diagnosis = planted([4.0, 3.5, 3.3], trained_loops=2, churn=[0.3, 0.2, 0.1], curves=curves)
    given = told(diagnosis, 0.25)
    nll = diagnosis.data["nll_exit"].values.mean(0)
    assert (given["schema"], given["model"]) == (1, "a planted model")
    assert (given["trained_loops"], given["run_loops"], given["documents"], given["tokens"]) == (2, 3, 64, 6400)
    assert (given["price_nats_per_loop"], given["verdict"], given["recommended_loops"]) == (0.25, "recommended", 2)
    assert (given["support"], given["contenders"]) == ({"1": 0.0, "2": 1.0, "3": 0.0}, [2])
    assert [step["loops"] for step in given["break_even"]] == [3, 2]
    assert [step["below"] for step in given["break_even"]] == pytest.approx([0.2, 0.5])
    assert given["lenses"] == dict.fromkeys(LENSES, 2) | {"cost_gain": 3}
    assert given["predicted_training_loops"] == 2
    assert given["predicted_support"] == {"1": 0.0, "2": 1.0, "3": 0.0}
    assert given["provenance"] == diagnosis.provenance
    rows = given["loops"]
    assert [row["extrapolated"] for row in rows] == [False, False, True]
    expected = {
        "nll_exit": nll[1:],
        "net_gain": [12 - nll[1], 0.5, 0.2],
        "gain": [12 - nll[1] + 0.3, 0.7, 0.3],
        "cost": [0.3, 0.2, 0.1],
        "effective_rank": [50, 70, 60],
        "output_shift": [9, 2, 1],
        "gate_mean": [None, 0.6, 0.6],
        "withheld": [None, 0.7, 0.7],
        "cos_update": [None, -0.4, -0.8 / 3],
        "step_size": [40, 20, 40 / 3],
    }
    for key, values in expected.items():
        assert [row[key] for row in rows] == [value if value is None else pytest.approx(value) for value in values], key
    curve = gain_cost(diagnosis)
    assert [row["nll_exit_low"] for row in rows] == curve.nll_exit.low.tolist()
    assert [row["nll_exit_high"] for row in rows] == curve.nll_exit.high.tolist()


def test_undefined_is_null():
    """What a loop has no value for is null at that loop only; a measure that was not taken is null at all."""
    nowhere = {name for name in DEFINITIONS if is_by_loop(name)} - set(DEFAULT_NAMES)
    assert nulls_of(planted([4.0, 3.5, 3.4], coda=True, exit_gate=True)) == early_nulls() | everywhere(nowhere)
    nowhere |= {"nll_lens", "exit_probability"}
    assert nulls_of(planted([4.0, 3.5, 3.4])) == early_nulls() | everywhere(nowhere)
    nowhere |= {"nll_usable", "withheld", "gate_mean"}
    nowhere |= {name for name in GROUPS["attention"] if name.endswith(("_global", "_local", "_window"))}
    assert nulls_of(planted([4.0, 3.5, 3.4], readouts=False, gated=False)) == early_nulls() | everywhere(nowhere)
    nowhere |= {"omega", "omega_relative", "omega_random"}
    without = planted([4.0, 3.5, 3.4], readouts=False, gated=False, offset=False)
    assert nulls_of(without) == early_nulls() | everywhere(nowhere)


def nulls_of(diagnosis):
    """Loop and key of every null in the rows."""
    return {(row["loop"], key) for row in told(diagnosis)["loops"] for key, value in row.items() if value is None}


def early_nulls():
    return {(loop, key) for key, first in FIRST_LOOP.items() if is_by_loop(key) for loop in range(1, first)}


def everywhere(names):
    return {(loop, name) for loop in (1, 2, 3) for name in names}


def test_what_the_model_lacks_is_said():
    """`absent` has each measure that is not there with the reason, at the top and in the provenance; else it is empty.

    Which a measure is left out for depends on the model: a reason of its own each.
    """
    not_asked = {
        name: f"the group {group} was not asked for"
        for group in set(GROUPS) - set(DEFAULT_GROUPS)
        for name in GROUPS[group]
    }
    assert told(planted([4.0, 3.5], coda=True, exit_gate=True))["absent"] == not_asked
    given = told(planted([4.0, 3.5], offset=False, gated=False, readouts=False))
    assert given["absent"] == given["provenance"]["absent"]
    of_the_gate = [name for name in GROUPS["attention"] if name.endswith(("_global", "_local", "_window"))]
    assert given["absent"] == not_asked | {
        **dict.fromkeys(("omega", "omega_relative", "omega_random"), "the model has no cross-loop position offset"),
        **dict.fromkeys(("nll_usable", "withheld"), "the group readouts was not asked for"),
        **dict.fromkeys(
            (*of_the_gate, "gate_mean", "gate_by_position"),
            "no loop of this run blends attention, so there is no gate and one map",
        ),
        "exit_probability": "the model has no exit gate",
        "nll_lens": "no coda stands before the head, so exits are the plain logit lens",
    }


def test_documents_without_a_value_are_left_out_of_a_mean():
    """Documents too short for the matched rank have none; the others still do."""
    diagnosis = planted([4.0, 3.5], curves={"effective_rank": [1.0, 50.0, 60.0]})
    rank = diagnosis.data["effective_rank"].values
    rank[::2] = math.nan
    assert told(diagnosis)["loops"][1]["effective_rank"] == pytest.approx(rank[1::2, 2].mean())


def test_undetermined_answer():
    """The verdict, null, and the reason, with support and contenders to read on."""
    given = told(planted([4.0, 3.5, 3.49], noise=0.17))
    assert (given["verdict"], given["recommended_loops"]) == ("undetermined", None)
    assert "more than the price" in given["why_undetermined"]
    assert len(given["contenders"]) > 1
    assert told(planted([4.0, 3.5]))["why_undetermined"] is None


def test_no_prediction_is_null():
    """No lens with an opinion."""
    given = told(planted([4.0], curves={"effective_rank": [1.0, math.nan]}))
    assert (given["predicted_training_loops"], given["lenses"]) == (None, {})


@pytest.mark.parametrize("trained", [1, 3, 4, 6])
def test_loops_beyond_training_are_marked(trained):
    """Run with more loops than trained, or with fewer."""
    given = told(planted([4.0, 3.5, 3.4, 3.3], trained_loops=trained))
    assert (given["trained_loops"], given["run_loops"]) == (trained, 4)
    assert [row["extrapolated"] for row in given["loops"]] == [loop > trained for loop in (1, 2, 3, 4)]


def test_the_same_input_gives_the_same_text(tmp_path):
    """Byte for byte: made twice, and from the saved diagnosis; another seed of the bootstrap shows."""
    sources = [f"source {document // 3}" for document in range(64)]
    make = {"nll": [4.0, 3.5, 3.49], "noise": 0.1, "sources": sources}
    first, second = (planted(**make) for _ in range(2))
    text = dumps(answer(first, recommend(first)))
    assert dumps(answer(second, recommend(second))) == text
    first.save(tmp_path / "saved.nc")
    loaded = Diagnosis.load(tmp_path / "saved.nc")
    assert dumps(answer(loaded, recommend(loaded))) == text
    assert dumps(answer(first, recommend(first, seed=1))) != text


def test_text_is_json_without_nan():
    """NaN is no JSON: refused rather than written. The text ends its last line."""
    diagnosis = planted([4.0, 3.5])
    given = answer(diagnosis, recommend(diagnosis))
    assert json.loads(dumps(given)) == given
    assert dumps(given).endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(given | {"tokens": math.nan})


def test_intervals_follow_the_seed_of_the_recommendation():
    """One seed for one answer: support and intervals come from the same resamples."""
    diagnosis = planted([4.0, 3.5, 3.49], noise=0.1)
    rows = told(diagnosis, seed=7)["loops"]
    assert [row["nll_exit_low"] for row in rows] == gain_cost(diagnosis, seed=7).nll_exit.low.tolist()


# -- a real model -------------------------------------------------------------------------------------


def short_diagnosis(model):
    """24 bundled documents to report on, cut short, no readouts."""
    groups = [group for group in DEFAULT_GROUPS if group != "readouts"]
    return diagnose(model, loopdiag.corpus.bundled().take(48), measures=groups, max_tokens=96)


@pytest.fixture(scope="module")
def real():
    """A real diagnosis of a bundled model."""
    return short_diagnosis(loopdiag.load("tiny-plt-4"))


@pytest.fixture(scope="module")
def frozen():
    """A diagnosis of the same model, its loops 3 and 4 made to hand on what left loop 2."""
    model = loopdiag.load("tiny-plt-4")
    kept = {}
    model.add_perma_hook("loops.2.hook_out_pre_norm", lambda state, hook: kept.update(state=state))
    for loop in (3, 4):
        model.add_hook(f"loops.{loop}.hook_out_pre_norm", lambda state, hook: kept["state"], is_permanent=True)
    return short_diagnosis(model)


def test_planted_diagnoses_have_the_form_of_real_ones(real):
    """What these tests plant is what `diagnose` makes: names, axes, units, coordinates, undefined loops, provenance."""
    n_loops = len(real.loops)
    fake = diagnosis_of(np.full((24, n_loops), 4.0), readouts=False)
    assert list(fake.data.data_vars) == list(real.data.data_vars)
    for name, values in real.data.data_vars.items():
        assert fake.data[name].dims == values.dims
        assert fake.data[name].attrs == values.attrs
        assert fake.data[name].dtype == values.dtype
        for made in (fake, real) if values.dims[:2] == ("document", "loop") and name != "hsic" else ():
            undefined = np.isnan(made.data[name].values).reshape(24, n_loops + 1, -1)
            assert undefined[:, : FIRST_LOOP.get(name, 0)].all(), name
            assert not undefined[:, FIRST_LOOP.get(name, 0) :].any(), name
    assert {name: (coord.dims, coord.dtype.kind) for name, coord in fake.data.coords.items()} == {
        name: (coord.dims, coord.dtype.kind) for name, coord in real.data.coords.items()
    }
    np.testing.assert_array_equal(fake.loops, real.loops)
    assert fake.provenance["absent"] == real.provenance["absent"]
    planted_types = {key: type(value) for key, value in fake.provenance.items()}
    assert planted_types == {key: type(real.provenance.get(key)) for key in planted_types}


def test_contract_on_a_real_diagnosis(real):
    """All of it, and the laws of gain and cost in every row."""
    given = told(real)
    assert_contract(given)
    rows = given["loops"]
    for before, row in zip([None, *rows], rows, strict=False):
        assert row["net_gain"] == pytest.approx(row["gain"] - row["cost"], abs=1e-6)
        if before:
            assert row["net_gain"] == pytest.approx(before["nll_exit"] - row["nll_exit"], abs=1e-9)
        assert row["nll_exit_low"] < row["nll_exit"] < row["nll_exit_high"]
        assert row["nll_usable"] is row["withheld"] is None


def test_curve_of_loops_that_hand_on_the_state(real, frozen):
    """Loops 1 and 2 are as they were; loops 3 and 4 leave every token's NLL where loop 2 put it."""
    curve = gain_cost(frozen)
    np.testing.assert_allclose(curve.nll_exit.mean[:2], gain_cost(real).nll_exit.mean[:2], rtol=1e-6)
    np.testing.assert_allclose(curve.nll_exit.mean[2:], curve.nll_exit.mean[1], rtol=1e-6)
    for estimate in (curve.gain, curve.cost):
        np.testing.assert_allclose([estimate.mean[2:], estimate.high[2:]], 0.0, atol=1e-6)
    assert gain_cost(real).gain.mean[2:].min() > 0.01  # unhooked they do something


def test_loops_that_hand_on_the_state_are_not_recommended(frozen):
    """2 loops or fewer, and no doubt about it, at any price; the prediction does not want them either."""
    for price in (0.0, 0.001, 0.01):
        recommendation = recommend(frozen, price)
        assert recommendation.recommended_loops is not None
        assert recommendation.recommended_loops <= 2
    assert recommendation.lenses["cost_gain"] <= 2
    assert recommendation.lenses["shift_knee"] <= 2
    assert recommendation.predicted_training_loops <= 2
    assert_contract(told(frozen))
