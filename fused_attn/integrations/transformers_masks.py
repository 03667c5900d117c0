"""Masks of transformers models as what they are: a vector for each sequence, and a pattern.

transformers asks a mask function for a tensor, hands it to the model, and the model hands it to the
attention function. A dense mask has (B, 1, L, S) elements, though nearly all of them are causal, a
window or chunks, and padding. So ours is a tensor (B, code, 1, S):

* its values say of each key whether it is visible (int8), or which document it is of (int32);
* the size of its second dimension says which pattern applies. That dimension is expanded from 1, so
  it costs no memory, survives slices of the last dimension as models make them, and needs nothing
  read back from a device. No number of heads is as large as a code, and no dense mask of theirs has
  one of these dtypes, so that a model that computes with the mask fails instead of being wrong.

Patterns that are none of these come from transformers' own `sdpa_mask`, dense and bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

FIRST_CODE = 4099  # the codes of PATTERNS begin here: more than any number of heads
EAGER = (
    "nllb-moe",
)  # models that compute with their mask, and know the one of eager attention only
NO_DOCUMENT = -(1 << 30)  # of a key that is padding


class Pattern(NamedTuple):
    """Which keys a query may see, beside what the values of a mask say.

    Attributes:
        causal: none after it. The last query stands at the last key that the mask knows of.
        window: (left, right), as `fused_attn.attention` has it.
        cut: the mask knows of the first keys only; those behind, of a static cache, are hidden.
        padded: the values are bool, as int8.
        documents: the values are numbers of documents, as int32.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    cut: bool = False
    padded: bool = False
    documents: bool = False


PATTERNS: list[Pattern] = []  # by code, in order of appearance


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **rest: Any,
) -> Tensor | None:
    """transformers' mask function: arguments as its `sdpa_mask`.

    Returns:
        None where all keys are visible; else an encoded mask, or a dense one where the pattern is
        none that can be encoded. A single query's is transformers' own: that is a vector already.
    """
    dense: dict[str, Any] = {
        **rest, "config": config, "batch_size": batch_size, "q_length": q_length,
        "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": mask_function, "attention_mask": attention_mask, "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip, "use_vmap": use_vmap,
        "device": device,
    }  # fmt: skip
    if getattr(config, "model_type", None) in EAGER:
        return masking_utils.eager_mask(**dense)
    known, q_offset, kv_offset = _known(**dense)
    if known is None:
        return masking_utils.sdpa_mask(**dense)
    start = q_offset - kv_offset  # of the first query, among the keys
    cut = known.causal and start == 0 and q_length != kv_length
    if not (cut or start + q_length == kv_length):
        return masking_utils.sdpa_mask(**dense)
    keys = q_length if cut else kv_length
    visible = None
    if attention_mask is not None:
        padding: Any = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        visible = padding[:, kv_offset : kv_offset + keys]
        if not torch.compiler.is_compiling() and bool(visible.all()):
            visible = None
    if known.ids is None:
        return _band(known, cut, visible, (batch_size, keys), device)
    ids = _documents(known, (batch_size, keys), kv_offset, visible, device)
    return _encode(ids, Pattern(known.causal, known.window, cut, documents=True))


def is_encoded(mask: Tensor) -> bool:
    """True for a mask that `mask` made; shape and dtype say so."""
    return mask.dim() == 4 and mask.shape[1] >= FIRST_CODE


def read(mask: Tensor, q_length: int, kv_length: int) -> tuple[int, dict[str, Any]]:
    """How many of the keys count, and what the mask says as arguments of `fused_attn.attention`.

    Raises:
        ValueError: a model has changed the mask. It may cut the last dimension, and drop queries
            from the front.
    """
    pattern = PATTERNS[mask.shape[1] - FIRST_CODE]
    wanted = torch.int32 if pattern.documents else torch.int8
    if mask.dtype != wanted or mask.shape[2] != 1:
        raise ValueError(
            f"the model changed the attention mask of fused_attn: expected {wanted} of shape (B, "
            f"{mask.shape[1]}, 1, S), got {mask.dtype} of {tuple(mask.shape)}\n"
            "hint: this model computes with its mask; `register(replace_sdpa=True)` and "
            'attn_implementation="sdpa" give it a dense one'
        )
    keys = mask.shape[3]
    if kv_length < keys or (kv_length > keys and not pattern.cut):
        raise ValueError(f"the attention mask is of {keys} keys, got {kv_length}")
    arguments: dict[str, Any] = {"window": pattern.window}
    if pattern.causal:
        arguments["causal"] = "lower_right"
    values = mask[:, 0, 0]
    if pattern.documents:
        mine = values[:, keys - q_length :]
        # A query that is padding is in no document, not even in one with other padding.
        mine = torch.where(mine == NO_DOCUMENT, NO_DOCUMENT - 1, mine)
        arguments["document_ids"] = (mine, values)
    elif pattern.padded:
        arguments["key_padding_mask"] = values.bool()
    return keys, arguments


class Known(NamedTuple):
    """A mask function of transformers that was recognised.

    Attributes:
        causal, window: as in `Pattern`.
        chunk: size of the chunks, or 0; `ids` (B,) is then where each sequence begins.
        ids: (B, S) numbers of documents, if not `chunk`.
    """

    causal: bool
    window: tuple[int, int] | None = None
    chunk: int = 0
    ids: Tensor | None = None


def recognise(function: Callable[..., Any]) -> Known | None:
    """The pattern that a mask function of transformers' makes; None for any other function."""
    if function is masking_utils.causal_mask_function:
        return Known(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Known(causal=False)
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    name = function.__qualname__.partition(".")[0]
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    names = function.__code__.co_freevars
    cells = dict(zip(names, held, strict=True))
    if name == "sliding_window_overlay":
        return Known(causal=False, window=(cells["sliding_window"] - 1, -1))
    if name == "sliding_window_bidirectional_overlay":
        return Known(causal=False, window=(cells["sliding_window"],) * 2)
    if name == "chunked_overlay":
        return Known(causal=False, chunk=cells["chunk_size"], ids=cells["left_padding"])
    if name == "packed_sequence_mask_function":
        return Known(causal=False, ids=cells["packed_sequence_mask"])
    if name == "remap_positions_for_packed_sequence":
        # Within a document positions count up by one, so that distances are those of the rows.
        inner = recognise(cells["mask_function"])
        return None if inner is None or inner.chunk else inner
    return _joined(cells["mask_functions"]) if name == "and_masks" else None


def _joined(functions: tuple[Callable[..., Any], ...]) -> Known | None:
    """All of several functions at once; None if one is unknown, or two say the same thing."""
    joined = Known(causal=False)
    for function in functions:
        known = recognise(function)
        if known is None:
            return None
        if (known.window and joined.window) or (known.ids is not None and joined.ids is not None):
            return None
        joined = Known(
            joined.causal or known.causal,
            joined.window or known.window,
            joined.chunk or known.chunk,
            known.ids if joined.ids is None else joined.ids,
        )
    return joined


def _of_arguments(
    function: Callable[..., Any],
    local_size: int | None,
    causal_skip: bool,
    bidirectional_skip: bool,
    config: Any,
) -> Known | None:
    """As `recognise`, where a compiler cannot look into a function: what the arguments imply.

    transformers allows a skip only where nothing was laid over the pattern that the name of its
    own function says; then a size is that of the window, or of the chunks, which stay dense.
    """
    if function is masking_utils.causal_mask_function:
        return Known(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Known(causal=False)
    if local_size is None or local_size != getattr(config, "sliding_window", None):
        return None
    if getattr(config, "attention_chunk_size", None) is not None:
        return None
    if causal_skip:
        return Known(causal=True, window=(local_size - 1, -1))
    return Known(causal=False, window=(local_size, local_size)) if bidirectional_skip else None


def _known(
    mask_function: Callable[..., Any],
    q_length: int,
    q_offset: Any,
    kv_offset: Any,
    local_size: int | None,
    allow_is_causal_skip: bool,
    allow_is_bidirectional_skip: bool,
    use_vmap: bool,
    config: Any,
    **rest: Any,
) -> tuple[Known | None, Any, Any]:
    """The pattern, if it may be encoded, and both offsets as numbers."""
    tracing = torch.compiler.is_compiling()
    if use_vmap or q_length == 1 or (tracing and _is_tensor(q_offset, kv_offset)):
        return None, q_offset, kv_offset
    skips = (allow_is_causal_skip, allow_is_bidirectional_skip)
    if tracing:
        known = _of_arguments(mask_function, local_size, *skips, config)
    else:
        q_offset, kv_offset = int(q_offset), int(kv_offset)
        known = recognise(mask_function)
    if known is None:
        return None, q_offset, kv_offset
    # Who allows no skip computes with the mask, but for packed batches, which allow none.
    may_skip = skips[0] if known.causal else skips[1]
    packed = known.ids is not None and not known.chunk
    return (known if may_skip or packed else None), q_offset, kv_offset


def _band(
    known: Known,
    cut: bool,
    visible: Tensor | None,
    size: tuple[int, int],
    device: torch.device | str,
) -> Tensor | None:
    """The mask of (B, S) keys where only their distance and padding count."""
    window = known.window
    if window is not None and not torch.compiler.is_compiling() and size[1] <= window[0]:
        window = None
    if visible is None and window is None and not known.causal:
        return None
    # Also where causal is all there is, and transformers would return None: then a layer's own
    # `is_causal` would have to be right, and nobody might leave out queries afterwards.
    pattern = Pattern(known.causal, window, cut, padded=visible is not None)
    if visible is None:
        visible = torch.ones((1, 1), dtype=torch.bool, device=device).expand(size)
    return _encode(visible.to(torch.int8), pattern)


def _documents(
    known: Known,
    size: tuple[int, int],
    kv_offset: int,
    visible: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """(B, S) int32: which document, or chunk, each key is of."""
    ids = known.ids
    assert ids is not None
    if known.chunk:
        position = torch.arange(size[1], device=device) + kv_offset
        ids = (position - ids.to(device)[:, None]) // known.chunk
    ids = ids.to(torch.int32).expand(size)
    return ids if visible is None else torch.where(visible, ids, NO_DOCUMENT)


def _encode(values: Tensor, pattern: Pattern) -> Tensor:
    """(B, S) -> (B, code, 1, S)."""
    if pattern not in PATTERNS:
        PATTERNS.append(pattern)
    code = FIRST_CODE + PATTERNS.index(pattern)
    return values[:, None, None].expand(-1, code, -1, -1)


def _is_tensor(*numbers: object) -> bool:
    return any([isinstance(number, Tensor) for number in numbers])
