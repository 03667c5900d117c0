"""The page on errors has every text that the code gives, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fused_attn.runtime import native
from tests.modules.test_mistakes import MISTAKES as OF_MODULES
from tests.ops.test_mistakes import MISTAKES as OF_FUNCTIONS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MISTAKES = {"In functions": OF_FUNCTIONS, "In modules": OF_MODULES}

pytestmark = pytest.mark.filterwarnings("ignore")


def texts(section: str) -> list[str]:
    """The messages of a section, `…` where they differ from call to call."""
    part = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `` (.+?) `` ", part, re.M)


def pattern(text: str) -> re.Pattern[str]:
    parts = (re.escape(part) for part in text.split("…"))
    return re.compile(".*?".join(parts), re.S)


def said(call: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value).partition("\nhint: ")[0]


@pytest.mark.parametrize("section", MISTAKES)
def test_every_mistake_stands_on_the_page_and_every_text_is_one(section: str) -> None:
    """The first text that fits is the answer that a reader finds; general ones come last."""
    found = dict.fromkeys(texts(section), 0)
    for name, (call, kind, *_) in MISTAKES[section].items():
        if name == "a backend that cannot" and native.why_not() is not None:
            continue
        message = said(call, kind)
        fitting = [text for text in found if pattern(text).fullmatch(message)]
        assert fitting, f"{section}: no text fits {name}: {message!r}"
        found[fitting[0]] += 1
    unsaid = [text for text, count in found.items() if not count]
    if native.why_not() is not None:
        unsaid = [text for text in unsaid if not text.startswith("backend")]
    assert not unsaid


def constants(path: Path) -> str:
    """What a source says, its string literals joined as Python joins them."""
    text = path.read_text()
    text = re.sub(r'["\']\s*\n\s*f?["\']', "", text)
    return re.sub(r"\{[^{}]*\}", "…", text)


@pytest.mark.parametrize(
    ("section", "sources"),
    [
        ("Warnings", ["runtime/verified.py", "modules/mistakes.py", "runtime/debug.py"]),
        ("At install time", ["../setup.py"]),
    ],
)
def test_warnings_and_texts_of_the_installation_are_in_the_code(
    section: str, sources: list[str]
) -> None:
    code = "".join(constants(ROOT / "fused_attn" / source) for source in sources)
    assert texts(section)
    for text in texts(section):
        pieces = [piece.strip() for piece in re.split("…|'…'", text) if len(piece.strip()) > 3]
        for piece in pieces:
            assert piece in code, f"{section}: {piece!r} of {text!r}"
