"""From a name, a folder or a hub id to a model. Safetensors only, and no code of a checkpoint is ever run."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
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
from loopdiag.model.placement import connect, place_of, placed, room
from loopdiag.model.saving import INDEX, WEIGHTS

BUNDLED = Path(str(files("loopdiag.model") / "bundled"))
LARGEST_JSON = 2**26  # bytes; the index of a model in thousands of tensors has less than a hundredth
# Bytes that are read at a time. A file's pages count as memory of the process until it is closed, so it is opened anew
# for each piece.
PIECE = 2**26
SHARD = re.compile(r"[\w.-]+\.safetensors")
CONFIG_FILES = ["config.json", "generation_config.json"]
TOKENIZER_FILES = [
    *("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template.jinja"),
]


class LoadError(InputError):
    """A checkpoint that cannot be loaded; the message says what was given, what is allowed and how to fix it."""


def bundled_models() -> list[str]:
    """Names of the models that come with the package.

    Example:
        >>> bundled_models()
        ['tiny-plt-1', 'tiny-plt-2', 'tiny-plt-3', 'tiny-plt-4']
    """
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

    What can be wrong with the files is found before a weight is read, but for weights that are not finite. Beside the
    model itself no more than a piece of one tensor is in memory at a time.

    Args:
        model: A bundled name (`bundled_models()`), a folder with `config.json` and safetensors, or a hub id
            `owner/name`.
        n_loops: Make hook points for this many loops at once, when more than trained will be run.
        dtype: What to compute in, such as `"float32"`; float32 when None, whatever the weights are stored in.
        device: Where the weights are read to. `"auto"` fills the GPUs that torch sees, layer by layer and up to four
            fifths of their free memory, then the processor; what is measured in a layer is measured on its device.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Take a hub id from the hub's cache, without a network.

    Raises:
        InputError: The model is unknown; its files are missing, damaged, of an unsupported family, with settings that
            are not built, of another shape than the configuration says, or with numbers that are not finite; or the
            dtype is none that models run in.

    Example:
        >>> model = load("tiny-plt-4")
        >>> model.cfg.n_loops, model.cfg.offset, model.cfg.d_model
        (4, 1, 128)
    """
    target, place = as_dtype(dtype), None if device == "auto" else _device(device)
    if n_loops is not None and (isinstance(n_loops, bool) or not isinstance(n_loops, int) or n_loops < 1):
        raise LoadError(f"n_loops = {n_loops!r} is not allowed: it must be an integer >= 1, or None.")
    folder = find(model, revision=revision, local_files_only=local_files_only)
    cfg, family = read_config(folder)
    if _is_hub_id(model):
        _fetch_weights(os.fspath(model), folder, local_files_only)
    with torch.device("meta"):
        net = LoopedLM(cfg)
    expected = net.state_dict()
    names = family.weight_names(cfg) if hasattr(family, "weight_names") else {name: name for name in expected}
    redundant = family.redundant(cfg) if hasattr(family, "redundant") else {}
    sources = _checked_sources(folder, names, expected, redundant)
    net.tokenizer, net.stop_tokens, net.source = read_tokenizer(folder), _stop_tokens(folder), os.fspath(model)
    parameters = {name for name, _ in net.named_parameters()}
    places = placed(net, target, room()) if place is None else {"": place}
    state = {}
    for ours, like in expected.items():
        kept_in = target if ours in parameters else like.dtype
        state[ours] = _read(sources, names[ours], like.shape, kept_in, place_of(ours, places))
    net.load_state_dict(state, assign=True)
    connect(net, places)
    net.ensure_loops(max(cfg.n_loops, n_loops or 1))
    return net.eval().requires_grad_(False)


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise LoadError(f"device {device!r} is not known to torch: use 'cpu', 'cuda', 'cuda:1' or 'auto'.") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"device {device!r}: torch sees no GPU here. Use 'cpu'.")
    try:
        torch.zeros(1, device=place).tolist()
    except Exception as error:  # of many kinds: torch has as many as devices
        raise LoadError(
            f"device {device!r} does not work here ({type(error).__name__}): use 'cpu', 'cuda', 'cuda:1' or 'auto'."
        ) from None
    return place


def find(model: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a model; of a hub id, the configuration is fetched into the hub's cache.

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
    if not _is_hub_id(name):
        raise LoadError(
            f"There is no model {name!r}: bundled are {', '.join(bundled_models())}; "
            "else give an existing folder or a hub id (owner/name)."
        )
    return _fetch(name, CONFIG_FILES, revision, local_files_only)


def _is_hub_id(model: str | os.PathLike[str]) -> bool:
    name = os.fspath(model)
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _fetch(name: str, files: list[str], revision: str | None, local_files_only: bool) -> Path:
    """The hub cache's folder of a commit, with these files in it as far as the hub has them."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=local_files_only))
    except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
        where = "the hub's cache does not hold it" if local_files_only else "the hub did not give it"
        raise LoadError(
            f"{name!r} is no folder here, and {where}: {type(error).__name__}: "
            f"{next(iter(str(error).strip().splitlines()), 'no reason given')}"
        ) from error


def _fetch_weights(name: str, folder: Path, local_files_only: bool) -> None:
    """Fetch what `load` reads beside the configuration, of the same commit, whose name the folder has."""
    _fetch(name, [INDEX, *TOKENIZER_FILES], folder.name, local_files_only)
    _fetch(name, _shards(folder) or [WEIGHTS], folder.name, local_files_only)
    if local_files_only and not any((folder / file).exists() for file in (INDEX, WEIGHTS)):
        raise LoadError(f"The hub's cache holds no weights of {name}: load it once without local_files_only.")


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
    except (ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{file}: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise LoadError(f"{file} has {size:,} bytes: allowed are {LARGEST_JSON:,}. It is none of a model's.")
        keys = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror}.") from None
    # Broken, not UTF-8, nested without end, or with a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{file} is not readable as JSON: {error}.") from None
    if not isinstance(keys, dict):
        raise LoadError(f"{file} holds a {type(keys).__name__}: it must be a JSON object.")
    return keys


# -- weights -----------------------------------------------------------------------------------------


def _checked_sources(
    folder: Path, names: Names, expected: dict[str, Tensor], redundant: dict[str, Tensor]
) -> dict[str, Path]:
    """The file of every stored tensor, once names, shapes and types fit what the configuration asks for."""
    wanted: dict[str, tuple[int, ...]] = {}
    for ours, like in expected.items():
        source = names[ours]
        wanted[_name(source)] = source.shape if isinstance(source, Rows) else tuple(like.shape)
    extra = {name: tuple(values.shape) for name, values in redundant.items()}
    embedding, head = _name(names["embed.weight"]), _name(names.get("head.weight", ""))
    if "head.weight" not in expected:
        extra[head] = wanted[embedding]  # a copy of the embedding that the head is tied to
    sources = _weight_files(folder)
    missing, unexpected = sorted(set(wanted) - set(sources)), sorted(set(sources) - set(wanted) - set(extra))
    if missing or unexpected:
        raise LoadError(
            f"{folder}: the weights do not fit config.json: missing {_few(missing)}, unexpected {_few(unexpected)}."
        )
    for path in sorted(set(sources.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, held_by in sources.items() if held_by == path):
                stored, shape = file.get_slice(name), (wanted | extra)[name]
                if tuple(stored.get_shape()) != shape:
                    raise LoadError(
                        f"{path}: {name} has shape {tuple(stored.get_shape())}, but config.json asks for {shape}."
                    )
                if stored.get_dtype() not in STORED:
                    raise LoadError(
                        f"{path}: {name} is stored as {stored.get_dtype()}: allowed are {', '.join(STORED)} "
                        "(quantised weights are not read)."
                    )
    if head in sources and head in extra and not _same(sources, embedding, head):
        raise LoadError(f"{folder}: config.json ties the head to the embedding, but {head} is not {embedding}.")
    for name in sources.keys() & redundant.keys():
        found = _read(sources, name, redundant[name].shape, torch.float64, torch.device("cpu"))
        # As close as half precisions hold it.
        if not torch.allclose(found, redundant[name], rtol=1e-2, atol=0):
            raise LoadError(f"{folder}: {name} does not have the values that config.json implies.")
    return sources


def _shards(folder: Path) -> list[str]:
    """The files that an index of weights names; none without an index."""
    if not (folder / INDEX).is_file():
        return []
    shards = _json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise LoadError(f"{folder / INDEX} has no weight_map from tensors to files.")
    names = sorted(set(shards.values()))
    if strangers := [name for name in names if not SHARD.fullmatch(name)]:
        raise LoadError(
            f"{folder / INDEX} names {_few([repr(name) for name in strangers])}: allowed are safetensors files of its "
            "own folder, by their name."
        )
    return names


def _weight_files(folder: Path) -> dict[str, Path]:
    """Each stored tensor's name, with the file that holds it."""
    names = _shards(folder) or [WEIGHTS]
    if not (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = f" {pickled[0]} is a pickle, which can run code: convert it to safetensors first." if pickled else ""
        raise LoadError(f"{folder} has no weights: {WEIGHTS} (or its index) is missing.{hint}")
    held: list[tuple[str, Path]] = []
    for name in names:
        if not os.path.isfile(folder / name):  # a pipe would be waited for
            raise LoadError(f"{folder / name} is damaged, cut short or missing: there is no such file.")
        try:
            with safe_open(folder / name, framework="pt") as file:
                held += [(tensor, folder / name) for tensor in file.keys()]  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{folder / name} is damaged, cut short or missing: {error}.") from None
    if twice := [tensor for tensor, count in Counter(tensor for tensor, _ in held).items() if count > 1]:
        raise LoadError(f"{folder}: {_few(twice)} stand in more than one file.")
    return dict(held)


def _pieces(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of a tensor of this shape that are read at a time."""
    step = max(1, PIECE // max(1, 4 * prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _rows(sources: dict[str, Path], name: str, rows: slice) -> Tensor:
    with safe_open(sources[name], framework="pt") as file:
        return file.get_slice(name)[rows]


def _read(
    sources: dict[str, Path], source: str | Rows, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One of our tensors, piece by piece into `dtype` on `device`; refused where a number is not finite."""
    name, first, stored = _name(source), 0, tuple(shape)
    if isinstance(source, Rows):
        first, stored = source.start, (source.stop - source.start, *source.shape[1:])
    whole = torch.empty(stored, dtype=dtype, device=device)
    for rows in _pieces(stored):
        whole[rows] = _rows(sources, name, slice(first + rows.start, first + rows.stop))
    if not all(end.isfinite() for end in whole.aminmax()):
        wider = " Where the stored ones are finite, load them in float32 or bfloat16." if dtype == torch.float16 else ""
        raise LoadError(
            f"{sources[name]}: {name} holds numbers that are NaN or infinite as {str(dtype).removeprefix('torch.')}: "
            f"allowed are finite ones. Get the file again from where it came.{wider}"
        )
    return whole.reshape(tuple(shape))


def _same(sources: dict[str, Path], one: str, other: str) -> bool:
    """Whether two stored tensors of one shape hold the same numbers."""
    with safe_open(sources[one], framework="pt") as file:
        shape = file.get_slice(one).get_shape()
    return all(torch.equal(_rows(sources, one, rows), _rows(sources, other, rows)) for rows in _pieces(shape))


def _name(source: str | Rows) -> str:
    return source.name if isinstance(source, Rows) else source


def _few(names: list[str]) -> str:
    """Up to ten names for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


# -- beside the weights ------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None when it holds none that works without code of the checkpoint."""
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    # tokenizer.json says everything by itself. Classes of AutoTokenizer may cut text by a rule of their own instead.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # It looks at config.json, too, and warns that it does not know the model, which it need not.
            warnings.simplefilter("ignore")
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: files that are damaged, unknown, or ask for code of the checkpoint
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no reason given')}"
        if kind is PreTrainedTokenizerFast:
            raise LoadError(f"{folder}: the tokenizer's files are damaged: {reason}") from None
        warnings.warn(f"{folder}: no tokenizer without running code of the checkpoint: {reason}", stacklevel=3)
        return None
    finally:
        logging.set_verbosity(level)


def _stop_tokens(folder: Path) -> tuple[int, ...]:
    """Tokens that end a text, as generation_config.json says, or else config.json."""
    for file in (folder / name for name in reversed(CONFIG_FILES)):
        stop = _json(file).get("eos_token_id") if file.is_file() else None
        if stop is not None:
            tokens = tuple(stop) if isinstance(stop, list) else (stop,)
            if not all(isinstance(token, int) for token in tokens):
                raise LoadError(
                    f"{file}: eos_token_id = {stop!r} is not allowed: it must be a token or a list of tokens."
                )
            return tokens
    return ()
