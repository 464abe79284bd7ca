"""From a name, a folder or a hub id to a model. Safetensors only, and no code of a checkpoint is ever run."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from importlib.resources import files
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopdiag.errors import InputError
from loopdiag.model.checkpoints import family_of
from loopdiag.model.checkpoints.common import Names, Rows
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.dtypes import STORED, as_dtype
from loopdiag.model.saving import INDEX, WEIGHTS

BUNDLED = Path(str(files("loopdiag.model") / "bundled"))
# Bytes that are read at a time. A file's pages count as memory of the process until it is closed, so it is opened anew
# for each piece.
PIECE = 2**26
CONFIG_FILES = ["config.json", "generation_config.json"]
TOKENIZER_FILES = [
    *("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template.jinja"),
]


class LoadError(InputError):
    """A checkpoint that cannot be loaded; the message says what was given, what is allowed and how to fix it."""


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / WEIGHTS).is_file())


def load(
    model: str | os.PathLike[str],
    *,
    n_loops: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> LoopedLM:
    """Load a looped model for measurement (in eval mode, without gradients).

    Everything that can be wrong with the files is found before a weight is read. Beside the model itself no more than a
    piece of one tensor is in memory at a time.

    Args:
        model: A bundled name (`bundled_models()`), a folder with `config.json` and safetensors, or a hub id
            `owner/name`.
        n_loops: Make hook points for this many loops at once, when more than trained will be run.
        dtype: What to compute in, such as `"float32"`; float32 when None, whatever the weights are stored in.
        device: Where the weights are read to.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Take a hub id from the hub's cache, without a network.

    Raises:
        InputError: The model is unknown; its files are missing, damaged, of an unsupported family, with settings that
            are not built, or of another shape than the configuration says; or the dtype is none that models run in.
    """
    target = as_dtype(dtype)
    folder = find(model, revision=revision, local_files_only=local_files_only)
    cfg, family = read_config(folder)
    with torch.device("meta"):
        net = LoopedLM(cfg)
    expected = net.state_dict()
    names = family.weight_names(cfg) if hasattr(family, "weight_names") else {name: name for name in expected}
    sources = _checked_sources(folder, names, expected)
    parameters = {name for name, _ in net.named_parameters()}
    state = {
        ours: _read(sources, names[ours], like.shape, target if ours in parameters else like.dtype, device)
        for ours, like in expected.items()
    }
    if cfg.tie_embeddings and _name(names.get("head.weight")) in sources:
        _check_copy(folder, sources, str(names["embed.weight"]), str(names["head.weight"]))
    net.load_state_dict(state, assign=True)
    net.tokenizer, net.source = _tokenizer(folder), os.fspath(model)
    net.stop_tokens = _stop_tokens(folder)
    net.ensure_loops(max(cfg.n_loops, n_loops or 1))
    return net.eval().requires_grad_(False)


def find(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The folder of a model; files of a hub id are fetched into the hub's cache.

    Args:
        model, revision, local_files_only: As for `load`.
        weights: Fetch the weights and the tokenizer, too.

    Raises:
        LoadError: There is no such model.
    """
    name = os.fspath(model)
    if name in bundled_models():
        return BUNDLED / name
    if name and Path(name).is_dir():
        return Path(name)
    if name and Path(name).exists():
        raise LoadError(f"{name} is a file: give the folder that holds config.json and {WEIGHTS}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise LoadError(
            f"There is no model {name!r}: bundled are {', '.join(bundled_models())}; "
            "else give an existing folder or a hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    patterns = CONFIG_FILES + (["*.safetensors", f"*{INDEX}", *TOKENIZER_FILES] if weights else [])
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
        where = "the hub's cache does not hold it" if local_files_only else "the hub did not give it"
        raise LoadError(
            f"{name!r} is no folder here, and {where}: {type(error).__name__}: "
            f"{next(iter(str(error).strip().splitlines()), 'no reason given')}"
        ) from error


def read_config(folder: Path) -> tuple[LoopedConfig, ModuleType]:
    """The configuration in a folder and the module of its family.

    Raises:
        LoadError: No readable `config.json`, a family that is not supported, or a setting that is not built.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise LoadError(f"{folder} has no config.json: it is no model folder.")
    keys = _json(file)
    try:
        family = family_of(keys)
        return family.read_config(keys), family
    except KeyError as missing:
        raise LoadError(f"{file}: the key {missing} is missing; {family.MODEL_TYPE} needs it.") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise LoadError(f"{file}: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{file} is not readable as JSON: {error}.") from None
    if not isinstance(keys, dict):
        raise LoadError(f"{file} holds a {type(keys).__name__}: it must be a JSON object.")
    return keys


# -- weights -----------------------------------------------------------------------------------------


def _checked_sources(folder: Path, names: Names, expected: dict[str, Tensor]) -> dict[str, Path]:
    """The file of every stored tensor, once names, shapes and types fit what the configuration asks for."""
    wanted: dict[str, tuple[int, ...]] = {}
    for ours, like in expected.items():
        source = names[ours]
        wanted[_name(source)] = source.shape if isinstance(source, Rows) else tuple(like.shape)
    allowed = set(wanted)
    if "head.weight" in names and "head.weight" not in expected:
        allowed.add(_name(names["head.weight"]))  # a copy of the embedding that the head is tied to
    sources = _weight_files(folder)
    missing, unexpected = sorted(set(wanted) - set(sources)), sorted(set(sources) - allowed)
    if missing or unexpected:
        raise LoadError(
            f"{folder}: the weights do not fit config.json: missing {_few(missing)}, unexpected {_few(unexpected)}."
        )
    for path in sorted(set(sources.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, held_by in sources.items() if held_by == path and name in wanted):
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != wanted[name]:
                    raise LoadError(
                        f"{path}: {name} has shape {tuple(stored.get_shape())}, but config.json asks for "
                        f"{wanted[name]}."
                    )
                if stored.get_dtype() not in STORED:
                    raise LoadError(
                        f"{path}: {name} is stored as {stored.get_dtype()}: allowed are {', '.join(STORED)} "
                        "(quantised weights are not read)."
                    )
    return sources


def _weight_files(folder: Path) -> dict[str, Path]:
    """Each stored tensor's name, with the file that holds it."""
    if (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise LoadError(f"{folder / INDEX} has no weight_map from tensors to files.")
        names = sorted(set(shards.values()))
        if strangers := [name for name in names if Path(name).name != name]:
            raise LoadError(f"{folder / INDEX} points out of its folder: {_few(strangers)}.")
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = f" {pickled[0]} is a pickle, which can run code: convert it to safetensors first." if pickled else ""
        raise LoadError(f"{folder} has no weights: {WEIGHTS} (or its index) is missing.{hint}")
    held: list[tuple[str, Path]] = []
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                held += [(tensor, folder / name) for tensor in file.keys()]  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{folder / name} is damaged, cut short or missing: {error}.") from None
    if twice := [tensor for tensor, count in Counter(tensor for tensor, _ in held).items() if count > 1]:
        raise LoadError(f"{folder}: {_few(twice)} stand in more than one file.")
    return dict(held)


def _read(
    sources: dict[str, Path], source: str | Rows, shape: torch.Size, dtype: torch.dtype, device: str | torch.device
) -> Tensor:
    """One of our tensors, piece by piece into `dtype` on `device`."""
    name = _name(source)
    first, stored = (
        (source.start, (source.stop - source.start, *source.shape[1:])) if isinstance(source, Rows) else (0, shape)
    )
    whole = torch.empty(tuple(stored), dtype=dtype, device=device)
    step = max(1, PIECE // max(1, 4 * prod(stored[1:])))
    for start in range(0, stored[0], step):
        stop = min(start + step, stored[0])
        with safe_open(sources[name], framework="pt") as file:
            whole[start:stop] = file.get_slice(name)[first + start : first + stop]
    return whole.reshape(shape)


def _check_copy(folder: Path, sources: dict[str, Path], embedding: str, head: str) -> None:
    """Refuse a stored head that is not the embedding it is said to be tied to."""
    with safe_open(sources[embedding], framework="pt") as one, safe_open(sources[head], framework="pt") as other:
        left, right = one.get_slice(embedding), other.get_slice(head)
        shape = left.get_shape()
        step = max(1, PIECE // (4 * shape[1]))
        same = right.get_shape() == shape and all(
            torch.equal(left[start : start + step], right[start : start + step]) for start in range(0, shape[0], step)
        )
    if not same:
        raise LoadError(f"{folder}: config.json ties the head to the embedding, but {head} is not {embedding}.")


def _name(source: str | Rows | None) -> str:
    return source.name if isinstance(source, Rows) else source or ""


def _few(names: list[str]) -> str:
    """Up to ten names for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


# -- beside the weights ------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None when it holds none that works without code of the checkpoint."""
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # It looks at config.json, too, and warns that it does not know the model, which it need not.
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        if (folder / "tokenizer.json").is_file():  # says everything by itself
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(f"{folder}: no tokenizer without running code of the checkpoint: {reason}", stacklevel=3)
        return None
    finally:
        logging.set_verbosity(level)


def _stop_tokens(folder: Path) -> tuple[int, ...]:
    """Tokens that end a text, as generation_config.json says, or else config.json."""
    for file in (folder / name for name in reversed(CONFIG_FILES)):
        stop = _json(file).get("eos_token_id") if file.is_file() else None
        if stop is not None:
            return tuple(stop) if isinstance(stop, list) else (stop,)
    return ()
