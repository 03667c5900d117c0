"""Two recordings of the same cases: what became slower, beyond the noise of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .results import ResultsError, Row, counts, key

FLOOR = 0.05
RULE = f"""A change counts if the quartile intervals of the two runs do not overlap, and the medians
differ by more than both runs' spreads together (a spread is the distance of the quartiles over the
median) and by more than {FLOOR:.0%}, which two runs on one machine may differ by anyway. Ours that
had a figure and has none now (wrong, failed, refused) is a regression as well. The exit status is 1
if there is one. Peers are compared too, but theirs are no regressions: if they moved likewise, it
was the machine."""


@dataclass
class Comparison:
    """What `compare` found, lines for people."""

    machines: set[str]
    cases: int = 0
    regressions: list[str] = field(default_factory=list)
    improvements: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
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
                lines += [f"{title}:", *(f"  {line}" for line in found)]
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
        change = _change(row, new[which], floor)
        if change is None:
            continue
        line = f"{name}: {_ms(row)} -> {_ms(new[which])} ms ({change:+.0%})"
        if row["ours"] != "yes":
            found.peers.append(line)
        else:
            (found.regressions if change > 0 else found.improvements).append(line)
    if not found.cases and not found.regressions:
        raise ResultsError("the two have no measurement in common")
    return found


def _change(before: Row, after: Row, floor: float) -> float | None:
    """Relative change of the median, if it is beyond the noise."""
    low_a, median_a, high_a = (float(before[name]) for name in ("q25_s", "median_s", "q75_s"))
    low_b, median_b, high_b = (float(after[name]) for name in ("q25_s", "median_s", "q75_s"))
    if low_b <= high_a and low_a <= high_b:
        return None
    noise = (high_a - low_a) / median_a + (high_b - low_b) / median_b
    change = median_b / median_a - 1.0
    return change if abs(change) > max(noise, floor) else None


def _ms(row: Row) -> str:
    return f"{float(row['median_s']) * 1e3:.4g}"
