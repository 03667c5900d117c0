"""The table of models in docs is the one that was measured, of the code that is here, and right."""

from __future__ import annotations

import json

from tests.cases import transformers_models as zoo
from tests.cases import transformers_table as tables

RECORD = json.loads(tables.RECORD.read_text())


def test_the_record_is_of_this_code() -> None:
    assert RECORD["digest"] == tables.digest(), (
        "due again: python -m tests.cases.transformers_table"
    )
    assert RECORD["columns"] == list(zoo.CHECKS)
    for name, case in zoo.CASES.items():
        wanted = [title for title, (kinds, _) in zoo.CHECKS.items() if case.kind in kinds]
        assert list(RECORD["rows"][name]) == wanted


def test_every_answer_in_it_is_right() -> None:
    wrong = [
        (name, title, value)
        for name, row in RECORD["rows"].items()
        for title, value in row.items()
        if not isinstance(value, float) or value > zoo.LIMIT
    ]
    assert wrong == []


def test_the_page_shows_it() -> None:
    page = tables.PAGE.read_text()
    assert tables.with_table(page, RECORD) == page
