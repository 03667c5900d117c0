"""Checkpoints that are never half written, and that say what they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from errors import UserError

FORMAT = "fused_attn examples/translate, version 1"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text and containers of these) to `path`, all or nothing."""

    def write(file: Any) -> None:
        torch.save({"format": FORMAT, **state}, file)

    replace_file(path, write)


def replace_file(path: Path, write: Any) -> None:
    """`write(file)` to a file beside `path`, which takes its place once it is on the disk."""
    staged = path.with_name(path.name + ".part")
    with staged.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Raises:
        UserError: there is no such file, or it is no checkpoint of this program.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its unpickler raises whatever it trips over
        raise UserError(f"{path} is no checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this program ({FORMAT})")
    return state
