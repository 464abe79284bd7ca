"""Documents from files, folders and hub data sets, split in two halves by source."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from loopdiag.corpus.documents import MIN_DOCUMENTS, Corpus, CorpusError, Document

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("text", "content", "code")
MIN_SOURCES = 4
SOURCE_FIELDS = ("source", "repo", "path")
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".py")
HUB_ROWS = 2_000
LARGEST_TEXT = 2**28  # bytes of a file, characters of a corpus: more than anybody measures, and held in memory
PARQUET_ROWS = 64  # at a time: a small file may hold the same large text many times
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
ALLOWED = (
    "Allowed: a folder of text files, a .jsonl, .json (one object per line) or .parquet file with a "
    "text, content or code field, or a hub id such as owner/name or owner/name:split"
)


class _BinaryFileError(CorpusError):
    """A file that is not UTF-8 text."""


def read(data: str | os.PathLike[str], *, revision: str | None = None, rows: int = HUB_ROWS) -> Corpus:
    """Read documents and split them in two halves by source.

    A path that exists is read as it is, anything else that looks like a hub id is looked up on the hub:

    - .jsonl, .json, .parquet: one document per line or row, its text in the field `text`, `content` or
      `code`. Its source is the field `source`, `repo` or `path`, else the document itself.
    - any other file: one document, its own source.
    - a folder: every text file under it, sorted by path, without hidden ones, `__pycache__` and binary files;
      if it holds .jsonl and .parquet files only, the documents in those.
    - `owner/name` or `name`, `:split` behind it (else `train`): the first `rows` rows, streamed.

    Empty documents and repetitions of a text are left out; how many is logged.

    Args:
        data: Path or hub id.
        revision: Commit, tag or branch of a hub data set; says nothing about a path.
        rows: Rows to read of a hub data set, 2,000 unless told; likewise.

    Returns:
        A corpus whose halves share no source and differ by at most the size of the largest one. The split
        depends on the names and sizes of the sources, not on their order.

    Raises:
        CorpusError: Nothing there, not text, a broken line or row, fewer than 16 documents or only one source, or more
            text than is held in memory.
    """
    given = os.fspath(data)
    path = Path(os.path.expanduser(given))  # not Path.expanduser, which raises for an unknown user
    skipped: Counter[str] = Counter()
    # os.path rather than Path's methods, which raise for a name that is too long. "" is no path, Path("") is.
    if given and os.path.isdir(path):
        name, documents = _writable(path.resolve().name), _folder_documents(path, skipped)
    elif given and os.path.exists(path):
        name = _writable(path.name)
        documents = _file_documents(path, name, skipped)
    elif isinstance(data, str) and _looks_like_hub_id(data):
        name, documents = data, _hub_documents(data, revision, rows, skipped)
    else:
        raise CorpusError(f"{given!r}: no such file or folder. {ALLOWED}. Check the path.")

    unique = _without_repetitions(_bounded(documents, given), skipped)
    left_out = f" (skipped: {', '.join(f'{n} {reason}' for reason, n in sorted(skipped.items()))})" if skipped else ""
    if not unique:
        raise CorpusError(f"{given} holds no text{left_out}. {ALLOWED}. Check that this is the right one.")
    if len(unique) < MIN_DOCUMENTS:
        raise CorpusError(
            f"{given}: number of documents is {len(unique)}{left_out}; at least {MIN_DOCUMENTS} are needed, half to "
            "fit readouts and half to report on. Add documents: a text file is one, each line of a .jsonl file is one."
        )
    n_sources = len({document.source for document in unique})
    if n_sources < MIN_SOURCES:
        raise CorpusError(
            f"{given}: the number of sources of the {len(unique)} documents is {n_sources}; at least {MIN_SOURCES} are "
            "needed, two for each half, since the halves share none. "
            f"Remove the field ({', '.join(SOURCE_FIELDS)}) or add other sources."
        )
    fit, report = split(unique)
    logger.info(
        "%s: %d documents of %d sources, %d to fit and %d to report%s",
        *(name, len(unique), n_sources, len(fit), len(report), left_out),
    )
    return Corpus(name, fit, report)


def split(documents: Sequence[Document]) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Split documents in two halves (fit, report), every source whole on one side.

    Sources in the order of the sha256 of their names go to the smaller half, at a tie to `report`: so the
    halves differ by at most the largest source, and sources of one document each alternate.
    """
    sizes = Counter(document.source for document in documents)
    fit_sources = set()
    n_fit = n_report = 0
    for source in sorted(sizes, key=_hash):
        if n_fit < n_report:
            fit_sources.add(source)
            n_fit += sizes[source]
        else:
            n_report += sizes[source]
    fit = tuple(document for document in documents if document.source in fit_sources)
    report = tuple(document for document in documents if document.source not in fit_sources)
    return fit, report


def _hash(source: str) -> str:
    # surrogatepass: a file name need not be valid UTF-8.
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _looks_like_hub_id(data: str) -> bool:
    # "notes.jsonl" could be a hub id too; a mistyped file name should not wait for the network.
    is_file_name = Path(data).suffix in RECORD_SUFFIXES + TEXT_SUFFIXES
    return HUB_ID.fullmatch(data) is not None and not is_file_name


def _writable(name: str) -> str:
    """A name as files of results can hold it: valid Unicode without NUL."""
    return name.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "backslashreplace").decode()


def _bounded(documents: Iterable[Document], given: str) -> Iterator[Document]:
    """The documents, as long as their text is no more than is held in memory."""
    characters = 0
    for document in documents:
        characters += len(document.text)
        if characters > LARGEST_TEXT:
            raise CorpusError(
                f"{given} holds more than {LARGEST_TEXT:,} characters of text, which is the most that is read. "
                "Give a part of it."
            )
        yield document


def _without_repetitions(documents: Iterable[Document], skipped: Counter[str]) -> list[Document]:
    """The first document of each text: a repetition could stand on both sides of the split."""
    first: dict[str, Document] = {}
    for document in documents:
        if first.setdefault(document.text, document) is not document:
            skipped["repeated"] += 1
    return list(first.values())


def _folder_documents(folder: Path, skipped: Counter[str]) -> Iterator[Document]:
    paths = {_writable(path.relative_to(folder).as_posix()): path for path in _visible_files(folder)}
    if all(path.suffix in (".jsonl", ".parquet") for path in paths.values()):
        for name, path in sorted(paths.items()):
            yield from _file_documents(path, name, skipped)
        return
    for name, path in sorted(paths.items()):
        try:
            yield from _text_documents(path, name, skipped)
        except _BinaryFileError:
            skipped["binary"] += 1


def _visible_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        # os.walk goes on into what is left in this list.
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if os.path.isfile(path))


def _file_documents(path: Path, name: str, skipped: Counter[str]) -> Iterator[Document]:
    if not path.is_file():
        raise CorpusError(f"{name} is a pipe or a device. {ALLOWED}. Write it to a file first.")
    if path.suffix == ".parquet":
        return _record_documents(_parquet_rows(path, name), name, "row", skipped)
    if path.suffix in RECORD_SUFFIXES:
        return _record_documents(_json_lines(path, name), name, "line", skipped)
    return _text_documents(path, name, skipped)


def _text_documents(path: Path, name: str, skipped: Counter[str]) -> Iterator[Document]:
    text = _file_text(path, name)
    if text.strip():
        yield Document(text, name, source=name)
    else:
        skipped["empty"] += 1


def _file_text(path: Path, name: str) -> str:
    try:
        if (size := path.stat().st_size) > LARGEST_TEXT:
            raise CorpusError(
                f"{name} has {size:,} bytes. Allowed: at most {LARGEST_TEXT:,} bytes of text in a file. Give a part of "
                "it."
            )
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{name} cannot be read: {error.strerror}. Give a file that you may read.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BinaryFileError(
            f"{name} is not UTF-8 text (byte {error.start}). Allowed: text in UTF-8. Convert it or leave it out."
        ) from error
    if "\0" in text:
        raise _BinaryFileError(f"{name} is binary (it has a NUL byte). Allowed: text in UTF-8. Leave it out.")
    return text


def _json_lines(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): JSON text may hold other line ends, such as U+2028, unescaped.
    for number, line in enumerate(_file_text(path, name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        # Nested without end, or with a number of thousands of digits, it is no JSONDecodeError.
        except (ValueError, RecursionError) as error:
            why = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
            raise CorpusError(
                f"broken JSON on line {number} of {name}: {why}. "
                "Allowed: one JSON object per line. Mend or remove the line."
            ) from error


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [column for column in file.schema_arrow.names if column in TEXT_FIELDS + SOURCE_FIELDS]
            if not set(wanted) & set(TEXT_FIELDS):
                raise _no_text_field(name, file.schema_arrow.names)
            rows = (row for batch in file.iter_batches(PARQUET_ROWS, columns=wanted) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{name} cannot be read as parquet: {error}. Write it again or give .jsonl.") from error


def _hub_documents(hub_id: str, revision: str | None, most: int, skipped: Counter[str]) -> Iterator[Document]:
    import datasets

    name, _, part = hub_id.partition(":")
    try:
        stream = datasets.load_dataset(name, split=part or "train", streaming=True, revision=revision)
        rows = list(islice(stream, most))
    # Network, permission, a missing split, an unknown format: each layer below raises its own kinds.
    except Exception as error:
        raise CorpusError(
            f"{hub_id!r}: no such file or folder, and not readable on the hub as data set {name}, split "
            f"{part or 'train'}, revision {revision or 'main'} ({error}). {ALLOWED}. Check the spelling or the network."
        ) from error
    return _record_documents(enumerate(rows, start=1), name, "row", skipped)


def _record_documents(
    records: Iterable[tuple[int, Any]], name: str, unit: str, skipped: Counter[str]
) -> Iterator[Document]:
    """Documents of numbered records; `unit` is what the file counts ("line", "row")."""
    for number, record in records:
        where = f"{unit} {number} of {name}"
        if not isinstance(record, dict):
            raise CorpusError(
                f"{where} is a JSON {type(record).__name__}. Allowed: an object such as "
                '{"text": "..."}, one per line. Wrap or remove it.'
            )
        field = next((field for field in TEXT_FIELDS if field in record), None)
        if field is None:
            raise _no_text_field(where, record)
        text = record[field]
        if not isinstance(text, str):
            raise CorpusError(
                f'"{field}" on {where} is of type {type(text).__name__}. Allowed: a string. Mend or remove the {unit}.'
            )
        if wrong := re.search("[\0\ud800-\udfff]", text):
            what = "a NUL" if wrong[0] == "\0" else "half a surrogate pair"
            raise CorpusError(
                f'"{field}" on {where} has {what}. Allowed: valid Unicode without NUL. Mend or remove the {unit}.'
            )
        if not text.strip():
            skipped["empty"] += 1
            continue
        sources = (_writable(str(record[field])) for field in SOURCE_FIELDS if record.get(field) not in (None, ""))
        document_name = f"{name}:{number}"
        yield Document(text, document_name, source=next(sources, document_name))


def _no_text_field(where: str, fields: Iterable[str]) -> CorpusError:
    return CorpusError(
        f"{where} has no text field, only: {', '.join(fields) or 'nothing'}. "
        f"Allowed: {', '.join(TEXT_FIELDS)}. Rename the field that holds the text."
    )
