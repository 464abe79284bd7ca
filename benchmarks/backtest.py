"""How well does one checkpoint tell how many loops to train with? Scored against measured families.

    python benchmarks/backtest.py [--price 0.01] [--json FILE]    score every rule on the half to choose on
    python benchmarks/backtest.py --choose                        write the rule chosen there to benchmarks/chosen.json
    python benchmarks/backtest.py --unseen                        once that file is committed: score the other half, too

A family is what `benchmarks/families.py` trained of one data set and size with one offset and memory: a model for each
loop count. The recommender sees the diagnosis of ONE of them, the one with most loops, and predicts how many loops to
train with. The truth is the utility measured on all of them, -loss - price * (loops - 1).

- regret: utility lost by the prediction, in nats per token, 0 at best;
- hit: the prediction is within one standard error of the best count. With three seeds or more the error is over
  documents and seeds, with fewer over documents alone: it is smaller then, and hits are stricter;
- noise floor: the truth itself is noisy, and regret cannot be expected to reach 0. Where families have three seeds or
  more an oracle picks each seed's count from the mean utility of the others; the floor is what it loses on that seed.
  That is the floor of a truth from one training; the floor of a mean of several is lower;
- support: how sure the prediction is, the share of resamples of the checkpoint's documents that give the same one.
  It is calibrated where predictions of 80 % support hit in 80 % of the cases.

Data sets weigh alike in all means: one's own is over its families, a family's over its checkpoints. Intervals are t
intervals over the means of data sets. A seed in which a training diverged is left out, and named.

Which rule is used is chosen on one half of the data sets. The other half is for the score alone: nothing of it is read
before the choice is made, from complete families, and committed, and it is scored when it is completely trained, not
before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from families import FAMILIES, LOOPS, SWEEPS, Family, measured, places
from rich.console import Console
from rich.table import Table

from loopdiag.bootstrap import resampled_means, student_interval
from loopdiag.diagnosis import Diagnosis
from loopdiag.files import whole
from loopdiag.gaincost import recommend
from loopdiag.gaincost.decision import resampled_picks
from loopdiag.gaincost.lenses import LENSES
from loopdiag.gaincost.measured import CLAIM
from loopdiag.gaincost.rule import FEWEST_SOURCES, PRICE
from loopdiag.losses import SweepLosses
from loopdiag.sweep.gathering import cell_file
from loopdiag.sweep.grid import Grid

AIM_REGRET, AIM_HITS = 0.01, 0.80
CHOSEN = Path(__file__).parent / "chosen.json"
HALVES = ("choose", "unseen")
BASELINES = ("always 1", "always 2", "always max", "exit NLL", "paper_rule")
FAMILY_COLUMNS = ("family", "offset", "memory", "best count", "picks by seed", "regret")
RESAMPLES = 200  # of a checkpoint's documents, on each of which every rule is asked
# Bins of support: name, and from where on (the last but one holds 95 % itself).
BINS = (("below 50 %", 0.0), ("50 to 80 %", 0.5), ("80 to 95 %", 0.8), ("above 95 %", np.nextafter(0.95, 1)))


class Refused(Exception):
    """Nothing to score yet, or nothing that may be looked at yet; the message says why."""


@dataclass(frozen=True)
class Case:
    """One checkpoint and the family that it is of.

    Attributes:
        family: Name of the sweep.
        data: What it was trained on, the cluster of the intervals.
        half: Of the backtest.
        offset, memory, seed: Which family, and which checkpoint of it.
        utility: Measured, by loop count.
        error: Standard error of the difference of each from the best, by loop count.
        picks: What each rule predicts.
        support: In which share of resamples of the documents each rule predicts the same; 1 of those that always do.
        floor: What an oracle loses on this seed that knows the others; None where they are too few.
    """

    family: str
    data: str
    half: str
    offset: int
    memory: str
    seed: int
    utility: dict[int, float]
    error: dict[int, float]
    picks: dict[str, int]
    support: dict[str, float]
    floor: float | None = None

    @property
    def of(self) -> tuple[str, int, str]:
        """The family: sweep, offset and memory."""
        return self.family, self.offset, self.memory

    @property
    def best(self) -> int:
        return max(self.utility, key=lambda loops: self.utility[loops])

    def regret(self, rule: str) -> float:
        return self.utility[self.best] - self.utility[self.picks[rule]]

    def hit(self, rule: str) -> bool:
        return self.regret(rule) <= self.error[self.picks[rule]]


# From the lenses' picks and the largest count, which stands where no lens has an opinion, to one prediction.
COMBINATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "lower median of lenses": lambda picks: sorted(picks)[(len(picks) - 1) // 2],
    "upper median of lenses": lambda picks: sorted(picks)[len(picks) // 2],
    "smallest of lenses": min,
    "largest of lenses": max,
    "most frequent of lenses": lambda picks: max(sorted(set(picks)), key=list(picks).count),
}


def from_lenses(lenses: Mapping[str, int], most: int) -> dict[str, int]:
    """What each combination and each lens predicts, where no lens has an opinion `most`."""
    combined = {name: combine(list(lenses.values()) or [most]) for name, combine in COMBINATIONS.items()}
    return combined | {name: lenses.get(name, most) for name in LENSES}


def rules(diagnosis: Diagnosis, price: float) -> tuple[dict[str, int], dict[str, float]]:
    """What each rule predicts from one checkpoint, and with which support."""
    most = int(diagnosis.loops[-1])
    lenses, resampled = resampled_picks(diagnosis, RESAMPLES)
    picks = from_lenses(lenses, most)
    drawn = [from_lenses(some, most) for some in resampled]
    support = {rule: float(np.mean([other[rule] == pick for other in drawn])) for rule, pick in picks.items()}
    exits = recommend(diagnosis, price)
    always = {"always 1": 1, "always 2": 2, "always max": most}
    return (
        picks | {"exit NLL": exits.pick} | always,
        support | {"exit NLL": exits.support[exits.pick]} | dict.fromkeys(always, 1.0),
    )


def trained(half: str) -> Iterator[tuple[Family, SweepLosses]]:
    """The sweeps of a half that have a model."""
    for family in FAMILIES:
        file = SWEEPS / family.name / "sweep.nc"
        if family.half == half and file.is_file():
            yield family, SweepLosses.load(file)


def incomplete(half: str) -> list[str]:
    """The sweeps of a half that are not completely trained, each with how far it is."""
    counted = {family.name: places(family, SWEEPS / family.name) for family in FAMILIES if family.half == half}
    return [f"{name} ({there} of {wanted} places)" for name, (there, wanted) in counted.items() if there < wanted]


def diverged(half: str) -> list[str]:
    """The seeds of a half that have all models of a family, but are left out, since one has no finite loss."""
    found = []
    for family, losses in trained(half):
        finite = np.isfinite(losses.data["nll"]).all(("document", "loops"))
        lost = measured(losses).all("loops") & ~finite
        for memory, offset, seed in product(*(lost[name].values.tolist() for name in ("memory", "offset", "seed"))):
            if lost.sel(memory=memory, offset=offset, seed=seed):
                found.append(f"{family.name}, offset {offset}, memory {memory}, seed {seed}")
    return found


def cases(price: float, half: str) -> list[Case]:
    """Every checkpoint of the largest loop count of a half whose seed has a finite loss of each loop count.

    Other seeds, and other families, may be missing: `incomplete` says so.
    """
    found = []
    for family, losses in trained(half):
        folder = SWEEPS / family.name
        most = int(losses.data["loops"].values[-1])
        for memory in losses.data["memory"].values:
            for offset in losses.data["offset"].values:
                nll = losses.data["nll"].sel(memory=memory, offset=offset).transpose("seed", "document", "loops")
                nll = nll.isel(seed=np.flatnonzero(np.isfinite(nll.values).all((1, 2))))
                if not nll.sizes["seed"]:
                    continue
                counts = [int(count) for count in nll["loops"].values]
                by_seed = -nll.mean("document").values - price * (np.array(counts) - 1)
                utility = by_seed.mean(0)
                error = _errors(nll.values, nll["source"].values, int(utility.argmax()))
                for seed, floor in zip(nll["seed"].values, _floors(by_seed), strict=True):
                    cell = Grid(LOOPS).cell(int(seed), memory, int(offset), most)
                    file = folder / "diagnoses" / f"{cell.name}.nc"
                    if not file.is_file():
                        raise Refused(
                            f"{file} is missing: python benchmarks/families.py {family.name} makes it where the model "
                            f"is still in {folder / 'models'}; else delete {cell_file(folder, cell)} first, to train "
                            "it again."
                        )
                    picks, support = rules(Diagnosis.load(file), price)
                    found.append(
                        Case(
                            family.name,
                            family.data,
                            half,
                            int(offset),
                            str(memory),
                            int(seed),
                            dict(zip(counts, utility.tolist(), strict=True)),
                            dict(zip(counts, error.tolist(), strict=True)),
                            picks,
                            support,
                            floor,
                        )
                    )
    return found


def _floors(by_seed: np.ndarray) -> list[float | None]:
    """What each seed [seed, loops] loses by the count that is best for the mean of the others; None of too few."""
    if len(by_seed) < CLAIM:
        return [None] * len(by_seed)
    others = (by_seed.sum(0) - by_seed).argmax(1)
    return [float(own.max() - own[pick]) for own, pick in zip(by_seed, others, strict=True)]


def _errors(nll: np.ndarray, sources: np.ndarray, best: int) -> np.ndarray:
    """Standard errors of differences from the best count, over what those of `recommend_training` are over."""
    draws = resampled_means(nll.mean(0), sources)
    variance = (draws - draws[:, [best]]).var(0)
    if len(nll) >= CLAIM:
        means = nll.mean(1)
        variance += (means - means[:, [best]]).var(0, ddof=1) / len(nll)
    return np.sqrt(variance)


def by_family(chosen: Sequence[Case]) -> list[list[Case]]:
    """The checkpoints of each family."""
    families: dict[tuple[str, int, str], list[Case]] = {}
    for case in chosen:
        families.setdefault(case.of, []).append(case)
    return list(families.values())


def over_data_sets(chosen: Sequence[Case], value: Callable[[Case], float], name: str) -> dict[str, float | None]:
    """A mean, data sets weighing alike, and its 95 % t interval; none where they are too few to tell."""
    data: dict[str, list[float]] = {}
    for family in by_family(chosen):
        data.setdefault(family[0].data, []).append(float(np.mean([value(case) for case in family])))
    means = np.array([np.mean(each) for each in data.values()])
    low, high = map(float, student_interval(means)) if len(means) >= FEWEST_SOURCES else (None, None)
    return {name: float(means.mean()), f"{name}_low": low, f"{name}_high": high}


def score(chosen: Sequence[Case], rule: str) -> dict[str, Any]:
    """Mean regret and hit rate of a rule."""
    return {
        "rule": rule,
        "families": len(by_family(chosen)),
        "data_sets": len({case.data for case in chosen}),
        **over_data_sets(chosen, lambda case: case.regret(rule), "regret"),
        **over_data_sets(chosen, lambda case: case.hit(rule), "hits"),
    }


def against(chosen: Sequence[Case], rule: str) -> list[dict[str, Any]]:
    """By how much a rule's regret is above that of each other baseline, on the same checkpoints."""
    return [
        {"baseline": baseline}
        | over_data_sets(chosen, lambda case, other=baseline: case.regret(rule) - case.regret(other), "difference")
        for baseline in BASELINES
        if baseline != rule
    ]


def noise_floor(chosen: Sequence[Case]) -> float | None:
    """Mean regret of the oracle, over what has one."""
    known = [case for case in chosen if case.floor is not None]
    return over_data_sets(known, lambda case: case.floor or 0.0, "floor")["floor"] if known else None


def of_each_family(chosen: Sequence[Case], rule: str) -> list[dict[str, Any]]:
    """What a rule picks in each family, and what that loses."""
    return [
        {
            "family": family[0].family,
            "data": family[0].data,
            "offset": family[0].offset,
            "memory": family[0].memory,
            "seeds": len(family),
            "best": family[0].best,
            "picks": [case.picks[rule] for case in family],
            "regret": float(np.mean([case.regret(rule) for case in family])),
        }
        for family in by_family(chosen)
    ]


def calibration(chosen: Sequence[Case], rule: str) -> dict[str, Any]:
    """Whether a rule hits as often as it is sure: by bins of support, and the mean of support - hit."""
    places = np.digitize([case.support[rule] for case in chosen], [start for _, start in BINS[1:]])
    bins: list[dict[str, Any]] = []
    for place, (name, _) in enumerate(BINS):
        some = [case for case, of in zip(chosen, places, strict=True) if of == place]
        support, hits = (
            float(np.mean(values)) if values else None
            for values in ([case.support[rule] for case in some], [case.hit(rule) for case in some])
        )
        bins.append({"support": name, "cases": len(some), "mean_support": support, "hits": hits})
    overconfidence = over_data_sets(chosen, lambda case: case.support[rule] - case.hit(rule), "support_less_hits")
    return {"rule": rule, "bins": bins, **overconfidence}


def best_rule(found: Sequence[Case]) -> str:
    """The rule of least mean regret; of equals the first."""
    return min(found[0].picks, key=lambda rule: round(score(found, rule)["regret"], 9))


def leave_one_out(found: Sequence[Case]) -> dict[str, str]:
    """The rule that would be best without each data set; of one data set nothing."""
    data = dict.fromkeys(case.data for case in found)
    return {left: best_rule([case for case in found if case.data != left]) for left in data if len(data) > 1}


def choose(price: float) -> str:
    """Choose the rule, once and for all, and write it to `CHOSEN`."""
    if CHOSEN.exists():
        raise Refused(f"{CHOSEN} holds the choice already; it is made once.")
    if missing := incomplete("choose"):
        raise Refused(f"The rule is chosen when the half `choose` is completely trained: {', '.join(missing)}.")
    found = cases(price, "choose")
    told = {"price": price, **score(found, best_rule(found))}
    with whole(CHOSEN) as partial:
        partial.write_text(json.dumps(told, indent=1) + "\n")
    return told["rule"]


def chosen_rule(price: float) -> str:
    """The rule that was chosen and committed, without which nothing of the unseen half is looked at.

    Nor is it looked at in part, while it is not completely trained: each such look would be one more than the one.
    """
    if not CHOSEN.is_file():
        raise Refused("No rule is chosen yet: python benchmarks/backtest.py --choose, and commit what it writes.")
    if missing := incomplete("choose"):
        raise Refused(f"The half `choose` is not completely trained: {', '.join(missing)}.")
    if not committed(CHOSEN):
        raise Refused(f"{CHOSEN} is not committed as it is: the choice comes before the look at the unseen half.")
    told = json.loads(CHOSEN.read_text())
    if told["price"] != price:
        raise Refused(f"The rule was chosen at a price of {told['price']:g}, not {price:g}.")
    if missing := incomplete("unseen"):
        raise Refused(f"The half `unseen` is scored once, when it is completely trained: {', '.join(missing)}.")
    return told["rule"]


def committed(file: Path) -> bool:
    """Whether git's last commit has a file as it is."""
    try:
        said = subprocess.run(["git", "show", f"HEAD:./{file.name}"], cwd=file.parent, capture_output=True, check=False)
    except FileNotFoundError:  # no git
        return False
    return said.returncode == 0 and said.stdout == file.read_bytes()


def backtest(price: float, *, unseen: bool = False) -> dict[str, Any]:
    """Everything that the backtest says, ready for JSON.

    Args:
        price: Nats per token that an extra loop must bring.
        unseen: Score the unseen half, too, by the rule that was chosen and committed. Else the rule is the one of least
            regret so far, and nothing of the unseen half is read.

    Raises:
        Refused: No family is trained, or the unseen half may not be looked at yet.
    """
    rule = chosen_rule(price) if unseen else None
    shown = HALVES if unseen else HALVES[:1]
    halves = {half: cases(price, half) for half in shown}
    halves = {half: some for half, some in halves.items() if some}
    if not halves:
        raise Refused("No family is trained: python benchmarks/families.py")
    rule = rule or best_rule(halves["choose"])
    return {
        "price": price,
        "chosen": rule,
        "final": unseen,
        "incomplete": [said for half in shown for said in incomplete(half)],
        "diverged": [said for half in shown for said in diverged(half)],
        "scores": {half: [score(some, each) for each in some[0].picks] for half, some in halves.items()},
        "against": {half: against(some, rule) for half, some in halves.items()},
        "floor": {half: noise_floor(some) for half, some in halves.items()},
        "families": {half: of_each_family(some, rule) for half, some in halves.items()},
        "leave_one_out": leave_one_out(halves.get("choose", [])),
        "calibration": {half: calibration(some, rule) for half, some in halves.items()},
        "cases": [asdict(case) | {"best": case.best} for some in halves.values() for case in some],
    }


def text(row: Mapping[str, Any], name: str, form: str) -> str:
    """A mean of a score, with its interval where it has one."""
    mean, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{mean:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def why_no_interval(scores: Sequence[Mapping[str, Any]]) -> str:
    """Why scores have no intervals; empty where they have."""
    if scores[0]["regret_low"] is not None:
        return ""
    return (
        f"No intervals over data sets, of which there are {scores[0]['data_sets']}: fewer than {FEWEST_SOURCES} cannot "
        "say how much they differ."
    )


def calibration_rows(told: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Of a table: bin, cases, mean support, hits."""
    return [
        (
            *(row["support"], str(row["cases"])),
            *("-" if row[name] is None else f"{row[name]:.0%}" for name in ("mean_support", "hits")),
        )
        for row in told["bins"]
    ]


def family_rows(families: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Of a table: family, offset, memory, best count, picks by seed, regret."""
    return [
        (
            *(str(row[name]) for name in ("family", "offset", "memory", "best")),
            ", ".join(map(str, row["picks"])),
            f"{row['regret']:.4f}",
        )
        for row in families
    ]


def show(told: Mapping[str, Any], console: Console) -> None:
    """Print the scores and the calibration of the rule."""
    rule, mark = told["chosen"], "chosen" if told["final"] else "least regret so far"
    for half, scores in told["scores"].items():
        families = told["families"][half]
        title = f"{half}: {len(families)} families, data sets {scores[0]['data_sets']}, price {told['price']:g}"
        rows = [
            (
                row["rule"] + (f" ({mark})" if row["rule"] == rule else ""),
                text(row, "regret", ".4f"),
                text(row, "hits", ".0%"),
            )
            for row in scores
        ]
        _print(console, title, ("rule", "mean regret", "hits"), rows)
        few = sum(family["seeds"] < CLAIM for family in families)
        console.print(
            f"Hits are within one standard error of the best. In {few} of {len(families)} families, with fewer than "
            f"{CLAIM} seeds, it is over documents alone, and hits are stricter."
        )
        floor = told["floor"][half]
        console.print(
            f"Noise floor, mean regret of an oracle that picks a seed's count from {CLAIM - 1} or more other seeds: "
            + ("no such family." if floor is None else f"{floor:.4f}.")
        )
        differences = [(row["baseline"], text(row, "difference", "+.4f")) for row in told["against"][half]]
        _print(console, f"{half}: regret of {rule}, less that of", ("baseline", "difference"), differences)
        _print(console, f"{half}: {rule} in each family", FAMILY_COLUMNS, family_rows(families))
        calibrated = told["calibration"][half]
        headings = ("support", "cases", "mean support", "hits")
        _print(console, f"{half}: is {rule} as sure as it is right?", headings, calibration_rows(calibrated))
        console.print(f"Support less hits, mean over data sets: {text(calibrated, 'support_less_hits', '+.0%')}.")
        console.print(why_no_interval(scores) or "In brackets: 95 % t intervals over data sets.")
    for left, other in told["leave_one_out"].items():
        console.print(f"Of least regret on the half to choose on without {left}: {other}.")
    if told["diverged"]:
        console.print(f"Left out, since a training diverged: {'; '.join(told['diverged'])}.")
    if told["incomplete"]:
        console.print(f"Not completely trained: {', '.join(told['incomplete'])}.")


def _print(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console.print(f"\n{title}")  # a table's own title is wrapped to its width
    table = Table()
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--price", type=float, default=PRICE, help="nats per token and loop")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--choose", action="store_true", help=f"choose the rule, and write it to {CHOSEN.name}")
    action.add_argument(
        "--unseen", action="store_true", help="score the unseen half, too, once the choice is committed"
    )
    given = parser.parse_args(arguments)
    console = Console(width=110, highlight=False, markup=False)
    try:
        if given.choose:
            console.print(f"Chosen: {choose(given.price)}. Now commit {CHOSEN}.")
        told = backtest(given.price, unseen=given.unseen)
    except Refused as refused:
        parser.exit(1, f"{refused}\n")
    show(told, console)
    if given.json:
        with whole(given.json) as partial:
            partial.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
