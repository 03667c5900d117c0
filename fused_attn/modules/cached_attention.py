"""The keys and values of a call that has a cache."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

from torch import Tensor

from ..runtime import checks, sequence
from .attention_arguments import Sizes
from .cache import Cache, KeyValueCache, MemoryCache
from .paged_cache import PagedKeyValueCache


def expect_cacheable(name: str, attention: Any) -> None:
    """Raise TypeError where a layer's child cannot take a cache."""
    if not hasattr(attention, "project_heads"):
        raise TypeError(
            f"`cache` needs a FusedMultiheadAttention as `{name}`, this is a "
            f"{type(attention).__name__}"
        )


def check(module: Any, cache: Cache | MemoryCache, sizes: Sizes) -> int:
    """The keys that stand before the new ones.

    Raises:
        TypeError: `cache` is none.
        ValueError: the memory is another one than before, or its queries have no known positions.
    """
    sequence.expect_whole("a cache", "generate outside of `context_parallel`")
    if isinstance(cache, MemoryCache):
        if module.rotary_base is not None:
            raise ValueError(
                "a MemoryCache does not know the positions of the queries, which `rotary_base` "
                "needs; cross-attention has none as a rule"
            )
        if cache.k is not None:
            stored, given = (cache.k.shape[0], cache.length), (sizes.batch, sizes.keys)
            if stored != given:
                raise ValueError(
                    f"`cache` was made for a memory (batch, length) {stored}, got {given}; "
                    "another memory needs a new MemoryCache"
                )
        return 0
    if not hasattr(cache, "append") or not hasattr(cache, "length"):
        raise TypeError(
            "`cache` must be a KeyValueCache, PagedKeyValueCache or MemoryCache, "
            f"got {checks.type_name(cache)}"
        )
    return cache.length


def heads(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sizes,
    cache: Cache | MemoryCache,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, H, L, D) of the call, and k and v (N, H, S, D) with all that the cache holds.

    Args:
        sizes: of the call, its keys with those that the cache held before.
    """
    if isinstance(cache, MemoryCache):
        if cache.k is None or cache.v is None:
            q, cache.k, cache.v = module.project_heads(query, key, value, sizes.batched)
        else:
            sequence = 1 if sizes.batched and sizes.batch_first else 0
            key, value = (x.narrow(sequence, 0, 0) for x in (key, value))
            q, _, _ = module.project_heads(query, key, value, sizes.batched)
        return q, cache.k, cache.v
    q, k, v = module.project_heads(query, key, value, sizes.batched)
    if module.rotary_base is not None:
        k = module.rotate_heads(k, cache.length)
        q = module.rotate_heads(q, sizes.keys - sizes.queries)  # the last query at the last key
    return q, *cache.append(k, v)


def own_cache(max_len: int | None, page_size: int | None) -> KeyValueCache | PagedKeyValueCache:
    """An empty cache of a self-attention, in pages of page_size positions; None: in one piece."""
    return KeyValueCache(max_len) if page_size is None else PagedKeyValueCache(page_size, max_len)


def check_caches(caches: Any, layers: Sized) -> None:
    """Raise where there is not one cache for each layer of a stack."""
    if not isinstance(caches, Sequence):
        raise TypeError(
            "`cache` of a stack must be a list, one for each layer (`new_cache()`), "
            f"got {checks.type_name(caches)}"
        )
    if len(caches) != len(layers):
        raise ValueError(f"`cache` must be a list of {len(layers)}, got {len(caches)}")


def options_of(caches: Sequence[Any] | None, layers: Sized) -> list[dict[str, Any]]:
    """What each layer is called with besides the rest."""
    if caches is None:
        return [{}] * len(layers)
    return [{"cache": cache} for cache in caches]
