"""Results as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from loopdiag.diagnosis import Diagnosis
from loopdiag.measures.definitions import DEFINITIONS, is_by_loop
from loopdiag.scores import ProbeScores, ScoreRow
from loopdiag.summary import ByLoop, Estimate, by_loop, exit_trade_off, has_shares, labels, refinement_shares

_BY_LOOP = ("mean", "low", "high", "extrapolated", "below_noise")


def tables(diagnoses: Sequence[Diagnosis]) -> dict[str, bytes]:
    """CSV files by name: every measure by loop, the paper's Table 3, the exit rules; those that would be empty are not.

    Numbers have five digits; what is undefined is empty. `low` and `high` are 95 % over documents. Utilities and chosen
    thresholds are those at the usual price.
    """
    named = list(zip(labels(diagnoses), diagnoses, strict=True))
    ends = [f"{name}{end}" for name in ("loops", "nll", "utility") for end in ("", "_low", "_high")]
    found = {
        "summary.csv": (("model", "measure", "unit", "loop", *_BY_LOOP), list(_measures(named))),
        "refinement_shares.csv": (("model", "measure", "loop", "share", *_BY_LOOP[1:]), list(_shares(named))),
        "exit_rules.csv": (("model", "rule", "threshold", *ends, "published", "chosen"), list(_rules(named))),
    }
    return {name: _csv(header, rows) for name, (header, rows) in found.items() if rows}


def probe_table(scores: ProbeScores, seed: int = 0) -> bytes:
    """What probes read, by target, hook and loop, as a CSV file in the columns of a `ScoreRow`.

    Args:
        scores: What was read.
        seed: Of the bootstrap.
    """
    about = scores.provenance
    names = [field.name for field in fields(ScoreRow)]
    rows = []
    for row in scores.table(seed):
        values = [getattr(row, name) for name in names]
        cells = [_yes(value) if isinstance(value, bool) else value for value in values]
        rows.append([_number(cell) if isinstance(cell, float) else cell for cell in cells])
    return _csv(
        ("model", "suite", "unit", *names), ([about["model"], about["suite"], about["unit"], *row] for row in rows)
    )


def _measures(named: Iterable[tuple[str, Diagnosis]]) -> Iterator[list[Any]]:
    for model, diagnosis in named:
        for name, (unit, _, _) in DEFINITIONS.items():
            if name in diagnosis.data and is_by_loop(name):
                yield from ([model, name, unit, *row] for row in _rows(by_loop(diagnosis, name)))


def _shares(named: Iterable[tuple[str, Diagnosis]]) -> Iterator[list[Any]]:
    for model, diagnosis in named:
        for name, curve in (refinement_shares(diagnosis) if has_shares(diagnosis) else {}).items():
            yield from ([model, name, *row] for row in _rows(curve))


def _rows(curve: ByLoop) -> Iterator[list[Any]]:
    for index, loop in enumerate(curve.loop):
        numbers = _numbers(curve, index)
        yield [int(loop), *numbers, _yes(curve.beyond[index]), _yes(curve.in_noise[index])]


def _rules(named: Iterable[tuple[str, Diagnosis]]) -> Iterator[list[Any]]:
    for model, diagnosis in named:
        if "exit_rule_nll_fit" not in diagnosis.data or len(diagnosis.loops) < 2:
            continue
        found = exit_trade_off(diagnosis)
        for rule in (*found.rules, found.oracle):
            for index, threshold in enumerate(rule.threshold):
                numbers = [each for of in (rule.loops, rule.nll, rule.utility) for each in _numbers(of, index)]
                if rule is found.oracle:  # it knows which exit is best, not which is worth its price
                    numbers[6:] = [""] * 3
                marks = [_yes(index == rule.usual), _yes(index == rule.chosen and rule is not found.oracle)]
                yield [model, rule.name, _number(threshold), *numbers, *marks]


def _numbers(estimate: Estimate, index: int) -> list[str]:
    return [_number(values[index]) for values in (estimate.mean, estimate.low, estimate.high)]


def _number(value: float) -> str:
    return f"{value:.5g}" if np.isfinite(value) else ""


def _yes(value: Any) -> str:
    return "true" if value else "false"


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    into = io.StringIO()
    writer = csv.writer(into, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return into.getvalue().encode()
