"""Any functions inside of the kernels' own loop, where a backend can run their instructions.

A backend runs them if it has `forward_with_functions`, `backward_with_functions` and
`why_not_functions`. What none can run goes block by block (`tiles.py`).
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.attention import BACKENDS
from ..ops.attention.arguments import documents
from ..ops.attention.problem import Operands, Options, make_options
from . import known
from .blocks import ALL, kinds_of
from .call import Call
from .derivative import derivatives
from .expression import Expression, Node
from .lowering import Leaf, Lowering
from .pairs import CannotCompile, Sum, Value, program
from .rules import RULES
from .vectors import Sizes, Vectors

# Numbers that copies of tables for every head may take, beside four times those of q, k and v.
_MOST_COPIES = 1 << 20
_SUMS = {"one": "sum_one", "query": "sum_query", "key": "sum_key", "distance": "sum_distance"}


def why_not(call: Call, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Reasons why no kernel runs the functions of a call in its loop; empty if one does."""
    captured = call.captured()
    _, reasons = _backend((q, k, v, *captured))
    if not reasons:
        try:
            _plan_of(call, q, k, v, captured)
        except CannotCompile as error:
            reasons = [str(error)]
    return reasons


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
        plan = _plan_of(call, q, k, v, captured)
    except CannotCompile:
        return False
    functions = plan.functions(plan.program_of("score"))
    backend.forward_with_functions(plan.operands, plan.options, functions, out, lse)
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
            plan = _plan_of(call, *qkv, points)
        score, sums, totals = plan.backward()
    except (CannotCompile, RecursionError):
        return None
    out, lse, dout, dlse = given
    found = [x.new_empty(x.shape) if need else None for x, need in zip(qkv, needs[:3], strict=True)]
    functions = plan.functions(score, sums, totals)
    backend.backward_with_functions(
        plan.operands, plan.options, functions, out, lse, dout, dlse, *found
    )
    return [*found, *_of_captured(plan, totals, points)]


def _backend(tensors: Sequence[Tensor | None]) -> tuple[Any, list[str]]:
    """The first that runs functions on such tensors, and else why none does."""
    if dispatch.is_traced() or not dispatch.is_plain(tensors):
        return None, ["no kernel can be looked into: operators are traced, or are a subclass's"]
    reasons, device = [], next(x.device for x in tensors if x is not None)
    for backend in BACKENDS:
        why = getattr(backend, "why_not_functions", None)
        against = ["has no kernel that runs functions"] if why is None else why(device)
        if not against:
            return backend, []
        reasons += [f"{backend.NAME}: {reason}" for reason in against]
    return None, reasons


def _plan_of(call: Call, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]) -> _Plan:
    """The plan of a call; one made before where nothing was captured that may have changed."""
    if captured:
        return _Plan(call, q, k, v, captured)
    nodes = [None if e is None else e.nodes for e in (call.score, call.mask)]
    blocks = call.block_mask if hasattr(call.block_mask, "kv_num_blocks") else None
    key = (*map(id, (*nodes, blocks)), q.shape, k.shape, v.shape, q.dtype, call.scale)
    kept = _plans.get(key)
    if kept is None or (kept.blocks is not None and kept.blocks() is None):
        plan = _Plan(call, q, k, v, captured)
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
    """

    def __init__(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
    ) -> None:
        if min(*q.shape, *k.shape, *v.shape) == 0:
            raise CannotCompile("has nothing to compute")
        batch, heads, seqlen_q, _ = q.shape
        sizes = Sizes(batch, heads, seqlen_q, k.shape[2])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.lowering = Lowering(sizes, wide, RULES)
        self.mask: Value | None = None
        self.score: Value | None = None
        self._programs: dict[str, Tensor] = {}  # shared by all that has this plan
        self.kinds, self.block = _listed(call.block_mask)
        mine, masks = call.split(captured)
        named: dict[str, Any] = {}
        hidden_keys = None
        try:
            shown = self.kinds is not None and bool((self.kinds == ALL).all())
            if shown:
                self.kinds = None
            if call.mask is not None and not shown:
                with torch.no_grad():
                    vectors = Vectors(call.mask, masks, sizes)
                    named, rest = _known_parts(call, q, k)
                    hidden_keys = self._read_mask(call.mask, vectors, rest)
            if call.score is not None:
                self.score = self.lowering.lower(call.score, Vectors(call.score, mine, sizes))
        except (IndexError, RuntimeError) as error:  # of the user's operations on whole vectors
            raise CannotCompile(f"fails where it is computed for all positions: {error}") from error
        if self.score is not None and self.score is self.lowering.score():
            self.score = None
        self.operands, self.options = _operands(q, k, v, hidden_keys, call.scale, named)

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

    def backward(self) -> tuple[Tensor | None, Tensor | None, dict[Value, Tensor]]:
        """Programs of the score with its slope, and of sums; what the sums are added up in."""
        if self.score is None:
            return None, None, {}
        build, raw = self.lowering.build, self.lowering.score()
        loads = [x for x, leaf in self.lowering.loads.items() if leaf.source.requires_grad]
        parts = derivatives(build, self.score, [raw, *loads])
        slope: Value | None = parts.get(raw, build.number(0.0))
        assert slope is not None
        if slope.operation != "constant":
            slope = build.select(build.visible(), slope, build.number(0.0))
        elif slope.is_constant(1.0):
            slope = None
        gradient, zero = build.make("load_gradient"), build.number(0.0)
        sums = []
        for load in loads:
            if load in parts:
                value = build.select(build.visible(), build.mul(parts[load], gradient), zero)
                sums.append(Sum(_SUMS.get(self._leaf(load).place, "sum_table"), load, value))
        totals = {each.load: self._total(self._leaf(each.load)) for each in sums}
        return program(self.score, slope), program(sums=sums) if sums else None, totals

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
        if leaf.place == "table":
            total = total.sum((0, 1))
        sources.append(leaf.source)
        given.append(total.sum_to_size(leaf.source.shape).to(leaf.source.dtype))
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


def _listed(block_mask: Any) -> tuple[Tensor | None, tuple[int, int]]:
    """What a BlockMask's lists say of each block, and the blocks' size."""
    if block_mask is None or not hasattr(block_mask, "kv_num_blocks"):
        return None, (1, 1)
    size_q, size_k = block_mask.BLOCK_SIZE
    return kinds_of(block_mask).to(torch.int32).contiguous(), (size_q, size_k)


def _known_parts(call: Call, q: Tensor, k: Tensor) -> tuple[dict[str, Any], list[Node] | None]:
    """Arguments of `attention` for known parts of the mask, and the others; None: all of it.

    Where blocks are listed, the lists decide, and what they show the operands could hide.
    """
    if call.mask is None or hasattr(call.block_mask, "kv_num_blocks"):
        return {}, None
    found, rest = known.parts_of(call.mask)
    named = found.operands(q, k)
    return ({}, None) if named is None else (named, rest)


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    named: dict[str, Any],
) -> tuple[Operands, Options]:
    ids: Any = (None, None)
    if "document_ids" in named:
        ids = documents(named["document_ids"], q, k)
    operands = Operands(
        q.detach(),
        k.detach(),
        v.detach(),
        mask=seen,
        key_lengths=named.get("key_lengths"),
        query_documents=ids[0],
        key_documents=ids[1],
        prefix_lengths=named.get("prefix_lengths"),
    )
    options = make_options(
        max_seqlen_q=q.shape[2],
        max_seqlen_k=k.shape[2],
        head_dim=q.shape[3],
        scale=scale,
        causal=named.get("causal", False),
        window=named.get("window"),
        chunk=named.get("chunk"),
    )
    return operands, options
