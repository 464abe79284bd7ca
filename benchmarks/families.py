"""The families of the backtest: what each is trained on, how large it is, and which half of the backtest it is in.

    python benchmarks/families.py [NAME ...]

trains those that are not trained yet, all when none is named, into benchmarks/sweeps; any number of processes may share
the work, and a stopped one goes on. On two cores all of them take about ten hours.

The halves were fixed, by data, before any model of these was trained, while rates for `code` were searched: on `choose`
the combination of lenses is chosen, and `unseen` is looked at once, when all of it is trained, for the score that is
reported. `code` is in the first half because the bundled models, trained on the same text, had been looked at before.
Seeds of the narrow models were made three when one seed of `p_hop` had shown how far one training can lie off, before
the choice and before any model of the unseen half was trained.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import xarray as xr

from loopdiag.diagnosis import Diagnosis
from loopdiag.files import whole
from loopdiag.gaincost.lenses import INPUTS
from loopdiag.losses import SweepLosses
from loopdiag.model.config import LoopedConfig, Memory
from loopdiag.sweep import sources
from loopdiag.sweep.gathering import PLACE
from loopdiag.sweep.grid import Grid
from loopdiag.sweep.planning import plan
from loopdiag.sweep.running import sweep

SWEEPS = Path(__file__).parent / "sweeps"
LOOPS = (1, 2, 3, 4)
RATES = (1.5e-3, 3e-3, 6e-3)
# Of each diagnosis: what lenses and their rivals read, and what might track the tax.
SCORED = ("nll_exit", *INPUTS, "withheld", "omega", "omega_relative")
NARROW = LoopedConfig(
    vocab_size=1,  # the tokenizer's
    d_model=64,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_head=32,
    d_mlp=192,
    n_ctx=256,
    n_loops=1,
    window=17,
)


@dataclass(frozen=True)
class Family:
    """One sweep; every offset and memory of it is one family of the backtest.

    Attributes:
        name: Folder of the sweep.
        half: Of the backtest.
        data: What it is trained on.
        size: Of the models.
        tokens: Training tokens of each.
        batch_size: Sequences of a batch; about 1,600 updates when None.
        memories, seeds: Of the grid.
        searched: Share of the tokens that models are trained for to choose learning rates. Of a task, too few of them
            compare models that have not begun to solve it.
    """

    name: str
    half: Literal["choose", "unseen"]
    data: str
    size: str | LoopedConfig
    tokens: int
    batch_size: int | None = None
    memories: tuple[Memory, ...] = ("first",)
    seeds: int = 1
    searched: float = 0.25


FAMILIES = (
    Family("code", "choose", "bundled", "tiny", 3_276_800, memories=("first", "own"), seeds=3),
    Family("code-narrow", "choose", "bundled", NARROW, 3_276_800, seeds=3),
    Family("p_hop", "choose", "p_hop", NARROW, 1_500_000, 16, ("first", "own"), seeds=3),
    Family("addition", "unseen", "addition", NARROW, 3_000_000, 16, seeds=3, searched=0.5),
    Family("docstrings", "unseen", "docstrings", "tiny", 3_276_800),
    Family("permutations", "unseen", "permutations", NARROW, 3_000_000, 16, ("first", "own"), seeds=3, searched=0.5),
    Family("brackets", "unseen", "brackets", NARROW, 1_500_000, 16, seeds=3, searched=0.5),
    Family("unigram", "unseen", "unigram", NARROW, 1_000_000, 16, seeds=3, searched=0.5),
)


def docstrings(file: Path) -> Path:
    """Natural text that ships with packages: their docstrings, one document per module, its package the source."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as partial, partial.open("w", encoding="utf-8") as out:
            for package in (*sources.TRAINING_PACKAGES, *sources.HELD_OUT_PACKAGES):
                for module in sorted(sources.package_files(package), key=lambda module: module.key):
                    text = "\n\n".join(_docstrings(module.text))
                    if len(text) > 1000:
                        record = {"text": text, "source": package}
                        out.write(json.dumps(record) + "\n")
    return file


def _docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, without examples, which are code."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield "\n".join(line for line in text.split("\n") if not line.lstrip().startswith((">>>", "...")))


def trim(folder: Path) -> None:
    """Leave in a sweep's diagnoses what scores are made of, as float32 means over layers and heads."""
    for file in sorted((folder / "diagnoses").glob("*.nc")):
        data = Diagnosis.load(file).data
        if set(data.data_vars) - set(SCORED):
            there = data[[name for name in SCORED if name in data]]
            means = there.mean([dim for dim in there.dims if dim not in ("document", "loop")])
            Diagnosis(means.astype("float32")).save(file)


def measured(losses: SweepLosses) -> xr.DataArray:
    """Which places of a sweep have a model that was trained, whether or not its losses are finite."""
    there = losses.data["nll"].notnull().all("document").transpose(*PLACE)
    grid, diverged = Grid(LOOPS), losses.provenance.get("diverged", ())
    for place in product(*(there[name].values.tolist() for name in PLACE)):
        if grid.cell(*place).name in diverged:
            there.loc[dict(zip(PLACE, place, strict=True))] = True
    return there


def places(family: Family, folder: Path) -> tuple[int, int]:
    """Of how many places (seeds, memories, offsets, loop counts) a sweep has the model, and how many it is to have."""
    asked = {"seed": range(family.seeds), "memory": family.memories, "offset": (1, 0), "loops": LOOPS}
    wanted = int(np.prod([len(values) for values in asked.values()]))
    if not (folder / "sweep.nc").is_file():
        return 0, wanted
    there = measured(SweepLosses.load(folder / "sweep.nc"))
    return int(there.reindex({name: list(asked[name]) for name in PLACE}, fill_value=False).sum()), wanted


def train(family: Family) -> None:
    """Train what is missing of a sweep.

    Of one that is whole nothing but sweep.nc, which has the losses of every document, and its diagnoses need be there.
    """
    folder = SWEEPS / family.name
    there, wanted = places(family, folder)
    if there == wanted:
        print(f"{family.name}: whole", flush=True)
        return
    data = family.data
    if data == "docstrings":
        data = str(docstrings(SWEEPS / family.name / "text" / "docstrings.jsonl"))
    grid = Grid(LOOPS, (1, 0), family.memories, tuple(range(family.seeds)))
    planned = plan(
        data,
        folder,
        grid,
        tokens=family.tokens,
        size=family.size,
        rates=RATES,
        search_tokens=int(family.searched * family.tokens),
        batch_size=family.batch_size,
        measures=("prediction", "readouts", "motion", "diversity", "offset", "attention"),
        compiled=True,
    )
    print(f"{family.name}: {len(grid.cells())} models of {planned.recipe.tokens:,} tokens", flush=True)

    def tell(what: str, done: int, of: int) -> None:
        if done in (0, of):
            trim(folder)
            print(f"  {what} {done}/{of}", flush=True)

    sweep(planned, grid, folder, tell)


def main() -> None:
    """Train families."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(family.name for family in FAMILIES))
    names = parser.parse_args().names
    known = {family.name: family for family in FAMILIES}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no family {unknown[0]}: allowed are {', '.join(known)}.")
    for name in names or known:
        train(known[name])


if __name__ == "__main__":
    main()
