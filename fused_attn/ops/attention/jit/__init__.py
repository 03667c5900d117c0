"""Machine code of functions of pairs (`flex`), in place of the CPU kernels' interpreter.

A program of instructions (`csrc/attention/functions.h`) goes the way of `program` (its rows),
`assembly` (LLVM's text) and `llvm` (machine code, by llvmlite, if that is installed); `engine`
keeps what was made. Results are those of the interpreter.
"""

from .engine import Ready, ready

__all__ = ["Ready", "ready"]
