"""Our grouped products over the ceiling of one plain product, by tokens per expert and by skew of the load."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.rows import device, matmul_ceiling, row, seconds_of
from parallel.compat import prepare_megatron

prepare_megatron()

from model.grouped_mm import collect, group_tokens, grouped_linear, spread  # noqa: E402

# Name -> experts, hidden, width of an expert (gate and up together).
_SHAPES = {"32 experts, 2048 x 6144": (32, 2048, 6144), "256 experts, 1024 x 1024": (256, 1024, 1024)}
_TOKENS = (4096, 16384, 65536)


def _counts(experts: int, tokens: int, skew: float) -> torch.Tensor:
    """Tokens per expert, [e] int64: falling as a power of the rank with exponent `skew`; 0 is even."""
    weights = torch.arange(1, experts + 1, dtype=torch.float64) ** -skew
    counts = (weights / weights.sum() * tokens).long()
    counts[0] += tokens - counts.sum()
    return counts


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Forward and backward of one grouped linear layer, in TFLOP/s and over the ceiling."""
    ceiling = matmul_ceiling(256 if small else 8192)
    shapes = {"4 experts, 32 x 64": (4, 32, 64)} if small else _SHAPES
    for name, (experts, hidden, width) in shapes.items():
        weight = torch.randn(experts, width, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
        for tokens in (128,) if small else _TOKENS:
            inputs = torch.randn(tokens, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
            for skew in (0.0, 1.0):
                counts = _counts(experts, tokens, skew)

                def step(counts: Any = counts, inputs: Any = inputs, weight: Any = weight) -> None:
                    groups = group_tokens(counts, inputs, weight.shape[1] * weight.shape[2])
                    output = collect(grouped_linear(spread(inputs, groups), weight, groups), groups)
                    output.sum().backward()
                    weight.grad = inputs.grad = None

                rate = 6 * tokens * hidden * width / seconds_of(step, 5) / 1e12
                load = counts.max().item() * experts / tokens
                what = f"{name}, {tokens} rows, busiest expert {load:.1f} x even"
                yield row(f"grouped product, {what}", rate, "TFLOP/s")
                yield row(f"over a plain product's ceiling, {what}", rate / ceiling)
    yield _correct(small)


def _correct(small: bool) -> dict[str, Any]:
    """The largest relative error of forward and both gradients against products one by one in fp32."""
    torch.manual_seed(1)
    experts, tokens, hidden, width = 8, 64 if small else 4096, 64, 128
    counts = _counts(experts, tokens, 1.0)
    inputs = torch.randn(tokens, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(experts, width, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(tokens, width, device=device(), dtype=torch.bfloat16)
    groups = group_tokens(counts, inputs, width * hidden)
    output = collect(grouped_linear(spread(inputs, groups), weight, groups), groups)
    output.backward(gradient)
    plain_inputs, plain_weight = (x.detach().float().requires_grad_() for x in (inputs, weight))
    parts = [part @ w.T for part, w in zip(plain_inputs.split(counts.tolist()), plain_weight, strict=True)]
    expected = torch.cat(parts)
    expected.backward(gradient.float())
    pairs = [(output, expected), (inputs.grad, plain_inputs.grad), (weight.grad, plain_weight.grad)]
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in pairs if a is not None and b is not None]
    # A bf16 result is off by up to 2^-9 of itself, and products of bf16 numbers are summed in fp32.
    return row("grouped product against fp32, relative error", max(errors), goal="at most 2^-8", met=max(errors) <= 2**-8,
               check=True)  # fmt: skip
