"""Bytes that one rank sends for one attention layer, on paper (docs/distributed.md, "Volume")."""

from __future__ import annotations

from typing import NamedTuple


class Volume(NamedTuple):
    """Bytes that one rank sends in a forward and a backward pass of one layer."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def bytes_sent(
    *,
    seqlen: int,
    num_heads: int,
    head_dim: int,
    num_heads_kv: int | None = None,
    head_dim_v: int | None = None,
    batch: int = 1,
    itemsize: int = 2,
    ring: int = 1,
    ulysses: int = 1,
) -> Volume:
    """What one of `ring` * `ulysses` ranks sends for one layer of a sequence of `seqlen` tokens.

    With r and u ranks, e bytes a number, c those of the sums (float32, or float64 of float64), and
    the keys and values of a ring's part, K = B (L / r) (Hkv' / u) (D + Dv) numbers, Hkv' = Hkv
    where u divides it, else u::

        ring, forward    (r - 1) K e
        ring, backward   (r - 1) K e + r K c               (nothing where r is 1)
        Ulysses, each    B (L / (r u)) (H (D + Dv) + Hkv' (D + Dv)) e (u - 1) / u

    Raises:
        ValueError: the ranks do not divide the sequence or the heads.
    """
    heads_kv = num_heads if num_heads_kv is None else num_heads_kv
    width = head_dim + (head_dim if head_dim_v is None else head_dim_v)
    if seqlen % (ring * ulysses) != 0:
        raise ValueError(f"`seqlen` must be a multiple of {ring * ulysses} ranks, got {seqlen}")
    if num_heads % ulysses != 0:
        raise ValueError(f"`num_heads` must be a multiple of {ulysses} ranks, got {num_heads}")
    if heads_kv % ulysses != 0:
        if ulysses % heads_kv != 0:
            raise ValueError(
                f"`num_heads_kv` must be a multiple or a divisor of {ulysses} ranks, got {heads_kv}"
            )
        heads_kv = ulysses
    sums = max(4, itemsize)
    keys = batch * (seqlen // ring) * (heads_kv // ulysses) * width
    rows = batch * (seqlen // (ring * ulysses))
    exchanged = rows * (num_heads + heads_kv) * width * itemsize * (ulysses - 1) // ulysses
    around = (ring - 1) * keys * itemsize
    home = ring * keys * sums if ring > 1 else 0
    return Volume(around + exchanged, around + home + exchanged)
