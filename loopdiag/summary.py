"""What figures and tables say of a diagnosis: means over documents with 95 % intervals, shares, ratios.

Every interval is a percentile bootstrap over documents, clustered by source; the same seed draws the same sources, so
that loops and measures are paired. It leaves out the training seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float

from loopdiag.bootstrap import interval, resampled_means, resampled_nanmeans
from loopdiag.diagnosis import Diagnosis, DiagnosisError
from loopdiag.measures.exit_rules import ORACLE, RULES
from loopdiag.measures.motion import ABOVE_NOISE
from loopdiag.measures.similarity import cka

# What is made of updates of the states, and of shifts of the output, falls with them into the noise.
_FLOORS = {
    **dict.fromkeys(
        ("step_size", "relative_step", "radial_share", "acceleration", "cos_update"), ("step_size", "noise_step")
    ),
    **dict.fromkeys(("fixed_point_gap", "fixed_point_gap_relative"), ("fixed_point_gap", "noise_step")),
    **dict.fromkeys(("output_shift", "output_shift_reverse", "output_shift_js"), ("output_shift", "noise_shift")),
    **{name: (name, "noise_nll") for name in ("gain", "cost")},
}
_OF_TWO_UPDATES = ("acceleration", "cos_update")
# What tells two runs of a model apart, beside its name.
_OF_A_RUN = (
    ("run_loops", "{} loops"),
    ("corpus", "on {}"),
    ("dtype", "{}"),
    ("documents", "{} documents"),
    ("max_tokens", "up to {} tokens"),
    ("measured_loops", "at loops {}"),
    ("corpus_sha256", "corpus {:.8}"),
    ("batch_size", "batches of {}"),
    ("device", "on {}"),
    ("seed", "seed {}"),
    ("weights_sha256", "weights {:.8}"),
)
# The columns of the paper's Table 3, and what each is a share of.
SHARES = {"output_shift": "output shift", "attention_kl": "attention re-routing", "breadth": "token breadth"}


@dataclass(frozen=True)
class Estimate:
    """Means over documents, with their 95 % bootstrap intervals; arrays of one shape."""

    mean: Float[np.ndarray, ...]
    low: Float[np.ndarray, ...]
    high: Float[np.ndarray, ...]


@dataclass(frozen=True)
class ByLoop(Estimate):
    """A measure at each loop where it is defined.

    Attributes:
        loop: Loop numbers >= 1, ascending; a run may have recorded some only.
        beyond: Whether a loop is beyond those that the model was trained with.
        in_noise: Whether the value there is not above twice what rounding alone makes, where that was measured.
    """

    loop: np.ndarray
    beyond: Bool[np.ndarray, " loop"]
    in_noise: Bool[np.ndarray, " loop"]


_NONE, _NEVER = np.empty(0), np.empty(0, bool)
NOWHERE = ByLoop(_NONE, _NONE, _NONE, np.empty(0, int), _NEVER, _NEVER)


def labels(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """A name for each of several diagnoses: the model's, and of the run as much as it takes to tell them apart.

    Raises:
        DiagnosisError: Two are of the same model and run.
    """
    abouts = [diagnosis.provenance for diagnosis in diagnoses]
    names = [about["model"] for about in abouts]
    for field, said in _OF_A_RUN:
        known = ["unknown" if about[field] is None else about[field] for about in abouts]  # of a foreign model
        longer = [f"{name}, {said.format(value)}" for name, value in zip(names, known, strict=True)]
        if len(set(longer)) > len(set(names)):
            names = longer
    if len(set(names)) == len(names):
        return names
    twice = next(name for name in names if names.count(name) > 1)
    raise DiagnosisError(f"Two diagnoses are of the same model and run ({twice}): give each once.")


def estimate(values: xr.DataArray, *, seed: int = 0) -> Estimate:
    """Means over documents with intervals; `low` and `high` are NaN where there is no `document` to resample.

    A document without a value, such as one too short for a rank, is left out of that value's mean, and a resample that
    has no such document of that value's interval. A value of a single source has none.

    Args:
        values: With the coordinate `source` along `document`.
        seed: Of the bootstrap.
    """
    if "document" not in values.dims:
        nothing = np.full(values.shape, np.nan)
        return Estimate(values.values, nothing, nothing)
    array = values.transpose("document", ...).values
    there = ~np.isnan(array)
    with np.errstate(invalid="ignore", divide="ignore"):  # no document may have a value
        mean = np.where(there, array, 0.0).sum(0) / there.sum(0)
    draws = resampled_nanmeans(array, values["source"].values, seed=seed)
    _, cluster = np.unique(values["source"].values, return_inverse=True)
    alone = sum(there[cluster == each].any(0).astype(int) for each in np.unique(cluster)) < 2
    low, high = np.nanpercentile(np.where(alone, 0.0, draws), (2.5, 97.5), axis=0)
    return Estimate(mean, *(np.where(alone, np.nan, end) for end in (low, high)))


def by_loop(diagnosis: Diagnosis, name: str, *, seed: int = 0) -> ByLoop:
    """A measure at each loop >= 1 where it is defined; layers and heads are averaged first.

    No loops where the diagnosis does not hold the measure.

    Args:
        diagnosis: What was measured.
        name: A measure by loop (and document, layer, head).
        seed: Of the bootstrap.

    Raises:
        ValueError: The measure has other dimensions, such as token classes.
    """
    if name not in diagnosis.data:
        return NOWHERE
    values = diagnosis.data[name]
    if not {"loop"} <= set(values.dims) <= {"document", "loop", "layer", "head"}:
        raise ValueError(f"by_loop: {name} has the dimensions {values.dims}, and not loops alone.")
    values = values.mean([dim for dim in values.dims if dim in ("layer", "head")])
    values = values.isel(loop=values["loop"].values >= 1).dropna("loop", how="all")
    if not values.size:
        return NOWHERE
    found, loops = estimate(values, seed=seed), values["loop"].values
    beyond = loops > diagnosis.provenance["trained_loops"]
    return ByLoop(found.mean, found.low, found.high, loops, beyond, np.isin(loops, below_noise(diagnosis, name)))


def below_noise(diagnosis: Diagnosis, name: str = "step_size") -> np.ndarray:
    """Loops >= 1 at which a measure says nothing, since what it is made of is not above twice the run's noise.

    Measures of updates rest on `step_size` and `noise_step`, those of output shifts on `output_shift` and
    `noise_shift`, gain and cost on `noise_nll`, all by their means over documents; what is made of two updates falls
    with either. No loops for other measures, and where no noise was measured.
    """
    made_of, floor = _FLOORS.get(name, (name, ""))
    if floor not in diagnosis.data or made_of not in diagnosis.data:
        return np.empty(0, int)
    means = diagnosis.data[[made_of, floor]].mean("document").sel(loop=diagnosis.loops)
    lost = (means[made_of] <= ABOVE_NOISE * means[floor]).values
    if name in _OF_TWO_UPDATES:
        lost[1:] |= lost[:-1]
    return diagnosis.loops[lost]


def has_shares(diagnosis: Diagnosis) -> bool:
    """Whether `refinement_shares` has an answer: two loops or more after the first, and something to share."""
    return len(diagnosis.loops) >= 3 and any(name in diagnosis.data for name in SHARES)


def refinement_shares(diagnosis: Diagnosis, *, seed: int = 0) -> dict[str, ByLoop]:
    """The paper's Table 3: each loop's share of what all loops after the first do.

    A ratio of means over documents, each resample's taken anew, so that shares sum to 1 in every one.

    Returns:
        By measure of `SHARES`, the loops from 2 on; measures that the diagnosis does not hold are left out.
        `attention_kl` is that of the effective map.

    Raises:
        DiagnosisError: There are no shares, see `has_shares`.
    """
    if not has_shares(diagnosis):
        raise DiagnosisError(
            f"Shares need {' or '.join(SHARES)} at two loops or more after the first; this diagnosis of "
            f"{diagnosis.provenance['model']} has the loops {', '.join(map(str, diagnosis.loops))}."
        )
    loops = diagnosis.loops[diagnosis.loops >= 2]
    found = {}
    for name in SHARES:
        if name not in diagnosis.data or diagnosis.data[name].sel(loop=loops).isnull().all():
            continue
        values = diagnosis.data[name].sel(loop=loops)
        values = values.mean([dim for dim in values.dims if dim in ("layer", "head")]).dropna("document", how="all")
        draws = resampled_means(values.values, values["source"].values, seed=seed)
        shares, (low, high) = _shares(values.values.mean(0)), interval(_shares(draws))
        beyond = loops > diagnosis.provenance["trained_loops"]
        found[name] = ByLoop(shares, low, high, loops, beyond, np.isin(loops, below_noise(diagnosis, name)))
    return found


def _shares(values: Float[np.ndarray, "... loop"]) -> Float[np.ndarray, "... loop"]:
    total = values.sum(-1, keepdims=True)
    return values / np.where(total > 0, total, np.nan)


def ratio(over: xr.DataArray, under: xr.DataArray, *, seed: int = 0) -> Estimate:
    """A ratio of two means over documents, with the ratio of each resample's."""
    sources = over["source"].values
    above, below = (resampled_means(each.values, sources, seed=seed) for each in (over, under))
    with np.errstate(invalid="ignore", divide="ignore"):
        return Estimate(over.values.mean(0) / under.values.mean(0), *interval(above / below))


def loop_cka(diagnosis: Diagnosis, *, seed: int = 0) -> Estimate:
    """Debiased linear CKA of the states N(Y) of every two loops, 0..R as recorded: [loop, loop].

    The HSIC terms are averaged over documents before their ratio is taken, in each resample anew. 1 for a loop and
    itself; 0 in the mean for unrelated states. NaN where a loop's own HSIC is not positive.

    Raises:
        DiagnosisError: The diagnosis holds no `hsic`.
    """
    diagnosis.require("hsic")
    terms = diagnosis.data["hsic"].dropna("document", how="all")
    draws = resampled_means(terms.values, terms["source"].values, seed=seed)
    pooled, drawn = (cka(torch.from_numpy(array)).numpy() for array in (terms.values.mean(0), draws))
    return Estimate(pooled, *interval(drawn))


@dataclass(frozen=True)
class ExitRule:
    """What a rule for leaving token by token gives at each of its thresholds.

    Attributes:
        name: As in `measures.exit_rules.RULES`, or "oracle", which has one point and no threshold (NaN).
        threshold: What was swept.
        loops: Mean loops that a token takes.
        nll: NLL at the exits taken, in nats per token.
        excess: That over the NLL after the last loop, document by document, so that its interval is that of a pair.
        utility: -NLL - price * (loops - 1), in nats per token.
        usual: Index of the threshold that the rule is published with; None where there is none, and where loops were
            left out, since it is one for changes from loop to loop.
        chosen: Index of the threshold of greatest utility on the `fit` documents, of which nothing is reported.
    """

    name: str
    threshold: Float[np.ndarray, " setting"]
    loops: Estimate
    nll: Estimate
    excess: Estimate
    utility: Estimate
    usual: int | None
    chosen: int


@dataclass(frozen=True)
class TradeOff:
    """Exit rules beside running the same number of loops for every token.

    Attributes:
        rules: Those that the model can follow.
        oracle: Takes each token's best exit: no rule can have a lower NLL.
        always: `excess` when every token takes so many loops: 0 at the last.
        price: Nats per token and loop, behind utilities and choices.
    """

    rules: tuple[ExitRule, ...]
    oracle: ExitRule
    always: ByLoop
    price: float


def exit_trade_off(diagnosis: Diagnosis, price: float = 0.01, *, seed: int = 0) -> TradeOff:
    """Loops that a token takes against the NLL it gets, for every rule and threshold.

    Thresholds are chosen on the `fit` documents and reported on the others.

    Args:
        diagnosis: With the group `exit_rules`.
        price: Nats per token that an extra loop must bring, >= 0.
        seed: Of the bootstrap.

    Raises:
        DiagnosisError: Exit rules were not measured.
    """
    diagnosis.require("nll_exit", "exit_rule_loops", "exit_rule_nll", "exit_rule_loops_fit", "exit_rule_nll_fit")
    data = diagnosis.data
    last = data["nll_exit"].isel(loop=-1, drop=True)

    def sweep(name: str) -> ExitRule:
        of_rule = data.sel(rule=name)
        of_rule = of_rule.isel(setting=of_rule["exit_rule_nll"].notnull().any("document").values)
        loops, nll = of_rule["exit_rule_loops"], of_rule["exit_rule_nll"]
        fit = -of_rule["exit_rule_nll_fit"] - price * (of_rule["exit_rule_loops_fit"] - 1)
        threshold = of_rule["exit_rule_threshold"].values
        usual = RULES[name].usual if name in RULES and len(diagnosis.loops) == diagnosis.loops[-1] else None
        return ExitRule(
            name=name,
            threshold=threshold,
            loops=estimate(loops, seed=seed),
            nll=estimate(nll, seed=seed),
            excess=estimate(nll - last, seed=seed),
            utility=estimate(-nll - price * (loops - 1), seed=seed),
            usual=None if usual is None else int(np.flatnonzero(threshold == usual)[0]),
            chosen=int(fit.argmax("setting")),
        )

    followed = data["exit_rule_nll"].notnull().any(("document", "setting"))
    names = [str(name) for name in data["rule"].values[followed.values] if name != ORACLE]
    always = by_loop(Diagnosis((data[["nll_exit"]] - last).assign_attrs(data.attrs)), "nll_exit", seed=seed)
    return TradeOff(tuple(sweep(name) for name in names), sweep(ORACLE), always, price)
