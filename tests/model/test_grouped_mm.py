"""The products and the activation below `GroupedExperts`: layouts of tokens, gradient buffers, GPU against CPU."""

from __future__ import annotations

import pytest
import torch

from model import grouped_mm
from model.grouped_mm import collect, group_tokens, grouped_linear, per_token, spread, weighted_swiglu


def test_padded_layout_gives_what_the_ragged_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    def products(budget: int) -> list[torch.Tensor]:
        monkeypatch.setattr(grouped_mm, "_PADDING_BUDGET", budget)
        noise = torch.Generator().manual_seed(1)
        rows = torch.randn(24, 32, generator=noise).bfloat16().requires_grad_()
        weight = torch.randn(4, 16, 32, generator=noise).bfloat16().requires_grad_()
        groups = group_tokens(torch.tensor([7, 0, 12, 5]), rows, weight[0].numel())
        assert groups.capacity == (12 if budget > 0 else None)
        padded = grouped_linear(spread(rows, groups), weight, groups)
        output = collect(padded, groups)
        output.backward(torch.randn(24, 16, generator=noise).bfloat16())
        return [output, rows.grad, weight.grad]

    for ragged, padded in zip(products(-1), products(10**9), strict=True):
        # Both sum in fp32 and round once to bf16: at most one unit in its last place (2**-8) apart.
        torch.testing.assert_close(padded, ragged, rtol=2**-7, atol=1e-3)
    assert group_tokens(torch.tensor([2, 2]), torch.zeros(4, 8), 64).capacity is None  # fp32: never padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adds_gradients_to_ddp_buffers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(grouped_mm, "_PRODUCT_ELEMENTS", 1100)  # two experts at a time
    plain, managed = (torch.nn.Parameter(torch.ones(5, 16, 32, dtype=dtype)) for _ in range(2))
    managed.main_grad, managed.grad_added_to_main_grad = torch.zeros(5, 16, 32), False  # as mcore's DDP sets them
    expected = torch.zeros(5, 16, 32)
    for counts in ([3, 0, 4, 0, 2], [0, 0, 6, 1, 2]):  # two micro-batches
        rows, gradient = torch.randn(9, 32).to(dtype), torch.randn(9, 16).to(dtype)
        groups = group_tokens(torch.tensor(counts), rows, 512)
        assert (groups.capacity is None) == (dtype == torch.float32)
        for weight in (plain, managed):
            weight.grad = None
            collect(grouped_linear(spread(rows, groups), weight, groups), groups).backward(gradient)
        assert managed.grad is not None and managed.grad_added_to_main_grad
        expected += plain.grad
    torch.testing.assert_close(managed.main_grad, expected)

    # Autograd adds to a gradient that is left, so it must get one.
    managed.grad, plain.grad, managed.grad_added_to_main_grad = torch.zeros_like(managed), None, False
    for weight in (plain, managed):
        collect(grouped_linear(spread(rows, groups), weight, groups), groups).backward(gradient)
    assert torch.equal(managed.grad, plain.grad) and not managed.grad_added_to_main_grad
    torch.testing.assert_close(managed.main_grad, expected)


def test_gradients_of_a_single_row_may_lie_anyhow() -> None:
    # A column turned over counts as contiguous, though not for grouped_mm; a sum's is expanded.
    rows, weight = torch.ones(1, 16), torch.nn.Parameter(torch.ones(2, 8, 16))
    for gradient in (torch.ones(8, 1).t(), torch.ones(()).expand(1, 8)):
        weight.grad = None
        grouped_linear(rows, weight, group_tokens(torch.tensor([0, 1]), rows, 128)).backward(gradient)
        assert weight.grad is not None and weight.grad[0].sum() == 0 and weight.grad[1].sum() == 128


@pytest.mark.requires_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_what_the_cpu_gives_without_waiting() -> None:
    def compute(device: str) -> list[torch.Tensor]:
        noise = torch.Generator().manual_seed(1)
        leaves = [torch.randn(*shape, generator=noise) for shape in ((21, 64), (4, 96, 64), (4, 96), (21,))]
        rows, weight, bias, probs = (leaf.to(torch.bfloat16).to(device).requires_grad_() for leaf in leaves)
        counts = torch.tensor([5, 0, 9, 7])  # on the CPU, as the alltoall dispatcher hands them over
        gradient = torch.randn(21, 48, generator=noise).to(torch.bfloat16).to(device)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            groups = group_tokens(counts, rows, 10**12)
            fc1 = grouped_linear(rows, weight, groups) + per_token(bias, groups, len(rows))
            output = weighted_swiglu(fc1, probs)
            output.backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [tensor.float().cpu() for tensor in (output, rows.grad, weight.grad, bias.grad, probs.grad)]

    for ours, theirs in zip(compute("cuda"), compute("cpu"), strict=True):
        # bf16 (8 bits) inside, sums in another order: a few units in the last place of the largest entry.
        torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-6 * theirs.abs().max().item())
