"""Random calls of every operation, held against float64; what fails is made small and repeated."""

from .run import OPERATIONS, Failure, check, fuzz, repeat_line

__all__ = ["OPERATIONS", "Failure", "check", "fuzz", "repeat_line"]
