"""Every page about a door says what runs: its Python is run, block after block."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs/doors").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path) -> None:
    """Libraries that a page needs stand in its first line: `<!-- needs: transformers -->`."""
    text = page.read_text()
    for name in re.findall(r"<!-- needs: ([\w, ]+) -->", text):
        for library in name.split(","):
            pytest.importorskip(library.strip())
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
