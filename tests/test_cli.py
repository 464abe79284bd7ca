"""The command line as a user meets it: answers, exit codes, messages, files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_decoder import make_model
from tiny import VOCABULARY, word_tokenizer, words
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import loopdiag as ld
from loopdiag import cli
from loopdiag.cli.output import _short
from loopdiag.model import facts
from loopdiag.model.checkpoints import FAMILIES
from loopdiag.model.loading import BUNDLED

SMALL = ["--documents", "16", "--max-tokens", "48", "--quiet"]


def run(*arguments: str | Path):
    """The command line in this process; a traceback would show as an exception."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """One small run with everything written."""
    folder = tmp_path_factory.mktemp("answer")
    result = run("recommend", *SMALL, "--json", folder / "a.json", "--save", folder / "d.nc", "--figures", folder / "f")
    assert result.exit_code in (cli.Exit.ANSWERED, cli.Exit.UNDETERMINED), result.output
    return folder, result


def test_the_json_file_is_the_answer(answered):
    """`--json FILE` holds the whole contract (tests/test_answer.py), measured on the half that was not fitted on."""
    told = json.loads((answered[0] / "a.json").read_text())
    assert [row["loop"] for row in told["loops"]] == [1, 2, 3, 4]
    assert (told["documents"], told["provenance"]["documents_fit"], told["tokens"]) == (8, 8, 8 * 47)
    assert all(row["nll_usable"] is not None for row in told["loops"])


def test_the_table_shows_the_evidence_and_both_answers(answered):
    """A person reads per-loop evidence, both answers, support, price, break-evens and lenses on stdout."""
    _, result = answered
    columns = ("exit NLL [95 %]", "gain", "cost/", "usable", "rank", "cos (ref.)")
    for said in (*columns, "support", "price", "break-even", "lenses"):
        assert said in result.stdout
    assert "Run this checkpoint with how many loops? (measured)" in result.stdout
    assert "Train with how many loops? (predicted, provisional" in result.stdout


def test_figures_are_written(answered):
    """--figures draws the gain-cost curve and its companions."""
    written = {file.name for file in (answered[0] / "f").iterdir()}
    assert {"gain_cost.png", "gain_cost.svg", "hidden_states.png", "shift_against_offset.png"} <= written


def test_a_saved_diagnosis_answers_the_same_without_the_model(answered):
    """`recommend FILE` gives the JSON of the run that saved it, and refuses options that it cannot honour."""
    folder, _ = answered
    again = run("recommend", folder / "d.nc", "--json", "-", "--quiet")
    assert again.stdout == (folder / "a.json").read_text()
    settled = (
        ["--loops", "2"],
        ["--at", "1,2"],
        ["--measures", "all"],
        ["--dtype", "bfloat16"],
        ["--batch-size", "4"],
        ["--device", "cpu"],
    )
    for option, *value in (*settled, ["--revision", "main"], ["--offline"]):
        refused = run("recommend", folder / "d.nc", option, *value)
        expect_refusal(refused, f"{option} cannot change the saved diagnosis")


def test_outputs_that_would_eat_each_other(answered):
    """One path for two outputs, or the JSON over the diagnosis that is read, is refused and nothing is touched."""
    folder, _ = answered
    before = (folder / "d.nc").read_bytes()
    for arguments in (["--json", folder / "d.nc"], ["--json", folder / "new", "--save", folder / "new"]):
        expect_refusal(run("recommend", folder / "d.nc", *arguments), "must be different files")
    assert (folder / "d.nc").read_bytes() == before
    assert not (folder / "new").exists()


def test_same_seed_same_json(answered):
    """Same seed, threads and machine: the same bytes; stdout holds nothing but the JSON, and --quiet is quiet."""
    again = run("recommend", *SMALL, "--json", "-")
    assert again.stdout == (answered[0] / "a.json").read_text()
    assert again.stderr == ""


def test_replacing_a_file_is_told(answered):
    """Nothing a user has is overwritten without being told."""
    folder, _ = answered
    kept = folder / "kept.json"
    kept.write_text("mine")
    result = run("recommend", folder / "d.nc", "--json", kept)
    assert f"note: {kept} is there and will be replaced" in result.stderr
    assert json.loads(kept.read_text())["schema"] == 1


def test_undetermined_has_its_own_exit_code(answered):
    """A price that the data cannot resolve: exit 3, null, and the reason."""
    folder, _ = answered
    for price in ("0.05", "0.02", "0.01", "0.005", "0"):
        result = run("recommend", folder / "d.nc", "--json", "-", "--price", price)
        told = json.loads(result.stdout)
        assert result.exit_code == (3 if told["verdict"] == "undetermined" else 0)
        assert (told["why_undetermined"] is None) == (result.exit_code == 0)


def test_diagnose_then_recommend(tmp_path):
    """`diagnose` writes a Diagnosis, prints where, and one loop, or more loops than trained, are no special case."""
    for model, loops in (("tiny-plt-1", "1"), ("tiny-plt-2", "4")):
        file = tmp_path / f"{model}.nc"
        result = run("diagnose", model, *SMALL, "--loops", loops, "--save", file)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == str(file)
        answer = run("recommend", file, "--json", "-")
        assert answer.exit_code in (0, 3), answer.output
        rows = json.loads(answer.stdout)["loops"]
        assert [row["extrapolated"] for row in rows] == [row["loop"] > int(model[-1]) for row in rows]
        assert "*" in run("recommend", file).stdout or model == "tiny-plt-1"


def test_models_lists_bundled_and_supported():
    """`loopdiag models` names every bundled model and every family."""
    result = run("models")
    assert result.exit_code == 0
    assert len(FAMILIES) > 1
    for name in (*ld.bundled_models(), *(family.MODEL_TYPE for family in FAMILIES)):
        assert name in result.stdout


def test_quiet_and_notes(answered, tmp_path):
    """--quiet says nothing on stderr, whatever is replaced; without it, cut documents are reported."""
    (tmp_path / "a.json").touch()
    assert run("recommend", answered[0] / "d.nc", "--quiet", "--json", tmp_path / "a.json").stderr == ""
    loud = run("recommend", *SMALL[:-1], "--json", "-")
    assert "documents were cut at 48 tokens" in loud.stderr


def copy_of(folder: Path, name: str = "tiny-plt-2") -> Path:
    return Path(shutil.copytree(BUNDLED / name, folder / name))


def no_weights(folder: Path) -> Path:
    model = copy_of(folder)
    (model / "model.safetensors").unlink()
    return model


def pickled_weights(folder: Path) -> Path:
    model = no_weights(folder)
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    return model


def truncated_weights(folder: Path) -> Path:
    model = copy_of(folder)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return model


def broken_config(folder: Path) -> Path:
    model = copy_of(folder)
    (model / "config.json").write_text("{not json")
    return model


def other_family(folder: Path) -> Path:
    model = copy_of(folder)
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"model_type": "gpt2"}))
    return model


def other_shape(folder: Path) -> Path:
    model = copy_of(folder)
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"intermediate_size": 100}))
    return model


def more_layers(folder: Path) -> Path:
    model = copy_of(folder)
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"num_hidden_layers": 3}))
    return model


BAD_MODELS = {
    no_weights: "has no weights",
    pickled_weights: "is a pickle, which can run code",
    truncated_weights: "is damaged, cut short or missing",
    broken_config: "is not readable as JSON",
    other_family: "model_type 'gpt2' is not supported; supported are iquestpltcoder, ",
    other_shape: "but config.json asks for",
    more_layers: "missing model.layers.2.",
}


@pytest.mark.parametrize("make", BAD_MODELS, ids=lambda make: make.__name__)
def test_bad_models(tmp_path, make):
    """A model that cannot be loaded: one message, exit 2, no traceback."""
    expect_refusal(run("recommend", make(tmp_path), *SMALL), BAD_MODELS[make])


def empty_file(folder: Path) -> Path:
    (folder / "empty.jsonl").touch()
    return folder / "empty.jsonl"


def binary_file(folder: Path) -> Path:
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    return folder / "binary.txt"


def broken_lines(folder: Path) -> Path:
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    return folder / "broken.jsonl"


def few_documents(folder: Path) -> Path:
    (folder / "few.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(3)))
    return folder / "few.jsonl"


def short_documents(folder: Path) -> Path:
    (folder / "short.jsonl").write_text("".join(f'{{"text": "x{n}"}}\n' for n in range(30)))
    return folder / "short.jsonl"


BAD_DATA = {
    empty_file: "empty",
    binary_file: "binary",
    broken_lines: "line 2",
    few_documents: "16",
    short_documents: "16 tokens",
    (lambda folder: folder / "missing.jsonl"): "missing.jsonl",
}


@pytest.mark.parametrize("make", BAD_DATA, ids=lambda make: make.__name__)
def test_bad_data(tmp_path, make):
    """Data that cannot be read: one message, exit 2, no traceback."""
    expect_refusal(run("recommend", "--data", make(tmp_path), "--quiet"), BAD_DATA[make])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.nc"], "There is no file missing.nc"),
        ([""], "There is no model ''"),
        (["no-such-model"], "There is no model 'no-such-model': bundled are tiny-plt-1"),
        (["--loops", "0"], "--loops 0 is out of range: allowed 1 to 64"),
        (["--price", "nan"], "--price nan is out of range"),
        (["--price", "-1"], "--price -1.0 is out of range"),
        (["--documents", "3"], "--documents 3 is out of range: allowed 16 or more"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
        (["--max-tokens", "100000"], "is beyond this model, which was made for 256"),
        (["--max-tokens", "2"], "--max-tokens 2 is out of range"),
        (["--json", "no/such/folder/a.json"], "cannot be written"),
        (["--save", "."], "is a folder: give the name of a file"),
        (["--figures", "pyproject.toml/figures"], "cannot be made"),
        (["--dtype", "int8"], "int8"),
        (["README.md"], "holds no diagnosis"),
        (["loopdiag"], "has no config.json"),
    ],
)
def test_bad_arguments(arguments, said, monkeypatch):
    """Wrong arguments: one message that says what is allowed, exit 2, before any work."""
    monkeypatch.chdir(Path(__file__).parents[1])
    expect_refusal(run("recommend", *arguments), said)


def expect_refusal(result, said: str) -> None:
    message = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == cli.Exit.WRONG_INPUT, result.output
    assert said in message
    assert result.stdout == ""
    assert "Traceback" not in result.output


# -- what a model does not have ------------------------------------------------------------------------

PLAIN = {"offset": 0, "memory": "own", "injection": "none"}
HUGINN = {"initial_state": "random", "injection": "concat", "n_prelude": 1, "n_coda": 1, "norm_before_coda": True}
HUGINN |= {"offset": 0, "memory": "own", "norms": "pre_post", "norm_between_loops": False}
NO_OFFSET = "omega, omega_random, omega_relative, withheld (the model has no cross-loop position offset)"
NO_GATE = (
    "attention_entropy_global, attention_entropy_local, attention_entropy_relative_global, "
    "attention_entropy_relative_local and 8 more "
    "(no loop of this run blends attention, so there is no gate and one map)"
)
NO_CODA = "nll_lens (no coda stands before the head, so exits are the plain logit lens)"
NO_EXIT_GATE = "exit_probability (the model has no exit gate)"


def saved_model(folder: Path, tokenizer=None, **changes) -> Path:
    """A folder with a tiny model of random weights that reads words."""
    model = make_model(dtype=torch.float32, **changes)
    model.tokenizer = tokenizer or word_tokenizer()
    model.save(folder)
    return folder


def saved_texts(file: Path) -> Path:
    """Sixteen documents that such a model reads."""
    texts = [words([(n * (i + 1) + i) % VOCABULARY for i in range(20)]) for n in range(16)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, [NO_CODA, NO_EXIT_GATE]),
        (PLAIN, [NO_OFFSET, NO_GATE, NO_CODA, NO_EXIT_GATE]),
        (PLAIN | {"exit_gate": True}, [NO_OFFSET, NO_GATE, NO_CODA]),
        (HUGINN, [NO_OFFSET, NO_GATE, NO_EXIT_GATE]),
        ({"n_coda": 1, "exit_gate": True}, []),
    ],
    ids=["plt", "plain", "ouro", "huginn", "everything"],
)
def test_what_the_model_lacks_is_noted(tmp_path, changes, said):
    """A note for each reason on stderr, --quiet apart, and the same in the JSON; the table leaves it out."""
    model, texts = saved_model(tmp_path / "model", **changes), saved_texts(tmp_path / "texts.jsonl")
    result = run("diagnose", model, "--data", texts, "--save", tmp_path / "d.nc")
    assert result.exit_code == 0, result.output
    notes = re.findall("^note: absent: (.*)$", result.stderr, re.M)
    assert sorted(notes) == sorted(said)
    assert result.stdout == f"{tmp_path / 'd.nc'}\n"
    told = json.loads(run("recommend", tmp_path / "d.nc", "--json", "-").stdout)
    reasons = {why for why in told["absent"].values() if not why.endswith("was not asked for")}
    assert reasons == {note.rpartition(" (")[2].removesuffix(")") for note in said}
    table = run("recommend", tmp_path / "d.nc")
    assert table.exit_code in (cli.Exit.ANSWERED, cli.Exit.UNDETERMINED)
    assert ("logit" in table.stdout) is (NO_CODA not in said)
    quiet = run("diagnose", model, "--data", texts, "--save", tmp_path / "d.nc", "--quiet")
    assert quiet.stderr == ""


def test_more_loops_or_fewer_change_nothing_about_what_is_absent(tmp_path):
    """A random start, a coda and an exit gate work at any loop count, and the seed says which start.

    One loop has no loop before, from which attention could diverge.
    """
    model = saved_model(tmp_path / "model", **HUGINN, exit_gate=True)
    texts, answers = saved_texts(tmp_path / "texts.jsonl"), {}
    for loops, seed in (("1", "0"), ("5", "0"), ("5", "1")):
        arguments = ["--data", texts, "--loops", loops, "--seed", seed, "--quiet", "--json", "-"]
        result = run("recommend", model, *arguments)
        assert result.exit_code in (cli.Exit.ANSWERED, cli.Exit.UNDETERMINED), result.output
        answers[loops, seed] = json.loads(result.stdout)
        rows = answers[loops, seed]["loops"]
        assert sum(row["exit_probability"] for row in rows) == pytest.approx(1, abs=1e-6)
        assert all(row["nll_lens"] > 0 for row in rows)
    one, five, other = (answers[key]["loops"][0]["nll_exit"] for key in answers)
    assert one == pytest.approx(five, rel=1e-6)
    assert other != pytest.approx(five, rel=1e-6)
    absent = [told["absent"].keys() for told in answers.values()]
    assert absent[0] == absent[1] | {"attention_kl"}
    assert absent[1] == absent[2]


# -- what is measured, and at which loops ----------------------------------------------------------------


def test_groups_of_measures(tmp_path):
    """What is asked for is there, with the answer, and nothing else is."""
    model, texts = saved_model(tmp_path / "model"), saved_texts(tmp_path / "texts.jsonl")
    saved = tmp_path / "d.nc"
    result = run("diagnose", model, "--data", texts, "--measures", "prediction, heads", "--save", saved, "--quiet")
    assert result.exit_code == 0, result.output
    diagnosis = ld.Diagnosis.load(saved)
    assert diagnosis.provenance["measures"] == ["prediction", "heads"]
    assert (
        {"nll_exit", "head_rank"}
        <= set(diagnosis.data)
        <= {
            *ld.measures.GROUPS["prediction"],
            *ld.measures.GROUPS["heads"],
        }
    )
    table = run("recommend", saved)
    assert table.exit_code in (cli.Exit.ANSWERED, cli.Exit.UNDETERMINED), table.output
    assert re.search(r"^ +2 .* -  +- +- \(-\)", table.stdout, re.M)  # usable NLL, rank, cos


def test_some_loops_of_many(tmp_path):
    """`--at` measures these loops, and says so; what they read is what the whole run reads there."""
    model, texts = saved_model(tmp_path / "model"), saved_texts(tmp_path / "texts.jsonl")
    arguments = ["recommend", model, "--data", texts, "--measures", "prediction", "--quiet", "--json", "-"]
    some = json.loads(run(*arguments, "--at", "1,2,4,6").stdout)
    every = json.loads(run(*arguments, "--loops", "6").stdout)
    assert (some["measured_loops"], some["run_loops"]) == ([1, 2, 4, 6], 6)
    assert [row["loop"] for row in some["loops"]] == list(map(int, some["support"])) == [1, 2, 4, 6]
    at = {row["loop"]: row["nll_exit"] for row in every["loops"]}
    for row in some["loops"]:
        assert row["nll_exit"] == pytest.approx(at[row["loop"]], rel=1e-6)
    assert some["loops"][2]["net_gain"] == pytest.approx(at[2] - at[4], abs=1e-6)
    table = run("recommend", model, "--data", texts, "--measures", "prediction", "--at", "1,2,4,6").stdout
    assert "Some loops were measured" in table
    assert re.search(r"^ +4\* ", table, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at", "2,4"], "--at 2,4 is not allowed"),
        (["--at", "1,4,2"], "--at 1,4,2 is not allowed"),
        (["--at", "1,x"], "--at 1,x is not allowed"),
        (["--at", "1,65"], "--at 1,65 is not allowed"),
        (["--at", ""], "--at is not allowed"),
        (["--at", "1,4", "--loops", "3"], "--at ends with loop 4 and --loops is 3"),
        (["--measures", "heads,foo"], "Unknown measures: foo. Allowed are default, all"),
        (["--measures", "heads"], "--measures heads lacks prediction"),
    ],
)
def test_measures_and_loops_that_cannot_be(arguments, message):
    """Refused before the model is loaded."""
    expect_refusal(run("recommend", "no-such-model", *arguments), message)


# -- info ----------------------------------------------------------------------------------------------


def config_alone(folder: Path, name: str = "tiny-plt-2", **changes) -> Path:
    """A folder that holds nothing but a configuration."""
    folder.mkdir()
    keys = json.loads((BUNDLED / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | changes))
    return folder


def table_rows(text: str) -> list[list[str]]:
    """The rows of the table of loop counts, without their heading."""
    return [re.split(" {2,}", line.strip()) for line in text.splitlines() if re.match(r" *\d+\*? {2,}\d", line)]


@pytest.mark.parametrize(
    ("loops", "counts"),
    [
        (None, ["1", "2"]),
        (1, ["1"]),
        (4, ["1", "2", "3*", "4*"]),
        (9, ["1", "2", *(f"{n}*" for n in (3, 4, 5, 6, 7, 8, 9))]),
        (16, ["1", "2", *(f"{n}*" for n in (3, 4, 5, 6, 7, 8, 16))]),
        (64, ["1", "2", *(f"{n}*" for n in (3, 4, 5, 6, 7, 8, 16, 32, 64))]),
    ],
)
def test_info_of_each_loop_count(tmp_path, loops, counts):
    """From config.json alone, in a table and exactly in JSON; loops beyond training have a star."""
    folder, given = config_alone(tmp_path / "model"), ["--loops", loops] if loops else []
    result = run("info", folder, *given)
    assert result.exit_code == 0, result.output
    rows = table_rows(result.stdout)
    assert [row[0] for row in rows] == counts
    told = json.loads(run("info", folder, *given, "--json").stdout)
    cfg = ld.load("tiny-plt-2").cfg
    parameters = facts.parameters(cfg)
    assert (told["model"], told["model_type"], told["trained_loops"]) == (str(folder), "iquestpltcoder", 2)
    assert (told["parameters"], told["context"], told["kv_dtype"]) == (parameters.once, 256, "bfloat16")
    for shown, row in zip(rows, told["loops"], strict=True):
        count, kv = row["loops"], facts.kv_bytes(cfg, row["loops"])
        assert row == {
            "loops": int(shown[0].rstrip("*")),
            "extrapolated": shown[0].endswith("*"),
            "parameters_if_unshared": parameters.effective(count),
            "flops_per_token": facts.flops(cfg, count, 256),
            "kv_bytes_per_token": kv.per_token,
            "kv_bytes_fixed": kv.fixed,
        }
        for cell, number in zip(shown[1:], list(row.values())[2:], strict=True):
            amount, _, unit = cell.partition(" ")
            assert float(amount) * UNITS[unit] == pytest.approx(number, rel=0.005)  # three digits
    assert result.stderr == ""


UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1, "KiB": 2**10, "MiB": 2**20}


def test_numbers_of_three_digits():
    """Never an exponent: what rounds to a thousand of a unit is a whole number of it or one of the next."""
    for number in (1, 999, 999.4, 999.6, 999_500, 999_600, 1_000_000, 1_234_567):
        assert "e" not in _short(number, 1000, ("", " k", " M"))
        assert "e" not in _short(number, 1024, (" B", " KiB", " MiB"))


def test_info_of_context_and_dtype(tmp_path):
    """Context is that of the FLOPs, dtype that of keys and values; both are said below the table and in the JSON."""
    folder, cfg = config_alone(tmp_path / "model"), ld.load("tiny-plt-2").cfg
    given = ["--context", "10", "--dtype", "float32"]
    told = json.loads(run("info", folder, *given, "--json").stdout)
    assert (told["context"], told["kv_dtype"]) == (10, "float32")
    for row, count in zip(told["loops"], (1, 2), strict=True):
        kv = facts.kv_bytes(cfg, count, bytes_per_number=4)
        expected = (facts.flops(cfg, count, 10), kv.per_token, kv.fixed)
        assert tuple(row.values())[-3:] == expected
    said = " ".join(run("info", folder, *given).stdout.split())
    assert "a token that sees 10 tokens" in said
    assert "keys and values in float32" in said
    assert "beyond training" in said
    long = config_alone(tmp_path / "long", max_position_embeddings=100_000)
    said = " ".join(run("info", long).stdout.split())
    assert "sees 2,048 tokens. KV: keys and values in bfloat16" in said


def test_info_says_how_the_model_is_put_together(tmp_path):
    """Family, sizes, every line of the wiring, and what the model has not; for models of any family."""
    make_model(**HUGINN).save(tmp_path / "huginn")
    (tmp_path / "huginn" / "model.safetensors").unlink()
    for model in ("tiny-plt-1", "tiny-plt-2", tmp_path / "huginn"):
        result = run("info", model)
        assert result.exit_code == 0, result.output
        said = re.sub(r"\s+", " ", result.stdout)
        cfg = make_model(**HUGINN).cfg if model == tmp_path / "huginn" else ld.load(model).cfg
        assert f"trained with {cfg.n_loops} loop{'s' if cfg.n_loops > 1 else ''} " in said
        assert f"width {cfg.d_model}, {cfg.n_heads} heads of {cfg.d_head} ({cfg.n_kv_heads} of keys and values)" in said
        assert f"MLP {cfg.d_mlp}, vocabulary {cfg.vocab_size}, context {cfg.n_ctx}" in said
        assert f"parameters {facts.parameters(cfg).once:,} " in said
        for name, text in facts.wiring(cfg).items():
            assert f"{name} {text}" in said
        told = json.loads(run("info", model, "--json").stdout)
        assert told["wiring"] == facts.wiring(cfg)
    assert "loopdiag: any looped decoder of this toolkit" in said
    assert "absent offset, shared memory and gate, exit gate" in said


@pytest.mark.parametrize("name", ["a [bold]model[/bold]", "[/red]", "model [1]"])
def test_brackets_in_a_models_name(tmp_path, monkeypatch, name):
    """A folder is called what it is called: no brackets are taken for markup, in answers and in refusals."""
    monkeypatch.chdir(tmp_path)
    expect_refusal(run("info", name), f"There is no model {name!r}")
    Path(name).mkdir(parents=True)
    expect_refusal(run("info", name), f"{name} has no config.json")
    shutil.copy(BUNDLED / "tiny-plt-2" / "config.json", name)
    result = run("info", name)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].strip() == name
    expect_refusal(run("generate", name, "text"), f"{name} has no weights")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--loops", "0"], "--loops 0 is out of range: allowed 1 to 64"),
        (["--loops", "65"], "--loops 65 is out of range: allowed 1 to 64"),
        (["--context", "0"], "--context 0 is out of range: allowed 1 or more"),
        (["--context", "-5"], "--context -5 is out of range"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_arguments_of_info(tmp_path, arguments, said):
    """What is allowed, before anything is read."""
    expect_refusal(run("info", tmp_path / "nothing here", *arguments), said)


def test_info_of_what_is_no_model(tmp_path):
    """The same refusals as where a model is loaded; an unknown family lists those that are known."""
    (tmp_path / "file").touch()
    expect_refusal(run("info", tmp_path / "file"), "is a file: give the folder that holds config.json")
    expect_refusal(run("info", "no-such-model"), "There is no model 'no-such-model': bundled are tiny-plt-1")
    expect_refusal(run("info", tmp_path), "has no config.json: it is no model folder")
    unknown = run("info", config_alone(tmp_path / "gpt", model_type="gpt2"))
    expect_refusal(unknown, "model_type 'gpt2' is not supported; supported are ")
    for family in FAMILIES:
        assert family.MODEL_TYPE in unknown.stderr


def test_a_hub_id_without_a_network():
    """With --offline nothing is asked of the hub: what its cache does not hold is refused at once."""
    for command in (["info", "loopdiag-tests/none"], ["recommend", "loopdiag-tests/none"]):
        expect_refusal(run(*command, "--offline"), "no folder here, and the hub's cache does not hold it")
    command = ["generate", "loopdiag-tests/none", "text", "--offline"]
    expect_refusal(run(*command), "no folder here, and the hub's cache does not hold it")


# -- generate ------------------------------------------------------------------------------------------

PROMPT = "def area(self):"


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--loops", "1"], {"n_loops": 1}),
        (["--loops", "2", "--seed", "3"], {"n_loops": 2, "seed": 3}),
        (
            ["--temperature", "1.5", "--top-p", "0.8", "--seed", "3"],
            {"temperature": 1.5, "top_p": 0.8, "seed": 3},
        ),
    ],
)
def test_generate_writes_what_the_model_generates(options, settings):
    """The prompt and what follows, on stdout alone, as `model.generate` gives it; the notes stay away."""
    model = ld.load("tiny-plt-2")
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    written = model.generate(ids, 12, **settings)[0]
    result = run("generate", "tiny-plt-2", PROMPT, "--max-new-tokens", "12", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == model.tokenizer.decode(written, skip_special_tokens=True) + "\n"
    assert result.stdout.startswith(PROMPT)
    assert "note" not in result.stderr


def test_generate_in_another_dtype():
    """--dtype is what the model computes in: other draws from the same seed."""
    command = ["generate", "tiny-plt-2", PROMPT, "--max-new-tokens", "30", "--temperature", "2", "--dtype"]
    texts = []
    for dtype in ("float32", "bfloat16"):
        model = ld.load("tiny-plt-2", dtype=dtype)
        ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
        written = model.generate(ids, 30, temperature=2.0)[0]
        texts.append(model.tokenizer.decode(written, skip_special_tokens=True) + "\n")
        assert run(*command, dtype).stdout == texts[-1]
    assert texts[0] != texts[1]


def test_generate_beyond_training_is_noted():
    """On stderr, where --quiet leaves nothing; stdout has the same text either way. Trained counts get no note."""
    command = ["generate", "tiny-plt-2", PROMPT, "--max-new-tokens", "4", "--loops"]
    loud, quiet = run(*command, "3"), run(*command, "3", "--quiet")
    assert "note: 3 loops are beyond the 2 that tiny-plt-2 was trained with" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout != ""
    assert "note" not in loud.stdout
    assert "note" not in run(*command, "2").stderr


def test_generate_beyond_the_context_is_noted(tmp_path):
    """Prompt and new tokens together, against what the model was made for."""
    model = saved_model(tmp_path / "model", n_ctx=8)
    for new, noted in ((5, False), (6, True)):
        result = run("generate", model, "w1 w2 w3", "--max-new-tokens", new)
        assert result.exit_code == 0, result.output
        assert (f"3 + {new} tokens may go beyond the 8" in result.stderr) is noted
        assert len(result.stdout.split()) == 3 + new


@pytest.mark.parametrize("loops", [[], ["--loops", "1"], ["--loops", "4"]], ids=["trained", "fewer", "more"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([PROMPT, "--temperature", "-1"], "--temperature -1.0 is out of range: allowed is 0, or a number from 1e-4 on"),
        ([PROMPT, "--temperature", "nan"], "--temperature nan is out of range"),
        ([PROMPT, "--top-p", "0"], "--top-p 0.0 is out of range: allowed is a number above 0, at most 1"),
        ([PROMPT, "--top-p", "1.1"], "--top-p 1.1 is out of range"),
        ([PROMPT, "--max-new-tokens", "0"], "--max-new-tokens 0 is out of range: allowed 1 or more"),
        ([PROMPT, "--seed", "-1"], "--seed -1 is out of range"),
        ([""], "The prompt is empty"),
        ([PROMPT, "--chat"], "tiny-plt-2 has no chat template: leave --chat out"),
    ],
)
def test_bad_arguments_of_generate(arguments, said, loops):
    """One message that says what is allowed, exit 2, no text; whatever the loop count."""
    expect_refusal(run("generate", "tiny-plt-2", *arguments, *loops), said)


@pytest.mark.parametrize(
    "given",
    [
        *(["--loops", loops] for loops in ("0", "65", "-1")),
        *(["--temperature", "inf"], ["--top-p", "nan"], ["--max-new-tokens", "-3"], ["--seed", "-1"]),
    ],
)
def test_bad_numbers_are_refused_before_any_model_is_looked_for(given):
    """The flag, what came and what is allowed."""
    expect_refusal(run("generate", "no-such-model", PROMPT, *given), f"{' '.join(given)} is out of range: allowed ")


def test_a_model_that_cannot_read(tmp_path):
    """Without a tokenizer there is no text: refused for text, not for numbers."""
    make_model(dtype=torch.float32).save(tmp_path)
    expect_refusal(run("generate", tmp_path, "text"), "has no tokenizer, so it cannot read text")
    assert run("info", tmp_path).exit_code == 0


def test_chat_goes_through_the_template(tmp_path):
    """The prompt stands in the template, with the turn of the answer opened; without --chat as it is.

    A text starts with the tokenizer's special token, which is not shown; a template brings its own.
    """
    tokenizer = word_tokenizer()
    turns = "{% for message in messages %}w5 {{ message.content }} w6{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %} w7{% endif %}"
    tokenizer.add_special_tokens({"bos_token": "w9"})
    starts = TemplateProcessing(single="w9 $A", special_tokens=[("w9", 9)])
    tokenizer.backend_tokenizer.post_processor = starts
    folder = saved_model(tmp_path / "model", tokenizer)
    model = ld.load(folder)
    for given, ids, start in (([], [9, 1, 2], "w1 w2 "), (["--chat"], [5, 1, 2, 6, 7], "w5 w1 w2 w6 w7 ")):
        written, started = (model.generate(torch.tensor([i]), 8, temperature=2.0)[0, -8:] for i in (ids, [9, *ids]))
        assert written.tolist() != started.tolist()
        result = run("generate", folder, "w1 w2", *given, "--max-new-tokens", "8", "--temperature", "2")
        assert result.stdout == start + tokenizer.decode(written, skip_special_tokens=True) + "\n"


def test_the_seed_of_generate_draws_the_start(tmp_path):
    """Of models with a random start, even where the likeliest token is taken; the same seed, the same text."""
    model = saved_model(tmp_path / "model", **HUGINN)
    texts = [run("generate", model, "w1 w2", "--max-new-tokens", "20", "--seed", seed).stdout for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# -- failures and help ---------------------------------------------------------------------------------


def test_a_failure_while_running_is_exit_1(monkeypatch):
    """What breaks in the middle is told as such, in one line."""

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("loopdiag.diagnosis.diagnose", broken)
    result = run("recommend", *SMALL)
    assert result.exit_code == cli.Exit.FAILED
    assert "error: RuntimeError: out of memory" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["loopdiag"], [sys.executable, "-m", "loopdiag"]], ids=["script", "module"])
def test_help_without_torch(command):
    """Both ways in give help, quickly: torch is not imported for it."""
    if command == ["loopdiag"]:
        command = [str(Path(sys.executable).with_name("loopdiag"))]
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, env=environment)
    assert "recommend" in done.stdout
    assert "typer" in done.stderr
    assert " torch\n" not in done.stderr
