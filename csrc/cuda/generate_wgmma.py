"""Writes the wrappers of wgmma (m64nNk16, 16-bit operands, float32 accumulators) to a file.

PTX wants every accumulator register named, so the text grows with N; CMake runs this at build time.

    python generate_wgmma.py OUTPUT.h
"""

from __future__ import annotations

import sys
from pathlib import Path

COLUMNS = (16, 32, 64, 80, 96, 128, 192, 256)
ELEMENTS = {"BFloat16": "bf16", "Float16": "f16"}


def wrapper(columns: int, element: str, registers: bool, a_t: bool, b_t: bool) -> str:
    """One specialisation: A from registers or from shared memory, either operand transposed."""
    count = columns // 2
    d = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if registers:
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        b, flag = f"%{count + 4}", f"%{count + 5}"
        transposes = f"{int(b_t)}"
        parameters = (
            "const uint32_t& a0, const uint32_t& a1, const uint32_t& a2, const uint32_t& a3"
        )
        inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3)'
    else:
        a, b, flag = f"%{count}", f"%{count + 1}", f"%{count + 2}"
        transposes = f"{int(a_t)}, {int(b_t)}"
        parameters, inputs = "uint64_t a", '"l"(a)'
    kind = ELEMENTS[element]
    name = "from_registers" if registers else "from_shared"
    return f"""\
  static __device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}, uint64_t b,
                                                bool accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, {flag}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
        "{{{d}}}, {a}, {b}, p, 1, 1, {transposes};\\n}}\\n"
        : {outputs}
        : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)));
  }}"""


def specialisation(columns: int, element: str, a_t: bool, b_t: bool) -> str:
    """Mma<element, columns, a_t, b_t>; a register operand is never transposed."""
    functions = [wrapper(columns, element, False, a_t, b_t)]
    if not a_t:
        functions.append(wrapper(columns, element, True, a_t, b_t))
    flags = ", ".join(str(flag).lower() for flag in (a_t, b_t))
    body = "\n".join(functions)
    return f"template <>\nstruct Mma<{element}, {columns}, {flags}> {{\n{body}\n}};"


def main() -> None:
    parts = [
        specialisation(columns, element, a_t, b_t)
        for columns in COLUMNS
        for element in ELEMENTS
        for a_t, b_t in ((False, False), (False, True), (True, True))
    ]
    Path(sys.argv[1]).write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
