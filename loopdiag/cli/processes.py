"""Processes that a launcher started: accelerate, torchrun, or MPI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from loopdiag.cli.output import stderr
from loopdiag.errors import InputError

# What torchrun, and MPI for processors, say to the processes that they start, and accelerate reads.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANKS = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
)
PLACES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
MEETING = timedelta(minutes=10)  # for all to start
LONGEST_WAIT = timedelta(days=7)  # for one that is at work; that its connection broke is noticed at once


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

        try:
            store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=MEETING))
        except dist.DistError as error:
            raise RuntimeError(
                f"Not all of the {size} processes that WORLD_SIZE or MPI tells of have come ({error}): start all, on "
                "several machines with MASTER_ADDR and MASTER_PORT of the first, or unset WORLD_SIZE for one alone."
            ) from None
        # Whatever the devices are: only words are exchanged.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def refuse_group(command: str) -> None:
    """Refuse to do the same thing in every process that a launcher started, into the same files.

    Raises:
        InputError: There are several.
    """
    if (size := _told(SIZES, 1)) > 1:
        raise InputError(
            f"`loopdiag {command}` is for one process, and {size} were started: share a diagnosis among them "
            "(`loopdiag diagnose`), and give its file to this."
        )


def _told(names: Sequence[str], default: int) -> int:
    for name in names:
        if name in os.environ:
            if not os.environ[name].isdecimal():
                raise InputError(f"{name} = {os.environ[name]!r} in the environment is no number: unset it.")
            return int(os.environ[name])
    return default


def _take_device() -> None:
    """See one device alone, of those that a launcher gave, in turn."""
    local = _told(LOCAL_RANKS, -1)
    if local >= 0:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", str(local)).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local % len(names)]
