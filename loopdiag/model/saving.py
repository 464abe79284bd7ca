"""From a model to a folder that `load` reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from loopdiag.errors import InputError
from loopdiag.files import whole
from loopdiag.model.checkpoints import iquestpltcoder, native
from loopdiag.model.decoder import LoopedLM
from loopdiag.model.dtypes import as_dtype

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def save(model: LoopedLM, folder: str | os.PathLike[str], dtype: torch.dtype | str | None = None) -> None:
    """Write a model: a Parallel Loop Transformer in the layout of LoopCoder-V2, any other in that of this toolkit.

    Each file appears whole or not at all; files of those names are replaced. Weights are stored in `dtype`, that of the
    model when None.

    Raises:
        InputError: The folder holds weights in several files, which would go on being read; `dtype` is none that
            models run in; or an intervention is going on, which may have changed the configuration.
    """
    if model.wiring.ongoing:
        raise InputError("An intervention is going on: save the model outside the with block that changes it.")
    stored, target = as_dtype(dtype or model.embed.weight.dtype), Path(folder)
    if (target / INDEX).exists():
        raise InputError(f"{target} holds a model in several files ({INDEX}): give another folder.")
    try:
        keys = iquestpltcoder.write_config(model.cfg)
        names = {ours: str(theirs) for ours, theirs in iquestpltcoder.weight_names(model.cfg).items()}
    except ValueError:
        keys = native.write_config(model.cfg)
        names = {name: name for name in model.state_dict()}
    parameters = dict(model.named_parameters())
    weights = {
        names[ours]: value.to("cpu", stored if ours in parameters else value.dtype).contiguous()
        for ours, value in model.state_dict().items()
    }
    keys["dtype"] = str(stored).removeprefix("torch.")
    if model.stop_tokens:
        keys["eos_token_id"] = list(model.stop_tokens)
    target.mkdir(parents=True, exist_ok=True)
    if model.tokenizer is not None:
        with TemporaryDirectory() as written:
            model.tokenizer.save_pretrained(written)
            for file in sorted(each for each in Path(written).rglob("*") if each.is_file()):
                place = target / file.relative_to(written)
                place.parent.mkdir(exist_ok=True)
                with whole(place) as partial:
                    partial.write_bytes(file.read_bytes())
    with whole(target / WEIGHTS) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    if (target / "generation_config.json").exists():  # it would go before config.json, with another model's stop tokens
        with whole(target / "generation_config.json") as partial:
            partial.write_text(json.dumps({"eos_token_id": list(model.stop_tokens) or None}) + "\n")
    with whole(target / "config.json") as partial:
        partial.write_text(json.dumps(keys, indent=2) + "\n")
