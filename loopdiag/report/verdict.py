"""How many loops one model is worth, with the numbers that decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopdiag import html
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import GainCost, Recommendation, gain_cost, recommend
from loopdiag.gaincost.rule import PRICE
from loopdiag.report.lenses import span
from loopdiag.summary import Estimate, labels


@dataclass(frozen=True)
class Verdict:
    """A recommendation with its evidence, in words and as rows of a table."""

    curve: GainCost
    answer: Recommendation

    def reasons(self) -> list[str]:
        """What the last loop of the pick brings, and what the next would."""
        place = self._pick
        return [
            self._brings(each, "" if each == place else "would ")
            for each in (place, place + 1)
            if 1 <= each < len(self.curve.loop)
        ]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each loop: exit NLL, gain, cost and net with their intervals, cost over gain."""
        curve = self.curve
        for place, loop in enumerate(curve.loop.tolist()):
            yield {
                "loop": loop,
                "beyond": loop > curve.trained_loops,
                "picked": loop == self.answer.recommended_loops,
                "cells": [_with_span(each, place) for each in (curve.nll_exit, curve.gain, curve.cost, curve.net)],
                "ratio": html.number(curve.cost_over_gain[place]),
            }

    def nll(self) -> tuple[str, str]:
        """The exit NLL at the pick, with its interval."""
        return _with_span(self.curve.nll_exit, self._pick)

    @property
    def _pick(self) -> int:
        return self.curve.loop.tolist().index(self.answer.pick)

    def _brings(self, place: int, would: str) -> str:
        curve, before, loop = self.curve, int(self.curve.loop[place - 1]), int(self.curve.loop[place])
        single = loop == before + 1
        which = f"Loop {loop}" if single else f"Loops {before + 1} to {loop}"
        net, ends = _with_span(curve.net, place)
        said = f"{which} {would}net{'s' if single and not would else ''} {net} nats per token"
        return f"{said}{f' (95 %: {ends})' if ends else ''}, at a price of {self.answer.price * (loop - before):g}."


@dataclass(frozen=True)
class Model:
    """What a page says of one diagnosis.

    Attributes:
        name: As `summary.labels` tells it from the others.
        diagnosis: The diagnosis.
        about: Its provenance.
        verdict: None where it has no finite exit NLL.
        why: Why it has none, and what brings one.
    """

    name: str
    diagnosis: Diagnosis
    about: dict[str, Any]
    verdict: Verdict | None
    why: str


def judged(diagnoses: Sequence[Diagnosis], price: float, seed: int) -> list[Model]:
    """Each diagnosis with its verdict.

    Raises:
        DiagnosisError: Two are of the same model and run.
    """
    models = []
    for name, diagnosis in zip(labels(diagnoses), diagnoses, strict=True):
        about, answer, verdict, why = diagnosis.provenance, recommendation(diagnosis, price, seed=seed), None, ""
        if answer is not None:
            verdict = Verdict(gain_cost(diagnosis, seed=seed), answer)
        elif "nll_exit" in diagnosis.data:
            why = "the exit NLL of a loop is not finite"
        else:
            why = f"{about['absent']['nll_exit']}; it takes --measures default"
        models.append(Model(name, diagnosis, about, verdict, why))
    return models


def recommendation(diagnosis: Diagnosis, price: float = PRICE, *, seed: int = 0) -> Recommendation | None:
    """What a diagnosis recommends; None where there is no finite NLL to recommend from."""
    readable = "nll_exit" in diagnosis.data and np.isfinite(diagnosis.data["nll_exit"].sel(loop=diagnosis.loops)).all()
    return recommend(diagnosis, price, seed=seed) if readable else None


def caveats(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """What makes several diagnoses hard to compare."""
    if len({diagnosis.provenance["corpus_sha256"] for diagnosis in diagnoses}) > 1:
        return ["the diagnoses are of different documents: lines in one figure differ by them, too"]
    if len({(diagnosis.provenance["tokens"], diagnosis.provenance["max_tokens"]) for diagnosis in diagnoses}) > 1:
        return ["the diagnoses read the documents in different tokens: nats per token do not compare"]
    return []


def _with_span(estimate: Estimate, place: int) -> tuple[str, str]:
    return html.number(estimate.mean[place]), span(estimate.low[place], estimate.high[place])
