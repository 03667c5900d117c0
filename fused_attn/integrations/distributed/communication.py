"""What goes between ranks: parts passed round a ring, heads against positions, an agreement.

Every byte of a call goes through here, so that `counting` can count it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TEXT = 512  # bytes of what a rank says of its call

_counters: list[dict[str, int]] = []


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Within this, the bytes that this rank sends to others: by kind, "ring" and "all_to_all".

    What ranks say to agree on a call is not among them; it is 512 bytes to each other rank.
    """
    counter = {"ring": 0, "all_to_all": 0}
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(kind: str, tensors: Sequence[Tensor], share: float = 1.0) -> None:
    for counter in _counters:
        counter[kind] += int(sum(x.numel() * x.element_size() for x in tensors) * share)


class Passing:
    """Tensors under way to the next rank, and the previous rank's under way here."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup, tag: int) -> None:
        rank, size = group.rank(), group.size()
        after = dist.get_global_rank(group, (rank + 1) % size)
        before = dist.get_global_rank(group, (rank - 1) % size)
        self._sent = [x.contiguous() for x in tensors]  # kept until it is gone
        self._got = [torch.empty_like(x) for x in self._sent]
        _count("ring", self._sent)
        sends = [dist.P2POp(dist.isend, x, after, group, tag) for x in self._sent]
        receives = [dist.P2POp(dist.irecv, x, before, group, tag) for x in self._got]
        with named_failures():
            self._works = dist.batch_isend_irecv([*sends, *receives]) if tensors else []

    def wait(self) -> list[Tensor]:
        """The previous rank's tensors."""
        with named_failures():
            for work in self._works:
                work.wait()
        return self._got


class _AllToAll(torch.autograd.Function):
    """Piece s of dimension 0 goes to rank s; what comes from it is piece s. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _exchange(dout, ctx.group), None


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x (n, ...) with piece s sent to rank s; differentiable."""
    return _AllToAll.apply(x, group)


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    found = torch.empty_like(x)
    size = group.size()
    _count("all_to_all", [x], (size - 1) / size)
    with named_failures():  # as bytes: gloo knows no bfloat16 here
        dist.all_to_all_single(found.view(torch.uint8), x.view(torch.uint8), group=group)
    return found


def gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's x; small things only."""
    found = [torch.empty_like(x) for _ in range(group.size())]
    with named_failures():
        dist.all_gather(found, x.contiguous(), group=group)
    return found


def first_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The group's first rank's x, on all ranks."""
    x = x.clone()
    with named_failures():
        dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
    return x


def agree(describe: Callable[[], str], *groups: dist.ProcessGroup) -> None:
    """All ranks say the same of a call, or all of them raise.

    Args:
        describe: what must be equal on all ranks, as text; may raise.
        groups: one, or two that cross each other (each of one meets each of the other): what goes
            wrong is told in the first, and by its members in theirs of the second.

    Raises:
        what `describe` raised here, or a ValueError that says which rank said what.
    """
    failure: Exception | None = None
    for group in groups:
        try:
            _agree_in(group, describe, failure)
        except _MISTAKES as error:
            failure = error
    if failure is not None:
        raise failure


_MISTAKES = (ValueError, TypeError, NotImplementedError)


def _agree_in(
    group: dist.ProcessGroup, describe: Callable[[], str], failure: Exception | None
) -> None:
    mine = f"-{failure}"
    if failure is None:
        try:
            mine = "+" + describe()
        except _MISTAKES as error:
            failure, mine = error, f"-{error}"
    if group.size() > 1:
        said = _what_all_say(mine, group)
        for rank, text in enumerate(said):
            if text.startswith("-") and failure is None:
                failure = ValueError(f"rank {rank} of the group refuses the call: {text[1:]}")
        if failure is None:
            _expect_equal(said)
    if failure is not None:
        raise failure


def _expect_equal(said: list[str]) -> None:
    for rank, text in enumerate(said):
        for mine, other in zip(said[0][1:].split("; "), text[1:].split("; "), strict=False):
            if mine != other:
                raise ValueError(
                    "all ranks of the group must make the same call with parts of one shape, got "
                    f"{mine} on rank 0 and {other} on rank {rank}"
                )


def _what_all_say(mine: str, group: dist.ProcessGroup) -> list[str]:
    text = mine.encode()[:_TEXT].ljust(_TEXT, b"\0")
    letters = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if "gloo" not in str(dist.get_backend_config(group)):
        letters = letters.to(torch.device("cuda", torch.cuda.current_device()))
    return [
        bytes(found.tolist()).rstrip(b"\0").decode(errors="ignore")
        for found in gather(letters, group)
    ]


@contextlib.contextmanager
def named_failures() -> Iterator[None]:
    """What a backend raises when a rank is gone or silent, as a RuntimeError that says so."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"a rank of the group is gone, or did not answer within its time-out: {error}"
        ) from error
