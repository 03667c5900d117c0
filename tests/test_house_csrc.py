"""The plan of csrc: no circles, arrows between floors go down only."""

from __future__ import annotations

import re

from tests.test_house import ROOT, circles

# Of csrc: operations (with their devices' folders), then what knows a device, then what knows none.
CSRC_FLOORS = (
    ("bindings.cpp",),
    ("attention", "layer_norm", "bias_activation", "embedding", "linear"),
    ("cpu", "cuda", "emulator"),
    ("common",),
)


# The emulator's own programs look at kernels from above, as tests do.
TEST_PROGRAMS = ("emulator/module.cpp", "emulator/faults.cpp", "emulator/fault_kernel.h")


def room_of(path: str) -> str:
    return path.split("/")[0]


def includes() -> list[tuple[str, str]]:
    """(file, included file) of csrc, relative to it."""
    found = []
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu"):
            continue
        here = path.relative_to(ROOT / "csrc").as_posix()
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            if (ROOT / "csrc" / name).exists():
                found.append((here, name))
    return found


def test_includes_between_floors_of_csrc_go_down() -> None:
    floor = {room: number for number, rooms in enumerate(CSRC_FLOORS) for room in rooms}
    wrong = [
        f"{here} -> {there}"
        for here, there in includes()
        if floor[room_of(there)] < floor[room_of(here)] and here not in TEST_PROGRAMS
    ]
    assert wrong == []


def test_headers_of_csrc_do_not_include_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for here, there in includes():
        graph.setdefault(here, set()).add(there)
    assert circles(graph) == []


def test_operations_of_csrc_do_not_include_each_other() -> None:
    operations = set(CSRC_FLOORS[1])
    wrong = [
        f"{here} -> {there}"
        for here, there in includes()
        if {room_of(here), room_of(there)} <= operations and room_of(here) != room_of(there)
    ]
    assert wrong == []


def test_kernels_of_csrc_know_neither_torch_nor_python() -> None:
    bindings = re.compile(r"(bindings|arguments|tensor|call_key|dlpack|module|faults)")
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu") and not bindings.search(path.name):
            assert not re.search(r"#include <(torch|pybind11|Python)", path.read_text()), path


def test_gpu_kernels_store_to_global_memory_by_the_words_alone() -> None:
    """The emulator does not see a store through a pointer, nor that another block stores there."""
    store = re.compile(
        r"\bp_?\.\w+\[[^=]*\] [+]?= |^\s*\*\w+ [+]?= |reinterpret_cast<[^;=]*\) [+]?= "
        r"|\bto\[[^=]*\] [+]?= "
    )
    for folder in ("attention/sm90", "layer_norm/cuda"):
        for path in (ROOT / "csrc" / folder).glob("*.h"):
            found = [line for line in path.read_text().splitlines() if store.search(line)]
            assert [line for line in found if "to[i] = " not in line] == [], path
