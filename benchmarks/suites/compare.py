"""Two recordings of the same cases: what became slower, beyond the noise of both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from .results import ResultsError, Row, counts, key

FLOOR = 0.05
MOST_SHOWN = 12
FEW_PEERS = 20
# 95 % are two standard deviations of noise, twice that four: of hundreds of measurements none is
# beyond it by chance.
NOISE_SHARE, NOISE_FACTOR = 0.95, 2.0
RULE = f"""A change counts if the quartile intervals of the two runs do not overlap, and the medians
differ by more than both runs' spreads together (a spread is the distance of the quartiles over the
median), by more than {FLOOR:.0%}, and by more than the noise between the two runs: peers did not
change from one to the other, so what they moved anyway is noise. It is {NOISE_FACTOR:g} times what
{NOISE_SHARE:.0%} of the peers' measurements by the same clock and against the same ceiling moved at
the most (if there are {FEW_PEERS} of them), and it is printed. Where a case has peers, ours must
have changed by as much against theirs too: sides take turns, so what moved all of them was the
machine. Ours that had a figure and has none now (wrong, failed, refused) is a regression as well.
The exit status is 1 if there is one. Peers that moved are listed, and are no regressions."""


Group = tuple[str, str]  # clock and ceiling


@dataclass
class Comparison:
    """What `compare` found, lines for people."""

    machines: set[str]
    cases: int = 0
    regressions: list[str] = field(default_factory=list)
    improvements: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    noise: dict[Group, float] = field(default_factory=dict)
    new: int = 0

    def __str__(self) -> str:
        lines = []
        if len(self.machines) > 1:
            lines.append(f"different machines: {', '.join(sorted(self.machines))}")
        for title, found in (
            ("REGRESSIONS", self.regressions), ("faster", self.improvements),
            ("peers that moved", self.peers), ("measured before, not now", self.gone),
        ):  # fmt: skip
            if found:
                shown = found if title == "REGRESSIONS" else found[:MOST_SHOWN]
                more = [f"  ... and {len(found) - len(shown)} more"] * (len(found) > len(shown))
                lines += [f"{title}:", *(f"  {line}" for line in shown), *more]
        for (clock, ceiling), limit in sorted(self.noise.items()):
            lines.append(f"noise between the runs, {clock}, {ceiling or 'tiny calls'}: {limit:.0%}")
        lines.append(
            f"{self.cases} measurements compared, {len(self.regressions)} slower, "
            f"{len(self.improvements)} faster, {len(self.gone)} gone, {self.new} new"
        )
        return "\n".join(lines)


def compare(before: Sequence[Row], after: Sequence[Row], floor: float = FLOOR) -> Comparison:
    """Hold every measurement of `after` against the same one of `before`, by `RULE`.

    Raises:
        ResultsError: the two have no measurement in common.
    """
    old = {key(row): row for row in before if counts(row)}
    new = {key(row): row for row in after if counts(row)}
    lost = {
        (row["suite"], row["case"], row["device"], row["side"]): row["status"]
        for row in after
        if row["status"] != "ok"
    }
    found = Comparison({row["machine"] for row in (*old.values(), *new.values())})
    drifts, found.noise = _drifts(old, new), _noise(old, new)
    found.new = len(new.keys() - old.keys())
    for which, row in old.items():
        name = f"{row['case']} [{row['side']}, {row['clock']}]"
        status = lost.get((row["suite"], row["case"], row["device"], row["side"]))
        if which not in new:
            if status is not None and row["ours"] == "yes":
                found.regressions.append(f"{name}: has no figure any more, {status}")
            else:
                found.gone.append(name if status is None else f"{name}: {status}")
            continue
        found.cases += 1
        ours = row["ours"] == "yes"
        least = max(floor, found.noise.get(_group(row), 0.0))
        change = _change(row, new[which], least, drifts.get(_case(row), 1.0) if ours else 1.0)
        if change is None:
            continue
        line = f"{name}: {_ms(row)} -> {_ms(new[which])} ms ({change:+.0%})"
        if not ours:
            found.peers.append(line)
        else:
            (found.regressions if change > 0 else found.improvements).append(line)
    if not found.cases and not found.regressions:
        raise ResultsError("the two have no measurement in common")
    return found


def _case(row: Row) -> tuple[str, ...]:
    return row["suite"], row["case"], row["device"], row["clock"]


def _group(row: Row) -> Group:
    return row["clock"], row["ceiling"]


def _noise(old: dict[tuple[str, ...], Row], new: dict[tuple[str, ...], Row]) -> dict[Group, float]:
    """What two runs differ by without a change of code, as `RULE` says."""
    moved: dict[Group, list[float]] = {}
    for which in old.keys() & new.keys():
        if old[which]["ours"] != "yes":
            change = float(new[which]["median_s"]) / float(old[which]["median_s"]) - 1.0
            moved.setdefault(_group(old[which]), []).append(abs(change))
    return {
        group: NOISE_FACTOR * sorted(changes)[int(NOISE_SHARE * (len(changes) - 1))]
        for group, changes in moved.items()
        if len(changes) >= FEW_PEERS
    }


def _drifts(
    old: dict[tuple[str, ...], Row], new: dict[tuple[str, ...], Row]
) -> dict[tuple[str, ...], float]:
    """By what factor the peers of each case became slower: the machine's doing, not ours."""
    factors: dict[tuple[str, ...], list[float]] = {}
    for which in old.keys() & new.keys():
        if old[which]["ours"] != "yes":
            factor = float(new[which]["median_s"]) / float(old[which]["median_s"])
            factors.setdefault(_case(old[which]), []).append(factor)
    return {case: statistics.median(found) for case, found in factors.items()}


def _change(before: Row, after: Row, least: float, drift: float) -> float | None:
    """Relative change of the median, if it is beyond the noise, as it is and against `drift`."""
    low_a, median_a, high_a = (float(before[name]) for name in ("q25_s", "median_s", "q75_s"))
    low_b, median_b, high_b = (float(after[name]) for name in ("q25_s", "median_s", "q75_s"))
    if low_b <= high_a and low_a <= high_b:
        return None
    limit = max((high_a - low_a) / median_a + (high_b - low_b) / median_b, least)
    change = median_b / median_a - 1.0
    relative = median_b / median_a / drift - 1.0
    beyond = min(change, relative) > limit or max(change, relative) < -limit
    return change if beyond else None


def _ms(row: Row) -> str:
    return f"{float(row['median_s']) * 1e3:.4g}"
