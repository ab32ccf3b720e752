"""Scores that decide which experts are copied (arXiv 2604.19835, section 4), one number per expert.

    grad_norm    ||g||^2, the squared norm of the mean gradient
    saliency     ||w|| ||g||, the norm of the weights times that of the mean gradient
    weight_norm  ||w||^2, which takes no batches

Norms run over all parameters of an expert. The gradient of N batches accumulates in the existing DDP gradient buffers at
frozen weights and is then summed over the ranks that hold the same expert, so g is the mean gradient (not a mean of
norms), and a score is the same number in every layout up to summation order.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from model.build import expert_rows, moe_parts
from model.config import one_of
from model.load import restored_counters
from parallel.layout import Layout

# Those that `gradient_scores` computes; weight_norm is `weight_scores`.
GRADIENT_UTILITIES = ("grad_norm", "saliency")


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
    utility: str = "grad_norm",
) -> dict[int, list[float]]:
    """Squared norm of the mean gradient, or its product with the norm of the weights, per layer number and expert.

    Args:
        chunks: bare model chunks.
        wrapped: the same chunks in DDP; their gradient buffers are used and left zeroed, the parameters' `.grad` None.
        layout: parallel layout.
        experts: experts per MoE layer, E.
        accumulate: runs forward and backward over `batches` global batches without reducing gradients.
        batches: global batches, to take the mean.
        utility: `grad_norm` or `saliency`.

    Raises:
        ConfigError: if the utility is another one.
    """
    one_of("utility", utility, GRADIENT_UTILITIES)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    for chunk in chunks:
        # After a step in fp32 mcore leaves the buffer's parts as the parameters' gradients. Autograd would add to them
        # before DDP's hook does: a gradient twice, or the empty tensor of a layer that has added to the buffer itself.
        chunk.zero_grad(set_to_none=True)
    parts = moe_parts(chunks)
    with restored_counters(parts):
        accumulate()
    for part in parts:
        for p in part.layer.experts.parameters():
            layout.sum_over(_main_grad(p), layout.groups.expt_dp)
    # Each rank differentiates its mean loss (times the context size, as mcore does); the sum wants their mean.
    scale = 1.0 / (batches * layout.groups.dp_cp.size())
    scores = _score(chunks, layout, lambda p: _main_grad(p) * scale, experts)
    if utility == "saliency":
        weights = weight_scores(chunks, layout, experts)
        scores = {
            number: [math.sqrt(g * w) for g, w in zip(row, weights[number], strict=True)]
            for number, row in scores.items()
        }
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    return scores
