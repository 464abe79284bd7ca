"""What a loop is worth in fresh parameters: the recurrence exponent phi, over models of several sizes and loop counts.

L = E + A (N_once + r^phi N_rec)^-a, after Schwethelm, Rückert and Kaissis (arXiv 2604.21106). Their term for the number
of training tokens is left out: the models must have been trained on equally many, and E then holds it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float

from loopdiag.bootstrap import interval, resampled_means
from loopdiag.errors import InputError
from loopdiag.losses import SweepLosses

WIDEST = 0.5  # an interval of phi wider than this is half of the way from worthless to as good as fresh parameters
PHI = (-1.0, 2.0)
DECAY = (0.01, 10.0)  # of a; language models are near 0.3, and below 0.01 a power law cannot be told from a logarithm
PARAMETERS = 4  # phi, E, A, a
FEWEST_SEEDS = 3  # of fewer, seeds cannot say how much trainings differ
FEWEST_DRAWS = 100  # of fewer, the ends of a 95 % interval lie too far inside
MISFIT = 2.0  # how many times their own error the losses may miss the form before the verdict says so

_STARTS = np.array([0.03, 0.1, 0.3, 1.0, 3.0])  # of a, each with its best phi
_AT_BOUND = 1e-3  # of the way between the bounds
_ROUNDING = 1e-6  # of phi, and in nats; differences below it are arithmetic

PerModel = Float[np.ndarray, " model"]
Losses = Float[np.ndarray, "model column"]
At = Float[np.ndarray, " phi_and_log_a"]


@dataclass(frozen=True)
class Measured:
    """One trained model.

    Attributes:
        loops: r >= 1 that it was trained with, and measured at.
        n_once: Parameters that a token uses once, >= 0.
        n_rec: Parameters that are looped, each counted once, > 0; models of one size have the same number.
        losses: [seed] or [draw], nats per token on the same held-out text for all models.
    """

    loops: int
    n_once: float
    n_rec: float
    losses: Float[np.ndarray, " column"]


@dataclass(frozen=True)
class Exponent:
    """The recurrence exponent, or why the data cannot tell it.

    Attributes:
        phi: 1 where a loop is worth as much as fresh parameters, 0 where it is worth nothing, below 0 where it harms;
            None where the data cannot tell.
        low, high: Of the 95 % interval of phi; also where it is too wide to tell; None where it was not computed.
        E: Loss without end of parameters, nats per token.
        A: Nats per token times parameters to the power a.
        a: Decay. E, A and a stand in for each other, and carry no interval; None with phi.
        residual: What the losses miss the form by, in nats per token: root mean square over models less 4 parameters.
        noise: Standard error of the losses, in nats per token, without what all models share; None of one column.
        most_loops: Most loops of a model.
        why: Why phi is None; empty otherwise.
    """

    phi: float | None
    low: float | None
    high: float | None
    E: float | None
    A: float | None
    a: float | None
    residual: float | None
    noise: float | None
    most_loops: int
    why: str

    @property
    def verdict(self) -> str:
        """The answer in words."""
        if self.phi is None or self.low is None or self.high is None or self.residual is None or self.noise is None:
            return f"The data cannot tell what a loop is worth: {self.why}."
        if self.high < -_ROUNDING:
            worth = "more loops harm"
        elif self.low <= _ROUNDING:
            worth = "more loops cannot be told from worthless"
        elif self.high < 1 - _ROUNDING:
            worth = "a loop is worth something, but less than fresh parameters"
        elif self.low <= 1 + _ROUNDING:
            worth = "a loop cannot be told from as many fresh parameters"
        else:
            worth = "a loop is worth more than fresh parameters"
        text = (
            f"phi = {self.phi:.2f} (95 %: {self.low:.2f} to {self.high:.2f}): {worth}. Looped {self.most_loops} times, "
            f"a parameter counts as {self.most_loops**self.phi:.2g}."
        )
        if self.residual > MISFIT * self.noise + _ROUNDING:
            text += (
                f" The losses miss the form by {self.residual:.2g} nats, with an error of their own of "
                f"{self.noise:.2g}: the interval leaves the difference out, and is too narrow."
            )
        return text


def exponent_of(
    sweeps: Sequence[SweepLosses], *, offset: int | None = None, memory: str | None = None, seed: int = 0
) -> Exponent:
    """phi over the models of sweeps of several sizes, which must have been trained on equally many tokens of one text.

    The columns are seeds where all models share three or more, else draws over documents of the seeds' mean.

    Args:
        sweeps: One of each size.
        offset, memory: Of the models; the first sweep's first when None.
        seed: Of the draws.

    Raises:
        InputError: Sweeps of other texts, budgets or sequences, or one without such models.
    """
    recipes = [(each.provenance["text_sha256"], each.provenance["recipe"]) for each in sweeps]
    if len({(text, recipe["tokens"], recipe["sequence"]) for text, recipe in recipes}) != 1:
        raise InputError("The sweeps differ in text, training tokens or sequence: a size cannot be told from that.")
    offset = int(sweeps[0].data["offset"].values[0]) if offset is None else offset
    memory = str(sweeps[0].data["memory"].values[0]) if memory is None else memory
    try:
        wired = [each.data.sel(offset=offset, memory=memory) for each in sweeps]
    except KeyError:
        raise InputError(f"A sweep has no models with offset {offset} and memory {memory!r}.") from None
    # [seed, loops, document] of each; seeds that every model has.
    losses = [data["nll"].transpose("seed", "loops", "document") for data in wired]
    complete = [nll.seed.values[np.isfinite(nll.values).all((1, 2))] for nll in losses]
    seeds = sorted(set(complete[0].tolist()).intersection(*(each.tolist() for each in complete[1:])))
    if not seeds:
        raise InputError(f"No seed of these sweeps has all models with offset {offset} and memory {memory!r} yet.")
    over_seeds = len(seeds) >= FEWEST_SEEDS
    models = []
    for data, nll in zip(wired, losses, strict=True):
        chosen = nll.sel(seed=seeds)
        if over_seeds:
            columns = chosen.mean("document").values  # [seed, loops]
        else:
            columns = resampled_means(chosen.mean("seed").values.T, data["source"].values, seed=seed)
        models += [
            Measured(
                int(loops),
                float(data["parameters_once"].sel(loops=loops)),
                float(data["parameters_looped"].sel(loops=loops)),
                columns[:, place],
            )
            for place, loops in enumerate(data["loops"].values)
        ]
    return recurrence_exponent(models, columns="seeds" if over_seeds else "draws")


def recurrence_exponent(models: Sequence[Measured], *, columns: Literal["seeds", "draws"]) -> Exponent:
    """Fit phi to the mean losses by least squares, with its 95 % interval from refits.

    E and A are solved for at every phi and a, which is what keeps the fit from the valley along which E, A and a stand
    in for each other; losses may be shifted, and parameters counted in any unit. The interval leaves out that the form
    may be wrong; of draws over documents also the training seed.

    Args:
        models: Trained on equally many tokens; losses [column], in the same order for all.
        columns: What the losses of a model are: of "seeds", one training each, the interval is the jackknife's with
            Student's t; of "draws", bootstrap means over the same documents (or seeds), it is the percentiles',
            which held in 92 % of 578 simulated data sets of 12 models.

    Returns:
        With `phi` None and the reason in `why` where fewer than two sizes have two loop counts, models are fewer than
        5, columns too few for an interval, the best fit lies at a bound, or the interval is wider than 0.5.

    Raises:
        InputError: No models, counts out of range, losses not finite, or not equally many of each model.
    """
    losses = _checked(models, columns)
    noise = _noise(losses, columns)
    most_loops = max(model.loops for model in models)

    def cannot_tell(why: str, low: float | None = None, high: float | None = None) -> Exponent:
        return Exponent(None, low, high, None, None, None, None, noise, most_loops, why)

    if why := _why_not_to_fit(models, losses, columns):
        return cannot_tell(why)
    form = _Form(models)
    mean = losses.mean(1)
    best = form.fit(mean)
    E, A, residual = form.solve(best, mean)
    if why := _why_not_to_trust(best, E, A, mean):
        return cannot_tell(why)
    phi, a = float(best[0]), float(np.exp(best[1]))
    low, high = _interval(form, best, losses, columns)
    if high - low > WIDEST:
        return cannot_tell(
            f"the 95 % interval of phi, {low:.2f} to {high:.2f}, is {high - low:.2f} wide, and more than {WIDEST:g} "
            "says little; measure more sizes, loop counts or seeds",
            low,
            high,
        )
    return Exponent(phi, low, high, E, A * form.unit**a, a, residual, noise, most_loops, "")


class _Form:
    """The scaling law at given models, in the two parameters phi and log a.

    Attributes:
        unit: What parameters are counted in: the geometric mean of the models' own.
    """

    bounds = np.array([PHI, tuple(np.log(DECAY))]).T

    def __init__(self, models: Sequence[Measured]) -> None:
        once, rec, loops = np.array([(model.n_once, model.n_rec, model.loops) for model in models], dtype=float).T
        self.unit = float(np.exp(np.log(once + rec).mean()))
        self._once, self._rec, self._log_loops = once / self.unit, rec / self.unit, np.log(loops)

    def power(self, at: At) -> PerModel:
        """N^-a - 1, with N in `unit`; less 1 so that a small `a` costs no digits."""
        return np.expm1(-np.exp(at[1]) * np.log(self._once + np.exp(at[0] * self._log_loops) * self._rec))

    def solve(self, at: At, losses: PerModel) -> tuple[float, float, float]:
        """E and A >= 0 that fit best, with N in `unit`, and what the losses miss the form by."""
        power = self.power(at)
        centred = power - power.mean()
        A = max(float(centred @ losses), 0.0) / float(centred @ centred)
        E = float(losses.mean()) - A * float(power.mean() + 1)
        misses = losses - E - A * (power + 1)
        return E, A, math.sqrt(float(misses @ misses) / (len(losses) - PARAMETERS))

    def fit(self, losses: PerModel, start: At | None = None) -> At:
        """phi and log a that fit best: from several starts, or from one where it is known about where they are."""
        target = losses - losses.mean()
        target /= np.linalg.norm(target) or 1.0

        def misses(at: np.ndarray) -> np.ndarray:
            power = self.power(at)
            power -= power.mean()
            power /= np.linalg.norm(power) or 1.0
            return target - max(power @ target, 0.0) * power

        def cost(at: np.ndarray) -> float:
            return float(np.sum(misses(at) ** 2))

        if start is None:
            grid = [[np.array([phi, log_a]) for phi in np.linspace(*PHI, 13)] for log_a in np.log(_STARTS)]
            starts = [min(row, key=cost) for row in grid]
        else:
            starts = [start]
        runs = [
            scipy.optimize.least_squares(misses, first, bounds=self.bounds, xtol=1e-10, ftol=1e-12, gtol=1e-12)
            for first in starts
        ]
        return min(runs, key=lambda run: run.cost).x


def _checked(models: Sequence[Measured], columns: str) -> Losses:
    """Losses of all models."""
    if columns not in ("seeds", "draws"):
        raise InputError(f'columns = {columns!r} is not allowed: say whether losses are by "seeds" or by "draws".')
    if not models:
        raise InputError("No models were given: a recurrence exponent needs at least 5.")
    for index, model in enumerate(models):
        for name, value, allowed, least in (
            ("loops", model.loops, model.loops >= 1 and model.loops % 1 == 0, "a whole number >= 1"),
            ("n_once", model.n_once, 0 <= model.n_once < math.inf, "a finite number of parameters >= 0"),
            ("n_rec", model.n_rec, 0 < model.n_rec < math.inf, "a finite number of parameters > 0"),
        ):
            if not allowed:
                raise InputError(f"{name} = {value} of model {index} is not allowed: it must be {least}.")
    shapes = {np.shape(model.losses) for model in models}
    if len(shapes) > 1 or len(shape := shapes.pop()) != 1 or not shape[0]:
        raise InputError(
            f"Losses of shapes {[np.shape(model.losses) for model in models]} are not allowed: give every model one "
            f"row of equally many {columns}, in the same order."
        )
    losses = np.array([model.losses for model in models], dtype=float)
    if not np.isfinite(losses).all():
        bad = sorted({int(index) for index in np.argwhere(~np.isfinite(losses))[:, 0]})
        raise InputError(f"Losses of models {bad} are not finite: leave these models out.")
    return losses


def _noise(losses: Losses, columns: str) -> float | None:
    """Standard error of the losses, root mean square over models; what all models share is E's, and taken out."""
    n_columns = losses.shape[1]
    if n_columns == 1:
        return None
    own = (losses - losses.mean(0)).var(1, ddof=1).mean()
    return math.sqrt(float(own) / (n_columns if columns == "seeds" else 1))


def _why_not_to_fit(models: Sequence[Measured], losses: Losses, columns: str) -> str:
    """What is missing for a fit; empty where nothing is."""
    counts = Counter(n_rec for n_rec, _ in {(model.n_rec, model.loops) for model in models})
    sizes = sum(count >= 2 for count in counts.values())
    fewest = 2 if columns == "seeds" else FEWEST_DRAWS
    if sizes < 2:
        return f"it takes two sizes with two loop counts each, and there {'is' if sizes == 1 else 'are'} {sizes}"
    if len(models) <= PARAMETERS:
        return f"{len(models)} models are too few for a form with {PARAMETERS} parameters, which takes 5"
    if losses.shape[1] < fewest:
        return f"{losses.shape[1]} of {columns} give no interval, which takes {fewest}"
    if np.ptp(losses.mean(1)) == 0:
        return "all models have the same loss"
    return ""


def _why_not_to_trust(best: At, E: float, A: float, losses: PerModel) -> str:
    """What speaks against a fit: the bound it lies at; empty where nothing does."""
    if A == 0:
        return "the loss does not fall with parameters, looped or not"
    low, high = _Form.bounds
    margin = _AT_BOUND * (high - low)
    (phi_low, a_low), (phi_high, a_high) = best <= low + margin, best >= high - margin
    if phi_low:
        return f"the loss rises with loops as the form cannot express (the best phi is at its bound, {PHI[0]:g})"
    if phi_high:
        return f"the loss falls with loops as the form cannot express (the best phi is at its bound, {PHI[1]:g})"
    if a_low or a_high:
        return f"the best decay a is at its bound, {DECAY[int(a_high)]:g}"
    if losses.min() <= E:
        return f"the best E, {E:.4g} nats, is at its bound, the smallest loss"
    return ""


def _interval(form: _Form, best: At, losses: Losses, columns: str) -> tuple[float, float]:
    """95 % of phi."""
    if columns == "draws":
        low, high = interval(np.array([form.fit(draw, start=best)[0] for draw in losses.T]))
        return float(low), float(high)
    n_seeds = losses.shape[1]
    without = [form.fit(np.delete(losses, seed, 1).mean(1), start=best)[0] for seed in range(n_seeds)]
    error = math.sqrt(np.var(without) * (n_seeds - 1))
    reach = float(scipy.stats.t.ppf(0.975, n_seeds - 1)) * error
    return float(best[0]) - reach, float(best[0]) + reach
