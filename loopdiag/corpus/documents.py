"""Documents, and the corpus that holds them in two halves."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Protocol

from loopdiag.errors import InputError

MIN_DOCUMENTS = 16


class CorpusError(InputError):
    """Text that cannot be used; the message says what was given, what is allowed and what to do."""


@dataclass(frozen=True)
class Document:
    """One text, the unit of statistics.

    Attributes:
        text: The whole text.
        name: Unique in the corpus ("src/a.py", "notes.jsonl:12").
        source: The package or file it came from: documents of one source stay on one side of the split
            and are resampled together by the bootstrap.
    """

    text: str
    name: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Documents in two halves that share no source.

    Attributes:
        name: Short name for tables and provenance.
        fit: Documents that readouts are fitted on.
        report: Documents that everything shown is measured on.
    """

    name: str
    fit: tuple[Document, ...]
    report: tuple[Document, ...]

    def __repr__(self) -> str:
        return f"Corpus {self.name}: {len(self.fit)} documents to fit on, {len(self.report)} to report on"

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) over split, names and texts, in their order."""
        digest = hashlib.sha256()
        for split, documents in (("fit", self.fit), ("report", self.report)):
            for document in documents:
                digest.update(json.dumps([split, document.name, document.text]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Documents in both halves together."""
        return len(self.fit) + len(self.report)

    def take(self, n_documents: int) -> Corpus:
        """A smaller corpus of min(n_documents, len(self)) documents, in their present order.

        Half of them come from each half, an odd one from `report`; what one half lacks comes from the other.
        Within a half, one document of each source in sorted order is taken, then a second of each, and so
        on: few documents still cover many packages. The same call always takes the same documents.

        Raises:
            CorpusError: `n_documents` is below 16.
        """
        if n_documents < MIN_DOCUMENTS:
            raise CorpusError(
                f"{n_documents} documents asked for: at least {MIN_DOCUMENTS} are needed, half to fit readouts and "
                f"half to report on. Ask for {MIN_DOCUMENTS} or more; {self.name} has {len(self)}."
            )
        n_fit = min(len(self.fit), max(n_documents // 2, n_documents - len(self.report)))
        halves = ((self.fit, n_fit), (self.report, n_documents - n_fit))
        fit, report = (tuple(half[index] for index in spread(half, count)) for half, count in halves)
        return Corpus(self.name, fit, report)


class Sourced(Protocol):
    """A document that knows which cluster it belongs to."""

    @property
    def source(self) -> str: ...


def spread(documents: Sequence[Sourced], n_documents: int) -> list[int]:
    """Places of at most `n_documents`, taken from the sources in turn."""
    seen: Counter[str] = Counter()
    turns = []
    for index, document in enumerate(documents):
        turns.append((seen[document.source], document.source, index))
        seen[document.source] += 1
    return sorted(index for _, _, index in sorted(turns)[:n_documents])


def bundled() -> Corpus:
    """The held-out Python code that ships with loopdiag, split by package.

    No file of these packages was used to train the bundled models. Licences: `bundled/NOTICE.md`.

    Example:
        >>> bundled()
        Corpus bundled: 120 documents to fit on, 115 to report on
        >>> bundled().take(16)
        Corpus bundled: 8 documents to fit on, 8 to report on
    """
    file = resources.files("loopdiag.corpus") / "bundled" / "documents.jsonl"
    halves: dict[str, list[Document]] = {"fit": [], "report": []}
    # Not splitlines(): JSON text may hold other line ends, such as U+2028, unescaped.
    for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        record = json.loads(line)
        halves[record["split"]].append(Document(record["text"], record["name"], record["source"]))
    return Corpus("bundled", tuple(halves["fit"]), tuple(halves["report"]))
