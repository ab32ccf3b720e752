"""What a run writes down when it starts, about each step and each checkpoint; definitions are in docs/report.md."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.build import count_parameters
from model.load import load_figures
from parallel.compat import versions
from parallel.compiler import compile_obstacle
from parallel.optimizer_state import adam_name
from train.acceleration import choice_lines
from train.checkpoint.folder import Manifest, folder_bytes
from train.data.blends import table_lines
from train.status import tell_status

if TYPE_CHECKING:
    from train.run import Run


def record_start(run: "Run", source: Path | None, manifest: Manifest | None) -> None:
    """Say what starts, from where and on which data, and what was passed over.

    Args:
        run: ready to train.
        source: the checkpoint it continues from, if any.
        manifest: of that checkpoint.
    """
    counts = count_parameters(run.settings.model, run.stage.chunks, run.layout)
    layout = run.layout.describe()
    kind = next((str(c.value) for c in run.stage.choices if c.key == "model.experts"), "none")
    run.console.opening(run.settings, counts, layout, run.data.micro_batches, kind)
    sources = run.data.table(run.position(), run.settings.run.steps)
    run.event(
        "start",
        num_experts=run.stage.num_experts,
        world_size=run.layout.world_size,
        layout=layout,
        data=sources,
        versions=versions(),
        choices={c.key: c.value for c in run.stage.choices},
        optimizer=adam_name(run.stage.optimizer),
        **counts,
    )
    run.console.say(f"optimizer: {adam_name(run.stage.optimizer)}")
    if run.layout.device.type == "cuda":
        run.console.say(f"chosen for {run.layout.machine().gpu}:")
        for line in choice_lines(run.stage.choices):
            run.console.say(line)
        obstacle = compile_obstacle()
        if obstacle:
            run.console.say(f"mcore's small functions run uncompiled, in more passes over memory: {obstacle}")
    for line in table_lines(sources):
        run.console.say(line)
    if run.persistence.data_changed:
        run.event("data_change", first_sample=run.samples, change=run.persistence.data_changed)
        run.console.say(
            f"other data than before from sample {run.samples} on (data.allow_change): {run.persistence.data_changed}"
        )
    for passed in run.skipped:
        run.event("checkpoint_skipped", **passed)
        run.console.say(f"checkpoint {passed['checkpoint']} was passed over: {passed['problem']}")
    if manifest and source:
        run.event("resume", checkpoint=str(source), stage=manifest.stage, num_experts=manifest.num_experts)
        run.console.say(
            f"resumed from {source}: step {run.step}, stage {manifest.stage}, "
            f"{manifest.num_experts} experts, state verified"
        )


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


def record_checkpoint(run: "Run", path: Path, seconds: float, step: int) -> None:
    """Record a checkpoint that was just published, of the state after `step`."""
    size = folder_bytes(path) if run.layout.rank == 0 else 0
    run.event("checkpoint", path=str(path.relative_to(run.files.run_dir)), seconds=seconds, bytes=size, of_step=step)
    run.console.say(f"step {step}: checkpoint {path.name}, {size / 2**20:.1f} MiB in {seconds:.1f} s")
    tell_status(run, "running")
