"""From what each finished model left in a sweep's folder to one dataset."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from loopdiag.losses import SweepLosses
from loopdiag.model.checkpoints import native
from loopdiag.model.facts import flops, kv_bytes, parameters
from loopdiag.sweep.grid import Cell

SETTINGS, GRID, RATES = "sweep.json", "grid.json", "rates.json"
PLACE = ("seed", "memory", "offset", "loops")
NATS = "nats per token"


def cell_file(folder: Path, cell: Cell) -> Path:
    """Where a finished model's losses are."""
    return folder / "cells" / f"{cell.name}.nc"


def search_file(folder: Path, cell: Cell, rate: float) -> Path:
    """Where the loss of a short training at a learning rate is."""
    return folder / "search" / f"{cell.name}-rate{rate!r}.json"


def chosen_rates(folder: Path) -> tuple[float | None, dict[int, float]]:
    """The learning rate that searches chose for all loop counts, None before, and that of each so far."""
    if not (folder / RATES).is_file():
        return None, {}
    kept = json.loads((folder / RATES).read_text())
    return kept["common"], {int(loops): rate for loops, rate in kept["loops"].items()}


def gather(folder: Path) -> SweepLosses:
    """Everything that the models finished so far were measured to be."""
    cells: dict[Cell, xr.Dataset] = {}
    for file in sorted((folder / "cells").glob("*.nc")):
        data = xr.load_dataset(file, engine="h5netcdf")
        cells[Cell(**json.loads(data.attrs["provenance"])["cell"])] = data
    axes = _axes(folder, cells)
    first = next(iter(cells.values()))
    shape = tuple(len(axis) for axis in axes.values())
    # [seed, memory, offset, loops, document, pos]; a model with one loop stands at every offset and memory.
    by_token = np.full((*shape, *first["nll_token"].shape), np.nan, dtype=np.float32)
    looks = np.full((*shape, *first["nll_look"].shape), np.nan, dtype=np.float32)
    for cell, data in cells.items():
        place = (
            axes["seed"].index(cell.seed),
            slice(None) if cell.n_loops == 1 else axes["memory"].index(cell.memory),
            slice(None) if cell.n_loops == 1 else axes["offset"].index(cell.offset),
            axes["loops"].index(cell.n_loops),
        )
        by_token[place], looks[place] = data["nll_token"].values, data["nll_look"].values
    # Padding is NaN in every model, a token that a diverged model gives no chance only in that one.
    there = ~np.isnan(by_token).all((0, 1, 2, 3))

    def per_document(change: np.ndarray) -> np.ndarray:
        """Means over tokens [..., document]; NaN for a model that is missing."""
        return np.where(there, change, 0).sum(-1, dtype=np.float64) / there.sum(-1)

    fewer = np.full_like(by_token, np.nan)
    fewer[:, :, :, 1:] = by_token[:, :, :, :-1]
    found = {"nll": (per_document(by_token), "held-out loss")}
    for name, reference, than in (
        ("loop", fewer, "the next smaller loop count"),
        ("offset", by_token[:, :, [-1]] if axes["offset"][-1] == 0 else fewer * np.nan, "no offset"),
    ):
        found[f"{name}_helped"] = (per_document(np.maximum(reference - by_token, 0)), f"given, against {than}")
        found[f"{name}_harmed"] = (per_document(np.maximum(by_token - reference, 0)), f"taken, against {than}")
    variables: dict[str, Any] = {
        name: ((*PLACE, "document"), values, {"units": NATS, "long_name": long_name})
        for name, (values, long_name) in found.items()
    }
    variables["nll_look"] = (
        (*PLACE, "look", "document"),
        looks,
        {"units": NATS, "long_name": "held-out loss while training"},
    )
    settings = json.loads((folder / SETTINGS).read_text())
    abouts = {cell: json.loads(data.attrs["provenance"]) for cell, data in cells.items()}
    variables |= _costs(settings, axes) | _rates(abouts, axes) | _search(folder, axes)
    provenance = settings | {
        "models": {cell.name: abouts[cell]["weights_sha256"] for cell in cells},
        "diverged": [cell.name for cell, data in cells.items() if np.isnan(data["nll_token"].values[there]).any()],
        # More than one, where the models were trained on unlike machines.
        "versions": _different(about.get("versions") for about in abouts.values()),
        "devices": _different(about.get("device") for about in abouts.values()),
    }
    coords = axes | {"document": first["document"], "source": first["source"], "look": first["look"]}
    return SweepLosses(xr.Dataset(variables, coords, {"provenance": json.dumps(provenance, sort_keys=True)}))


def _different(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _axes(folder: Path, cells: Collection[Cell]) -> dict[str, list[Any]]:
    """Every place that was asked for, also of models that are not there yet, and of those that are."""
    asked = json.loads((folder / GRID).read_text()) if (folder / GRID).is_file() else {name: [] for name in PLACE}
    # One loop says nothing of the offsets and memories that a sweep has, unless nothing else is there.
    looped = [cell for cell in cells if cell.n_loops > 1] or ([] if asked["loops"] else cells)
    return {
        "seed": sorted({*asked["seed"], *(cell.seed for cell in cells)}),
        # The standard, shared memory and an offset, first.
        "memory": sorted({*asked["memory"], *(cell.memory for cell in looped)}),
        "offset": sorted({*asked["offset"], *(cell.offset for cell in looped)}, reverse=True),
        "loops": sorted({*asked["loops"], *(cell.n_loops for cell in cells)}),
    }


def _costs(settings: dict[str, Any], axes: dict[str, list[Any]]) -> dict[str, Any]:
    """Work and memory of a token, and parameters, which a configuration tells."""
    base = native.read_config(settings["config"] | {"n_loops": 1})
    shape = tuple(len(axes[name]) for name in PLACE[1:])
    work, kept, fixed, once, looped = (np.zeros(shape) for _ in range(5))
    for place in np.ndindex(*shape):
        memory, offset, n_loops = (axes[name][index] for name, index in zip(PLACE[1:], place, strict=True))
        cfg = replace(base, n_loops=n_loops, offset=offset, memory=memory)
        work[place] = flops(cfg, n_loops, settings["recipe"]["sequence"])
        memory_of = kv_bytes(cfg, n_loops)
        kept[place], fixed[place] = memory_of.per_token, memory_of.fixed
        learnt = parameters(cfg)
        once[place], looped[place] = learnt.once - learnt.looped, learnt.looped
    return {
        "flops": (PLACE[1:], work, {"units": "FLOP per token", "long_name": "forward, at the end of a sequence"}),
        "kv_bytes": (PLACE[1:], kept, {"units": "bytes per token", "long_name": "keys and values in 16 bits"}),
        "kv_bytes_fixed": (PLACE[1:], fixed, {"units": "bytes", "long_name": "windows and carries of a text"}),
        "parameters_once": (PLACE[1:], once, {"units": "1", "long_name": "parameters that a token uses once"}),
        "parameters_looped": (PLACE[1:], looped, {"units": "1", "long_name": "parameters that every loop uses"}),
    }


def _rates(abouts: dict[Cell, dict[str, Any]], axes: dict[str, list[Any]]) -> dict[str, Any]:
    rates = {cell.n_loops: about["recipe"]["learning_rate"] for cell, about in abouts.items()}
    long_name = "peak learning rate, the same for every offset and memory"
    return {"learning_rate": ("loops", [rates.get(loops, np.nan) for loops in axes["loops"]], {"long_name": long_name})}


def _search(folder: Path, axes: dict[str, list[Any]]) -> dict[str, Any]:
    """Losses of the short trainings that chose the rates."""
    found = [json.loads(file.read_text()) for file in sorted((folder / "search").glob("*.json"))]
    rates: Sequence[float] = sorted({entry["rate"] for entry in found})
    if not rates:
        return {}
    nll = np.full((*(len(axes[name]) for name in PLACE[1:]), len(rates)), np.nan)
    for entry in found:
        if entry["n_loops"] not in axes["loops"]:
            continue
        loops, rate = axes["loops"].index(entry["n_loops"]), rates.index(entry["rate"])
        if entry["n_loops"] == 1:
            nll[:, :, loops, rate] = entry["nll_fit"]
        elif entry["memory"] in axes["memory"] and entry["offset"] in axes["offset"]:
            memory, offset = axes["memory"].index(entry["memory"]), axes["offset"].index(entry["offset"])
            nll[memory, offset, loops, rate] = entry["nll_fit"]
    attributes = {"units": NATS, "long_name": "loss of short trainings on the documents to choose on"}
    return {"search_nll": ((*PLACE[1:], "rate"), nll, attributes), "rate": ("rate", rates)}
