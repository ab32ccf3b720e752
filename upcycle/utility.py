"""Scores that decide which experts are copied: squared norm of the mean gradient, or of the weights, per expert.

The gradient of N batches accumulates in the existing DDP gradient buffers at frozen weights and is then summed over the
ranks that hold the same expert, so the score is that of the mean gradient (not a mean of norms), over all parameters of
the expert (arXiv 2604.19835, section 4), and the same number in every layout up to summation order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from model.build import expert_rows, moe_parts
from parallel.layout import Layout


def _score(
    chunks: list[GPTModel], layout: Layout, value: Callable[[torch.nn.Parameter], torch.Tensor], experts: int
) -> dict[int, list[float]]:
    """Sum of squares of `value(p)` per (layer, expert), over all ranks."""
    parts = moe_parts(chunks)
    numbers = sorted({n for theirs in layout.gather_objects([p.number for p in parts]) for n in theirs})
    total_LE = torch.zeros(len(numbers), experts, dtype=torch.float64, device=layout.device)
    # Expert-data-parallel copies hold the same values by now; one of them speaks.
    if layout.groups.expt_dp.rank() == 0:
        for part in parts:
            row = numbers.index(part.number)
            for p, first, count in expert_rows(part, layout):
                split = getattr(p, "tensor_model_parallel", False) or layout.groups.expt_tp.rank() == 0
                if split:
                    squares = value(p).double().reshape(count, -1).square().sum(dim=1)
                    total_LE[row, first : first + count] += squares
    layout.sum_over_world(total_LE)
    return {number: total_LE[i].tolist() for i, number in enumerate(numbers)}


def weight_scores(chunks: list[GPTModel], layout: Layout, experts: int) -> dict[int, list[float]]:
    """Squared weight norm per layer number and expert: the weakest utility of the paper, but free."""
    return _score(chunks, layout, lambda p: p.detach(), experts)


def _main_grad(p: torch.nn.Parameter) -> torch.Tensor:
    """The part of DDP's gradient buffer that belongs to a parameter."""
    grad: torch.Tensor = p.main_grad  # type: ignore[attr-defined]
    return grad.detach()


def gradient_scores(
    chunks: list[GPTModel],
    wrapped: list[Any],
    layout: Layout,
    experts: int,
    accumulate: Callable[[], None],
    batches: int,
) -> dict[int, list[float]]:
    """Squared norm of the mean gradient per layer number and expert.

    Args:
        chunks: bare model chunks.
        wrapped: the same chunks in DDP; their gradient buffers are used and left zeroed.
        layout: parallel layout.
        experts: experts per MoE layer, E.
        accumulate: runs forward and backward over `batches` global batches without reducing gradients.
        batches: global batches, to take the mean.
    """
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    counters = _counters(chunks)
    accumulate()
    for part in moe_parts(chunks):
        for p in part.layer.experts.parameters():
            layout.sum_over(_main_grad(p), layout.groups.expt_dp)
    # Each rank differentiates its mean loss (times the context size, as mcore does); the sum wants their mean.
    scale = 1.0 / (batches * layout.groups.dp_cp.size())
    scores = _score(chunks, layout, lambda p: _main_grad(p) * scale, experts)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    for buffer, value in counters.items():
        buffer.copy_(value)
    return scores


def _counters(chunks: list[GPTModel]) -> Mapping[torch.Tensor, torch.Tensor]:
    """Copies of the routers' buffers: scoring must leave load balancing as it found it."""
    return {buffer: buffer.clone() for part in moe_parts(chunks) for buffer in part.layer.router.buffers()}
