"""The ranks of an example: those of torchrun, or processes of this machine where there is none."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(main: Callable[[Any], None], options: Any, ranks: int) -> None:
    """`main(options)` on every rank, with a process group: NCCL on GPUs, gloo elsewhere."""
    if "RANK" in os.environ:  # torchrun started this process
        _join(main, options)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_started, (main, options, ranks, port), nprocs=ranks)


def device() -> torch.device:
    """That of this rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _started(rank: int, main: Callable[[Any], None], options: Any, ranks: int, port: int) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="localhost")
    _join(main, options)


def _join(main: Callable[[Any], None], options: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        main(options)
        dist.barrier()
    finally:
        dist.destroy_process_group()
