"""What the families of `benchmarks/families.py` say, as docs/findings.md and its figures.

    python benchmarks/findings.py

Every number and every verdict of the page is made here from benchmarks/sweeps; sweeps that are not trained yet, or in
part, are said to be missing. Those of the backtest's unseen half are not read before its rule is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import xarray as xr
from backtest import (
    AIM_HITS,
    AIM_REGRET,
    CHOSEN,
    FAMILY_COLUMNS,
    HALVES,
    Refused,
    backtest,
    calibration_rows,
    chosen_rule,
    family_rows,
    incomplete,
    text,
    why_no_interval,
)
from families import FAMILIES, LOOPS, SWEEPS
from scipy.stats import spearmanr

from loopdiag import plots
from loopdiag.bootstrap import interval, resampled_means, student_interval
from loopdiag.diagnosis import Diagnosis
from loopdiag.errors import InputError
from loopdiag.files import whole
from loopdiag.gaincost import decompose, recommend_training
from loopdiag.gaincost.measured import CLAIM
from loopdiag.gaincost.rule import FEWEST_SOURCES, PRICE
from loopdiag.gaincost.scaling import exponent_of
from loopdiag.losses import SweepLosses
from loopdiag.sweep.tasks import TASKS

ROOT = SWEEPS.parents[1]
PAGE, FIGURES = ROOT / "docs" / "findings.md", ROOT / "figures" / "sweeps"
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the training tokens
FEWEST_RANKED = 3  # models; a rank correlation of two is 1 or -1 whatever they are
SIZES = ("code", "code-narrow")  # of one text and budget
COUNTS = ", ".join(map(str, LOOPS))
CHANGES = list(combinations(LOOPS[1:], 2))  # of a tax
# Numbers of one checkpoint that might track the tax: measure, and which loops.
TRACKERS = {
    "cost of the last loop": ("cost", "last"),
    "cost of all loops from 2 on": ("cost", "sum"),
    "cost over gain of the last loop": ("cost/gain", "last"),
    "withheld before the last loop": ("withheld", "last"),
    "Omega before the last loop": ("omega", "last"),
    "Omega over the carry's norm": ("omega_relative", "last"),
}
PLACEBO = "the loop count alone"  # measures nothing: whatever grows with loops tracks as well


@dataclass(frozen=True)
class Spread:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def sign(self) -> int:
        """1 above 0, -1 below 0, 0 where the interval holds 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def spread(values: xr.DataArray) -> Spread:
    """Of values by seed and document: over seeds where there are three, else over documents."""
    array = values.transpose("seed", "document").values
    if len(array) >= CLAIM:
        low, high = student_interval(array.mean(1))
    else:
        low, high = interval(resampled_means(array.mean(0), values["source"].values))
    return Spread(float(array.mean()), float(low), float(high))


def trained(*, unseen: bool) -> dict[str, SweepLosses]:
    """The sweeps that are there, by name; those of the unseen half when it may be looked at."""
    shown = HALVES if unseen else HALVES[:1]
    files = {family.name: SWEEPS / family.name / "sweep.nc" for family in FAMILIES if family.half in shown}
    return {name: SweepLosses.load(file) for name, file in files.items() if file.is_file()}


def why_held_back() -> str:
    """Why the unseen half is not shown; empty where it is."""
    try:
        chosen_rule(PRICE)
    except Refused as refused:
        return str(refused).replace(f"{ROOT}/", "")
    return ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows))


def trainings(seeds: int) -> str:
    """How many trainings of each model a row rests on."""
    return "one training" if seeds == 1 else f"{seeds} trainings"


def rows_of(count: int) -> str:
    """So many rows."""
    return f"{count} row" + ("s" if count != 1 else "")


def claimed(counted: int, left_out: int) -> str:
    """Which rows a verdict is made from."""
    others = (
        f" {rows_of(left_out)} of fewer trainings {'is' if left_out == 1 else 'are'} shown, but not counted: another "
        "training might say otherwise."
        if left_out
        else ""
    )
    if not counted:
        return f"Nothing is claimed yet: no row has {CLAIM} trainings of each model.{others}"
    return f"Counted: {rows_of(counted)} with {CLAIM} trainings of each model or more.{others}"


def by_memory(
    sweeps: dict[str, SweepLosses], memories: Sequence[str] | None = None
) -> Iterator[tuple[str, str, xr.Dataset]]:
    """Every sweep and memory, with the losses of the seeds that have all its models, where there is such a seed.

    Args:
        sweeps: By name.
        memories: When given, seeds must have the models of all of these, and each sweep comes once.
    """
    for name, losses in sweeps.items():
        for memory in [list(memories)] if memories else losses.data["memory"].values:
            try:
                data = losses.data.sel(memory=memory, offset=[1, 0], loops=list(LOOPS))
            except KeyError:  # a sweep that has no such models
                continue
            nll = data["nll"].transpose("seed", ...).values
            data = data.isel(seed=np.flatnonzero(np.isfinite(nll).reshape(len(nll), -1).all(1)))
            if data.sizes["seed"]:
                yield name, str(memory), data


def tax_of(data: xr.Dataset, name: str = "nll") -> xr.DataArray:
    """What the offset costs."""
    return (data[name].sel(offset=1) - data[name].sel(offset=0)).astype(float)


def of_the_tax(sweeps: dict[str, SweepLosses]) -> str:
    """Question 1."""
    rows, signs, moved, left_out = [], [], [], 0
    for name, memory, data in by_memory(sweeps):
        tax, seeds = tax_of(data), data.sizes["seed"]
        taxes = [spread(tax.sel(loops=count)) for count in LOOPS[1:]]
        changes = [spread(tax.sel(loops=more) - tax.sel(loops=fewer)) for fewer, more in CHANGES]
        if seeds >= CLAIM:
            signs += [each.sign for each in taxes]
            moved.append([each.sign for each in changes])
        else:
            left_out += 1
        rows.append((name, memory, trainings(seeds), *map(str, taxes), *map(str, changes)))
    if not rows:
        return "No sweep has all models of a seed yet."
    said = [
        "The tax of a loop count is the loss of the model that was trained with the offset less that of the model "
        "trained without; below 0 the offset helps.",
        claimed(len(moved), left_out),
    ]
    if moved:
        told = sum(any(changes) for changes in moved)
        said += [
            f"Of their {len(signs)} taxes {signs.count(1)} are above 0, {signs.count(-1)} below, and {signs.count(0)} "
            "cannot be told from it (intervals one by one).",
            f"A change of the tax between two loop counts is told from 0 in {told} of {rows_of(len(moved))}: "
            + ("there the tax is not constant." if told else "a constant tax is not ruled out."),
        ]
    heading = (
        *("trained on", "memory", "from", *(f"tax({count})" for count in LOOPS[1:])),
        *(f"tax({more}) - tax({fewer})" for fewer, more in CHANGES),
    )
    return f"{' '.join(said)}\n\n{table(heading, rows)}\n\n### Over training\n\n{of_the_tax_over_training(sweeps)}"


def of_the_tax_over_training(sweeps: dict[str, SweepLosses]) -> str:
    """Question 1: how the tax moves with tokens seen."""
    rows, moved = [], []
    for name, memory, data in by_memory(sweeps):
        if data.sizes["seed"] < CLAIM:
            continue
        tax, tokens = tax_of(data, "nll_look"), data["look"].values
        looks = sorted({int(abs(tokens - share * tokens[-1]).argmin()) for share in SHARES})
        for look in looks:
            taxes = [str(spread(tax.isel(look=look).sel(loops=count))) for count in LOOPS[1:]]
            seen = f"{tokens[look] / 1e6:.3g}M ({tokens[look] / tokens[-1]:.0%})"
            rows.append((name, memory, seen, *taxes))
        changes = [spread((tax.isel(look=-1) - tax.isel(look=looks[0])).sel(loops=count)) for count in LOOPS[1:]]
        moved += [each.sign for each in changes]
        rows.append((name, memory, "change, first to last", *map(str, changes)))
    if not rows:
        return f"No sweep has {CLAIM} trainings of each model yet."
    heading = ("trained on", "memory", "tokens seen", *(f"tax({count})" for count in LOOPS[1:]))
    return (
        f"Of {len(moved)} taxes, from the first of these looks to the last {moved.count(1)} rise, {moved.count(-1)} "
        f"fall, and {moved.count(0)} cannot be told to move (intervals over trainings). Each model was trained once, "
        "with a learning rate that falls to its end at the full budget: an earlier look is not what a shorter training "
        f"would have given.\n\n{table(heading, rows)}"
    )


def of_the_best(sweeps: dict[str, SweepLosses]) -> str:
    """Question 2."""
    rows, moves, few = [], [], 0
    for name, memory, data in by_memory(sweeps):
        nll = {offset: data["nll"].sel(offset=offset).astype(float) for offset in (1, 0)}
        losses = {offset: each.mean(("seed", "document")) for offset, each in nll.items()}
        on, off = (LOOPS[int(losses[offset].argmin("loops"))] for offset in (1, 0))
        # What each wiring loses where it is trained with the other one's best count.
        lost = [
            spread(nll[1].sel(loops=off) - nll[1].sel(loops=on)),
            spread(nll[0].sel(loops=on) - nll[0].sel(loops=off)),
        ]
        if data.sizes["seed"] >= CLAIM:
            moves.append((on, off, all(each.sign > 0 for each in lost)))
        else:
            few += 1
        whole_sweep = SweepLosses(data.expand_dims("memory"))
        picks = []
        for offset in (1, 0):
            answer = recommend_training(whole_sweep, PRICE, offset=offset, memory=memory)
            doubt = "" if answer.recommended_loops else ", undetermined"
            picks.append(f"{answer.pick} ({answer.support[answer.pick]:.0%}{doubt})")
        told = [" / ".join(f"{value:.3f}" for value in losses[offset].values) for offset in (1, 0)]
        apart = [str(each) if on != off else "-" for each in lost]
        rows.append((name, memory, trainings(data.sizes["seed"]), *told, str(on), str(off), *apart, *picks))
    if not rows:
        return "No sweep has all models of a seed yet."
    said = [
        "The best loop count is that of least held-out loss. Where it differs, the offset moves it for certain only if "
        "each wiring loses something with the other one's best count.",
        claimed(len(moves), few),
    ]
    if moves:
        differing = [move for move in moves if move[0] != move[1]]
        sure = [move for move in differing if move[2]]
        said.append(
            f"Of these the best count is the same with the offset and without in {len(moves) - len(differing)}, and "
            f"differs in {len(differing)}, of which {len(sure)} can be told: without the offset it is higher in "
            f"{sum(off > on for on, off, _ in sure)}, lower in {sum(off < on for on, off, _ in sure)}."
        )
    said.append(
        f"Recommended is what `loopdiag recommend` says at a price of {PRICE:g} nats per token for each loop beyond "
        "the first, with the share of redrawn documents and trainings that give the same answer: it takes fewer loops "
        "where more cannot be told to be worth their price."
    )
    heading = (
        *("trained on", "memory", "from", f"loss with offset ({COUNTS} loops)", f"loss without ({COUNTS} loops)"),
        *("best with", "best without", "lost with the offset at the other's best", "lost without"),
        *("recommended with", "recommended without"),
    )
    return f"{' '.join(said)}\n\n{table(heading, rows)}"


@dataclass(frozen=True)
class Tracked:
    """Models with the offset, whose measured tax a number of each might track.

    Attributes:
        sweep, data, memory, loops: Of each model: sweep, what it was trained on, memory, loop count.
        tax: Measured.
        numbers: By tracker, NaN where it was not measured.
    """

    sweep: list[str]
    data: list[str]
    memory: list[str]
    loops: list[int]
    tax: list[float]
    numbers: dict[str, list[float]]


def tracked(sweeps: dict[str, SweepLosses]) -> Tracked:
    """Every model with the offset that has a diagnosis, and a twin without."""
    found = Tracked([], [], [], [], [], {name: [] for name in (*TRACKERS, PLACEBO)})
    on_what = {family.name: family.data for family in FAMILIES}
    for name, losses in sweeps.items():
        data = losses.data
        if not {0, 1} <= set(data["offset"].values.tolist()):
            continue
        tax = tax_of(data).mean("document", skipna=False)
        for memory in map(str, data["memory"].values):
            for seed in data["seed"].values:
                for loops in data["loops"].values[1:]:
                    file = SWEEPS / name / "diagnoses" / f"loops{loops}-offset1-{memory}-seed{seed}.nc"
                    value = float(tax.sel(memory=memory, seed=seed, loops=loops))
                    if not file.is_file() or not np.isfinite(value):
                        continue
                    measured = Diagnosis.load(file).data
                    found.sweep.append(name)
                    found.data.append(on_what[name])
                    found.memory.append(memory)
                    found.loops.append(int(loops))
                    found.tax.append(value)
                    found.numbers[PLACEBO].append(float(loops))
                    for tracker, (measure, which) in TRACKERS.items():
                        found.numbers[tracker].append(_number(measured, measure, which))
    return found


def _number(measured: xr.Dataset, measure: str, which: str) -> float:
    names = measure.split("/")
    if not set(names) <= set(measured):
        return np.nan
    curves = [measured[name].mean([dim for dim in measured[name].dims if dim != "loop"]).values[2:] for name in names]
    curve = curves[0] / curves[1] if len(curves) > 1 else curves[0]
    return float(curve[-1] if which == "last" else curve.sum())


@dataclass(frozen=True)
class Correlated:
    """A rank correlation within groups of models.

    Attributes:
        mean: Over data sets, of the means of their groups.
        low, high: 95 %, t over data sets; NaN where they are too few to tell.
        groups: How many.
        data_sets: How many.
    """

    mean: float
    low: float
    high: float
    groups: int
    data_sets: int

    @property
    def clear(self) -> bool:
        """Told from 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        between = "" if np.isnan(self.low) else f" ({self.low:+.2f} to {self.high:+.2f})"
        return f"{self.mean:+.2f}{between}, {self.groups} of {self.data_sets}"


def correlated(found: Tracked, tracker: str, *, same_loops: bool) -> Correlated | None:
    """The rank correlation of a number of one checkpoint with its measured tax, among the models of a sweep and memory.

    Args:
        found: The models.
        tracker: The number.
        same_loops: Among models of the same loop count, which differ in their seed alone.

    Returns:
        None where no group has enough models with both.
    """
    x, y = np.array(found.numbers[tracker]), np.array(found.tax)
    keys = list(zip(found.sweep, found.memory, found.loops if same_loops else [0] * len(x), strict=True))
    of_data: dict[str, list[float]] = {}
    for key, data in dict(zip(keys, found.data, strict=True)).items():
        group = [place for place, other in enumerate(keys) if other == key and np.isfinite(x[place])]
        if len(group) >= FEWEST_RANKED and len({*x[group]}) > 1 and len({*y[group]}) > 1:
            of_data.setdefault(data, []).append(float(spearmanr(x[group], y[group]).statistic))
    if not of_data:
        return None
    means = np.array([np.mean(values) for values in of_data.values()])
    low, high = student_interval(means) if len(means) >= FEWEST_SOURCES else (np.nan, np.nan)
    return Correlated(float(means.mean()), float(low), float(high), sum(map(len, of_data.values())), len(means))


def of_the_trackers(sweeps: dict[str, SweepLosses]) -> str:
    """Question 3."""
    models = tracked(sweeps)
    over_all = {name: correlated(models, name, same_loops=False) for name in models.numbers}
    alike = {name: correlated(models, name, same_loops=True) for name in models.numbers}
    rows = [
        (name, str(over_all[name] or "-"), str(alike[name] or "-"))
        for name in models.numbers
        if over_all[name] or alike[name]
    ]
    if not rows:
        return f"No sweep has {FEWEST_RANKED} models with the offset, their diagnoses and their twins without it yet."
    clear = [name for name, each in alike.items() if each and each.clear]
    data_sets = max((each.data_sets for each in alike.values() if each), default=0)
    said = (
        "Rank correlation of a number of one checkpoint, trained with the offset, with its measured tax, over the "
        "models of a sweep and memory: all of them, and those of the same loop count, which differ in their seed "
        f"alone. Means over data sets; behind them how many groups, of how many data sets. Over all models {PLACEBO} "
        "may track, too, so only a number that tracks among models of the same count says something of the tax "
        "itself. "
    )
    if data_sets < FEWEST_SOURCES:
        said += f"Nothing is claimed: data sets are {data_sets}, fewer than {FEWEST_SOURCES}."
    else:
        said += f"Told from 0 there, over {data_sets} data sets: {', '.join(clear) or 'none of them'}."
    return f"{said}\n\n{table(('number of one checkpoint', 'all models', 'same loop count'), rows)}"


def of_the_limits(sweeps: dict[str, SweepLosses]) -> str:
    """Question 4."""
    rows, signs, left_out = [], [], 0
    for name, _, data in by_memory(sweeps, ("first", "own")):
        later = data["nll"].sel(loops=LOOPS[0]) - data["nll"].sel(loops=LOOPS[-1])
        cells = {
            (memory, offset): later.sel(memory=memory, offset=offset)
            for memory in ("first", "own")
            for offset in (1, 0)
        }
        without_offset = cells["first", 0] - cells["first", 1]
        own_memory = cells["own", 1] - cells["first", 1]
        effects = [spread(each) for each in (without_offset, own_memory, without_offset - own_memory)]
        if data.sizes["seed"] >= CLAIM:
            signs.append([each.sign for each in effects])
        else:
            left_out += 1
        cells_told = (str(spread(each)) for each in cells.values())
        rows.append((name, trainings(data.sizes["seed"]), *cells_told, *map(str, effects)))
    if not rows:
        return "No sweep with both memories has all models of a seed yet."
    said = [
        f"What loops {LOOPS[1]} to {LOOPS[-1]} bring, L({LOOPS[0]}) - L({LOOPS[-1]}), for each wiring, and how much "
        "more they bring when the offset is taken away, or when each loop has keys and values of its own instead of "
        "the first loop's. The model with one loop is the same in all of them.",
        claimed(len(signs), left_out),
    ]
    if signs:
        offset, memory, difference = (np.array(signs)[:, place] for place in range(3))
        said.append(
            f"Of these, later loops bring more without the offset in {sum(offset > 0)} (less in {sum(offset < 0)}), "
            f"and more with a memory of their own in {sum(memory > 0)} (less in {sum(memory < 0)}); the offset limits "
            f"them more than the shared memory in {sum(difference > 0)}, less in {sum(difference < 0)}, and which one "
            f"does cannot be told in {sum(difference == 0)}."
        )
    heading = (
        *("trained on", "from", "shared, offset", "shared, no offset", "own, offset", "own, no offset"),
        *("taking the offset away", "own memory", "difference of both"),
    )
    return f"{' '.join(said)}\n\n{table(heading, rows)}"


def of_the_rules(*, unseen: bool) -> str:
    """Question 5."""
    try:
        told = backtest(PRICE, unseen=unseen)
    except Refused as refused:
        return str(refused).replace(f"{ROOT}/", "")
    chosen, mark = told["chosen"], "chosen" if told["final"] else "least regret so far"
    parts = [
        "A rule sees one checkpoint of a family, the one with most loops, and predicts how many loops to train with. "
        f"Regret is what its prediction loses against the best measured count, at a price of {PRICE:g} nats per token "
        "and loop; it hits when it is within one standard error of the best."
    ]
    scored = {row["rule"]: row for row in told["scores"].get("unseen", [])}
    if scored:
        best = min(scored.values(), key=lambda row: row["regret"])
        parts.append(
            f"The rule chosen on the half `choose` is **{chosen}**. On the unseen half its regret is "
            f"{text(scored[chosen], 'regret', '.4f')} (aim: below {AIM_REGRET:g}), its hits "
            f"{text(scored[chosen], 'hits', '.0%')} (aim: {AIM_HITS:.0%}); the least regret there has {best['rule']}, "
            f"with {best['regret']:.4f}."
        )
    elif CHOSEN.is_file():
        parts.append("A rule is chosen. It is scored when the unseen half is completely trained.")
    else:
        parts.append(
            f"No rule is chosen yet; **{chosen}** has the least regret so far on the half to choose on, which says "
            "nothing of how it does on others."
        )
    if told["leave_one_out"] and not told["final"]:
        others = "; ".join(f"without {left} {rule}" for left, rule in told["leave_one_out"].items())
        parts.append(f"Of least regret with one data set left out: {others}.")
    if told["diverged"]:
        parts.append(f"Left out, since a training diverged: {'; '.join(told['diverged'])}.")
    if told["incomplete"]:
        parts.append(f"Scored in part, since not completely trained: {', '.join(told['incomplete'])}.")
    for half, scores in told["scores"].items():
        rows = [
            (
                row["rule"] + (f" ({mark})" if row["rule"] == chosen else ""),
                text(row, "regret", ".4f"),
                text(row, "hits", ".0%"),
            )
            for row in sorted(scores, key=lambda row: row["regret"])
        ]
        intervals = why_no_interval(scores) or "Intervals are over data sets (t)."
        floor, families = told["floor"][half], told["families"][half]
        few = sum(family["seeds"] < CLAIM for family in families)
        rivals = [f"{row['baseline']} {text(row, 'difference', '+.4f')}" for row in told["against"][half]]
        heading = ("rule", "mean regret, nats per token", "within one standard error of the best")
        calibrated = told["calibration"][half]
        parts += [
            f"### Half `{half}`: {scores[0]['families']} families, data sets: {scores[0]['data_sets']}",
            intervals,
            table(heading, rows),
            f"Regret of **{chosen}** less that of: {', '.join(rivals)}. In {few} of {len(families)} families, of fewer "
            f"than {CLAIM} trainings, the standard error is over documents alone, and hits are stricter."
            + (f" An oracle that knows the other trainings has a regret of {floor:.4f}." if floor is not None else ""),
            f"Is **{chosen}** as sure as it is right? Its support is the share of resamples of a checkpoint's "
            "documents that give the same prediction. Support less hits, mean over data sets: "
            f"{text(calibrated, 'support_less_hits', '+.0%')} (above 0: too sure).",
            table(("support", "checkpoints", "mean support", "hits"), calibration_rows(calibrated)),
            f"Where **{chosen}** loses:",
            table(FAMILY_COLUMNS, family_rows(told["families"][half])),
        ]
    return "\n\n".join(parts)


def of_the_exponent(sweeps: dict[str, SweepLosses]) -> str:
    """What a loop is worth in parameters."""
    about = "phi of L = E + A (N_once + r^phi N_rec)^-a (arXiv 2604.21106), from models of two sizes on the same text:"
    missing = [name for name in SIZES if name not in sweeps]
    if missing:
        return f"{about} not told yet, {' and '.join(missing)} not being trained."
    lines = []
    for offset, name in ((1, "with the offset"), (0, "without")):
        try:
            said = exponent_of([sweeps[size] for size in SIZES], offset=offset, memory="first").verdict
        except InputError as error:
            said = str(error)
        lines.append(f"- {name}: {said}")
    return about + "\n\n" + "\n".join(lines)


def of_the_training(sweeps: dict[str, SweepLosses]) -> str:
    """Which learning rates were used, and why."""
    used, searched = [], []
    for name, losses in sweeps.items():
        data = losses.data
        rates = " / ".join("-" if np.isnan(rate) else f"{rate:g}" for rate in data["learning_rate"].values)
        task = TASKS.get(losses.provenance["data"])
        least = f"{float(data['nll'].mean('document', skipna=False).min()):.3f}"
        floor = f"{task.floor:.3f}" if task else "-"
        used.append((name, f"{losses.provenance['recipe']['tokens']:,}", rates, least, floor))
        if "search_nll" in data:
            nll = data["search_nll"].transpose("rate", "loops", ...).values
            there = (
                data["search_nll"].sel(loops=list(LOOPS[1:])).notnull().any(("rate", "loops"))
            )  # one is in all wirings
            wirings = f"{int(there.sum())} of {there.size}"
            tokens = f"{losses.provenance['search_tokens']:,}"
            for rate, row in zip(data["rate"].values, nll.reshape(*nll.shape[:2], -1), strict=True):
                # The mean over wirings, of which those that diverged make it infinite.
                means = [each[~np.isnan(each)].mean() if not np.isnan(each).all() else np.nan for each in row]
                told = ["-" if np.isnan(mean) else f"{mean:.3f}" if np.isfinite(mean) else "diverged" for mean in means]
                searched.append((name, tokens, wirings, f"{rate:g}", " / ".join(told)))
    if not used:
        return "No sweep is trained yet."
    parts = [
        "One peak learning rate serves all offsets and memories of a loop count. It may suit one of them better: a "
        "tax is that at this rate, not at the best rate of each.",
        table(
            ("trained on", "tokens of each model", f"rate ({COUNTS} loops)", "least loss of a model", "possible"), used
        ),
    ]
    if searched:
        heading = ("trained on", "tokens", "wirings", "rate", f"loss ({COUNTS} loops)")
        parts += [
            "Rates were chosen by short trainings at each, on documents other than those that the losses above are of. "
            "Where the chosen rate is the first or last of those tried, a better one may lie beyond; and a rate that "
            "is best early need not be best at the full budget. What they lost, means over the wirings searched:",
            table(heading, searched),
        ]
    return "\n\n".join(parts)


def page() -> str:
    """docs/findings.md."""
    held_back = why_held_back()
    unseen = not held_back
    sweeps = trained(unseen=unseen)
    missing = [said for half in (HALVES if unseen else HALVES[:1]) for said in incomplete(half)]
    parts = [
        "# What matched sweeps found",
        "Small looped models were trained that differ in nothing but the number of loops, the offset (a loop reads "
        "what the loop before left one position earlier) and the memory (whose keys and values later loops read: those "
        "of the `first` loop, shared, or their `own`). `python benchmarks/families.py` trains them, `make findings` "
        "writes this page from what they measured; no number or verdict is typed in.",
        "L is held-out loss, in nats per token; L(2) is that of models trained with two loops. Brackets hold 95 % "
        f"intervals: over trainings (t) in rows of {CLAIM} trainings or more, for these documents; else over "
        "documents (bootstrap), which leaves out what another training would give. Verdicts count rows of "
        f"{CLAIM} trainings or more; those of one text are not independent of each other.",
        f"**Not trained yet**: {', '.join(missing)}." if missing else "All sweeps that are shown are complete.",
    ]
    if held_back:
        names = ", ".join(family.name for family in FAMILIES if family.half == "unseen")
        parts.append(f"**Held back** for the score of question 5, trained or not: {names or 'none'}. {held_back}")
    parts.append("## 1. Is there an offset tax, how large, and is it constant?\n\n" + of_the_tax(sweeps))
    if "code" in sweeps:
        parts.append("![Losses and taxes over training](../figures/sweeps/code/losses_over_training.png)")
    parts += [
        f"![Gain, rise of the tax and net of each loop: {name}](../figures/sweeps/{name}/measured_gain_cost.png)"
        for name in sweeps
    ]
    parts += [
        "## 2. Does taking the offset away move the best loop count?\n\n" + of_the_best(sweeps),
        "## 3. Which number of one checkpoint tracks the tax?\n\n" + of_the_trackers(sweeps),
        "## 4. Shared memory or offset: which one limits later loops?\n\n" + of_the_limits(sweeps),
        "## 5. Which rule predicts the best loop count to train with?\n\n" + of_the_rules(unseen=unseen),
        "## What is a loop worth in parameters?\n\n" + of_the_exponent(sweeps),
        "## How they were trained\n\n" + of_the_training(sweeps),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page and draw the figures."""
    for name, losses in trained(unseen=not why_held_back()).items():
        decompose(losses)  # a sweep that cannot be read fails here, before anything is written
        plots.draw_sweep(losses, FIGURES / name)
    with whole(PAGE) as partial:
        partial.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
