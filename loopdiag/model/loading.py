"""From a name, a folder or a hub id to a model. Safetensors only, and no code of a checkpoint is ever run."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopdiag.errors import InputError
from loopdiag.files import whole
from loopdiag.model.checkpoints import FAMILIES
from loopdiag.model.config import LoopedConfig
from loopdiag.model.decoder import LoopedLM

BUNDLED = Path(str(files("loopdiag.model") / "bundled"))
WEIGHTS = "model.safetensors"


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
) -> LoopedLM:
    """Load a looped model for measurement (in eval mode, without gradients).

    Args:
        model: A bundled name (`bundled_models()`), a folder with `config.json` and safetensors, or a hub id
            `owner/name`.
        n_loops: Make hook points for this many loops at once, when more than trained will be run.
        dtype: What to compute in, such as `"float32"`; float32 when None, whatever the weights are stored in.
        device: Where the model goes.
        revision: Commit or tag of a hub id.

    Raises:
        LoadError: The model is unknown, or its files are missing, damaged, of an unsupported family or of
            another shape than the configuration says.
    """
    folder = find(model, revision=revision)
    cfg, family = read_config(folder)
    net = LoopedLM(cfg)
    net.load_state_dict(_read_weights(folder, net, family.weight_names(cfg)), assign=False)
    net.tokenizer, net.source = _tokenizer(folder), os.fspath(model)
    net.ensure_loops(max(cfg.n_loops, n_loops or 1))
    return net.to(device=device, dtype=as_dtype(dtype)).eval().requires_grad_(False)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """`"bfloat16"` to `torch.bfloat16`; None is float32.

    Raises:
        LoadError: Not a floating type that models run in.
    """
    allowed = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
    if dtype is None:
        return torch.float32
    chosen = allowed.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in allowed.values():
        raise LoadError(f"dtype {dtype!r} is not allowed: use {', '.join(allowed)}.")
    return chosen


def find(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The folder of a model; files of a hub id are fetched into the hub's cache.

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

    patterns = [
        "config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "tokenizer*",
        "*.model",
        "special_tokens_map.json",
    ]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
        raise LoadError(
            f"{name!r} is no folder here, and the hub did not give it: {type(error).__name__}: "
            f"{next(iter(str(error).strip().splitlines()), 'no reason given')}"
        ) from error


def read_config(folder: Path) -> tuple[LoopedConfig, Any]:
    """The configuration in a folder and the module of its family.

    Raises:
        LoadError: No readable `config.json`, or a family that is not supported.
    """
    file = folder / "config.json"
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{folder} has no config.json: it is no model folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{file} is not readable as JSON: {error}.") from None
    model_type = keys.get("model_type") if isinstance(keys, dict) else None
    if model_type not in FAMILIES:
        raise LoadError(f"{file}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    try:
        return family.read_config(keys), family
    except (ValueError, TypeError) as error:
        raise LoadError(f"{file}: {error}") from None


def _weight_files(folder: Path) -> dict[str, Path]:
    """Each stored tensor's name, with the file that holds it."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f" {pickled[0]} is a pickle, which can run code: convert it to safetensors first." if pickled else ""
        raise LoadError(f"{folder} has no weights: {WEIGHTS} (or its index) is missing.{hint}")
    held: dict[str, Path] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                held |= dict.fromkeys(file.keys(), folder / name)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{folder / name} is damaged or cut short: {error}.") from None
    return held


def _read_weights(folder: Path, net: LoopedLM, names: dict[str, str]) -> dict[str, Tensor]:
    """The state dict of `net`, checked against the stored names and shapes before anything is read."""
    held = _weight_files(folder)
    missing, unexpected = sorted(set(names.values()) - set(held)), sorted(set(held) - set(names.values()))
    if missing or unexpected:
        raise LoadError(
            f"{folder}: the weights do not fit config.json: missing {missing or 'none'}, "
            f"unexpected {unexpected or 'none'}."
        )
    expected = {ours: parameter.shape for ours, parameter in net.state_dict().items()}
    state: dict[str, Tensor] = {}
    for path in sorted(set(held.values())):
        with safe_open(path, framework="pt") as file:
            mine = {ours: theirs for ours, theirs in names.items() if held[theirs] == path}
            for ours, theirs in mine.items():
                shape = tuple(file.get_slice(theirs).get_shape())
                if shape != tuple(expected[ours]):
                    raise LoadError(
                        f"{path}: {theirs} has shape {shape}, but config.json asks for {tuple(expected[ours])}."
                    )
            state |= {ours: file.get_tensor(theirs) for ours, theirs in mine.items()}
    return state


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None when it holds none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def save(model: LoopedLM, folder: str | os.PathLike[str], dtype: torch.dtype | str | None = None) -> None:
    """Write a model in the `iquestpltcoder` layout; `load` reads it back.

    Each file appears whole or not at all. Weights are stored in `dtype`, float32 when None.

    Raises:
        ValueError: The model is no Parallel Loop Transformer.
    """
    family = FAMILIES["iquestpltcoder"]
    keys = family.write_config(model.cfg)
    state = model.state_dict()
    stored = as_dtype(dtype)
    weights = {
        theirs: state[ours].to("cpu", stored).contiguous() for ours, theirs in family.weight_names(model.cfg).items()
    }
    keys["dtype"] = str(stored).removeprefix("torch.")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with whole(target / WEIGHTS) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    with whole(target / "config.json") as partial:
        partial.write_text(json.dumps(keys, indent=2) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(target)
