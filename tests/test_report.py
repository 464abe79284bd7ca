"""Tables and the page beside the paper: from planted truths, and as they are committed."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from synthetic import LEVELS, change, make

from loopdiag.diagnosis import Diagnosis, DiagnosisError
from loopdiag.report import reproduction, tables
from loopdiag.report.paper import BENCHMARKS, POINTS, REPORTED, SHARES
from loopdiag.report.reproduction import AGREES, DIFFERS, NONE, OPEN, best_is_two, judge, verdict
from loopdiag.summary import Estimate, by_loop, refinement_shares

ROOT = Path(__file__).parents[1]
SAVED = sorted((ROOT / "figures" / "saved").glob("*.nc"))
FAMILY = [make(loops, model=f"plt-{loops}", seed=loops) for loops in (1, 2, 3, 4)]


def rows(content):
    return list(csv.DictReader(io.StringIO(content.decode())))


def point(says):
    return next(each for each in POINTS if each.says.startswith(says))


def with_curve(name, *levels, documents=12, spread=0.01):
    """A four-loop model with this measure at loops 1, 2, ..."""
    noise = np.exp(spread * np.random.default_rng(1).standard_normal((documents, len(levels))))
    diagnosis = make(4, documents=documents)
    for loop, level in enumerate(levels, 1):
        values = level * noise[:, loop - 1]
        more = diagnosis.data[name].ndim - 2
        diagnosis = change(diagnosis, name, loop, values.reshape(-1, *[1] * more))
    return diagnosis


# -- as committed


def test_the_committed_page_and_tables_are_those_of_the_committed_results():
    """Nothing goes stale: `make figures` writes these again."""
    assert [file.stem for file in SAVED] == ["tiny-plt-1", "tiny-plt-2", "tiny-plt-3", "tiny-plt-4"]
    diagnoses = [Diagnosis.load(file) for file in SAVED]
    assert reproduction(diagnoses) == (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    for name, content in tables(diagnoses).items():
        assert content == (ROOT / "figures" / name).read_bytes(), name


# -- tables


def test_the_summary_has_every_measure_by_loop_with_its_interval():
    diagnosis = make(6, trained=4)
    told = rows(tables([diagnosis])["summary.csv"])
    found = {(row["measure"], int(row["loop"])): row for row in told}
    assert len(found) == len(told)
    curve = by_loop(diagnosis, "step_size")
    for index, loop in enumerate(curve.loop):
        row = found["step_size", loop]
        assert (row["model"], row["unit"]) == ("tiny", "residual stream")
        for end in ("mean", "low", "high"):
            assert float(row[end]) == pytest.approx(getattr(curve, end)[index], rel=1e-4)
        assert (row["extrapolated"] == "true") == (loop > 4)
        assert (row["below_noise"] == "true") == (loop in (5, 6))
    assert set(LEVELS) - {row["measure"] for row in told} == {"gate_by_position"}
    pooled = found["effective_rank_pooled", 2]
    assert (pooled["low"], pooled["high"]) == ("", "")


def test_the_shares_are_a_table_of_their_own():
    told = rows(tables(FAMILY)["refinement_shares.csv"])
    assert {row["model"] for row in told} == {"plt-3", "plt-4"}
    for measure, shares in refinement_shares(FAMILY[3]).items():
        ours = [float(row["share"]) for row in told if (row["model"], row["measure"]) == ("plt-4", measure)]
        np.testing.assert_allclose(ours, shares.mean, rtol=1e-4)


def test_exit_rules_have_a_table_where_they_were_measured():
    told = rows(tables([make()])["exit_rules.csv"])
    for rule in {row["rule"] for row in told} - {"oracle"}:
        marks = [row for row in told if row["rule"] == rule]
        assert sum(row["chosen"] == "true" for row in marks) == 1
        assert sum(row["published"] == "true" for row in marks) == (rule in ("latent", "kl", "entropy", "argmax"))
    (oracle,) = (row for row in told if row["rule"] == "oracle")
    assert (oracle["threshold"], oracle["loops"], oracle["utility"]) == ("", "1.7", "")
    assert "exit_rules.csv" not in tables([make(groups=("prediction",))])


# -- verdicts


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [([0.1, 0.2], [1, 1], AGREES), ([0.1, -1], [1, -0.1], DIFFERS), ([0.1, -0.1], [1, 1], OPEN), ([0], [1], OPEN)],
)
def test_a_verdict_is_what_the_intervals_allow(low, high, said):
    assert verdict(Estimate(np.zeros(len(low)), np.array(low), np.array(high))) == said


@pytest.mark.parametrize(
    ("says", "measure", "agreeing", "differing"),
    [
        ("Effective rank peaks", "effective_rank", (77, 79, 78, 77), (77, 78, 79, 77)),
        ("The first loop makes", "output_shift", (26.5, 1.75, 1.32, 1.58), (10, 1.75, 1.32, 1.58)),
        ("Dp falls after", "output_shift", (26.5, 1.75, 1.32, 1.58), (26.5, 1.75, 1.32, 1.9)),
        ("The last loop moves", "output_shift", (26.5, 1.75, 1.32, 1.58), (26.5, 1.75, 1.32, 1.1)),
        ("The last loop's step", "step_size", (900, 846, 464, 1014), (900, 846, 464, 400)),
        ("Updates turn back", "cos_update", (np.nan, -0.72, -0.46, 0.04), (np.nan, 0.2, 0.3, 0.4)),
        ("Turning back ends", "cos_update", (np.nan, -0.72, -0.46, 0.04), (np.nan, -0.72, -0.9, 0.04)),
        ("Attention re-routing", "attention_kl", (np.nan, 0.8, 0.4, 0.4), (np.nan, 0.8, 0.4, 0.9)),
        ("Heads grow", "head_cosine", (0.57, 0.67, 0.71, 0.8), (0.57, 0.67, 0.71, 0.6)),
        ("The gate", "gate_mean", (np.nan, 0.6, 0.6, 0.6), (np.nan, 0.6, 0.4, 0.6)),
        ("The offset distance", "omega", (np.nan, 54, 60, 51), (np.nan, 54, 70, 51)),
    ],
)
def test_each_point_follows_the_measured_pattern(says, measure, agreeing, differing):
    assert judge(point(says), with_curve(measure, *agreeing)) == AGREES
    assert judge(point(says), with_curve(measure, *differing)) == DIFFERS


def test_the_papers_own_numbers_pass_its_rules():
    for says in POINTS:
        values = REPORTED.get(says.measure)
        if values and 4 in values.values:
            # Where the paper names no loop 1, one that it must be below or above by its words.
            first = values.values.get(1, 100.0)
            levels = [values.values.get(loop, first) for loop in (1, 2, 3, 4)]
            assert judge(says, with_curve(says.measure, *levels, spread=1e-6)) == AGREES, says.says
    for shares in SHARES.values():
        assert sum(shares.values()) == 100
    assert max(BENCHMARKS, key=BENCHMARKS.get) == 2


def test_noise_makes_it_open():
    assert judge(point("Effective rank peaks"), with_curve("effective_rank", 78, 79, 78.5, 78, spread=0.2)) == OPEN


def test_what_a_model_cannot_show_is_not_judged():
    peaks, gate = point("Effective rank peaks"), point("The gate")
    assert judge(peaks, make(2)) == NONE
    assert judge(gate, make(gated=False)) == NONE
    assert judge(peaks, make(4, trained=2)) == NONE  # loops beyond training show nothing of the training
    assert judge(peaks, make(8, at=(1, 4, 8))) == NONE


def test_the_best_count_is_told_from_pairs_of_documents():
    """The four share their documents: a difference far smaller than the documents' spread is seen."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(12)
    family = [
        change(diagnosis, "nll_exit", loops, level + shared + 0.001 * rng.standard_normal(12))
        for loops, (diagnosis, level) in enumerate(zip(FAMILY, (3.4, 3.3, 3.36, 3.35), strict=True), 1)
    ]
    above, said = best_is_two(family)
    assert said == AGREES
    assert above["plt-4"].mean == pytest.approx(0.05, abs=0.002)
    assert best_is_two(family[:1]) is None
    assert best_is_two([*family, make(2, model="another", seed=9)]) is None
    for changes in ({"tokens": 9}, {"max_tokens": 9}, {"config": None}, {"config": {"d_model": 9}}):
        other = family[-1].data.assign_attrs(provenance=json.dumps(family[-1].provenance | changes))
        assert best_is_two([*family[:-1], Diagnosis(other)]) is None, changes


# -- the page


def test_the_page_has_a_row_for_every_point_and_a_column_for_every_model():
    page = reproduction(FAMILY)
    for says in POINTS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {says.says} |"))
        assert row.count("|") == 3 + len(FAMILY) + 1
        assert row.endswith(f"| {judge(says, FAMILY[3])} |")
    assert "| effective rank | paper |  | 174.6 | 172.5 | 158.2 |" in page
    assert "| token breadth | paper | 43 | 13 | 44 |" in page


def test_the_page_judges_loops_that_were_measured():
    """Of kept loops the last one of the training; where all are beyond it, nothing is judged."""
    page = reproduction([make(4, at=(1, 2, 3), trained=4, model="a")])
    assert "cannot tell" in page or "agrees" in page
    assert judge(POINTS[2], make(16, at=(8, 16), trained=4)) == NONE
    assert reproduction([make(16, at=(8, 16), trained=4)])


def test_the_page_stands_without_measures_that_were_not_taken():
    page = reproduction([make(groups=("prediction",)), make(8, at=(1, 2, 8), model="b", offset=False)])
    assert "nan" not in page
    assert "None" not in page
    with pytest.raises(DiagnosisError, match="same model and run"):
        reproduction([make(), make()])
