"""What is said of a choice between backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BY_NAME = "runs only when it is asked for by name"


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a problem, and why the ones before it do not.

    Attributes:
        problem: the description of the call.
        chosen: name of the backend that runs it, or None.
        reasons: (backend name, its reasons) in order of preference; no reasons means that it can.
        detail: what the chosen backend says of how it runs it, or "".
        by_name: (backend name, why) of those that could run it, but only if asked for by name.
    """

    problem: Any
    chosen: str | None
    reasons: tuple[tuple[str, tuple[str, ...]], ...]
    detail: str = ""
    by_name: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, reasons in self.reasons:
            if name == self.chosen:
                verdict = f"runs this ({self.detail})" if self.detail else "runs this"
            else:
                why = dict(self.by_name).get(name)
                able = (
                    "could run this, a better one is there" if why is None else f"{BY_NAME} ({why})"
                )
                verdict = "; ".join(reasons) if reasons else able
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines)
