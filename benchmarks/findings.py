"""What the families of `benchmarks/families.py` say, as docs/findings.md and its figures.

    python benchmarks/findings.py

Every number and every verdict of the page is made here from benchmarks/sweeps; sweeps that are not trained yet, or in
part, are said to be missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from backtest import AIM_HITS, AIM_REGRET, backtest
from families import FAMILIES, SWEEPS
from scipy.stats import spearmanr

from loopdiag import plots
from loopdiag.bootstrap import interval, resampled_means, student_interval
from loopdiag.diagnosis import Diagnosis
from loopdiag.files import whole
from loopdiag.gaincost import decompose, recommend_training
from loopdiag.gaincost.measured import CLAIM
from loopdiag.gaincost.rule import PRICE
from loopdiag.losses import SweepError, SweepLosses

ROOT = Path(__file__).parents[1]
PAGE, FIGURES = ROOT / "docs" / "findings.md", ROOT / "figures" / "sweeps"
DRAWS = 2000
# Numbers of one checkpoint that might track the tax: measure, and which loops.
TRACKERS = {
    "cost of the last loop": ("cost", "last"),
    "cost of all loops from 2 on": ("cost", "sum"),
    "cost over gain of the last loop": ("cost/gain", "last"),
    "withheld before the last loop": ("withheld", "last"),
    "Omega before the last loop": ("omega", "last"),
    "Omega over the carry's norm": ("omega_relative", "last"),
}


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
    """Of values by seed and document: over seeds where there are three, else over documents; missing seeds left out."""
    array = values.transpose("seed", "document").values
    array = array[np.isfinite(array).all(1)]
    if not len(array):
        return Spread(np.nan, np.nan, np.nan)
    if len(array) >= CLAIM:
        low, high = student_interval(array.mean(1))
    else:
        low, high = interval(resampled_means(array.mean(0), values["source"].values))
    return Spread(float(array.mean()), float(low), float(high))


def trained() -> dict[str, SweepLosses]:
    """The sweeps that are there, by name."""
    files = {family.name: SWEEPS / family.name / "sweep.nc" for family in FAMILIES}
    return {name: SweepLosses.load(file) for name, file in files.items() if file.is_file()}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows))


def by_memory(sweeps: dict[str, SweepLosses]) -> Iterator[tuple[str, str, xr.Dataset]]:
    """Every sweep and memory, with its losses."""
    for name, losses in sweeps.items():
        for memory in losses.data["memory"].values:
            yield name, str(memory), losses.data.sel(memory=memory)


def of_the_tax(sweeps: dict[str, SweepLosses]) -> str:
    """Question 1."""
    rows, signs, moved = [], [], []
    for name, memory, data in by_memory(sweeps):
        tax = data["nll"].sel(offset=1) - data["nll"].sel(offset=0)
        loops = [int(count) for count in data["loops"].values if count > 1]
        taxes = [spread(tax.sel(loops=count)) for count in loops]
        change = spread(tax.sel(loops=loops[-1]) - tax.sel(loops=loops[0]))
        if np.isnan(change.mean):
            continue
        signs += [each.sign for each in taxes]
        moved.append(change.sign)
        seeds = int(np.isfinite(tax.values).all(tuple(range(1, tax.ndim))).sum()) if tax.dims[0] == "seed" else 1
        rows.append((name, memory, str(seeds), *map(str, taxes), str(change)))
    heading = ("trained on", "memory", "seeds", "tax(2)", "tax(3)", "tax(4)", "tax(4) - tax(2)")
    said = (
        f"Of {len(signs)} taxes, {signs.count(1)} are above 0, {signs.count(-1)} below, and {signs.count(0)} cannot be "
        f"told from it. From two loops to four the tax rises in {moved.count(1)} of {len(moved)} rows, falls in "
        f"{moved.count(-1)}, and cannot be told to change in {moved.count(0)}: "
        + ("it is not a constant of the loop." if moved.count(0) < len(moved) else "a constant is not ruled out.")
    )
    return f"{said}\n\n{table(heading, rows)}"


def of_the_best(sweeps: dict[str, SweepLosses]) -> str:
    """Question 2."""
    rows, moves = [], []
    for name, losses in sweeps.items():
        for memory in losses.data["memory"].values:
            try:
                on, off = (recommend_training(losses, PRICE, offset=each, memory=str(memory)) for each in (1, 0))
            except SweepError:
                continue
            moves.append((on.pick, off.pick))
            rows.append(
                (
                    *(name, str(memory), str(on.seeds)),
                    *(
                        text
                        for answer in (on, off)
                        for text in (
                            " / ".join(f"{value:.3f}" for value in answer.nll.mean),
                            f"{answer.pick} ({answer.support[answer.pick]:.0%})"
                            + ("" if answer.recommended_loops else ", undetermined"),
                        )
                    ),
                )
            )
    heading = ("trained on", "memory", "seeds", "loss with offset", "best (support)", "loss without", "best (support)")
    more, fewer = sum(off > on for on, off in moves), sum(off < on for on, off in moves)
    said = (
        f"Without the offset the best loop count is higher in {more} of {len(moves)} rows, lower in {fewer}, and the "
        f"same in {len(moves) - more - fewer} (price {PRICE:g} nats per token and loop; losses for 1, 2, 3, 4 loops)."
    )
    return f"{said}\n\n{table(heading, rows)}"


def of_the_trackers(sweeps: dict[str, SweepLosses]) -> str:
    """Question 3."""
    taxes: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in TRACKERS}
    sources: list[str] = []
    for name, memory, data in by_memory(sweeps):
        for seed in data["seed"].values:
            for loops in data["loops"].values[1:]:
                file = SWEEPS / name / "diagnoses" / f"loops{loops}-offset1-{memory}-seed{seed}.nc"
                nll = data["nll"].sel(seed=seed, loops=loops)
                tax = float((nll.sel(offset=1) - nll.sel(offset=0)).mean())
                if not file.is_file() or np.isnan(tax):
                    continue
                measured = Diagnosis.load(file).data
                taxes.append(tax)
                sources.append(name)
                for tracker, (measure, which) in TRACKERS.items():
                    if measure == "cost/gain":
                        curve = measured["cost"].mean("document") / measured["gain"].mean("document")
                    else:
                        curve = measured[measure].mean("document")
                    values = curve.values[2:]
                    found[tracker].append(float(values[-1] if which == "last" else values.sum()))
    if len(taxes) < 5:
        return "Not enough models yet."
    y, names = np.array(taxes), np.array(sources)
    rows, clear = [], []
    for tracker, values in found.items():
        x = np.array(values)
        rho, (low, high) = float(spearmanr(x, y)[0]), _rank_interval(x, y, names)
        inside = [float(spearmanr(x[names == name], y[names == name])[0]) for name in sorted(set(sources))]
        rows.append((tracker, f"{rho:+.2f} ({low:+.2f} to {high:+.2f})", " / ".join(f"{each:+.2f}" for each in inside)))
        clear += [tracker] if low > 0 or high < 0 else []
    said = (
        f"Over {len(y)} models trained with the offset ({', '.join(sorted(set(sources)))}), the rank correlation with "
        f"the measured tax is told from 0 for: {', '.join(clear) or 'none of them'}. Intervals draw whole data sets "
        "and, in them, models; with few data sets they are rough."
    )
    each = "within " + " / ".join(sorted(set(sources)))
    return f"{said}\n\n{table(('number of one checkpoint', 'rank correlation with its tax', each), rows)}"


def _rank_interval(x: np.ndarray, y: np.ndarray, sources: np.ndarray) -> tuple[float, float]:
    random, groups = np.random.default_rng(0), [np.flatnonzero(sources == name) for name in sorted(set(sources))]
    draws = []
    for _ in range(DRAWS):
        drawn = [groups[index] for index in random.integers(len(groups), size=len(groups))]
        places = np.concatenate([random.choice(group, len(group)) for group in drawn])
        if len(set(x[places])) > 1 and len(set(y[places])) > 1:
            draws.append(spearmanr(x[places], y[places])[0])
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def of_the_limits(sweeps: dict[str, SweepLosses]) -> str:
    """Question 4."""
    rows = []
    for name, losses in sweeps.items():
        data = losses.data
        if data.sizes["memory"] < 2:
            continue
        later = data["nll"].sel(loops=data["loops"].values[1]) - data["nll"].sel(loops=data["loops"].values[-1])
        cells = [later.sel(memory=memory, offset=offset) for memory in ("first", "own") for offset in (1, 0)]
        effects = [
            later.sel(memory="first", offset=0) - later.sel(memory="first", offset=1),
            later.sel(memory="own", offset=1) - later.sel(memory="first", offset=1),
        ]
        if all(np.isfinite(spread(each).mean) for each in (*cells, *effects)):
            rows.append((name, *(str(spread(each)) for each in (*cells, *effects))))
    heading = (
        *("trained on", "shared, offset", "shared, no offset", "own, offset", "own, no offset"),
        *("taking the offset away", "own memory"),
    )
    if not rows:
        return "No sweep with both memories is trained yet."
    return (
        "What loops 3 and 4 bring beyond loop 2, L(2) - L(4), for each wiring, and how much more they bring when one "
        f"of the two is taken away.\n\n{table(heading, rows)}"
    )


def of_the_rules() -> str:
    """Question 5."""
    try:
        told = backtest(PRICE)
    except SystemExit:
        return "No family is trained yet."
    parts = []
    for half, scores in told["scores"].items():
        rows = [
            (
                row["rule"] + (" (chosen)" if row["rule"] == told["chosen"] else ""),
                f"{row['regret']:.4f} ({row['regret_low']:.4f} to {row['regret_high']:.4f})",
                f"{row['hits']:.0%} ({row['hits_low']:.0%} to {row['hits_high']:.0%})",
            )
            for row in sorted(scores, key=lambda row: row["regret"])
        ]
        heading = ("rule", "mean regret, nats per token", "within one standard error of the best")
        parts.append(f"Half `{half}`, {scores[0]['families']} families:\n\n{table(heading, rows)}")
    chosen = {row["rule"]: row for row in told["scores"].get("unseen", [])}.get(told["chosen"])
    if chosen:
        best = min(told["scores"]["unseen"], key=lambda row: row["regret"])
        parts.insert(
            0,
            f"The rule chosen on one half is **{told['chosen']}**. On the unseen half its regret is "
            f"{chosen['regret']:.4f} (aim: below {AIM_REGRET:g}), its hits {chosen['hits']:.0%} (aim: {AIM_HITS:.0%}); "
            f"the best there is {best['rule']} with {best['regret']:.4f}.",
        )
    return "\n\n".join(parts)


def page() -> str:
    """docs/findings.md."""
    sweeps = trained()
    missing = []
    for family in FAMILIES:
        places = family.seeds * len(family.memories) * 2 * 4
        nll = sweeps[family.name].data["nll"] if family.name in sweeps else None
        there = 0 if nll is None else int(nll.notnull().all("document").sum())
        if there < places:
            missing.append(f"{family.name} ({there} of {places} places)")
    parts = [
        "# What matched sweeps found",
        "`python benchmarks/families.py` trains the sweeps, `make findings` writes this page from what they measured; "
        "no number or verdict is typed in. Losses are held-out, in nats per token, intervals are 95 %: t intervals over "
        "seeds where there are three, else a bootstrap over documents, which leaves out what another training would "
        "give.",
        "**Not trained yet**: " + ", ".join(missing) + "." if missing else "All sweeps are complete.",
        "## 1. Is there an offset tax, how large, and is it constant?\n\n" + of_the_tax(sweeps),
        "![Losses and taxes over training](../figures/sweeps/code/losses_over_training.png)",
        "## 2. Does taking the offset away move the best loop count?\n\n" + of_the_best(sweeps),
        "## 3. Which number of one checkpoint tracks the tax?\n\n" + of_the_trackers(sweeps),
        "## 4. Shared memory or offset: which one limits later loops?\n\n" + of_the_limits(sweeps),
        "## 5. Which lens predicts the best loop count to train with?\n\n" + of_the_rules(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page and draw the figures."""
    for name, losses in trained().items():
        decompose(losses)  # a sweep that cannot be read fails here, before anything is written
        plots.draw_sweep(losses, FIGURES / name)
    with whole(PAGE) as partial:
        partial.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
