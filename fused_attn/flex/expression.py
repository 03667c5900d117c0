"""A function of (score, b, h, q_idx, kv_idx), read once into the torch operations that it calls.

The function is called with numbers (tensors without dimensions), and every operation on them is
written down. Such a list can then be run on whole tiles at once, differentiated by torch, and
looked through for shapes that the kernels know.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..runtime import subclasses

aten: Any = torch.ops.aten

MASK_INPUTS = ("b", "h", "q_idx", "kv_idx")
SCORE_INPUTS = ("score", *MASK_INPUTS)
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
# Beside torch's element-wise operations: what gives one number for one number as well.
_ALSO_BY_ELEMENT = {
    aten._to_copy.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.searchsorted.Tensor,
    aten.bucketize.Tensor,
}


class CannotRead(Exception):
    """Says what in a function cannot be read, and in which line."""


@dataclass(eq=False)
class Node:
    """One operation; its arguments are nodes, captured tensors' nodes and plain values.

    Attributes:
        operation: the operation, or None of an input or a captured tensor.
        varies: it depends on an input.
        dtype: of what it gives for numbers.
    """

    operation: Any
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    varies: bool = False
    name: str = ""  # of an input
    captured: int = -1  # number of a captured tensor
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Expression:
    """What a function computes.

    Attributes:
        inputs: its arguments' nodes by name.
        nodes: in the order in which they are computed.
        result: the node of what it returns.
        captured: the tensors that it took from around itself.
    """

    inputs: dict[str, Node]
    nodes: list[Node]
    result: Node
    captured: list[Tensor]

    def evaluate(self, inputs: dict[str, Tensor], captured: list[Tensor]) -> Tensor:
        """The result on tensors that broadcast to (B, H, queries, keys)."""
        values: dict[Node, Any] = {node: inputs[name] for name, node in self.inputs.items()}
        for node in self.nodes:
            is_captured = node.captured >= 0
            values[node] = captured[node.captured] if is_captured else run(node, values)
        return values[self.result]


@dataclass
class _Partly:
    """A table of which some dimensions are chosen already; None where one is left."""

    table: Tensor
    chosen: list[Tensor | None]

    def choose(self, indices: list[Any]) -> Any:
        left = [n for n, index in enumerate(self.chosen) if index is None]
        chosen = list(self.chosen)
        for place, index in zip(left, indices, strict=False):
            chosen[place] = index
        if any(index is None for index in chosen):
            return _Partly(self.table, chosen)
        return aten.index.Tensor(self.table, chosen)


def run(node: Node, values: dict[Node, Any]) -> Any:
    """One operation, on whole tiles where the function had numbers."""
    args = tuple(_filled(arg, values) for arg in node.args)
    options = {name: _filled(value, values) for name, value in node.options}
    if not node.varies:
        return node.operation(*args, **options)
    if node.operation is aten.index.Tensor:
        return _as_partly(args[0]).choose([_whole(index) for index in args[1]])
    if node.operation is aten.select.int:
        partly, dim, index = _as_partly(args[0]), args[1], args[2]
        number = torch.tensor(index, device=partly.table.device)
        left = sum(one is None for one in partly.chosen)
        return partly.choose([None] * (dim % left) + [number])
    return node.operation(*args, **options)


def _as_partly(table: Any) -> _Partly:
    return table if isinstance(table, _Partly) else _Partly(table, [None] * table.dim())


def _whole(index: Any) -> Any:
    return index.long() if isinstance(index, Tensor) and index.dtype == torch.int32 else index


def _filled(arg: Any, values: dict[Node, Any]) -> Any:
    if isinstance(arg, Node):
        return values[arg]
    if isinstance(arg, (list, tuple)):
        return [_filled(each, values) for each in arg]
    return arg


def read(
    function: Callable[..., Any], names: tuple[str, ...], what: str, like: Tensor
) -> Expression:
    """The expression of a function.

    Args:
        names: `MASK_INPUTS` or `SCORE_INPUTS`.
        what: the argument that it was given as, for messages.
        like: q, for its device and the dtype of its scores.

    Raises:
        CannotRead: it calls what has no meaning for a tile, or returns no number.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    numbers = [
        torch.zeros((), dtype=dtype if name == "score" else torch.int64, device=like.device)
        for name in names
    ]
    reader = _Reader(what, like.device)
    inputs = {name: reader.add_input(x, name) for name, x in zip(names, numbers, strict=True)}
    with torch.no_grad(), _ItemAsIndex(), reader:
        result = function(*numbers)
    if not isinstance(result, Tensor):
        raise CannotRead(f"`{what}` must return a tensor, got {type(result).__name__} {result!r}")
    node = reader.node_of(result)
    if result.dim() != 0:
        raise CannotRead(f"`{what}` must return one number, got shape {tuple(result.shape)}")
    wanted = result.dtype == torch.bool if names is MASK_INPUTS else result.is_floating_point()
    if not wanted:
        kind = "bool" if names is MASK_INPUTS else "floating"
        raise CannotRead(f"`{what}` must return a {kind} tensor, got {result.dtype}")
    return Expression(inputs, reader.nodes, node, reader.captured)


class _ItemAsIndex(TorchFunctionMode):
    """`table[q_idx]` stays an index; torch would read the number out of a tensor without size."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            tensor, index = args
            items = index if isinstance(index, tuple) else (index,)
            if any(isinstance(item, Tensor) and item.dim() == 0 for item in items):
                return aten.index.Tensor(tensor, [_index_of(item, tensor) for item in items])
        return func(*args, **(kwargs or {}))


def _index_of(item: Any, table: Tensor) -> Any:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, slice) and item == slice(None):
        return None
    if isinstance(item, int):
        return torch.tensor(item, device=table.device)
    raise CannotRead(f"an index must be numbers and `:`, got {item!r}")


class _Reader(TorchDispatchMode):
    """Writes down what is called, and checks that it has a meaning for tiles."""

    def __init__(self, what: str, device: torch.device) -> None:
        super().__init__()
        self.what, self.device = what, device
        self.nodes: list[Node] = []
        self.captured: list[Tensor] = []
        self._known: dict[int, Node] = {}
        self._kept: list[Tensor] = []  # so that no number of an object is used twice

    def add_input(self, tensor: Tensor, name: str) -> Node:
        return self._remember(tensor, Node(None, varies=True, name=name))

    def node_of(self, tensor: Tensor) -> Node:
        """Of a result; a tensor that nothing here made is captured."""
        node = self._known.get(id(tensor))
        if node is None and subclasses.door_of((tensor,)) is not None:
            raise CannotRead(
                f"`{self.what}` captured a DTensor{_line_of_user()}; it may capture tensors that "
                "every rank has whole: `full_tensor()`"
            )
        if node is None:
            node = Node(None, captured=len(self.captured))
            self.captured.append(tensor)
            self.nodes.append(self._remember(tensor, node))
        return node

    def _remember(self, tensor: Tensor, node: Node) -> Node:
        self._known[id(tensor)] = node
        node.dtype = tensor.dtype
        self._kept.append(tensor)
        return node

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles what runs here; else torch would first import its compiler."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        made = Node(
            func,
            tuple(self._noted(arg) for arg in args),
            tuple((name, self._noted(value)) for name, value in options.items()),
        )
        made.varies = any(node.varies for node in nodes_in((made.args, made.options)))
        self._check(func, made)
        result = func(*args, **options)
        if isinstance(result, Tensor):
            self._check_result(func, made, result)
            self.nodes.append(self._remember(result, made))
        elif made.varies:
            raise self._refusal(func, "gives more than one tensor")
        return result

    def _noted(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.node_of(arg)
        if isinstance(arg, (list, tuple)):
            return tuple(self._noted(each) for each in arg)
        return arg

    def _check(self, func: Any, made: Node) -> None:
        if func._schema.is_mutable:
            raise self._refusal(func, "changes a tensor in place")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self._refusal(func, "draws random numbers; capture a tensor of them instead")
        if made.varies and func in (aten._local_scalar_dense.default, aten.item.default):
            raise self._refusal(
                func, "decides by a value that differs from pair to pair; use torch.where"
            )

    def _check_result(self, func: Any, made: Node, result: Tensor) -> None:
        if result.device != self.device and result.dim() > 0:
            raise self._refusal(func, f"gives a tensor on {result.device}, not {self.device}")
        if not made.varies or func in (aten.index.Tensor, aten.select.int):
            return
        if torch.Tag.pointwise not in func.tags and func not in _ALSO_BY_ELEMENT:
            raise self._refusal(func, "has no meaning for one score")
        if result.dim() != 0:
            raise self._refusal(func, f"gives shape {tuple(result.shape)} in place of a number")

    def _refusal(self, func: Any, reason: str) -> CannotRead:
        name = func.name().removeprefix("aten::").split(".")[0]
        return CannotRead(f"`{self.what}` calls `{name}`, which {reason}{_line_of_user()}")


def nodes_in(values: Any) -> list[Node]:
    if isinstance(values, Node):
        return [values]
    if isinstance(values, (list, tuple)):
        return [node for value in values for node in nodes_in(value)]
    return []


def _line_of_user() -> str:
    """Where the function is, outside of torch and of this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE)):
            line = linecache.getline(name, frame.f_lineno).strip()
            return f", in {name}:{frame.f_lineno}: {line}"
        frame = frame.f_back
    return ""
