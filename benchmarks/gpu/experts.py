"""Our grouped products over the ceiling of one plain product, by tokens per expert and by skew of the load."""

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.rows import CUTLASS, device, matmul_ceiling, no_time_for, row, seconds_left, seconds_of
from parallel.compat import prepare_megatron
from parallel.transformer_engine import have_transformer_engine

prepare_megatron()

from model.grouped_mm import collect, group_tokens, grouped_linear, spread  # noqa: E402

# Rows and tokens per expert to the product.
_Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Name -> experts, hidden, width of an expert (gate and up together).
_SHAPES = {"32 experts, 2048 x 6144": (32, 2048, 6144), "256 experts, 1024 x 1024": (256, 1024, 1024)}
_TOKENS = (4096, 16384, 65536)


def _counts(experts: int, tokens: int, skew: float) -> torch.Tensor:
    """Tokens per expert, [e] int64: falling as a power of the rank with exponent `skew`; 0 is even."""
    return _dealt(torch.arange(1, experts + 1, dtype=torch.float64) ** -skew, tokens)


def _dealt(shares: torch.Tensor, tokens: int) -> torch.Tensor:
    """Tokens per expert in proportion to `shares`, [e] int64; what rounding leaves goes to the first."""
    counts = (shares / shares.sum() * tokens).long()
    counts[0] += tokens - counts.sum()
    return counts


def _loads(experts: int, tokens: int) -> dict[str, torch.Tensor]:
    """Name -> tokens per expert, [e]."""
    half = torch.full((experts,), 0.5 / (experts - 1), dtype=torch.float64)
    half[0] = 0.5
    few = (torch.arange(experts) % 4 == 0).double()
    return {
        "even": _counts(experts, tokens, 0.0), "1 over rank": _counts(experts, tokens, 1.0),
        "one has half": _dealt(half, tokens), "three of four empty": _dealt(few, tokens),
    }  # fmt: skip


def _ours(experts: int, hidden: int, width: int) -> _Linear:
    weight = torch.randn(experts, width, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)

    def call(inputs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        weight.grad = None
        groups = group_tokens(counts, inputs, width * hidden)
        return collect(grouped_linear(spread(inputs, groups), weight, groups), groups)

    return call


def _te(experts: int, hidden: int, width: int) -> _Linear:
    import transformer_engine.pytorch as te

    linear = te.GroupedLinear(experts, hidden, width, bias=False, params_dtype=torch.bfloat16, device="cuda")

    def call(inputs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        linear.zero_grad(set_to_none=True)
        output: torch.Tensor = linear(inputs, counts.tolist())
        return output

    return call


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Forward and backward of one grouped linear layer over the ceiling; counts are on the host, as mcore hands them."""
    yield _correct(small)
    yield from _adding(small)
    ceiling = matmul_ceiling(256 if small else 8192)
    shapes = {"4 experts, 32 x 64": (4, 32, 64)} if small else _SHAPES
    kinds: dict[str, tuple[Callable[[int, int, int], _Linear], dict[str, str]]] = {"ours": (_ours, {})}
    if torch.cuda.is_available() and have_transformer_engine():
        kinds |= {"te": (_te, {}), "te by CUTLASS": (_te, CUTLASS)}
    for name, (experts, hidden, width) in shapes.items():
        for kind, (make, variables) in kinds.items():
            linear = make(experts, hidden, width)
            for tokens in (128,) if small else _TOKENS:
                if seconds_left() < 3:
                    yield no_time_for(f"{kind}, {name}, {tokens} rows")
                    continue
                for load, counts in _loads(experts, tokens).items():
                    with mock.patch.dict(os.environ, variables):
                        forward, backward = _rates(linear, counts, tokens, hidden, width)
                    what = f"{kind}, {name}, {tokens} rows, {load}"
                    yield row(f"{what}: forward", forward, "TFLOP/s")
                    yield row(f"{what}: forward over the ceiling", forward / ceiling)
                    yield row(f"{what}: backward", backward, "TFLOP/s")
                    yield row(f"{what}: backward over the ceiling", backward / ceiling)


def _rates(linear: _Linear, counts: torch.Tensor, tokens: int, hidden: int, width: int) -> tuple[float, float]:
    """TFLOP/s of forward and of backward."""
    inputs = torch.randn(tokens, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(tokens, width, device=device(), dtype=torch.bfloat16)

    def both() -> None:
        inputs.grad = None
        linear(inputs, counts).backward(gradient)

    forward = seconds_of(lambda: linear(inputs, counts), 5)
    flops = 2 * tokens * hidden * width / 1e12
    # The forward pass of `both` is taken out; on a noisy machine a tenth of it is the least that is left.
    return flops / forward, 2 * flops / max(seconds_of(both, 5) - forward, forward / 10)


def _adding(small: bool) -> Iterator[dict[str, Any]]:
    """A bf16 weight gradient added to an fp32 buffer, as mcore's DDP does after a product, and by a compiled function."""
    elements = 1 << (16 if small else 28)
    total = torch.zeros(elements, device=device())
    gradient = torch.randn(elements, device=device(), dtype=torch.bfloat16)

    def add(total: torch.Tensor, gradient: torch.Tensor) -> None:
        total.add_(gradient)

    for name, function in (("torch", add), ("a compiled function", torch.compile(add))):
        rate = 10 * elements / seconds_of(lambda function=function: function(total, gradient), 5) / 1e9
        yield row(f"a bf16 gradient added to an fp32 buffer by {name}, read and written", rate, "GB/s")


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
