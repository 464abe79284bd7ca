"""How well does one checkpoint tell how many loops to train with? Scored against measured families.

    python benchmarks/backtest.py [--price 0.01] [--json FILE]

A family is what `benchmarks/families.py` trained of one data set and size with one offset and memory: a model for each
loop count. The recommender sees the diagnosis of ONE of them, the one with most loops, and predicts how many loops to
train with. The truth is the utility measured on all of them, -loss - price * (loops - 1).

- regret: utility lost by the prediction, in nats per token, 0 at best;
- hit: the prediction is within one standard error of the best count;
- support: how sure the prediction was over resampled documents, against how often it hit.

Which rule is used was chosen on one half of the data sets; the other half is for the score alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from families import FAMILIES, SWEEPS
from rich.console import Console
from rich.table import Table

from loopdiag.bootstrap import interval, resampled_means
from loopdiag.diagnosis import Diagnosis
from loopdiag.files import whole
from loopdiag.gaincost import recommend, recommend_training
from loopdiag.gaincost.decision import predict
from loopdiag.gaincost.lenses import LENSES
from loopdiag.gaincost.rule import PRICE
from loopdiag.losses import SweepLosses

AIM_REGRET, AIM_HITS = 0.01, 0.80


@dataclass(frozen=True)
class Case:
    """One checkpoint and the family that it is of.

    Attributes:
        data: Data set and size, the cluster of the intervals.
        half: Of the backtest.
        offset, memory, seed: Which family, and which checkpoint of it.
        utility: Measured, by loop count.
        error: Standard error of the difference of each from the best, by loop count.
        picks: What each rule predicts.
        support: How often the lenses' combination predicts what it predicts, over resampled documents.
    """

    data: str
    half: str
    offset: int
    memory: str
    seed: int
    utility: dict[int, float]
    error: dict[int, float]
    picks: dict[str, int]
    support: float

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


def rules(diagnosis: Diagnosis, lenses: Mapping[str, int], price: float) -> dict[str, int]:
    """What each rule predicts from one checkpoint."""
    loops = [int(loop) for loop in diagnosis.loops]
    most = loops[-1]
    single = {name: lenses.get(name, most) for name in LENSES}
    combined = {name: combine(list(lenses.values()) or [most]) for name, combine in COMBINATIONS.items()}
    exits = recommend(diagnosis, price).pick
    return combined | single | {"exit NLL": exits, "always 1": 1, "always 2": 2, "always max": most}


def cases(price: float) -> list[Case]:
    """Every checkpoint of the largest loop count whose family is complete."""
    found = []
    for family in FAMILIES:
        folder = SWEEPS / family.name
        if not (folder / "sweep.nc").is_file():
            continue
        losses = SweepLosses.load(folder / "sweep.nc")
        most = int(losses.data["loops"].values[-1])
        for memory in losses.data["memory"].values:
            for offset in losses.data["offset"].values:
                nll = losses.data["nll"].sel(memory=memory, offset=offset).transpose("seed", "document", "loops")
                nll = nll.isel(seed=np.flatnonzero(np.isfinite(nll.values).all((1, 2))))
                if not nll.sizes["seed"]:
                    continue
                answer = recommend_training(losses, price, offset=int(offset), memory=str(memory))
                utility = -answer.nll.mean - price * (np.array(answer.loops) - 1)
                error = _errors(nll.values, nll["source"].values, int(utility.argmax()))
                for seed in nll["seed"].values:
                    file = folder / "diagnoses" / f"loops{most}-offset{offset}-{memory}-seed{seed}.nc"
                    diagnosis = Diagnosis.load(file)
                    lenses, support = predict(diagnosis)
                    picks = rules(diagnosis, lenses, price)
                    found.append(
                        Case(
                            family.name,
                            family.half,
                            int(offset),
                            str(memory),
                            int(seed),
                            dict(zip(answer.loops, utility.tolist(), strict=True)),
                            dict(zip(answer.loops, error.tolist(), strict=True)),
                            picks,
                            support.get(picks["lower median of lenses"], 1.0),
                        )
                    )
    return found


def _errors(nll: np.ndarray, sources: np.ndarray, best: int) -> np.ndarray:
    """Standard errors of differences from the best count, over documents and, where there are several, seeds."""
    draws = resampled_means(nll.mean(0), sources)
    variance = (draws - draws[:, [best]]).var(0)
    if len(nll) > 1:
        means = nll.mean(1)
        variance += (means - means[:, [best]]).var(0, ddof=1) / len(nll)
    return np.sqrt(variance)


def score(chosen: Sequence[Case], rule: str) -> dict[str, Any]:
    """Mean regret and hit rate of a rule, families weighing alike, with 95 % intervals over data sets."""
    families: dict[tuple[str, int, str], list[Case]] = {}
    for case in chosen:
        families.setdefault((case.data, case.offset, case.memory), []).append(case)
    values = np.array(
        [
            (np.mean([case.regret(rule) for case in each]), np.mean([case.hit(rule) for case in each]))
            for each in families.values()
        ]
    )
    low, high = interval(resampled_means(values, [data for data, _, _ in families]))
    return {
        "rule": rule,
        "families": len(families),
        **{
            f"{name}{end}": float(array[index])
            for index, name in enumerate(("regret", "hits"))
            for end, array in (("", values.mean(0)), ("_low", low), ("_high", high))
        },
    }


def chosen_rule(found: Sequence[Case]) -> str:
    """The rule of least mean regret on the half to choose on; of equals the first."""
    half = [case for case in found if case.half == "choose"]
    return min(found[0].picks, key=lambda rule: round(score(half, rule)["regret"], 9))


def backtest(price: float) -> dict[str, Any]:
    """Everything that the backtest says, ready for JSON."""
    found = cases(price)
    if not found:
        raise SystemExit("No family is trained: python benchmarks/families.py")
    halves = {half: [case for case in found if case.half == half] for half in ("choose", "unseen")}
    return {
        "price": price,
        "chosen": chosen_rule(found) if halves["choose"] else None,
        "scores": {half: [score(some, rule) for rule in some[0].picks] for half, some in halves.items() if some},
        "cases": [asdict(case) | {"best": case.best} for case in found],
    }


def main() -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--price", type=float, default=PRICE, help="nats per token and loop")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--half", choices=("choose", "unseen"), help="this half alone")
    arguments = parser.parse_args()
    told = backtest(arguments.price)
    console = Console(width=110)
    for half, scores in told["scores"].items():
        if arguments.half not in (None, half):
            continue
        table = Table(title=f"{half}: {scores[0]['families']} families, price {told['price']:g}", title_justify="left")
        for heading in ("rule", "mean regret [95 %]", "hits [95 %]"):
            table.add_column(heading)
        for row in scores:
            table.add_row(
                row["rule"] + (" (chosen)" if row["rule"] == told["chosen"] else ""),
                f"{row['regret']:.4f} \\[{row['regret_low']:.4f}, {row['regret_high']:.4f}]",
                f"{row['hits']:.0%} \\[{row['hits_low']:.0%}, {row['hits_high']:.0%}]",
            )
        console.print(table)
    if arguments.json:
        with whole(arguments.json) as partial:
            partial.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
