"""Measured results as files: a dataset with what is needed to measure it again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from reprlib import repr as short
from typing import Any, ClassVar, Self

import h5py
import numpy as np
import torch
import xarray as xr

from loopdiag import __version__
from loopdiag.errors import InputError
from loopdiag.files import whole
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.placement import places_of

# Bytes in memory that are read without a second look, and how many times its file's size a dataset may have beyond:
# a file of nothing but missing values is small, whatever it says it holds.
LARGE, MOST_PACKED = 2**30, 100
LARGEST_NUMBER = 8  # bytes

Layout = Mapping[str, tuple[str, ...]]
About = Mapping[str, type]


@dataclass(frozen=True)
class Result:
    """A dataset whose attribute `provenance` is a JSON object, kept in a netCDF file.

    Attributes:
        data: The numbers.
    """

    data: xr.Dataset

    # What it is, the command that writes it, the schema that this version reads, and what is raised for other files.
    KIND: ClassVar[str]
    WRITTEN_BY: ClassVar[str]
    SCHEMA: ClassVar[int]
    ERROR: ClassVar[type[InputError]]
    # What every such file holds: numbers and texts by name, with their dimensions, and types of keys of the provenance.
    NUMBERS: ClassVar[Layout]
    TEXTS: ClassVar[Layout]
    ABOUT: ClassVar[About]

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, weights, corpus, seed, dtype, versions; what is needed to measure the same again."""
        return json.loads(self.data.attrs["provenance"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a netCDF file, whole or not at all; a file of that name is replaced."""
        save_dataset(self.data.assign_attrs(kind=self.KIND), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: No such file, another kind of file, one of another schema, or one that lacks something.
        """
        if not Path(path).is_file():
            raise cls.ERROR(f"{path} is no file: give one that `{cls.WRITTEN_BY}` wrote.")
        try:
            data = _read(Path(path))
            about = json.loads(data.attrs["provenance"])
            schema, kind = about["schema"], str(data.attrs.pop("kind", "")) or None
        # Of many kinds, from h5py, h5netcdf and xarray: there is no end to what other people's and broken files hold.
        except Exception as error:
            raise cls.ERROR(f"{path} holds no {cls.KIND}: {type(error).__name__}: {error}.") from None
        if kind not in (None, cls.KIND) or (kind is None and schema == cls.SCHEMA):
            what = kind or "something else"
            raise cls.ERROR(f"{path} holds no {cls.KIND} but {what}: give a file that `{cls.WRITTEN_BY}` wrote.")
        if schema != cls.SCHEMA:  # files of the first schemas do not say their kind
            raise cls.ERROR(
                f"{path} has schema {schema}; this version of loopdiag reads {cls.SCHEMA}. Measure again: "
                f"`{cls.WRITTEN_BY}`."
            )
        if wrong := cls._wrong(data, about):
            raise cls.ERROR(f"{path} is no whole {cls.KIND}: {wrong}. Measure again: `{cls.WRITTEN_BY}`.")
        return cls(data)

    @classmethod
    def numbers(cls, data: xr.Dataset) -> Layout:
        """Names of numbers that a file must hold, and their dimensions."""
        return cls.NUMBERS

    @classmethod
    def _wrong(cls, data: xr.Dataset, about: dict[str, Any]) -> str | None:
        """What a file lacks, or has in another form; None where it is whole."""
        for kinds, layout in (("iuf", cls.numbers(data)), ("UOT", cls.TEXTS)):
            for name, dims in layout.items():
                if name not in data.variables:
                    return f"it has no {name}"
                if data[name].dims != dims or data[name].dtype.kind not in kinds:
                    return (
                        f"its {name} has dimensions ({', '.join(map(str, data[name].dims))}) and type "
                        f"{data[name].dtype}, which should be {'texts' if kinds == 'UOT' else 'numbers'} by "
                        f"({', '.join(dims)})"
                    )
        if empty := [dim for dim, size in data.sizes.items() if size == 0]:
            return f"it has no {', '.join(map(str, empty))}"
        for key, kind in cls.ABOUT.items():
            if key not in about:
                return f"its provenance has no {key}"
            if not isinstance(about[key], kind):
                return f"{key} in its provenance is {short(about[key])}, which should be of type {kind.__name__}"
        return None


def save_dataset(data: xr.Dataset, path: Path) -> None:
    """Write a netCDF file, whole or not at all."""
    encoding = {name: {"zlib": True} for name in data.data_vars}
    content = data.to_netcdf(engine="h5netcdf", encoding=encoding)
    with whole(path) as partial_file:  # not by HDF5 itself, which ends the process where a disk is full
        partial_file.write_bytes(content)


def _read(path: Path) -> xr.Dataset:
    """The dataset of a file that holds all of it itself."""
    size, needed = path.stat().st_size, 0
    most = max(LARGE, MOST_PACKED * size)
    with h5py.File(path) as file:
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name} is a link, and may lead to another file")
            entry = file[name]
            if not isinstance(entry, h5py.Dataset):
                continue
            if entry.external or entry.is_virtual:
                raise ValueError(f"{name} stands in another file")
            needed += entry.size * max(LARGEST_NUMBER, entry.dtype.itemsize)  # xarray may make them larger
            if needed <= most and h5py.check_string_dtype(entry.dtype):
                needed += _text_bytes(entry, max(1, most // size), most - needed)
            if needed > most:
                raise ValueError(f"it would take {needed:,} bytes of memory, or more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's HDF5 files, which are refused
        with xr.open_dataset(path, engine="h5netcdf") as data:
            return data.load()


def _text_bytes(texts: h5py.Dataset, together: int, most: int) -> int:
    """Bytes of all texts, counted until there are more than `most`; no more are held than `together`.

    Texts of any length may all refer to the same bytes of the file.
    """
    if not texts.shape:
        return len(texts[()])
    found = 0
    for place in np.ndindex(texts.shape[:-1]):
        for start in range(0, texts.shape[-1], together):
            found += sum(map(len, texts[(*place, slice(start, start + together))]))
            if found > most:
                return found
    return found


def about_model(model: LoopedLM) -> dict[str, Any]:
    """Which model it was, and what it ran in."""
    weight = model.embed.weight
    return {
        "weights_sha256": weights_hash(model),
        "config": asdict(model.cfg),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": _devices(model),
    }


def _devices(model: LoopedLM) -> str:
    """The kind of device that a model is on, and what is elsewhere: rounding differs between kinds."""
    home, *layers = (device.type for device in places_of(model).values())
    elsewhere = Counter(kind for kind in layers if kind != home)
    return ", ".join([home, *(f"{count} of {len(layers)} layers on {kind}" for kind, count in elsewhere.items())])


def weights_hash(model: LoopedLM) -> str:
    """sha256 over the names and values of all weights, as loaded: another dtype is another hash."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def about_machine() -> dict[str, Any]:
    """What else the last digits depend on."""
    packages = {name: version(name) for name in ("torch", "numpy", "transformer-lens", "transformers")}
    versions = {"loopdiag": __version__, "python": platform.python_version()} | packages
    return {"threads": torch.get_num_threads(), "versions": versions}
