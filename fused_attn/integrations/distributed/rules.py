"""How DTensors may be cut up for each operator: by batch and heads, by rows, by columns.

A rule is a function of an operator's arguments by name (tensors as DTensor's specs of them, which
have a global shape) that yields what may be: a placement by name of argument or result, on one
dimension of a mesh. What a rule does not name is whole on every rank (`Replicate`). All whole is
always allowed and comes first, so that DTensor can gather whatever it cannot use, as it does for
torch's own operators.

Dropout is a function of seed, offset and the position in the whole tensor, and a shard's kernel
counts its own positions: with dropout everything is gathered, so that the mask is one process's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ...ops.attention.problem import AVERAGE, NO_WEIGHTS

Arguments = Mapping[str, Any]
Placements = dict[str, Placement]
Rule = Callable[[Arguments], Iterator[Placements]]


def attention(call: Arguments) -> Iterator[Placements]:
    """By batch and by heads; never by positions, which masks count."""
    if call["dropout_rng"] is not None:
        return
    if call["cu_seqlens_q"] is None:  # a packed batch has one batch element
        yield _cut_batch(call)
    if _heads_stay_together(call) and call["return_weights"] != AVERAGE:
        yield _cut_heads(call)


def _cut_batch(call: Arguments) -> Placements:
    batch = call["q"].shape[0]
    masks = ("key_padding_mask", "key_lengths", "prefix_lengths")
    documents = ("query_documents", "key_documents")
    found: Placements = {name: Shard(0) for name in ("q", "k", "v", *masks, *documents)}
    for name in ("bias", "mask"):
        if call[name] is not None and call[name].shape[0] == batch:
            found[name] = Shard(0)
    return _with_results(found, call, Shard(0))


def _cut_heads(call: Arguments) -> Placements:
    heads = call["q"].shape[1]
    found: Placements = {name: Shard(1) for name in ("q", "k", "v")}
    found |= {name: Shard(0) for name in ("alibi_slopes", "sinks")}
    for name in ("bias", "mask"):
        if call[name] is not None and call[name].shape[1] == heads:
            found[name] = Shard(1)
    return _with_results(found, call, Shard(1))


def _with_results(found: Placements, call: Arguments, cut: Placement) -> Placements:
    """`found`, with what belongs to the queries cut likewise, and gradients as their operands."""
    found |= dict.fromkeys(("out", "lse", "weights", "dout", "dlse", "dweights"), cut)
    if "needs" not in call:  # forward: an empty tensor stands for what nobody asked for
        if not call["return_lse"]:
            found["lse"] = Replicate()
        if call["return_weights"] == NO_WEIGHTS:
            found["weights"] = Replicate()
        return found
    for name, needed in zip(("q", "k", "v", "bias"), call["needs"], strict=True):
        if needed and call[name] is not None:
            found[f"d{name}"] = found.get(name, Partial())  # a bias of all is summed over its parts
    return found


def _heads_stay_together(call: Arguments) -> bool:
    """Whether each part of the query heads reads keys of the same part, however a mesh is cut.

    Of grouped heads every number of parts that there may be must divide the heads of the keys.
    """
    q, k = call["q"], call["k"]
    if q.shape[1] == k.shape[1]:
        return True
    sizes = q.mesh.shape
    parts = {
        math.prod(cut) for n in range(1, len(sizes) + 1) for cut in itertools.combinations(sizes, n)
    }
    return all(k.shape[1] % part == 0 for part in parts if part <= k.shape[1])


def layer_norm(call: Arguments) -> Iterator[Placements]:
    """By rows: batch, sequence, whatever is not normalised."""
    if call["dropout_rng"] is not None:
        return
    backward = "needs" in call
    for dim in range(len(call["x"].shape) - call["dims"]):
        rows = ("x", "residual", "y", "mean", "rstd", "dy", "dh")
        found: Placements = {name: Shard(dim) for name in rows}
        if not backward:
            found["h"] = Shard(dim) if call["need_sum"] else Replicate()
            if not call["need_statistics"]:
                found["rstd"] = Replicate()
            if call["rms"] or not call["need_statistics"]:
                found["mean"] = Replicate()
        else:
            whole: Placement = Shard(dim)
            kinds = (whole, whole, Partial(), Partial())
            _add_gradients(found, call, ("x", "residual", "weight", "bias"), kinds)
        yield found


def bias_activation(call: Arguments) -> Iterator[Placements]:
    """By rows; by columns too, where no row is made of gates and what they are multiplied by."""
    if call["dropout_rng"] is not None:
        return
    last = len(call["x"].shape) - 1
    for dim in range(last):
        found: Placements = {name: Shard(dim) for name in ("x", "y", "dy")}
        yield _add_gradients(found, call, ("x", "bias"), (Shard(dim), Partial()))
    if not call["gated"]:
        found = {name: Shard(last) for name in ("x", "y", "dy")}
        found["bias"] = Shard(0)
        yield _add_gradients(found, call, ("x", "bias"), (Shard(last), Shard(0)))


def embedding(call: Arguments) -> Iterator[Placements]:
    """By tokens and by columns of the tables. By vocabulary torch's own operator does it."""
    if call["dropout_rng"] is not None:
        return
    dims = len(call["tokens"].shape)
    counted = call["table"] is not None and call["positions"] is None
    for dim in range(dims - 1 if counted else dims):  # a counted position is one of the whole
        found: Placements = {name: Shard(dim) for name in ("tokens", "positions", "y", "dy")}
        yield _add_gradients(found, call, ("weight", "table"), (Partial(), Partial()))
    found = {"weight": Shard(1), "table": Shard(1), "y": Shard(dims), "dy": Shard(dims)}
    yield _add_gradients(found, call, ("weight", "table"), (Shard(1), Shard(1)))


def linear(call: Arguments) -> Iterator[Placements]:
    """By rows; by outputs; and by inputs, which leaves sums, where nothing follows the product."""
    if call["dropout_rng"] is not None:
        return
    operands = ("x", "weight", "bias", "residual")
    last = len(call["x"].shape) - 1
    for dim in range(last):
        cut = Shard(dim)
        found: Placements = dict.fromkeys(("x", "residual", "y", "dy"), cut)
        yield _add_gradients(found, call, operands, (cut, Partial(), Partial(), cut))
    if not call["gated"]:
        cut = Shard(last)
        found = dict.fromkeys(("residual", "y", "dy"), cut)
        found |= {"weight": Shard(0), "bias": Shard(0)}
        yield _add_gradients(found, call, operands, (Partial(), Shard(0), Shard(0), cut))
    if not call["activation"]:
        # One share of bias and residual each: DTensor gives them to one rank and zeros to others.
        found = {"x": Shard(last), "weight": Shard(1), "y": Partial()}
        if "needs" not in call:
            found |= {"bias": Partial(), "residual": Partial()}
        kinds = (Shard(last), Shard(1), Replicate(), Replicate())
        yield _add_gradients(found, call, operands, kinds)


def _add_gradients(
    found: Placements, call: Arguments, names: tuple[str, ...], kinds: tuple[Placement, ...]
) -> Placements:
    """`found` with the gradients of a backward: those that are wanted, empty ones whole."""
    if "needs" in call:
        for name, kind, needed in zip(names, kinds, call["needs"], strict=True):
            if needed and call[name] is not None:
                found[f"d{name}"] = kind
            elif f"d{name}" in found:
                del found[f"d{name}"]
    return found


# By name of the operation; `name_forward` and `name_backward` have one rule.
RULES: dict[str, Rule] = {
    "attention": attention,
    "layer_norm": layer_norm,
    "bias_activation": bias_activation,
    "embedding": embedding,
    "linear": linear,
}
