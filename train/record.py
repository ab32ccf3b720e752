"""What a run writes down about each step; definitions are in docs/report.md."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from model.load import load_figures
from train.status import tell_status

if TYPE_CHECKING:
    from train.run import Run


def record_step(run: "Run", figures: Mapping[str, float], seconds: float, share_LE: torch.Tensor) -> None:
    """Write the figures of a step to the run's files, the tracker and the console; rank 0 writes.

    Args:
        run: after the step.
        figures: of the step.
        seconds: that it took.
        share_LE: share of tokens per MoE layer and expert, [L, E].
    """
    stage = run.stage
    record: dict[str, Any] = {
        "step": run.step,
        "stage": stage.number,
        "num_experts": stage.num_experts,
        "tokens": run.tokens,
        **figures,
        "perplexity": math.exp(min(figures["lm_loss"], 700.0)),
        "step_seconds": seconds,
        "tokens_per_second": run.settings.tokens_per_step() / seconds,
        **load_figures(share_LE, run.settings.model.top_k, run.parents()),
    }
    every = run.settings.run
    if run.layout.rank == 0:
        run.write(lambda: run.files.append_metrics(record))
        if share_LE.numel() and (run.step % every.load_interval_steps == 0 or run.step == 1):
            row = {
                "step": run.step,
                "stage": stage.number,
                "num_experts": stage.num_experts,
                "layers": list(stage.load.layer_numbers),
                "share_LE": [[round(x, 6) for x in shares] for shares in share_LE.tolist()],
            }
            run.write(lambda: run.files.append_expert_load(row))
    run.tracker.log(run.step, record)
    run.console.observe(record, run.settings)
    if run.step % every.log_interval_steps == 0 or run.step == 1:
        run.console.progress(record, run.next_event())
        tell_status(run, "running")
