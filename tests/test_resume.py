"""A diagnosis that is stopped and goes on: nothing is measured twice, and the result is that of an unbroken run."""

import json
import re

import pytest
import torch
import xarray as xr
from test_cli import run
from test_diagnosis import CORPUS, MODEL, make_readable
from tiny import random_corpus

from loopdiag import diagnosis as module
from loopdiag.corpus import batches, tokenize
from loopdiag.diagnosis import DiagnosisError, diagnose
from loopdiag.parts import Parts, PartsError
from loopdiag.trace import ForeignModel, record

ASKED = {"n_loops": 4, "measures": ["all"], "batch_size": 2}
FIT, REPORT = 3, 3  # batches


@pytest.fixture(scope="module")
def unbroken():
    return diagnose(MODEL, CORPUS, **ASKED)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "saved.nc.parts"


class Stopped(Exception):
    """The run ends here."""


def stopped(folder, monkeypatch, parts, resume=False):
    """Run until some parts are kept, and not further."""
    kept = Parts(folder, resume=resume)
    keep = Parts.__setitem__

    def setitem(self, name, tensors):
        if len(list(folder.glob("*.safetensors"))) == parts:
            raise Stopped
        keep(self, name, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(Parts, "__setitem__", setitem)
        with pytest.raises(Stopped):
            diagnose(MODEL, CORPUS, parts=kept, **ASKED)


def test_another_run_may_have_worked_in_the_folder_meanwhile(folder):
    """What is there counts when a run takes the folder, not when it was set up, before its model was loaded."""
    ours, goes_on = Parts(folder), Parts(folder, resume=True)
    other = Parts(folder)
    with other.claimed({"seed": 1}):
        other["readouts"] = {"x": torch.ones(1)}
    with pytest.raises(PartsError, match="has what a stopped run measured"), ours.claimed({"seed": 0}):
        pytest.fail("claimed")
    with pytest.raises(PartsError, match=r"other numbers: seed \(1, now 0\)"), goes_on.claimed({"seed": 0}):
        pytest.fail("claimed")
    with goes_on.claimed({"seed": 1}):
        assert goes_on.share(["readouts", "more"]) == ["more"]


def test_other_threads_are_told_how_to_be_set(folder):
    """Launchers set them unasked."""
    first = Parts(folder)
    with first.claimed({"threads": 1}):
        first["x"] = {"x": torch.ones(1)}
    with (
        pytest.raises(
            PartsError, match=r"threads \(1, now 2\)\. Run it as then \(OMP_NUM_THREADS=1 sets its threads\)"
        ),
        Parts(folder, resume=True).claimed({"threads": 2}),
    ):
        pytest.fail("claimed")


def spy(ran):
    def noted(model, batch, n_loops, **settings):
        ran.append(batch.names)
        return record(model, batch, n_loops, **settings)

    return noted


def batch_names(documents):
    return [batch.names for batch in batches(tokenize(documents, MODEL.tokenizer, 64), ASKED["batch_size"])]


def test_parts_change_nothing(unbroken, folder):
    """Kept on the way or not, the numbers and what is said of them are the same; and the folder goes away."""
    parts = Parts(folder)
    assert parts.first
    made = diagnose(MODEL, CORPUS, parts=parts, **ASKED)
    assert len(list(folder.glob("*.safetensors"))) == 1 + FIT + REPORT
    xr.testing.assert_identical(made.data, unbroken.data)
    parts.remove()
    assert not folder.exists()


@pytest.mark.parametrize("parts", [0, 1, 2, 1 + FIT, 3 + FIT])
def test_what_was_measured_is_not_measured_again(unbroken, folder, monkeypatch, parts):
    """Stopped at the fits, and in either pass over documents: the missing batches are run, and no other."""
    stopped(folder, monkeypatch, parts)
    ran = []
    monkeypatch.setattr(module, "record", spy(ran))
    made = diagnose(MODEL, CORPUS, parts=Parts(folder, resume=True), **ASKED)
    xr.testing.assert_identical(made.data, unbroken.data)
    fit, report = batch_names(CORPUS.fit), batch_names(CORPUS.report)
    rules, measured = max(parts - 1, 0), max(parts - 1 - FIT, 0)
    missing = [*fit[rules:], *report[measured:]]
    # Before: is there anything to read, and the fits. After: the noise, and documents token by token.
    after = len(ran) - 2 - 2
    assert ran[:1] == [fit[0][:1]]
    assert ran[after - len(missing) : after] == missing
    assert (after - len(missing) == 1) == (parts > 0)


def test_stopped_again_and_again(unbroken, folder, monkeypatch):
    """After each part; and once more when everything is there."""
    for parts in range(1 + FIT + REPORT):
        stopped(folder, monkeypatch, parts, resume=True)
    for _ in range(2):
        made = diagnose(MODEL, CORPUS, parts=Parts(folder, resume=True), **ASKED)
        xr.testing.assert_identical(made.data, unbroken.data)


@pytest.mark.parametrize("group", ["motion", "prediction", "attention"])
def test_everything_was_there(folder, group):
    """Why some measures are missing is told as before, although no document is run for it."""
    first, again = (
        diagnose(MODEL, CORPUS, measures=[group], parts=Parts(folder, resume=resume)) for resume in (False, True)
    )
    xr.testing.assert_identical(first.data, again.data)


def test_another_run_has_other_parts(folder, monkeypatch):
    """Refused, with what differs; a run that left no numbers is in nobody's way."""
    stopped(folder, monkeypatch, 1)
    others = [
        ({"seed": 1}, "seed (0, now 1)"),
        ({"n_loops": 3}, "run_loops (4, now 3), measured_loops ([1, 2, 3, 4], now [1, 2, 3])"),
        ({"batch_size": 3}, "batch_size (2, now 3)"),
        ({"max_tokens": 32}, "max_tokens (64, now 32)"),
        ({"measures": ["motion"]}, 'measures (["prediction", "readouts", "motion", ..., now ["motion"])'),
    ]
    for changes, differs in others:
        with pytest.raises(
            PartsError, match=re.escape(f"{folder} has parts of another run, with other numbers: ")
        ) as e:
            diagnose(MODEL, CORPUS, parts=Parts(folder, resume=True), **ASKED | changes)
        assert differs in str(e.value)
    model = make_readable()
    model.embed.weight.data[0, 0] += 1
    with pytest.raises(PartsError, match="weights_sha256"):
        diagnose(model, CORPUS, parts=Parts(folder, resume=True), **ASKED)
    with pytest.raises(PartsError, match="corpus_sha256"):
        diagnose(MODEL, random_corpus(seed=1), parts=Parts(folder, resume=True), **ASKED)
    tokenizer = MODEL.tokenizer
    model = make_readable()
    model.tokenizer = Swapped(tokenizer)
    with pytest.raises(PartsError, match=r"numbers: tokens_sha256 \("):
        diagnose(model, CORPUS, parts=Parts(folder, resume=True), **ASKED)
    about = json.loads((folder / "about.json").read_text())
    assert about["seed"] == 0
    Parts(folder, resume=True).remove()
    stopped(folder, monkeypatch, 0)
    diagnose(MODEL, CORPUS, parts=Parts(folder), seed=1, measures=["motion"])


class Swapped:
    """A tokenizer with two words swapped."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *args, **settings):
        encoded = self.tokenizer(*args, **settings)
        swapped = {3: 4, 4: 3}
        return {"input_ids": [[swapped.get(token, token) for token in ids] for ids in encoded["input_ids"]]}

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_the_command_line(tmp_path, monkeypatch):
    """Parts are beside the file while it is made: refused without --resume, used with it, and gone in the end."""
    command = ["diagnose", "tiny-plt-2", "--documents", "16", "--max-tokens", "32", "--measures", "motion"]
    command += ["--batch-size", "4", "--quiet", "--save"]
    file, parts = tmp_path / "saved.nc", tmp_path / "saved.nc.parts"
    assert run(*command, tmp_path / "unbroken.nc", "--resume").exit_code == 0  # where there is nothing to go on from
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "meet", lambda parts: stop())
        assert run(*command, file).exit_code == 1
    assert len(list(parts.glob("*.safetensors"))) == 2
    refused = run(*command, file)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    monkeypatch.setattr(module, "take", lambda *_: pytest.fail("measured again"))
    again = run(*command, file, "--resume")
    assert (again.exit_code, again.stdout, again.stderr) == (0, f"{file}\n", "")
    assert set(tmp_path.iterdir()) == {file, tmp_path / "unbroken.nc"}
    assert file.read_bytes() == (tmp_path / "unbroken.nc").read_bytes()


def stop():
    raise Stopped


def test_what_is_there_is_not_overwritten(folder, monkeypatch):
    """Before any model runs, with both ways on."""
    stopped(folder, monkeypatch, 1)
    with pytest.raises(PartsError, match=r"has what a stopped run measured: go on with it \(--resume.*delete"):
        Parts(folder)


def test_a_folder_of_something_else(folder):
    """Whatever has the name is left alone: it would go away in the end."""
    (folder / "mine").mkdir(parents=True)
    file = folder.with_name("a file")
    file.write_text("mine")
    for there in (folder, file):
        with pytest.raises(PartsError, match="is there and holds no parts"):
            Parts(there, resume=True)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("left", [(), ("lock",), ("lock", ".about.json.here.1.partial"), ("lock", "about.json")])
def test_killed_before_anything_was_measured(folder, left):
    """Or in the middle of taking the folder away: nothing to go on from, and nothing in the way."""
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    parts = Parts(folder)
    diagnose(MODEL, CORPUS, measures=["motion"], parts=parts)
    parts.remove()
    assert not folder.exists()


def test_two_runs_at_once(folder):
    """The second is refused, and what the first has stays."""
    asked = {"measures": ["motion"]}

    def second(what, done, of):
        with pytest.raises(PartsError, match="Another run is measuring"):
            diagnose(MODEL, CORPUS, parts=Parts(folder, resume=True), **asked)

    first = diagnose(MODEL, CORPUS, parts=Parts(folder), progress=second, **asked)
    again = diagnose(MODEL, CORPUS, parts=Parts(folder, resume=True), **asked)
    xr.testing.assert_identical(again.data, first.data)


def test_a_broken_part(folder):
    """As a full disk may leave after a power cut: its name, and what to do."""
    diagnose(MODEL, CORPUS, parts=Parts(folder), measures=["motion"])
    (part,) = folder.glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(PartsError, match=rf"{part.name} is broken .*: delete it"):
        diagnose(MODEL, CORPUS, parts=Parts(folder, resume=True), measures=["motion"])


def test_a_disk_that_is_full(folder, monkeypatch):
    """What was kept stays, nothing half is there, and the run goes on from it."""
    from loopdiag import parts as parts_module

    save, saved = parts_module.save_file, []

    def full(tensors, path):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        save(tensors, path)

    monkeypatch.setattr(parts_module, "save_file", full)
    asked = {"measures": ["motion"], "batch_size": 2}
    with pytest.raises(OSError, match="No space left"):
        diagnose(MODEL, CORPUS, parts=Parts(folder), **asked)
    assert sorted(file.name for file in folder.iterdir()) == ["about.json", "lock", "measuring-00000.safetensors"]
    made = diagnose(MODEL, CORPUS, parts=Parts(folder, resume=True), **asked)
    xr.testing.assert_identical(made.data, diagnose(MODEL, CORPUS, **asked).data)


def test_a_model_that_is_not_ours(folder):
    """Nothing says which weights it has, so its parts could be anybody's."""
    foreign = ForeignModel(lambda batch, n_loops: record(MODEL, batch, n_loops), MODEL.tokenizer, 3, 64, "somebody's")
    with pytest.raises(DiagnosisError, match="nothing tells two ForeignModels apart"):
        diagnose(foreign, CORPUS, parts=Parts(folder))
    assert not folder.exists()
