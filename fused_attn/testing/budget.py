"""A float64 oracle and the error budget.

The budget is FlashAttention's rule: our largest error against the oracle may be at most twice
(forward) or three times (backward) that of plain PyTorch in the same dtype, plus one rounding step
of the result. Plain PyTorch's error in a small tensor is partly luck, so it is the largest of a few
draws: the same call, with inputs moved to neighbouring numbers. In float64 the oracle has an error
of plain's size itself, which is allowed once more. No tolerance is tuned by hand.
Users may run the same check in their own CI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0
DRAWS = 4


def to_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies with every floating tensor in `dtype`, detached, gradient flags kept."""
    return {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in tensors.items()
    }


def rounding_step(dtype: torch.dtype, magnitude: float) -> float:
    """Spacing of `dtype` at `magnitude`: the error of storing a result once, and a little more."""
    return torch.finfo(dtype).eps * magnitude + torch.finfo(dtype).smallest_normal


def neighbours(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Copies with every floating number moved one rounding step of its dtype up or down."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, x in tensors.items():
        if x.is_floating_point():
            sign = torch.randint(0, 2, x.shape, generator=generator).to(x.device, x.dtype) * 2 - 1
            step = torch.finfo(x.dtype).eps * x.detach().abs()
            x = (x.detach() + sign * step).requires_grad_(x.requires_grad)
        result[name] = x
    return result


def largest_error(actual: Tensor, oracle: Tensor) -> float:
    """Max |actual - oracle|; equal infinities count as no error, a NaN as infinite error."""
    actual, oracle = actual.detach().double(), oracle.detach().double()
    if actual.numel() == 0:
        return 0.0
    difference = torch.where(actual == oracle, 0.0, (actual - oracle).abs())
    difference = torch.where(actual.isnan() & oracle.isnan(), 0.0, difference)
    return float(difference.nan_to_num(nan=torch.inf).max())


def plain_error(plain: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """Largest error of plain PyTorch's result, as the yardstick of a result in `dtype`.

    Nothing is closer to float64 than float64: such a result is judged by plain PyTorch in float32,
    whose error is scaled by the ratio of the two precisions.
    """
    error = largest_error(plain, oracle)
    if dtype == torch.float64 and plain.dtype == torch.float32:
        error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    # Plain PyTorch may overflow where the formula does not; one rounding step is then the bar.
    return 0.0 if error == torch.inf else error


def assert_within_budget(
    name: str,
    ours: Tensor,
    plain: Tensor | float,
    oracle: Tensor,
    factor: float = FORWARD_FACTOR,
    stored: float = 0.0,
) -> None:
    """Fail unless `ours` is nearly as close to `oracle` as `plain` is.

    Args:
        name: named in the message.
        ours: the result under test.
        plain: plain PyTorch's result in the same dtype (in float32 for float64), or its error.
        oracle: the formula's result in float64.
        factor: how many times plain's error is allowed.
        stored: what one rounding of the stored results that this is made of comes to.

    Raises:
        AssertionError: shape or dtype differ from plain's, or the error is over the budget.
    """
    assert ours.shape == oracle.shape, f"{name}: shape {ours.shape}, expected {oracle.shape}"
    if isinstance(plain, Tensor):
        same = ours.dtype == plain.dtype or ours.dtype == torch.float64
        assert same, f"{name}: dtype {ours.dtype}, expected {plain.dtype}"
        plain = plain_error(plain, oracle, ours.dtype)
    finite = oracle.detach()[oracle.isfinite()]
    magnitude = float(finite.abs().max()) if finite.numel() else 0.0
    error = largest_error(ours, oracle)
    if ours.dtype == torch.float64:
        factor += 1  # for the oracle's own error: it has the same precision
    allowed = factor * plain + rounding_step(ours.dtype, magnitude) + stored
    assert error <= allowed, (
        f"{name}: error {error:.3g} against float64, allowed {allowed:.3g} ({factor:g} x plain "
        f"{plain:.3g} + one rounding step at {magnitude:.3g} + {stored:.3g} of stored results)"
    )


def output_gradients(outputs: Sequence[Tensor | None], seed: int = 0) -> list[Tensor | None]:
    """Fixed random gradients of `outputs`, the same numbers in every dtype.

    Rows of -inf (lse of an empty row) get gradient 0.
    """
    generator = torch.Generator().manual_seed(seed)
    grads: list[Tensor | None] = []
    for output in outputs:
        if output is None:
            grads.append(None)
            continue
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        # Rounded through the lowest precision, so that every dtype gets exactly the same numbers.
        grad = grad.bfloat16().to(output.device, output.dtype)
        grads.append(torch.where(output.detach().isinf(), 0.0, grad))
    return grads


def pull_back(
    outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of `inputs`; zeros for one that does not matter."""
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    if not pairs or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [grad for _, grad in pairs],
        allow_unused=True,
        retain_graph=True,
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def gradients(outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of `inputs` under the fixed gradients of `outputs`."""
    return pull_back(outputs, output_gradients(outputs), inputs)


def attention_noise(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[float]:
    """What rounding out, lse and weights once, as they are stored, does to what is made of them.

    Weights and the backward recompute p = exp(s - lse) from the stored lse and a score that is
    rounded anew: an error d in either turns p into p (1 - d), and with it every gradient. The
    backward also starts from delta = rowsum(dout * out) + rowsum(dweights * weights) (Dao 2023,
    "FlashAttention-2", section 3.1; torch's own does as well): an error in delta acts as a gradient
    of lse would. Plain PyTorch stores neither, and is exact by luck where a row sees one key.

    Args:
        outputs: the float64 oracle's out (B, H, Lq, Dv), lse (B, H, Lq) and weights, or None.
        inputs: the differentiable inputs behind them.
        dtype: what out and weights are stored in; lse is float32 (float64 for float64).

    Returns:
        The largest change of out, lse and weights, then of each input's gradient, in a few draws of
        the errors' signs.
    """
    out, lse, weights = outputs
    dout, dlse, dweights = output_gradients(outputs)
    if out is None or lse is None or dout is None or dlse is None:
        raise ValueError("`outputs` must be out, lse and weights or None")
    delta = (dout * out).abs().sum(-1)
    if weights is not None and dweights is not None:
        terms = (dweights * weights).abs().sum(-1)
        delta = delta + terms / (out.shape[1] // weights.shape[1])
    empty = lse.detach().isinf()
    of_delta = torch.where(empty, 0.0, torch.finfo(dtype).eps * delta.detach())
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Twice: lse, and the score that it is taken from.
    of_lse = torch.where(empty, 0.0, 2 * torch.finfo(lse_dtype).eps * lse.detach().abs())
    changes = [0.0] * len(inputs)
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        sign = torch.randint(0, 2, lse.shape, generator=generator).to(lse.device) * 2.0 - 1.0
        from_delta = pull_back([lse], [of_delta * sign], inputs)
        by_sign = of_lse * sign
        from_lse = pull_back([out, lse], [dout * by_sign[..., None], dlse * by_sign], inputs)
        found = [_largest(a) + _largest(b) for a, b in zip(from_delta, from_lse, strict=True)]
        changes = [max(pair) for pair in zip(changes, found, strict=True)]
    of_weights = 0.0 if weights is None else _largest(weights) * _largest(of_lse)
    # lse = largest score + log(sum): the score was rounded, and the sum, which is 1 and above.
    size = _largest(torch.where(empty, 0.0, lse))
    rounded = 2 * torch.finfo(lse_dtype).eps * max(1.0, size)
    return [0.0, rounded, of_weights, *changes]


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def check_against_oracle(
    ours: Callable[..., Sequence[Tensor | None]],
    formula: Callable[..., Sequence[Tensor | None]],
    tensors: dict[str, Tensor],
    output_names: Sequence[str],
    noise: Callable[..., list[float]] | None = None,
    draws: int = DRAWS,
) -> None:
    """Hold `ours(**tensors)` and its gradients against `formula` in float64 and in the same dtype.

    Args:
        ours: the implementation under test.
        formula: plain PyTorch, computing in the dtype that it is given.
        tensors: arguments by name; gradients are checked for those that require them.
        output_names: of the outputs, for messages.
        noise: what one rounding of stored results does to each output and gradient made of them,
            as `attention_noise`.
        draws: how often plain PyTorch's error is looked at.

    Raises:
        AssertionError: an output or a gradient is over its budget.
    """
    wanted = [name for name, tensor in tensors.items() if tensor.requires_grad]
    names = [*output_names, *(f"gradient of {name}" for name in wanted)]

    def results(
        function: Callable[..., Sequence[Tensor | None]], arguments: dict[str, Tensor]
    ) -> list[Tensor | None]:
        outputs = function(**arguments)
        inputs = [arguments[name] for name in wanted]
        return [*outputs[: len(output_names)], *gradients(outputs, inputs)]

    dtype = next(x.dtype for x in tensors.values() if x.is_floating_point())
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    actual = results(ours, tensors)
    oracle = results(formula, to_dtype(tensors, torch.float64))
    errors = [0.0] * len(names)
    for draw in range(draws):
        inputs = to_dtype(tensors, plain_dtype)
        if draw > 0:
            inputs = neighbours(inputs, draw)
        plain = results(formula, inputs)
        exact = results(formula, to_dtype(inputs, torch.float64))
        for i, (x, y) in enumerate(zip(plain, exact, strict=True)):
            if x is not None and y is not None:
                errors[i] = max(errors[i], plain_error(x, y, dtype))
    stored = [0.0] * len(names)
    if noise is not None:
        doubles = to_dtype(tensors, torch.float64)
        stored = noise(formula(**doubles), [doubles[name] for name in wanted], dtype)
    for i, (name, mine, true) in enumerate(zip(names, actual, oracle, strict=True)):
        assert (mine is None) == (true is None), f"{name} is there on one side only"
        if mine is not None and true is not None:
            factor = FORWARD_FACTOR if i < len(output_names) else BACKWARD_FACTOR
            assert_within_budget(name, mine, errors[i], true, factor, stored[i])
