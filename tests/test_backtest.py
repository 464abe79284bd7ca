"""The backtest: what a rule loses, when it hits, and that the unseen half has no say in what is chosen."""

import json
from dataclasses import replace

import backtest
import numpy as np
import pytest
from families import FAMILIES, Family, docstrings
from planted import diagnosis_of
from test_measured import made_up

from loopdiag.sweep import sources

# Losses of one to four loops with the offset and without: at a price of 0.01 two loops are best with it, three without.
TRUTH = [[3.20, 3.10, 3.15, 3.14], [3.20, 3.18, 3.12, 3.13]]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two families, one of each half, whose four-loop models have lenses that were planted."""
    folder = tmp_path_factory.mktemp("sweeps")
    families = [Family(name, half, "text", "tiny", 1000) for name, half in (("a", "choose"), ("b", "unseen"))]
    # The rank peaks at 2 in family a, whatever the offset, and at 1 in family b; the output shift's knee is at 3.
    for family, peak in zip(families, (2, 1), strict=True):
        (folder / family.name / "diagnoses").mkdir(parents=True)
        made_up(TRUTH, noise=0.001, seeds=2).save(folder / family.name / "sweep.nc")
        rank = [9.0, 50.0, 50.0, 40.0, 30.0]
        rank[peak] = 60.0
        curves = {"effective_rank": rank, "output_shift": [np.nan, 9, 2, 1.9, 0.1]}
        planted = diagnosis_of([[4.0, 3.5, 3.2, 3.1]] * 40, curves=curves)
        for offset in (1, 0):
            for seed in (0, 1):
                planted.save(folder / family.name / "diagnoses" / f"loops4-offset{offset}-first-seed{seed}.nc")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backtest, "SWEEPS", folder)
        patched.setattr(backtest, "FAMILIES", families)
        return backtest.cases(0.01)


def test_every_checkpoint_is_a_case(found):
    """Two families, two offsets, two seeds; each with the truth of its own offset."""
    assert [(case.data, case.offset, case.seed) for case in found] == [
        (data, offset, seed) for data in ("a", "b") for offset in (1, 0) for seed in (0, 1)
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


def test_scores_weigh_families_alike(found):
    """Each is a mean over families of means over their checkpoints; intervals hold it."""
    scored = backtest.score(found, "always 2")
    assert scored["families"] == 4
    assert scored["hits"] == 0.5
    assert scored["regret"] == pytest.approx(0.05 / 2, abs=0.002)  # without the offset three are best: -3.14, not -3.19
    assert scored["regret_low"] <= scored["regret"] <= scored["regret_high"]
    more = [*found, *(case for case in found if case.offset == 1 and case.data == "a")]
    assert backtest.score(more, "always 2")["regret"] == pytest.approx(scored["regret"])


def test_the_rule_is_chosen_on_one_half(found, monkeypatch):
    """Of least regret there; the other half has no say."""
    monkeypatch.setattr(backtest, "cases", lambda price: found)
    told = backtest.backtest(0.01)
    json.dumps(told, allow_nan=False)
    regrets = {row["rule"]: row["regret"] for row in told["scores"]["choose"]}
    assert regrets[told["chosen"]] == min(regrets.values())
    assert {row["families"] for scores in told["scores"].values() for row in scores} == {2}
    worse = [replace(case, picks=dict.fromkeys(case.picks, 1)) if case.half == "unseen" else case for case in found]
    monkeypatch.setattr(backtest, "cases", lambda price: worse)
    again = backtest.backtest(0.01)
    assert (again["chosen"], again["scores"]["choose"]) == (told["chosen"], told["scores"]["choose"])
    assert again["scores"]["unseen"] != told["scores"]["unseen"]


def test_nothing_trained(tmp_path, monkeypatch):
    """Said, not scored."""
    monkeypatch.setattr(backtest, "SWEEPS", tmp_path)
    with pytest.raises(SystemExit, match="No family is trained"):
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
