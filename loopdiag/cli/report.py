"""`loopdiag report`: saved results as one page, without their models."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopdiag.cli.options import PriceOption, QuietOption, check_price
from loopdiag.cli.output import check_outputs, note, reported_errors, stderr, stdout
from loopdiag.cli.runs import SWEEP, kind_of
from loopdiag.errors import InputError
from loopdiag.files import whole

if TYPE_CHECKING:
    from loopdiag.diagnosis import Diagnosis
    from loopdiag.interventions import Effects
    from loopdiag.losses import SweepLosses
    from loopdiag.results import Result
    from loopdiag.scores import ProbeScores


def report(
    saved: Annotated[
        list[Path],
        typer.Argument(
            help="Diagnoses, effects of interventions and scores of probes, as `--save` wrote them, and sweeps."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page goes (HTML).")] = Path("report.html"),
    price: PriceOption = 0.01,
    quiet: QuietOption = False,
) -> None:
    """Put saved results on one self-contained page: the verdict and its evidence, every lens, documents token by token.

    Several diagnoses stand side by side. The page loads nothing from elsewhere.
    """
    with reported_errors():
        check_price(price)
        files = [given / SWEEP if given.is_dir() else given for given in saved]
        places = [file.resolve() for file in files]
        if out.resolve() in places:
            raise InputError(f"{out} is read, so the page cannot go there: give another --out.")
        if twice := next((file for file in files if places.count(file.resolve()) > 1), None):
            raise InputError(f"{twice} is given twice: give each once.")
        check_outputs(out, quiet=quiet)
        diagnoses, effects, sweeps, probes = _read(files)

        from loopdiag.report import page
        from loopdiag.summary import labels

        labels(diagnoses)  # refuses one that is given twice
        with nullcontext() if quiet else stderr.status("drawing"):
            text = page(diagnoses, effects, sweeps, probes, price=price)
        if not quiet and diagnoses and not any("token_nll" in each.data for each in diagnoses):
            note("no document is shown token by token: diagnose with --measures default,tokens")
        with whole(out) as partial:
            partial.write_text(text, encoding="utf-8")
        stdout.print(str(out), markup=False, highlight=False, soft_wrap=True)


def _read(files: list[Path]) -> tuple[list[Diagnosis], list[Effects], list[SweepLosses], list[ProbeScores]]:
    """What the files hold; each one's kind is known before any is read."""
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is no file: give what `--save` wrote, or the folder of a sweep.")
    kinds = [kind_of(file) for file in files]

    from loopdiag.diagnosis import Diagnosis
    from loopdiag.interventions import Effects
    from loopdiag.losses import SweepLosses
    from loopdiag.scores import ProbeScores

    shown: tuple[type[Result], ...] = (Diagnosis, Effects, SweepLosses, ProbeScores)
    by_kind = {made.KIND: made for made in shown}
    for file, kind in zip(files, kinds, strict=True):
        if kind not in by_kind:
            written = ", ".join(f"`{made.WRITTEN_BY}`" for made in shown)
            raise InputError(
                f"{file} holds {kind or 'nothing that says what it is'}: a report shows what {written} wrote."
            )
    results = [by_kind[str(kind)].load(file) for file, kind in zip(files, kinds, strict=True)]
    return (
        [each for each in results if isinstance(each, Diagnosis)],
        [each for each in results if isinstance(each, Effects)],
        [each for each in results if isinstance(each, SweepLosses)],
        [each for each in results if isinstance(each, ProbeScores)],
    )
