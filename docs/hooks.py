"""Pages of the site that stand elsewhere in the repository, and links that lead out of docs/.

mkdocs calls the functions that begin with `on_`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Where a file of the repository stands in the site; folders hold their pages and pictures.
ELSEWHERE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = {"benchmarks/results": "results", "examples": "examples"}
SHOWN = {".md", ".png"}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def place(path: str) -> str | None:
    """Where the site has a file of the repository; None if it has not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    for folder, target in FOLDERS.items():
        if path.startswith(f"{folder}/") and Path(path).suffix in SHOWN:
            return f"{target}/{path.removeprefix(f'{folder}/')}"
    return None


def on_files(files: Files, config: Any) -> Files:
    paths = [ROOT / name for name in ELSEWHERE]
    for folder in FOLDERS:
        paths += [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SHOWN]
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        target = place(name)
        if target is not None:
            file = File.generated(config, target, abs_src_path=str(path))
            # Reports that the tree of pages has no place for are reached from those that it has.
            files.append(file)
    return files


def repository() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^Repository = "([^"]+)"$', text, re.M)
    assert found is not None
    return found[1]


def source_of(target: str) -> str:
    """The file of the repository that a page of the site is made of."""
    for name, there in ELSEWHERE.items():
        if there == target:
            return name
    for folder, there in FOLDERS.items():
        if target.startswith(f"{there}/"):
            return f"{folder}/{target.removeprefix(f'{there}/')}"
    return f"docs/{target}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between files of the repository become links between pages, or to the repository."""
    target = page.file.src_uri
    here = posixpath.dirname(source_of(target))

    def changed(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        if re.match(r"[a-z]+:", link):
            return found[0]
        path = posixpath.normpath(posixpath.join(here, link))
        if not (ROOT / path).exists():
            if path.startswith("docs/"):
                return found[0]  # mkdocs says what is missing
            raise PluginError(f"{source_of(target)}: there is no {path}")
        there = place(path)
        if there is None:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{before}{repository()}/{kind}/main/{path}{after}"
        return f"{before}{posixpath.relpath(there, posixpath.dirname(target) or '.')}{after}"

    return LINK.sub(changed, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Docstrings introduce code by `::`, which is none of Markdown's signs."""
    return html.replace("::</p>", ":</p>")
