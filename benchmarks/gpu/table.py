"""The one short table that `make gpu` ends with, from the files of its parts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

PEERS = ("cudnn", "flash", "efficient", "flex")


def read(folder: Path, name: str) -> list[dict[str, str]]:
    """Rows of `name`.csv; none if the part did not get that far."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def render(folder: Path, outcomes: dict[str, str]) -> str:
    """Outcomes, ceilings, attention against its best peer, norms against the copy bandwidth."""
    lines = ["", *_machine(folder), *(f"{name:14} {outcome}" for name, outcome in outcomes.items())]
    ceilings = read(folder, "ceilings")
    if ceilings:
        lines.append("ceilings       " + ", ".join(f"{k} {v}" for k, v in ceilings[0].items()))
    lines += ["", f"{'attention, TFLOP/s':30}{'cuda':>8}{'triton':>8}{'best peer':>18}{'ratio':>7}"]
    lines += [_attention(row) for row in read(folder, "attention")]
    lines += [
        "",
        f"{'add + layer norm, GB/s':30}{'cuda':>8}{'triton':>8}{'torch':>8}{'of copy':>9}",
    ]
    copy = _number(ceilings[0].get("copy_gbs")) if ceilings else None
    lines += [_norm(row, copy) for row in read(folder, "norms")]
    return "\n".join(lines)


def _machine(folder: Path) -> list[str]:
    path = folder / "machine.json"
    if not path.exists():
        return []
    m = json.loads(path.read_text())
    return [f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, triton {m['triton']}, "
            f"commit {m['commit']}"]  # fmt: skip


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _cell(text: str | None) -> str:
    value = _number(text)
    return f"{value:8.0f}" if value is not None else f"{(text or '-')[:7]:>8}"


def _attention(row: dict[str, str]) -> str:
    name = f"{row['direction']} D{row['head_dim']} L{row['length']}"
    if row["causal"] == "True":
        name += " causal"
    peers = {peer: value for peer in PEERS if (value := _number(row.get(peer))) is not None}
    best = max(peers, key=lambda peer: peers[peer]) if peers else None
    ours = _number(row.get("cuda"))
    ratio = f"{ours / peers[best]:7.2f}" if best and ours is not None else f"{'-':>7}"
    peer = f"{peers[best]:8.0f} ({best})" if best else "-"
    return f"{name:30}{_cell(row.get('cuda'))}{_cell(row.get('triton'))}{peer:>18}{ratio}"


def _norm(row: dict[str, str], copy: float | None) -> str:
    name = f"{row['direction']} width {row['width']}"
    ours = _number(row.get("cuda"))
    share = f"{100 * ours / copy:8.0f}%" if ours is not None and copy else f"{'-':>9}"
    cells = "".join(_cell(row.get(side)) for side in ("cuda", "triton", "torch"))
    return f"{name:30}{cells}{share}"
