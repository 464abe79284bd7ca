"""The page of findings: verdicts from known truths, what is missing or held back, and that nothing claims too much."""

import json
from dataclasses import replace

import backtest
import findings
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from families import Family
from planted import diagnosis_of
from test_measured import made_up

from loopdiag.diagnosis import Diagnosis
from loopdiag.losses import SweepLosses

# Taxes of 0.10, 0.20 and 0.30 nats; at a price of 0.01 two loops are best with the offset, four without.
TAXED = [[3.2, 3.1, 3.1, 3.1], [3.2, 3.0, 2.9, 2.8]]
ALIKE = [[3.2, 3.1, 3.1, 3.1], [3.2, 3.1, 3.1, 3.1]]
HEADINGS = 7


def sweep(truth=TAXED, seeds=3, spread=0.001, **drawn):
    """A sweep that was trained with each seed alike, but for a little."""
    return made_up(truth, seeds=seeds, spread=spread, noise=0.0001, **drawn)


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """Writes sweeps and returns the page; `code` and `code-narrow` are to choose on, `b` is unseen."""
    families = [
        Family("code", "choose", "bundled", "tiny", 1000, seeds=3),
        Family("code-narrow", "choose", "bundled", "tiny", 1000),
        Family("b", "unseen", "b", "tiny", 1000),
    ]
    for module in (backtest, findings):
        monkeypatch.setattr(module, "SWEEPS", tmp_path)
        monkeypatch.setattr(module, "FAMILIES", families)
    for module in (backtest, findings):
        monkeypatch.setattr(module, "CHOSEN", tmp_path / "chosen.json")

    def place(**sweeps):
        for name, losses in sweeps.items():
            (tmp_path / name.replace("_", "-")).mkdir(exist_ok=True)
            losses.save(tmp_path / name.replace("_", "-") / "sweep.nc")
        return findings.page()

    return place


def cells(text):
    """The rows of the tables of a text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


# -- question 1 -----------------------------------------------------------------------------------------


def test_a_clear_tax_of_three_seeds():
    """All three taxes, and their rise, are counted."""
    said = findings.of_the_tax({"code": sweep()})
    assert "Counted: 1 row with 3 trainings of each model or more." in said
    assert "Of their 3 taxes 3 are above 0, 0 below, and 0 cannot be told from it (" in said
    assert "A change of the tax between two loop counts is told from 0 in 1 of 1 row: there the tax is not" in said
    assert "fewer trainings" not in said
    _, _, row = cells(said.partition("###")[0])
    assert row[:3] == ["code", "first", "3 trainings"]
    assert [float(cell.split()[0]) for cell in row[3:]] == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.2, 0.1], abs=0.01)


def test_one_training_claims_nothing():
    """However clear it looks."""
    said = findings.of_the_tax({"code-narrow": sweep(seeds=1)})
    assert "Nothing is claimed yet: no row has 3 trainings of each model. 1 row of fewer trainings is shown" in said
    assert "above 0" not in said
    assert cells(said)[2][2] == "one training"
    assert "No sweep has 3 trainings" in said.partition("### Over training")[2]
    both = findings.of_the_tax({"code": sweep(), "code-narrow": sweep([TAXED[1], TAXED[0]], seeds=2)})
    assert "Of their 3 taxes 3 are above 0, 0 below" in both
    assert "1 row of fewer trainings is shown" in both
    assert cells(both)[3][2] == "2 trainings"


def test_a_tax_that_cannot_be_told():
    """Trainings that differ by more than the tax: neither a tax, nor that it changes."""
    said = findings.of_the_tax({"code": sweep(ALIKE, spread=0.2)})
    assert "0 are above 0, 0 below, and 3 cannot be told" in said
    assert "is told from 0 in 0 of 1 row" in said
    assert "a constant tax is not ruled out" in said


def test_a_tax_that_is_constant_is_not_ruled_out():
    """0.1 nats at every loop count."""
    said = findings.of_the_tax({"code": sweep([[3.2, 3.1, 3.1, 3.1], [3.2, 3.0, 3.0, 3.0]], spread=0.0005, seed=1)})
    assert "3 are above 0" in said
    assert "a constant tax is not ruled out" in said


def test_a_tax_that_is_higher_in_the_middle_is_not_constant():
    """Though first and last are the same."""
    said = findings.of_the_tax({"code": sweep([[3.2, 3.1, 3.2, 3.1], [3.2, 3.0, 3.0, 3.0]])})
    assert "is told from 0 in 1 of 1 row: there the tax is not constant." in said


def test_the_tax_over_training():
    """A tax that doubles from the first look to the last; made-up sweeps look twice."""
    losses = sweep()
    early = losses.data["nll_look"][:, :, :, :, 0]
    early[:, :, 0] = early[:, :, 1] + (early[:, :, 0] - early[:, :, 1]) / 2
    said = findings.of_the_tax_over_training({"code": losses})
    _, _, half, whole, change = cells(said)
    assert (half[2], whole[2], change[2]) == ("0.0005M (50%)", "0.001M (100%)", "change, first to last")
    for row, truth in ((half, [0.05, 0.1, 0.15]), (whole, [0.1, 0.2, 0.3]), (change, [0.05, 0.1, 0.15])):
        assert [float(cell.split()[0]) for cell in row[3:]] == pytest.approx(truth, abs=0.01)
    assert "Of 3 taxes, from the first of these looks to the last 3 rise, 0 fall" in said
    assert "an earlier look is not what a shorter training would have given" in said


# -- question 2 -----------------------------------------------------------------------------------------


def test_the_best_count_moves():
    """By least loss: told where each wiring loses by the other one's best count, over three trainings."""
    falls, rises = [3.2, 3.1, 3.0, 2.9], [3.2, 3.3, 3.4, 3.5]
    sweeps = {
        "code": sweep([rises, falls]),
        "p_hop": sweep([falls, rises]),
        "addition": sweep([rises, rises]),
        "brackets": sweep([rises, falls], seeds=1),
        "unigram": sweep([rises, falls], spread=0.5),
    }
    said = findings.of_the_best(sweeps)
    assert "Counted: 4 rows with 3 trainings" in said
    assert "1 row of fewer trainings is shown, but not counted" in said
    rows = {row[0]: row for row in cells(said)}
    assert (rows["code"][5:7], rows["p_hop"][5:7], rows["addition"][5:9]) == (
        ["1", "4"],
        ["4", "1"],
        ["1", "1", "-", "-"],
    )
    assert [float(cell.split()[0]) for cell in rows["code"][7:9]] == pytest.approx([0.3, 0.3], abs=0.01)
    assert rows["unigram"][5] != rows["unigram"][6]
    assert "is the same with the offset and without in 1, and differs in 3, of which 2 can be told" in said
    assert "without the offset it is higher in 1, lower in 1." in said
    assert (rows["code"][9].split()[0], rows["code"][10].split()[0]) == ("1", "4")


def test_one_training_moves_nothing():
    said = findings.of_the_best({"code": sweep(seeds=1)})
    assert "Nothing is claimed yet" in said
    assert "higher" not in said


# -- question 3 -----------------------------------------------------------------------------------------


def tracked(groups, sign=1):
    """Models of sweeps (name, data) whose first number tracks the tax within loop counts, and which the counts hide."""
    random, found = np.random.default_rng(0), findings.Tracked([], [], [], [], [], {"tracks": [], "noise": []})
    for name, data in groups:
        for loops in (2, 3, 4):
            for tax in random.standard_normal(6):
                found.sweep.append(name)
                found.data.append(data)
                found.memory.append("first")
                found.loops.append(loops)
                found.tax.append(tax + 10 * loops)
                found.numbers["tracks"].append(sign * (tax - 10 * loops))
                found.numbers["noise"].append(random.standard_normal())
    return found


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_tracks_the_tax(sign):
    """Within loop counts, though over them it goes the other way; of enough data sets."""
    models = tracked([(f"s{n}", f"d{n}") for n in range(5)], sign)
    found, noise = (findings.correlated(models, name, same_loops=True) for name in ("tracks", "noise"))
    assert (found.mean, found.low, found.high) == (pytest.approx(sign),) * 3
    assert found.clear
    assert (found.groups, found.data_sets) == (15, 5)
    assert noise.low < 0 < noise.high
    assert not noise.clear
    assert sign * findings.correlated(models, "tracks", same_loops=False).mean < 0


def test_intervals_are_over_data_sets():
    """By hand: correlations of 1, 1, 1, -1, -1 have the mean 0.2 and a standard error of 1.095 / sqrt(5)."""
    models = tracked([(f"s{n}", f"d{n}") for n in range(5)])
    turned = [
        value * (-1 if name in ("s3", "s4") else 1)
        for value, name in zip(models.numbers["tracks"], models.sweep, strict=True)
    ]
    found = findings.correlated(replace(models, numbers={"n": turned}), "n", same_loops=True)
    assert (found.mean, found.high) == (pytest.approx(0.2), pytest.approx(0.2 + 2.7764 * 1.0954 / 5**0.5, abs=1e-3))


def test_few_data_sets_claim_nothing(monkeypatch):
    """Sweeps of one text are one."""
    models = tracked([(f"s{n}", "one text") for n in range(5)])
    found = findings.correlated(models, "tracks", same_loops=True)
    assert (found.data_sets, found.mean, found.clear) == (1, pytest.approx(1), False)
    monkeypatch.setattr(findings, "tracked", lambda sweeps: models)
    said = findings.of_the_trackers({})
    assert "Nothing is claimed: data sets are 1, fewer than 5" in said
    assert cells(said)[2][0::2] == ["tracks", "+1.00, 15 of 1"]


def test_groups_that_cannot_be_ranked():
    """Two models, missing numbers, and numbers that are all the same."""
    numbers = {"n": [1.0, 2, 3, np.nan, 1, 2]}
    memory = ["first"] * 6
    taxes = [0.1, 0.2, 0.3, 0.0, 0.1, 0.2]
    models = findings.Tracked([*"aaaabb"], [*"aaaabb"], memory, [2, 3, 4, 4, 2, 3], taxes, numbers)
    found = findings.correlated(models, "n", same_loops=False)
    assert (found.mean, found.groups, found.data_sets) == (pytest.approx(1), 1, 1)
    assert findings.correlated(models, "n", same_loops=True) is None
    apart = replace(models, memory=["first", "own", "own", "own", "own", "own"])
    assert findings.correlated(apart, "n", same_loops=False) is None
    assert findings.correlated(replace(models, numbers={"n": [1.0] * 6}), "n", same_loops=False) is None


def test_numbers_of_planted_checkpoints(placed, tmp_path):
    """The cost of the last loop goes with the tax by hand: 0.05 + 0.1 * R planted against 0.1, 0.2, 0.3 measured."""
    placed(code_narrow=sweep(seeds=1))
    (tmp_path / "code-narrow" / "diagnoses").mkdir()
    for loops in (2, 3, 4):
        planted = diagnosis_of([[4.0, 3.5, 3.2, 3.1][:loops]] * 4, churn=0.05 + 0.1 * loops)
        planted = Diagnosis(planted.data[["nll_exit", "cost", "gain", "omega", "withheld"]])
        planted.save(tmp_path / "code-narrow" / "diagnoses" / f"loops{loops}-offset1-first-seed0.nc")
    models = findings.tracked({"code-narrow": sweep(seeds=1)})
    assert models.loops == [2, 3, 4]
    assert models.tax == pytest.approx([0.1, 0.2, 0.3], abs=0.01)
    assert models.numbers["cost of the last loop"] == pytest.approx([0.25, 0.35, 0.45])
    assert models.numbers["cost of all loops from 2 on"] == pytest.approx([0.25, 0.7, 1.35])
    assert models.numbers["cost over gain of the last loop"] == pytest.approx([0.25 / 0.75, 0.35 / 0.65, 0.45 / 0.55])
    assert np.isnan(models.numbers["Omega over the carry's norm"]).all()
    said = findings.of_the_trackers({"code-narrow": sweep(seeds=1)})
    assert "Omega over" not in said
    assert "| cost of the last loop | +1.00, 1 of 1 | - |" in said
    assert f"| {findings.PLACEBO} | +1.00, 1 of 1 | - |" in said


# -- question 4 -----------------------------------------------------------------------------------------


def test_which_one_limits_later_loops():
    """L(1) - L(4) by memory and offset: 0.1 and 0.4 shared, 0.15 and 0.5 own."""
    truth = [TAXED, [[3.2, 3.15, 3.1, 3.05], [3.2, 3.05, 2.9, 2.7]]]
    said = findings.of_the_limits({"code": sweep(truth, memories=2)})
    row = cells(said)[2]
    assert [float(cell.split()[0]) for cell in row[2:]] == pytest.approx(
        [0.1, 0.4, 0.15, 0.5, 0.3, 0.05, 0.25], abs=0.01
    )
    assert "without the offset in 1 (less in 0), and more with a memory of their own in 1 (less in 0)" in said
    assert "the offset limits them more than the shared memory in 1, less in 0" in said
    assert "Nothing is claimed yet" in findings.of_the_limits({"code": sweep(truth, memories=2, seeds=2)})
    assert "No sweep with both memories" in findings.of_the_limits({"code": sweep()})


# -- the rest of the page -------------------------------------------------------------------------------


def test_how_they_were_trained():
    """Rates by loop count, and what the search saw, as means over wirings."""
    losses = sweep()
    losses.data["learning_rate"][:] = [0.003, 0.006, 0.003, np.nan]
    nll = np.ones((1, 2, 4, 2)) * np.arange(1, 5)[:, None]
    nll[0, 1, 1] += 1  # without the offset, two loops
    nll[0, :, 2], nll[0, 0, 3, 1] = np.nan, np.inf
    losses.data["search_nll"] = (("memory", "offset", "loops", "rate"), nll)
    losses.data.coords["rate"] = [0.0015, 0.003]
    losses.data.attrs["provenance"] = json.dumps(losses.provenance | {"search_tokens": 400})
    said = findings.of_the_training({"code": losses, "b": sweep()})
    assert "| code | 1,000 | 0.003 / 0.006 / 0.003 / - | 2.7" in said
    assert "| code | 400 | 2 of 2 | 0.0015 | 1.000 / 2.500 / - / 4.000 |" in said
    assert "| code | 400 | 2 of 2 | 0.003 | 1.000 / 2.500 / - / diverged |" in said
    assert "| b | 1,000 | 0.003 / 0.003 / 0.003 / 0.003 | 2.7" in said
    of_task = sweep()
    of_task.data.attrs["provenance"] = json.dumps(of_task.provenance | {"data": "unigram"})
    entropy = scipy.stats.entropy(1 / np.arange(1, 64))
    assert f" | {entropy:.3f} |" in findings.of_the_training({"unigram": of_task})
    assert "| b | 0" not in said


def test_what_a_loop_is_worth():
    """One size cannot tell, nor can two that were trained on different texts; the verdict is the library's."""
    assert "not told yet, code-narrow not being trained" in findings.of_the_exponent({"code": sweep()})
    said = findings.of_the_exponent({"code": sweep(), "code-narrow": sweep(seeds=1)})
    assert said.count("The data cannot tell what a loop is worth: ") == 2
    other = sweep()
    other.data.attrs["provenance"] = json.dumps(other.provenance | {"text_sha256": "1"})
    assert "The sweeps differ in text" in findings.of_the_exponent({"code": sweep(), "code-narrow": other})


def test_a_page_of_nothing(placed):
    """Every sweep is missing or held back, and no figure is linked."""
    page = placed()
    assert "**Not trained yet**: code (0 of 24 places), code-narrow (0 of 8 places)." in page
    assert "**Held back** for the score of question 5, trained or not: b. No rule is chosen yet" in page
    assert page.count("\n## ") == HEADINGS
    assert "![" not in page
    assert "nan" not in page.lower()


def test_a_page_of_a_part(placed):
    """Models that are missing: a seed without some is left out, and so is a row without any whole seed."""
    page = placed(
        code=sweep(missing=[(2, 0, 0, 3)]),
        code_narrow=sweep(seeds=1, missing=[(0, 0, 1, 2)]),
        b=SweepLosses(xr.Dataset(attrs={"provenance": '{"schema": 1}'})),  # would fail if it were looked at
    )
    assert "**Not trained yet**: code (23 of 24 places), code-narrow (7 of 8 places)." in page
    assert "| code | first | 2 trainings |" in page
    assert "| code-narrow | first |" not in page
    assert "seed0.nc is missing" in page  # a diagnosis, which the rules see
    assert str(findings.ROOT) not in page
    assert "nan" not in page.lower()


def test_a_whole_page(placed, tmp_path, monkeypatch):
    """Before the choice without the unseen half, after it with its score, the rule's aims and its calibration."""
    monkeypatch.setattr(backtest, "committed", lambda file: True)
    sweeps = {"code": sweep(), "code-narrow": sweep(seeds=1), "b": sweep(seeds=1)}
    planted = diagnosis_of([[4.0, 3.5, 3.2, 3.1]] * 40)
    case = backtest.rules(planted, 0.01)
    monkeypatch.setattr(backtest, "rules", lambda diagnosis, price: case)
    monkeypatch.setattr(backtest.Diagnosis, "load", lambda file: planted)
    for name, losses in sweeps.items():
        (tmp_path / name / "diagnoses").mkdir(parents=True)
        for seed in losses.data["seed"].values:
            for offset in (1, 0):
                (tmp_path / name / "diagnoses" / f"loops4-offset{offset}-first-seed{seed}.nc").touch()
    page = placed(code=sweeps["code"], code_narrow=sweeps["code-narrow"], b=sweeps["b"])
    assert "All sweeps that are shown are complete." in page
    assert "No rule is chosen yet; **" in page
    assert "(least regret so far)" in page
    assert "### Half `choose`: 4 families, data sets: 1" in page
    assert "unseen`" not in page
    assert not [row for row in cells(page) if row[0] == "b"]
    assert "losses_over_training.png" in page
    rule = backtest.choose(0.01)
    (tmp_path / "b" / "sweep.nc").rename(tmp_path / "later")
    assert "A rule is chosen. It is scored when the unseen half is completely trained." in placed()
    (tmp_path / "later").rename(tmp_path / "b" / "sweep.nc")
    page = placed()
    assert "Held back" not in page
    assert f"The rule chosen on the half `choose` is **{rule}**. On the unseen half its regret is" in page
    assert "aim: below 0.01" in page
    assert "### Half `unseen`: 2 families, data sets: 1" in page
    assert page.count("No intervals over data sets, of which there are 1: fewer than 5") == 2
    assert page.count("| above 95 % |") == 2
    assert [row for row in cells(page) if row[0] == "b"]
    assert "nan" not in page.lower()
