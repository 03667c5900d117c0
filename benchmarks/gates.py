"""The gates of the CPU: which cases of the suites, and how far ahead of torch we must be.

A row of `TABLE` is a case (suite, direction, shape, variant, dtype, and the facts that differ from
the suite's usual case), a level of instructions, the *gate* (the fastest peer's time over ours that
must always hold), the *goal*, and the share of the peak of multiply-adds that must hold as well.
`chosen` says which row counts on a machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from benchmarks.suites.problem import DTYPES, Problem
from benchmarks.suites.suites import Suite, find

# Each has what those before it have.
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx")

# What a class has that is not usual in its suite, by its word in the table.
FACTS: dict[str, dict[str, Any]] = {
    "2/3": {"mean_length": 2 / 3},  # of padded and packed batches, over the longest
    "dropout": {"dropout": 0.1},
    "relu": {"activation": "relu"},  # of the feed-forward
}

TABLE = """
suite           dir.     shape               variant      dtype level   gate  goal share  facts
forward         forward  2,8,8,512,512,64    full         fp32  avx512  1.20  1.35  0.80
forward         forward  1,8,8,2048,2048,64  full         fp32  avx512  1.20  1.35  0.80
forward         forward  2,8,8,512,512,128   full         fp32  avx512  1.15  1.28  0.80
forward         forward  1,8,8,2048,2048,128 full         fp32  avx512  1.15  1.28  0.80
forward         forward  2,8,8,512,512,64    causal       fp32  avx512  2.00  2.30     -
forward         forward  1,8,8,2048,2048,64  causal       fp32  avx512  1.45  1.70     -
forward         forward  8,12,12,128,128,64  full         fp32  avx512  1.25  1.45     -
forward         forward  32,8,8,100,100,64   full         fp32  avx512  1.25  1.45     -
forward         forward  8,12,12,128,128,64  causal       fp32  avx512  1.60  1.95     -
forward         forward  32,8,8,100,100,64   causal       fp32  avx512  1.60  1.95     -
forward         forward  2,8,8,512,512,64    full         bf16  avx512  2.30  2.60  0.72
forward         forward  1,8,8,2048,2048,64  full         bf16  avx512  2.30  2.60  0.80
forward         forward  2,8,8,512,512,128   full         bf16  avx512  2.10  2.45  0.72
forward         forward  1,8,8,2048,2048,128 full         bf16  avx512  2.10  2.45  0.80
forward         forward  2,8,8,512,512,64    causal       bf16  avx512  3.90  4.50     -
forward         forward  1,8,8,2048,2048,64  causal       bf16  avx512  2.80  3.20     -
forward         forward  8,12,12,128,128,64  full         bf16  avx512  2.30  2.80     -
forward         forward  32,8,8,100,100,64   full         bf16  avx512  2.30  2.80     -
forward         forward  8,12,12,128,128,64  causal       bf16  avx512  3.00  3.70     -
forward         forward  32,8,8,100,100,64   causal       bf16  avx512  3.00  3.70     -
masks           forward  8,8,8,512,512,64    padding      fp32  avx512  1.50  1.90     -  2/3
masks           forward  16,12,12,128,128,64 padding      fp32  avx512  1.50  1.90     -  2/3
masks           forward  2,8,8,512,512,64    bias         fp32  avx512  1.20  1.40     -
masks           forward  1,8,8,2048,2048,64  bias         fp32  avx512  1.20  1.40     -
masks           forward  8,8,8,512,512,64    padding      bf16  avx512  2.80  3.50     -  2/3
masks           forward  16,12,12,128,128,64 padding      bf16  avx512  2.80  3.50     -  2/3
masks           forward  2,8,8,512,512,64    bias         bf16  avx512  2.20  2.60     -
masks           forward  1,8,8,2048,2048,64  bias         bf16  avx512  2.20  2.60     -
forward         forward  8,12,12,128,128,64  full         fp16  avx512  2.30  3.00     -
forward         forward  1,2,2,512,512,64    full         fp16  avx512  2.30  3.00     -
masks           training 8,12,12,128,128,64  full         fp16  avx512  5.00  8.00     -
decode          forward  8,32,32,1,4096,128  full         fp32  avx512  2.20  2.90     -
decode          forward  8,32,32,1,4096,128  full         bf16  avx512  6.00 10.00     -
decode          forward  4,16,16,2,1024,64   full         fp32  avx512  1.00  1.30     -
decode          forward  4,16,16,8,1024,64   full         fp32  avx512  1.00  1.30     -
decode          forward  4,16,16,16,1024,64  full         fp32  avx512  1.00  1.30     -
decode          forward  4,16,16,8,1024,64   full         bf16  avx512  1.00  1.30     -
decode          forward  4,16,16,8,1024,64   full         fp16  avx512  1.00  1.30     -
decode          forward  4,32,8,1,2048,128   full         fp32  avx512  1.00  1.30     -
decode          forward  4,32,8,4,2048,128   full         fp32  avx512  1.00  1.30     -
decode          forward  4,32,8,1,2048,128   full         bf16  avx512  1.00  1.30     -
decode          forward  4,32,8,4,2048,128   full         bf16  avx512  1.00  1.30     -
forward         forward  4,16,4,512,512,64   full         fp32  avx512  1.00  1.30     -
masks           training 2,8,8,512,512,64    full         fp32  avx512  1.25  1.45     -
masks           training 1,8,8,2048,2048,64  full         fp32  avx512  1.25  1.45     -
masks           training 1,8,8,2048,2048,128 full         fp32  avx512  1.20  1.35     -
masks           training 2,8,8,512,512,64    causal       fp32  avx512  2.20  2.70     -
masks           training 8,12,12,128,128,64  full         fp32  avx512  1.35  1.70     -
masks           training 32,8,8,100,100,64   full         fp32  avx512  1.35  1.70     -
masks           training 2,8,8,512,512,64    full         bf16  avx512  2.10  2.50     -
masks           training 1,8,8,2048,2048,64  full         bf16  avx512  1.80  2.10     -
masks           training 1,8,8,2048,2048,128 full         bf16  avx512  1.80  2.10     -
masks           training 2,8,8,512,512,64    causal       bf16  avx512  3.70  4.50     -
masks           training 8,12,12,128,128,64  full         bf16  avx512  3.00  3.90     -
masks           training 32,8,8,100,100,64   full         bf16  avx512  3.00  3.90     -
packed          forward  8,8,8,512,64        full         fp32  avx512  1.50  2.00     -  2/3
packed          forward  32,8,8,128,64       full         fp32  avx512  1.50  2.00     -  2/3
packed          forward  8,8,8,512,64        full         bf16  avx512  3.00  4.00     -  2/3
packed          forward  32,8,8,128,64       full         bf16  avx512  3.00  4.00     -  2/3
layer_norm      forward  8192,1024           layer        fp32  avx512  3.00  5.00     -
layer_norm      forward  4096,768            layer        fp32  avx512  1.70  2.20     -
layer_norm      forward  8192,1024           layer        bf16  avx512  1.70  2.40     -
layer_norm      forward  4096,768            layer        bf16  avx512  1.70  2.40     -
layer_norm      backward 4096,768            layer        fp32  avx512  1.50  2.00     -
layer_norm      backward 4096,768            layer        bf16  avx512  1.90  3.00     -
bias_activation forward  2048,3072           gelu         fp32  avx512  1.20  2.00     -
bias_activation training 2048,3072           gelu         fp32  avx512  1.20  2.00     -  dropout
bias_activation forward  2048,4096           swiglu       fp32  avx512  1.20  2.00     -
bias_activation training 2048,4096           swiglu       fp32  avx512  1.20  2.00     -  dropout
bias_activation forward  2048,3072           gelu         bf16  avx512  1.20  2.00     -
bias_activation training 2048,3072           gelu         bf16  avx512  1.20  2.00     -  dropout
bias_activation forward  2048,4096           swiglu       bf16  avx512  1.20  2.00     -
bias_activation training 2048,4096           swiglu       bf16  avx512  1.20  2.00     -  dropout
modules         forward  1,2048,512,8        mha          bf16  avx512  1.80  2.30     -
modules         forward  2,2048,512,8        mha-padded   bf16  avx512  4.00  6.00     -  2/3
weights         forward  1,2048,512,8        mha-weights  bf16  avx512  2.00  3.00     -
modules         forward  1,2048,512,8        mha          fp32  avx512  1.20  1.40     -
modules         forward  32,100,512,8        mha          fp32  avx512  1.00  1.10     -
modules         forward  32,100,512,8        mha-padded   fp32  avx512  1.00  1.30     -  2/3
modules         forward  32,100,512,8        mha          bf16  avx512  1.00  1.10     -
modules         forward  32,100,512,8        mha-padded   bf16  avx512  1.00  1.30     -  2/3
modules         training 16,128,512,8        layer        fp32  avx512  1.00  1.00     -  relu
modules         forward  16,128,512,8        layer        fp32  avx512  1.00  1.00     -  relu
modules         training 16,128,512,8        layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         forward  16,128,512,8        layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         training 4,512,512,8         layer        fp32  avx512  1.00  1.00     -  relu
modules         forward  4,512,512,8         layer        fp32  avx512  1.00  1.00     -  relu
modules         training 4,512,512,8         layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         forward  4,512,512,8         layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         training 16,128,768,12       layer        fp32  avx512  1.00  1.00     -  relu
modules         forward  16,128,768,12       layer        fp32  avx512  1.00  1.00     -  relu
modules         training 16,128,768,12       layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         forward  16,128,768,12       layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         training 4,512,768,12        layer        fp32  avx512  1.00  1.00     -  relu
modules         forward  4,512,768,12        layer        fp32  avx512  1.00  1.00     -  relu
modules         training 4,512,768,12        layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         forward  4,512,768,12        layer-padded fp32  avx512  1.30  1.30     -  relu,2/3
modules         training 16,128,512,8        layer        bf16  avx512  1.00  1.00     -  relu
modules         forward  16,128,512,8        layer        bf16  avx512  1.00  1.00     -  relu
modules         training 16,128,512,8        layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
modules         forward  16,128,512,8        layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
modules         training 4,512,512,8         layer        bf16  avx512  1.00  1.00     -  relu
modules         forward  4,512,512,8         layer        bf16  avx512  1.00  1.00     -  relu
modules         training 4,512,512,8         layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
modules         forward  4,512,512,8         layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
modules         training 16,128,768,12       layer        bf16  avx512  1.00  1.00     -  relu
modules         forward  16,128,768,12       layer        bf16  avx512  1.00  1.00     -  relu
modules         training 16,128,768,12       layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
modules         forward  16,128,768,12       layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
modules         training 4,512,768,12        layer        bf16  avx512  1.00  1.00     -  relu
modules         forward  4,512,768,12        layer        bf16  avx512  1.00  1.00     -  relu
modules         training 4,512,768,12        layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
modules         forward  4,512,768,12        layer-padded bf16  avx512  1.30  1.30     -  relu,2/3
overhead        forward  1,2,2,4,4,16        full         fp32  avx512   2/3  1.00     -
overhead        training 1,2,2,4,4,16        full         fp32  avx512  1.00  1.25     -

forward         forward  2,8,8,512,512,64    full         fp32  avx2    1.20  1.35  0.80
forward         forward  1,8,8,2048,2048,64  full         fp32  avx2    1.20  1.35  0.80
forward         forward  2,8,8,512,512,128   full         fp32  avx2    1.15  1.30  0.80
forward         forward  1,8,8,2048,2048,128 full         fp32  avx2    1.15  1.30  0.80
forward         forward  2,8,8,512,512,64    causal       fp32  avx2    2.20  2.60     -
forward         forward  1,8,8,2048,2048,64  causal       fp32  avx2    1.55  1.80     -
forward         forward  8,12,12,128,128,64  full         fp32  avx2    1.40  1.70     -
forward         forward  32,8,8,100,100,64   full         fp32  avx2    1.40  1.70     -
forward         forward  8,12,12,128,128,64  causal       fp32  avx2    2.20  2.80     -
forward         forward  32,8,8,100,100,64   causal       fp32  avx2    2.20  2.80     -
forward         forward  2,8,8,512,512,64    full         bf16  avx2    1.35  1.50  0.80
forward         forward  1,8,8,2048,2048,64  full         bf16  avx2    1.35  1.50  0.80
forward         forward  2,8,8,512,512,128   full         bf16  avx2    1.20  1.35  0.80
forward         forward  1,8,8,2048,2048,128 full         bf16  avx2    1.20  1.35  0.80
forward         forward  2,8,8,512,512,64    causal       bf16  avx2    2.40  3.00     -
forward         forward  8,12,12,128,128,64  full         bf16  avx2    1.40  1.80     -
forward         forward  32,8,8,100,100,64   full         bf16  avx2    1.40  1.80     -
masks           forward  8,8,8,512,512,64    padding      fp32  avx2    1.60  1.90     -  2/3
masks           forward  16,12,12,128,128,64 padding      fp32  avx2    1.60  1.90     -  2/3
masks           forward  2,8,8,512,512,64    bias         fp32  avx2    1.15  1.30     -
masks           forward  1,8,8,2048,2048,64  bias         fp32  avx2    1.15  1.30     -
masks           training 8,12,12,128,128,64  full         fp16  avx2    2.00  2.60     -
decode          forward  8,32,32,1,4096,128  full         fp32  avx2    1.60  2.20     -
decode          forward  8,32,32,1,4096,128  full         bf16  avx2    5.00  8.00     -
masks           training 2,8,8,512,512,64    full         fp32  avx2    1.30  1.45  0.80
masks           training 1,8,8,2048,2048,64  full         fp32  avx2    1.30  1.45  0.80
masks           training 1,8,8,2048,2048,128 full         fp32  avx2    1.20  1.35  0.80
masks           training 2,8,8,512,512,64    causal       fp32  avx2    2.50  3.00     -
masks           training 2,8,8,512,512,64    full         bf16  avx2    2.10  2.60  0.80
masks           training 8,12,12,128,128,64  full         bf16  avx2    2.00  2.60     -
masks           training 32,8,8,100,100,64   full         bf16  avx2    2.00  2.60     -
linear          forward  2048,256,1024        full         bf16  avx2    4.00  8.00     -
linear          training 2048,256,1024        full         bf16  avx2    4.00  8.00     -
linear          forward  2048,256,1024        full         fp16  avx2    4.00  8.00     -
linear          training 2048,256,1024        full         fp16  avx2    4.00  8.00     -
linear          forward  1024,512,1536        full         bf16  avx2    4.00  8.00     -
linear          training 1024,512,1536        full         bf16  avx2    4.00  8.00     -
linear          forward  1024,512,1536        full         fp16  avx2    4.00  8.00     -
linear          training 1024,512,1536        full         fp16  avx2    4.00  8.00     -
linear          forward  512,768,3072         full         bf16  avx2    4.00  8.00     -
linear          training 512,768,3072         full         bf16  avx2    4.00  8.00     -
linear          forward  512,768,3072         full         fp16  avx2    4.00  8.00     -
linear          training 512,768,3072         full         fp16  avx2    4.00  8.00     -
linear          forward  256,512,2048         full         bf16  avx2    4.00  8.00     -
linear          training 256,512,2048         full         bf16  avx2    4.00  8.00     -
linear          forward  256,512,2048         full         fp16  avx2    4.00  8.00     -
linear          training 256,512,2048         full         fp16  avx2    4.00  8.00     -
linear          forward  64,512,512           full         bf16  avx2    4.00  8.00     -
linear          training 64,512,512           full         bf16  avx2    4.00  8.00     -
linear          forward  64,512,512           full         fp16  avx2    4.00  8.00     -
linear          training 64,512,512           full         fp16  avx2    4.00  8.00     -
linear          forward  2048,256,1024        full         bf16  avx512_bf16 1.00 1.10 -
linear          training 2048,256,1024        full         bf16  avx512_bf16 1.00 1.10 -
linear          forward  1024,512,1536        full         bf16  avx512_bf16 1.00 1.10 -
linear          training 1024,512,1536        full         bf16  avx512_bf16 1.00 1.10 -
linear          forward  512,768,3072         full         bf16  avx512_bf16 1.00 1.10 -
linear          training 512,768,3072         full         bf16  avx512_bf16 1.00 1.10 -
linear          forward  256,512,2048         full         bf16  avx512_bf16 1.00 1.10 -
linear          training 256,512,2048         full         bf16  avx512_bf16 1.00 1.10 -
linear          forward  64,512,512           full         bf16  avx512_bf16 1.00 1.10 -
linear          training 64,512,512           full         bf16  avx512_bf16 1.00 1.10 -
forward         forward  2,8,8,512,512,64     full         bf16  avx512_amx 1.00 1.60 -
forward         forward  1,8,8,2048,2048,64   full         bf16  avx512_amx 1.00 1.60 -
forward         forward  2,8,8,512,512,128    full         bf16  avx512_amx 1.00 1.60 -
forward         forward  1,8,8,2048,2048,128  full         bf16  avx512_amx 1.00 1.60 -
forward         forward  2,8,8,512,512,64     causal       bf16  avx512_amx 1.00 1.60 -
forward         forward  1,8,8,2048,2048,64   causal       bf16  avx512_amx 1.00 1.60 -
forward         forward  8,12,12,128,128,64   full         bf16  avx512_amx 1.00 1.60 -
forward         forward  32,8,8,100,100,64    full         bf16  avx512_amx 1.00 1.60 -
forward         forward  8,12,12,128,128,64   causal       bf16  avx512_amx 1.00 1.60 -
forward         forward  32,8,8,100,100,64    causal       bf16  avx512_amx 1.00 1.60 -
masks           forward  8,8,8,512,512,64     padding      bf16  avx512_amx 1.00 1.60 -  2/3
masks           forward  16,12,12,128,128,64  padding      bf16  avx512_amx 1.00 1.60 -  2/3
masks           forward  2,8,8,512,512,64     bias         bf16  avx512_amx 1.00 1.60 -
masks           forward  1,8,8,2048,2048,64   bias         bf16  avx512_amx 1.00 1.60 -
decode          forward  8,32,32,1,4096,128   full         bf16  avx512_amx 1.00 1.30 -
decode          forward  4,16,16,8,1024,64    full         bf16  avx512_amx 1.00 1.30 -
decode          forward  4,32,8,1,2048,128    full         bf16  avx512_amx 1.00 1.30 -
decode          forward  4,32,8,4,2048,128    full         bf16  avx512_amx 1.00 1.30 -
masks           training 2,8,8,512,512,64     full         bf16  avx512_amx 1.50 3.00 -
masks           training 1,8,8,2048,2048,64   full         bf16  avx512_amx 1.50 3.00 -
masks           training 1,8,8,2048,2048,128  full         bf16  avx512_amx 1.50 3.00 -
masks           training 2,8,8,512,512,64     causal       bf16  avx512_amx 1.50 3.00 -
masks           training 8,12,12,128,128,64   full         bf16  avx512_amx 1.50 3.00 -
masks           training 32,8,8,100,100,64    full         bf16  avx512_amx 1.50 3.00 -
packed          forward  8,8,8,512,64         full         bf16  avx512_amx 1.00 2.00 -  2/3
packed          forward  32,8,8,128,64        full         bf16  avx512_amx 1.00 2.00 -  2/3
modules         forward  1,2048,512,8         mha          bf16  avx512_amx 1.00 1.20 -
modules         forward  2,2048,512,8         mha-padded   bf16  avx512_amx 1.00 1.20 -  2/3
weights         forward  1,2048,512,8         mha-weights  bf16  avx512_amx 1.00 1.20 -
modules         forward  32,100,512,8         mha          bf16  avx512_amx 1.00 1.20 -
modules         forward  32,100,512,8         mha-padded   bf16  avx512_amx 1.00 1.20 -  2/3
"""


@dataclass(frozen=True)
class Gate:
    """A row of the table.

    Attributes:
        gate, goal: ratios of the fastest peer's time to ours.
        share: of the peak of multiply-adds that must hold as well; 0 for none.
        facts: keys of `FACTS`.
    """

    suite: Suite
    direction: str
    shape: str
    variant: str
    dtype: str
    level: str
    gate: float
    goal: float
    share: float
    facts: tuple[str, ...] = ()

    @property
    def problem(self) -> Problem:
        """What is measured."""
        facts = {name: value for fact in self.facts for name, value in FACTS[fact].items()}
        return self.suite.problem(
            self.shape, self.variant, DTYPES[self.dtype], self.direction, **facts
        )

    @property
    def name(self) -> str:
        """The class in the words of all records, old ones too: "fp32 fwd 2x8x512x64 causal"."""
        words = NAMES.get(self.suite.name, _attention)
        numbers = [int(number) for number in self.shape.split(",")]
        return f"{self.dtype} {words(numbers, self.direction, self.variant)}"

    def below(self, level: str) -> Gate:
        """The row where nothing is set for so little a machine: torch's speed, and no share."""
        return dataclasses.replace(
            self, level=level, gate=min(self.gate, 1.0), goal=min(self.goal, 1.0), share=0.0
        )


def chosen(level: str, rows: Sequence[Gate]) -> list[Gate]:
    """One row a class, in the table's order: the one for `level`, else for the next lower level.

    Where a class has rows for higher levels alone, it is the lowest of them, `below` it.
    """
    here = LEVELS.index(level) if level in LEVELS else 0
    classes: dict[str, list[Gate]] = {}
    for row in rows:
        classes.setdefault(row.name, []).append(row)
    return [_applies(sorted(same, key=_rank), here) for same in classes.values()]


def _rank(row: Gate) -> int:
    return LEVELS.index(row.level)


def _applies(rows: Sequence[Gate], here: int) -> Gate:
    within = [row for row in rows if _rank(row) <= here]
    return within[-1] if within else rows[0].below(LEVELS[here])


def _attention(sizes: list[int], direction: str, variant: str) -> str:
    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim = sizes
    label = "" if variant == "full" else f" {variant}"
    if seqlen_q != seqlen_k:
        label += " decode" if seqlen_q == 1 else f" Lq={seqlen_q}"
    if heads != heads_kv:
        label += f" grouped {heads}/{heads_kv}"
    way = "fwd" if direction == "forward" else "fwd+bwd"
    return f"{way} {batch}x{heads}x{seqlen_k}x{head_dim}{label}"


def _packed(sizes: list[int], direction: str, variant: str) -> str:
    batch, heads, _, length, head_dim = sizes
    return f"packed {batch}x{heads}x{length}x{head_dim}"


def _layer_norm(sizes: list[int], direction: str, variant: str) -> str:
    return f"add+layer_norm {'fwd' if direction == 'forward' else 'bwd'} {sizes[0]}x{sizes[1]}"


def _bias_activation(sizes: list[int], direction: str, variant: str) -> str:
    return f"bias+{variant} {'fwd' if direction == 'forward' else 'train'} {sizes[0]}x{sizes[1]}"


def _linear(sizes: list[int], direction: str, variant: str) -> str:
    return f"linear {'fwd' if direction == 'forward' else 'fwd+bwd'} " + "x".join(map(str, sizes))


def _module(sizes: list[int], direction: str, variant: str) -> str:
    batch, length, width, _ = sizes
    kind, _, extra = variant.partition("-")
    label = {"": "", "padded": " padding", "weights": " weights"}[extra]
    if kind == "mha":
        return f"module {batch}x{length}x{width}{label}"
    return f"encoder {'infer' if direction == 'forward' else 'train'} d{width} L{length}{label}"


def _call(sizes: list[int], direction: str, variant: str) -> str:
    return "tiny call" if direction == "forward" else "tiny call fwd+bwd"


NAMES = {
    "packed": _packed,
    "layer_norm": _layer_norm,
    "bias_activation": _bias_activation,
    "linear": _linear,
    "modules": _module,
    "weights": _module,
    "overhead": _call,
}


def parse(table: str) -> list[Gate]:
    """The rows of a table like `TABLE`: a head, then rows; numbers may be fractions, "-" is 0."""
    _, *lines = table.strip().splitlines()
    return [_row(*line.split()) for line in lines if line]


def _row(
    suite: str, direction: str, shape: str, variant: str, dtype: str, level: str, gate: str,
    goal: str, share: str, facts: str = "",
) -> Gate:  # fmt: skip
    return Gate(
        find(suite), direction, shape, variant, dtype, level, _number(gate), _number(goal),
        _number(share), tuple(word for word in facts.split(",") if word),
    )  # fmt: skip


def _number(text: str) -> float:
    return 0.0 if text == "-" else float(Fraction(text))


GATES = parse(TABLE)
