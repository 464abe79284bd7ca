"""The recommendation: how many loops to run this checkpoint with, and how many a family like it should train with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loopdiag.bootstrap import resampled_means, resampled_nanmeans
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost.lenses import INPUTS, combine, lens_picks
from loopdiag.gaincost.rule import PRICE, Decision, checked_price, decide, describe

PREDICTIONS = 500  # resamples of the documents, on each of which every lens is asked


@dataclass(frozen=True)
class Recommendation(Decision):
    """Answers to the two questions, with what they rest on.

    Question 1, how many loops to run this checkpoint with, is what a `Decision` says.

    Attributes:
        predicted_training_loops: Question 2, predicted from the lenses; provisional, since how they are combined is not
            backtested yet. None where no lens has an opinion.
        predicted_support: For each loop count, how often it is predicted over bootstrap resamples of the documents.
        lenses: Each lens' own pick.
        trained_loops: Loops the model was trained with.
        model: Which model.
        seed: Of the bootstrap.
    """

    predicted_training_loops: int | None
    predicted_support: dict[int, float]
    lenses: dict[str, int]
    trained_loops: int
    model: str
    seed: int

    @property
    def _question(self) -> str:
        return f"Run {self.model} (trained with {self.trained_loops}) with how many loops? Measured:"

    @property
    def _prediction(self) -> str:
        lenses = ", ".join(f"{name} {loops}" for name, loops in self.lenses.items()) or "no lens has an opinion"
        predicted = self.predicted_training_loops or "no answer"
        return f"Train with how many loops? Predicted, not backtested: {predicted} ({lenses})."

    def __str__(self) -> str:
        prices = f"Break-even prices, by mean utility: {describe(self.break_even)}."
        return f"{self._question} {self.in_words()}.\n{prices}\n{self._prediction}"

    def _repr_html_(self) -> str:
        return self.card(self._question, [self._prediction])


def recommend(diagnosis: Diagnosis, price: float = PRICE, *, seed: int = 0) -> Recommendation:
    """Recommend loop counts from a diagnosis.

    Question 1 is measured: utility(r) = -nll_exit(r) - price * (r - 1); the smallest r that no larger one beats by more
    than one standard error of their paired difference. Undetermined when that r is picked in less than half of the
    resamples, when the data leave room (95 %) for another count to be better than the pick by more than the price, or
    when the documents come from fewer than five sources.

    Question 2 is a prediction from the lenses: the lower median of their picks.

    Args:
        diagnosis: What was measured.
        price: Nats per token that an extra loop must bring, >= 0.
        seed: Of the bootstrap.

    Raises:
        ValueError: `price` is negative or not finite, or the NLL of a loop is not finite.

    Example:
        This model was trained with two loops, and its first exit is far off:

        >>> from loopdiag.corpus import bundled
        >>> from loopdiag.diagnosis import diagnose
        >>> from loopdiag.model import load
        >>> diagnosis = diagnose(load("tiny-plt-2"), bundled().take(32), measures=["prediction"], max_tokens=32)
        >>> answer = recommend(diagnosis)
        >>> answer.recommended_loops, answer.support
        (2, {1: 0.0, 2: 1.0})
    """
    price = checked_price(price)
    diagnosis.require("nll_exit")
    nll = diagnosis.data["nll_exit"].values[:, 1:]
    loops = diagnosis.loops
    if not np.isfinite(nll).all():
        broken = loops[~np.isfinite(nll).all(0)]
        raise ValueError(f"The NLL after loop {broken[0]} is not finite, so there is nothing to recommend from.")
    sources = diagnosis.data["source"].values
    draws = resampled_means(nll, sources, seed=seed)
    errors = (draws[:, :, None] - draws[:, None, :]).std(0)  # [loop, loop]
    about = diagnosis.provenance
    lenses, predicted = predict(diagnosis, seed=seed)
    return Recommendation(
        **vars(decide(nll.mean(0), draws, errors, loops, price, sources)),
        predicted_training_loops=combine(lenses),
        predicted_support=predicted,
        lenses=lenses,
        trained_loops=about["trained_loops"],
        model=about["model"],
        seed=seed,
    )


def predict(diagnosis: Diagnosis, *, seed: int = 0) -> tuple[dict[str, int], dict[int, float]]:
    """What the lenses predict from a diagnosis: each one's pick, and how often each count is predicted over resamples.

    Lenses compare what each loop does with the loop before: where loops were left out, they have no opinion.
    """
    loops = diagnosis.loops
    if len(loops) < loops[-1]:
        return {}, {}
    lenses, resampled = resampled_picks(diagnosis, PREDICTIONS, seed=seed)
    if not lenses:
        return {}, {}
    picks = [combine(drawn) for drawn in resampled]
    return lenses, {loop: picks.count(loop) / PREDICTIONS for loop in loops.tolist()}


def resampled_picks(
    diagnosis: Diagnosis, draws: int, *, seed: int = 0
) -> tuple[dict[str, int], Iterator[dict[str, int]]]:
    """The lenses' picks from the mean curves of a diagnosis, and those from each of `draws` resamples of its documents.

    A measure by layers or heads, too, is averaged over them. Without any curve there are no resamples.
    """
    curves = {
        name: diagnosis.data[name].mean([dim for dim in diagnosis.data[name].dims if dim not in ("document", "loop")])
        for name in INPUTS
        if name in diagnosis.data
    }
    sources = diagnosis.data["source"].values
    drawn = [resampled_nanmeans(curve.values, sources, draws, seed) for curve in curves.values()]
    picks = lens_picks({name: curve.mean("document").values for name, curve in curves.items()})
    return picks, (lens_picks(dict(zip(curves, draw, strict=True))) for draw in zip(*drawn, strict=True))
