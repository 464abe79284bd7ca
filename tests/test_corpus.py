import hashlib
import json
import logging
import subprocess
import sys
from importlib import resources

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import loopdiag.corpus
from loopdiag.corpus import Corpus, CorpusError, Document, TokenDocument, batches, read, tokenize
from loopdiag.corpus.reading import split

calm = settings(deadline=None, derandomize=True, max_examples=50)


def make_documents(sources):
    return tuple(Document(f"text {i}", f"document {i}", source) for i, source in enumerate(sources))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(n):
    return [{"text": f"text {i}"} for i in range(n)]


def names(corpus):
    return {document.name for document in corpus.fit + corpus.report}


# A few sources of very different sizes, so that halves can be uneven.
sources = st.lists(st.sampled_from("aaaaaaabbbcdefgh"), min_size=2, max_size=60)


# ---------------------------------------------------------------- documents


def test_fingerprint_is_sha256_over_split_names_and_texts():
    corpus = Corpus("x", (Document("é", "a", "s"),), (Document("2", "b", "t"),))
    expected = hashlib.sha256(b'["fit", "a", "\\u00e9"]["report", "b", "2"]').hexdigest()
    assert corpus.fingerprint == expected


def test_fingerprint_sees_split_names_and_texts_only():
    a, b = Document("1", "a", "s"), Document("2", "b", "t")
    corpus = Corpus("x", (a,), (b,))
    assert Corpus("other name", (a,), (Document("2", "b", "other source"),)).fingerprint == corpus.fingerprint
    changed = [
        Corpus("x", (b,), (a,)),
        Corpus("x", (), (a, b)),
        Corpus("x", (a,), (Document("2", "c", "t"),)),
        Corpus("x", (a,), (Document("3", "b", "t"),)),
    ]
    assert corpus.fingerprint not in {other.fingerprint for other in changed}


def test_take_goes_round_the_sources():
    half = make_documents("aaaaaaaaabbbbbbbbbc")
    corpus = Corpus("x", half, half)
    taken = corpus.take(17)
    assert "".join(document.source for document in taken.fit) == "aaaabbbc"
    assert "".join(document.source for document in taken.report) == "aaaabbbbc"
    assert taken.fit[0] == half[0]
    assert taken.name == "x"
    assert corpus.take(17) == taken


@given(sources_fit=sources, sources_report=sources, n=st.integers(16, 140))
@calm
def test_take_gives_as_many_as_asked_for(sources_fit, sources_report, n):
    corpus = Corpus("x", make_documents(sources_fit), make_documents(sources_report))
    taken = corpus.take(n)
    assert len(taken) == min(n, len(corpus))
    assert set(taken.fit) <= set(corpus.fit)
    assert set(taken.report) <= set(corpus.report)
    if min(len(corpus.fit), len(corpus.report)) >= (n + 1) // 2:
        assert (len(taken.fit), len(taken.report)) == (n // 2, n - n // 2)
    if n >= len(corpus):
        assert taken == corpus
    for whole, part in ((corpus.fit, taken.fit), (corpus.report, taken.report)):
        n_sources = len({document.source for document in whole})
        assert len({document.source for document in part}) == min(len(part), n_sources)


def test_take_refuses_too_few():
    corpus = Corpus("x", make_documents("a" * 20), make_documents("b" * 20))
    with pytest.raises(CorpusError, match=r"15 documents asked for: at least 16 are needed.*x has 40"):
        corpus.take(15)


def test_bundled_documents():
    corpus = loopdiag.corpus.bundled()
    assert len(corpus) >= 200
    assert min(len(corpus.fit), len(corpus.report)) >= 8
    fit_sources = {document.source for document in corpus.fit}
    report_sources = {document.source for document in corpus.report}
    assert not fit_sources & report_sources
    assert len(names(corpus)) == len(corpus)
    assert len({document.text for document in corpus.fit + corpus.report}) == len(corpus)
    notice = (resources.files("loopdiag.corpus") / "bundled" / "NOTICE.md").read_text(encoding="utf-8")
    assert not {source for source in fit_sources | report_sources if source not in notice}


# -------------------------------------------------------------------- split


def test_split_alternates_in_the_order_of_the_hashes():
    documents = make_documents("abcd")
    # The sha256 of d, c, b, a start with 18, 2e, 3e, ca; the first goes to report.
    fit, report = split(documents)
    assert "".join(document.source for document in fit) == "ac"
    assert "".join(document.source for document in report) == "bd"


@given(sources=sources)
@calm
def test_split_keeps_sources_whole_and_halves_even(sources):
    documents = make_documents(sources)
    fit, report = split(documents)
    assert sorted(fit + report, key=documents.index) == list(documents)
    assert not {document.source for document in fit} & {document.source for document in report}
    assert abs(len(fit) - len(report)) <= max(sources.count(source) for source in sources)


@given(sources=sources, random=st.randoms(use_true_random=False))
@calm
def test_split_does_not_depend_on_the_order(sources, random):
    documents = list(make_documents(sources))
    fit, report = split(documents)
    random.shuffle(documents)
    again = split(documents)
    assert (set(again[0]), set(again[1])) == (set(fit), set(report))


@given(n=st.integers(16, 200))
@calm
def test_split_of_single_documents_is_even(n):
    fit, report = split(make_documents(str(i) for i in range(n)))
    assert (len(fit), len(report)) == (n // 2, n - n // 2)


# ------------------------------------------------------------------ reading


def test_json_lines(tmp_path):
    path = write_lines(tmp_path / "notes.jsonl", texts(17))
    corpus = read(path)
    assert corpus.name == "notes.jsonl"
    assert names(corpus) == {f"notes.jsonl:{i}" for i in range(1, 18)}
    assert (len(corpus.fit), len(corpus.report)) == (8, 9)
    assert all(document.source == document.name for document in corpus.fit + corpus.report)
    assert read(str(path)) == corpus


@pytest.mark.parametrize("field", ["text", "content", "code"])
@pytest.mark.parametrize("source", ["source", "repo", "path"])
def test_json_fields(tmp_path, field, source):
    path = write_lines(tmp_path / "x.json", [{field: f"text {i}", source: i // 4, "stars": 3} for i in range(16)])
    corpus = read(path)
    assert {document.source for document in corpus.fit + corpus.report} == {"0", "1", "2", "3"}
    assert (len(corpus.fit), len(corpus.report)) == (8, 8)


def test_json_lines_without_a_source_stand_alone(tmp_path):
    records = [*texts(14), {"text": "a", "source": None}, {"text": "b", "source": ""}, {"text": "c", "source": "s"}]
    corpus = read(write_lines(tmp_path / "x.jsonl", records))
    found = {document.name: document.source for document in corpus.fit + corpus.report}
    assert [found[f"x.jsonl:{i}"] for i in (1, 15, 16, 17)] == ["x.jsonl:1", "x.jsonl:15", "x.jsonl:16", "s"]


def test_json_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"a\u2028b\x85c {i}"}, ensure_ascii=False) for i in range(16)]
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(lines)).encode())
    corpus = read(path)
    assert len(corpus) == 16
    assert "a\u2028b\x85c 0" in {document.text for document in corpus.fit + corpus.report}
    assert max(int(name.partition(":")[2]) for name in names(corpus)) == 31


def test_parquet_gives_what_json_lines_give(tmp_path):
    records = [{"id": i, "code": f"text {i}", "repo": f"r{i // 3}"} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet", row_group_size=7)
    (tmp_path / "json").mkdir()
    by_lines = read(write_lines(tmp_path / "json" / "x.parquet.jsonl", records))
    by_rows = read(tmp_path / "x.parquet")
    assert [(d.text, d.source) for d in by_rows.fit] == [(d.text, d.source) for d in by_lines.fit]
    assert [(d.text, d.source) for d in by_rows.report] == [(d.text, d.source) for d in by_lines.report]
    assert "x.parquet:20" in names(by_rows)


def test_source_tree(tmp_path, caplog):
    tree = tmp_path / "tree"
    for folder in ("src", ".git", "src/__pycache__", "src/.hidden"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "never.py").write_text(f"in {folder}")
    (tree / "src" / "never.py").unlink()
    (tree / ".hidden.py").write_text("hidden")
    for i in range(15):
        (tree / "src" / f"m{i}.py").write_text(f"x = {i}")
    (tree / "README").write_bytes("Größe\r\n".encode())
    (tree / "copy.py").write_text("x = 3")
    (tree / "__init__.py").write_text("")
    (tree / "blank.py").write_text(" \n")
    (tree / "picture.png").write_bytes(b"\x89PNG")
    (tree / "zeros.bin").write_bytes(b"a\0b")
    (tree / "gone.py").symlink_to(tree / "nowhere.py")
    with caplog.at_level(logging.INFO, logger="loopdiag.corpus"):
        corpus = read(tree)
    assert corpus.name == "tree"
    # "copy.py" comes first by path, so that m3.py is the repetition.
    assert names(corpus) == {"README", "copy.py", *(f"src/m{i}.py" for i in range(15) if i != 3)}
    assert all(document.source == document.name for document in corpus.fit)
    for half in (corpus.fit, corpus.report):
        assert [document.name for document in half] == sorted(document.name for document in half)
    assert "Größe\r\n" in {document.text for document in corpus.fit + corpus.report}
    assert caplog.messages == [
        "tree: 16 documents of 16 sources, 8 to fit and 8 to report (skipped: 2 binary, 2 empty, 1 repeated)"
    ]


def test_folder_of_records(tmp_path):
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "1.jsonl", [{"text": f"json {i}"} for i in range(9)])
    table = pyarrow.table({"text": [f"row {i}" for i in range(9)]})
    pyarrow.parquet.write_table(table, tmp_path / "2.parquet")
    corpus = read(tmp_path)
    assert names(corpus) == {f"b/1.jsonl:{i}" for i in range(1, 10)} | {f"2.parquet:{i}" for i in range(1, 10)}


def test_folder_with_other_text_is_a_source_tree(tmp_path):
    write_lines(tmp_path / "x.jsonl", texts(20))
    for i in range(15):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    assert "x.jsonl" in names(read(tmp_path))


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "x.jsonl", texts(16))
    assert len(read("~/x.jsonl")) == 16


def test_an_identical_text_is_kept_once(tmp_path, caplog):
    records = [{"text": f"text {i % 16}", "source": f"s{i}"} for i in range(48)]
    with caplog.at_level(logging.INFO, logger="loopdiag.corpus"):
        corpus = read(write_lines(tmp_path / "x.jsonl", records))
    assert names(corpus) == {f"x.jsonl:{i}" for i in range(1, 17)}
    assert "32 repeated" in caplog.text


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "data",
    ["", "gone.jsonl", "gone.py", "owner/gone.parquet", "./gone", "/gone/gone", "a/b/c", "~nobody/x", "a b" * 99],
)
def test_missing_path(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(CorpusError, match=rf"^'{data}': no such file or folder. Allowed: .* Check the path"):
        read(data)


def test_a_path_object_never_goes_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(CorpusError, match="no such file or folder"):
        read(tmp_path / "gone")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": \n', r"broken JSON on line 3 of x.jsonl: Expecting value \(column 10\). Allowed: "),
        ('{"id": 1, "label": 2}', r"line 1 of x.jsonl has no text field, only: id, label. Allowed: text, content, "),
        ("{}", "line 1 of x.jsonl has no text field, only: nothing."),
        ('["a"]', "line 1 of x.jsonl is a JSON list. Allowed: an object"),
        ('{"text": "a"}\n{"content": 3}', '"content" on line 2 of x.jsonl is of type int. Allowed: a string.'),
        ('{"text": null}', '"text" on line 1 of x.jsonl is of type NoneType. Allowed: a string.'),
        ('{"text": "\\ud800"}', '"text" on line 1 of x.jsonl has half a surrogate pair. Allowed: valid Unicode'),
        ("", "x.jsonl holds no text. Allowed: "),
        ('{"text": ""}\n{"text": " "}', r"x.jsonl holds no text \(skipped: 2 empty\). Allowed: "),
        ("\0", r"x.jsonl is binary \(it has a NUL byte\). Allowed: text in UTF-8."),
        (b"ab\xff", r"x.jsonl is not UTF-8 text \(byte 2\). Allowed: text in UTF-8."),
    ],
)
def test_broken_json_lines(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError, match=message):
        read(path)
    with pytest.raises(CorpusError, match=message.replace("x.jsonl holds", f"{tmp_path} holds")):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x.txt holds no text \(skipped: 1 empty\). Allowed: "),
        (b"a\0", r"x.txt is binary \(it has a NUL byte\). Allowed: text in UTF-8. Leave it out."),
        (b"\xff\xfea", r"x.txt is not UTF-8 text \(byte 0\). Allowed: text in UTF-8. Convert it or leave it out."),
        (
            b"one document",
            r"x.txt: number of documents is 1; at least 16 are needed.*Add documents: a text file is one",
        ),
    ],
)
def test_unusable_text_file(tmp_path, content, message):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read(path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", texts(16))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(CorpusError, match=r"x.jsonl cannot be read: Permission denied. Give a file"):
        read(path)


def test_unusable_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(CorpusError, match=r"x.parquet cannot be read as parquet: .* Write it again or give .jsonl"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "label": [2]}), path)
    with pytest.raises(CorpusError, match=r"x.parquet has no text field, only: id, label. Allowed: text, "):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a"]]}), path)
    with pytest.raises(CorpusError, match=r'"text" on row 1 of x.parquet is of type list. Allowed: a string.'):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    with pytest.raises(CorpusError, match=r"x.parquet holds no text. Allowed: "):
        read(path)


def test_folder_without_text(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no text. Allowed: "):
        read(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.py").write_text("")
    with pytest.raises(CorpusError, match=r"holds no text \(skipped: 1 binary, 1 empty\). Allowed: "):
        read(tmp_path)


def test_too_few_documents(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [*texts(15), {"text": ""}, {"text": "text 3"}])
    with pytest.raises(
        CorpusError,
        match=r"x.jsonl: number of documents is 15 \(skipped: 1 empty, 1 repeated\); at least 16 are needed",
    ):
        read(path)


def test_one_source_cannot_be_split(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{**record, "repo": "r"} for record in texts(16)])
    with pytest.raises(CorpusError, match="the number of sources of the 16 documents is 1; at least 4 are needed"):
        read(path)


# ---------------------------------------------------------------------- hub


def fake_hub(monkeypatch, rows):
    """Puts `rows` on the hub; returns the calls made and how many rows were read."""
    seen = {"calls": [], "rows": 0}

    def stream():
        for row in rows:
            seen["rows"] += 1
            yield row

    def load_dataset(*args, **kwargs):
        seen["calls"].append((args, kwargs))
        return stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


@pytest.mark.parametrize(
    ("data", "revision", "name", "part"),
    [
        ("owner/name", None, "owner/name", "train"),
        ("owner/na-me_2.5:test", "abc", "owner/na-me_2.5", "test"),
        ("wikitext", "v1", "wikitext", "train"),
    ],
)
def test_hub(monkeypatch, tmp_path, data, revision, name, part):
    monkeypatch.chdir(tmp_path)
    seen = fake_hub(monkeypatch, [{"content": f"text {i}", "repo": f"r{i % 10}"} for i in range(20)])
    corpus = read(data, revision=revision)
    assert seen["calls"] == [((name,), {"split": part, "streaming": True, "revision": revision})]
    assert corpus.name == data
    assert names(corpus) == {f"{name}:{i}" for i in range(1, 21)}
    assert {document.source for document in corpus.fit + corpus.report} == {f"r{i}" for i in range(10)}


def test_hub_reads_the_first_2000_rows_and_no_more(monkeypatch):
    seen = fake_hub(monkeypatch, ({"text": f"text {i}"} for i in range(10**9)))
    assert len(read("owner/name")) == 2_000
    assert seen["rows"] == 2_000


def test_a_local_path_wins_over_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = fake_hub(monkeypatch, texts(20))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_lines(tmp_path / "owner" / "name" / "x.jsonl", texts(16))
    assert len(read("owner/name")) == 16
    assert not seen["calls"]


def test_hub_failure(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"^'owner/name:test': no such file or folder, and not readable on the hub as data set owner/name, split test, "
        r"revision main \(Couldn't reach the Hub\). Allowed: .* Check the spelling or the network.$"
    )
    with pytest.raises(CorpusError, match=message):
        read("owner/name:test")


def test_hub_failure_on_the_way(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise OSError("connection lost")

    fake_hub(monkeypatch, rows())
    with pytest.raises(CorpusError, match=r"revision v2 \(connection lost\)"):
        read("owner/name", revision="v2")


def test_hub_rows_are_checked(monkeypatch):
    fake_hub(monkeypatch, [{"image": 1}])
    with pytest.raises(CorpusError, match="row 1 of owner/name has no text field, only: image"):
        read("owner/name")


# ----------------------------------------------------------------- batching


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word: "<s>" is 0, "w1" is 1 and so on. Puts <s> in front; made for 20 tokens."""
    vocabulary = {"<s>": 0} | {f"w{i}": i for i in range(1, 50)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=20)


def words(*ids):
    return " ".join(f"w{i}" for i in ids)


def test_tokenize(tokenizer, caplog):
    documents = [
        Document(words(1, 2, 3), "three", "s"),
        Document(words(4), "short", "s"),
        Document(words(5, 6), "two", "t"),
        Document(words(5, 6, 7, 8), "long", "t"),
    ]
    with caplog.at_level(logging.INFO, logger="loopdiag.corpus"):
        tokenized = tokenize(documents, tokenizer, max_tokens=4, min_tokens=3)
    assert tokenized == [
        TokenDocument("three", "s", (0, 1, 2, 3), cut=False),
        TokenDocument("two", "t", (0, 5, 6), cut=False),
        TokenDocument("long", "t", (0, 5, 6, 7), cut=True),
    ]
    assert caplog.messages == ["1 of 4 documents left out: shorter than 3 tokens"]


def test_tokenize_says_nothing_about_long_documents(tokenizer, monkeypatch, caplog):
    # transformers' loggers do not hand on to the root logger, where caplog listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    documents = [Document(words(*range(1, 41)), "long", "s")]
    with caplog.at_level(logging.WARNING):
        (document,) = tokenize(documents, tokenizer, max_tokens=30)
        assert not caplog.messages
        tokenizer(documents[0].text)
        assert "longer than the specified maximum" in caplog.text
    assert (len(document.input_ids), document.cut) == (30, True)


def test_tokenize_nothing(tokenizer):
    assert tokenize([], tokenizer, max_tokens=16) == []


def test_tokenize_refuses(tokenizer):
    documents = [Document(words(1), "a", "s"), Document(words(2), "b", "s")]
    with pytest.raises(CorpusError, match=r"none of the 2 documents has 16 tokens or more. Give longer documents."):
        tokenize(documents, tokenizer, max_tokens=64)
    with pytest.raises(CorpusError, match="max_tokens 15 is out of range: allowed 16"):
        tokenize(documents, tokenizer, max_tokens=15)


def test_batch():
    documents = [TokenDocument("a", "s", (7, 0), False), TokenDocument("b", "t", (1, 2, 3), True)]
    (batch,) = batches(documents, 8)
    assert torch.equal(batch.input_ids, torch.tensor([[7, 0, 0], [1, 2, 3]]))
    assert torch.equal(batch.attention_mask, torch.tensor([[True, True, False], [True, True, True]]))
    assert batch.input_ids.dtype == torch.int64
    assert (batch.names, batch.sources) == (("a", "b"), ("s", "t"))


@given(
    rows=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9).map(tuple), max_size=12),
    batch_size=st.integers(1, 13),
)
@calm
def test_batches_without_their_padding_are_the_documents(rows, batch_size):
    documents = [TokenDocument(f"d{i}", f"s{i % 3}", row, cut=False) for i, row in enumerate(rows)]
    made = list(batches(documents, batch_size))
    assert [len(batch.names) for batch in made[:-1]] == [batch_size] * (len(made) - 1)
    back = [
        TokenDocument(name, source, tuple(ids[mask].tolist()), cut=False)
        for batch in made
        for ids, mask, name, source in zip(
            batch.input_ids, batch.attention_mask, batch.names, batch.sources, strict=True
        )
    ]
    assert back == documents
    for batch in made:
        assert batch.attention_mask.any(dim=0).all(), "padded beyond the longest document"
        assert not batch.input_ids[~batch.attention_mask].any()


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_refuse_at_once(batch_size):
    with pytest.raises(CorpusError, match=f"batch_size {batch_size} is out of range: allowed 1 and more"):
        batches([], batch_size)


# ------------------------------------------------------------------- import


def test_import_is_light():
    heavy = "torch datasets transformers pyarrow jaxtyping"
    code = f"import sys, loopdiag.corpus; print(*(set('{heavy}'.split()) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
