"""`loopdiag figures`: everything that saved diagnoses show, drawn and in tables, without their models."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopdiag.cli.options import QuietOption
from loopdiag.cli.output import check_outputs, note, reported_errors, stderr, stdout
from loopdiag.errors import InputError
from loopdiag.files import whole, write_all

if TYPE_CHECKING:
    from loopdiag.diagnosis import Diagnosis


def figures(
    saved: Annotated[list[Path], typer.Argument(help="Diagnoses that `loopdiag diagnose --save` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The folder that figures and tables go into.")] = Path("figures"),
    against_paper: Annotated[
        Path | None, typer.Option("--against-paper", help="Write a page with the paper's values beside, too.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Draw what saved diagnoses show, of one model or of several together, and write tables of it."""
    with reported_errors():
        if against_paper and against_paper.resolve() in [path.resolve() for path in saved]:
            raise InputError("--against-paper and a saved diagnosis that is read must be different files.")
        check_outputs(against_paper, folder=out, quiet=quiet)

        from loopdiag.diagnosis import Diagnosis
        from loopdiag.summary import labels

        diagnoses = [Diagnosis.load(path) for path in saved]
        labels(diagnoses)  # refuses one that is given twice
        with nullcontext() if quiet else stderr.status("drawing"):
            from loopdiag import plots, report

            pictures = plots.pictures(diagnoses, [report.recommendation(diagnosis) for diagnosis in diagnoses])
            tables = report.tables(diagnoses)
            page = report.reproduction(diagnoses) if against_paper else ""
        if not quiet:
            _print_notes(diagnoses)
        written = write_all(out, pictures | tables)
        if against_paper:
            with whole(against_paper) as partial:
                partial.write_text(page, encoding="utf-8")
            written.append(against_paper)
        for file in written:
            stdout.print(str(file), markup=False, highlight=False, soft_wrap=True)


def _print_notes(diagnoses: list[Diagnosis]) -> None:
    from loopdiag import plots, report

    for caveat in report.caveats(diagnoses):
        note(caveat)
    for name, why in plots.left_out(diagnoses).items():
        note(f"no figure {name}: {why}")
