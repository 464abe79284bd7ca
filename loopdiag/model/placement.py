"""A model that is too large for one device: its layers on several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from loopdiag.model.decoder import LoopedLM
from loopdiag.model.layers import Layer

SHARE = 0.8  # of a GPU's free memory; the rest is for states, attention and logits

# Of each layer by its name, and under "" of everything else.
Places = Mapping[str, torch.device]


def room() -> Iterator[tuple[torch.device, float]]:
    """Devices in the order in which they are filled, and the bytes that weights may take: GPUs, then the processor.

    A GPU is asked when its turn comes: one that is not needed is left alone.
    """
    for gpu in range(torch.cuda.device_count()):
        yield torch.device("cuda", gpu), SHARE * torch.cuda.mem_get_info(gpu)[0]
    yield torch.device("cpu"), float("inf")


def placed(net: LoopedLM, dtype: torch.dtype, room: Iterable[tuple[torch.device, float]]) -> Places:
    """Where the parts of a model go: one device after the other is filled, so that what fits on one stands on it.

    Devices are passed over until one has room for everything but the layers, and one layer.

    Args:
        net: The model; its weights may be on the meta device.
        dtype: What they will be in.
        room: What there is, in the order in which it is filled; the last device takes all that is left.
    """

    def size(part: nn.Module) -> int:
        return sum(weight.numel() for weight in part.parameters()) * dtype.itemsize

    layers = {name: size(layer) for name, layer in _layers(net).items()}
    rest = size(net) - sum(layers.values())
    devices = iter(room)
    device, left = next(devices)
    while left < rest + max(layers.values()) and (following := next(devices, None)) is not None:
        device, left = following
    places = {"": device}
    left -= rest
    for name, needed in layers.items():
        while left < needed and (following := next(devices, None)) is not None:
            device, left = following
        places[name] = device
        left -= needed
    return places


def place_of(parameter: str, places: Places) -> torch.device:
    """The device of one parameter, by its name."""
    return next((device for name, device in places.items() if name and parameter.startswith(f"{name}.")), places[""])


def places_of(net: LoopedLM) -> Places:
    """Where the parts of a model are."""
    return {"": net.embed.weight.device} | {name: _device_of(layer) for name, layer in _layers(net).items()}


def connect(net: LoopedLM, places: Places) -> None:
    """Bring what a layer works on to its device, and the stream that it gives back; keys and values stay with it."""

    def bring(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, layout, *rest = given
        device = _device_of(layer)  # by now: `net.to` may have moved it
        return x.to(device), layout.to(device), *rest

    def give_back(layer: nn.Module, given: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Any, ...]:
        x, kept = made
        return x.to(net.embed.weight.device), kept

    for name, device in places.items():
        if device != places[""]:
            layer = net.get_submodule(name)
            layer.register_forward_pre_hook(bring)
            layer.register_forward_hook(give_back)


def _layers(net: LoopedLM) -> dict[str, Layer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Layer)}


def _device_of(part: nn.Module) -> torch.device:
    return next(part.parameters()).device
