"""Measures and readouts over a corpus, and the result that is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from loopdiag import __version__
from loopdiag.corpus import Batch, Corpus, TokenDocument, batches, tokenize
from loopdiag.errors import InputError
from loopdiag.files import whole
from loopdiag.measures import attention, diversity, motion, offset, prediction
from loopdiag.model.decoder import LoopedLM
from loopdiag.readouts import RECORDINGS, fit_readouts
from loopdiag.trace import ForeignModel, LoopTrace, record

SCHEMA = 2
LONGEST_RANK = 256
LONGEST_DOCUMENT = 2048  # unless told: models are made for far more than a batch of them should hold
PER_LOOP = ("document", "loop")

# Name: (unit, state, what it is). The functions' docstrings say more.
DEFINITIONS: dict[str, tuple[str, str, str]] = {
    "nll_exit": ("nats per token", "N(Y)", "negative log likelihood of the next token, reading out after loop r"),
    "gain": ("nats per token", "N(Y)", "NLL that loop r takes off the tokens it helps"),
    "cost": ("nats per token", "N(Y)", "NLL that loop r adds to the tokens it harms"),
    "rank": ("rank", "N(Y)", "median rank of the next token, 1 the best"),
    "log_rank": ("nats", "N(Y)", "log of the next token's rank"),
    "confidence": ("1", "N(Y)", "probability of the likeliest next token"),
    "accuracy": ("share of tokens", "N(Y)", "the likeliest next token is right"),
    "changed": ("share of tokens", "N(Y)", "loop r changes the likeliest next token"),
    "fixed": ("share of tokens", "N(Y)", "loop r puts the likeliest next token right"),
    "broken": ("share of tokens", "N(Y)", "loop r puts the likeliest next token wrong"),
    "settled": ("share of tokens", "N(Y)", "the likeliest next token stays from loop r on"),
    "entropy": ("nats", "N(Y)", "entropy of the exit's distribution"),
    "output_shift": ("nats", "N(Y)", "KL(p^(r) || p^(r-1))"),
    "output_shift_reverse": ("nats", "N(Y)", "KL(p^(r-1) || p^(r))"),
    "output_shift_js": ("nats", "N(Y)", "Jensen-Shannon divergence of p^(r) and p^(r-1)"),
    "breadth": ("share of tokens", "N(Y)", "the largest output shift of loops 2.. falls in loop r"),
    "nll_usable": ("nats per token", "N(Y)", "NLL through the exit's fitted translator"),
    "withheld": (
        "nats per token",
        "Z",
        "NLL read from the carry of r-1 that the offset hands over, minus from the token's own",
    ),
    "step_size": ("residual stream", "Y", "||Y_r - Y_(r-1)||"),
    "relative_step": ("1", "Y", "||Y_r - Y_(r-1)|| / ||Y_(r-1)||"),
    "radial_share": ("1", "Y", "share of the squared update that lies along Y_(r-1)"),
    "acceleration": ("1", "Y", "||Y_r - 2 Y_(r-1) + Y_(r-2)|| / ||Y_(r-1)||"),
    "state_cosine": ("1", "Y", "cos(Y_r, Y_(r-1))"),
    "cos_update": ("1", "Y", "cosine of successive updates"),
    "cos_reference": ("1", "Y", "cosine of successive updates were the loops' states unrelated"),
    "effective_rank": ("1", "N(Y)", "effective rank of a document's states"),
    "effective_rank_centred": ("1", "N(Y)", "effective rank of a document's states less their mean"),
    "participation_ratio": ("1", "N(Y)", "participation ratio of a document's states less their mean"),
    "omega": ("carry", "Z", "distance of neighbouring tokens' carries from loop r-1"),
    "omega_relative": ("1", "Z", "that distance over the carry's norm"),
    "omega_random": ("carry", "Z", "distance of any two tokens' carries in the document"),
    "gate_mean": ("1", "layer input", "weight of the global attention branch"),
    "nll_lens": ("nats per token", "N(Y)", "NLL through the plain logit lens, past the coda"),
    "exit_probability": ("1", "N(Y)", "probability that the model's exit gate leaves after loop r"),
}
OF_PREDICTIONS = (
    *("nll_exit", "gain", "cost", "rank", "log_rank", "confidence", "entropy"),
    *("accuracy", "changed", "fixed", "broken", "settled", "breadth"),
    *("output_shift", "output_shift_reverse", "output_shift_js"),
)
OF_THE_OFFSET = ("omega", "omega_relative", "omega_random", "withheld")


class DiagnosisError(InputError):
    """A diagnosis that cannot be made or read; the message says what was given, what is allowed and how to fix it."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything measured on one model and corpus.

    Attributes:
        data: Measures by `document, loop(, layer, head)`, loop 0..R with NaN where undefined; the coordinate `source`
            gives each document's cluster. Every variable carries `units`, `state` and `long_name`; `DEFINITIONS` lists
            them.
    """

    data: xr.Dataset

    @property
    def provenance(self) -> dict[str, Any]:
        """What is needed to make the same diagnosis again: model, weights, corpus, seeds, dtype, versions."""
        return json.loads(self.data.attrs["provenance"])

    @property
    def loops(self) -> np.ndarray:
        """Loop numbers 1..R."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a netCDF file, whole or not at all; a file of that name is replaced."""
        with whole(Path(path)) as partial_file:
            self.data.to_netcdf(partial_file, engine="h5netcdf")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Diagnosis:
        """Read what `save` wrote.

        Raises:
            DiagnosisError: No such file, or not a diagnosis of this schema.
        """
        if not Path(path).is_file():
            raise DiagnosisError(f"{path} is no file: give a diagnosis that `loopdiag diagnose --save` wrote.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other people's HDF5 files, refused below
                data = xr.load_dataset(path, engine="h5netcdf")
            schema = json.loads(data.attrs["provenance"])["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DiagnosisError(f"{path} is not a diagnosis: {type(error).__name__}: {error}.") from None
        if schema != SCHEMA:
            raise DiagnosisError(
                f"{path} has schema {schema}; this version of loopdiag reads {SCHEMA}. Diagnose again."
            )
        return cls(data)


def diagnose(
    model: LoopedLM | ForeignModel,
    corpus: Corpus,
    *,
    n_loops: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    readouts: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Diagnosis:
    """Measure a model, loop by loop.

    Readouts are fitted on the corpus' `fit` documents; every number is measured on its `report` documents.

    Args:
        model: A model with a tokenizer; for one that is not ours, a `ForeignModel`.
        corpus: Documents; those longer than `max_tokens` are cut and counted.
        n_loops: Loops to run; the trained number when None.
        max_tokens: Longest document in tokens; what the model was made for, at most 2,048, when None.
        batch_size: Documents of a batch.
        seed: Of the order of the `fit` documents, and of the initial state of models that start from a random one.
        readouts: Fit the translators behind `nll_usable` and `withheld`, the slowest part; without, both are left out.
        progress: Called with (what is being done, documents done, of how many; fitting counts each several times).

    Raises:
        ValueError: `n_loops` below 1.
        DiagnosisError: No tokenizer, or `max_tokens` beyond the model.
    """
    recorded, trained, longest = _subject(model, seed)
    n_loops = trained if n_loops is None else n_loops
    if isinstance(n_loops, bool) or not isinstance(n_loops, int) or n_loops < 1:
        raise ValueError(f"n_loops = {n_loops!r} is not allowed: it must be an integer >= 1.")
    if model.tokenizer is None:
        raise DiagnosisError("The model has no tokenizer: its folder holds none, so text cannot be read.")
    if max_tokens is not None and max_tokens > longest:
        raise DiagnosisError(f"max_tokens = {max_tokens} is beyond this model, which was made for {longest}.")
    max_tokens = min(longest, LONGEST_DOCUMENT) if max_tokens is None else max_tokens
    if not corpus.report:
        raise DiagnosisError(f"The corpus {corpus.name} has no report documents, so there is nothing to measure on.")
    fit, report = (tokenize(half, model.tokenizer, max_tokens) for half in (corpus.fit, corpus.report))
    rank_tokens = matched_tokens(report)
    tell = progress or (lambda what, done, of: None)

    done = {"fitting readouts": 0, "measuring": 0}

    def traces(documents: Sequence[TokenDocument], what: str, of: int) -> Iterator[LoopTrace]:
        for batch in batches(documents, batch_size):
            yield recorded(batch, n_loops)
            done[what] += len(batch.names)
            tell(what, done[what], of)

    fitted = None
    if readouts:
        order = np.random.default_rng(seed).permutation(len(fit))
        for_fitting = partial(traces, what="fitting readouts", of=RECORDINGS * len(fit))
        fitted = fit_readouts([fit[index] for index in order], for_fitting)
    parts = []
    for trace in traces(report, "measuring", len(report)):
        parts.append(measure(trace, rank_tokens) | (fitted.measure(trace) if fitted else {}))
        missing = absent(trace, readouts)
    provenance = {
        "schema": SCHEMA,
        "model": model.source,
        **_identity(model),
        "trained_loops": trained,
        "run_loops": n_loops,
        "absent": missing,
        "corpus": corpus.name,
        "corpus_sha256": corpus.fingerprint,
        "documents": len(report),
        "documents_cut": sum(document.cut for document in report),
        "documents_fit": len(fit),
        "documents_too_short": len(corpus) - len(fit) - len(report),
        "tokens": sum(len(document.input_ids) - 1 for document in report),
        "max_tokens": max_tokens,
        "rank_tokens": rank_tokens,
        "ridges": {f"{kind} {loop}": ridge for (kind, loop), ridge in sorted(fitted.ridges.items())}
        if fitted
        else None,
        "seed": seed,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "versions": {"loopdiag": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "transformer-lens", "transformers")},
    }
    return Diagnosis(_dataset(parts, report, n_loops, provenance))


def matched_tokens(documents: Sequence[TokenDocument]) -> int:
    """Tokens at which effective ranks are compared: what nine of ten documents have, at most 256."""
    lengths = sorted(len(document.input_ids) for document in documents)
    return min(LONGEST_RANK, lengths[len(lengths) // 10])


def _subject(model: LoopedLM | ForeignModel, seed: int) -> tuple[Callable[[Batch, int], LoopTrace], int, int]:
    """How to record a batch of a model, the loops it was trained with, and its longest document."""
    if isinstance(model, ForeignModel):
        return model.record, model.trained_loops, model.n_ctx
    return partial(record, model, seed=seed), model.cfg.n_loops, model.cfg.n_ctx


def _identity(model: LoopedLM | ForeignModel) -> dict[str, Any]:
    """What says which model it was, and what it ran in; unknown of a model that is not ours."""
    if isinstance(model, ForeignModel):
        return dict.fromkeys(("weights_sha256", "config", "dtype", "device"))
    weight = model.embed.weight
    return {
        "weights_sha256": weights_hash(model),
        "config": asdict(model.cfg),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }


def absent(trace: LoopTrace, readouts: bool) -> dict[str, str]:
    """Measures that are left out, each with the reason: what a model does not have is absent, not zero."""
    reasons: list[tuple[bool, tuple[str, ...], str]] = [
        (not readouts, ("nll_usable", "withheld"), "readouts were not fitted"),
        (not trace.readable, (*OF_PREDICTIONS, "nll_lens"), "the trace has no head or no tokens"),
        (trace.offset == 0, OF_THE_OFFSET, "the model has no cross-loop position offset"),
        (trace.gate is None, ("gate_mean",), "no loop of this run blends attention, so there is no gate"),
        (trace.coda is None, ("nll_lens",), "no coda stands before the head, so exits are the plain logit lens"),
        (trace.leave is None, ("exit_probability",), "the model has no exit gate"),
    ]
    return {name: why for applies, names, why in reasons if applies for name in names}


@torch.no_grad()
def measure(trace: LoopTrace, rank_tokens: int) -> dict[str, Tensor]:
    """Every measure of one batch but the readouts, each with the document first; what the model lacks is left out."""
    return {
        **(prediction.exits(trace) if trace.readable else {}),
        "step_size": motion.step_size(trace),
        "relative_step": motion.relative_step(trace),
        "radial_share": motion.radial_share(trace),
        "acceleration": motion.acceleration(trace),
        "state_cosine": motion.state_cosine(trace),
        "cos_update": motion.cos_update(trace),
        "cos_reference": motion.cos_reference(trace),
        "effective_rank": diversity.document_rank(trace, rank_tokens),
        "effective_rank_centred": diversity.document_rank(trace, rank_tokens, centred=True),
        "participation_ratio": diversity.document_rank(
            trace, rank_tokens, centred=True, of=diversity.participation_ratio
        ),
        **(_of_the_offset(trace) if trace.offset else {}),
        **({} if trace.gate is None else {"gate_mean": attention.gate_mean(trace)}),
        **(prediction.lens(trace) if trace.readable and trace.coda is not None else {}),
        **({} if trace.leave is None else {"exit_probability": prediction.exit_probability(trace)}),
    }


def _of_the_offset(trace: LoopTrace) -> dict[str, Tensor]:
    return {
        "omega": offset.omega(trace),
        "omega_relative": offset.omega_relative(trace),
        "omega_random": offset.omega_random(trace),
    }


def weights_hash(model: LoopedLM) -> str:
    """sha256 over the names and values of all weights, as loaded: another dtype is another hash."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _dataset(
    parts: list[dict[str, Tensor]], documents: Sequence[TokenDocument], n_loops: int, provenance: dict[str, Any]
) -> xr.Dataset:
    """All batches as one dataset; measures that were not taken are left out."""
    variables = {}
    for name, (units, state, long_name) in DEFINITIONS.items():
        if name in parts[0]:
            values = torch.cat([part[name].cpu() for part in parts]).double().numpy()
            dims = (*PER_LOOP, "layer", "head")[: values.ndim]
            variables[name] = (dims, values, {"units": units, "state": state, "long_name": long_name})
    return xr.Dataset(
        variables,
        coords={
            "document": [document.name for document in documents],
            "source": ("document", [document.source for document in documents]),
            "loop": np.arange(n_loops + 1),
        },
        attrs={"provenance": json.dumps(provenance, sort_keys=True)},
    )
