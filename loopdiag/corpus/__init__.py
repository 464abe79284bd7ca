"""Text in, token batches out: documents, their fit / report split, tokenisation and padding."""

from loopdiag.corpus.batching import Batch, TokenDocument, batches, tokenize
from loopdiag.corpus.classes import TOKEN_CLASSES, token_classes
from loopdiag.corpus.documents import Corpus, CorpusError, Document, bundled
from loopdiag.corpus.reading import read

__all__ = [
    "TOKEN_CLASSES",
    "Batch",
    "Corpus",
    "CorpusError",
    "Document",
    "TokenDocument",
    "batches",
    "bundled",
    "read",
    "token_classes",
    "tokenize",
]
