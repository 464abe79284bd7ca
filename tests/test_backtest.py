"""The backtest: what a rule loses, when it hits, and that the unseen half has no say in what is chosen."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import backtest
import families
import numpy as np
import pytest
from families import FAMILIES, Family, docstrings, trim
from planted import diagnosis_of
from scipy.stats import ttest_1samp
from synthetic import make
from test_measured import made_up

from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import measured
from loopdiag.gaincost.decision import predict
from loopdiag.gaincost.lenses import INPUTS
from loopdiag.losses import SweepLosses
from loopdiag.sweep import sources

# Losses of one to four loops with the offset and without: at a price of 0.01 two loops are best with it, three without.
TRUTH = [[3.20, 3.10, 3.15, 3.14], [3.20, 3.18, 3.12, 3.13]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two families, one of each half, whose four-loop models have lenses that were planted."""
    folder = tmp_path_factory.mktemp("sweeps")
    # The rank peaks at 2 in family a, whatever the offset, and at 1 in family b; the output shift's knee is at 3.
    for name, peak in (("a", 2), ("b", 1)):
        (folder / name / "diagnoses").mkdir(parents=True)
        made_up(TRUTH, noise=0.001, seeds=2).save(folder / name / "sweep.nc")
        rank = [9.0, 50.0, 50.0, 40.0, 30.0]
        rank[peak] = 60.0
        curves = {"effective_rank": rank, "output_shift": [np.nan, 9, 2, 1.9, 0.1]}
        planted = diagnosis_of([[4.0, 3.5, 3.2, 3.1]] * 40, curves=curves)
        planted = Diagnosis(planted.data[["nll_exit", *INPUTS]])  # the others take their time to write and read
        for offset in (1, 0):
            for seed in (0, 1):
                planted.save(folder / name / "diagnoses" / f"loops4-offset{offset}-first-seed{seed}.nc")
    return folder


@pytest.fixture
def sweeps(folder, found, tmp_path, monkeypatch):
    """Where they are, in a repository of their own, with no rule chosen; cases are not made again."""
    monkeypatch.setattr(backtest, "cases", lambda price, half: [case for case in found if case.half == half])
    monkeypatch.setattr(backtest, "SWEEPS", folder)
    monkeypatch.setattr(backtest, "CHOSEN", tmp_path / "chosen.json")
    families = [Family(name, half, name, "tiny", 1000, seeds=2) for name, half in (("a", "choose"), ("b", "unseen"))]
    monkeypatch.setattr(backtest, "FAMILIES", families)
    git(tmp_path, "init", "-q")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """Every case of both halves."""
    families = [Family(name, half, name, "tiny", 1000, seeds=2) for name, half in (("a", "choose"), ("b", "unseen"))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backtest, "SWEEPS", folder)
        patched.setattr(backtest, "FAMILIES", families)
        return [case for half in backtest.HALVES for case in backtest.cases(0.01, half)]


def git(folder, *arguments):
    about = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *about, *arguments], cwd=folder, check=True, capture_output=True)


def commit():
    """The choice."""
    git(backtest.CHOSEN.parent, "add", "chosen.json")
    git(backtest.CHOSEN.parent, "commit", "-qm", "the rule")


def test_every_checkpoint_is_a_case(found):
    """Two families, two offsets, two seeds; each with the truth of its own offset."""
    assert [(case.family, case.half, case.offset, case.seed) for case in found] == [
        (data, half, offset, seed)
        for data, half in (("a", "choose"), ("b", "unseen"))
        for offset in (1, 0)
        for seed in (0, 1)
    ]
    assert [case.best for case in found] == [2, 2, 3, 3] * 2


def test_regret_and_hits_by_hand(found):
    """With the offset, two loops are best: utility -3.11, against -3.20 of one and -3.17 of both three and four."""
    with_offset = found[0]
    assert with_offset.picks["rank_peak"] == 2
    assert with_offset.picks["shift_knee"] == 3
    assert with_offset.regret("rank_peak") == 0
    assert with_offset.hit("rank_peak")
    assert with_offset.regret("shift_knee") == pytest.approx(0.06, abs=0.002)
    assert not with_offset.hit("shift_knee")
    assert with_offset.regret("always 1") == pytest.approx(0.09, abs=0.002)
    assert with_offset.regret("always max") == pytest.approx(0.06, abs=0.002)
    assert backtest.score([with_offset], "always 2")["regret"] == 0
    assert with_offset.regret("always 2") == 0


def test_scores_weigh_data_sets_alike(found):
    """Each is a mean over data sets of means over families of means over their checkpoints."""
    scored = backtest.score(found, "always 2")
    assert (scored["families"], scored["data_sets"]) == (4, 2)
    assert scored["hits"] == 0.5
    assert scored["regret"] == pytest.approx(0.05 / 2, abs=0.002)  # without the offset three are best: -3.14, not -3.19
    more = [*found, *(case for case in found if case.offset == 1 and case.family == "a")]
    assert backtest.score(more, "always 2")["regret"] == pytest.approx(scored["regret"])
    others = [replace(case, family="a, larger") for case in found if case.data == "a" and case.offset == 1]
    scored = backtest.score([*found, *others], "always 2")
    assert (scored["families"], scored["data_sets"]) == (5, 2)
    assert scored["hits"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # over families it would be 3 / 5


def of_data_sets(regrets, found):
    """A case for each data set, whose regret with `always 2` is given and with `always 1` is 0."""
    return [
        replace(found[0], data=f"{n}", family=f"{n}", utility={1: 0.0, 2: -regret, 3: -0.5, 4: -0.5})
        for n, regret in enumerate(regrets)
    ]


def test_intervals_are_those_of_a_t_test_over_data_sets(found):
    """Of scipy, for a score and for a difference of two; a second family of a data set moves its mean, and no more."""
    regrets = [0.01, 0.02, 0.05, 0.0, 0.03, 0.02]
    several = of_data_sets(regrets, found)
    scored = backtest.score(several, "always 2")
    outside = ttest_1samp(regrets, 0).confidence_interval(0.95)
    assert (scored["regret_low"], scored["regret_high"]) == pytest.approx((outside.low, outside.high))
    differences = {row["baseline"]: row for row in backtest.against(several, "always 2")}
    assert set(differences) == {"always 1", "always max", "exit NLL", "paper_rule"}
    outside = ttest_1samp([regret - 0.5 for regret in regrets], 0).confidence_interval(0.95)
    told = differences["always max"]
    assert told["difference"] == pytest.approx(np.mean(regrets) - 0.5)
    assert (told["difference_low"], told["difference_high"]) == pytest.approx((outside.low, outside.high))
    second = [replace(of_data_sets([0.07], found)[0], family="another")]
    outside = ttest_1samp([0.04, *regrets[1:]], 0).confidence_interval(0.95)
    scored = backtest.score([*several, *second], "always 2")
    assert (scored["regret_low"], scored["regret_high"]) == pytest.approx((outside.low, outside.high))


def test_differences_are_paired(found):
    """Data sets whose regrets are far apart, and whose difference is the same in each, leave no doubt of it."""
    several = [
        replace(case, utility={1: -0.01 - worst, 2: -worst, 3: 0.0, 4: -0.5})
        for worst, case in zip((0.1, 0.2, 0.3, 0.4, 0.5), of_data_sets([0.0] * 5, found), strict=True)
    ]
    told = {row["baseline"]: row for row in backtest.against(several, "always 2")}["always 1"]
    values = [told[f"difference{end}"] for end in ("", "_low", "_high")]
    assert values == pytest.approx([-0.01] * 3)


def test_few_data_sets_have_no_interval(found):
    """Five have, whatever the families of each."""
    several = [replace(case, data=f"{n}", family=f"{n}") for n in range(5) for case in found]
    scored = backtest.score(several, "always 2")
    assert scored["regret_low"] <= scored["regret"] <= scored["regret_high"]
    assert backtest.why_no_interval([scored]) == ""
    for few in (several[: 4 * len(found)], [replace(case, data="one text") for case in several]):
        scored = backtest.score(few, "always 2")
        assert scored["regret_low"] is scored["regret_high"] is scored["hits_low"] is None
        assert f"of which there are {scored['data_sets']}: fewer than 5" in backtest.why_no_interval([scored])
        assert backtest.text(scored, "hits", ".0%") == "50%"


def test_support_is_the_share_of_resamples_that_agree():
    """Documents of which 24 have their rank's peak at 2 and 16 slightly lower at 3: the mean's peak is near a draw."""
    rank = np.tile([9.0, 50.0, 60.0, 50.0, 30.0], (40, 1))
    rank[24:] = [9.0, 50.0, 50.0, 64.0, 30.0]
    planted = diagnosis_of([[4.0, 3.5, 3.2, 3.1]] * 40)
    planted.data["effective_rank"][:] = rank
    picks, support = backtest.rules(planted, 0.01)
    assert set(picks) == set(support)
    assert picks["rank_peak"] == 2
    share = np.random.default_rng(1).binomial(40, 0.6, 100_000) / 40  # of documents with the first of both
    assert support["rank_peak"] == pytest.approx((50 + 10 * share > 64 - 14 * share).mean(), abs=0.1)
    assert 0.5 < support["rank_peak"] < 0.8
    assert support["shift_knee"] == 1  # documents are alike in it
    assert {rule: share for rule, share in support.items() if rule.startswith("always")} == dict.fromkeys(
        ("always 1", "always 2", "always max"), 1.0
    )
    assert support["exit NLL"] == 1


def test_calibration_by_hand(found):
    """Of the first family's four cases with `always 2`, the two with the offset hit."""
    four = [
        replace(case, support={"always 2": support})
        for case, support in zip(found[:4], (0.99, 0.95, 0.6, 0.4), strict=True)
    ]
    told = backtest.calibration(four, "always 2")
    assert [(row["support"], row["cases"], row["mean_support"], row["hits"]) for row in told["bins"]] == [
        ("below 50 %", 1, 0.4, 0.0),
        ("50 to 80 %", 1, 0.6, 0.0),
        ("80 to 95 %", 1, 0.95, 1.0),
        ("above 95 %", 1, 0.99, 1.0),
    ]
    assert told["support_less_hits"] == pytest.approx(((0.99 - 1 + 0.95 - 1) / 2 + (0.6 + 0.4) / 2) / 2)
    assert told["support_less_hits_low"] is None
    empty = backtest.calibration(four[:1], "always 2")["bins"][0]
    assert (empty["cases"], empty["mean_support"], empty["hits"]) == (0, None, None)
    assert backtest.calibration_rows(told)[2] == ("80 to 95 %", "1", "95%", "100%")
    assert backtest.calibration_rows(backtest.calibration(four[:1], "always 2"))[0] == ("below 50 %", "0", "-", "-")


def test_nothing_of_the_unseen_half_is_read_before_the_choice(sweeps, monkeypatch, tmp_path, capsys):
    """Not by scoring, and not by choosing."""
    read, cases, load = [], backtest.cases, SweepLosses.load
    monkeypatch.setattr(SweepLosses, "load", lambda path: read.append(path) or load(path))
    monkeypatch.setattr(backtest, "cases", lambda price, half: read.append(Path(half)) or cases(price, half))
    told = backtest.backtest(0.01)
    assert (set(told["scores"]), told["final"]) == ({"choose"}, False)
    regrets = {row["rule"]: row["regret"] for row in told["scores"]["choose"]}
    assert regrets[told["chosen"]] == min(regrets.values())
    assert {case["half"] for case in told["cases"]} == {"choose"}
    with pytest.raises(backtest.Refused, match="No rule is chosen yet"):
        backtest.backtest(0.01, unseen=True)
    assert backtest.choose(0.01) == told["chosen"]
    with pytest.raises(backtest.Refused, match="not committed"):
        backtest.backtest(0.01, unseen=True)
    with pytest.raises(SystemExit, match="1"):
        backtest.main(["--unseen"])
    assert "not committed" in capsys.readouterr().err
    backtest.main(["--json", str(tmp_path / "told.json")])
    shown = capsys.readouterr().out
    assert "least regret so far" in shown
    assert "unseen" not in shown
    assert f"choose: {told['chosen']} in each family" in shown
    assert "In 2 of 2 families, with fewer than 3 seeds, it is over documents alone" in " ".join(shown.split())
    assert "no such family" in " ".join(shown.split())
    assert (told["floor"], told["leave_one_out"]) == ({"choose": None}, {})
    assert {row["baseline"] for row in told["against"]["choose"]} == set(backtest.BASELINES) - {told["chosen"]}
    assert "No intervals over data sets, of which there are 1: fewer than 5" in " ".join(shown.split())
    json.loads((tmp_path / "told.json").read_text())
    assert set(read) == {Path("choose"), sweeps / "a" / "sweep.nc"}


def test_the_unseen_half_is_scored_by_the_rule_on_file(sweeps, capsys):
    """Whatever would do best on either half; at the price that it was chosen at, and as it was committed."""
    backtest.choose(0.01)
    told = json.loads(backtest.CHOSEN.read_text())
    backtest.CHOSEN.write_text(json.dumps(told | {"rule": "always 1"}))
    commit()
    told = backtest.backtest(0.01, unseen=True)
    json.dumps(told, allow_nan=False)
    assert (told["chosen"], told["final"], set(told["scores"])) == ("always 1", True, {"choose", "unseen"})
    assert told["calibration"]["unseen"]["rule"] == "always 1"
    backtest.main(["--unseen"])
    assert "always 1 (chosen)" in capsys.readouterr().out
    with pytest.raises(backtest.Refused, match=r"at a price of 0\.01, not 0\.02"):
        backtest.backtest(0.02, unseen=True)
    with pytest.raises(backtest.Refused, match="made once"):
        backtest.choose(0.01)
    backtest.CHOSEN.write_text(backtest.CHOSEN.read_text().replace("always 1", "always 2"))
    with pytest.raises(backtest.Refused, match="not committed as it is"):
        backtest.backtest(0.01, unseen=True)


def test_the_unseen_half_is_not_scored_in_part(sweeps, monkeypatch):
    """Each look at what is trained so far would be one more; no case of it is made."""
    backtest.choose(0.01)
    commit()
    made, cases = [], backtest.cases
    monkeypatch.setattr(backtest, "cases", lambda price, half: made.append(half) or cases(price, half))
    monkeypatch.setattr(backtest, "FAMILIES", [backtest.FAMILIES[0], replace(backtest.FAMILIES[1], seeds=3)])
    with pytest.raises(backtest.Refused, match=r"`unseen` is scored once, .* trained: b .16 of 24 places"):
        backtest.backtest(0.01, unseen=True)
    assert made == []
    assert set(backtest.backtest(0.01)["scores"]) == {"choose"}


@pytest.mark.parametrize(
    ("asked", "said"), [({"seeds": 3}, "a .16 of 24 places"), ({"memories": ("first", "own")}, "a .16 of 32 places")]
)
def test_an_incomplete_half_chooses_nothing(sweeps, monkeypatch, asked, said):
    """Counted against what the family is to have, not against what its sweep holds."""
    backtest.choose(0.01)
    commit()
    monkeypatch.setattr(backtest, "FAMILIES", [replace(backtest.FAMILIES[0], **asked), backtest.FAMILIES[1]])
    with pytest.raises(backtest.Refused, match=said):
        backtest.backtest(0.01, unseen=True)
    backtest.CHOSEN.unlink()
    with pytest.raises(backtest.Refused, match=said):
        backtest.choose(0.01)
    assert not backtest.CHOSEN.exists()
    assert backtest.backtest(0.01)["incomplete"]


def alone(folder, monkeypatch, losses, **asked):
    """One family, of the half to choose on, with these losses, whose diagnoses are not read."""
    monkeypatch.setattr(backtest, "SWEEPS", folder)
    monkeypatch.setattr(backtest, "FAMILIES", [Family("a", "choose", "a", "tiny", 1000, **asked)])
    monkeypatch.setattr(backtest, "rules", lambda diagnosis, price: ({"always 2": 2}, {"always 2": 1.0}))
    monkeypatch.setattr(Diagnosis, "load", lambda file: None)
    (folder / "a" / "diagnoses").mkdir(parents=True)
    for seed, memory, offset in np.ndindex(losses.data["nll"].shape[:3]):
        name = f"loops4-offset{1 - offset}-{('first', 'own')[memory]}-seed{seed}.nc"
        (folder / "a" / "diagnoses" / name).touch()
    losses.save(folder / "a" / "sweep.nc")


def test_places_that_are_not_trained_are_not_counted(tmp_path, monkeypatch):
    """One model of eight is missing, and its seed no case; of a sweep that is not there, all are."""
    alone(tmp_path, monkeypatch, made_up(TRUTH, missing=[(0, 0, 1, 2)]))
    assert backtest.incomplete("choose") == ["a (7 of 8 places)"]
    assert backtest.diverged("choose") == []
    assert [case.offset for case in backtest.cases(0.01, "choose")] == [1]
    monkeypatch.setattr(backtest, "FAMILIES", [Family("b", "choose", "b", "tiny", 1000)])
    assert backtest.incomplete("choose") == ["b (0 of 8 places)"]


@pytest.mark.parametrize(
    ("cell", "places", "left_out"),
    [
        ("loops3-offset0-own-seed1", [(1, 1, 1, 2)], ["a, offset 0, memory own, seed 1"]),
        (
            "loops1-offset1-first-seed0",  # it stands at every offset and memory
            [(0, memory, offset, 0) for memory in (0, 1) for offset in (0, 1)],
            [f"a, offset {offset}, memory {memory}, seed 0" for memory in ("first", "own") for offset in (1, 0)],
        ),
    ],
)
def test_a_diverged_model_is_measured_but_its_seed_left_out(cell, places, left_out, tmp_path, monkeypatch, capsys):
    """It does not keep the rule from being chosen for ever; and it is named."""
    losses = made_up(TRUTH, seeds=2, memories=2, missing=places)
    losses.data.attrs["provenance"] = json.dumps(losses.provenance | {"diverged": [cell]})
    alone(tmp_path, monkeypatch, losses, memories=("first", "own"), seeds=2)
    monkeypatch.setattr(backtest, "BASELINES", ("always 2",))
    monkeypatch.setattr(backtest, "CHOSEN", tmp_path / "chosen.json")
    assert backtest.incomplete("choose") == []
    told = backtest.backtest(0.01)
    assert sorted(told["diverged"]) == sorted(left_out)
    assert len(told["cases"]) == 8 - len(left_out)
    assert backtest.choose(0.01) == "always 2"
    backtest.main([])
    assert f"Left out, since a training diverged: {left_out[0]}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seeds", [1, 2, 3, 4])
def test_errors_are_those_that_the_recommender_decides_by(seeds, monkeypatch):
    """Over documents with fewer than three seeds; and then hits are stricter than with three."""
    losses = made_up(TRUTH, noise=0.05, spread=0.05, seeds=seeds)
    asked, decide = [], measured.decide
    monkeypatch.setattr(measured, "decide", lambda *given: asked.append(given) or decide(*given))
    measured.recommend_training(losses, 0.01, offset=1)
    (_, _, errors, *_), nll = asked[0], losses.data["nll"].sel(offset=1, memory="first")
    for best in range(4):
        found = backtest._errors(nll.transpose("seed", "document", "loops").values, nll["source"].values, best)
        np.testing.assert_allclose(found, errors[:, best], rtol=1e-9, atol=1e-12)


def test_the_noise_floor_by_hand(found):
    """Seeds whose best counts are 1, 1 and 2, and whose others would each pick the wrong one."""
    by_seed = np.array([[0.5, 0.3], [0.5, 0.4], [0.0, 0.3]])
    # Others' sums: (0.5, 0.7), (0.5, 0.6), (1.0, 0.7): picks 2, 2 and 1.
    assert backtest._floors(by_seed) == pytest.approx([0.2, 0.1, 0.3])
    assert backtest._floors(by_seed[:2]) == [None, None]
    assert backtest.noise_floor(found) is None
    some = [replace(case, floor=floor) for case, floor in zip(found, (0.1, 0.3, 0.0, 0.0), strict=False)]
    assert backtest.noise_floor([*some, *found[4:]]) == pytest.approx(0.1)  # of the first data set alone


def test_cases_have_the_floor_of_their_seed(tmp_path, monkeypatch):
    """Three seeds that agree lose nothing."""
    alone(tmp_path, monkeypatch, made_up(TRUTH, seeds=3), seeds=3)
    assert [case.floor for case in backtest.cases(0.01, "choose")] == [0.0] * 6


def test_what_each_family_and_data_set_says(found):
    """A rule that is right with the offset alone; and of three data sets, one without which another is chosen."""
    first, second = backtest.of_each_family(found[:4], "always 2")
    assert (first["offset"], first["seeds"], first["best"], first["picks"], first["regret"]) == (1, 2, 2, [2, 2], 0)
    assert (second["offset"], second["best"]) == (0, 3)
    assert second["regret"] == pytest.approx(0.05, abs=0.002)
    assert backtest.family_rows([first]) == [("a", "1", "first", "2", "2, 2", "0.0000")]
    picks = {"always 1": 1, "always 2": 2}
    utilities = {"a": {1: 0.0, 2: -0.1}, "b": {1: -0.11, 2: 0.0}, "c": {1: -0.06, 2: 0.0}}
    several = [
        replace(found[0], data=data, family=data, utility=utility, picks=picks) for data, utility in utilities.items()
    ]
    assert backtest.best_rule(several) == "always 2"
    assert backtest.leave_one_out(several) == {"a": "always 2", "b": "always 1", "c": "always 2"}
    assert backtest.leave_one_out(several[:1]) == {}


def test_nothing_trained(tmp_path, monkeypatch):
    """Said, not scored."""
    monkeypatch.setattr(backtest, "SWEEPS", tmp_path)
    with pytest.raises(backtest.Refused, match="No family is trained"):
        backtest.backtest(0.01)


def test_a_diagnosis_that_is_missing_is_named(tmp_path, monkeypatch):
    """And not left out in silence; nor is the way to it."""
    monkeypatch.setattr(backtest, "SWEEPS", tmp_path)
    monkeypatch.setattr(backtest, "FAMILIES", [Family("a", "choose", "a", "tiny", 1000)])
    (tmp_path / "a").mkdir()
    made_up(TRUTH).save(tmp_path / "a" / "sweep.nc")
    said = r"diagnoses/(loops4-offset1-first-seed0\.nc) is missing: .* delete .*/a/cells/\1 first, to train it again"
    with pytest.raises(backtest.Refused, match=said):
        backtest.backtest(0.01)


def test_the_halves_are_whole_data_sets():
    """At least twelve families with both wirings; code of two sizes, tasks where loops help, and one where none can."""
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    count = {half: sum(2 * len(f.memories) for f in FAMILIES if f.half == half) for half in ("choose", "unseen")}
    assert sum(count.values()) >= 12
    assert abs(count["choose"] - count["unseen"]) <= 2


def test_natural_text_is_docstrings_without_examples(tmp_path, monkeypatch):
    """One document for each module with enough of it, its package the source."""
    code = '"""What it does.\n\n>>> code()\n"""\ndef f():\n    """' + "Words of a docstring. " * 60 + '"""\n'
    files = [sources.SourceFile("p", path, text) for path, text in (("a.py", code), ("b.py", "x = 1"), ("c.py", "def"))]
    monkeypatch.setattr(sources, "TRAINING_PACKAGES", ("p",))
    monkeypatch.setattr(sources, "HELD_OUT_PACKAGES", ())
    monkeypatch.setattr(sources, "package_files", lambda package: iter(files))
    (line,) = docstrings(tmp_path / "text" / "d.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["source"] == "p"
    assert record["text"].startswith("What it does.")
    assert "code()" not in record["text"]


def test_a_whole_sweep_is_not_trained_again(tmp_path, monkeypatch, capsys):
    """Though its cells are not there; one that lacks a seed is planned."""

    class Planned(Exception):
        pass

    def planning(*args, **settings):
        raise Planned

    monkeypatch.setattr(families, "SWEEPS", tmp_path)
    monkeypatch.setattr(families, "plan", planning)
    (tmp_path / "made").mkdir()
    made_up([[3.2, 3.1, 3.1, 3.1], [3.2, 3.0, 2.9, 2.8]], seeds=2).save(tmp_path / "made" / "sweep.nc")
    families.train(Family("made", "choose", "bundled", "tiny", 1000, seeds=2))
    assert capsys.readouterr().out == "made: whole\n"
    with pytest.raises(Planned):
        families.train(Family("made", "choose", "bundled", "tiny", 1000, seeds=3))


def test_a_trimmed_diagnosis_predicts_the_same(tmp_path):
    """Lenses and their support are those of the whole one, whose layers and heads they average; once is enough."""
    whole = make(documents=8)
    (tmp_path / "diagnoses").mkdir()
    whole.save(tmp_path / "diagnoses" / "some.nc")
    trim(tmp_path)
    file = tmp_path / "diagnoses" / "some.nc"
    found, written = Diagnosis.load(file), file.stat().st_mtime_ns
    assert predict(found) == predict(whole)
    assert {dim for values in found.data.values() for dim in values.dims} == {"document", "loop"}
    assert found.provenance == whole.provenance
    trim(tmp_path)
    assert file.stat().st_mtime_ns == written
