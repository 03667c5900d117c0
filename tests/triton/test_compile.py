"""What the compiler makes of the shipped Triton kernels: no GPU is needed to look at machine code.

Tests run Triton in its interpreter, so the compiler runs in processes of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.cases.sass_hazards import hazards

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Bytes of shared memory that one program may use (CUDA C++ programming guide, table of technical
# specifications by compute capability).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Bytes of what only the code after the loops needs: for scores that are too large for them.
SET_ASIDE = 352

DOTS = re.compile(r"forward|backward_d|decode|(bias|distance)_gradient|weights")


@functools.cache
def compiled(arch: int | str, match: str, candidates: int = 1) -> list[dict[str, Any]]:
    """The report on the calls of `arch` whose names contain `match`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    report = "benchmarks.compiler.triton_report"
    command = [
        sys.executable,
        "-m",
        report,
        "--json",
        "--arch",
        str(arch),
    ]
    done = subprocess.run(
        [*command, "--match", match, "--candidates", str(candidates)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels, f"no call matches {match!r}"
    return kernels


# All of them take a quarter of an hour of one core: a sample, and all with --every.
PARTS = [
    *((90, f"attention bf16 {head_dim}") for head_dim in (64, 128, 256)),
    *((90, f"attention fp32 {head_dim}") for head_dim in (64, 128, 256)),
    *((arch, "attention") for arch in (80, 100, 120)),
    *((arch, "flex") for arch in (80, 90)),
    *((arch, "layer norm") for arch in (80, 90, 100, 120)),
    *((arch, "bias activation") for arch in (80, 90, 100, 120)),
]
SAMPLE = [
    (90, "attention bf16 64 causal"),
    (90, "attention bf16 128 positions"),
    (90, "attention bf16 128 bias odd"),
    (90, "attention bf16 128 decode 4"),
    (90, "attention fp32 64 causal"),
    (90, "flex bf16 128 relative"),
    (90, "flex bf16 128 listed"),
    (90, "layer norm"),
    (80, "bias activation"),
]


@pytest.mark.parametrize(
    ("arch", "match"), [*SAMPLE, *(pytest.param(*part, marks=pytest.mark.every) for part in PARTS)]
)
def test_shipped_kernels(arch: int, match: str) -> None:
    """No loop spills, shared memory suffices, matrix units and asynchronous copies are in use."""
    check(compiled(arch, match), arch)


def test_amd() -> None:
    """Triton's wheel brings AMD's compiler as well: forward and backward, in 64 KiB."""
    from triton.backends import backends

    if "amd" not in backends:
        pytest.skip("this Triton has no compiler for AMD")
    kernels = compiled("gfx942", "attention bf16 128 causal")
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= 64 << 10, kernel
    names = {kernel["kernel"] for kernel in kernels if kernel["counts"]["mma"] > 0}
    products = ("forward", "backward_dkdv", "backward_dq")
    assert names == {f"_attention_{name}_kernel" for name in products}


@pytest.mark.every
def test_a_sample_of_the_tiles_for_trials() -> None:
    """All of them are compiled by `python -m benchmarks.compiler.triton_report --all`."""
    kernels = compiled(90, "attention bf16 128 causal", candidates=4)
    assert len({kernel["kernel"] for kernel in kernels}) < len(kernels), "one tile each"
    check(kernels, 90)


def test_no_case_has_more_than_four_tiles() -> None:
    from fused_attn.ops.attention.triton import tiles

    for table in (
        tiles.HOPPER,
        tiles.BLACKWELL,
        tiles.AMPERE,
        tiles.FLOAT32,
        tiles.SHARED,
    ):
        for lines in table.values():
            for line in (line for of_size in lines.values() for line in of_size):
                assert 1 <= len(line) <= 4
                assert len(set(line)) == len(line), line


def check(kernels: list[dict[str, Any]], arch: int) -> None:
    for kernel in kernels:
        name = f"{kernel['call']}: {kernel['kernel']} for sm_{arch}: {kernel}"
        assert kernel["spills"] == 0, name
        assert kernel["stack"] <= SET_ASIDE, name
        assert kernel["registers"] <= 255, name
        assert kernel["shared"] <= SHARED_MEMORY[arch] - 1024, name
        if kernel["kernel"].startswith("_attention") and "delta" not in kernel["kernel"]:
            check_instructions(kernel, arch, name)


def check_instructions(kernel: dict[str, Any], arch: int, name: str) -> None:
    counts = kernel["counts"]
    if not DOTS.search(kernel["kernel"]):
        return
    assert counts["mma"] > 0, name
    if "bf16" not in kernel["call"] or "everything" in kernel["call"]:
        return
    if kernel["call"].startswith("flex"):  # their tiles are small
        return
    # A wgmma takes 64 rows: these have fewer, as has the backward of head size 256.
    fewer_rows = kernel["kernel"] in ("_attention_decode_kernel", "_attention_bias_gradient_kernel")
    fewer_rows |= "backward" in kernel["kernel"] and " 256 " in kernel["call"]
    if arch == 90 and not fewer_rows:
        assert counts["wgmma"] > 0, name
    if "forward" in kernel["kernel"]:
        assert (counts["tma"] > 0) == (90 <= arch < 120), name
    if arch < 90 or arch >= 120:
        assert counts["cp.async"] > 0 or "bias_gradient" in kernel["kernel"], name


@pytest.mark.parametrize("match", ["causal", pytest.param("", marks=pytest.mark.every)])
def test_no_register_of_a_running_matrix_product_is_touched(match: str) -> None:
    """Some versions of ptxas reuse the operand registers of a wgmma that still reads them."""
    script = """
import sys
from benchmarks.compiler import triton_report
calls = triton_report.all_calls(90, False)
start = "attention bf16 128 " + sys.argv[1]
calls = {name: call for name, call in calls.items() if name.startswith(start)}
for kernel, compiled in triton_report.kernels(90, calls):
    print("====", kernel.call, kernel.kernel)
    print(triton_report.disassemble(compiled.asm["cubin"])[1])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script, match],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    products = 0
    for text in done.stdout.split("====")[1:]:
        title, code = text.split("\n", 1)
        count, found = hazards(code)
        products += count
        assert not found, f"{title}: {found[:4]}"
    assert products > 0, "no product takes an operand from registers: nothing was checked"


def test_the_scanner_finds_a_hazard() -> None:
    """The check above can fail: a register that a running product reads is written."""
    code = """
        /*0000*/ WARPGROUP.ARRIVE ;
        /*0010*/ HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0020*/ {} ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/ EXIT ;
"""
    assert hazards(code.format("MOV R4, R50"))[1][0][0] == "A-overwrite"
    assert hazards(code.format("FADD R50, R25, R51"))[1][0][0] == "C-read"
    assert hazards(code.format("MOV R60, R61")) == (1, [])


def test_spills_count_within_loops_only() -> None:
    """The check above can fail: the stack is read between a label and the branch back to it."""
    from benchmarks.compiler.triton_report import spills_in_loops

    code = """
        /*0000*/ STL [R1], R2 ;
.L_x_1:
        /*0010*/ {} ;
   @!P0 /*0020*/ BRA `(.L_x_1) ;
        /*0030*/ LDL R2, [R1] ;
.L_x_2:
        /*0040*/ BRA `(.L_x_2) ;
"""
    patterns = (r"(\.L\w+):", r"/\*[0-9a-f]{4,}\*/\s+([A-Z0-9_.]+)", r"\bBRA\b.*`\((\.L\w+)\)")
    assert spills_in_loops(code.format("FADD R3, R3, R4"), *patterns) == 0
    assert spills_in_loops(code.format("LDL R3, [R1]"), *patterns) == 1
    nested = ".L_x_0:\n" + code + "   /*0050*/ BRA `(.L_x_0) ;\n"  # the two others are outside now
    assert spills_in_loops(nested.format("FADD R3, R3, R4"), *patterns) == 0
    assert spills_in_loops(nested.format("LDL R3, [R1]"), *patterns) == 1
