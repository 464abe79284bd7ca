"""What interventions on one trained model do to its loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from loopdiag import html
from loopdiag.bootstrap import interval, resampled_means
from loopdiag.corpus import Batch, Corpus, TokenDocument, batches, tokenize
from loopdiag.diagnosis import checked_max_tokens
from loopdiag.errors import InputError
from loopdiag.interventions import contexts
from loopdiag.model.decoder import LoopedLM
from loopdiag.results import About, Layout, Result, about_machine, about_model
from loopdiag.trace import are_finite

SCHEMA = 1
FEWEST_SOURCES = 5  # fewer cannot say how much sources differ
GROUPS = ("offset", "carry", "loops", "gate", "window", "memory")
OFFSETS = (0, 1, 2, 4)
CAVEAT = (
    "These effects show what the trained model relies on, not what training without it would give: a model that was "
    "trained with an offset breaks without it."
)


class EffectsError(InputError):
    """Effects that cannot be measured or read; the message says what was given, what is allowed and how to fix it."""


Make = Callable[[LoopedLM], AbstractContextManager[None]]


@dataclass(frozen=True)
class Intervention:
    """One change to a model.

    Attributes:
        group: One of `GROUPS`, or a name of your own.
        change: What is done, in a few words.
        loop: The loop it is tied to; None where it is all of them, or any.
        make: Gives the context manager within which a model is changed.
    """

    group: str
    change: str
    loop: int | None
    make: Make

    @property
    def name(self) -> str:
        """The change and the loop; unique in a catalogue."""
        return self.change if self.loop is None else f"{self.change}, loop {self.loop}"


def catalogue(
    model: LoopedLM,
    n_loops: int | None = None,
    groups: Sequence[str] = GROUPS,
    *,
    alone: bool = False,
    longest: int | None = None,
) -> tuple[list[Intervention], dict[str, str]]:
    """Every intervention that makes sense for a model, and those that do not, each with the reason.

    Offset, carry, gate and memory are changed at all loops from 2 on and at each of them alone. All loops share their
    weights, so which loop is skipped or repeated does not matter: each is there once. Swapping two changes nothing and
    is left out.

    Args:
        model: The model.
        n_loops: Loops of the run; the trained number when None.
        groups: Those of `GROUPS` that are asked for.
        alone: Whether documents are run one by one, so that none has another one's carry.
        longest: Tokens of the longest document, where it is known: a window that sees all of it is none.
    """
    cfg = model.cfg
    n_loops = cfg.n_loops if n_loops is None else n_loops
    found: list[Intervention] = []
    absent: dict[str, str] = {}

    def add(group: str, change: str, make: Callable[..., Any], *, why_not: str | None, where: Sequence = ()) -> None:
        if group not in groups:
            return
        if n_loops == 1:
            why_not = "this run has one loop"
        if why_not is not None:
            absent[change] = why_not
            return
        for loop in where or (None,):
            found.append(Intervention(group, change, loop, partial(make, loop=loop) if where else make))

    everywhere = (None, *range(2, n_loops + 1)) if n_loops > 2 else (None,)
    apart = None if cfg.memory == "first" else "the model shares no memory between loops"
    for k in OFFSETS:
        why_not = "it is the model's own" if k == cfg.offset else None
        add("offset", f"offset {k}", partial(contexts.shift_offset, k=k), why_not=why_not, where=everywhere)
    no_other = "every document is alone in its batch" if alone else None
    add("carry", "carry dropped", contexts.drop_carry, why_not=None, where=everywhere)
    add("carry", "carry: document mean", contexts.mean_carry, why_not=None, where=everywhere)
    add("carry", "carry: other document", contexts.other_carry, why_not=no_other, where=everywhere)
    add("loops", "a loop skipped", partial(contexts.skip_loop, loop=n_loops), why_not=None)
    add("loops", "a loop repeated", partial(contexts.repeat_loop, loop=n_loops), why_not=None)
    for value in (0, 1):
        gate = partial(contexts.clamp_gate, value=value)
        add("gate", f"gate at {value}", gate, why_not=apart, where=everywhere)

    def all_in(window: int) -> bool:
        return longest is not None and longest - 1 <= window  # the last token predicts nothing

    half = cfg.window // 2
    narrow = apart or (None if half else "the window sees one token")
    if all_in(half):
        narrow = narrow or f"no document goes beyond the halved window of {half} tokens"
    add("window", "window halved", partial(contexts.set_window, window=half), why_not=narrow)
    if all_in(cfg.window):
        apart = apart or f"no document goes beyond the window of {cfg.window} tokens, so it would be the gate at 0"
    add("memory", "memory: own loop's", contexts.own_memory, why_not=apart, where=everywhere)
    return found, absent


@dataclass(frozen=True)
class Effect:
    """What one intervention does to the NLL, in nats per token.

    Attributes:
        name, group, change, loop: The intervention's.
        effect: NLL with it minus NLL without it, mean over documents; above 0 the model relied on what was changed.
        low, high: 95 % interval over documents, clustered by source and paired.
        helped, harmed: What it takes off the NLL of the tokens it helps, and adds to that of those it harms; the effect
            is harmed - helped.
    """

    name: str
    group: str
    change: str
    loop: int | None
    effect: float
    low: float
    high: float
    helped: float
    harmed: float


@dataclass(frozen=True)
class Effects(Result):
    """Effects of interventions on one model and corpus.

    Attributes:
        data: `effect`, `helped` and `harmed` by `intervention, document`, and `nll` of the untouched run by `document`,
            means over the document's predicted tokens in nats. The coordinate `source` gives each document's cluster;
            `group`, `change` and `loop` (0 where it is no single one) are those of each intervention.
    """

    KIND, WRITTEN_BY, SCHEMA, ERROR = "effects of interventions", "loopdiag intervene --save", SCHEMA, EffectsError
    NUMBERS: ClassVar[Layout] = {
        **dict.fromkeys(("effect", "helped", "harmed"), ("intervention", "document")),
        "nll": ("document",),
        "loop": ("intervention",),
    }
    TEXTS: ClassVar[Layout] = {
        **dict.fromkeys(("intervention", "group", "change"), ("intervention",)),
        **dict.fromkeys(("document", "source"), ("document",)),
    }
    ABOUT: ClassVar[About] = {
        **dict.fromkeys(("model", "corpus"), str),
        **dict.fromkeys(("trained_loops", "run_loops", "documents", "tokens", "sources"), int),
        "absent": dict,
    }

    def table(self, seed: int = 0) -> list[Effect]:
        """One row for each intervention; the intervals leave out the training seed.

        With documents of fewer than five sources (`FEWEST_SOURCES`) they say little, and come out too small.

        Args:
            seed: Of the bootstrap.
        """
        data = self.data
        draws = resampled_means(data["effect"].values.T, data["source"].values, seed=seed)
        means = [data[name].mean("document").values.tolist() for name in ("effect", "helped", "harmed")]
        names = [data[name].values.tolist() for name in ("intervention", "group", "change", "loop")]
        return [
            Effect(name, group, change, loop or None, effect, float(low), float(high), helped, harmed)
            for name, group, change, loop, effect, helped, harmed, low, high in zip(
                *names, *means, *interval(draws), strict=True
            )
        ]

    def __repr__(self) -> str:
        about = self.provenance
        return (
            f"Effects of {self.data.sizes['intervention']} interventions on {about['model']} (trained with "
            f"{about['trained_loops']} loops, run with {about['run_loops']}): {about['documents']} documents of "
            f"{about['corpus']}, {about['tokens']:,} predicted tokens"
        )

    def _repr_html_(self) -> str:
        body = [
            [row.name, html.between(row.effect, row.low, row.high), html.number(row.helped), html.number(row.harmed)]
            for row in self.table()
        ]
        untouched = html.number(float(self.data["nll"].mean()))
        return html.card(
            repr(self),
            ["intervention", "change of the NLL [95 %]", "helped", "harmed"],
            body,
            [f"Nats per token; above 0 is worse. NLL untouched: {untouched}.", CAVEAT],
        )


@torch.no_grad()
def intervene(
    model: LoopedLM,
    corpus: Corpus,
    which: Sequence[str | Intervention] | None = None,
    *,
    n_loops: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Effects:
    """Measure what interventions do to the final NLL of a model, document by document.

    Each batch of the corpus' `report` documents is run once untouched and once with each intervention. Nothing is
    fitted here, so the `fit` documents could be measured, too; they are left out so that the numbers are of the same
    documents as a diagnosis. The effects show what the trained model relies on, not what training without it would
    give.

    Args:
        model: A model with a tokenizer.
        corpus: Documents; those longer than `max_tokens` are cut and counted.
        which: Names of `GROUPS`, or interventions of your own; all groups of the catalogue when None. What the model
            does not have is left out and listed in the provenance with the reason.
        n_loops: Loops to run; the trained number when None.
        max_tokens: Longest document in tokens; what the model was made for, at most 2,048, when None.
        batch_size: Documents of a batch. Another document's carry is that of the next one in the batch, so a last
            document does not stay alone but joins the batch before.
        seed: Of the initial state of models that start from a random one.
        progress: Called with (what is being done, runs of documents done, of how many).

    Raises:
        ValueError: `n_loops` or `batch_size` below 1.
        EffectsError: An unknown name, nothing left to do, no tokenizer, `max_tokens` beyond the model, or no documents.
        FloatingPointError: No document gave finite numbers in all runs. Those that do not are left out and named in the
            provenance.
        RuntimeError: A run failed, named with its intervention; a ValueError of an intervention comes as it is.
    """
    cfg = model.cfg
    n_loops = cfg.n_loops if n_loops is None else n_loops
    model.ensure_loops(n_loops)
    max_tokens = checked_max_tokens(model, corpus, max_tokens, EffectsError)
    documents = tokenize(corpus.report, model.tokenizer, max_tokens)
    chosen, absent = _chosen(model, n_loops, which, documents, alone=min(batch_size, len(documents)) == 1)
    tell = progress or (lambda what, done, of: None)

    runs: list[tuple[str, Make]] = [("the untouched run", lambda _: nullcontext())]
    runs += [(intervention.name, intervention.make) for intervention in chosen]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("nll", "effect", "helped", "harmed")}
    done, device = 0, model.embed.weight.device
    for batch in _batches(documents, batch_size):
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        predicts = mask[:, 1:] & mask[:, :-1]
        untouched = None
        for name, make in runs:
            try:
                with make(model), _watched(model, mask) as stays:
                    nll = _token_nll(model(ids, mask, n_loops=n_loops, seed=seed), ids, predicts)
            except ValueError:
                raise
            except Exception as error:
                raise RuntimeError(f"{name} failed: {type(error).__name__}: {error}") from error
            nll = nll.masked_fill(~stays[:, None], float("nan"))
            if untouched is None:
                untouched, values = nll, {"nll": nll}
            else:
                change = nll - untouched
                values = {"effect": change, "helped": (-change).clamp(min=0), "harmed": change.clamp(min=0)}
            for kind, value in values.items():
                parts[kind].append((value.sum(1) / predicts.sum(1)).cpu().numpy())
            done += len(ids)
            tell("intervening", done, len(runs) * len(documents))

    found = {"nll": np.concatenate(parts.pop("nll"))}
    for name, taken in parts.items():  # of each batch, one intervention after the other
        found[name] = np.stack([np.concatenate(taken[row :: len(chosen)]) for row in range(len(chosen))])
    finite = _finite_throughout(found["nll"], found["effect"], chosen)
    found = {name: of_all.compress(finite, axis=-1) for name, of_all in found.items()}
    kept, lost = list(compress(documents, finite)), compress(documents, ~finite)
    provenance = {
        "schema": SCHEMA,
        "model": model.source,
        **about_model(model),
        "trained_loops": cfg.n_loops,
        "run_loops": n_loops,
        "absent": absent,
        "corpus": corpus.name,
        "corpus_sha256": corpus.fingerprint,
        "documents": len(kept),
        "sources": len({document.source for document in kept}),
        "documents_cut": sum(document.cut for document in kept),
        "documents_too_short": len(corpus.report) - len(documents),
        "documents_not_finite": [document.name for document in lost],
        "tokens": sum(len(document.input_ids) - 1 for document in kept),
        "max_tokens": max_tokens,
        "seed": seed,
        "batch_size": batch_size,
        **about_machine(),
    }
    return Effects(_dataset(found, chosen, kept, provenance))


def _chosen(
    model: LoopedLM,
    n_loops: int,
    which: Sequence[str | Intervention] | None,
    documents: Sequence[TokenDocument],
    alone: bool,
) -> tuple[list[Intervention], dict[str, str]]:
    """The interventions to run, and those of the catalogue that this model does not have."""
    which = GROUPS if which is None else which
    if isinstance(which, str | Intervention):
        raise EffectsError(f"which = {which!r} is one alone: give a list of groups or interventions.")
    if not which:
        raise EffectsError(
            f"Nothing to intervene on: which is empty. Give some of {', '.join(GROUPS)}, or None for all."
        )
    groups = [entry for entry in which if not isinstance(entry, Intervention)]
    if unknown := [group for group in groups if group not in GROUPS]:
        raise EffectsError(f"{unknown[0]!r} is no group of interventions: there are {', '.join(GROUPS)}.")
    longest = max(len(document.input_ids) for document in documents)
    chosen, absent = catalogue(model, n_loops, groups, alone=alone, longest=longest)
    chosen += [entry for entry in which if isinstance(entry, Intervention)]
    if not chosen:
        reasons = sorted(set(absent.values()))
        raise EffectsError(f"Nothing to intervene on in {', '.join(map(str, which))}: {'; '.join(reasons)}.")
    if len({intervention.name for intervention in chosen}) < len(chosen):
        raise EffectsError("Two interventions have the same name and loop: give each its own.")
    return chosen, absent


def _batches(documents: Sequence[TokenDocument], size: int) -> Iterator[Batch]:
    """Batches of `size`; a last document that would be alone joins the batch before."""
    together = size + 1 if size > 1 and len(documents) % size == 1 else 0
    cut = max(0, len(documents) - together)
    yield from batches(documents[:cut], size)
    yield from batches(documents[cut:], max(together, 1))


@contextmanager
def _watched(model: LoopedLM, mask: Tensor) -> Iterator[Bool[Tensor, " document"]]:
    """Which documents' states stay finite within; a norm hides from the loss that they did not."""
    finite = torch.ones(len(mask), dtype=torch.bool, device=mask.device)

    def watch(state: Tensor, hook: Any) -> None:
        finite.logical_and_(are_finite(state, mask).to(finite.device))

    with model.hooks([(lambda name: name == "hook_embed" or name.endswith("hook_out_pre_norm"), watch)]):
        yield finite


def _token_nll(logits: Tensor, ids: Tensor, predicts: Tensor) -> Float[Tensor, "document pos"]:
    """NLL of every next token; 0 where none is predicted."""
    # Document by document: the float32 copy of a whole batch's logits may be larger than the model.
    nll = [
        F.cross_entropy(row.to(torch.promote_types(row.dtype, torch.float32)), targets, reduction="none")
        for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True)
    ]
    return torch.stack(nll).double().masked_fill(~predicts, 0)


def _finite_throughout(
    nll: Float[np.ndarray, " document"],
    effect: Float[np.ndarray, "intervention document"],
    chosen: Sequence[Intervention],
) -> Bool[np.ndarray, " document"]:
    """Documents whose numbers are finite in every run: intervals are paired, so all are over the same documents."""
    untouched, changed = np.isfinite(nll), np.isfinite(effect)
    finite = untouched & changed.all(0)
    if not finite.any():
        lost = [each.name for each, is_finite in zip(chosen, changed, strict=True) if not is_finite[untouched].any()]
        at = f"with {', '.join(lost)}" if untouched.any() and lost else "in every run"
        raise FloatingPointError(
            f"None of the {len(finite)} documents gave finite numbers {at}: run in a dtype of wider range (bfloat16 or "
            "float32, not float16), with fewer loops, or without that intervention."
        )
    return finite


def _dataset(
    found: dict[str, np.ndarray],
    chosen: Sequence[Intervention],
    documents: Sequence[TokenDocument],
    provenance: dict[str, Any],
) -> xr.Dataset:
    about = {
        "nll": "negative log likelihood of the next token, without an intervention",
        "effect": "NLL with the intervention minus NLL without it",
        "helped": "NLL that the intervention takes off the tokens it helps",
        "harmed": "NLL that the intervention adds to the tokens it harms",
    }
    both = ("intervention", "document")
    return xr.Dataset(
        {
            name: (both[-values.ndim :], values, {"units": "nats per token", "long_name": about[name]})
            for name, values in found.items()
        },
        coords={
            "intervention": [intervention.name for intervention in chosen],
            "group": ("intervention", [intervention.group for intervention in chosen]),
            "change": ("intervention", [intervention.change for intervention in chosen]),
            "loop": ("intervention", [intervention.loop or 0 for intervention in chosen]),
            "document": [document.name for document in documents],
            "source": ("document", [document.source for document in documents]),
        },
        attrs={"provenance": json.dumps(provenance, sort_keys=True)},
    )
