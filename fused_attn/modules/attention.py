"""Multi-head attention behind `torch.nn.MultiheadAttention`'s interface."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..ops.attention import call
from ..ops.attention.api import attention_varlen
from ..ops.attention.call import Scalars
from ..ops.attention.problem import BLHD, Operands, Weights
from ..runtime import autocast, debug, sequence
from ..runtime.hints import with_hint
from . import attention_arguments as arguments
from . import cached_attention, nested_attention
from .attention_arguments import Sizes
from .cache import Cache, MemoryCache
from .linear import call_linear, project
from .mistakes import names_checked
from .packing import Sequences
from .positions import check_rotary, rotate
from .scripting import NotScriptable


class FusedMultiheadAttention(NotScriptable, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fused kernels: same constructor, parameters, state_dict.

    One call is one in-projection (a single matrix product where query, key and value are the same
    tensor), one `fused_attn.attention`, and `out_proj`, called as the module that it is. Heads are
    taken and merged by strides; masks are never expanded in memory.

    Where it differs from torch.nn on purpose (docs/differences.md has the whole list): a query
    that may see no key gets attention 0 and weights 0, in every mode; `is_causal=True` is obeyed
    the same way in every mode, and needs no `attn_mask`; hooks and replacements of `out_proj` work.

    Args:
        rotary_base: rotate queries and keys by their positions (Su et al. 2021, "RoFormer"), with
            wavelengths up to 2π · rotary_base; 10000 in the paper. None: no rotation, as in
            torch.nn. It has no parameters. Positions count from 0 in the keys as in the queries;
            appended keys (`add_bias_kv`, `add_zero_attn`) are not rotated.

    Attributes:
        backend: name of the backend that must run the attention, or None to choose.
        rotary_base: as given.
    """

    # On the class as well: an nn.MultiheadAttention whose class is swapped has neither attribute.
    backend: str | None = None
    rotary_base: float | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rotary_base: float | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.rotary_base = check_rotary(rotary_base, self.head_dim)

    @names_checked
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool | None = False,
        cache: Cache | MemoryCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`; as `torch.nn.MultiheadAttention.forward`.

        Args:
            query: (L, N, E), or (N, L, E) if batch_first; unbatched (L, E). All three may be
                NestedTensors (N, *, E) of either layout if batch_first, in training too.
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S), or (S) if unbatched; bool, True = ignored, or floating, added
                to the scores.
            need_weights: return the attention weights as well, after dropout; they carry gradients.
            attn_mask: (L, S), (N * H, L, S) or any 4-D shape that broadcasts to (N, H, L, S); bool,
                True = may not be seen, or floating, added to the scores and differentiable.
            average_attn_weights: return the weights averaged over the heads.
            is_causal: no query sees a key after its own position. Appended keys (`add_bias_kv`,
                `add_zero_attn`) stay visible. Together with an `attn_mask` both apply; if moreover
                L != S, `attn_mask` alone decides.
            cache: a `KeyValueCache` or `PagedKeyValueCache`: `query`, `key` and `value` are those
                that follow the positions in it. Their keys and values are added to it, S counts all
                of them, also in both masks, `rotary_base` goes on with the positions, and
                `is_causal` lets the last query see the last key. Or, where `key` and `value` are a
                memory that stays the same, a `MemoryCache`: they are projected once.

        Returns:
            The output, new, in the shape of `query`; and the weights, (N, L, S') averaged or
            (N, H, L, S'), without N if unbatched, or None. S' counts the appended keys too.

        Raises:
            AssertionError, RuntimeError, ValueError, TypeError: as torch.nn does for each fault.
            UnsupportedError: the backend asked for cannot run the call.

        Shape legend: N batch, L queries, S keys, E embed_dim, H num_heads.
        """
        arguments.check_types(query, key, value)
        is_causal = bool(is_causal)  # torch's takes None for False
        if attn_mask is not None:
            attn_mask = arguments.plain_mask(attn_mask, query.device)
        if query.is_nested or key.is_nested or value.is_nested:
            if cache is not None:
                raise ValueError("`cache` takes no NestedTensors; `key_padding_mask` tells lengths")
            return nested_attention.forward(
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        sizes = arguments.check_tensors(
            query,
            key,
            value,
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
            key_dim=self.kdim,
            value_dim=self.vdim,
            same_embed_dim=self._qkv_same_embed_dim,
            batch_first=self.batch_first,
        )
        past = None
        if cache is not None:
            past = cached_attention.check(self, cache, sizes)
            sizes = sizes._replace(keys=sizes.keys + past)
        if key_padding_mask is not None or attn_mask is not None:
            dtypes = arguments.mask_dtypes(query)
            arguments.check_masks(key_padding_mask, attn_mask, sizes, dtypes)
        if cache is None:
            q, k, v = self.project_heads(query, key, value, sizes.batched)
            if self.rotary_base is not None:
                q, k = (self.rotate_heads(x) for x in (q, k))
        else:
            q, k, v = cached_attention.heads(self, query, key, value, sizes, cache)
        k, v, appended = self._append_keys(k, v, sizes)
        masks = arguments.make_masks(
            key_padding_mask, attn_mask, is_causal, sizes, appended, q, past
        )
        if debug.enabled:
            seen = None if masks.bias is None else masks.bias != -torch.inf
            padding = masks.key_padding_mask
            keep = None if padding is None else padding[:, None, None]
            debug.look_at_masks(self, (masks.mask, seen, keep), sizes.batch)
        wanted: Weights = None
        if need_weights:
            wanted = "average" if average_attn_weights else "per_head"
        scalars = Scalars(
            causal=masks.causal,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=wanted,
            backend=self.backend,
            layout=BLHD,
        )
        operands = Operands(q, k, v, masks.bias, masks.mask, masks.key_padding_mask)
        out, _, weights = call.run(operands, scalars)
        out = call_linear(self.out_proj, self._merge_heads(out, sizes))
        return out, _torch_weights(weights, wanted, sizes.batched)

    def attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_sequences: Sequences,
        key_sequences: Sequences,
        is_causal: bool = False,
    ) -> Tensor:
        """`attend_packed_heads`, and the out-projection of it; (T, E)."""
        sequences = (query_sequences, key_sequences)
        out = self.attend_packed_heads(query, key, value, *sequences, is_causal)
        return call_linear(self.out_proj, out)

    def attend_packed_heads(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_sequences: Sequences,
        key_sequences: Sequences,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention of sequences packed one after the other, before the out-projection.

        Args:
            query: (T, E). key: (Tk, kdim). value: (Tk, vdim).
            is_causal: each query sees the keys up to its own position in its sequence.

        Returns:
            (T, E).
        """
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim))
            for x in self._project(query, key, value)
        )
        if self.rotary_base is not None:
            q = rotate(q, query_sequences.positions(q.shape[0])[:, None], self.rotary_base)
            k = rotate(k, key_sequences.positions(k.shape[0])[:, None], self.rotary_base)
        out = attention_varlen(
            q,
            k,
            v,
            query_sequences.cu_seqlens,
            key_sequences.cu_seqlens,
            query_sequences.max_seqlen,
            key_sequences.max_seqlen,
            causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return out.reshape(query.shape[0], self.embed_dim)

    def attend_cached(self, x: Tensor, cache: Cache) -> Tensor:
        """Causal self-attention of the tokens that follow those in `cache`; (N, L, E) -> (N, L, E).

        Their keys and values are added to it. The module must be batch_first, and append no keys.
        """
        sequence.expect_whole("a cache", "generate outside of `context_parallel`")
        q, k, v = self.project_heads(x, x, x)
        if self.rotary_base is not None:
            q, k = (self.rotate_heads(y, cache.length) for y in (q, k))
        k, v = cache.append(k, v)
        return self._attend(q, k, v, causal="lower_right")

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, S, D) of `memory` (N, S, E), for `attend_projected`."""
        nothing = memory.new_empty(memory.shape[0], 0, self.embed_dim)
        _, k, v = self.project_heads(nothing, memory, memory)
        return k, v

    def attend_projected(
        self, query: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Attention of `query` (N, L, E) over keys and values that `project_memory` made.

        Args:
            key_padding_mask: (N, S) bool, True = padding, or None.
        """
        nothing = query.new_empty(query.shape[0], 0, self.kdim)
        q, _, _ = self.project_heads(query, nothing, nothing)
        return self._attend(q, k, v, key_padding_mask=key_padding_mask)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: Literal[False, "lower_right"] = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        keep = None if key_padding_mask is None else ~key_padding_mask
        scalars = Scalars(
            causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
            layout=BLHD,
        )
        out, _, _ = call.run(Operands(q, k, v, None, None, keep), scalars)
        out = out.transpose(1, 2).reshape(q.shape[0], q.shape[2], self.embed_dim)
        return call_linear(self.out_proj, out)

    def rotate_heads(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (N, H, L, D), turned by the positions offset .. offset + L."""
        assert self.rotary_base is not None
        positions = sequence.positions(x.shape[2], offset, x.device)
        return rotate(x, positions, self.rotary_base)

    def project_heads(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three in-projections as heads (N, H, L, D) and (N, H, S, D), views."""
        q, k, v = (self._split_heads(x, batched) for x in self._project(query, key, value))
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The three in-projections, in the layout of their inputs; last dimension embed_dim."""
        # Read at each call: a parametrization computes them, LoRA and pruning replace them.
        bias: Tensor | None = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            _check_dtypes(query, weights[0])
            return self._project_each((query, key, value), weights, bias)
        weight = self.in_proj_weight
        _check_dtypes(query, weight)
        if bias is not None and bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)
        if key is value:
            if query is key:
                return project(query, weight, bias).chunk(3, dim=-1)
            sizes = [self.embed_dim, 2 * self.embed_dim]
            weight_q, weight_kv = weight.split(sizes)
            bias_q, bias_kv = (None, None) if bias is None else bias.split(sizes)
            k, v = project(key, weight_kv, bias_kv).chunk(2, dim=-1)
            return project(query, weight_q, bias_q), k, v
        return self._project_each((query, key, value), weight.chunk(3), bias)

    def _project_each(
        self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(project(*each) for each in zip(inputs, weights, biases, strict=True))

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        """(N, L, E), (L, N, E) or (L, E) -> (N, H, L, D), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, x: Tensor, sizes: Sizes) -> Tensor:
        """(N, H, L, D) -> the layout of the query, (N, L, E), (L, N, E) or (L, E)."""
        if not sizes.batched:
            return x[0].transpose(0, 1).reshape(sizes.queries, self.embed_dim)
        if self.batch_first:
            return x.transpose(1, 2).reshape(sizes.batch, sizes.queries, self.embed_dim)
        return x.permute(2, 0, 1, 3).reshape(sizes.queries, sizes.batch, self.embed_dim)

    def _append_keys(self, k: Tensor, v: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, int]:
        """The keys and values with those of `bias_k`/`bias_v` and `add_zero_attn`; their number."""
        extra_k, extra_v = [], []
        shape = (sizes.batch, self.num_heads, 1, self.head_dim)
        if (self.bias_k is None) != (self.bias_v is None):
            raise AssertionError("bias_k and bias_v must be set together, or neither")
        if self.bias_k is not None and self.bias_v is not None:
            one = (1, self.num_heads, 1, self.head_dim)
            # In the dtype of the projected keys: under autocast the parameter has another.
            extra_k.append(self.bias_k.to(k.dtype).reshape(one).expand(shape))
            extra_v.append(self.bias_v.to(v.dtype).reshape(one).expand(shape))
        if self.add_zero_attn:
            extra_k.append(k.new_zeros(shape))
            extra_v.append(v.new_zeros(shape))
        if not extra_k:
            return k, v, 0
        return torch.cat([k, *extra_k], dim=2), torch.cat([v, *extra_v], dim=2), len(extra_k)


def _check_dtypes(query: Tensor, weight: Tensor) -> None:
    if query.dtype != weight.dtype and not autocast.enabled(query.device):
        message = (
            f"`query` must have the dtype of the module's weights, {weight.dtype}, "
            f"got {query.dtype}"
        )
        hint = f"`query.to({weight.dtype})`"
        if query.is_floating_point():
            hint += f", `module.to({query.dtype})` or torch.autocast"
        raise RuntimeError(with_hint(message, hint))


def _torch_weights(weights: Tensor | None, wanted: Weights, batched: bool) -> Tensor | None:
    """(N, 1 or H, L, S) -> the shape that torch.nn returns."""
    if weights is None:
        return None
    if wanted == "average":
        weights = weights.squeeze(1)
    return weights if batched else weights.squeeze(0)
