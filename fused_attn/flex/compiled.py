"""Any functions inside of the kernels' own loop, where a backend can run their instructions.

A backend runs them if it has `forward_with_functions`, `backward_with_functions` and
`why_not_functions`: as a program of instructions or, if it `READS_VALUES`, as values that it makes
code of itself. What none can run goes block by block (`tiles.py`).
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.attention import BACKENDS
from ..ops.attention.functions import PairFunctions
from ..ops.attention.functions import Sum as PairSum
from ..ops.explanation import BY_NAME
from . import operands
from .blocks import ALL, listed
from .call import Call
from .derivative import derivatives
from .expression import Expression, Node
from .lowering import Leaf, Lowering
from .memory import memory_of
from .pairs import CannotCompile, Sum, Value, program
from .rules import RULES
from .vectors import Sizes, Vectors

# Numbers that copies of tables for every head may take, beside four times those of q, k and v.
_MOST_COPIES = 1 << 20
_SUMS = {"one": "sum_one", "query": "sum_query", "key": "sum_key", "distance": "sum_distance"}


def why_not(call: Call, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Reasons why no kernel runs the functions of a call in its loop; empty if one does."""
    captured = call.captured()
    backend, reasons = _backend((q, k, v, *captured))
    if backend is not None:
        try:
            _plan_of(backend, call, q, k, v, captured)
        except CannotCompile as error:
            reasons = [str(error)]
    return reasons


def way(call: Call, q: Tensor, k: Tensor, v: Tensor) -> str:
    """How functions run that are no operands."""
    against = why_not(call, q, k, v)
    if against:
        return f"by tiles: {'; '.join(against)}"
    captured = call.captured()
    backend, _ = _backend((q, k, v, *captured))
    how = getattr(backend, "HOW_FUNCTIONS_RUN", "in the kernel's own loop")
    if torch.is_grad_enabled() and any(x.requires_grad for x in captured):
        try:
            with torch.enable_grad():
                _plan_of(backend, call, q, k, v, captured).check_gradients()
        except (CannotCompile, RecursionError) as error:
            return f"{how}; its backward by tiles: {error}"
    return how


def forward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
) -> bool:
    """Writes out (B, H, Lq, Dv) and lse (B, H, Lq); False where no kernel can."""
    backend, _ = _backend((q, k, v, *captured))
    if backend is None:
        return False
    try:
        plan = _plan_of(backend, call, q, k, v, captured)
    except CannotCompile:
        return False
    backend.forward_with_functions(plan.operands, plan.options, plan.forward(), out, lse)
    return True


def gradients(
    call: Call,
    qkv: tuple[Tensor, Tensor, Tensor],
    captured: Sequence[Tensor],
    given: tuple[Tensor, Tensor, Tensor, Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None] | None:
    """Of (q, k, v, *captured), from (out, lse, dout, dlse); None where no kernel can."""
    backend, _ = _backend((*qkv, *captured, *given))
    if backend is None:
        return None
    points = [x.detach().requires_grad_(n) for x, n in zip(captured, needs[3:], strict=True)]
    try:
        with torch.enable_grad():
            plan = _plan_of(backend, call, *qkv, points)
        functions, totals = plan.backward()
    except (CannotCompile, RecursionError):
        return None
    out, lse, dout, dlse = given
    found = [x.new_empty(x.shape) if need else None for x, need in zip(qkv, needs[:3], strict=True)]
    backend.backward_with_functions(
        plan.operands, plan.options, functions, out, lse, dout, dlse, *found
    )
    return [*found, *_of_captured(plan, totals, points)]


def _backend(tensors: Sequence[Tensor | None]) -> tuple[Any, list[str]]:
    """The first that runs functions on such tensors, and else why none does."""
    if dispatch.is_traced() or not dispatch.is_plain(tensors):
        return None, ["no kernel can be looked into: operators are traced, or are a subclass's"]
    reasons, problem = [], operands.problem_of(*tensors[:3])
    for backend in BACKENDS:
        why = getattr(backend, "why_not_functions", None)
        against = ["has no kernel that runs functions"] if why is None else why(problem)
        if not against and (by_name := _only_by_name(backend, problem)):
            against = [f"{BY_NAME} ({by_name})"]
        if not against:
            return backend, []
        reasons += [f"{backend.NAME}: {reason}" for reason in against]
    return None, reasons


def _only_by_name(backend: Any, problem: Any) -> str | None:
    """Why a backend that could is not to run functions unless it is asked for."""
    ask = getattr(backend, "only_by_name_functions", lambda problem: None)
    return dispatch.only_by_name(SimpleNamespace(NAME=backend.NAME, only_by_name=ask), problem)


def reads_values(backend: Any) -> bool:
    return getattr(backend, "READS_VALUES", False)


def _plan_of(
    backend: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
) -> _Plan:
    plan = _made_or_kept(backend, call, q, k, v, captured)
    plan.memory = memory_of(call, q, k) if reads_values(backend) else None
    return plan


def _made_or_kept(
    backend: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
) -> _Plan:
    """The plan of a call; one made before where nothing was captured that may have changed."""
    if captured:
        return _Plan(backend, call, q, k, v, captured)
    nodes = [None if e is None else e.nodes for e in (call.score, call.mask)]
    blocks = call.block_mask if hasattr(call.block_mask, "kv_num_blocks") else None
    shapes = (q.shape, k.shape, v.shape)
    key = (*map(id, (*nodes, blocks)), *shapes, q.dtype, q.device, call.scale, backend.NAME)
    kept = _plans.get(key)
    if kept is None or (kept.blocks is not None and kept.blocks() is None):
        plan = _Plan(backend, call, q, k, v, captured)
        nobody = q.new_empty(0)  # a plan must not keep a call's tensors alive
        plan = plan.with_tensors(nobody, nobody, nobody)
        kept = _Kept(plan, nodes, None if blocks is None else weakref.ref(blocks))
        _plans[key] = kept
        if len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    return kept.plan.with_tensors(q, k, v)


@dataclass(frozen=True)
class _Kept:
    """A plan, and what its key names by number: alive as long as the plan, or seen to be dead."""

    plan: _Plan
    nodes: list[Any]
    blocks: weakref.ref[Any] | None


_MOST_PLANS = 64
_plans: OrderedDict[Hashable, _Kept] = OrderedDict()


class _Plan:
    """What the kernels of one call are given.

    Attributes:
        operands, options: with those parts of the mask that are operands already.
        mask, score: values of the functions, or None.
        kinds: of a BlockMask (Bm, Hm, blocks of queries, blocks of keys), or None.
        memory: of the mask, for backends.
    """

    memory: dict[Hashable, Any] | None = None

    def __init__(
        self,
        backend: Any,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
    ) -> None:
        if min(*q.shape, *k.shape, *v.shape) == 0:
            raise CannotCompile("has nothing to compute")
        batch, heads, seqlen_q, _ = q.shape
        sizes = Sizes(batch, heads, seqlen_q, k.shape[2])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.backend = backend
        self.lowering = Lowering(sizes, wide, RULES, reads_values(backend))
        self.mask: Value | None = None
        self.score: Value | None = None
        self._programs: dict[str, Tensor] = {}  # shared by all that has this plan
        self.kinds, self.block = listed(call.block_mask)
        mine, masks = call.split(captured)
        named: dict[str, Any] = {}
        hidden_keys = None
        try:
            shown = self.kinds is not None and bool((self.kinds == ALL).all())
            if shown:
                self.kinds = None
            if call.mask is not None and not shown:
                with torch.no_grad():
                    vectors = Vectors(call.mask, masks, sizes, q.device)
                    named, rest = operands.known_parts(call, q, k)
                    hidden_keys = self._read_mask(call.mask, vectors, rest)
            if call.score is not None:
                vectors = Vectors(call.score, mine, sizes, q.device)
                self.score = self.lowering.lower(call.score, vectors)
        except (IndexError, RuntimeError) as error:  # of the user's operations on whole vectors
            raise CannotCompile(f"fails where it is computed for all positions: {error}") from error
        if self.score is not None and self.score is self.lowering.score():
            self.score = None
        self.operands, self.options = operands.made(q, k, v, hidden_keys, call.scale, named)

    def with_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> _Plan:
        """The same for other numbers of the same shapes."""
        plan = copy.copy(self)
        plan.lowering = self.lowering.copy()  # a backward adds to it
        plan.operands = self.operands._replace(q=q.detach(), k=k.detach(), v=v.detach())
        return plan

    def _read_mask(
        self, mask: Expression, vectors: Vectors, rest: list[Node] | None
    ) -> Tensor | None:
        """Which keys are seen (B or 1, H or 1, 1, Lk), where a part says that; the rest is read.

        Args:
            rest: parts that are no operands; None: nothing is known of the mask.
        """
        keys = None
        for part in [mask.result] if rest is None else rest:
            if vectors.place(part) == "key" and self.kinds is None:
                seen = vectors.vector(part)[:, :, None]
                keys = seen if keys is None else keys & seen
            else:
                self.mask = self.lowering.build.both(
                    self.mask, self.lowering.lower(mask, vectors, part)
                )
        return keys

    def forward(self) -> Any:
        """The functions for the forward, as the backend takes them."""
        if reads_values(self.backend):
            return self.values()
        return self.functions(self.program_of("score"))

    def backward(self) -> tuple[Any, dict[Value, Tensor]]:
        """The functions for the backward, and what gradients of leaves are added up in."""
        if self.score is None:
            return self.forward(), {}
        slope, parts = self._derivatives()
        if reads_values(self.backend):
            totals = {load: self._dense_total(load) for load in parts}
            sums = [PairSum(load, part, totals[load]) for load, part in parts.items()]
            return self.values(slope, sums), totals
        totals = {load: self._total(self._leaf(load)) for load in parts}
        return self.functions(*self._backward_programs(slope, parts), totals), totals

    def check_gradients(self) -> None:
        """Raises CannotCompile where the kernels cannot add up a gradient that is wanted."""
        if self.score is not None:
            self._derivatives()

    def _derivatives(self) -> tuple[Value | None, dict[Value, Value]]:
        """Of the changed score: by the score (None: 1), and by each load that wants a gradient."""
        assert self.score is not None
        build, raw = self.lowering.build, self.lowering.score()
        loads = [x for x, leaf in self.lowering.loads.items() if leaf.source.requires_grad]
        parts = derivatives(build, self.score, [raw, *loads])
        slope = parts.pop(raw, build.number(0.0))
        parts = {load: parts[load] for load in loads if load in parts}
        if reads_values(self.backend):
            for load in parts:
                if reason := self.backend.why_not_gradient(load, self.lowering.leaves):
                    raise CannotCompile(reason)
        return (None if slope.is_constant(1.0) else slope), parts

    def _backward_programs(
        self, slope: Value | None, parts: dict[Value, Value]
    ) -> tuple[Tensor, Tensor | None]:
        """Programs of the score with its slope, and of sums."""
        build = self.lowering.build
        if slope is not None and slope.operation != "constant":
            slope = build.select(build.visible(), slope, build.number(0.0))
        gradient, zero = build.make("load_gradient"), build.number(0.0)
        sums = []
        for load, part in parts.items():
            value = build.select(build.visible(), build.mul(part, gradient), zero)
            sums.append(Sum(_SUMS.get(self._leaf(load).place, "sum_table"), load, value))
        return program(self.score, slope), program(sums=sums) if sums else None

    def values(self, slope: Value | None = None, sums: Sequence[PairSum] = ()) -> PairFunctions:
        """The functions as values."""
        what = (self.mask, self.score, slope, self.kinds, self.block, self.lowering.leaves)
        return PairFunctions(*what, sums, self.memory)

    def _dense_total(self, load: Value) -> Tensor:
        """Room for a gradient: (B, H, n) of a vector, one for all heads of a table."""
        sizes, like = self.lowering.sizes, self._leaf(load).tensor
        heads = (sizes.batch, sizes.heads)
        shape = like.shape if self._leaf(load).place == "table" else (*heads, like.shape[2])
        return torch.empty(shape, dtype=torch.float32, device=self.operands.q.device)

    def _leaf(self, load: Value) -> Leaf:
        return self.lowering.loads[load]

    def _total(self, leaf: Leaf) -> Tensor:
        """Zeros, of which each head has its own."""
        sizes, wide = self.lowering.sizes, self.lowering.wide
        heads = (sizes.batch, sizes.heads)
        like = leaf.tensor
        if leaf.place == "table":
            if leaf.batch_and_head_first:
                return torch.zeros((1, 1, *like.shape), dtype=wide, device=like.device)
            room = _MOST_COPIES + 4 * sum(x.numel() for x in self.operands[:3])
            if sizes.batch * sizes.heads * like.numel() > room:
                raise CannotCompile("wants the gradient of a table that is too large to be copied")
            return torch.zeros((*heads, *like.shape), dtype=wide, device=like.device)
        dtype = torch.float64 if leaf.place == "one" else wide
        return torch.zeros((*heads, like.shape[2]), dtype=dtype, device=like.device)

    def program_of(self, name: str) -> Tensor | None:
        """That of "mask", or of "score" without its slope."""
        value: Value | None = getattr(self, name)
        if value is not None and name not in self._programs:
            self._programs[name] = program(value)
        return None if value is None else self._programs[name]

    def functions(
        self,
        score: Tensor | None,
        sums: Tensor | None = None,
        totals: dict[Value, Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """The functions as the kernels take them."""
        by_leaf = {load.leaf: total for load, total in (totals or {}).items()}
        leaves = [x for n, leaf in enumerate(self.lowering.leaves)
                  for x in (leaf.tensor, by_leaf.get(n))]  # fmt: skip
        return (
            self.program_of("mask"),
            score,
            sums,
            self.kinds,
            *self.block,
            len(leaves) // 2,
            *leaves,
        )


def _of_captured(
    plan: _Plan, totals: dict[Value, Tensor], points: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of what was captured, from those of vectors and tables."""
    sources, given = [], []
    for load, total in totals.items():
        leaf = plan.lowering.loads[load]
        if leaf.place == "table" and total.dim() > leaf.tensor.dim():
            total = total.sum((0, 1))
        sources.append(leaf.source)
        given.append(total.sum_to_size(leaf.source.shape).to(leaf.source))
    wanted = [x for x in points if x.requires_grad]
    if not wanted:
        return [None] * len(points)
    if not sources:
        return [torch.zeros_like(x) if x.requires_grad else None for x in points]
    found = iter(torch.autograd.grad(sources, wanted, given, allow_unused=True))
    results: list[Tensor | None] = []
    for point in points:
        gradient = next(found) if point.requires_grad else None
        unused = point.requires_grad and gradient is None
        results.append(torch.zeros_like(point) if unused else gradient)
    return results
