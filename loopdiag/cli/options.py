"""Arguments and options that commands share."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loopdiag.errors import InputError

MOST_LOOPS = 64
LARGEST_SEED = 2**32 - 1
DEFAULT_MODEL, BUNDLED_DATA = "tiny-plt-4", "bundled"
# Those of `loopdiag.interventions`, which would load torch.
INTERVENTIONS = ("offset", "carry", "loops", "gate", "window", "memory")
# Those of `loopdiag.probing`, likewise.
SUITES = ("position_identity", "code_structure", "lookahead", "carried_information")


class Device(StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Schedule(StrEnum):
    """How a new token's loops are run."""

    sequential = "sequential"
    parallel = "parallel"


class Dtype(StrEnum):
    """What the model computes in."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[
    str, typer.Argument(help="A bundled model, a folder, a hub id, a saved diagnosis, or a sweep.")
]
OnlyModelArgument = Annotated[str, typer.Argument(help="A bundled model, a folder or a hub id.")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="Text file, JSON lines, parquet, source tree or hub data set; half is fitted on, half reported."
    ),
]
DocumentsOption = Annotated[
    int | None, typer.Option("--documents", help="Use this many documents, half of them to fit on.")
]
TokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Cut documents here; what the model allows, at most 2048, if not given."),
]
LoopsOption = Annotated[int | None, typer.Option("--loops", help="Loops to run; the trained number if not given.")]
AtOption = Annotated[
    str | None,
    typer.Option(
        "--at", help="Measure these loops only, such as 1,2,4,8; changes are then from the measured loop before."
    ),
]
MeasuresOption = Annotated[
    str,
    typer.Option(
        "--measures", help="Groups of measures, with commas between: default, all, and those of docs/measures.md."
    ),
]
PriceOption = Annotated[
    float,
    typer.Option(
        "--price", help="Nats per token that an extra loop must bring; also how finely the answer must be told."
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Documents of a batch.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the fits and the bootstrap.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Commit or tag of a model on the hub.")]
OfflineOption = Annotated[
    bool, typer.Option("--offline/--no-offline", help="Take a hub id from the hub's cache, without a network.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="What the model computes in.")]
JsonOption = Annotated[
    str | None, typer.Option("--json", help="Write the answer as JSON to this file, or - for stdout.")
]
FiguresOption = Annotated[Path | None, typer.Option("--figures", help="Draw the figures into this folder.")]
SaveOption = Annotated[Path | None, typer.Option("--save", help="Keep the diagnosis in this file (netCDF).")]
QuietOption = Annotated[bool, typer.Option("--quiet/--no-quiet", help="No progress and no notes on stderr.")]


def in_range(flag: str, value: int | None, least: int, most: int | None = None) -> None:
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"{least} to {most}" if most else f"{least} or more"
        raise InputError(f"{flag} {value} is out of range: allowed {allowed}.")


def check_price(price: float) -> None:
    if not (math.isfinite(price) and price >= 0):
        raise InputError(
            f"--price {price} is out of range: allowed is a number >= 0, in nats per token and loop. Try 0.01."
        )
