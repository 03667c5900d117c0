"""From clocks of a step to TFLOP/s, by what is published of other kernels on H100 and H200.

Two things are fitted. The share of exponentials and issue that is not hidden behind products comes
from the loops of FlashAttention-4's kernels for sm_90 (their instructions were counted in compiled
code, shared notes A.7) and the speeds that their authors and others measured. How much of it a
length keeps comes from cuDNN 9.19 on an H200 (batch 1, 64 heads over 8, head size 128, bfloat16).

An effective model: the clock is the nominal one, so what power takes off it is in the share.
"""

from __future__ import annotations

from typing import NamedTuple

MULTIPROCESSORS, GIGAHERTZ = 132, 1.83
FLOPS_A_CLOCK = 4096  # of one multiprocessor, 16-bit with float32 sums
PEAK = MULTIPROCESSORS * FLOPS_A_CLOCK * GIGAHERTZ / 1e3  # TFLOP/s


class Clocks(NamedTuple):
    """What each unit of a multiprocessor is busy for, in one step."""

    tensor: int
    exponentials: int
    issue: int
    shared: int

    def limit(self) -> str:
        """The busiest unit."""
        return max(self._fields, key=lambda name: getattr(self, name))


class Published(NamedTuple):
    """A kernel of others: its step, and what it was measured at."""

    name: str
    family: str
    flops: int
    clocks: Clocks
    length: int
    tflops: float


def _step(groups: int, instructions: int, exponentials: int, tensor: int, shared: int) -> Clocks:
    """Of `groups` warpgroups that do this each, shared in bytes."""
    return Clocks(
        groups * tensor, groups * exponentials * 8, groups * instructions, groups * shared // 128
    )


FIT = (
    # 640 to 660. 8 products of 64 x 128 from shared memory, 8 with P in registers; 128 x 128.
    Published("FlashAttention, D 128 forward", "forward", 4 * 128 * 128 * 128,
              _step(2, 498, 66, 16 * 64, 8 * 6144 + 8 * 4096), 16384, 650),
    # 4 of 64 x 128 and 8 of 64 x 64; 192 x 128 a step.
    Published("FlashAttention, D 64 forward", "forward", 4 * 192 * 128 * 64,
              _step(3, 418, 66, 4 * 64 + 8 * 32, 4 * 6144 + 8 * 2048), 16384, 490),
    # 24 of 64 x 64, 8 of 64 x 128 from registers; 64 x 128 a step.
    Published("FlashAttention, D 128 backward", "backward", 10 * 64 * 128 * 128,
              _step(2, 503, 32, 24 * 32 + 8 * 64, 24 * 4096 + 8 * 4096), 16384, 560),
)  # fmt: skip

# cuDNN 9.19, H200, TFLOP/s by length: full, causal.
CUDNN = {
    "forward": {2048: (633, 484), 4096: (671, 591), 8192: (691, 644), 16384: (702, 673)},
    "backward": {2048: (504, 370), 4096: (560, 474), 8192: (594, 541), 16384: (612, 579)},
}


def kept(family: str, length: int, causal: bool) -> float:
    """The share of the speed of endless calls that one of this length has."""
    return length / (length + LOST[family][causal])


def _fit_lost(family: str, causal: bool) -> tuple[float, float]:
    """(speed of an endless call, rows lost): least relative squares over cuDNN's lengths.

    1 / speed is linear in 1 / length.
    """
    points = [(1 / n, 1 / both[causal]) for n, both in CUDNN[family].items()]
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mx = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    my = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    slope = sum(w * (x - mx) * (y - my) for w, (x, y) in zip(weights, points, strict=True))
    slope /= sum(w * (x - mx) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    base = my - slope * mx
    return 1 / base, slope / base


LOST = {f: tuple(_fit_lost(f, causal)[1] for causal in (False, True)) for f in CUDNN}


def ideal(flops: int) -> float:
    """Clocks of the matrix unit alone."""
    return flops / FLOPS_A_CLOCK


def softmax(clocks: Clocks) -> int:
    """The busier of exponentials and issue."""
    return max(clocks.exponentials, clocks.issue)


def _fit_share(family: str) -> float:
    """The share of `softmax` that a step takes besides its products: mean of what is published."""
    shares = []
    for each in FIT:
        if each.family == family:
            endless = each.tflops / kept(family, each.length, False)
            step = ideal(each.flops) * PEAK / endless
            shares.append((step - each.clocks.tensor) / softmax(each.clocks))
    return sum(shares) / len(shares)


SHARE = {family: _fit_share(family) for family in CUDNN}


def step_clocks(family: str, clocks: Clocks) -> float:
    """Clocks of a step."""
    return max(clocks.tensor + SHARE[family] * softmax(clocks), clocks.shared)


def tflops(family: str, flops: int, clocks: Clocks, length: int, causal: bool) -> float:
    """TFLOP/s of a call of many heads; causal counts half the scores."""
    endless = PEAK * ideal(flops) / step_clocks(family, clocks)
    return endless * kept(family, length, causal)


# Not fitted to, so that they say how far off the model is: kernel in FIT, length, TFLOP/s; causal.
HELD_OUT = (
    ("FlashAttention, D 64 forward", 16384, 460),
    ("FlashAttention, D 128 backward", 4096, 444),
    ("FlashAttention, D 128 backward", 8192, 539),
)


def held_out() -> list[tuple[str, float, float]]:
    """(what, published, by the model) of what it was not fitted to."""
    kernels = {each.name: each for each in FIT}
    found = []
    for name, length, published in HELD_OUT:
        _, family, flops, clocks, *_ = kernels[name]
        ours = tflops(family, flops, clocks, length, causal=True)
        found.append((f"{name} causal, {length}", float(published), ours))
    return found


def errors() -> list[tuple[str, float, float]]:
    """(what, published, by the model) of everything that it was fitted to."""
    found = [(e.name, e.tflops, tflops(e.family, e.flops, e.clocks, e.length, False)) for e in FIT]
    for family, speeds in CUDNN.items():
        for causal in (False, True):
            endless, _ = _fit_lost(family, causal)
            for length, both in speeds.items():
                name = f"cuDNN {family}{' causal' if causal else ''} {length}"
                found.append((name, both[causal], endless * kept(family, length, causal)))
    return found
