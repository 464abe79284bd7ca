"""What a sweep is trained and measured on: a stream of tokens, and held-out documents of other sources."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from loopdiag.corpus import Corpus, CorpusError, Document, bundled, read
from loopdiag.corpus.documents import MIN_DOCUMENTS, spread
from loopdiag.corpus.reading import MIN_SOURCES, split
from loopdiag.files import whole
from loopdiag.losses import SweepError
from loopdiag.sweep import sources, tasks

BUNDLED = "bundled"
HELD_OUT = 256  # documents at most, and a tenth of what there is
CHARACTERS_PER_PACKAGE = 2_500_000
SEED = 0  # of the order of training documents and of what tasks draw


@dataclass(frozen=True)
class Text:
    """Training tokens and held-out documents that share no source.

    Attributes:
        stream: Training tokens, documents in a row, each ended by the tokenizer's last token of a text.
        corpus: Held-out documents, half to choose on (`fit`), half to report.
        tokenizer: What made the tokens.
    """

    stream: np.ndarray
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of the training tokens and the held-out documents."""
        stream = hashlib.sha256(np.ascontiguousarray(self.stream, dtype="<u4").tobytes())
        return hashlib.sha256((stream.hexdigest() + self.corpus.fingerprint).encode()).hexdigest()


def prepare(
    data: str, tokens: int, tokenizer: PreTrainedTokenizerFast | None, folder: Path, *, settled: bool = False
) -> Text:
    """The text of a sweep; made once, then read back from `folder`.

    Args:
        data: `bundled` (Python source of the packages installed here, held out the bundled documents), a task of
            `tasks.TASKS`, or what `corpus.read` reads, of which some sources are held out.
        tokens: Training tokens; a text that has fewer is taken whole.
        tokenizer: What reads the text; a task has its own.
        folder: Where it is kept.
        settled: Whether models are trained on what is there; else text that was made for something else is made anew.

    Raises:
        CorpusError: Text that cannot be read, or too little of it.
        SweepError: What is there is settled, and was made for something else.
    """
    asked: dict[str, Any] = {"data": _name(data), "files": _files(data), "tokens": tokens}
    if tokenizer is not None and data not in tasks.TASKS:
        asked["tokenizer"] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    made_for, documents_file = folder / "made_for.json", folder / "documents.jsonl"
    before = json.loads(made_for.read_text()) if made_for.is_file() else None
    if before and settled:
        if other := [name for name in (*asked, "tokenizer") if asked.get(name) != before.get(name)]:
            raise SweepError(
                f"{folder.parent} holds another sweep ({made_for} says on what text; {other[0]} differs): give another "
                "folder, or the settings of this one."
            )
    elif before and before != asked:
        documents_file.unlink(missing_ok=True)
    if not documents_file.is_file():
        made = _made(data, tokens, tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        made.tokenizer.save_pretrained(folder / "tokenizer")
        with whole(folder / "stream.npy") as partial, partial.open("wb") as file:
            np.save(file, made.stream)
        records = [
            {"name": document.name, "source": document.source, "split": half, "text": document.text}
            for half, documents in (("fit", made.corpus.fit), ("report", made.corpus.report))
            for document in documents
        ]
        with whole(made_for) as partial:
            partial.write_text(json.dumps(asked) + "\n")
        with whole(documents_file) as partial:  # last: it says that all is there
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    records = [json.loads(line) for line in documents_file.read_text().rstrip("\n").split("\n")]
    halves: dict[str, list[Document]] = {"fit": [], "report": []}
    for record in records:
        halves[record["split"]].append(Document(record["text"], record["name"], record["source"]))
    kept = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    held_out = Corpus(_name(data), tuple(halves["fit"]), tuple(halves["report"]))
    return Text(np.load(folder / "stream.npy", mmap_mode="r"), held_out, kept)


def _name(data: str) -> str:
    """Of a path its last part, as `corpus.read` names what it reads."""
    return Path(data).resolve().name if Path(data).exists() else data


def _files(data: str) -> str | None:
    """What tells a text from another of the same name, wherever it lies: names and sizes of its files, hashed."""
    path = Path(os.path.expanduser(data))
    if data in (BUNDLED, *tasks.TASKS) or not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    sizes = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def _made(data: str, tokens: int, tokenizer: PreTrainedTokenizerFast | None) -> Text:
    if data in tasks.TASKS:
        task = tasks.TASKS[data]
        return Text(tasks.stream(task, tokens, SEED), tasks.corpus(task), tasks.tokenizer(task))
    if tokenizer is None:
        raise CorpusError(f"{data} is text, which needs a tokenizer: give one.")
    if data == BUNDLED:
        corpus = bundled()
        held_out = [document.text for half in (corpus.fit, corpus.report) for document in half]
        files = sources.training_files(held_out, CHARACTERS_PER_PACKAGE, sources.installed())
        texts: Iterable[str] = (file.text for file in files)
    else:
        try:
            everything = read(data, rows=max(2000, tokens // 100))
        except CorpusError as error:
            if os.path.exists(os.path.expanduser(data)):
                raise
            raise CorpusError(f"{error} A sweep also takes {BUNDLED} and the tasks {', '.join(tasks.TASKS)}.") from None
        corpus, training = _hold_out(everything)
        texts = (document.text for document in training)
    return Text(_stream(texts, tokenizer, tokens), corpus, tokenizer)


def _hold_out(everything: Corpus) -> tuple[Corpus, list[Document]]:
    """Some sources to measure on, the rest to train on, in an order of their own."""
    documents = [*everything.fit, *everything.report]
    wanted = min(HELD_OUT, max(MIN_DOCUMENTS, len(documents) // 10))
    held_out: list[Document] = []
    by_source: dict[str, list[Document]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document)
    # Small sources first, so that one giant is not most of what is held out; equal ones by the hash of their names.
    names = sorted(by_source, key=lambda name: (len(by_source[name]), hashlib.sha256(name.encode()).hexdigest()))
    while len(names) > 1 and (len(held_out) < wanted or len({each.source for each in held_out}) < MIN_SOURCES):
        held_out += by_source.pop(names.pop(0))
    training = [document for documents in by_source.values() for document in documents]
    if len(training) < MIN_SOURCES or len({document.source for document in held_out}) < MIN_SOURCES:
        raise CorpusError(
            f"{everything.name} has {len(documents)} documents, too few or of too few sources to hold some out and "
            "train on others. Give more documents, or more sources."
        )
    held_out = [held_out[index] for index in spread(held_out, wanted)]  # of large sources some is enough
    random.Random(SEED).shuffle(training)
    fit, report = split(held_out)
    return Corpus(everything.name, fit, report), training


def _stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, tokens: int) -> np.ndarray:
    """At most `tokens` tokens, documents in a row."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id or 0
    parts, length = [], 0
    for some in _in_pieces(texts, 64):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.array([*ids, end], dtype=np.uint32))
            length += len(parts[-1])
        if length >= tokens:
            break
    stream = np.concatenate(parts)[:tokens] if parts else np.empty(0, np.uint32)
    return stream.astype(np.uint16) if stream.size and int(stream.max()) < 2**16 else stream


def _in_pieces(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    piece: list[str] = []
    for text in texts:
        piece.append(text)
        if len(piece) == size:
            yield piece
            piece = []
    if piece:
        yield piece
