"""The compiled CUDA kernels, read without running them: resources, instructions, hazards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiler import machine_model
from fused_attn.runtime import native
from tests.cases.cuda_code import Kernel, read_kernels, registers_after
from tests.cases.sass_hazards import hazards

# `make cuda` names a binary of its own: the one that is installed may be without CUDA.
MODULE = Path(os.environ.get("FUSED_ATTN_CUDA_BINARY", ""))
if not MODULE.is_file():
    if native.why_not() or not native.module().build_info()["cuda"]:
        pytest.skip("no CUDA binary: `make cuda` builds one and looks", allow_module_level=True)
    MODULE = Path(native.module().__file__)
pytest.importorskip("triton", reason="its wheel brings the disassembler")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return read_kernels(MODULE, tmp_path_factory.mktemp("cubins"))


def named(kernels: list[Kernel], name: str) -> list[Kernel]:
    found = [kernel for kernel in kernels if f"{len(name)}{name}" in kernel.name]  # mangled
    assert found, f"no kernel is called {name}"
    return found


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local) == (0, 0), kernel.name
        assert kernel.count("LDL") + kernel.count("STL") == 0, kernel.name


def test_registers_are_those_that_the_launch_counts_on(kernels: list[Kernel]) -> None:
    # setmaxnreg shares out what the block was launched with: csrc/attention/sm90/tile.h.
    for kernel in named(kernels, "forward_kernel"):
        assert kernel.registers in (128, 168), kernel.name
    for kernel in named(kernels, "dq_kernel") + named(kernels, "dkdv_kernel"):
        assert kernel.registers == 168, kernel.name


def test_each_role_stays_within_the_registers_that_it_asks_for(kernels: list[Kernel]) -> None:
    roles = [kernel for kernel in kernels if kernel.count("USETMAXREG") == 2]
    assert len(roles) == len(kernels_with_tiles(kernels))
    for kernel in roles:
        for mnemonic in ("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):
            asked, used = registers_after(kernel, mnemonic)
            assert 0 < used <= asked, (kernel.name, mnemonic)


def kernels_with_tiles(kernels: list[Kernel]) -> list[Kernel]:
    names = ("forward_kernel", "dq_kernel", "dkdv_kernel")
    return [kernel for name in names for kernel in named(kernels, name)]


def test_dq_is_added_up_by_bulk_reductions(kernels: list[Kernel]) -> None:
    adding = [kernel for kernel in named(kernels, "dkdv_kernel") if kernel.count("UBLKRED")]
    # Five head sizes, two element types, plain and general; as many again leave dq alone.
    assert len(adding) == 20
    assert len(named(kernels, "dkdv_kernel")) == 40
    for kernel in adding:
        transposed = [text for text in kernel.text if "tnspA.tnspB" in text]
        assert transposed, kernel.name  # dq^T = k^T ds^T
        assert all("HGMMA" in text for text in transposed), kernel.name


@pytest.mark.parametrize("name", ["forward_kernel", "dq_kernel", "dkdv_kernel"])
def test_tiles_come_by_tma_and_products_by_wgmma(kernels: list[Kernel], name: str) -> None:
    for kernel in named(kernels, name):
        assert kernel.count("UTMALDG.5D") > 0, kernel.name
        assert kernel.count("UTMASTG.5D") > 0, kernel.name
        assert kernel.count("HGMMA") > 0, kernel.name
        assert kernel.count("STSM") > 0, kernel.name
        assert kernel.count("USETMAXREG") == 2, kernel.name
        assert kernel.count("HMMA") == 0, kernel.name


def test_exponentials_are_single_instructions(kernels: list[Kernel]) -> None:
    for kernel in named(kernels, "forward_kernel"):
        assert kernel.count("MUFU.EX2") > 0, kernel.name
        assert kernel.count("CALL") == 0, kernel.name


def exponentials_by_step(kernel: Kernel) -> list[tuple[int, int]]:
    """(beside a product, all) of each step: from a wait that leaves a product in flight on."""
    steps, beside, total, counting, waited = [], 0, 0, False, False
    for line in kernel.text:
        if re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", line):
            beside, total, counting, waited = 0, 0, True, False
        elif "WARPGROUP.DEPBAR" in line:
            waited = True
        elif counting and "MUFU.EX2" in line:
            total += 1
            beside += not waited
        elif counting and waited and "HGMMA" in line:
            steps.append((beside, total))
            counting = False
    return [step for step in steps if step[1] >= 8]  # the rest is corrections


@pytest.mark.parametrize(("name", "least"), [("forward_kernel", 4), ("dkdv_kernel", 2)])
def test_exponentials_run_beside_a_product(kernels: list[Kernel], name: str, least: int) -> None:
    """The compiler used to move most of them behind the wait for it."""
    plain = [kernel for kernel in named(kernels, name) if "Lb0E" in kernel.name]
    found = 0
    for kernel in plain:
        steps = exponentials_by_step(kernel)
        head_dim = int(re.findall(r"Li(\d+)E", kernel.name)[0])
        # Above 128 the warpgroup that holds dk has one product of two beside it.
        share = 0.75 if name == "forward_kernel" or head_dim <= 128 else 0.3
        for beside, total in steps:
            assert beside >= share * total, (kernel.name, steps)
        found += len(steps)
    assert found >= least


def test_descriptors_of_the_backward_are_in_uniform_registers(kernels: list[Kernel]) -> None:
    """After a branch that is not uniform each product takes two moves into them."""
    for kernel in named(kernels, "dkdv_kernel"):
        opcodes = kernel.opcodes
        products = [i for i, opcode in enumerate(opcodes) if opcode.startswith("HGMMA")]
        moves = sum(x.startswith("R2UR") for x in opcodes[products[0] : products[-1]])
        assert moves <= len(products) / 4, (kernel.name, moves, len(products))


def test_no_register_of_a_product_in_flight_is_touched(kernels: list[Kernel]) -> None:
    products = 0
    for kernel in kernels:
        in_registers, found = hazards("\n".join(kernel.text))
        assert found == [], kernel.name
        products += in_registers
    assert products > 0


def disassembled(*instructions: str) -> str:
    return "\n".join(f"  /*{16 * i:04x}*/  {text} ;" for i, text in enumerate(instructions))


def test_the_hazard_scan_finds_planted_hazards() -> None:
    product = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    for line, kind in (
        ("IADD3 R5, R60, R61, RZ", "A-overwrite"),
        ("FADD R60, R25, R61", "C-read"),
        ("FADD R25, R60, R61", "C-overwrite"),
        ("FADD R60, R61, R62", None),
    ):
        kinds = [hazard[0] for hazard in hazards(disassembled(product, line, wait))[1]]
        assert kinds == ([] if kind is None else [kind]), line
        assert hazards(disassembled(product, wait, line))[1] == []
    around = ".L_x_1:\n" + disassembled("FADD R60, R25, R61", product, "BRA `(.L_x_1)")
    assert [hazard[0] for hazard in hazards(around)[1]] == ["C-read"]


def test_the_model_of_the_machine_reads_every_kernel(kernels: list[Kernel]) -> None:
    rows = machine_model.rows((kernel.name, kernel.text) for kernel in kernels)
    assert len(rows) == len(kernels_with_tiles(kernels))
    assert {row["limit"] for row in rows} <= {"tensor", "exponentials", "issue", "shared"}


def test_the_module_needs_no_cuda_library() -> None:
    needed = subprocess.run(["ldd", str(MODULE)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcuda|libcudart|libtorch|libc10", needed), needed


def test_the_module_fits_into_the_wheel() -> None:
    assert MODULE.stat().st_size < 20e6


def test_importing_starts_no_cuda() -> None:
    script = (
        "import torch, fused_attn\n"
        "from fused_attn.runtime import native\n"
        "native.module()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_build_fails_on_what_ptxas_must_not_report() -> None:
    sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
    try:
        from check_ptxas import complaints
    finally:
        sys.path.pop(0)
    clean = "ptxas info    : Used 168 registers\n  0 bytes stack frame, 0 bytes spill stores"
    assert complaints(clean) == []
    for line in (
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads",
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async are serialized",
        "ptxas warning : Registers are spilled to local memory in function 'k'",
    ):
        assert complaints(f"{clean}\n{line}") == [line]
