"""Text in, token batches out: documents, their fit / report split, tokenisation and padding."""

from loopdiag.corpus.batching import Batch, TokenDocument, batches, tokenize
from loopdiag.corpus.documents import Corpus, CorpusError, Document, bundled
from loopdiag.corpus.reading import read

__all__ = ["Batch", "Corpus", "CorpusError", "Document", "TokenDocument", "batches", "bundled", "read", "tokenize"]
