"""The plan of the house: no circles, and arrows between floors go down only."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fused_attn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_attn"

# From the top down: a room imports rooms of lower floors, and its own.
FLOORS = (
    (
        "__main__",
        "convert",
        "demo",
        "demo_model",
        "fx",
        "info",
        "selftest",
        "prepare",
        "generation",
        "testing",
    ),
    ("modules",),
    ("flex", "functional"),
    ("ops",),
    ("runtime", "_version"),
)


def modules(folder: Path = PACKAGE) -> dict[str, Path]:
    """Dotted names of a package's modules."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that `name` imports: at its top, in a function, for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {other for other in found if other in known and other != name}


def arrows(folder: Path = PACKAGE) -> dict[str, set[str]]:
    known = modules(folder)
    return {name: imports_of(name, path, known) for name, path in known.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "benchmarks"], ids=lambda path: path.name)
def test_no_module_imports_itself_by_way_of_others(folder: Path) -> None:
    graph = arrows(folder)
    # A package's `__init__` hands on what is in it: an arrow from a child to its own parent is no
    # more than Python loading the parent first.
    for name, others in graph.items():
        graph[name] = {o for o in others if not name.startswith(f"{o}.")}
    assert circles(graph) == []


def test_arrows_between_floors_go_down() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for name, others in arrows().items():
        if name == "fused_attn" or name.startswith("fused_attn.integrations"):
            continue
        mine = floor[name.split(".")[1]]
        for other in others - {"fused_attn"}:
            if floor[other.split(".")[1]] < mine:
                wrong.append(f"{name} -> {other}")
    assert wrong == []


def test_nobody_inside_imports_the_package_itself_or_integrations() -> None:
    allowed = {"fused_attn.__main__", "fused_attn.demo"}
    wrong = [
        f"{name} -> {other}"
        for name, others in arrows().items()
        for other in others
        if name not in allowed
        and (other == "fused_attn" or other.startswith("fused_attn.integrations"))
        and not name.startswith("fused_attn.integrations")
    ]
    assert wrong == []


def test_operations_and_their_backends_do_not_know_each_other() -> None:
    shared = {"dispatch", "operators", "operations", "explain"}
    wrong = []
    for name, others in arrows().items():
        parts = name.split(".")
        if parts[1:2] != ["ops"] or len(parts) < 3 or parts[2] in shared:
            continue
        for other in others:
            there = other.split(".")
            if there[1:2] == ["ops"] and len(there) > 2 and there[2] not in {*shared, parts[2]}:
                wrong.append(f"{name} -> {other}")
    assert wrong == []


def test_the_package_imports_neither_benchmarks_nor_tests() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (benchmarks|tests)\b", path.read_text(), re.M), (
            path
        )


def test_every_module_is_importable_by_its_path() -> None:
    """A function never hides a package: each name leads to its module."""
    import fused_attn.ops.attention.problem as problem

    assert problem.Operands.__name__ == "Operands"
    for info in pkgutil.walk_packages(fused_attn.__path__, "fused_attn."):
        parent, _, leaf = info.name.rpartition(".")
        triton = ".triton." in f"{info.name}." and "ops" in info.name  # imports Triton
        if triton or leaf in ("__main__", "_C"):
            continue
        module = importlib.import_module(info.name)
        assert getattr(importlib.import_module(parent), leaf, module) is module, info.name


def test_nothing_is_public_by_accident() -> None:
    for name, value in vars(fused_attn).items():
        is_module = type(value) is type(fused_attn)
        assert name in fused_attn.__all__ or name.startswith("_") or is_module, name
