"""`loopdiag recommend` on a sweep: answers, exit codes, messages, files."""

import json
import shutil

import pytest
from planted import planted
from test_cli import expect_refusal, run
from test_measured import SEVERAL, assert_contract, made_up, told

from loopdiag import cli
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import recommend
from loopdiag.gaincost.answer import answer
from loopdiag.losses import SweepLosses
from loopdiag.sweep.gathering import SETTINGS
from loopdiag.sweep.running import RESULT


@pytest.fixture
def saved(tmp_path):
    """The folder of a sweep that has an answer."""
    return kept(made_up(SEVERAL, seeds=3, noise=0.005, spread=0.0005), tmp_path / "sweep of [code]")


def kept(losses, folder):
    """A sweep as `loopdiag sweep` leaves it, as far as `recommend` is concerned."""
    folder.mkdir()
    (folder / SETTINGS).write_text("{}")
    losses.save(folder / RESULT)
    return folder


def answered(*arguments):
    """The exit code, and the JSON on stdout."""
    result = run("recommend", *arguments, "--json", "-")
    assert result.stderr == "", result.output
    return result.exit_code, json.loads(result.stdout)


# -- answers ------------------------------------------------------------------------------------------


def test_a_folder_or_its_file_in_json(saved, tmp_path):
    """The whole contract, with the numbers of the package; a file may have been given another name."""
    code, found = answered(saved)
    assert code == cli.Exit.ANSWERED
    assert_contract(found)
    assert found == told(SweepLosses.load(saved / RESULT))
    assert [each["recommended_loops"] for each in found["answers"]] == [2, 3]
    elsewhere = shutil.copy(saved / RESULT, tmp_path / "code.nc")
    for same in (saved / RESULT, elsewhere, str(saved) + "/"):
        assert answered(same) == (code, found)


def test_json_in_a_file_beside_the_tables(saved, tmp_path):
    """The same object; the tables are there with it and without."""
    result = run("recommend", saved, "--json", tmp_path / "answer.json")
    assert result.exit_code == cli.Exit.ANSWERED
    assert json.loads((tmp_path / "answer.json").read_text()) == answered(saved)[1]
    assert result.stdout == run("recommend", saved).stdout
    assert result.stderr == ""


def test_each_table_is_shown_once(tmp_path):
    """For each memory the losses with each offset and an answer, and what the offset costs."""
    losses = made_up(SEVERAL, seeds=3, memories=2, noise=0.005, spread=0.0005)
    losses.data.attrs["provenance"] = json.dumps(losses.provenance | {"data": "texts [bold]"})
    text = " ".join(run("recommend", kept(losses, tmp_path / "two")).stdout.split())
    for memory in ("first", "own"):
        for offset in (1, 0):
            assert text.count(f"Trained on texts [bold], offset {offset}, memory {memory}, 3 seeds") == 1
        assert text.count(f"what the offset costs (tax), and both (net); memory {memory}") == 1
    assert text.count("loss [95 %]") == text.count("Train with how many loops? (measured)") == 4
    assert text.count("Train with how many loops? (measured) 2 support 1: 0%, 2: ") == 2
    for said in ("price 0.01 nats per token and extra loop", "left out: other data, sizes and budgets"):
        assert text.count(said) == 4
    assert text.count("loops gain tax net") == text.count("95 % intervals over seeds, on these documents") == 2


def test_the_tables_have_the_numbers_of_the_json(saved):
    _, found = answered(saved)
    text = " ".join(run("recommend", saved).stdout.split())
    for each in found["answers"]:
        for row in each["loops"]:
            assert f"{row['nll']:.3f} [{row['nll_low']:.3f}, {row['nll_high']:.3f}]" in text
        for step in each["break_even"]:
            assert f"{step['loops']} loops below {step['below']:.2g}" in text
    for row in found["decompositions"][0]["loops"][1:]:
        cells = (
            f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for name in ("gain", "tax", "net")
        )
        assert f"{row['loops']} {' '.join(cells)}" in text
    assert "1 - 0.000 [0.000, 0.000] -" in text


def test_one_seed_and_one_offset(tmp_path):
    """What a smaller sweep leaves out is said, and what it cannot say is not."""
    folder = kept(made_up([SEVERAL[1]], offsets=(0,), noise=0.005), tmp_path / "small")
    text = " ".join(run("recommend", folder).stdout.split())
    assert "offset 0, memory first, 1 seed " in text
    assert "one training of each may tell another story" in text
    assert "tax" not in text
    code, found = answered(folder)
    assert (code, len(found["answers"]), found["decompositions"]) == (0, 1, [])
    both = kept(made_up(SEVERAL, noise=0.005), tmp_path / "both")
    assert "95 % intervals over documents; they leave out the seed." in " ".join(run("recommend", both).stdout.split())


def test_the_price_and_the_seed(saved):
    """Both reach the answer."""
    steps = answered(saved)[1]["answers"][0]["break_even"]
    assert [step["loops"] for step in steps] == [2]
    code, found = answered(saved, "--price", str(steps[0]["below"] * 1.5))
    assert (code, found["answers"][0]["recommended_loops"]) == (0, 1)
    assert found["price_nats_per_loop"] == steps[0]["below"] * 1.5
    _, other = answered(saved, "--seed", "4")
    assert other == told(SweepLosses.load(saved / RESULT), seed=4)
    assert other["draws"]["seed"] == 4


def test_undetermined_is_exit_3(tmp_path):
    """Where the first wiring, which is the standard, has no answer, whatever another has; the answer is written."""
    truth = [[3.0, 3.0, 3.0], [3.0, 2.0, 1.0]]
    for offsets, code in (((1, 0), 3), ((0,), 0)):
        folder = kept(made_up(truth[-len(offsets) :], offsets=offsets, noise=0.2), tmp_path / f"of {len(offsets)}")
        result = run("recommend", folder, "--json", tmp_path / "answer.json", "--quiet")
        assert result.exit_code == code
        found = json.loads((tmp_path / "answer.json").read_text())
        assert [each["verdict"] for each in found["answers"]] == ["undetermined", "recommended"][-len(offsets) :]
        assert ("undetermined: " in result.stdout) == (code == 3)
        assert answered(folder)[0] == code


# -- unfinished sweeps --------------------------------------------------------------------------------


def test_what_is_there_is_answered(tmp_path):
    """A wiring of which no seed has all loop counts is named and left out; the others have their answers."""
    losses = made_up(SEVERAL, seeds=2, noise=0.005, missing=[(0, 0, 1, 1), (1, 0, 1, 2)])
    folder = kept(losses, tmp_path / "unfinished")
    result = run("recommend", folder, "--json", "-")
    assert result.exit_code == cli.Exit.ANSWERED
    assert "note: No seed of this sweep has losses of all loop counts 1, 2, 3, 4 with offset 0" in result.stderr
    found = json.loads(result.stdout)
    assert_contract(found)
    assert [each["offset"] for each in found["answers"]] == [1]
    assert len(found["decompositions"]) == 1
    assert run("recommend", folder, "--quiet").stderr == ""


def test_no_answer_yet(tmp_path):
    """No wiring has all loop counts, or no model is finished: what to do is said."""
    missing = [(0, 0, 0, 1), (0, 0, 1, 1)]
    folder = kept(made_up(SEVERAL, missing=missing), tmp_path / "unfinished")
    said = "No seed of this sweep has losses of all loop counts 1, 2, 3, 4 with offset 1 and memory first yet"
    expect_refusal(run("recommend", folder), said)
    (folder / RESULT).unlink()
    expect_refusal(run("recommend", folder), "is a sweep that has no finished model yet")


# -- what cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        *(["--data", "README.md"], ["--loops", "2"], ["--measures", "all"], ["--documents", "16"]),
        *(["--max-tokens", "64"], ["--batch-size", "4"], ["--dtype", "bfloat16"], ["--device", "cpu"]),
        *(["--revision", "main"], ["--offline"]),
    ],
    ids=lambda option: option[0],
)
def test_options_of_a_run_cannot_apply(saved, option):
    for given in (saved, saved / RESULT):
        expect_refusal(run("recommend", given, *option), f"{option[0]} cannot change the sweep")


def test_nothing_is_saved(saved, tmp_path):
    """A sweep makes no diagnosis to keep."""
    expect_refusal(run("recommend", saved, "--save", tmp_path / "d.nc"), "--save and --decoding are of one model, and")
    assert not (tmp_path / "d.nc").exists()


def test_the_sweep_is_not_written_over(saved):
    before = (saved / RESULT).read_bytes()
    for given in (saved, saved / RESULT):
        expect_refusal(run("recommend", given, "--json", saved / RESULT), "must be different files")
    assert (saved / RESULT).read_bytes() == before


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--price", "-1"], "--price -1.0 is out of range"),
        (["--price", "nan"], "--price nan is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--json", "no/such/folder/a.json"], "cannot be written"),
    ],
)
def test_bad_arguments(saved, option, said):
    expect_refusal(run("recommend", saved, *option), said)


@pytest.mark.parametrize("content", ["empty", "cut short", "other"])
def test_a_damaged_file(saved, content):
    whole = (saved / RESULT).read_bytes()
    (saved / RESULT).write_bytes({"empty": b"", "cut short": whole[: len(whole) // 2], "other": b"text\n"}[content])
    for given in (saved, saved / RESULT):
        expect_refusal(run("recommend", given), f"{RESULT} holds no sweep: ")


def test_a_sweep_of_another_version(saved):
    losses = SweepLosses.load(saved / RESULT)
    losses.data.attrs["provenance"] = json.dumps(losses.provenance | {"schema": 99})
    losses.save(saved / RESULT)
    expect_refusal(run("recommend", saved), "has schema 99; this version of loopdiag reads 1")


def test_a_file_is_what_it_says_it_is(saved, tmp_path):
    """A diagnosis may be named as a sweep is; a sweep is no diagnosis to other commands."""
    diagnosis = planted([4.0, 3.5, 3.3])
    diagnosis.save(tmp_path / RESULT)
    code, found = answered(tmp_path / RESULT)
    diagnosis = Diagnosis.load(tmp_path / RESULT)
    assert (code, found) == (0, answer(diagnosis, recommend(diagnosis)))
    expect_refusal(run("intervene", saved / RESULT), "is a file: give a model")
    expect_refusal(run("figures", saved / RESULT, "--out", tmp_path / "figures"), "holds no diagnosis but sweep")


def test_some_loop_counts_of_a_sweep(tmp_path):
    """--at chooses among what was trained, also where the rest is missing; what was not is refused."""
    folder = kept(made_up(SEVERAL, missing=[(0, 0, 0, 3)]), tmp_path / "sweep")
    result = run("recommend", folder, "--at", "1,2", "--json", "-")
    assert result.stdout, result.output
    assert [each["recommended_loops"] for each in json.loads(result.stdout)["answers"]] == [2, 2]
    expect_refusal(run("recommend", folder, "--at", "1,7"), "no models with loops [1, 7]")
