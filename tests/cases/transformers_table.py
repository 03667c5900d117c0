"""`python -m tests.cases.transformers_table`: every model by every check, and the table in docs.

Takes some minutes; `tests/integrations/test_transformers_table.py` says when it is due again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/doors/transformers.md"
RECORD = Path(__file__).with_suffix(".json")
BEGIN, END = "<!-- table: python -m tests.cases.transformers_table -->\n", "<!-- end of table -->\n"
# What the answers hang on, beside the kernels, which have tests of their own.
SOURCES = (
    "fused_attn/integrations/transformers.py",
    "fused_attn/integrations/transformers_masks.py",
    "tests/cases/transformers_models.py",
)


def digest() -> str:
    """Of the sources that a record belongs to."""
    texts = [(ROOT / name).read_bytes() for name in SOURCES]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def measure() -> dict[str, Any]:
    """Run all there is; a failure is recorded as its message."""
    import torch
    import transformers

    from fused_attn.integrations.transformers import register
    from tests.cases import transformers_models as zoo

    torch.set_num_threads(1)
    register()
    rows: dict[str, dict[str, Any]] = {}
    for name, case in zoo.CASES.items():
        rows[name] = {}
        for title, (kinds, check) in zoo.CHECKS.items():
            if case.kind in kinds:
                try:
                    rows[name][title] = check(name)
                except Exception as error:
                    rows[name][title] = f"{type(error).__name__}: {error}"[:200]
        zoo.models.cache_clear()
        print(name, rows[name], flush=True)
    return {
        "digest": digest(),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "columns": list(zoo.CHECKS),
        "theirs": {name: case.theirs for name, case in zoo.CASES.items()},
        "rows": rows,
    }


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    columns = record["columns"]
    lines = [
        f"torch {record['torch']}, transformers {record['transformers']}, float32. Numbers: the "
        "largest difference, in parts of the largest value; =: the same tokens.",
        "",
        f"| model | against | {' | '.join(columns)} |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for name, row in record["rows"].items():
        cells = [_cell(title, row.get(title)) for title in columns]
        lines.append(f"| {name} | {record['theirs'][name]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(title: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if title.startswith(("greedy", "beam", "static")):
        return "=" if value == 0.0 else "differs"
    return "0" if value == 0.0 else f"{value:.0e}"


def with_table(page: str, record: dict[str, Any]) -> str:
    """The page with its table in place."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(record) + END + after


if __name__ == "__main__":
    if "--render" not in sys.argv:
        RECORD.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(RECORD.read_text())))
