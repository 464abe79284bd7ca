"""What a sweep measured: gain, tax and net of each loop count, and how many loops to train with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Float

from loopdiag import html
from loopdiag.bootstrap import interval, resampled_means, student_interval
from loopdiag.gaincost.rule import PRICE, Decision, checked_price, decide, describe
from loopdiag.losses import SweepError, SweepLosses
from loopdiag.summary import Estimate

CLAIM = 3  # seeds; fewer cannot say how much trainings differ


@dataclass(frozen=True)
class Decomposition:
    """Why a loop count wins or loses, in nats per token, from models trained with the offset and without it.

    With L held-out loss, R a loop count of the grid and R' the one before::

        gain(R) = L_off(R') - L_off(R)    what a loop brings where no offset stands in its way
        tax(R)  = L_on(R) - L_off(R)      what the offset costs
        net(R)  = L_on(R') - L_on(R)      what a loop brings with the offset, computed on its own

    so that net(R) = gain(R) - rise(R), the rise of the tax being tax(R) - tax(R'). NaN where a model is missing; gain,
    rise and net have no first count.

    Attributes:
        memory: Whose keys and values later loops read.
        loops: Loop counts.
        gain, tax, net, rise: As above.
        helped, harmed: Of gain, tax and net, what it gives to the tokens that it helps and takes from those that it
            harms: gain and net are helped - harmed, tax is harmed - helped.
        loss_on, loss_off: Held-out losses.
        seeds: Trainings of each model.
        over: What the 95 % intervals are over: `seeds` (t intervals on paired differences, on these documents) or
            `documents` (bootstrap, on the mean of the seeds; it leaves out what another training would give).
    """

    memory: str
    loops: np.ndarray
    gain: Estimate
    tax: Estimate
    net: Estimate
    rise: Estimate
    helped: dict[str, Estimate]
    harmed: dict[str, Estimate]
    loss_on: Estimate
    loss_off: Estimate
    seeds: int
    over: Literal["seeds", "documents"]

    def _repr_html_(self) -> str:
        columns = {
            "loss, offset on": self.loss_on,
            "loss, offset off": self.loss_off,
            **{"gain": self.gain, "tax": self.tax, "net": self.net},
        }
        caveats = {
            "seeds": "they hold for these documents",
            "documents": "they leave out what another training would give",
        }
        return html.card(
            f"Gain and tax of each loop count, memory {self.memory}, {self.seeds} seed{'s' if self.seeds > 1 else ''}",
            ["loops", *columns],
            html.rows(self.loops, columns.values()),
            [
                "Nats per token; gain and net are from the count above to this one. "
                f"Intervals: 95 % over {self.over}; {caveats[self.over]}."
            ],
        )


def decompose(
    losses: SweepLosses,
    memory: str | None = None,
    *,
    over: Literal["seeds", "documents"] | None = None,
    seeds: Sequence[int] | None = None,
    seed: int = 0,
) -> Decomposition:
    """Split what each loop count brings into a gain and a tax.

    Seeds that lack a model are left out, as long as one has them all.

    Args:
        losses: A sweep with the offset on and off.
        memory: Of several in the sweep, which; the first when None.
        over: What intervals are over; seeds where there are three, documents otherwise, when None.
        seeds: Only these; all when None.
        seed: Of the bootstrap over documents.

    Raises:
        SweepError: The sweep has one offset only, or no such memory or seed, or too few seeds for intervals over them.
        ValueError: Intervals over anything else.

    Example:
        Of a sweep in which two loops are best with the offset, and three without:

        >>> losses = SweepLosses.load("sweeps/mine/sweep.nc")
        >>> parts = decompose(losses)
        >>> parts.loops.tolist()
        [1, 2, 3, 4]
        >>> parts.gain.mean.round(2).tolist()  # without the offset, from the loop count before
        [nan, 0.02, 0.06, -0.01]
        >>> parts.tax.mean.round(2).tolist()  # loss with the offset less that without
        [0.0, -0.08, 0.03, 0.01]
        >>> parts.net.mean.round(2).tolist()  # with the offset, from the loop count before
        [nan, 0.1, -0.05, 0.01]
    """
    if over not in (None, "seeds", "documents"):
        raise ValueError(f"over = {over!r} is not allowed: intervals are over 'seeds' or 'documents'.")
    data = _of(losses, memory, seeds)
    if data.sizes["offset"] < 2:
        raise SweepError("This sweep has models with one offset only: the tax of an offset needs both, on and off.")
    data = _whole_seeds(data)
    over = over or _over(data)
    if over == "seeds" and data.sizes["seed"] < 2:
        raise SweepError("One seed cannot say how much trainings differ: train more, or take intervals over documents.")
    on, off = (data.isel(offset=place) for place in (0, -1))

    def estimate(values: xr.DataArray) -> Estimate:
        return _estimate(values.transpose("seed", "document", "loops"), over, seed)

    def one_fewer(nll: xr.DataArray) -> xr.DataArray:
        return nll.shift(loops=1)

    return Decomposition(
        memory=str(data["memory"].item()),
        loops=data["loops"].values,
        gain=estimate(one_fewer(off["nll"]) - off["nll"]),
        tax=estimate(on["nll"] - off["nll"]),
        net=estimate(one_fewer(on["nll"]) - on["nll"]),
        rise=estimate(on["nll"] - off["nll"] - one_fewer(on["nll"] - off["nll"])),
        helped={
            "gain": estimate(off["loop_helped"]),
            "tax": estimate(on["offset_helped"]),
            "net": estimate(on["loop_helped"]),
        },
        harmed={
            "gain": estimate(off["loop_harmed"]),
            "tax": estimate(on["offset_harmed"]),
            "net": estimate(on["loop_harmed"]),
        },
        loss_on=estimate(on["nll"]),
        loss_off=estimate(off["nll"]),
        seeds=data.sizes["seed"],
        over=over,
    )


@dataclass(frozen=True)
class TrainingRecommendation(Decision):
    """How many loops to train with, from measured losses of models that were trained with each count.

    The support is over draws of seeds and documents.

    Attributes:
        loops: The counts that were trained.
        nll: Their held-out losses, with 95 % intervals over what the draws are over.
        offset, memory: Of the models.
        seeds: Trainings of each.
        leaves_out: What the answer does not account for.
        data: What they were trained on.
    """

    loops: tuple[int, ...]
    nll: Estimate
    offset: int
    memory: str
    seeds: int
    leaves_out: str
    data: str

    @property
    def _question(self) -> str:
        return f"Train on {self.data} with how many loops (offset {self.offset}, memory {self.memory})? Measured:"

    def __str__(self) -> str:
        return (
            f"{self._question} {self.in_words()}.\n"
            f"Break-even prices, by mean loss: {describe(self.break_even, self.loops[0])}.\n"
            f"Left out: {self.leaves_out}."
        )

    def _repr_html_(self) -> str:
        losses = ", ".join(f"{loops}: {loss}" for loops, loss in html.rows(self.loops, [self.nll]))
        return self.card(
            self._question,
            [f"Held-out losses, nats per token: {losses}.", f"Left out: {self.leaves_out}."],
            self.loops[0],
        )


def recommend_training(
    losses: SweepLosses,
    price: float = PRICE,
    *,
    offset: int | None = None,
    memory: str | None = None,
    loops: Sequence[int] | None = None,
    seed: int = 0,
) -> TrainingRecommendation:
    """Recommend a loop count to train with from a sweep: the rule of `recommend`, on measured losses.

    Draws are over documents, clustered by source, and with three seeds or more over seeds, too: a Student's t noise
    with the covariance of the seeds' mean losses.

    Args:
        losses: A sweep.
        price: Nats per token that an extra loop must bring, >= 0.
        offset: Of the models; the sweep's first, which is on where it has one, when None.
        memory: Likewise.
        loops: Of these loop counts only; of all when None.
        seed: Of the draws.

    Raises:
        ValueError: `price` is negative or not finite.
        SweepError: No seed has all loop counts yet, or the sweep has no such offset, memory or loop count.
    """
    price = checked_price(price)
    data = _of(losses, memory, None)
    offset = int(data["offset"].values[0]) if offset is None else offset
    if offset not in data["offset"].values:
        raise SweepError(f"This sweep has no models with offset {offset}: it has {_listed(data['offset'])}.")
    if loops is not None:
        if not loops or not set(loops) <= set(data["loops"].values.tolist()):
            raise SweepError(f"This sweep has no models with loops {list(loops)}: it has {_listed(data['loops'])}.")
        data = data.sel(loops=sorted(set(loops)))
    every = data["nll"].sel(offset=offset).transpose("seed", "document", "loops")
    # A seed in which a count diverged says nothing of the others that would compare with what is left.
    wiring = f"-offset{offset}-{data['memory'].item()}-"
    diverged = [name for name in losses.provenance.get("diverged", ()) if wiring in name or name.startswith("loops1-")]
    nll = every.isel(seed=np.flatnonzero(np.isfinite(every.values).all((1, 2))))
    if not nll.sizes["seed"]:
        raise SweepError(
            f"No seed of this sweep has losses of all loop counts {_listed(data['loops'])} with offset {offset} and "
            f"memory {data['memory'].item()} yet: run `loopdiag sweep` with the same settings again, which goes on, or "
            "ask for some counts only"
            + (f". Training diverged: {', '.join(diverged)}; a lower learning rate may not." if diverged else ".")
        )
    counts = data["loops"].values
    means = nll.mean("document").values  # [seed, loops]
    sources = data["source"].values
    draws = resampled_means(nll.mean("seed").values, sources, seed=seed)
    variances = _paired(draws, lambda differences: differences.var(0))
    left_out = "other documents than these are drawn, other seeds are not: one training of each may tell another story"
    if len(means) >= CLAIM:
        deviations = means - means.mean(0)
        draws = draws + _student_noise(deviations, len(draws), seed)
        variances = variances + _paired(deviations, lambda d: (d**2).sum(0) / (len(d) * (len(d) - 1)))
        left_out = "other data, sizes and budgets than these"
    elif len(means) > 1:
        left_out = f"{len(means)} seeds cannot say how much trainings differ; three can"
    if diverged:
        left_out += f"; seeds in which a training diverged ({', '.join(diverged)}), which favours what did not"
    if losses.provenance.get("from"):
        left_out += "; all models started from one, which was trained with its own wiring and has a head start in it"
    return TrainingRecommendation(
        **vars(decide(means.mean(0), draws, np.sqrt(variances), counts, price, sources)),
        loops=tuple(int(count) for count in counts),
        nll=Estimate(means.mean(0), *interval(draws)),
        offset=offset,
        memory=str(data["memory"].item()),
        seeds=len(means),
        leaves_out=left_out,
        data=losses.provenance["data"],
    )


def equal_work(losses: SweepLosses, *, offset: int, memory: str) -> Float[np.ndarray, " loops"]:
    """Each loop count's loss after as much training work as the smallest had in all, in nats per token.

    Read off the looks on the way, between two of them by a straight line. Deep models are then not annealed, which is
    to their disadvantage. NaN before the first look.

    Args:
        losses: A sweep.
        offset, memory: Of the models.
    """
    data = _whole_seeds(losses.data.sel(offset=offset, memory=memory))
    nll = data["nll_look"].mean(["seed", "document"], skipna=False).transpose("loops", "look").values
    tokens = data["look"].values
    reached = tokens[-1] * float(data["flops"].values[0]) / data["flops"].values
    return np.array([np.interp(at, tokens, curve, left=np.nan) for at, curve in zip(reached, nll, strict=True)])


def _of(losses: SweepLosses, memory: str | None, seeds: Sequence[int] | None) -> xr.Dataset:
    """The models of one memory."""
    memories = [str(name) for name in losses.data["memory"].values]
    if memory is not None and memory not in memories:
        raise SweepError(f"This sweep has no models with memory {memory!r}: it has {', '.join(memories)}.")
    data = losses.data.sel(memory=memory or memories[0])
    if seeds is None:
        return data
    if not seeds or len(set(seeds)) < len(seeds) or not set(seeds) <= set(data["seed"].values.tolist()):
        raise SweepError(f"seeds = {list(seeds)} is not allowed: give different ones of {_listed(data['seed'])}.")
    return data.sel(seed=list(seeds))


def _whole_seeds(data: xr.Dataset) -> xr.Dataset:
    """The seeds that lack no model, so that means compare the same trainings; all, where each lacks one."""
    nll = data["nll"].transpose("seed", ...).values
    whole = np.flatnonzero(np.isfinite(nll).all(tuple(range(1, nll.ndim))))
    return data.isel(seed=whole) if len(whole) else data


def _listed(values: xr.DataArray) -> str:
    return ", ".join(str(value) for value in values.values)


def _estimate(values: xr.DataArray, over: str, seed: int) -> Estimate:
    """Mean over seeds and documents [loops], of the seeds that have a value there."""
    array = values.values
    means = array.mean(1)
    there = np.isfinite(means)
    counts = there.sum(0)
    mean = np.where(counts, np.where(there, means, 0).sum(0) / np.maximum(counts, 1), np.nan)
    if over == "seeds":
        return Estimate(mean, *student_interval(means))
    # [document, loops], NaN where no seed has a value.
    by_document = np.where(counts, np.where(there[:, None], array, 0).sum(0) / np.maximum(counts, 1), np.nan)
    return Estimate(mean, *interval(resampled_means(by_document, values["source"].values, seed=seed)))


def _paired(values: Float[np.ndarray, "draw loop"], spread: Any) -> Float[np.ndarray, "loop loop"]:
    """A spread of each paired difference."""
    return spread(values[:, :, None] - values[:, None, :])


def _student_noise(deviations: Float[np.ndarray, "seed loop"], draws: int, seed: int) -> Float[np.ndarray, "draw loop"]:
    """Multivariate t of seeds - 1 degrees of freedom whose differences have the seeds' t intervals.

    Args:
        deviations: Of each seed's losses from their mean.
        draws: How many.
        seed: Of the draws.
    """
    n = len(deviations)
    random = np.random.default_rng((seed, 1))
    normal = random.standard_normal((draws, n)) @ deviations / np.sqrt(n * (n - 1))
    return normal * np.sqrt((n - 1) / random.chisquare(n - 1, (draws, 1)))


@dataclass(frozen=True)
class LossCurve:
    """Held-out losses of the models of one offset and memory, in nats per token; NaN where none is trained.

    Attributes:
        offset, memory: Of the models.
        loops: Loop counts.
        nll: Means [loops] over the seeds that have the model.
        by_seed: Of each training [seed, loops].
        over: What the 95 % intervals are over, as in `Decomposition`.
    """

    offset: int
    memory: str
    loops: np.ndarray
    nll: Estimate
    by_seed: Float[np.ndarray, "seed loops"]
    over: Literal["seeds", "documents"]


def loss_curves(losses: SweepLosses, memory: str | None = None, *, seed: int = 0) -> list[LossCurve]:
    """Held-out losses over the loop counts, a curve for each memory and offset, the standard ones first.

    Args:
        losses: A sweep.
        memory: Only of this one; of all when None.
        seed: Of the bootstrap over documents.

    Raises:
        SweepError: The sweep has no such memory.
    """
    memories = losses.data["memory"].values if memory is None else [memory]
    found = []
    for name in map(str, memories):
        for offset in losses.data["offset"].values:
            data = _whole_seeds(_of(losses, name, None).sel(offset=offset))
            nll = data["nll"].transpose("seed", "document", "loops")
            over, by_seed = _over(data), nll.mean("document", skipna=False).values
            curve = _estimate(nll, over, seed)
            found.append(LossCurve(int(offset), name, data["loops"].values, curve, by_seed, over))
    return found


@dataclass(frozen=True)
class OverTraining:
    """What loops and the offset brought while the models trained, in nats per token [look, loops].

    The schedule anneals to the full budget, so that an early look is not what a shorter training would have given.

    Attributes:
        memory: Whose keys and values later loops read.
        tokens: Training tokens at each look.
        loops: Loop counts.
        above: By offset, the loss above that of the smallest loop count at the same tokens.
        tax: What the offset costs; None in a sweep of one offset.
        seeds: Trainings of each model.
        over: What the 95 % intervals are over, as in `Decomposition`.
    """

    memory: str
    tokens: np.ndarray
    loops: np.ndarray
    above: dict[int, Estimate]
    tax: Estimate | None
    seeds: int
    over: Literal["seeds", "documents"]


def over_training(losses: SweepLosses, memory: str | None = None, *, seed: int = 0) -> OverTraining:
    """Compare loop counts, and the offset with none, at every look at the models in training.

    Args:
        losses: A sweep.
        memory: Of several in the sweep, which; the first when None.
        seed: Of the bootstrap over documents.

    Raises:
        SweepError: The sweep has no such memory.
    """
    data = _whole_seeds(_of(losses, memory, None))
    over = _over(data)
    nll = data["nll_look"].astype(float)

    def estimate(values: xr.DataArray) -> Estimate:
        return _estimate(values.transpose("seed", "document", "look", "loops"), over, seed)

    return OverTraining(
        memory=str(data["memory"].item()),
        tokens=data["look"].values,
        loops=data["loops"].values,
        above={int(offset): estimate((nll - nll.isel(loops=0)).sel(offset=offset)) for offset in data["offset"].values},
        tax=estimate(nll.isel(offset=0) - nll.isel(offset=-1)) if data.sizes["offset"] > 1 else None,
        seeds=data.sizes["seed"],
        over=over,
    )


def _over(data: xr.Dataset) -> Literal["seeds", "documents"]:
    """What intervals are over where nobody says it."""
    return "seeds" if data.sizes["seed"] >= CLAIM else "documents"
