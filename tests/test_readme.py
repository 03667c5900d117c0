"""README is read outside of the repository too, and on one screen and a half."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.suites import machine

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)\s]+)\)", TEXT)


def test_links_are_absolute_and_lead_to_what_is_here() -> None:
    base = machine.repository()
    assert LINKS
    for link in LINKS:
        kind = re.fullmatch(rf"{re.escape(base)}/(blob|raw)/main/([^#]+)(#.*)?", link)
        assert kind, f"{link} does not begin with {base}/blob/main/"
        assert (ROOT / kind[2]).exists(), f"{link}: there is no {kind[2]}"


def test_other_addresses_of_the_project_begin_with_the_repository() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    urls = text.partition("[project.urls]\n")[2].partition("\n\n")[0].splitlines()
    assert {line.split(" = ")[0] for line in urls} >= {"Repository", "Documentation", "Issues"}
    assert all(line.split('"')[1].startswith(machine.repository()) for line in urls)


def test_it_is_one_screen_and_a_half() -> None:
    """A folded part counts as its summary."""
    shown = re.sub(r"</summary>.*?</details>", "", TEXT, flags=re.S)
    assert len(shown.splitlines()) <= 100


def test_it_says_what_true_means_in_a_mask() -> None:
    [box] = re.findall(r"^> \*\*What does True mean.*?(?=\n\n)", TEXT, re.M | re.S)
    assert re.search(r"functions.*\*\*visible\*\*.*modules.*\*\*hidden\*\*", box, re.S)


def test_the_first_python_starts_with_shapes() -> None:
    [first, *_] = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    made = next(line for line in first.splitlines() if not line.startswith("import"))
    made = made if "torch." in made else first.split("\n\n")[1]
    assert "# (batch, heads, length, head size)" in made
