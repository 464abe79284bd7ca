"""One self-contained HTML page of saved results."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import numpy as np

from loopdiag import __version__, html, plots
from loopdiag.bootstrap import DRAWS
from loopdiag.diagnosis import Diagnosis
from loopdiag.gaincost import (
    Decomposition,
    TrainingRecommendation,
    decompose,
    recommend_training,
)
from loopdiag.gaincost.rule import PRICE, describe
from loopdiag.interventions import CAVEAT, Effects
from loopdiag.interventions.effects import FEWEST_SOURCES, Effect
from loopdiag.losses import SweepError, SweepLosses
from loopdiag.measures.definitions import DEFINITIONS, GROUPS
from loopdiag.report.inline import inline
from loopdiag.report.lenses import BESIDE, LENSES, class_rows, every_loop, motions, present, rows, span
from loopdiag.report.shown import LARGE, SMALL, shown_documents
from loopdiag.report.verdict import Model, caveats, judged
from loopdiag.results import Result
from loopdiag.scores import INTERVALS, UNITS, ProbeScores

# Of the figures, for those who do not see them and above them.
TITLES = {
    "gain_cost": "Gain, cost and net gain of each loop",
    "predictions": "Loss, rank and entropy of each exit, and its output shift",
    "shares": "Each loop's share of what all loops after the first do",
    "readability": "Exit NLL as it is and through a fitted translator",
    "hidden_states": "How far and which way each loop moves the state",
    "shift_against_offset": "Output shift and offset distance",
    "similarity": "Likeness of the states of every two loops (CKA)",
    "rarefaction": "Effective rank of the first tokens of a document",
    "attention": "Attention: entropy, and change from the loop before",
    "gate": "Weight of the global attention branch",
    "heads": "Likeness of the heads",
    "exit_rules": "Rules for leaving token by token",
    "measured_gain_cost": "Gain, rise of the tax and net of each loop count",
    "trained_losses": "Held-out loss of each loop count",
    "losses_over_training": "Losses while training",
    "probes": "What linear probes read from the states of each loop",
}
MOST_NAMES = 4  # in the heading
# A colour and a line for each kind of change, so that either is enough.
_MARKS = {
    "h": ("help", "2px solid var(--help-line)"),
    "H": ("help-much", "4px double var(--help-line)"),
    "b": ("harm", "2px dotted var(--harm-line)"),
    "B": ("harm-much", "3px dashed var(--harm-line)"),
}
# Text stays text: it is found, read aloud, and small. The page's ground shows through.
SVG: dict[Any, Any] = {"svg.fonttype": "none", "figure.facecolor": "none", "axes.facecolor": "none"}
SVG |= {"text.parse_math": False}  # a dollar in a name is one


def page(
    diagnoses: Sequence[Diagnosis] = (),
    effects: Sequence[Effects] = (),
    sweeps: Sequence[SweepLosses] = (),
    probes: Sequence[ProbeScores] = (),
    *,
    price: float = PRICE,
    seed: int = 0,
) -> str:
    """The page: self-contained, and the same for the same results.

    Args:
        diagnoses: Of one model, or of several to show side by side.
        effects: Of interventions.
        sweeps: Of matched models.
        probes: Scores of linear probes.
        price: Nats per token that an extra loop must bring, >= 0.
        seed: Of the bootstrap.

    Raises:
        DiagnosisError: Two diagnoses are of the same model and run.
        ValueError: `price` is negative or not finite, or there is nothing to show.
    """
    if not (diagnoses or effects or sweeps or probes):
        raise ValueError("page: there is nothing to show: give a diagnosis, effects, a sweep, or scores of probes.")
    models = judged(diagnoses, price, seed)
    answers = [model.verdict.answer if model.verdict else None for model in models]
    loops = every_loop(diagnoses)
    style = _asset("page.css") + "\n" + _loop_rules(loops)
    script = _asset("page.js")
    with matplotlib.rc_context(SVG), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has it
        drawn = plots.pictures(diagnoses, answers, ["svg"]) if diagnoses else {}
        told = [_sweep(losses, place, price, seed) for place, losses in enumerate(sweeps)]
        read = [_probes(scores, place, seed) for place, scores in enumerate(probes)]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"nats": html.number, "config": _config}
    return environment.from_string(_asset("page.html")).render(
        title=_title([*diagnoses, *effects, *probes], sweeps),
        policy=_policy(style, script),
        style=style,
        script=script,
        version=__version__,
        price=price,
        seed=seed,
        draws=DRAWS,
        models=models,
        loops=loops,
        trained=sorted({model.about["trained_loops"] for model in models}),
        describe=describe,
        figures=_inlined(drawn, "f"),
        left_out=plots.left_out(diagnoses) if diagnoses else {},
        titles=TITLES,
        caveats=caveats(diagnoses),
        lenses=[(lens, rows(lens, diagnoses, seed)) for lens in LENSES],
        classes=[(model, table) for model in models if (table := class_rows(model.diagnosis, seed))],
        motions=[(model.name, said) for model in models if (said := motions(model.diagnosis))],
        shown=[(model, documents) for model in models if (documents := shown_documents(model.diagnosis))],
        small=SMALL,
        large=LARGE,
        missing=[(model.name, *_missing(model.about)) for model in models],
        effects=[(each.provenance, _effects(each, seed), each.data["nll"].mean().item()) for each in effects],
        effects_caveat=CAVEAT,
        fewest_sources=FEWEST_SOURCES,
        span=span,
        abouts=_abouts(models, effects, sweeps, probes),
        sweeps=told,
        probes=read,
        probes_intervals=INTERVALS,
        units=UNITS,
        definitions={name: (*DEFINITIONS[name], BESIDE.get(name, "")) for name in present(diagnoses)},
        defined=DEFINITIONS,
    )


def _title(results: Sequence[Result], sweeps: Sequence[SweepLosses]) -> str:
    """The models and what the sweeps trained on; a number of models where their names would fill the page."""
    names = list(dict.fromkeys(each.provenance["model"] for each in results))
    told = names if len(names) <= MOST_NAMES else [f"{len(names)} models"]
    return ", ".join([*told, *dict.fromkeys(f"sweep on {each.provenance['data']}" for each in sweeps)])


def _abouts(
    models: Sequence[Model],
    effects: Sequence[Effects],
    sweeps: Sequence[SweepLosses],
    probes: Sequence[ProbeScores],
) -> list[tuple[str, dict[str, Any]]]:
    """The provenance of everything that is shown."""
    return [
        *((f"Diagnosis of {model.name}", model.about) for model in models),
        *((f"Interventions on {each.provenance['model']}", each.provenance) for each in effects),
        *((f"Sweep on {each.provenance['data']}", each.provenance) for each in sweeps),
        *((f"Probes on {each.provenance['model']}", each.provenance) for each in probes),
    ]


def _missing(about: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Groups that were not asked for, and what is absent for each other reason."""
    groups = [group for group in GROUPS if group not in about["measures"]]
    reasons: dict[str, list[str]] = {}
    for name, why in about["absent"].items():
        if not why.endswith("was not asked for"):
            reasons.setdefault(why, []).append(name)
    return groups, reasons


@dataclass(frozen=True)
class Drawn:
    """An effect of an intervention with where it stands between the smallest and the largest of all, 0 to 100."""

    row: Effect
    low: float
    mean: float
    high: float


def _effects(effects: Effects, seed: int) -> tuple[list[Drawn], float]:
    """Every effect, and where zero stands."""
    table = effects.table(seed)
    ends = [0.0, *(value for row in table for value in (row.low, row.effect, row.high) if np.isfinite(value))]
    least, span = min(ends), (max(ends) - min(ends)) or 1.0

    def at(value: float, other: float) -> float:
        return round(100 * ((value if np.isfinite(value) else other) - least) / span, 2)

    drawn = [Drawn(row, at(row.low, row.effect), at(row.effect, 0.0), at(row.high, row.effect)) for row in table]
    return drawn, at(0.0, 0.0)


def _sweep(losses: SweepLosses, place: int, price: float, seed: int) -> dict[str, Any]:
    """What the page says of a sweep."""
    answers: list[TrainingRecommendation] = []
    unfinished: list[str] = []
    for memory in losses.data["memory"].values:
        for offset in losses.data["offset"].values:
            try:
                answers.append(recommend_training(losses, price, offset=int(offset), memory=str(memory), seed=seed))
            except SweepError as error:
                unfinished.append(str(error))
    return {
        "said": repr(losses),
        "about": losses.provenance,
        "answers": answers,
        "unfinished": unfinished,
        "parts": list(_decomposed(losses, seed)),
        "figures": _inlined(plots.pictures_of_sweep(losses, price=price, seed=seed, forms=["svg"]), f"s{place}"),
        "left_out": plots.left_out_of_sweep(losses),
    }


def _decomposed(losses: SweepLosses, seed: int) -> Iterator[Decomposition]:
    if losses.data.sizes["offset"] > 1:
        for memory in losses.data["memory"].values:
            yield decompose(losses, str(memory), seed=seed)


def _probes(scores: ProbeScores, place: int, seed: int) -> dict[str, Any]:
    """What the page says of probes."""
    (drawn,) = plots.pictures_of_probes(scores, ["svg"], seed=seed).values()
    return {
        "about": scores.provenance,
        "table": scores.table(seed),
        "figures": _inlined({"probes.svg": drawn}, f"p{place}"),
    }


def _inlined(drawn: dict[str, bytes], prefix: str) -> dict[str, str]:
    names = [file.removesuffix(".svg") for file in drawn]
    return {name: inline(drawn[f"{name}.svg"], f"{prefix}-{name}", TITLES[name]) for name in names}


def _config(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance as lines: nested settings by dotted names, lists and the like as JSON."""
    lines = []
    for key, value in about.items():
        if key == "absent":  # told apart
            continue
        if isinstance(value, dict):
            lines += [(f"{key}.{name}", line) for name, line in _config(value)]
        else:
            lines.append((key, value if isinstance(value, str) else json.dumps(value)))
    return lines


def _asset(name: str) -> str:
    return (resources.files("loopdiag.report") / "assets" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, and nothing runs but the page's own style and script."""

    def known(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {known(style)}; script-src {known(script)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _loop_rules(loops: Sequence[int]) -> str:
    """Which colours a chosen loop shows; a rule for each, since the choice needs no script."""
    lines = []
    for loop in loops:
        chosen = f".tokens:has(.loop{loop}:checked)"
        lines += [
            f"{chosen} .{kind}{loop} {{ background: var(--{colour}); border-bottom: {line}; }}"
            for kind, (colour, line) in _MARKS.items()
        ]
        lines.append(f"{chosen} .at{loop} {{ display: block; }}")
    return "\n".join(lines)
