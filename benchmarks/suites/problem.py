"""What is measured: a problem, described once for all sides, and how one side is called."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIRECTIONS = ("forward", "backward", "training")
OK, WRONG, FAILED, REFUSED, ABSENT = "ok", "wrong", "failed", "refused", "absent"


def _same(x: Tensor) -> Tensor:
    return x


@dataclass
class Prepared:
    """How one side computes a problem.

    Attributes:
        forward: computes the outputs, the main one first, in the side's own layout.
        inputs: the leaves that gradients are taken of, by the problem's names.
        arrange: brings the gradient of the main output into the side's own layout.
        restore: brings an output, or the gradient of the input named, into the problem's.
    """

    forward: Callable[[], Any]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    arrange: Callable[[Tensor], Tensor] = _same
    restore: Callable[[str, Tensor], Tensor] = lambda name, x: x

    def main(self) -> Tensor:
        """The main output of one forward."""
        outputs = self.forward()
        return outputs if isinstance(outputs, Tensor) else outputs[0]


Prepare = Callable[[dict[str, Tensor]], Prepared]


@dataclass
class Side:
    """Who computes a problem (one of our backends, the choice among them, a peer), and how it went.

    Attributes:
        reasons: why it cannot take the problem.
        by_name: why it is not measured unless it is asked for by name; empty if it is.
        status: "ok", or why there is no figure: "wrong: ...", "failed: ...", "refused: ..." (cannot
            take this problem, or was not asked to), "absent: ..." (not on this machine).
    """

    name: str
    prepare: Prepare
    reasons: Sequence[str] = ()
    by_name: str = ""
    ours: bool = True
    status: str = OK

    @property
    def verdict(self) -> str:
        return self.status.partition(":")[0]

    def refuse(self, named: bool) -> None:
        """Have the status say why it is not measured, if it is not; `named`: was asked for."""
        reasons = list(self.reasons) or ([self.by_name] if self.by_name and not named else [])
        if reasons:
            self.status = f"{REFUSED}: {'; '.join(reasons)}"


@dataclass(frozen=True, kw_only=True)
class Problem(abc.ABC):
    """One operation at one size, in one dtype, on one device.

    Attributes:
        direction: "forward" (no gradient wanted), "backward" (alone) or "training" (both).
    """

    operation: ClassVar[str]
    bound: ClassVar[str] = "none"  # "compute", "memory": which ceiling says something
    differentiable: ClassVar[tuple[str, ...]] = ()  # inputs that a gradient is taken of
    outputs: ClassVar[tuple[str, ...]] = ("out",)  # what is compared, the main one first

    dtype: torch.dtype
    device: str = "cpu"
    direction: str = "forward"

    @property
    @abc.abstractmethod
    def size(self) -> str:
        """The sizes in a word, as "2x8x512x64 causal"."""

    @property
    def label(self) -> str:
        """Names the case in tables and files."""
        return f"{SHORT_NAMES[self.dtype]} {self.direction} {self.size}"

    @abc.abstractmethod
    def columns(self) -> dict[str, object]:
        """The sizes by name, for the file."""

    @property
    def flops(self) -> float:
        """FLOPs of a call, as docs/benchmarks.md counts them; 0: says little."""
        return 0.0

    @property
    def bytes(self) -> float:
        """Bytes that a call must move at least, counted likewise; 0: says little."""
        return 0.0

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Random inputs by name."""

    @abc.abstractmethod
    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        """The outputs in plain PyTorch, in the dtype of the tensors: oracle and yardstick."""

    @abc.abstractmethod
    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        """Our sides, in order of preference."""

    def part(self, name: str, x: Tensor) -> Tensor:
        """The part of an input or output that is compared; the formula maps parts to parts."""
        return x

    def checked(self) -> Problem:
        """The problem that a side must get right before its time for this one counts."""
        return self

    def noise(
        self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]
    ) -> list[float] | None:
        """What rounding stored results does to output and gradients (see `testing`)."""
        return None

    def output_gradient(self, out: Tensor) -> Tensor:
        """A random gradient of the main output."""
        return torch.randn(out.shape, device=out.device).to(out.dtype)

    def replace(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)

    @property
    def wants_gradient(self) -> bool:
        return self.direction != "forward"

    def draw(self, *shape: int) -> Tensor:
        """Random numbers of the dtype on the device."""
        return torch.randn(shape, device=self.device).to(self.dtype)


def leaves(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The differentiable ones of `tensors`, if a gradient is wanted."""
    if not problem.wants_gradient:
        return {}
    return {name: tensors[name] for name in problem.differentiable if name in tensors}


def with_flags(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, the differentiable ones marked so if a gradient is wanted."""
    wanted = leaves(problem, tensors)
    return {name: x.requires_grad_(name in wanted) if x.is_floating_point() else x
            for name, x in tensors.items()}  # fmt: skip


def step(problem: Problem, prepared: Prepared, dout: Tensor) -> Callable[[], object]:
    """What is timed where a gradient is wanted: the backward alone, or both."""
    inputs, grad = list(prepared.inputs.values()), prepared.arrange(dout)
    if problem.direction == "training":
        return lambda: torch.autograd.grad(prepared.main(), inputs, grad)
    out = prepared.main()
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
