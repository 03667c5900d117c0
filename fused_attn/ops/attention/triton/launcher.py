"""What the kernels of one call share: its tensors as they see them, its scalars, its tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ....runtime import philox
from ....runtime.triton import device as triton_device
from ....runtime.triton import tuning
from ..problem import LOWER_RIGHT, NONE, Operands, Options
from . import config
from .classes import ClassMap
from .function_source import Helpers
from .function_terms import Pairs
from .kernel_config import KernelConfig
from .padding import padding_of
from .primitives import ScoreParams, ScoreView, Sizes, Terms, View, Visits, shifted
from .tiles import AttentionTile
from .visits import GRAIN, Cells, document_cells, mask_cells, meet, own_sizes, visits

# Matrix products that a pass makes of each score.
FORWARD_PRODUCTS, WEIGHTS_PRODUCTS, BACKWARD_PRODUCTS = 2, 1, 7
_UNLIMITED = 1 << 30

triton_device.tiles_depend_on(Path(__file__).parent)


# Offsets within a tile of rows take 32 bits: up to 128 rows this far apart.
FAR_ROWS = 1 << 24


def has_far_rows(tensor: Tensor) -> bool:
    """Whether rows of (B, H, L, D) are too far apart for the kernels."""
    return tensor.dim() == 4 and max(tensor.stride()[2:]) >= FAR_ROWS


def view_of(tensor: Tensor | None) -> View | None:
    """A tensor as a kernel sees it; a dense copy where its rows are too far apart."""
    if tensor is None:
        return None
    if has_far_rows(tensor):
        tensor = tensor.contiguous()
    return View(tensor, tensor.stride())


def score_view(tensor: Tensor | None, seqlen_k: int) -> ScoreView | None:
    """A view of what has an element for each score; it takes any index in a dimension of size 1.

    (B, H, Lq, Lk), or without the last dimension for what each row of scores has one of.
    """
    if tensor is None:
        return None
    sizes = zip(tensor.shape[:3], tensor.stride(), strict=False)
    outer = [shifted(0 if size == 1 else stride) for size, stride in sizes]
    if tensor.dim() == 3:
        return ScoreView(tensor, tuple(outer))
    bytes_of_bool = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    last = tensor.stride(3) if tensor.shape[3] > 1 else int(seqlen_k == 1)
    return ScoreView(bytes_of_bool, (*outer, last))


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows start, and end, at multiples of 16 elements."""
    *outer, last = [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return last <= 1 and all(stride % 16 == 0 for stride in outer)


_NO_TERMS = Terms(*[None] * (len(Terms._fields)))


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _terms(operands: Operands) -> Terms:
    if not [x for x in operands[3:] if x is not None]:
        return _NO_TERMS
    seqlen_k = operands.k.shape[2]
    padding, key_ranges = padding_of(operands.key_padding_mask)
    return Terms(
        bias=score_view(operands.bias, seqlen_k),
        mask=score_view(operands.mask, seqlen_k),
        padding=padding,
        key_ranges=key_ranges,
        key_lengths=view_of(operands.key_lengths),
        alibi_slopes=view_of(operands.alibi_slopes),
        cu_seqlens_q=_dense(operands.cu_seqlens_q),
        cu_seqlens_k=_dense(operands.cu_seqlens_k),
        rng=operands.dropout_rng,
        query_ids=_dense(operands.query_documents),
        key_ids=_dense(operands.key_documents),
        prefix_lengths=view_of(operands.prefix_lengths),
    )


class LaunchPlan:
    """What follows from sizes, dtypes and options alone: worked out once for equal calls."""

    def __init__(
        self,
        options: Options,
        shapes: tuple[tuple[int, ...], ...],
        dtype: torch.dtype,
        device: torch.device,
        given: tuple[bool, ...],
        sequences: int | None,
        precision: str,
        arch: int,
        functions: Helpers | None,
    ) -> None:
        (batch, num_heads, seqlen_q, head_dim), (_, num_heads_kv, seqlen_k, _), v_shape = shapes
        bias, mask, padding, alibi, rng, dweights, documents = given
        self.problem = config.ProblemClass(
            max(head_dim, v_shape[3]),
            dtype.itemsize,
            arch,
            bias
            + mask
            + padding
            + rng
            + dweights
            + documents
            + (options.softcap > 0)
            + (0 if functions is None else functions.pressure),
            triton_device.shared_memory(device),
        )
        self.packed = sequences is not None
        self.batch = batch if sequences is None else sequences
        self.num_heads, self.num_heads_kv = num_heads, num_heads_kv
        self.seqlen_q = options.max_seqlen_q if self.packed else seqlen_q
        self.seqlen_k = options.max_seqlen_k if self.packed else seqlen_k
        self.group = num_heads // num_heads_kv
        sizes = Sizes(num_heads, self.group, seqlen_q, seqlen_k)
        self.scalars = (*sizes, *_score_params(options))
        self.band = options.causal != NONE or options.window_left >= 0 or options.window_right >= 0
        self.configs: dict[tuple[AttentionTile, bool], KernelConfig] = {}
        self.constants = {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": v_shape[3],
            "BLOCK_D": config.padded_size(head_dim),
            "BLOCK_DV": config.padded_size(v_shape[3]),
            "BAND": self.band,
            "SOFTCAP": options.softcap > 0,
            # The short path scales after the maximum, which takes a positive scale.
            "MODIFIED": options.softcap > 0
            or options.scale <= 0
            or bias
            or mask
            or alibi
            or documents
            or functions is not None,
            # In every tile; also in those that all see by position.
            "HIDES": bias or mask or documents or functions is not None,
            "FULL_HIDES": bias or mask or documents or functions is not None,  # see `config`
            "CHUNKED": options.chunk > 0,
            "PRECISION": precision,
        }
        if functions is not None:
            self.constants |= {
                "PAIRS": True,
                "LOAD_PAIRS": functions.load,
                "CHANGE_PAIRS": functions.change,
                "LOAD_SEEN": functions.load_seen,
                "CHANGE_SEEN": functions.change_seen,
            }
        multiprocessors = triton_device.multiprocessors(device)
        self.decode_rows = self.seqlen_q * self.group
        self.splits = config.decode_splits(
            self.decode_rows, self.seqlen_k, num_heads_kv * self.batch, multiprocessors
        )


@functools.lru_cache(maxsize=1024)
def _plan(*what: Any) -> LaunchPlan:
    return LaunchPlan(*what)


@functools.cache  # one object a configuration: Triton looks kernels up by it
def _config(
    tile: AttentionTile, constants: tuple[tuple[str, Any], ...], interpreted: bool
) -> KernelConfig:
    block_m, block_n, _, _, chunk = tile
    shared = dict(constants)
    block = min(block_m, block_n, 32) if interpreted else 16
    small = KernelConfig(BLOCK_M=block, BLOCK_N=block, CHUNK=16, **shared)
    return KernelConfig(BLOCK_M=block_m, BLOCK_N=block_n, CHUNK=chunk, **shared, SMALL=small)


class Launcher:
    """What all kernels of one call share."""

    def __init__(
        self,
        operands: Operands,
        options: Options,
        products: int,
        dweights: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> None:
        q, k, v, bias, mask, padding, _, alibi, cu_seqlens_q, _, rng, *_ = operands
        self.operands = operands
        given = (
            bias is not None, mask is not None, padding is not None, alibi is not None,
            rng is not None, dweights is not None, operands.query_documents is not None,
        )  # fmt: skip
        self.plan = _plan(
            options,
            (q.shape, k.shape, v.shape),
            q.dtype,
            q.device,
            given,
            None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
            precision(q.dtype, triton_device.arch(q.device)),
            triton_device.arch(q.device),
            None if pairs is None else pairs.key,
        )
        self.terms = _terms(operands)
        self.pairs = pairs
        if pairs is not None:
            self.terms = self.terms._replace(pairs=pairs.views)
        self.products = products
        self.align(bias, mask, dweights)
        self.classes: ClassMap | None = None
        self._cells: Cells | None = None
        self._visits: dict[tuple[int, int, bool], Visits] = {}

    def align(self, *tensors: Tensor | None) -> None:
        """Tell the compiler if all rows of these start and end at multiples of 16 elements.

        They have an element for each score. Nothing is said where there are none: a kernel that
        knows of lengths is another one.
        """
        given = [tensor for tensor in tensors if tensor is not None]
        whole = self.plan.seqlen_k % 16 == 0 and not self.plan.packed
        self._aligned = bool(given) and whole and all(map(_is_aligned, given))
        self.problem = self.plan.problem
        if given and not self._aligned:
            self.problem = self.problem._replace(ragged=True)

    def config(self, tile: AttentionTile, **more: Any) -> KernelConfig:
        """Compile-time constants of a kernel of this call."""
        if self.pairs is not None:
            more["UNIFORM"] = self.pairs.is_uniform(tile, self.plan.splits > 1)
            if self.classes is not None:
                # A change of scores may still hide.
                more |= {"CLASSED": True, "FULL_HIDES": self.pairs.functions.score is not None}
        found = None if more else self.plan.configs.get((tile, self._aligned))
        if found is None:
            more["ALIGNED"] = self._aligned
            constants = (*self.plan.constants.items(), *more.items())
            interpreted = self.plan.problem.arch == triton_device.INTERPRETER
            found = _config(tile, constants, interpreted)
            if len(more) == 1:
                self.plan.configs[tile, self._aligned] = found
        return found

    def launch_best(self, kernel: str, run: Callable[[AttentionTile], None]) -> None:
        """Run a kernel with the tile that is known to be best, or that a trial shows to be.

        Args:
            kernel: "forward", "dkdv", "dq" or "decode".
            run: launches it with a tile; may be called several times.
        """
        plan = self.plan
        name = self.problem.name(plan.band)
        if kernel == "decode":
            candidates = config.decode_candidates(plan.decode_rows, self.problem)
            key = (kernel, f"{name}, {candidates[0].block_m} rows")
        else:
            candidates = config.candidates(kernel, self.problem)
            key = (kernel, name)
        tuning.launch_best(self.operands.q.device, key, candidates, run)

    def terms_of(self, tile: AttentionTile, of_keys: bool = False) -> Terms:
        """The optional operands of a kernel, with the tiles to visit where that pays.

        Args:
            of_keys: a program of the kernel owns keys and walks over queries.
        """
        if self.classes is not None:
            return self.terms._replace(classes=self.classes.lists(tile, of_keys))
        return self.unsplit_terms_of(tile, of_keys)

    def unsplit_terms_of(self, tile: AttentionTile, of_keys: bool = False) -> Terms:
        """The same for kernels that ask `is_visited`, to which tiles of all classes are one."""
        return self._terms_with_lists(tile, self.products, of_keys)

    def decode_terms_of(self, tile: AttentionTile) -> Terms:
        """As `terms_of`; heads that share a tile have one list if they have one mask."""
        mask, plan = self.operands.mask, self.plan
        many = mask is not None and own_sizes(mask)[1] > 1
        many |= self.pairs is not None and not self.pairs.lists_are_shared()
        if many and plan.group > 1:
            return self.terms
        products = config.decode_products(plan.problem, plan.decode_rows)
        return self._terms_with_lists(tile, products, False)

    def _terms_with_lists(self, tile: AttentionTile, products: float, of_keys: bool) -> Terms:
        if self._cells is None:
            self._cells = self._map(products)
        if self._cells is None:
            return self.terms
        key = (tile.block_m, tile.block_n, of_keys)
        if key not in self._visits:
            self._visits[key] = visits(self._cells, *key)
        return self.terms._replace(visits=self._visits[key])

    def _map(self, products: float) -> Cells | None:
        """What is hidden of the scores, as far as it pays to know."""
        if self.classes is not None:
            return self.classes.shown()
        mask, ids, plan = self.operands.mask, self.terms.query_ids, self.plan
        pairs = plan.batch * plan.seqlen_q * plan.seqlen_k
        scores = pairs * plan.num_heads
        found = []
        if mask is not None and config.lists_pay(
            plan.problem, math.prod(own_sizes(mask)), scores, products
        ):
            sizes = (plan.seqlen_q, plan.seqlen_k)
            found.append(mask_cells(mask, self.terms.mask, *sizes, _is_aligned(mask)))
        listed = ids is not None and not plan.packed  # whose sequences start within a cell
        if listed and config.lists_pay(plan.problem, pairs // GRAIN**2, scores, products):
            found.append(document_cells(ids, self.terms.key_ids))
        given = self.pairs
        if given is not None and given.lists_pay(plan.problem, scores, products):
            found.append(given.cells(plan.seqlen_q, plan.seqlen_k))
        return functools.reduce(meet, found) if found else None

    def descriptors(self, *tensors: tuple[Tensor, int]) -> tuple[Any, ...]:
        """Tensor descriptors of (tensor, rows of a tile), all of them or none."""
        plan = self.plan
        long_enough = min(plan.seqlen_q, plan.seqlen_k) >= config.DESCRIPTOR_SEQLEN
        if not (long_enough and config.has_descriptors(plan.problem.arch, plan.problem.itemsize)):
            return (None,) * len(tensors)
        if not all(_can_describe(tensor) for tensor, _ in tensors):
            return (None,) * len(tensors)
        return tuple([_descriptor(tensor, rows) for tensor, rows in tensors])


def _can_describe(tensor: Tensor) -> bool:
    """What the hardware asks of a tensor that it copies tiles of: multiples of 16 bytes."""
    *outer, inner = tensor.stride()
    size = tensor.element_size()
    aligned = all(stride > 0 and stride * size % 16 == 0 for stride in outer)
    return inner == 1 and aligned and tensor.data_ptr() % 16 == 0


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    block = [1, 1, rows, config.padded_size(tensor.shape[3])]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _score_params(options: Options) -> ScoreParams:
    left = options.window_left if options.window_left >= 0 else _UNLIMITED
    right = options.window_right if options.window_right >= 0 else _UNLIMITED
    if options.causal != NONE:
        right = 0
    drop_all = options.dropout_p >= 1.0
    threshold = 0 if drop_all else philox.threshold(options.dropout_p)
    return ScoreParams(
        scale=options.scale,
        softcap=options.softcap,
        left=min(left, _UNLIMITED),
        right=min(right, _UNLIMITED),
        lower_right=int(options.causal in (NONE, LOWER_RIGHT)),
        threshold=threshold - (1 << 32 if threshold >= 1 << 31 else 0),
        keep_scale=0.0 if drop_all else 1.0 / (1.0 - options.dropout_p),
        chunk=min(options.chunk, _UNLIMITED),
    )


def precision(dtype: torch.dtype, arch: int) -> str:
    """How float32 matrices are multiplied: by torch's own setting for CUDA.

    Where nothing is set this is 3xTF32, as in torch's memory-efficient attention: nearly float32's
    accuracy on the tensor cores. AMD's matrix units take float32 as it is.
    """
    if dtype != torch.float32 or arch == triton_device.AMD:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    return {"tf32": "tf32", "ieee": "ieee"}.get(setting, "tf32x3")
