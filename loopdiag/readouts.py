"""What can be read from a state, freed from the basis it is written in: translators fitted on `fit` documents.

A translator puts an affine map before the model's frozen norm N and head. Two kinds, all trained alike:

- exits, one per loop r = 0..R: `Y_r + s * (A h + c)`, h the standardised N(Y_r) and s the RMS of Y_r; in models with a
  coda, its output stands for Y_r. It starts at the model's own exit (A = 0, c = 0), so what it gains is content that
  the exit misses for its basis.
- carries, two per loop r = 2..R of a model with an offset: `s * (A h + c)`, h the standardised Z_{r-1} of the token
  itself, or the one that the offset hands over. Both start from the mean state, knowing nothing of the token.

Training is streamed: states are recorded again in every pass, and of no more than eight documents kept at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopdiag.corpus.documents import Sourced
from loopdiag.errors import InputError
from loopdiag.measures.reduce import at_least_float32, over_tokens
from loopdiag.model.states import shift
from loopdiag.trace import LoopTrace

RIDGES = (1e-2, 1e-1, 1.0)
PASSES = 2
FOLDS = 2
# How often fitting records each document: a pass for the moments and PASSES to learn, for all folds but the one that
# holds it out and once in the end; and one pass where it is held out.
RECORDINGS = FOLDS * (1 + PASSES) + 1
LEARNING_RATE = 1e-2
TOKENS_PER_UPDATE = 512
DOCUMENTS_TOGETHER = 8  # whose tokens are dealt into updates, whatever the batch size


DocumentT = TypeVar("DocumentT", bound=Sourced)
TracesOf = Callable[[Sequence[DocumentT]], Iterable[LoopTrace]]
Read = Callable[[Tensor], Tensor]
Named = tuple[str, int]  # kind ("exit", "carry", "shifted") and loop


def _inputs(trace: LoopTrace) -> Iterator[tuple[Named, Tensor, Tensor | None]]:
    """Each translator's name, its input [document, pos, d_model], and for exits the state it is added to."""
    for place, loop in enumerate(trace.loops):
        yield ("exit", loop), trace.readout[place], trace.exit_state[place]
    for place, loop in list(enumerate(trace.loops))[2:] if trace.offset else ():
        yield ("carry", loop), trace.carry[place - 1], None
        yield ("shifted", loop), shift(trace.carry[place - 1], trace.offset, trace.mask), None


class Translator(nn.Module):
    """An affine map on standardised inputs; see the module's text."""

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, std: Tensor, scale: Tensor, adds: bool) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std), ("scale", scale)):
            self.register_buffer(name, value)
        self.A = nn.Parameter(mean.new_zeros(len(mean), len(mean)))
        self.c = nn.Parameter(torch.zeros_like(mean) if adds else mean / scale)

    def forward(self, x: Float[Tensor, "token d_model"], state: Tensor | None) -> Float[Tensor, "token d_model"]:
        moved = self.scale * (F.linear((x - self.mean) / self.std, self.A) + self.c)
        return moved if state is None else state + moved


@dataclass(frozen=True)
class Readouts:
    """Fitted translators of one model and run.

    Attributes:
        translators: By kind and loop.
        ridges: Weight of ||A||^2 in each translator's loss (nats), chosen by folds within the fitted documents.
    """

    translators: dict[Named, Translator]
    ridges: dict[Named, float]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was fitted, by name; `of` makes the same readouts of it."""
        found: dict[str, Tensor] = {}
        for (kind, loop), translator in self.translators.items():
            values = translator.state_dict() | {"ridge": torch.tensor(self.ridges[kind, loop], dtype=torch.float64)}
            found |= {f"{kind} {loop} {name}": value for name, value in values.items()}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What `tensors` told."""
        named: defaultdict[Named, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            kind, loop, name = key.split()
            named[kind, int(loop)][name] = value
        ridges = {which: float(values.pop("ridge")) for which, values in named.items()}
        translators = {}
        for which, values in named.items():
            translator = Translator(values["mean"], values["std"], values["scale"], adds=which[0] == "exit")
            translator.load_state_dict(values)
            translators[which] = translator
        return cls(translators, ridges)

    def measure(self, trace: LoopTrace) -> dict[str, Float[Tensor, "document loop"]]:
        """`nll_usable` (loops 0..R) and, with an offset, `withheld` (loops 2..R, NaN before), in nats per token.

        `nll_usable(r)`: NLL of the next token through the exit translator of loop r. `withheld(r)`: how much worse the
        next token can be read from the carry that the offset hands to loop r than from the token's own, each alone.
        """
        predicts = trace.predicts
        nll = {
            name: over_tokens(_losses(self.translators[name], trace, x, state)[None], predicts)
            for name, x, state in _inputs(trace)
        }
        usable = {"nll_usable": torch.cat([nll["exit", loop] for loop in trace.loops], dim=1)}
        if not trace.offset:
            return usable
        undefined = torch.full_like(nll["exit", 0], float("nan"))
        withheld = [nll["shifted", loop] - nll["carry", loop] for loop in trace.loops[2:]]
        return usable | {"withheld": torch.cat([undefined, undefined, *withheld], dim=1)}


def fit_readouts(
    documents: Sequence[DocumentT], traces_of: TracesOf[DocumentT], *, ridges: Sequence[float] = RIDGES
) -> Readouts:
    """Fit the translators on `documents`.

    Each translator's ridge is the one with the least held-out NLL over folds by source, all within `documents`.

    Args:
        documents: What to fit on; documents of one source stay in one fold.
        traces_of: Records documents; called once for every pass.
        ridges: What to choose from.

    Raises:
        InputError: Documents of one source only, which cannot be dealt into folds.
    """
    sources = sorted({document.source for document in documents})
    if len(sources) < FOLDS:
        raise InputError(
            f"Readouts are fitted on documents of at least {FOLDS} sources, and were given {len(sources)}: "
            "give more, or leave the measures of the group readouts out."
        )
    fold_of = {source: index % FOLDS for index, source in enumerate(sources)}
    losses: defaultdict[tuple[Named, float], float] = defaultdict(float)
    for fold in range(FOLDS):
        inside = [document for document in documents if fold_of[document.source] != fold]
        outside = [document for document in documents if fold_of[document.source] == fold]
        fitted = _fit(inside, traces_of, lambda name: ridges)
        for trace in traces_of(outside):
            for name, x, state in _inputs(trace):
                for ridge in ridges:
                    losses[name, ridge] += float(_losses(fitted[name, ridge], trace, x, state).sum())
    names = {name for name, _ in losses}
    best = {name: min(ridges, key=lambda ridge: losses[name, ridge]) for name in names}
    fitted = _fit(documents, traces_of, lambda name: (best[name],))
    return Readouts({name: fitted[name, best[name]] for name in best}, best)


def _fit(
    documents: Sequence[DocumentT], traces_of: TracesOf[DocumentT], ridges_of: Callable[[Named], Sequence[float]]
) -> dict[tuple[Named, float], Translator]:
    """A translator for each input and ridge: Adam on the mean NLL plus ridge * ||A||^2, its rate falling to 0."""
    moments, tokens = _moments(traces_of(documents))
    if not moments:
        raise FloatingPointError(
            "No document to fit readouts on gave finite numbers: run the model in a dtype of wider range, or leave the "
            "measures of the group readouts out."
        )
    fitted = {
        (name, ridge): Translator(*moments[name], adds=name[0] == "exit")
        for name in moments
        for ridge in ridges_of(name)
    }
    optimizer = torch.optim.Adam([p for translator in fitted.values() for p in translator.parameters()])
    seen = 0
    for _ in range(PASSES):
        for update in _updates(traces_of(documents)):
            for name in update.inputs:
                for ridge in ridges_of(name):
                    _descend(fitted[name, ridge], update, name, ridge)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - seen / (PASSES * tokens))
            optimizer.step()
            seen += len(update.targets)
    return fitted


@dataclass(frozen=True)
class _Tokens:
    """Tokens that predict, of one document or several.

    Attributes:
        read: What makes logits of a state.
        targets: The tokens after them.
        inputs: By translator, its input [token, d_model], and for exits the state it is added to.
    """

    read: Read
    targets: Tensor
    inputs: dict[Named, tuple[Tensor, Tensor | None]]


def _updates(traces: Iterable[LoopTrace]) -> Iterator[_Tokens]:
    """The tokens of each update: of so many documents together, however they are batched."""
    held: list[_Tokens] = []
    for trace in traces:
        inputs, (read, targets) = list(_inputs(trace)), _reading(trace)
        for place, rows in enumerate(trace.predicts):
            of_document = {
                name: (x[place, rows], None if state is None else state[place, rows]) for name, x, state in inputs
            }
            held.append(_Tokens(read, targets[place, rows], of_document))
            if len(held) == DOCUMENTS_TOGETHER:
                yield from _dealt(held)
                held = []
    if held:
        yield from _dealt(held)


def _dealt(held: list[_Tokens]) -> Iterator[_Tokens]:
    targets = torch.cat([tokens.targets for tokens in held])
    inputs: dict[Named, tuple[Tensor, Tensor | None]] = {}
    for name in held[0].inputs:
        xs, states = zip(*(tokens.inputs[name] for tokens in held), strict=True)
        inputs[name] = torch.cat(xs), None if states[0] is None else torch.cat(states)
    for start in range(0, len(targets), TOKENS_PER_UPDATE):
        rows = slice(start, start + TOKENS_PER_UPDATE)
        parts = {name: (x[rows], None if state is None else state[rows]) for name, (x, state) in inputs.items()}
        yield _Tokens(held[0].read, targets[rows], parts)


def _moments(traces: Iterable[LoopTrace]) -> tuple[dict[Named, tuple[Tensor, Tensor, Tensor]], int]:
    """Mean, standard deviation and scale of every input over the tokens that predict, and how many these are."""
    sums: dict[Named, list[Tensor]] = {}
    tokens = 0
    for trace in traces:
        predicts, dtype = trace.predicts, at_least_float32(trace.raw).dtype
        tokens += int(predicts.sum())
        for name, x, state in _inputs(trace):
            h, scaled = x[predicts].double(), (x if state is None else state)[predicts].double()
            new = [h.sum(0), h.square().sum(0), scaled.square().mean(1).sum()]
            sums[name] = [old + more for old, more in zip(sums[name], new, strict=True)] if name in sums else new
    moments = {}
    for name, (total, squares, power) in sums.items():
        mean = total / tokens
        std = (squares / tokens - mean.square()).clamp_min(1e-12).sqrt()
        scale = (power / tokens).sqrt()
        moments[name] = (mean.to(dtype), std.to(dtype), scale.to(dtype))
    return moments, tokens


def _descend(translator: Translator, update: _Tokens, name: Named, ridge: float) -> None:
    """Leave the gradient of one update in the translator; the model's own weights get none."""
    x, state = update.inputs[name]
    with torch.enable_grad():
        nll = _nll(translator, update.read, x, state, update.targets)
        loss = nll.mean() + ridge * translator.A.square().sum()
        parameters = (translator.A, translator.c)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient


def _nll(
    translator: Translator,
    read: Read,
    x: Float[Tensor, "token d_model"],
    state: Tensor | None,
    targets: Int[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """NLL of the next tokens, read through a translator."""
    moved = translator(at_least_float32(x), None if state is None else at_least_float32(state))
    return F.cross_entropy(at_least_float32(read(moved.to(x.dtype))), targets, reduction="none")


def _reading(trace: LoopTrace) -> tuple[Read, Int[Tensor, "document pos"]]:
    """What makes logits of a state, and the token after each."""
    head, norm = trace.head, trace.norm
    if head is None or trace.input_ids is None:
        raise ValueError("Readouts need head and tokens; give LoopTrace.from_states(..., head=, input_ids=).")
    return lambda state: head(norm(state)), trace.input_ids.roll(-1, dims=1)


@torch.no_grad()
def _losses(translator: Translator, trace: LoopTrace, x: Tensor, state: Tensor | None) -> Float[Tensor, "document pos"]:
    """NLL of every predicting token, 0 elsewhere; the vocabulary is processed in blocks of tokens."""
    losses, (read, targets) = at_least_float32(x.new_zeros(trace.mask.shape)), _reading(trace)
    for rows in trace.predicts.nonzero().split(TOKENS_PER_UPDATE):
        place = rows[:, 0], rows[:, 1]
        nll = _nll(translator, read, x[place], None if state is None else state[place], targets[place])
        losses[place] = nll.to(losses.dtype)
    return losses
