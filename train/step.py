"""Forward and backward: one optimizer step, or micro-batches alone, through mcore's schedules."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from model.document_attention import document_mask, end_to_end, to_device, wants_packed
from parallel.compat import gradient_memory
from parallel.layout import Layout
from train.data.batches import Batch
from train.data.stream import for_this_context_rank
from train.stage import Network, Stage
from train.step_clock import StepClock


def _loss(
    mask: torch.Tensor, layout: Layout, count: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Mean next-token loss of a micro-batch, in nats per token.

    Args:
        mask: [micro_batch, sequence], 1 where a token counts.
        layout: under context parallelism each rank holds part of the sequences and returns its part of the mean.
        count: tokens that the sum is divided by; None for those that count in this micro-batch.
        output: [micro_batch, sequence] loss per token.
    """
    flat = mask.reshape(-1).float()
    if count is None:
        count = layout.sum_over(flat.sum(), layout.groups.cp)
    loss = (output.float().reshape(-1) * flat).sum() / count
    # A copy: mcore scales the loss it differentiates in place.
    return loss, {"loss": loss.detach().clone()}


def _forward(
    layout: Layout,
    count: torch.Tensor | None,
    batches: Iterator[Batch],
    model: Any,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    """mcore's forward step function: the output of a micro-batch, or the plan of it where mcore weaves two together."""
    batch, options = next(batches), {}
    if "packed" in batch:
        options["packed_seq_params"] = to_device(batch["packed"], layout.device)
    batch = for_this_context_rank(batch, layout)
    mask = document_mask(batch["documents"]) if "documents" in batch else None
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"], **options)
    return output, partial(_loss, batch["loss_mask"], layout, count)


def _mean_count(layout: Layout, batches: list[Batch]) -> torch.Tensor | None:
    """Tokens in the loss per micro-batch, on average over the global batch; None where all of them count; collective.

    Divided by their own number instead, tokens would weigh differently by the micro-batch that they happen to be in, so
    the result would depend on the layout.
    """
    if "counted" not in batches[0]:
        return None
    count = torch.stack([batch["counted"].sum() for batch in batches]).sum().to(layout.device)
    layout.sum_over(count, layout.groups.dp)
    return count / (len(batches) * layout.data_size)


def run_micro_batches(stage: Network, layout: Layout, batches: list[Batch], *, forward_only: bool) -> torch.Tensor:
    """Run the micro-batches of one global batch through mcore's schedule for this layout.

    Args:
        stage: the model; gradients accumulate in its DDP buffers unless `forward_only`.
        layout: parallel layout.
        batches: this rank's micro-batches.
        forward_only: evaluate without gradients.

    Returns:
        Scalar: sum over this rank's micro-batches of its share of the mean loss; 0 except on the last pipeline stage of
        tensor rank 0, so that a sum over the world, divided by micro-batches x data ranks, is the global mean.
    """
    count = _mean_count(layout, batches)
    if "documents" in batches[0] and wants_packed(stage.chunks[0]):
        batches = [end_to_end(batch) for batch in batches]
    # Under the interleaved schedule every chunk walks the same micro-batches by itself.
    iterators = [iter(batches) for _ in stage.wrapped]
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward, layout, count),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=stage.wrapped if len(stage.wrapped) > 1 else stage.wrapped[0],
        num_microbatches=len(batches),
        seq_length=batches[0]["tokens"].shape[1],
        micro_batch_size=batches[0]["tokens"].shape[0],
        forward_only=forward_only,
    )
    total = torch.zeros((), dtype=torch.float64, device=layout.device)
    if layout.is_last_stage and layout.groups.tp.rank() == 0:
        for result in results:
            total += result["loss"].double()
    return total


def optimizer_step(
    stage: Stage, layout: Layout, batches: list[Batch], clock: StepClock
) -> tuple[torch.Tensor, float, bool]:
    """One step of training; where loss or gradient are not finite on any rank, nothing is updated on all.

    Returns:
        The rank's share of the loss (see `run_micro_batches`), the global gradient norm before clipping (NaN for a step
        that was skipped), and whether the step was made.
    """
    with clock.part("optimizer"):
        for chunk in stage.wrapped:
            chunk.zero_grad_buffer()
        stage.optimizer.zero_grad()
    with clock.part("forward_backward"):
        loss = run_micro_batches(stage, layout, batches, forward_only=False)
    bad = layout.sum_over_world(1.0 - _finite(stage, loss).double())
    if bad.item():
        return loss, float("nan"), False
    with clock.part("optimizer"):
        _, grad_norm, _ = stage.optimizer.step()
        stage.scheduler.step(increment=1)
    return loss, float(grad_norm or 0.0), True


@torch.no_grad()
def _finite(stage: Stage, loss: torch.Tensor) -> torch.Tensor:
    """Whether this rank's loss and all of its gradients are finite, as a scalar on the device: nothing waits for it."""
    # The largest magnitude: no square can overflow, and no copy is made.
    largest = [
        torch.linalg.vector_norm(gradient, float("inf"))
        for chunk in stage.wrapped
        for gradient in gradient_memory(chunk)
    ]
    return torch.isfinite(torch.stack([loss.to(torch.float32), *largest])).all()
