"""transformers: `register()`, then `attn_implementation="fused_attn"` wherever it takes one.

from fused_attn.integrations.transformers import check, register

register()
model = AutoModel.from_pretrained(name, attn_implementation="fused_attn")
print(check(model))
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention.api import attention
from .transformers_check import Attention, Report, check, keep_theirs, why_not

__all__ = ["Attention", "Report", "attention_forward", "check", "register", "unregister"]

_REPLACED: dict[str, Any] = {}  # what stood in transformers before `register`, by name
_NAMES: set[str] = set()
_METHODS = ("get_correct_attn_implementation", "set_attn_implementation")
_SPARSE = ("indices", "block_indices")
# transformers reads meaning into names that contain these.
_RESERVED = ("flash", "flex", "sdpa", "eager", "paged", "|", "/")


def register(name: str = "fused_attn", replace_sdpa: bool = False) -> None:
    """Make our attention known to transformers, as `attn_implementation=name`.

    From then on a model that would ignore it raises when it is made. Nothing else of transformers
    changes; `unregister()` takes it all back.

    Args:
        name: what models ask for.
        replace_sdpa: run ours under the name "sdpa" as well, with transformers' own masks. For
            continuous batching, which refuses names that it does not know, and for programs whose
            `attn_implementation` you cannot reach.

    Raises:
        ImportError: transformers is missing, or older than 5.
        ValueError: `name` is taken, or transformers would read a meaning into it.
    """
    if not isinstance(name, str) or not name or any(word in name for word in _RESERVED):
        raise ValueError(
            f"`name` must be a string without any of {', '.join(_RESERVED)}, in which transformers "
            f"reads a meaning, got {name!r}"
        )
    interface, mask_interface, mask = _transformers()
    if name in interface._global_mapping and name not in _NAMES:
        raise ValueError(f"`name` {name!r} is taken: transformers has an attention of that name")
    interface.register(name, attention_forward)
    mask_interface.register(name, mask)
    _NAMES.add(name)
    if replace_sdpa and "sdpa" not in _REPLACED:
        _REPLACED["sdpa"] = interface._global_mapping["sdpa"]
        interface.register("sdpa", attention_forward)
    _guard_models()


def unregister() -> None:
    """Take back all that `register` did. Without effect where it did nothing."""
    if not _NAMES:
        return
    interface, mask_interface, _ = _transformers()
    for name in _NAMES:
        interface._global_mapping.pop(name, None)
        mask_interface._global_mapping.pop(name, None)
    _NAMES.clear()
    if "sdpa" in _REPLACED:
        interface.register("sdpa", _REPLACED.pop("sdpa"))
    from transformers import PreTrainedModel

    for method in _METHODS:
        setattr(PreTrainedModel, method, _REPLACED.pop(method))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: the arguments and results of its `sdpa_attention_forward`.

    Args:
        module: the attention layer; its `is_causal` counts where `is_causal` is None.
        query: (B, H, L, D). key: (B, Hkv, S, D). value: (B, Hkv, S, Dv). Not repeated.
        attention_mask: from our mask function, or dense: bool (True = visible) or added to the
            scores, broadcastable to (B, H, L, S). None: causal if L > 1 and `is_causal`.
        position_bias: added to the scores, broadcastable to (B, H, L, S); has a gradient.
        softcap, s_aux: as `softcap` and `sinks` of `fused_attn.attention`.
        cache: a paged cache, which is brought up to date first.
        kwargs: `output_attentions`, and what is refused; others are of no concern to attention.

    Returns:
        out (B, L, H, Dv), contiguous; and the weights (B, H, L, S) if asked for.
    """
    if cache is not None:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    _refuse_sparse(module, kwargs)
    keys, arguments = _visibility(module, query.shape[2], key.shape[2], attention_mask, is_causal)
    if keys < key.shape[2]:
        key, value = key[:, :, :keys], value[:, :, :keys]
    if position_bias is not None:
        dense, position_bias = arguments.get("bias"), position_bias[..., :keys]
        arguments["bias"] = position_bias if dense is None else position_bias + dense
    bias = arguments.get("bias")
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        arguments["bias"] = bias.to(query.dtype)
    wants_weights = bool(kwargs.get("output_attentions")) or _weights_are_collected()
    result = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softcap=softcap,
        scale=scaling,
        sinks=s_aux,
        dropout_p=dropout,
        layout="blhd",
        return_weights="per_head" if wants_weights else None,
        **arguments,
    )
    return result if wants_weights else (result, None)


def _visibility(
    module: nn.Module, q_length: int, kv_length: int, mask: Tensor | None, is_causal: bool | None
) -> tuple[int, dict[str, Any]]:
    """How many of the keys count, and which a query may see, as arguments of `attention`."""
    if mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        # The first query stands at the first key: the rest of a static cache is still empty.
        return kv_length, {"causal": "upper_left" if q_length > 1 and is_causal else False}
    from . import transformers_masks as masks

    if masks.is_encoded(mask):
        return masks.read(mask, q_length, kv_length)
    mask = mask[..., :kv_length]  # a static cache's may be longer than the keys
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            "`attention_mask` must be bool (True = visible) or of floating point (added to the "
            f"scores), got {mask.dtype}\nhint: `attention_mask.bool()`"
        )
    return kv_length, {"mask" if mask.dtype == torch.bool else "bias": mask}


def _weights_are_collected() -> bool:
    """True where the model was asked for them, and does not tell its layers (GPT-2)."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another version keeps it elsewhere: then those layers give none
        return False
    collected = _active_collector.get()
    return collected is not None and any(["attentions" in key for key in collected])


def _refuse_sparse(module: nn.Module, given: dict[str, Any]) -> None:
    """Keys chosen by number come to kernels that know them, and as a mask to eager and sdpa."""
    for name in _SPARSE:
        if given.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} hands on `{name}=`, sparse attention that "
                "fused_attn does not have\nhint: `register(replace_sdpa=True)` and "
                'attn_implementation="sdpa", under which it is a mask'
            )


def _transformers() -> tuple[Any, Any, Callable[..., Any]]:
    """transformers' two registries, and our mask function."""
    try:
        import transformers
        from transformers.masking_utils import sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(
            f"fused_attn.integrations.transformers needs transformers 5 or later: {error}\n"
            "hint: `pip install 'transformers>=5'`"
        ) from error
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(
            "fused_attn.integrations.transformers needs transformers 5 or later, got "
            f"{transformers.__version__}\nhint: `pip install 'transformers>=5'`"
        )
    from transformers.masking_utils import AttentionMaskInterface

    from .transformers_masks import mask

    return AttentionInterface, AttentionMaskInterface, mask


def _guard_models() -> None:
    """Models that would ignore our name raise where they are made, and where they are told it."""
    from transformers import PreTrainedModel

    if _METHODS[0] in _REPLACED:
        return
    for method in _METHODS:
        _REPLACED[method] = getattr(PreTrainedModel, method)
        setattr(PreTrainedModel, method, _guarded(_REPLACED[method]))


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        asked = next(iter((*args, *kwargs.values())), None)
        if isinstance(asked, dict):
            asked = asked.get("")
        cls: Any = type(model)
        reason = why_not(cls) if asked in _NAMES else None
        if reason is not None:
            message = f"{cls.__name__} cannot run attn_implementation={asked!r}: {reason}"
            if cls.__module__.startswith("transformers."):
                raise ValueError(message)
            warnings.warn(message, UserWarning, stacklevel=2)  # its parts may well be able to
        elif asked in _NAMES and (theirs := keep_theirs(cls)):
            warnings.warn(
                f"attn_implementation={asked!r} does not reach {', '.join(theirs)} of "
                f"{cls.__name__}, where it has them: they compute attention themselves\n"
                "hint: `fused_attn.integrations.transformers.check(model)` lists all layers",
                UserWarning,
                stacklevel=2,
            )
        return method(model, *args, **kwargs)

    return guarded
