"""Worlds of processes that stay for a whole session: to start one takes longer than a test.

    world(4).run(function, *args)  # function(rank, *args) on each of four gloo ranks

What a rank raises is raised here, with the rank's own traceback in the message.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
# Long enough for a slow machine, and far from a test's own end.
PATIENCE = datetime.timedelta(seconds=60)


class World:
    """`size` processes with a process group of gloo, which wait for functions to run."""

    def __init__(self, size: int, timeout: datetime.timedelta = PATIENCE) -> None:
        context = multiprocessing.get_context("forkserver")
        # Imported once, before the processes part.
        context.set_forkserver_preload(["torch.distributed.tensor", "fused_attn", __name__])
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        self.closed = False
        os.environ["OMP_NUM_THREADS"] = "1"  # read where OpenMP loads: in the server
        for rank in range(size):
            mine, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            args = (theirs, rank, size, store, timeout, list(sys.path))
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        for pipe in self._pipes:
            pipe.send((function, args))

    def answers(self, seconds: float = 300.0) -> list[tuple[bool, Any]]:
        """Of each rank: (True, result) or (False, what it raised, as text); None for a dead one."""
        found = []
        for pipe in self._pipes:
            try:
                if not pipe.poll(seconds):
                    self.close()
                    raise TimeoutError(f"a rank hangs: no answer in {seconds} s")
                found.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                found.append((False, None))
        return found

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of all ranks."""
        self.start(function, *args)
        answers = self.answers()
        wrong = [f"rank {rank}: {text}" for rank, (right, text) in enumerate(answers) if not right]
        assert not wrong, "\n".join(wrong)
        return [result for _, result in answers]

    def errors(self, function: Callable[..., Any], *args: Any) -> list[str]:
        """What all ranks raise, as text; none may get through."""
        self.start(function, *args)
        answers = self.answers()
        assert not any(right for right, _ in answers), f"some ranks raise nothing: {answers}"
        return [str(text) for _, text in answers]

    def close(self) -> None:
        self.closed = True
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(
    pipe: Any,
    rank: int,
    size: int,
    store: str,
    timeout: datetime.timedelta,
    path: list[str],
) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    group = {"rank": rank, "world_size": size, "timeout": timeout}
    dist.init_process_group("gloo", store=dist.FileStore(store, size), **group)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)  # torch's threads may abort an orderly end
        torch.manual_seed(0)
        try:
            answer = (True, function(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


_worlds: dict[int, World] = {}


def world(size: int) -> World:
    """The session's world of that size."""
    if size not in _worlds or _worlds[size].closed:
        _worlds[size] = World(size)
        atexit.register(_worlds[size].close)
    return _worlds[size]
