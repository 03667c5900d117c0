"""Which tiles are fastest here: tried on request only, remembered, kept on disk.

Without a trial every kernel runs with the default tiles of its backend, a pure function of the
problem. `trying` runs the few candidates that the backend ships and takes the
fastest of each class of problems. The choice is written to a file of its own for each GPU, version
of Triton and state of the kernels' sources, in $XDG_CACHE_HOME/fused_attn (~/.cache/fused_attn);
files of that kind may be shipped in `fused_attn/tuned`, and the user's file wins.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import user_files
from . import device as triton_device
from . import recording, replay
from .device import capturing

SHIPPED = Path(__file__).parents[2] / "tuned"
_FORMAT = 1
_MODES = ("off", "read", "on")

Key = tuple[str, str]  # kernel and class of problems
Timer = Callable[[Callable[[], None]], float]


class Trial(NamedTuple):
    """What came of trying the candidates of one kernel for one class of problems."""

    chosen: tuple[int, ...]
    milliseconds: dict[tuple[int, ...], float]  # of the candidates that ran
    failed: dict[tuple[int, ...], str]  # of the others, why


# Files are read when a machine is first asked for.
_known: dict[triton_device.Machine, dict[Key, tuple[int, ...]]] = {}
_chosen: dict[tuple[torch.device, Key], Any] = {}  # what launches look up
_trials: _Trials | None = None


class _Trials:
    """A stretch of time in which candidates are tried."""

    def __init__(self, timer: Timer, again: bool) -> None:
        self.timer, self.again = timer, again
        self.found: dict[str, Trial] = {}


def mode() -> str:
    """FUSED_ATTN_TUNING: "off" (defaults only), "read" (what was found before), "on" (try too)."""
    value = os.environ.get("FUSED_ATTN_TUNING", "read")
    if value not in _MODES:
        raise ValueError(f"FUSED_ATTN_TUNING must be one of {', '.join(_MODES)}, got {value!r}")
    return value


@contextlib.contextmanager
def trying(timer: Timer | None, again: bool) -> Iterator[dict[str, Trial]]:
    """Within this, launches try the candidates of classes that nothing is known about yet.

    Args:
        again: try those of known classes too.

    Yields:
        What has been tried, by kernel and class.
    """
    trials = _Trials(timer or _milliseconds, again)
    global _trials
    before, _trials = _trials, trials
    try:
        with replay.paused():
            yield trials.found
    finally:
        _trials = before


def launch_best(
    device: torch.device,
    key: Key,
    candidates: Sequence[Any],
    run: Callable[[Any], None],
) -> None:
    """For backends: launch a kernel with the best tile that is known, after a trial if one is due.

    Args:
        key: kernel and class of problems.
        candidates: named tuples of integers; the first is the default.
        run: launches the kernel; it is called several times in a trial.
    """
    compiling = triton_device.compiling()
    if compiling is not None and compiling.candidate is not None:
        run(candidates[min(compiling.candidate, len(candidates) - 1)])
        return
    tile = _chosen.get((device, key)) if _trials is None else None
    if tile not in candidates:  # not looked up yet, or none of what fits this call
        tile = _choose(device, key, candidates, run, may_try=compiling is None)
        recording.refuse("its tile has just been chosen", again=True)
    run(tile)


def forget() -> None:
    """Forget what this process knows: files and FUSED_ATTN_TUNING are read anew."""
    _chosen.clear()
    _known.clear()
    replay.forget()


def _choose(
    device: torch.device,
    key: Key,
    candidates: Sequence[Any],
    run: Callable[[Any], None],
    may_try: bool,
) -> Any:
    how = mode()
    trials = _trials
    if trials is None and how == "on":
        trials = _Trials(_milliseconds, again=False)
    if len(candidates) == 1 or (how == "off" and trials is None):
        _chosen[device, key] = candidates[0]
        return candidates[0]
    machine = triton_device.machine(device)
    if machine not in _known:
        _known[machine] = {} if how == "off" else _read(machine)
    found = [tile for tile in candidates if tuple(tile) == _known[machine].get(key)]
    if key in _known[machine] and not found:
        stale = _known[machine].pop(key)
        warnings.warn(f"{stale} is no tile for {': '.join(key)}: ignored", stacklevel=2)
    due = trials is not None and (trials.again or not found)
    if trials is not None and due and may_try and not capturing():
        trial = _try(trials, candidates, run)
        trials.found[": ".join(key)] = trial
        if trial.milliseconds:
            found = [tile for tile in candidates if tuple(tile) == trial.chosen]
            _known[machine][key] = trial.chosen
            if how != "off":
                _write(machine, key, trial.chosen)
        due = False
    best = found[0] if found else candidates[0]
    if not due:
        _chosen[device, key] = best
    return best


def _try(trials: _Trials, candidates: Sequence[Any], run: Callable[[Any], None]) -> Trial:
    milliseconds: dict[tuple[int, ...], float] = {}
    failed: dict[tuple[int, ...], str] = {}
    for tile in candidates:
        try:
            milliseconds[tuple(tile)] = trials.timer(functools.partial(run, tile))
        except Exception as error:  # whatever the compiler or the driver has against this one
            failed[tuple(tile)] = f"{type(error).__name__}: {error}"
    best = min(milliseconds, key=milliseconds.__getitem__, default=tuple(candidates[0]))
    return Trial(best, milliseconds, failed)


def _milliseconds(run: Callable[[], None]) -> float:
    """Of one launch on the current stream: the median of 20, the first ones left out."""
    for _ in range(3):
        run()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _read(machine: triton_device.Machine) -> dict[Key, tuple[int, ...]]:
    known: dict[Key, tuple[int, ...]] = {}
    for folder in (SHIPPED, user_files.folder()):  # the user's come last and win
        path = folder / machine.file_name()
        if path.exists():
            try:
                known.update(_parse(path, machine))
            except (OSError, ValueError) as error:
                warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
    return known


def _parse(path: Path, machine: triton_device.Machine) -> dict[Key, tuple[int, ...]]:
    """The choices in a file.

    Raises:
        ValueError: it is broken, or of another machine.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is no file of choices in format {_FORMAT}")
    if content.get("machine") != machine._asdict():
        raise ValueError(f"it is for {content.get('machine')}, this is {machine._asdict()}")
    choices: dict[Key, tuple[int, ...]] = {}
    rows = content.get("choices")
    if not isinstance(rows, list):
        raise ValueError("it holds no list of choices")
    for row in rows:
        match row:
            case [str(kernel), str(name), [*tile]] if all(type(x) is int for x in tile):
                choices[kernel, name] = tuple(tile)
            case _:
                raise ValueError(f"{row!r} is no choice")
    return choices


def _write(machine: triton_device.Machine, key: Key, tile: tuple[int, ...]) -> None:
    """Add a choice to the user's file."""
    path = user_files.folder() / machine.file_name()
    choices: dict[Key, tuple[int, ...]] = {}
    with contextlib.suppress(OSError, ValueError):  # a broken one is written anew
        choices = _parse(path, machine)
    choices[key] = tile
    rows = [[*each, list(best)] for each, best in sorted(choices.items())]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    header = json.dumps({"format": _FORMAT, "machine": machine._asdict()})[:-1]
    text = f'{header}, "choices": [\n  {lines}\n]}}\n'
    try:
        user_files.write(path, text)
    except OSError as error:
        warnings.warn(f"the choice of tiles cannot be kept in {path}: {error}", stacklevel=2)
