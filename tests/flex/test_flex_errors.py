"""Functions that cannot be read, and arguments that do not fit: what is said."""

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

from fused_attn import flex_attention

H, L, D = 4, 40, 8
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


Q = torch.randn(1, H, L, D, generator=torch.Generator().manual_seed(0))


def scoring(function):
    return lambda: flex_attention(Q, Q, Q, function)


MISTAKES = {
    "control flow": (scoring(lambda s, b, h, q, kv: s if q > kv else s * 2), "use torch.where"),
    "a number read": (scoring(lambda s, b, h, q, kv: s + float(q)), "differs from pair to pair"),
    "in place": (scoring(lambda s, b, h, q, kv: s.add_(1)), "`add_`, which changes a tensor"),
    "a side effect": (
        scoring(lambda s, b, h, q, kv: (SLOPES.mul_(1.0), s)[1]),
        "`mul_`, which changes",
    ),
    "random": (scoring(lambda s, b, h, q, kv: s + torch.rand(())), "draws random numbers"),
    "not by element": (scoring(lambda s, b, h, q, kv: torch.stack([s, s]).sum()), "`stack`"),
    "a vector": (scoring(lambda s, b, h, q, kv: s + SLOPES), r"gives shape \(4,\)"),
    "not a tensor": (scoring(lambda s, b, h, q, kv: 1.0), "must return a tensor"),
    "an integer": (scoring(lambda s, b, h, q, kv: q), "must return a floating"),
    "no bool": (
        lambda: flex_attention(Q, Q, Q, None, lambda b, h, q, kv: q - kv),
        "`mask_mod` must return a bool",
    ),
    "another device": (
        scoring(lambda s, b, h, q, kv: s + torch.empty(4, device="meta")[h]),
        "on meta",
    ),
    "another length": (
        lambda: flex_attention(
            Q, Q, Q, block_mask=create_block_mask(causal, 1, 1, 32, 32, device="cpu")
        ),
        r"made for \(Lq, Lk\) = \(40, 40\)",
    ),
    "three heads": (
        lambda: flex_attention(
            Q, Q, Q, block_mask=create_block_mask(causal, 1, 3, L, L, device="cpu")
        ),
        "H = 1 or 4, got 3",
    ),
    "grouped heads": (lambda: flex_attention(Q, Q[:, :2], Q[:, :2]), "enable_gqa=True"),
    "no function": (lambda: flex_attention(Q, Q, Q, 3), "`score_mod` must be a function"),
    "no mask": (lambda: flex_attention(Q, Q, Q, None, 3), "`block_mask` must be a BlockMask"),
    "both": (
        lambda: flex_attention(Q, Q, Q, return_lse=True, return_aux=AuxRequest(lse=True)),
        "`return_lse` must be False",
    ),
    "three dimensions": (lambda: flex_attention(Q[0], Q, Q), "`query` must"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, words = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_a_mistake_names_its_line():
    def bad(s, b, h, q, kv):
        return s if q > kv else 2 * s

    with pytest.raises(
        ValueError, match=r"test_flex_errors.py:\d+: return s if q > kv else 2 \* s"
    ):
        flex_attention(Q, Q, Q, bad)
