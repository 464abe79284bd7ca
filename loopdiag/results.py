"""Measured results as files: a dataset with what is needed to measure it again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import xarray as xr

from loopdiag import __version__
from loopdiag.errors import InputError
from loopdiag.files import whole
from loopdiag.model.decoder import LoopedLM


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

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, weights, corpus, seed, dtype, versions; what is needed to measure the same again."""
        return json.loads(self.data.attrs["provenance"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a netCDF file, whole or not at all; a file of that name is replaced."""
        encoding = {name: {"zlib": True} for name in self.data.data_vars}
        with whole(Path(path)) as partial_file:
            self.data.assign_attrs(kind=self.KIND).to_netcdf(partial_file, engine="h5netcdf", encoding=encoding)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: No such file, another kind of file, or one of another schema.
        """
        if not Path(path).is_file():
            raise cls.ERROR(f"{path} is no file: give one that `{cls.WRITTEN_BY}` wrote.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other people's HDF5 files, refused below
                data = xr.load_dataset(path, engine="h5netcdf")
            schema, kind = json.loads(data.attrs["provenance"])["schema"], data.attrs.pop("kind", None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise cls.ERROR(f"{path} holds no {cls.KIND}: {type(error).__name__}: {error}.") from None
        if kind not in (None, cls.KIND) or (kind is None and schema == cls.SCHEMA):
            what = kind or "something else"
            raise cls.ERROR(f"{path} holds no {cls.KIND} but {what}: give a file that `{cls.WRITTEN_BY}` wrote.")
        if schema != cls.SCHEMA:  # files of the first schemas do not say their kind
            raise cls.ERROR(
                f"{path} has schema {schema}; this version of loopdiag reads {cls.SCHEMA}. Measure again: "
                f"`{cls.WRITTEN_BY}`."
            )
        return cls(data)


def about_model(model: LoopedLM) -> dict[str, Any]:
    """Which model it was, and what it ran in."""
    weight = model.embed.weight
    return {
        "weights_sha256": weights_hash(model),
        "config": asdict(model.cfg),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }


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
