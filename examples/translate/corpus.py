"""A parallel corpus in plain text: `train.en` and `train.de`, one sentence a line, gzip or not."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from errors import UserError


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations, and how many lines were left out because one was empty."""

    sources: list[str]
    targets: list[str]
    empty: int

    def __len__(self) -> int:
        return len(self.sources)


def read_pairs(folder: Path, split: str, source: str, target: str) -> Pairs:
    """The pairs of `split`, whitespace at the ends of lines removed.

    Args:
        split: beginning of the files' names, as "train"; the languages follow as endings.

    Raises:
        UserError: a file is missing, unreadable or not UTF-8, or the two differ in length.
    """
    lines, paths = [], []
    for language in (source, target):
        path = find(folder, split, language)
        lines.append(_read_lines(path))
        paths.append(path)
    if len(lines[0]) != len(lines[1]):
        raise UserError(
            f"the two sides of a corpus must have equally many lines: {paths[0]} has "
            f"{len(lines[0])}, {paths[1]} has {len(lines[1])}"
        )
    kept = [(s, t) for s, t in zip(*lines, strict=True) if s and t]
    if not kept:
        raise UserError(f"{paths[0]} and {paths[1]} hold no pair of sentences")
    sources, targets = zip(*kept, strict=True)
    return Pairs(list(sources), list(targets), len(lines[0]) - len(kept))


def find(folder: Path, split: str, language: str) -> Path:
    """`split.language` in `folder`, compressed or not; UserError if it is not there."""
    if not folder.is_dir():
        raise UserError(f"--data: {folder} is no folder")
    for name in (f"{split}.{language}", f"{split}.{language}.gz"):
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"{folder} must hold {split}.{language} or {split}.{language}.gz, got {there}")


def _read_lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8: {error}") from error
    # Not splitlines(): that would break lines at characters such as U+2028 on one side only.
    return [line.strip() for line in text.removesuffix("\n").split("\n")]
