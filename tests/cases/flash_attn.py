"""flash_attn's own definition in float64, and its options, for the tests of its door."""

import math

import torch


def heads(*shape, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


def oracle(q, k, v, *, causal=False, window=(-1, -1), softcap=0.0, scale=None, slopes=None):
    """flash_attn's own definition for one sequence, (L, H, D), in float64: out and lse."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    d = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * d.abs()
    left, right = window
    right = 0 if causal and (right < 0 or right > 0) else right
    hidden = torch.zeros_like(d, dtype=torch.bool)
    if left >= 0:
        hidden |= d > left
    if right >= 0:
        hidden |= d < -right
    s = s.masked_fill(hidden, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(s, -1))
    return torch.einsum("hij,jhd->ihd", weights, v), torch.logsumexp(s, -1)


SEMANTICS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "causal window": {"causal": True, "window": (2, -1)},
    "a window to the right only": {"window": (-1, 2)},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.3, "causal": True},
    "alibi": {"slopes": True, "causal": True},
    "all": {"slopes": True, "causal": True, "window": (4, 0), "softcap": 2.0, "scale": 0.5},
}


def arguments(options):
    names = {"causal": "causal", "window": "window_size", "softcap": "softcap"}
    names |= {"scale": "softmax_scale", "slopes": "alibi_slopes"}
    return {names[name]: value for name, value in options.items()}


def own_slopes(options, b):
    return {"slopes": options["slopes"][b]} if "slopes" in options else {}
