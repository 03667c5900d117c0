"""Every page says what runs: its Python is run, block after block, in an empty folder.

A page says in a comment what is special about it: `<!-- needs: transformers -->`, libraries without
which it is skipped; `<!-- runs: every -->`, it takes long and runs with --every.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
PAGES = {
    str(path.relative_to(ROOT)): text
    for path in sorted(
        [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    )
    if BLOCK.search(text := path.read_text())
}
MARKED = [
    pytest.param(name, marks=[pytest.mark.every] if "<!-- runs: every -->" in text else [])
    for name, text in PAGES.items()
]
# Pages by task of the documentation: each shows what it tells of.
TASKS = ("start", "doors/index", "guide/padding", "guide/cache", "guide/packed", "guide/masks",
         "guide/weights", "guide/dropout", "guide/compile", "guide/export", "migrating",
         "backends", "supported")  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.filterwarnings("ignore")
def test_the_python_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for needed in re.findall(r"<!-- needs: ([\w, ]+) -->", PAGES[name]):
        for library in needed.split(","):
            pytest.importorskip(library.strip())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / Path(name).parent)  # an example imports what is beside it
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__page__"}
    for number, block in enumerate(BLOCK.findall(PAGES[name])):
        exec(compile(block, f"{name}, block {number}", "exec"), names)
    sys.modules.pop("model", None)


@pytest.mark.parametrize("task", TASKS)
def test_a_page_by_task_has_python_and_its_place_in_the_site(task: str) -> None:
    assert f"docs/{task}.md" in PAGES
    assert f"{task}.md" in (ROOT / "mkdocs.yml").read_text()


def test_a_page_starts_with_its_imports() -> None:
    """A page's blocks need nothing but what stands above them: no fixture, no other page."""
    for name, text in PAGES.items():
        first = BLOCK.findall(text)[0]
        assert "import torch" in first or "from " in first, name


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """As `make docs` does: a dead link, a missing page or a docstring that cannot be read fails."""
    pytest.importorskip("mkdocstrings")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results/amd-epyc-family-26/report/index.html").exists()
