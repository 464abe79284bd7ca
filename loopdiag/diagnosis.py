"""Measures and readouts over a corpus, and the result that is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from reprlib import repr as short
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from loopdiag import html
from loopdiag.corpus import TOKEN_CLASSES, Batch, Corpus, TokenDocument, batches, token_classes, tokenize
from loopdiag.corpus.documents import spread
from loopdiag.errors import InputError
from loopdiag.measures import (
    DEFINITIONS,
    GROUPS,
    absent,
    attention,
    chosen,
    dimensions,
    exit_rules,
    motion,
    prediction,
    rarefied,
    take,
)
from loopdiag.measures.attention import AttentionMeasures
from loopdiag.measures.diversity import PooledRank
from loopdiag.measures.similarity import LayerSimilarity
from loopdiag.measures.tokens import by_token
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.dtypes import higher_precision
from loopdiag.parts import Parts
from loopdiag.readouts import RECORDINGS, Readouts, fit_readouts
from loopdiag.results import About, Layout, Result, about_machine, about_model
from loopdiag.trace import ForeignModel, LoopTrace, kept_loops, record, with_maps

SCHEMA = 3
LONGEST_RANK = 256
LONGEST_DOCUMENT = 2048  # unless told: models are made for far more than a batch of them should hold
NOISE_DOCUMENTS = 4  # run once more in higher precision; of as many sources
SHOWN_DOCUMENTS = 4  # kept token by token; likewise

DECIDING = ("nll_exit", "gain", "cost")  # what recommendations rest on: all of them or none

# Columns of what a diagnosis shows of itself, and the digits of each.
IN_BRIEF = {
    "exit NLL": ("nll_exit", 3),
    "gain": ("gain", 3),
    "cost": ("cost", 3),
    "usable NLL": ("nll_usable", 3),
    "relative step": ("relative_step", 3),
    "cos of updates": ("cos_update", 2),
    "effective rank": ("effective_rank", 1),
}


class DiagnosisError(InputError):
    """A diagnosis that cannot be made or read; the message says what was given, what is allowed and how to fix it."""


@dataclass(frozen=True)
class Diagnosis(Result):
    """Everything measured on one model and corpus.

    Attributes:
        data: Measures by `document, loop(, layer, head)`, a few by other dimensions; loop 0..R, or 0 and those that
            were kept, with NaN where undefined; the coordinate `source` gives each document's cluster. A few documents
            may be there token by token, by `shown, (loop,) token`, NaN or "" beyond a document's end. Every variable
            carries `units`, `state` and `long_name`; `loopdiag.measures.DEFINITIONS` lists them.
    """

    KIND, WRITTEN_BY, SCHEMA, ERROR = "diagnosis", "loopdiag diagnose --save", SCHEMA, DiagnosisError
    NUMBERS: ClassVar[Layout] = {"loop": ("loop",)}
    TEXTS: ClassVar[Layout] = {"document": ("document",), "source": ("document",)}
    ABOUT: ClassVar[About] = {
        **dict.fromkeys(("model", "corpus", "corpus_sha256"), str),
        **dict.fromkeys(("trained_loops", "run_loops", "documents", "tokens", "max_tokens", "rank_tokens"), int),
        **dict.fromkeys(("seed", "batch_size"), int),
        **dict.fromkeys(("weights_sha256", "config", "dtype", "device"), object),  # unknown of a foreign model
        **dict.fromkeys(("measures", "measured_loops"), list),
        "absent": dict,
    }

    @classmethod
    def numbers(cls, data: xr.Dataset) -> Layout:
        layout = dict(cls.NUMBERS)
        for name in {*DEFINITIONS} & {*data.data_vars} - {"token_text", "token_top"}:
            most = 4 if name in (*GROUPS["attention"], *GROUPS["heads"]) else 2
            layout[name] = dimensions(name, min(max(data[name].ndim, 2), most))
        if {*DECIDING} & {*data.data_vars}:
            layout |= dict.fromkeys(DECIDING, ("document", "loop"))
        return layout

    @classmethod
    def _wrong(cls, data: xr.Dataset, about: dict[str, Any]) -> str | None:
        if wrong := super()._wrong(data, about):
            return wrong
        loops = data["loop"].values.tolist()
        rising = all(isinstance(loop, int) for loop in loops) and loops == sorted({*loops})
        if not rising or (loops[0], loops[-1]) != (0, about["run_loops"]):
            return f"its loops are {short(loops)}, which should rise from 0 to the {about['run_loops']} of the run"
        return None

    @property
    def loops(self) -> np.ndarray:
        """Loop numbers, 1..R or those that were kept."""
        return self.data["loop"].values[1:]

    def require(self, *names: str) -> None:
        """Refuse to go on without these measures.

        Raises:
            DiagnosisError: One was not taken; the message says why.
        """
        for name in names:
            if name not in self.data:
                why = self.provenance["absent"].get(name, "it was not measured")
                raise DiagnosisError(f"This diagnosis of {self.provenance['model']} has no {name}: {why}.")

    def __repr__(self) -> str:
        about = self.provenance
        return (
            f"Diagnosis of {about['model']} "
            f"(trained with {about['trained_loops']} loops, run with {about['run_loops']}): "
            f"{about['documents']} documents of {about['corpus']}, {about['tokens']:,} predicted tokens, "
            f"{len(self.data.data_vars)} measures"
        )

    def _repr_html_(self) -> str:
        about = self.provenance
        columns = {heading: of for heading, of in IN_BRIEF.items() if of[0] in self.data}
        cells = [
            [html.number(mean, digits) for mean in self.data[name].mean("document").sel(loop=self.loops).values]
            for name, digits in columns.values()
        ]
        names = html.starred(self.loops, about["trained_loops"])
        return html.card(
            repr(self),
            ["loop", *columns],
            zip(names, *cells, strict=True),
            [
                "Means over documents; NLL, gain and cost in nats per token.",
                html.beyond(names),
                f"Groups: {', '.join(about['measures'])}. Everything measured: .data, as a table: .to_frame().",
            ],
        )

    def to_frame(self, measures: str | Collection[str] | None = None, *, keep: Collection[str] = ()) -> pd.DataFrame:
        """A tidy table for seaborn and pandas: one number in each row.

        `seaborn.lineplot(diagnosis.to_frame("gain"), x="loop", y="value")` draws a measure over the loops;
        `pandas.concat` puts the tables of several models under each other, which `hue="model"` then tells apart.
        Intervals that seaborn makes do not know that documents of one source are alike; those of
        `loopdiag.summary.by_loop` do.

        Args:
            measures: One or several; those by document and loop (and layer and head) when None.
            keep: Of "layer" and "head", what to keep apart; the others are averaged over.

        Returns:
            The columns `model, document, source, measure, loop, value, unit`, and before `value` one for every other
            dimension that a measure has or that is kept. Undefined values are left out.

        Raises:
            DiagnosisError: A measure was not taken.
            ValueError: `keep` names something else.
        """
        if not set(keep) <= {"layer", "head"}:
            raise ValueError(f"keep = {sorted(keep)} is not allowed: of layer and head, name what to keep apart.")
        if measures is None:
            by_both = {"document", "loop"}
            names = [
                str(name)
                for name, values in self.data.data_vars.items()
                if by_both <= set(values.dims) <= by_both | {"layer", "head"}
            ]
        else:
            names = [measures] if isinstance(measures, str) else list(measures)
            self.require(*names)
        parts = []
        for name in names:
            values = self.data[name]
            if averaged := [dim for dim in values.dims if dim in {"layer", "head"} - set(keep)]:
                values = values.mean(averaged)
            part = values.to_dataframe("value").reset_index().dropna(subset="value")
            parts.append(part.assign(model=self.provenance["model"], measure=name, unit=values.attrs.get("units")))
        frame = pd.concat(parts, ignore_index=True)
        first, last = ["model", "document", "source", "measure", "loop"], ["value", "unit"]
        others = [column for column in frame if column not in (*first, *last)]
        return frame[[column for column in (*first, *others, *last) if column in frame]]


def diagnose(
    model: LoopedLM | ForeignModel,
    corpus: Corpus,
    *,
    n_loops: int | None = None,
    at: Sequence[int] | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    measures: Collection[str] = ("default",),
    parts: Parts | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Diagnosis:
    """Measure a model, loop by loop.

    Readouts are fitted on the corpus' `fit` documents; every number is measured on its `report` documents, but for the
    exit rules' means over the `fit` documents, on which a threshold is to be chosen.

    Args:
        model: A model with a tokenizer; for one that is not ours, a `ForeignModel`.
        corpus: Documents; those longer than `max_tokens` are cut and counted.
        n_loops: Loops to run; the trained number, or the last of `at`, when None.
        at: Loops to measure, from 1 on, for models with many: changes are then from the measured loop before. All when
            None.
        max_tokens: Longest document in tokens; what the model was made for, at most 2,048, when None.
        batch_size: Documents of a batch.
        seed: Of the order of the `fit` documents, and of the initial state of models that start from a random one.
        measures: Groups of measures, of `loopdiag.measures.GROUPS`, `default` or `all`; what is not asked for is not
            computed. The readouts, whose translators are fitted, are the slowest.
        parts: Where to keep what is measured, batch by batch, for a run that is stopped and goes on, and for processes
            that share one: each returns the whole result. The numbers are the same to the bit. `pooled` keeps two
            moments of all states of each batch there, which are large.
        progress: Called with (what is being done, documents done, of how many; fitting counts each several times).

    Raises:
        ValueError: `n_loops` below 1, or `at` that does not rise from 1 to it.
        DiagnosisError: No tokenizer, `max_tokens` beyond the model, or a subset of the loops or parts of a
            `ForeignModel`.
        PartsError: `parts` are of other numbers.
        FloatingPointError: No document gave finite numbers. Those that do not are left out and named in the provenance.
        InputError: An unknown group of measures.

    Example:
        >>> from loopdiag.corpus import bundled
        >>> from loopdiag.model import load
        >>> diagnosis = diagnose(load("tiny-plt-2"), bundled().take(16), measures=["motion"], max_tokens=32)
        >>> diagnosis.data["step_size"].dims, diagnosis.loops
        (('document', 'loop'), array([1, 2]))
        >>> diagnosis.provenance["absent"]["nll_usable"]
        'the group readouts was not asked for'
    """
    groups = chosen(measures)
    trained, _ = _made_for(model)
    n_loops = (at[-1] if at else trained) if n_loops is None else n_loops
    if isinstance(n_loops, bool) or not isinstance(n_loops, int) or n_loops < 1:
        raise ValueError(f"n_loops = {n_loops!r} is not allowed: it must be an integer >= 1.")
    kept = kept_loops(n_loops, at)
    if isinstance(model, ForeignModel) and at is not None:
        raise DiagnosisError("at is for models of this toolkit: a ForeignModel records all loops that it runs.")
    if isinstance(model, ForeignModel) and parts is not None:
        raise DiagnosisError("parts is for models of this toolkit: nothing tells two ForeignModels apart.")
    max_tokens = checked_max_tokens(model, corpus, max_tokens, DiagnosisError)
    fit, report = (tokenize(half, model.tokenizer, max_tokens) for half in (corpus.fit, corpus.report))
    run = _Run(model, n_loops, at, batch_size, seed, groups, report, parts, progress)
    about = {
        "schema": SCHEMA,
        "model": model.source,
        **_identity(model),
        "trained_loops": trained,
        "run_loops": n_loops,
        "measured_loops": list(kept),
        "measures": list(groups),
        "corpus": corpus.name,
        "corpus_sha256": corpus.fingerprint,
        "documents_fit": len(fit),
        "documents_too_short": len(corpus) - len(fit) - len(report),
        "max_tokens": max_tokens,
        "rank_tokens": run.rank_tokens,
        "seed": seed,
        "batch_size": batch_size,
        **about_machine(),
    }
    # The tokenizer is neither among the weights nor in the configuration.
    ids = json.dumps([document.input_ids for document in (*fit, *report)]).encode()
    with nullcontext() if parts is None else parts.claimed(about | {"tokens_sha256": hashlib.sha256(ids).hexdigest()}):
        fitted = run.fit_readouts(fit) if "readouts" in groups else None
        thresholds = run.exit_rules(fit) if "exit_rules" in groups and fit else {}
        found, shown, missing = run.measure(fitted)
    provenance = about | {
        "documents": len(run.report),
        "documents_cut": sum(document.cut for document in run.report),
        "documents_not_finite": run.not_finite,
        "documents_fit": len(fit) - len(run.fit_not_finite),
        "documents_fit_not_finite": [document.name for document in fit if document.name in run.fit_not_finite],
        "tokens": sum(len(document.input_ids) - 1 for document in run.report),
        "absent": {name: why for name, why in missing.items() if name not in thresholds},
        "ridges": {f"{kind} {loop}": ridge for (kind, loop), ridge in sorted(fitted.ridges.items())}
        if fitted
        else None,
    }
    arrays = {name: values.double().cpu().numpy() for name, values in (found | thresholds).items()}
    return Diagnosis(_dataset(arrays | shown, run.report, (0, *kept), run, provenance))


class _Run:
    """A model run over documents in batches, and what is taken from each batch."""

    def __init__(
        self,
        model: LoopedLM | ForeignModel,
        n_loops: int,
        at: Sequence[int] | None,
        batch_size: int,
        seed: int,
        groups: tuple[str, ...],
        report: Sequence[TokenDocument],
        parts: Parts | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.model, self.n_loops, self.at, self.batch_size, self.seed = model, n_loops, at, batch_size, seed
        self.groups, self.report, self.parts = groups, report, parts
        self.rank_tokens = matched_tokens(len(document.input_ids) for document in report)
        self.longest = max(len(document.input_ids) for document in report)
        self.shown: list[int] = []
        self.not_finite: list[str] = []
        self.fit_not_finite: set[str] = set()
        self.token_class: tuple[Tensor, int] | None = None
        if "classes" in groups:
            ids = model.tokenizer.get_vocab().values()
            vocabulary = 1 + max(ids) if isinstance(model, ForeignModel) else model.cfg.vocab_size
            self.token_class = token_classes(model.tokenizer, vocabulary), len(TOKEN_CLASSES)
        self._tell = progress or (lambda what, done, of: None)
        self._done: dict[str, int] = {}
        self.last: LoopTrace | None = None

    def batches(self, documents: Sequence[TokenDocument], what: str, of: int) -> Iterator[Batch]:
        """Batches of documents, counted as done when the next is asked for."""
        for batch in batches(documents, self.batch_size):
            yield batch
            self._done[what] = self._done.get(what, 0) + len(batch.names)
            self._tell(what, self._done[what], of)

    def taken(
        self, what: str, documents: Sequence[TokenDocument], of_batch: Callable[[Batch], dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """What is taken from each batch, in their order, on the CPU; parts are read when all are there."""

        def made(batch: Batch) -> dict[str, Tensor]:
            return {name: values.cpu() for name, values in of_batch(batch).items()}

        if self.parts is None:
            yield from map(made, self.batches(documents, what, len(documents)))
            return
        named = {
            f"{what.replace(' ', '-')}-{index:05}": batch
            for index, batch in enumerate(batches(documents, self.batch_size))
        }
        for name in self.parts.share(list(named)):
            self.parts[name] = made(named[name])
            there = self.parts.names()  # other processes' among them
            self._tell(what, sum(len(batch.names) for each, batch in named.items() if each in there), len(documents))
        self.parts.meet()
        self._tell(what, len(documents), len(documents))
        for name in named:
            yield self.parts[name]

    def record(self, batch: Batch, **watching: Any) -> LoopTrace:
        if isinstance(self.model, ForeignModel):
            trace = self.model.record(batch, self.n_loops)
            if len(trace.raw) != self.n_loops + 1:
                raise DiagnosisError(
                    f"{self.model.source} was asked for {self.n_loops} loops, and recorded {len(trace.raw) - 1}: its "
                    "`record` must run as many as it is asked for."
                )
        else:
            trace = record(self.model, batch, self.n_loops, at=self.at, seed=self.seed, **watching)
        self.last = trace
        return trace

    def fit_readouts(self, fit: Sequence[TokenDocument]) -> Readouts | None:
        """Translators; None where there is nothing to read, or nothing to fit on."""
        if not fit:
            return None
        first = self.record(next(batches(fit, 1)))
        if not first.readable:
            return None

        known: dict[str, bool] = {}  # of documents that were met, whether they are finite

        def traces(documents: Sequence[TokenDocument]) -> Iterator[LoopTrace]:
            for batch in self.batches(documents, "fitting readouts", RECORDINGS * len(fit)):
                trace = self.record(batch)
                if not {*batch.names} <= {*known}:
                    known.update(zip(batch.names, prediction.finite_documents(trace).tolist(), strict=True))
                finite = torch.tensor([known[name] for name in batch.names], device=trace.mask.device)
                if finite.any():
                    yield replace(trace, mask=trace.mask & finite[:, None])

        order = np.random.default_rng(self.seed).permutation(len(fit))

        def fitted() -> dict[str, Tensor]:
            readouts = fit_readouts([fit[index] for index in order], traces)
            return readouts.tensors() | {"finite": torch.tensor([known[document.name] for document in fit])}

        kept = fitted() if self.parts is None else self.parts.once("readouts", fitted)
        self.fit_not_finite |= _lost(fit, kept.pop("finite"))
        return Readouts.of({name: value.to(first.raw.device) for name, value in kept.items()})

    def exit_rules(self, fit: Sequence[TokenDocument]) -> dict[str, Tensor]:
        """The exit rules' means over the documents on which thresholds are chosen."""

        def of_batch(batch: Batch) -> dict[str, Tensor]:
            trace = self.record(batch)
            taken = take(trace, ("exit_rules",), self.rank_tokens)
            return taken | ({"finite": prediction.finite_documents(trace)} if taken else {})

        parts = list(self.taken("exit rules", fit, of_batch))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if not found:
            return {}
        finite = found.pop("finite")
        self.fit_not_finite |= _lost(fit, finite)
        return {f"{name}_fit": values[finite].mean(0) for name, values in found.items()}

    def measure(self, fitted: Readouts | None) -> tuple[dict[str, Tensor], dict[str, np.ndarray], dict[str, str]]:
        """Every measure over the report documents, a few of them token by token, and why some are missing."""
        ours = None if isinstance(self.model, ForeignModel) else self.model
        pooled = PooledRank() if "pooled" in self.groups else None
        parts = []
        for part in self.taken("measuring", self.report, partial(self.of_batch, fitted)):
            if pooled is not None:
                pooled.add({name: part.pop(name) for name in [*part] if name.startswith("pooled_")})
            parts.append(part)
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found = self.finite(found)
        if pooled is not None:
            found |= pooled.result()
        if ours is not None and "noise" in self.groups:
            found |= self.noise(ours)
            if "motion_label" in found and self.n_loops > 2:
                lost = found["step_size"][:, -1] <= motion.ABOVE_NOISE * found["noise_step"][:, -1].nanmean()
                found["motion_label"][lost] = float("nan")
        shown = self.tokens() if "tokens" in self.groups else {}
        # Where a stopped run left everything, nothing was recorded.
        trace = self.record(next(batches(self.report, 1))) if self.last is None else self.last
        return found, shown, absent(trace, {*found, *shown}, self.groups)

    def finite(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What was found of the documents whose numbers are finite; the others are no longer reported on."""
        finite = found.pop("finite")
        if not finite.any():
            raise FloatingPointError(
                f"None of the {len(finite)} documents gave finite numbers: states of {self.model.source} are NaN or "
                "too large. Run it in a dtype of wider range (bfloat16 or float32, not float16) or with fewer loops, "
                "or look at its weights."
            )
        told = list(zip(self.report, finite.tolist(), strict=True))
        self.report = [document for document, is_finite in told if is_finite]
        self.not_finite = [document.name for document, is_finite in told if not is_finite]
        self.shown = spread(self.report, SHOWN_DOCUMENTS)
        return {name: values[finite] for name, values in found.items()}

    def of_batch(self, fitted: Readouts | None, batch: Batch) -> dict[str, Tensor]:
        """Every measure of a batch, with the document first, which of them are `finite`, and moments for `pooled`."""
        ours = None if isinstance(self.model, ForeignModel) else self.model
        watching: dict[str, AttentionMeasures | LayerSimilarity] = {}
        if ours is not None and {"attention", "attention_pairs", "heads"} & set(self.groups):
            watching["on_attention"] = AttentionMeasures(self.groups)
        if ours is not None and "layers" in self.groups:
            watching["on_layer"] = LayerSimilarity(self.rank_tokens, ours.ln_final)
        trace = self.record(batch, **watching)
        if ours is not None and "fixed_point" in self.groups:
            trace = with_maps(ours, batch, trace, seed=self.seed)
        found = take(trace, self.groups, self.rank_tokens, self.longest, self.token_class)
        for watch in watching.values():
            found |= watch.result()
        if fitted is not None:
            found |= fitted.measure(trace)
        finite = trace.finite
        if "nll_exit" in found:
            finite = finite & found["nll_exit"].isfinite().all(1).to(finite.device)
        if "pooled" in self.groups:
            found |= PooledRank.moments(replace(trace, mask=trace.mask & finite[:, None]))
        return found | {"finite": finite}

    def tokens(self) -> dict[str, np.ndarray]:
        """A few documents of different sources, token by token; nothing where they cannot be read."""
        documents = []
        for batch in batches([self.report[index] for index in self.shown], self.batch_size):
            trace = self.record(batch)
            if not trace.readable:
                return {}
            documents += by_token(trace, self.model.tokenizer)
        longest = max(len(document.text) for document in documents)
        size = (len(documents), len(documents[0].loops), longest)
        text, top = np.full((size[0], longest), "", object), np.full(size, "", object)
        nll = np.full(size, np.nan)
        for index, document in enumerate(documents):
            end = len(document.text)
            text[index, :end], top[index, :, :end] = document.text, np.array(document.top, object)
            nll[index, :, :end] = document.nll
        return {"token_text": text, "token_nll": nll, "token_top": top}

    @torch.no_grad()
    def noise(self, model: LoopedLM) -> dict[str, Tensor]:
        """What the run's precision moves, on a few documents of different sources; NaN on the others."""

        def taken() -> tuple[LoopTrace, dict[str, Tensor]]:
            trace = self.record(batch)
            return trace, prediction.exit_series(trace)

        few = spread(self.report, NOISE_DOCUMENTS)
        (batch,) = batches([self.report[index] for index in few], NOISE_DOCUMENTS)
        trace, series = taken()
        with higher_precision(model):
            exact, exact_series = taken()
        moved = {
            "noise_step": motion.noise_step(trace, exact),
            **prediction.noise(series, exact_series, trace.predicts),
        }
        found = {name: x.new_full((len(self.report), x.shape[1]), float("nan")).cpu() for name, x in moved.items()}
        for name, x in moved.items():
            found[name][few] = x.cpu()
        return found


def _lost(documents: Sequence[TokenDocument], finite: Tensor) -> set[str]:
    """Names of those that are not finite."""
    return {document.name for document, is_finite in zip(documents, finite.tolist(), strict=True) if not is_finite}


def matched_tokens(lengths: Iterable[int]) -> int:
    """Tokens at which effective ranks are compared: what nine of ten documents have, at most 256."""
    ordered = sorted(lengths)
    return min(LONGEST_RANK, ordered[len(ordered) // 10])


def checked_max_tokens(
    model: LoopedLM | ForeignModel, corpus: Corpus, max_tokens: int | None, error: type[InputError]
) -> int:
    """Longest document in tokens, once it is sure that the model can read the corpus.

    Raises:
        InputError: No tokenizer, `max_tokens` beyond the model, or no report documents; of the class `error`.
    """
    if model.tokenizer is None:
        raise error("The model has no tokenizer: its folder holds none, so text cannot be read.")
    _, longest = _made_for(model)
    if max_tokens is not None and max_tokens > longest:
        raise error(f"max_tokens = {max_tokens} is beyond this model, which was made for {longest}.")
    if not corpus.report:
        raise error(f"The corpus {corpus.name} has no report documents, so there is nothing to measure on.")
    return min(longest, LONGEST_DOCUMENT) if max_tokens is None else max_tokens


def _made_for(model: LoopedLM | ForeignModel) -> tuple[int, int]:
    """The loops that a model was trained with, and its longest document."""
    if isinstance(model, ForeignModel):
        return model.trained_loops, model.n_ctx
    return model.cfg.n_loops, model.cfg.n_ctx


def _identity(model: LoopedLM | ForeignModel) -> dict[str, Any]:
    """What says which model it was, and what it ran in; unknown of a model that is not ours."""
    if isinstance(model, ForeignModel):
        return dict.fromkeys(("weights_sha256", "config", "dtype", "device"))
    return about_model(model)


def _dataset(
    found: dict[str, np.ndarray],
    report: Sequence[TokenDocument],
    loops: tuple[int, ...],
    run: _Run,
    provenance: dict[str, Any],
) -> xr.Dataset:
    """All measures that were taken as one dataset."""
    variables = {}
    for name, (units, state, long_name) in DEFINITIONS.items():
        if name in found:
            dims = dimensions(name, found[name].ndim)
            variables[name] = (dims, found[name], {"units": units, "state": state, "long_name": long_name})
    there = {dim for dims, _, _ in variables.values() for dim in dims}
    coords = {
        "document": [document.name for document in report],
        "loop": list(loops),
        "loop_b": list(loops),
        "rule": [*exit_rules.RULES, exit_rules.ORACLE],
        "tokens": rarefied(run.rank_tokens),
        "position": attention.octaves(run.longest),
        "shown": [report[index].name for index in run.shown],
        "token_class": list(TOKEN_CLASSES),
    }
    chosen_coords: dict[str, Any] = {
        dim: values for dim, values in coords.items() if dim in there | {"document", "loop"}
    }
    chosen_coords["source"] = ("document", [document.source for document in report])
    if "rule" in there:
        chosen_coords["exit_rule_threshold"] = (("rule", "setting"), exit_rules.thresholds().numpy())
    return xr.Dataset(variables, chosen_coords, {"provenance": json.dumps(provenance, sort_keys=True)})
