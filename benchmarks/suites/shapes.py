"""The standard shapes of the field, small ones for the CPU, and shapes from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ShapeKind:
    """What the numbers of a shape mean, and the named sets of such shapes.

    Attributes:
        fields: names of the numbers, as the command line wants them.
        sets: named lists of shapes.
    """

    fields: tuple[str, ...]
    sets: dict[str, list[Sizes]]

    @property
    def form(self) -> str:
        return ",".join(self.fields)


class ShapeError(ValueError):
    """A shape that cannot be read; the message lists what can."""


def _constant_tokens(
    tokens: int, hidden: int, lengths: Sequence[int], head_dims: Sequence[int]
) -> list[Sizes]:
    """As many tokens at every length, and as many features at every head size."""
    return [
        (tokens // length, hidden // dim, hidden // dim, length, length, dim)
        for dim in head_dims
        for length in lengths
    ]


def _square(batch: int, heads: int, lengths: Sequence[int], dim: int) -> list[Sizes]:
    return [(batch, heads, heads, length, length, dim) for length in lengths]


ATTENTION = ShapeKind(
    ("B", "H", "Hkv", "Lq", "Lk", "D"),
    {
        # 16k tokens, 2048 features: FlashAttention's own tables.
        "tokens-16k": _constant_tokens(
            16384, 2048, (512, 1024, 2048, 4096, 8192, 16384), (128, 64, 256)
        ),
        # Triton's tutorial and those who follow it.
        "b4h48": [
            size for dim in (64, 128) for size in _square(4, 48, (1024, 2048, 4096), dim)
        ],
        "bert-base": _square(8, 12, (128, 256, 384, 512), 64),
        "grouped": [(2, 32, 8, 2048, 2048, 128), (2, 32, 4, 4096, 4096, 128)],
        "decode": [
            (8, 32, 32, 1, 1024, 128), (8, 32, 32, 1, 4096, 128), (8, 32, 32, 1, 16384, 128),
            (8, 32, 8, 1, 4096, 128), (8, 32, 8, 1, 16384, 128),
        ],
        "small": [(1, 8, 8, 128, 128, 64), (4, 8, 8, 256, 256, 64), (1, 16, 16, 512, 512, 128)],
        "cpu": [
            *_constant_tokens(2048, 512, (128, 512, 2048), (64, 128)), (32, 8, 8, 100, 100, 64),
        ],
        "cpu-decode": [
            (1, 32, 32, 1, 1024, 128), (8, 32, 32, 1, 4096, 128), (4, 32, 8, 1, 2048, 128),
            (4, 16, 16, 8, 1024, 64),
        ],
        "quick": [
            *_constant_tokens(1024, 512, (128, 256, 1024), (64,)),
            *_constant_tokens(1024, 512, (128, 1024), (128,)),
        ],
        "quick-decode": [(1, 32, 32, 1, 1024, 128), (4, 32, 8, 1, 2048, 128)],
        "call": [(1, 2, 2, 4, 4, 16)],
        "toy": [(2, 2, 2, 24, 24, 16)],
        "toy-decode": [(2, 4, 2, 1, 40, 16)],
    },
)  # fmt: skip

PACKED = ShapeKind(
    ("B", "H", "Hkv", "L", "D"),
    {
        "bert-base": [(8, 12, 12, length, 64) for length in (128, 256, 384, 512)],
        "tokens-16k": [(16384 // n, 16, 16, n, 128) for n in (512, 1024, 2048, 4096)],
        "cpu": [(8, 8, 8, 512, 64), (32, 8, 8, 128, 64)],
        "quick": [(4, 8, 8, 256, 64)],
        "toy": [(3, 2, 1, 24, 16)],
    },
)

ROWS = ShapeKind(
    ("ROWS", "WIDTH"),
    {
        "64m": [(2**26 // width, width) for width in (1024, 2048, 4096, 8192)],
        "cpu": [(8192, 1024), (4096, 768), (512, 4096)],
        "quick": [(2048, 768), (512, 4096)],
        "toy": [(6, 32)],
    },
)

PRODUCTS = ShapeKind(
    ("ROWS", "IN", "OUT"),
    {
        "d512-1024": [(16384, width, n * width) for width in (512, 1024) for n in (3, 4)],
        "cpu": [
            (2048, 256, 1024), (1024, 512, 1536), (512, 768, 3072), (256, 512, 2048),
            (64, 512, 512),
        ],
        "quick": [(256, 512, 2048), (64, 512, 512)],
        "toy": [(6, 32, 16)],
    },
)  # fmt: skip

TOKENS = ShapeKind(
    ("B", "L", "VOCABULARY", "WIDTH"),
    {
        "bert-base": [(32, 512, 30522, 768)],
        "cpu": [(32, 128, 30522, 512), (8, 512, 8000, 1024)],
        "quick": [(8, 128, 8000, 512)],
        "toy": [(2, 6, 20, 16)],
    },
)

MODULES = ShapeKind(
    ("B", "L", "WIDTH", "HEADS"),
    {
        "d512-1024": [(32, 512, 512, 8), (32, 512, 768, 12), (32, 512, 1024, 16)],
        "bert-base": [(8, length, 768, 12) for length in (128, 256, 384, 512)],
        "long": [(2, 2048, 1024, 16), (2, 8192, 1024, 16)],
        "cpu": [(4, 512, 512, 8), (16, 128, 512, 8), (1, 2048, 512, 8)],
        "quick": [(4, 128, 512, 8), (1, 512, 512, 8)],
        "toy": [(2, 10, 32, 2)],
    },
)

NONE = ShapeKind((), {"process": [()]})


def parse(kind: ShapeKind, text: str, variants: Sequence[str]) -> tuple[list[Sizes], str | None]:
    """The shapes that `text` names, and the variant if it ends in one.

    Args:
        text: the name of a set, or `kind.form` in numbers; ",VARIANT" may follow either.

    Raises:
        ShapeError: neither; the message lists sets, form and variants.
    """
    *words, last = text.split(",")
    variant = last if last in variants else None
    words = words if variant else [*words, last]
    if len(words) == 1 and words[0] in kind.sets:
        return list(kind.sets[words[0]]), variant
    if len(words) == len(kind.fields) and words:
        try:
            sizes = tuple(int(word) for word in words)
        except ValueError:
            sizes = (0,)
        if min(sizes) > 0:
            _check_heads(kind, text, dict(zip(kind.fields, sizes, strict=True)))
            return [sizes], variant
    raise ShapeError(
        f"a shape must be one of {', '.join(kind.sets)}"
        + (f", or {kind.form} in positive numbers" if kind.fields else "")
        + (f", with ,{{{'|'.join(variants)}}} behind it or not" if variants else "")
        + f"; got {text!r}"
    )


def _check_heads(kind: ShapeKind, text: str, sizes: dict[str, int]) -> None:
    rules: list[tuple[str, str, Callable[[], bool]]] = [
        ("H", "Hkv", lambda: sizes["H"] % sizes["Hkv"] == 0),
        ("WIDTH", "HEADS", lambda: sizes["WIDTH"] % sizes["HEADS"] == 0),
    ]
    for whole, part, holds in rules:
        if whole in sizes and part in sizes and not holds():
            raise ShapeError(f"{whole} must be a multiple of {part}; got {text!r} ({kind.form})")
