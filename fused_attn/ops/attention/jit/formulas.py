"""Functions of real numbers as the kernels compute them (`csrc/cpu/vec.h`), to the last bit."""

from __future__ import annotations

import math

from .text import Text

_LOG2E = 1.4426950408889634074
_LN2 = 0.6931471805599453094
_EXP2 = (1.0, 0.6931472, 0.24022648, 0.055503325, 0.0096184374, 0.0013398874, 0.00015353362)
_EXP2_WIDE = tuple(1.0 / math.factorial(n) for n in range(14))
_TANH = (-0.33333284, 0.13331491, -0.053743498, 0.020650587, -0.0057170445)


class Formulas:
    """Writes what gives a function of vectors of real numbers."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def binary(self, operation: str, a: str, b: str) -> str:
        return self.text.make(f"{operation} {self.text.real} {a}, {b}")

    def add(self, a: str, b: str) -> str:
        return self.binary("fadd", a, b)

    def sub(self, a: str, b: str) -> str:
        return self.binary("fsub", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.binary("fmul", a, b)

    def fma(self, a: str, b: str, c: str) -> str:
        if not self.text.target.fused:
            return self.add(self.mul(a, b), c)
        return self.intrinsic("fma", a, b, c)

    def intrinsic(self, name: str, *args: str) -> str:
        kind, scalar = self.text.real, "f64" if self.text.target.wide else "f32"
        function = f"llvm.{name}.v{self.text.lanes}{scalar}"
        return self.text.call(function, kind, *((kind, arg) for arg in args))

    def compare(self, name: str, a: str, b: str) -> str:
        """Truths: `name` is one of LLVM's, "olt" or "ogt" and so on."""
        return self.text.make(f"fcmp {name} {self.text.real} {a}, {b}")

    def select(self, truth: str, yes: str, no: str, kind: str | None = None) -> str:
        kind, truths = kind or self.text.real, self.text.truth
        return self.text.make(f"select {truths} {truth}, {kind} {yes}, {kind} {no}")

    def smaller(self, a: str, b: str) -> str:
        """b where either is NaN."""
        return self.select(self.compare("olt", a, b), a, b)

    def larger(self, a: str, b: str) -> str:
        return self.select(self.compare("ogt", a, b), a, b)

    def exp(self, x: str) -> str:
        """e^x of any x."""
        numbers = self.text.numbers
        x = self.smaller(numbers(2000.0), self.larger(numbers(-2000.0), x))
        n = self._rounded(self.mul(x, numbers(_LOG2E)))
        rest = self.fma(x, numbers(_LOG2E), self.sub(numbers(0.0), n))
        if self.text.target.wide:
            fraction = self._polynomial(_EXP2_WIDE, self.mul(rest, numbers(_LN2)))
        else:
            fraction = self._polynomial(_EXP2, rest)
        return self.mul(fraction, self._power_of_2(n))

    def sigmoid(self, x: str) -> str:
        one = self.text.numbers(1.0)
        below = self.exp(self.sub(self.text.numbers(0.0), x))
        return self.binary("fdiv", one, self.add(one, below))

    def tanh(self, x: str) -> str:
        """Of float32."""
        numbers = self.text.numbers
        one, two = numbers(1.0), numbers(2.0)
        magnitude, square = self.intrinsic("fabs", x), self.mul(x, x)
        small = self.fma(self.mul(x, square), self._polynomial(_TANH, square), x)
        e = self.exp(self.mul(self.smaller(numbers(10.0), magnitude), two))
        large = self.sub(one, self.binary("fdiv", two, self.add(e, one)))
        negative = self.sub(numbers(0.0), large)
        large = self.select(self.compare("ogt", numbers(0.0), x), negative, large)
        return self.select(self.compare("ogt", magnitude, numbers(0.625)), large, small)

    def _polynomial(self, terms: tuple[float, ...], x: str) -> str:
        y = self.text.numbers(terms[-1])
        for term in reversed(terms[:-1]):
            y = self.fma(y, x, self.text.numbers(term))
        return y

    def _rounded(self, x: str) -> str:
        """To the nearest whole number: 1.5 * 2^mantissa leaves no room for a fraction."""
        magic = self.text.numbers(1.5 * 2.0 ** (52 if self.text.target.wide else 23))
        return self.sub(self.add(x, magic), magic)

    def _power_of_2(self, n: str) -> str:
        """2^n of a whole n; 0 below the smallest normal number."""
        wide = self.text.target.wide
        mantissa, bias = (52, 1023) if wide else (23, 127)
        scalar = "i64" if wide else "i32"
        bits = self.text.vector_of(scalar)
        n = self.larger(self.text.numbers(-float(bias)), n)
        n = self.smaller(self.text.numbers(bias + 1.0), n)
        biased = self.add(n, self.text.numbers(2.0**mantissa + bias))
        raw = self.text.make(f"bitcast {self.text.real} {biased} to {bits}")
        moved = self.text.make(f"shl {bits} {raw}, {self.text.wholes(mantissa, scalar)}")
        return self.text.make(f"bitcast {bits} {moved} to {self.text.real}")
