"""Processes that a launcher started: accelerate, torchrun, or MPI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from loopdiag.cli.output import stderr

# What torchrun, and MPI for processors, say to the processes that they start, and accelerate reads.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PLACES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST_WAIT = timedelta(days=7)  # for a process that is at work; one that died is noticed at once


def apart() -> int:
    """This process' number among those that were started; each works for itself, on its own device.

    What the launcher says of a group goes away, or each Trainer would wait for the others to train the same model.
    """
    rank = _told(RANKS, 0)
    _take_device()
    for name in (*RANKS, *SIZES, *PLACES):
        os.environ.pop(name, None)
    return rank


@contextmanager
def together(quiet: bool) -> Iterator[bool]:
    """Join the processes that were started, each on its own device; whether this is the first of them."""
    rank, size = _told(RANKS, 0), _told(SIZES, 1)
    if size == 1:
        yield True
        return
    _take_device()
    # MPI says neither; then all are on one machine, as accelerate takes it.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")

    with nullcontext() if quiet or rank > 0 else stderr.status(f"waiting for {size} processes"):
        import torch.distributed as dist

        # Whatever the devices are: only words are exchanged.
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=LONGEST_WAIT)
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def _told(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _take_device() -> None:
    """See one device alone, of those that a launcher gave, in turn."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", local).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(local) % len(names)]
