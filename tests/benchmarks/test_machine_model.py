"""The model of the machine: what it reads off machine code, its arithmetic, its calibration."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.compiler import calibration, flow, machine_model
from benchmarks.compiler.calibration import Clocks
from benchmarks.compiler.flow import Count

FORWARD = "14forward_kernelINS0_15ForwardConfigOfINS_6device8BFloat16ELi{}ELb{}EEEEEvNS0_11Forward"
BACKWARD = "11dkdv_kernelINS0_10DkDvConfigINS_6device7Float16ELi{}ELb{}ELb{}EEEEEvNS0_8DkDvMapsE"
DQ = "9dq_kernelINS0_8DqConfigINS_6device8BFloat16ELi{}ELb{}EEEEEvNS0_6DqMapsE"

FROM_SHARED = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
FROM_REGISTERS = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0"


def text(*lines: str) -> list[str]:
    """As nvdisasm prints it: labels end in a colon, everything else is an instruction."""
    found = []
    for i, line in enumerate(lines):
        found.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;")
    return found


# A loop over tiles, masked or not, that waits in a place after the end and is in a loop over heads.
LOOP = text(
    "MOV R1, R2",
    ".L_x_9:",  # heads
    "MOV R1, R2",
    ".L_x_1:",  # tiles
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5",
    "@!P0 BRA `(.L_x_5)",
    ".L_x_2:",
    FROM_SHARED,
    "@P1 BRA `(.L_x_3)",
    "ISETP.GE.AND P2, PT, R1, R2, PT",
    "FSEL R24, R24, -INF, P2",
    ".L_x_3:",
    "MUFU.EX2 R3, R4",
    FROM_REGISTERS,
    "@P3 BRA `(.L_x_1)",
    "@P4 BRA `(.L_x_9)",
    "EXIT",
    ".L_x_5:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5",
    "@!P0 BRA `(.L_x_5)",
    "BRA `(.L_x_2)",
)


def test_instructions_are_counted_by_what_they_keep_busy() -> None:
    [shared, registers, exponential, label] = [
        flow.count(line)
        for line in text(FROM_SHARED, FROM_REGISTERS, "@!UP0 MUFU.EX2 R3, R4", ".L_x_1:")
    ]
    # 64 x 128 x 16: A 2 KiB and B 4 KiB from shared memory, 2048 multiply-adds a clock.
    assert shared == Count(1, 0, 64, 6144, 2 * 64 * 128 * 16)
    assert registers == Count(1, 0, 32, 2048, 2 * 64 * 64 * 16)
    assert exponential == Count(1, 1)
    assert label == Count()


def test_one_pass_takes_the_way_of_a_tile_that_everybody_sees() -> None:
    graph = flow.blocks(LOOP)
    (tiles, inner), (heads, within) = [
        each for each in flow.multiplying(graph) if graph[each[0].header].count.instructions
    ]
    assert inner == frozenset()
    assert tiles.body < heads.body
    assert within == tiles.body
    found = flow.shortest(graph, tiles, inner, 1, Count(flops=1))
    products = flow.count(LOOP[7]).plus(flow.count(LOOP[13]))
    assert found == products._replace(instructions=7, exponentials=1)
    too_much = Count(flops=products.flops + 1)
    assert flow.shortest(graph, tiles, inner, 1, too_much) is None
    assert flow.shortest(graph, tiles, inner, 1, Count(flops=1, exponentials=2)) is None


def test_a_loop_within_a_step_runs_its_trips() -> None:
    lines = text(
        ".L_x_1:", "MUFU.EX2 R3, R4", ".L_x_2:", FROM_SHARED, "@P0 BRA `(.L_x_2)",
        "@P1 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    graph = flow.blocks(lines)
    _, (step, inner) = flow.multiplying(graph)
    product = flow.count(lines[3])
    found = flow.shortest(graph, step, inner, 3, Count(flops=3 * product.flops))
    assert found == Count(1 + 3 * 2 + 1, 1, 3 * product.tensor, 3 * product.shared_bytes,
                          3 * product.flops)  # fmt: skip


def test_the_step_of_a_kernel_is_that_of_all_its_warpgroups() -> None:
    shape = machine_model.Shape("forward", 16, "bf16", False, 2, 128, 128)
    # Two products of 64 x 128 x 16 a warpgroup; 128 x 128 scores are 64 exponentials a thread.
    exponentials = ["MUFU.EX2 R3, R4"] * 64
    lines = text(".L_x_1:", *exponentials, FROM_SHARED, FROM_SHARED, "@P0 BRA `(.L_x_1)", "EXIT")
    step = machine_model.step_of(shape, lines)
    assert step == Count(2 * 67, 2 * 64, 4 * 64, 4 * 6144, shape.flops())
    # 8 warps on 4 schedulers; 16 exponentials and 128 bytes a clock.
    assert machine_model.clocks_of(step) == Clocks(256, 8 * 64 * 32 // 16, 8 * 67 // 4, 192)
    with pytest.raises(ValueError, match="no loop of"):
        machine_model.step_of(shape._replace(head_dim=64), lines)


def test_names_tell_shapes() -> None:
    shape = machine_model.shape_of
    assert shape(FORWARD.format(64, 0)) == ("forward", 64, "bf16", False, 3, 192, 128)
    assert shape(FORWARD.format(256, 1)) == ("forward", 256, "bf16", True, 2, 128, 64)
    assert shape(BACKWARD.format(128, 0, 1)) == ("dqdkdv", 128, "fp16", False, 2, 64, 128)
    assert shape(BACKWARD.format(256, 1, 0)) == ("dkdv", 256, "fp16", True, 2, 16, 64)
    assert shape(DQ.format(128, 1)) == ("dq", 128, "bf16", True, 2, 128, 32)
    assert shape("12delta_kernelINS_6device8BFloat16EEEvNS0_15BackwardProblemE") is None


def test_the_model_meets_what_it_was_fitted_to() -> None:
    for name, published, ours in calibration.errors():
        assert ours == pytest.approx(published, rel=0.02), name
    assert pytest.approx(989, rel=0.001) == calibration.PEAK  # NVIDIA's figure
    for name, published, ours in calibration.held_out():
        assert ours == pytest.approx(published, rel=0.10), name


def test_shared_memory_may_be_the_limit() -> None:
    clocks = Clocks(tensor=100, exponentials=10, issue=10, shared=1000)
    assert clocks.limit() == "shared"
    assert calibration.step_clocks("forward", clocks) == 1000


def test_recorded_predictions_follow_from_their_clocks() -> None:
    with machine_model.FILE.open(newline="") as file:
        recorded = list(csv.DictReader(file))
    assert len(recorded) == 80  # 4 kernels, 5 head sizes, 2 element types, plain and general
    for each in recorded:
        shape = machine_model.Shape(
            each["kernel"], int(each["head_dim"]), each["element"], each["general"] == "True",
            int(each["groups"]), int(each["rows"]), int(each["keys"]),
        )  # fmt: skip
        clocks = Clocks(*(int(each[name]) for name in Clocks._fields))
        told = machine_model.row(shape, clocks)
        assert {key: str(value) for key, value in told.items()} == each
        # The products that it must make are among those that its code makes.
        assert clocks.tensor >= calibration.ideal(shape.flops())
    page = machine_model.PAGE.read_text()
    assert machine_model.table(recorded) in page, "`--save` writes both"


def test_the_page_keeps_what_is_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{machine_model.MARKS[0]}\nold\n{machine_model.MARKS[1]}\nafter\n")
    machine_model.write_page(page, [])
    written = page.read_text()
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
