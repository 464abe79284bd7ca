"""Data as bad days bring it: refused by name, or read right; and what is read never runs."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run
from tiny import word_tokenizer

import loopdiag as ld
from loopdiag.corpus import CorpusError, Document, read, reading, tokenize
from loopdiag.corpus.batching import LONGEST_TOKEN
from loopdiag.diagnosis import Diagnosis
from loopdiag.model.loading import BUNDLED

ODD = {  # texts that are valid Unicode
    "bidirectional controls": "\u202e\u2066\u200f abc \u2069\u202c",
    "invisible": "\u200b\u200c\u200d\u2060\ufeff",
    "combining": "a" + "\u0301" * 500,
    "line separators": "a\u2028b\u2029c\x85d",
    "control characters": "\x01\x02\x07\x08\x1b[31m\x7f",
    "private and unassigned": "\ue000\U000f0000\U0010ffff",
    "noncharacters": "\ufffe\uffff\ufdd0",
    "astral": "𝒳🏳️‍🌈👩‍👩‍👧",
    "carriage returns": "a\r\nb\rc",
    "markup": "<script>alert(1)</script>{{ 7 * 7 }}[red]x[/red]",
    "shell and format": "$(touch x) `touch x` %s {0} \\N{BULLET}",
    "special tokens": "<|endoftext|><s></s><unk>",
}


@pytest.fixture(scope="module")
def tokenizer():
    return ld.load("tiny-plt-2").tokenizer


def lines(file, *records):
    file.write_bytes(
        b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in records)
    )
    return file


def outcome(file):
    """What a file is read as, or why it is not."""
    try:
        return repr(read(file))
    except CorpusError as refused:
        return str(refused)


def enough(*more):
    """Records of twenty plain documents, and more."""
    return [{"text": f"document number {number} of a plain corpus"} for number in range(20)] + list(more)


# -- JSON lines -------------------------------------------------------------------------------------

LINES = {
    "not JSON": b"hello\n",
    "cut short": b'{"text": "a',
    "two on a line": b'{"text": "a"}{"text": "b"}\n',
    "a trailing comma": b'{"text": "a",}\n',
    "single quotes": b"{'text': 'a'}\n",
    "a number": b"3\n",
    "null": b"null\n",
    "a list": b'["a"]\n',
    "a string": b'"a"\n',
    "no text field": b'{"body": "a"}\n',
    "an empty object": b"{}\n",
    "text is null": b'{"text": null}\n',
    "text is a number": b'{"text": 3}\n',
    "text is a list": b'{"text": ["a"]}\n',
    "text is an object": b'{"text": {"a": "b"}}\n',
    "half a surrogate pair": b'{"text": "a \\ud800 b"}\n',
    "the other half": b'{"text": "a \\udfff b"}\n',
    "surrogates in the wrong order": b'{"text": "\\udc00\\ud800"}\n',
    "an escaped NUL": b'{"text": "a \\u0000 b"}\n',
    "a NUL": b'{"text": "a \0 b"}\n',
    "a control character": b'{"text": "a \x01 b"}\n',
    "invalid UTF-8": b'{"text": "a \xff b"}\n',
    "overlong UTF-8": b'{"text": "\xc0\xaf"}\n',
    "surrogates in UTF-8": b'{"text": "\xed\xa0\x80"}\n',
    "UTF-16": '{"text": "a"}\n'.encode("utf-16"),
    "nested without end": b'{"text": ' + b"[" * 100_000 + b"\n",
    "nested objects": b'{"text": "a", "b": ' + b'{"c":' * 100_000 + b"\n",
    "a number of too many digits": b'{"text": "a", "b": ' + b"1" * 5_000 + b"}\n",
    "an unknown escape": b'{"text": "\\x00"}\n',
    "gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_broken_line_among_good_ones(tmp_path, line):
    """The file is named, and the line, where it is one."""
    file = lines(tmp_path / "x.jsonl", *enough(), line)
    with pytest.raises(CorpusError, match=r"(line 21 of x\.jsonl|x\.jsonl is (binary|not UTF-8)).*Allowed: "):
        read(file)


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_text_is_text(tmp_path, tokenizer, text):
    """Taken as it is, from lines, from parquet and from files, and tokenised."""
    wanted = f"{text} and some more words to be long enough"
    found = [read(lines(tmp_path / "x.jsonl", *enough({"text": wanted})))]
    rows = [each["text"] for each in enough({"text": wanted})]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "x.parquet")
    found.append(read(tmp_path / "x.parquet"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, each in enumerate(rows):
        (folder / f"{number}.txt").write_bytes(each.encode())
    found.append(read(folder))
    for corpus in found:
        (document,) = (each for each in (*corpus.fit, *corpus.report) if each.text.endswith("be long enough"))
        assert document.text == wanted.removeprefix("\ufeff")
        assert len(tokenize([document], tokenizer, 64, min_tokens=1)) == 1


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_as_lines(tmp_path_factory, content):
    """Read, or refused by name."""
    file = lines(tmp_path_factory.mktemp("any") / "x.jsonl", *enough(), content)
    assert "x.jsonl" in outcome(file)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(), min_size=1, max_size=80))
def test_any_characters_as_text(tmp_path_factory, text):
    """Surrogates and NULs are refused, all else is there as it was."""
    file = lines(tmp_path_factory.mktemp("any") / "x.jsonl", *enough({"text": f"a{text}z"}))
    if "\0" in text or any("\ud800" <= each <= "\udfff" for each in text):
        with pytest.raises(CorpusError, match=r"line 21 of x\.jsonl has (a NUL|half a surrogate pair)"):
            read(file)
    else:
        corpus = read(file)
        assert f"a{text}z" in [each.text for each in (*corpus.fit, *corpus.report)]


@pytest.mark.parametrize("field", ["source", "repo", "path"])
def test_names_that_files_of_results_cannot_hold(tmp_path, tokenizer, field):
    """Lone surrogates and NULs in a source are written out, so that a run does not fail when it is saved."""
    names = ["a\ud800", "b\0c", "\udcff", "d" * 3000, "é\u202e", 3, ["x"], {"y": 1}]
    records = [{**record, field: names[number % len(names)]} for number, record in enumerate(enough(*enough()[:4]))]
    records = [{**record, "text": f"{record['text']} {number}" * 3} for number, record in enumerate(records)]
    corpus = read(lines(tmp_path / "x.jsonl", *records))
    made = ld.diagnose(ld.load("tiny-plt-2"), corpus, measures=["prediction", "tokens"], max_tokens=16)
    made.save(tmp_path / "d.nc")
    assert Diagnosis.load(tmp_path / "d.nc").data["source"].equals(made.data["source"])
    assert {each.source for each in (*corpus.fit, *corpus.report)} >= {"a\\ud800", "b␀c", "\\udcff", "3"}


# -- parquet ----------------------------------------------------------------------------------------


def table(**columns):
    return pyarrow.table(columns)


BINARY = pyarrow.array([b"\xff\xfe"] * 20, pyarrow.binary())
TABLES = {
    "invalid UTF-8": table(text=pyarrow.Array.from_buffers(pyarrow.string(), 20, BINARY.buffers())),
    "bytes": table(text=BINARY),
    "numbers": table(text=list(range(20))),
    "nulls": table(text=pyarrow.array([None] * 20, pyarrow.string())),
    "lists": table(text=[["a"]] * 20),
    "no columns of text": table(a=["x"] * 20),
    "a NUL": table(text=["a\0b"] * 20),
    "no rows": table(text=pyarrow.array([], pyarrow.string())),
}


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_parquet_of_other_things(tmp_path, rows):
    pyarrow.parquet.write_table(rows, tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"x\.parquet"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_parquet_that_is_cut_short(tmp_path, share):
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table(text=[each["text"] for each in enough()]), file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CorpusError, match=r"x\.parquet cannot be read as parquet"):
        read(file)


def test_flipped_bits_of_parquet(tmp_path):
    """Refused or read, and nothing else."""
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table(text=[each["text"] for each in enough()]), file)
    good, draw = file.read_bytes(), np.random.default_rng(0)
    for place in draw.choice(len(good), 60, replace=False):
        bad = bytearray(good)
        bad[place] ^= 1 << draw.integers(8)
        file.write_bytes(bad)
        assert "x.parquet" in outcome(file)


# -- size -------------------------------------------------------------------------------------------


def test_a_small_parquet_file_of_much_text(tmp_path, monkeypatch):
    """One text of a megabyte, two thousand times: it stops at what is held in memory."""
    monkeypatch.setattr(reading, "LARGEST_TEXT", 2**24)
    pyarrow.parquet.write_table(
        table(text=pyarrow.DictionaryArray.from_arrays(np.zeros(2000, np.int32), ["x" * 2**20])), tmp_path / "x.parquet"
    )
    assert (tmp_path / "x.parquet").stat().st_size < 2**20
    with pytest.raises(CorpusError, match="holds more than 16,777,216 characters of text"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "folder/x.py"])
def test_a_giant_file_is_not_read(tmp_path, name):
    """Five gigabytes that take no room on the disk."""
    (tmp_path / "folder").mkdir()
    with (tmp_path / name).open("wb") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(CorpusError, match=r"has 5,368,709,120 bytes\. Allowed: at most 268,435,456"):
        read(tmp_path / name.split("/")[0])


@pytest.mark.parametrize("text", ["a", " ", "ab ", "漢", "\u202e", "1", "\n", "🏳️‍🌈"], ids=ascii)
def test_one_giant_line(tokenizer, text):
    """Only its beginning is tokenised, and it is the same as of a long line; it counts as cut."""
    giant, long = text * (2**24 // len(text)), text * (LONGEST_TOKEN * 64 // len(text))
    (found,), (expected,) = (tokenize([Document(each, "d", "d")], tokenizer, 64) for each in (giant, long))
    assert (found.input_ids, found.cut) == (expected.input_ids[:64], True)


def test_a_document_of_few_long_tokens_is_cut_and_said_to_be(tokenizer):
    """What was not looked at counts as left out, even where fewer tokens than allowed come of the rest."""
    word = "w" * (LONGEST_TOKEN * 20)
    (found,) = tokenize([Document(" ".join([word] * 40), "d", "d")], word_tokenizer(), 30, min_tokens=1)
    assert found.cut
    assert 0 < len(found.input_ids) < 30


# -- files and folders ------------------------------------------------------------------------------


def a_loop(folder):
    os.symlink(folder, folder / "again")
    os.symlink(folder / "one", folder / "two")
    os.symlink(folder / "two", folder / "one")
    return folder


def special(folder):
    os.mkfifo(folder / "pipe.txt")
    os.symlink("/dev/zero", folder / "zero.txt")
    os.symlink("/nowhere", folder / "gone.txt")
    return folder


def binaries(folder):
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    return folder


def empties(folder):
    for number in range(20):
        (folder / f"{number}.txt").write_bytes(b" \n\t" * number)
    return folder


def a_pipe(folder):
    os.mkfifo(folder / "x.jsonl")
    return folder / "x.jsonl"


def a_device(folder):
    os.symlink("/dev/zero", folder / "x.txt")
    return folder / "x.txt"


def a_link_to_itself(folder):
    os.symlink(folder / "x.txt", folder / "x.txt")
    return folder / "x.txt"


@pytest.mark.parametrize("make", [a_loop, special, binaries, empties, a_pipe, a_device, a_link_to_itself])
def test_places_without_text(tmp_path, make):
    """Nothing is waited for, and nothing is gone round in."""
    with pytest.raises(CorpusError, match=r"holds no text|is a pipe or a device|no such file or folder"):
        read(make(tmp_path))


def test_a_folder_with_much_else_in_it(tmp_path):
    """Text is found among links that lead in circles, devices, binaries and names that are no UTF-8."""
    for make in (a_loop, special, binaries, empties):
        make(tmp_path)
    for number in range(20):
        with open(os.fsencode(tmp_path) + b"/caf\xe9%d.py" % number, "w") as file:
            file.write(f"def function_{number}(): return {number}\n")
    corpus = read(tmp_path)
    names = [each.name for each in (*corpus.fit, *corpus.report)]
    assert len(names) == 20
    assert all(name.startswith("caf\\udce9") for name in names)


@pytest.mark.parametrize(
    "given", ["", "\0", "a\0b", "\ud800", "a/" * 3000, "~nobody/x", "../" * 50 + "x.txt"], ids=ascii
)
def test_names_that_are_none(given, monkeypatch):
    """A path that no system has is no such file."""
    monkeypatch.setattr(reading, "_hub_documents", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises((CorpusError), match="no such file or folder"):
        read(given)


# -- what a run says --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (lambda number: f"x{number}", 2, "none of the .* documents has 16 tokens or more"),
        (lambda number: f"x{number}" if number % 2 else f"{number} " * 400, 0, "documents were left out: too short"),
        (lambda number: f"{number} one two " * 4_000, 0, "were cut at 48 tokens"),
    ],
    ids=["one token each", "some of one token", "longer than the model"],
)
def test_documents_of_any_length(tmp_path, text, code, said):
    """Through the command line: a message without a traceback, or an answer with a note."""
    data = lines(tmp_path / "x.jsonl", *({"text": text(number)} for number in range(40)))
    result = run(
        "diagnose",
        "tiny-plt-2",
        "--data",
        data,
        "--measures",
        "prediction",
        "--max-tokens",
        48,
        "--save",
        tmp_path / "d.nc",
    )
    assert result.exit_code == code
    assert re.search(said, " ".join(result.stderr.split()))


PROGRAM = """
import os
open(os.path.join(os.path.dirname(__file__), "ran"), "w")
"""
LOCAL = """
import socket, sys
def refuse(*_):
    raise SystemExit("the network was asked")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from loopdiag.cli import main
main()
"""


def test_local_files_need_no_network_and_run_no_code(tmp_path):
    """Model, data and results from folders: sockets are blocked, and programs that lie beside them leave no trace."""
    model = shutil.copytree(BUNDLED / "tiny-plt-2", tmp_path / "model")
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))
    data = tmp_path / "data"
    data.mkdir()
    for number in range(16):
        (data / f"{number}.py").write_text(PROGRAM + f"# {number}\n" * 20)
    for name in ("model/modeling.py", "data/data.py", "data/__init__.py", "data/setup.py", "data/conftest.py"):
        (tmp_path / name).write_text(PROGRAM)
    arguments = [
        "recommend",
        str(model),
        "--data",
        str(data),
        "--measures",
        "prediction",
        "--save",
        str(tmp_path / "d.nc"),
    ]
    command = [sys.executable, "-c", LOCAL, *arguments, "--max-tokens", "32", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    command = [sys.executable, "-c", LOCAL, "recommend", str(tmp_path / "d.nc"), "--quiet"]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=300).returncode in (0, 3)
    assert not list(tmp_path.rglob("ran"))


# -- the same again ---------------------------------------------------------------------------------


def test_a_batch_of_any_size_gives_the_same_but_for_rounding():
    """Law: within the tolerances that docs/json.md states, translators fitted anew for each."""
    corpus, model = ld.corpus.bundled().take(16), ld.load("tiny-plt-2")
    one, three, again = (ld.diagnose(model, corpus, batch_size=size, max_tokens=48).data for size in (1, 3, 3))
    assert three.equals(again)
    assert {"nll_usable", "withheld"} <= set(one.data_vars)
    for name in one.data_vars:
        np.testing.assert_allclose(one[name], three[name], rtol=1e-4, atol=1e-5, err_msg=name)
