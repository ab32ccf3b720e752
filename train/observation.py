"""What is measured of a step beside its loss: where the time went, arithmetic done, memory, norms, routing.

Times and arithmetic are of every step. What needs a pass over the parameters or a collective of its own is measured at
the first step and at every `run.log_interval_steps`th. Definitions: docs/metrics.md.
"""

from typing import Any

import torch

from model.network import flops_per_token, network_chunks
from model.norms import GROUPS, NormMeter, clip_factor, norm_figures
from parallel.config import ParallelConfig
from parallel.devices import device_peak, memory_peak
from parallel.layout import Layout
from train.config import RunSettings
from train.stage import Stage
from train.step_clock import PARTS, StepClock


class Observer:
    """Measures the steps of one stage.

    Attributes:
        step_flops: model FLOPs of one step over all ranks.

    Args:
        settings: of the run.
        stage: the stage; it is watched from now on.
        layout: its layout.
        vocab_size: tokens of the tokenizer.
    """

    def __init__(self, settings: RunSettings, stage: Stage, layout: Layout, vocab_size: int) -> None:
        self.clock = StepClock(layout.device)
        self._settings, self._stage, self._layout = settings, stage, layout
        self._meter = NormMeter(stage.chunks, layout)
        network = network_chunks(settings.model, stage.num_experts, ParallelConfig(), vocab_size, itemsize=2)
        length = settings.data.sequence_length
        per_token = flops_per_token(settings.model, stage.num_experts, network, length)
        self.step_flops = per_token * settings.tokens_per_step()
        # Known for bf16 products alone.
        self._peak = device_peak(layout.device) if settings.run.precision == "bf16" else None
        for part in stage.moe_parts():
            self.clock.watch_exchanges(part.layer)

    def due(self, step: int) -> bool:
        """Whether everything is measured at a step."""
        return step == 1 or step % self._settings.run.log_interval_steps == 0

    def begin(self, step: int) -> None:
        """Get ready for a step, by its number."""
        # What happened since the last one, such as an expansion's scoring, is no part of it.
        self.clock.take()
        self._stage.load.watch_router(self.due(step))

    def figures(self, step: int, seconds: float, grad_norm: float) -> dict[str, float | None]:
        """What was measured of a step that is complete; collective at steps where everything is due.

        Args:
            step: its number.
            seconds: that it took.
            grad_norm: of the whole network before clipping.
        """
        taken = self.clock.take()
        found: dict[str, float | None] = {f"{part}_seconds": taken[part] for part in PARTS if part in taken}
        rate = self.step_flops / seconds / self._layout.world_size / 1e12
        found |= {"step_flops": float(self.step_flops), "tflops_per_device": rate}
        found["mfu"] = rate / self._peak if self._peak else None
        return found | (self._whole(grad_norm) if self.due(step) else {})

    def _whole(self, grad_norm: float) -> dict[str, float | None]:
        squares, entropy = self._meter.squares(self._stage.optimizer), self._stage.load.router_entropy()
        sums = self._layout.sum_over_world(torch.cat([squares.reshape(-1), entropy.reshape(-1)]))
        squares, entropy = sums[: squares.numel()].view(2, len(GROUPS)), sums[squares.numel() :].view(2, -1)
        extremes = [float(memory_peak(self._layout.device)), *self._biases()]
        largest = self._layout.max_over_world(torch.tensor(extremes, dtype=torch.float64, device=self._layout.device))
        memory, top, bottom = largest.tolist()
        found: dict[str, float | None] = {}
        found |= norm_figures(squares, clip_factor(grad_norm, self._settings.optimizer.clip_grad))
        found["memory_bytes"] = memory
        if top > float("-inf"):
            found |= {"bias_max": top, "bias_min": -bottom}
        total, tokens = entropy
        if tokens.numel() and bool((tokens > 0).all()):
            found["router_entropy"] = (total / tokens).mean().item()
        return found

    def _biases(self) -> tuple[float, float]:
        """Largest selection bias on this rank, and the largest negated one; minus infinity where there is none."""
        biases = [part.layer.router.expert_bias for part in self._stage.moe_parts()]
        there = [bias for bias in biases if bias is not None]
        if not there:
            return float("-inf"), float("-inf")
        values: Any = torch.cat(there)
        return values.max().item(), -values.min().item()
