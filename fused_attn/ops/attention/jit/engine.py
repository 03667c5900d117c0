"""Keeps machine code by what it was made of, and decides when it is worth its making."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import llvm
from .assembly import assembly_of
from .operations import CALLED
from .program import Leaf, Program, bytes_of, leaf_of, read

_MODES = ("auto", "on", "off")
_MOST = 128  # programs
# Code takes 10 to 25 ms to make. So many instructions on pairs later it has been worth that: it
# saves 0.05 to 0.4 ns of each (Zen 3, L 512 and 2048).
_WORTH = 1 << 27
_FEW_PAIRS = 1 << 14  # of a call: to look for code would take part of its time, and save none
_ADDRESS = 6  # its place in a program's header (csrc/attention/function_arguments.h)


@dataclass
class _Kept:
    """What is known of one program.

    Attributes:
        work: instructions on pairs that have been asked for.
        code, rows: its machine code, and the program with the code's address; None: none yet.
        failure: why none can be made.
    """

    work: float = 0.0
    code: llvm.Code | None = None
    rows: Tensor | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Ready:
    """Functions as they are to be run.

    Attributes:
        functions: as `attention_forward_with_functions` takes them.
        code: what must live while they run.
        note: how they run, in words.
    """

    functions: tuple[Any, ...]
    code: list[llvm.Code] = field(default_factory=list)
    note: str = ""


_kept: OrderedDict[Hashable, _Kept] = OrderedDict()
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not find it, or LLVM's own, held by nobody
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def mode() -> str:
    """FUSED_ATTN_JIT: "auto" (code where it is worth its making), "on" (always), "off" (never)."""
    value = os.environ.get("FUSED_ATTN_JIT", "auto")
    if value not in _MODES:
        raise ValueError(f"FUSED_ATTN_JIT must be one of {', '.join(_MODES)}, got {value!r}")
    return value


def why_not() -> str | None:
    """Why functions are interpreted, whatever they are; None if they need not be."""
    return "FUSED_ATTN_JIT=off" if mode() == "off" else llvm.why_not()


def _said(reason: str) -> str:
    return f"functions are interpreted: {reason}"


def ready(functions: tuple[Any, ...], dtype: torch.dtype, pairs: int) -> Ready:
    """The same functions, with machine code where there is or should be some.

    Args:
        functions: (mask, score, sums, kinds, block_q, block_k, number of leaves, leaf, its
            gradient, ...).
        dtype: of q, k and v.
        pairs: of queries and keys, in all heads.
    """
    against = why_not()
    if against is None and pairs < _FEW_PAIRS and mode() != "on":
        against = "few pairs"
    if against is not None:
        return Ready(functions, note=_said(against))
    programs, rest = functions[:3], functions[3:]
    leaves = [leaf_of(*both) for both in zip(rest[4::2], rest[5::2], strict=True)]
    wide = dtype == torch.float64
    found: list[Tensor | None] = []
    code: list[llvm.Code] = []
    failures: list[str] = []
    for rows, mask in zip(programs, (True, False, False), strict=True):
        kept = None if rows is None else _made(rows, leaves, wide, mask, pairs)
        found.append(rows if kept is None or kept.rows is None else kept.rows)
        if kept is not None and kept.code is not None:
            code.append(kept.code)
        elif kept is not None:
            failures.append(kept.failure or "few pairs so far, machine code would take longer")
    note = _said(failures[0]) if failures else "functions are machine code"
    return Ready((*found, *rest), code, note)


def _made(rows: Tensor, leaves: Sequence[Leaf], wide: bool, mask: bool, pairs: int) -> _Kept:
    data = bytes_of(rows)
    key = (data, tuple(leaves), wide, mask)
    with _lock:
        kept = _kept.get(key)
        if kept is None:
            kept = _kept[key] = _Kept()
            if len(_kept) > _MOST:
                _kept.popitem(last=False)
        else:
            _kept.move_to_end(key)
        if kept.code is None and kept.failure is None:
            kept.work += pairs * len(rows)
            if kept.work >= _WORTH or mode() == "on":
                _make(kept, data, rows, leaves, wide, mask)
    return kept


def _make(
    kept: _Kept, data: bytes, rows: Tensor, leaves: Sequence[Leaf], wide: bool, mask: bool
) -> None:
    kept.failure = llvm.broken()
    if kept.failure is not None:
        return
    try:
        program = read(rows)
        if mode() != "on" and _mostly_calls(program):
            kept.failure = "they are calls of the C library, and take their time either way"
            return
        kept.code = llvm.Code(assembly_of(program, leaves, llvm.target(wide), mask))
    except Exception as error:  # LLVM's refusals; the interpreter runs what it can not
        kept.failure = f"LLVM refuses the code of them: {error}"
        return
    with_address = torch.frombuffer(bytearray(data), dtype=torch.int64).view(-1, 8)
    with_address[0, _ADDRESS] = kept.code.address
    kept.rows = with_address


def _mostly_calls(program: Program) -> bool:
    """sin(score) alone is 7 % slower as code; with its derivative as much faster."""
    last = program.stages[2]
    calls = sum(x.operation in CALLED for x in last)
    others = sum(not x.operation.startswith(("load_", "constant")) for x in last) - calls
    return calls > 0 and others < 4 * calls and program.slope < 0
