"""What one attention call is: its tensors, its scalars, and a description that holds no tensor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...runtime import checks, higher_order
from .. import dispatch

NONE, UPPER_LEFT, LOWER_RIGHT = 0, 1, 2
CAUSAL = {False: NONE, True: UPPER_LEFT, "upper_left": UPPER_LEFT, "lower_right": LOWER_RIGHT}
CAUSAL_NAMES = {NONE: "no", UPPER_LEFT: "upper_left", LOWER_RIGHT: "lower_right"}

NO_WEIGHTS, AVERAGE, PER_HEAD = 0, 1, 2
WEIGHTS = {None: NO_WEIGHTS, "average": AVERAGE, "per_head": PER_HEAD}

BHLD, BLHD = "bhld", "blhd"

Causal = Literal[False, True, "upper_left", "lower_right"]
Weights = Literal[None, "average", "per_head"]
Layout = Literal["bhld", "blhd"]
Documents: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


class Operands(NamedTuple):
    """The tensors of a call, in the order of the operator schema and of `_C`.

    B batch, H query heads, Hkv key heads, Lq and Lk lengths, D and Dv head sizes. In a packed
    problem B is 1 and Lq, Lk count the rows of all sequences.
    """

    q: Tensor  # (B, H, Lq, D)
    k: Tensor  # (B, Hkv, Lk, D)
    v: Tensor  # (B, Hkv, Lk, Dv)
    bias: Tensor | None = None  # 4-D, broadcastable to (B, H, Lq, Lk), float
    mask: Tensor | None = None  # 4-D, broadcastable to (B, H, Lq, Lk), bool, True = visible
    key_padding_mask: Tensor | None = None  # (B, Lk) bool, True = visible
    key_lengths: Tensor | None = None  # (B,) int64
    alibi_slopes: Tensor | None = None  # (H,) float32
    cu_seqlens_q: Tensor | None = None  # (sequences + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (sequences + 1,) int32
    dropout_rng: Tensor | None = None  # (2,) int64: seed and offset of the dropout
    sinks: Tensor | None = None  # (H,) float: the score of one more key, whose value is 0
    query_documents: Tensor | None = None  # (B, Lq) int32 or int64: ids, with those of the keys
    key_documents: Tensor | None = None  # (B, Lk), as those of the queries
    prefix_lengths: Tensor | None = None  # (B,) int64; (sequences,) in a packed problem


class Options(NamedTuple):
    """The scalars of a call, in the order of the operator schema and of `_C`."""

    max_seqlen_q: int
    max_seqlen_k: int
    causal: int  # NONE, UPPER_LEFT or LOWER_RIGHT
    window_left: int  # -1: unlimited
    window_right: int
    scale: float
    softcap: float  # 0: none
    dropout_p: float
    chunk: int  # 0: none


@dataclass(frozen=True)
class AttentionProblem(dispatch.Described):
    """Everything that decides whether and where a call can run; no tensor, no data.

    Attributes:
        operands: names of the optional tensors that the call brings.
        bias_dtype, bias_shape: of the additive bias, or None.
        weights: NO_WEIGHTS, AVERAGE or PER_HEAD.
        gradients: names of the operands of which a derivative is wanted.
        return_lse: lse is wanted.
        by_lse: optional operands that no kernel sees: they are worked into out and lse afterwards.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    options: Options
    operands: tuple[str, ...] = ()
    bias_dtype: torch.dtype | None = None
    bias_shape: tuple[int, ...] | None = None
    weights: int = NO_WEIGHTS
    gradients: tuple[str, ...] = ()
    by_lse: tuple[str, ...] = ()
    return_lse: bool = False

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.operands

    def without(self, *names: str) -> AttentionProblem:
        """What a kernel sees where the operands called `names` are worked in by lse."""
        return dataclasses.replace(
            self,
            operands=tuple(name for name in self.operands if name not in names),
            gradients=tuple(name for name in self.gradients if name not in names),
            by_lse=tuple(name for name in self.operands if name in names),
        )

    def __str__(self) -> str:
        o = self.options
        parts = [
            f"attention on {self.device}, {self.dtype}: batch={self.batch}",
            f"num_heads={self.num_heads}",
            f"num_heads_kv={self.num_heads_kv}",
            f"seqlen_q={self.seqlen_q}",
            f"seqlen_k={self.seqlen_k}",
            f"head_dim={self.head_dim}",
            f"head_dim_v={self.head_dim_v}",
            f"causal={CAUSAL_NAMES[o.causal]}",
        ]
        if o.window_left >= 0 or o.window_right >= 0:
            parts.append(f"window=({o.window_left}, {o.window_right})")
        if o.chunk:
            parts.append(f"chunk={o.chunk}")
        if o.softcap:
            parts.append(f"softcap={o.softcap}")
        if o.dropout_p:
            parts.append(f"dropout_p={o.dropout_p}")
        parts += self.operands + self.by_lse
        if self.requires_grad:
            parts.append("with gradient")
        return ", ".join(parts)


def describe(
    operands: Operands, options: Options, weights: int = NO_WEIGHTS, return_lse: bool = False
) -> AttentionProblem:
    """Check `operands` and `options` against each other and describe the call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    q, k, v = operands.q, operands.k, operands.v
    packed = operands.cu_seqlens_q is not None
    _check_qkv(q, k, v)
    batch = operands.cu_seqlens_q.shape[0] - 1 if operands.cu_seqlens_q is not None else q.shape[0]
    problem = AttentionProblem(
        device=q.device,
        dtype=q.dtype,
        batch=batch,
        num_heads=q.shape[1],
        num_heads_kv=k.shape[1],
        seqlen_q=options.max_seqlen_q if packed else q.shape[2],
        seqlen_k=options.max_seqlen_k if packed else k.shape[2],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        options=options,
        operands=checks.present(operands),
        bias_dtype=None if operands.bias is None else operands.bias.dtype,
        bias_shape=None if operands.bias is None else tuple(operands.bias.shape),
        weights=weights,
        return_lse=return_lse,
        gradients=higher_order.wanted_of(operands),
    )
    if packed:
        _check_packed(operands)
    else:
        _check_padding(operands)
    _check_masks(operands, (batch, q.shape[1], problem.seqlen_q, problem.seqlen_k))
    _check_positions(operands, options, batch)
    _check_shared(operands)
    return problem


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.expect_rank("q", q, 4, "(B, H, Lq, D)")
    checks.expect_rank("k", k, 4, "(B, Hkv, Lk, D)")
    checks.expect_rank("v", v, 4, "(B, Hkv, Lk, Dv)")
    checks.expect_dtype("q", q, checks.FLOAT_DTYPES)
    for name, tensor in (("k", k), ("v", v)):
        checks.expect_dtype(name, tensor, (q.dtype,))
        checks.expect_device(name, tensor, q.device)
    batch, num_heads, _, head_dim = q.shape
    _, num_heads_kv, seqlen_k, _ = k.shape
    checks.expect_shape("k", k, (batch, num_heads_kv, seqlen_k, head_dim), "(B, Hkv, Lk, D)")
    checks.expect_shape("v", v, (batch, num_heads_kv, seqlen_k, v.shape[3]), "(B, Hkv, Lk, Dv)")
    if head_dim == 0 or v.shape[3] == 0:
        raise ValueError(
            f"head sizes must be at least 1, got head_dim={head_dim}, head_dim_v={v.shape[3]}"
        )
    if num_heads_kv == 0 or num_heads % num_heads_kv != 0:
        # A view with its heads moved to the front is a layout that was already understood.
        hint = "\nhint: tensors (B, L, heads, head size) want `layout='blhd'`"
        raise ValueError(
            "`k` must have a number of heads that divides that of `q`, "
            f"got num_heads={num_heads}, num_heads_kv={num_heads_kv}"
            f"{hint if q.is_contiguous() else ''}"
        )


def _check_masks(operands: Operands, scores: tuple[int, ...]) -> None:
    packed = operands.cu_seqlens_q is not None
    layout = "(N, H, max_seqlen_q, max_seqlen_k)" if packed else "(B, H, Lq, Lk)"
    for name in ("bias", "mask"):
        operand = getattr(operands, name)
        if operand is None:
            continue
        checks.expect_broadcastable(name, operand, scores, layout)
    if operands.bias is not None:
        checks.expect_dtype("bias", operands.bias, _unique(operands.q.dtype, torch.float32))
    if operands.mask is not None:
        checks.expect_dtype("mask", operands.mask, (torch.bool,))


def _check_padding(operands: Operands) -> None:
    batch, seqlen_k = operands.q.shape[0], operands.k.shape[2]
    if operands.key_padding_mask is not None:
        padding = operands.key_padding_mask
        checks.expect_shape("key_padding_mask", padding, (batch, seqlen_k), "(B, Lk)")
        checks.expect_dtype("key_padding_mask", padding, (torch.bool,))
    if operands.key_lengths is not None:
        checks.expect_shape("key_lengths", operands.key_lengths, (batch,), "(B,)")
        checks.expect_dtype("key_lengths", operands.key_lengths, (torch.int64,))


def _check_packed(operands: Operands) -> None:
    sequences = operands.cu_seqlens_q
    assert sequences is not None
    checks.expect_rank("cu_seqlens_q", sequences, 1, "(sequences + 1,)")
    if sequences.shape[0] < 1:
        raise ValueError("`cu_seqlens_q` must hold at least one number, got shape (0,)")
    if operands.cu_seqlens_k is None:
        raise ValueError("`cu_seqlens_k` must come together with `cu_seqlens_q`, got None")
    layout = "(sequences + 1,)"
    checks.expect_shape("cu_seqlens_k", operands.cu_seqlens_k, tuple(sequences.shape), layout)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        checks.expect_dtype(name, getattr(operands, name), (torch.int32,))


def _check_positions(operands: Operands, options: Options, batch: int) -> None:
    """What hides keys by their position or number; an id is needed of each query and each key."""
    documents = (operands.query_documents, operands.key_documents)
    for tensor, rows, layout in zip(
        documents, (operands.q, operands.k), ("(B, Lq)", "(B, Lk)"), strict=True
    ):
        if tensor is not None:
            shape = (rows.shape[0], rows.shape[2])
            checks.expect_shape("document_ids", tensor, shape, layout)
            checks.expect_dtype("document_ids", tensor, checks.ID_DTYPES)
    if operands.prefix_lengths is not None:
        checks.expect_shape("prefix_lengths", operands.prefix_lengths, (batch,), "(B,)")
        checks.expect_dtype("prefix_lengths", operands.prefix_lengths, (torch.int64,))
        if options.causal == NONE and options.window_left < 0 and options.window_right < 0:
            raise ValueError(
                "`prefix_lengths` must come with `causal` or `window`, from which a prefix is "
                "exempt, got neither"
            )


def _check_shared(operands: Operands) -> None:
    if operands.alibi_slopes is not None:
        checks.expect_shape("alibi_slopes", operands.alibi_slopes, (operands.q.shape[1],), "(H,)")
        checks.expect_dtype("alibi_slopes", operands.alibi_slopes, (torch.float32,))
    if operands.sinks is not None:
        checks.expect_shape("sinks", operands.sinks, (operands.q.shape[1],), "(H,)")
        checks.expect_dtype("sinks", operands.sinks, checks.FLOAT_DTYPES)
    if operands.dropout_rng is not None:
        checks.expect_shape("dropout_rng", operands.dropout_rng, (2,), "(2,)")
        checks.expect_dtype("dropout_rng", operands.dropout_rng, (torch.int64,))
    names = ("bias", "mask", "key_padding_mask", "key_lengths", "alibi_slopes", "cu_seqlens_q")
    for name in (*names, "cu_seqlens_k", "dropout_rng", "sinks", "prefix_lengths"):
        operand = getattr(operands, name)
        if operand is not None:
            checks.expect_device(name, operand, operands.q.device)
    for operand in (operands.query_documents, operands.key_documents):
        if operand is not None:
            checks.expect_device("document_ids", operand, operands.q.device)


def _unique(*dtypes: torch.dtype) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys(dtypes))


def make_options(
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    head_dim: int,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    chunk: int | None = None,
) -> Options:
    """Check the scalars of a call as a user gives them and put them in the kernels' form."""
    if not (isinstance(causal, (bool, str)) and causal in CAUSAL):
        raise ValueError(
            f"`causal` must be False, True, 'upper_left' or 'lower_right', got {causal!r}"
            + ("\nhint: masks are `mask=`" if isinstance(causal, Tensor) else "")
        )
    left, right = _window(window)
    return Options(
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=CAUSAL[causal],
        window_left=left,
        window_right=right,
        scale=max(head_dim, 1) ** -0.5 if scale is None else checks.expect_finite("scale", scale),
        softcap=_softcap(softcap),
        dropout_p=checks.expect_probability("dropout_p", dropout_p),
        chunk=0 if chunk is None else min(checks.expect_integer("chunk", chunk, least=1), _MOST),
    )


_MOST = 1 << 60  # of what fits the kernels' integers


def _softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    value = checks.expect_finite("softcap", softcap)
    if value < 0.0:
        raise ValueError(f"`softcap` must be positive, or 0 or None for none, got {softcap}")
    return value


def _window(window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    fits = isinstance(window, (tuple, list)) and len(window) == 2
    if not fits or any(isinstance(w, bool) or not isinstance(w, int) or w < -1 for w in window):
        raise ValueError(
            f"`window` must be (left, right), two integers >= 0 or -1 for no limit, got {window!r}"
            + (f"\nhint: `window=({window}, 0)` looks back only" if type(window) is int else "")
        )
    return window[0], window[1]
