"""What linear probes read from the states of each loop: scores by document, and their table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from loopdiag import html
from loopdiag.errors import InputError
from loopdiag.results import About, Layout, Result
from loopdiag.summary import ByLoop, estimate

SCHEMA = 1
INTERVALS = (
    "Intervals are over documents; they leave out the training seed, and what other fit documents and places would "
    "have made of the probe."
)
UNITS = {"accuracy": "accuracy", "information": "information (nats per token)"}


class ScoresError(InputError):
    """Probes that cannot be run or read; the message says what was given, what is allowed and how to fix it."""


@dataclass(frozen=True)
class ScoreRow:
    """What one probe reads; NaN where it is not defined.

    Attributes:
        target: What is read.
        hook: Where.
        loop: In which loop; 0 is the embedding.
        extrapolated: Whether the loop is beyond those that the model was trained with.
        score: Accuracy from 0 to 1, or information in nats per token: mean over documents.
        score_low, score_high: 95 % interval over documents, clustered by source.
        change: Of the accuracy, from the loop before; with its interval, which is paired. None of information, whose
            labels are others in every loop.
        control: Score of the same probe on the control task.
        selectivity: Score less control; with its interval, which is paired.
        floor: Score on the same architecture with random weights.
        nll: Held-out loss of the probe, in nats per token.
        baseline: Accuracy of always saying the most frequent class of the `fit` documents; none of information.
        baseline_nll: Loss of the probe without the state: of the classes' frequencies, or of the embeddings alone, the
            most that there is to inform of.
        floor_baseline_nll: The latter with random weights, whose clusters are others.
        share: Information by what there is to inform of, score / baseline_nll; none of accuracy.
        floor_share: The same with random weights, floor / floor_baseline_nll.
        C, control_C, floor_C: The chosen inverse strength of the regularisation of the probe, of that on the control
            task, and of that on random weights.
    """

    target: str
    hook: str
    loop: int
    extrapolated: bool
    score: float
    score_low: float
    score_high: float
    change: float
    change_low: float
    change_high: float
    control: float
    selectivity: float
    selectivity_low: float
    selectivity_high: float
    floor: float
    nll: float
    baseline: float
    baseline_nll: float
    floor_baseline_nll: float
    share: float
    floor_share: float
    C: float
    control_C: float
    floor_C: float


@dataclass(frozen=True)
class ProbeScores(Result):
    """Scores of linear probes of one model and corpus, by document of the `report` half.

    Attributes:
        data: By `target, hook, loop, document`: `score`, `control` and `floor` (accuracy, or information in nats per
            token), and the losses `nll`, `control_nll` and `floor_nll`, in nats per token; NaN where a loop lacks the
            hook or a document has no place with a label. By `target, loop, document`: the loss without the state,
            `baseline_nll`; of accuracies also that of the most frequent class, `baseline`; of information the loss
            without the state on random weights, `floor_baseline_nll`. By `target, hook, loop`: the chosen
            regularisation `C`, `control_C` and `floor_C`, scikit-learn's inverse strength. Loop 0 is the embedding, the
            same for every hook. The coordinate `source` gives each document's cluster. The provenance's `unconverged`
            says how many fits, of all, did not converge.
    """

    KIND, WRITTEN_BY, SCHEMA, ERROR = "scores of probes", "loopdiag probe --save", SCHEMA, ScoresError
    NUMBERS: ClassVar[Layout] = {
        **dict.fromkeys(("score", "control", "floor", "nll"), ("target", "hook", "loop", "document")),
        "baseline_nll": ("target", "loop", "document"),
        **dict.fromkeys(("C", "control_C", "floor_C"), ("target", "hook", "loop")),
        "loop": ("loop",),
    }
    TEXTS: ClassVar[Layout] = {
        "target": ("target",),
        "hook": ("hook",),
        "document": ("document",),
        "source": ("document",),
    }
    ABOUT: ClassVar[About] = {
        **dict.fromkeys(("suite", "unit", "model", "corpus"), str),
        **dict.fromkeys(("trained_loops", "run_loops", "documents"), int),
        "absent": dict,
    }

    @property
    def targets(self) -> list[str]:
        """What was read."""
        return self.data["target"].values.tolist()

    @property
    def hooks(self) -> list[str]:
        """Where it was read."""
        return self.data["hook"].values.tolist()

    def curve(self, name: str, target: str, hook: str | None = None, *, seed: int = 0) -> ByLoop:
        """A variable at each loop where it is defined, mean over documents with its 95 % interval.

        Args:
            name: Of `data`, by loop and document.
            target: What was read.
            hook: Where; None for a variable that has no hook.
            seed: Of the bootstrap.
        """
        values = self.data[name].sel(target=target, drop=True)
        values = (values if hook is None else values.sel(hook=hook, drop=True)).dropna("loop", how="all")
        found, loops = estimate(values, seed=seed), values["loop"].values
        beyond = loops > self.provenance["trained_loops"]
        return ByLoop(found.mean, found.low, found.high, loops, beyond, np.zeros(len(loops), bool))

    def table(self, seed: int = 0) -> list[ScoreRow]:
        """One row for each target, hook and loop that has it.

        Intervals leave out the training seed, and what other `fit` documents and places would have made of the probe.

        Args:
            seed: Of the bootstrap.
        """
        data, trained = self.data, self.provenance["trained_loops"]
        score = data["score"]
        informs = self.provenance["unit"] == "information"
        before = score.shift(loop=1).where(not informs)
        found = {
            "score": estimate(score, seed=seed),
            "change": estimate(score - before, seed=seed),
            "selectivity": estimate(score - data["control"], seed=seed),
        }
        names = (
            "control",
            "floor",
            "nll",
            "baseline",
            "baseline_nll",
            "floor_baseline_nll",
            "C",
            "control_C",
            "floor_C",
        )
        nowhere = np.full(score.shape[:-1], np.nan)
        means = {name: _mean(data[name], score) if name in data else nowhere for name in names}
        means["share"] = found["score"].mean / means["baseline_nll"] if informs else nowhere
        means["floor_share"] = means["floor"] / means["floor_baseline_nll"]
        rows = []
        for place in np.argwhere(np.isfinite(found["score"].mean)):
            target, hook, loop = (int(index) for index in place)
            at = (target, hook, loop)
            number = int(data["loop"].values[loop])
            numbers = {name: float(values[at]) for name, values in means.items()}
            for name, each in found.items():
                numbers |= {name: float(each.mean[at])}
                numbers |= {f"{name}_low": float(each.low[at]), f"{name}_high": float(each.high[at])}
            rows.append(ScoreRow(self.targets[target], self.hooks[hook], number, number > trained, **numbers))
        return rows

    def __repr__(self) -> str:
        about = self.provenance
        return (
            f"Probes of {about['suite']} on {about['model']} (trained with {about['trained_loops']} loops, run with "
            f"{about['run_loops']}): {', '.join(self.targets)} from {', '.join(self.hooks)}, "
            f"{about['documents']} documents of {about['corpus']}"
        )

    def _repr_html_(self) -> str:
        body = [
            [
                f"{row.target}, {row.hook}, loop {row.loop}",
                html.between(row.score, row.score_low, row.score_high),
                *(html.number(value) for value in (row.control, row.selectivity, row.floor)),
            ]
            for row in self.table()
        ]
        unit = UNITS[self.provenance["unit"]]
        headings = ["", f"{unit} [95 %]", "control", "selectivity", "random weights"]
        return html.card(repr(self), headings, body, [INTERVALS])


def _mean(values: xr.DataArray, like: xr.DataArray) -> np.ndarray:
    """Means over documents [target, hook, loop], also of what has no hook."""
    return values.broadcast_like(like).transpose(*like.dims).mean("document").values
