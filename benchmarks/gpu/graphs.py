"""CUDA graphs of attention through an expansion: losses, step time and memory beside the same run without them."""

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.rows import corpus, no_time_for, row, seconds_left
from parallel.compat import prepare_megatron
from parallel.transformer_engine import have_transformer_engine

prepare_megatron()

from model.graphs import WARMUP_STEPS  # noqa: E402
from parallel.graphs import prepare_environment  # noqa: E402
from train.job import run_settings  # noqa: E402
from train.settings import load_settings  # noqa: E402

_SWITCH, _STEPS = 8, 16
# Small micro-batches, where launching the kernels costs most; and tiny ones for a CPU, without graphs.
_LARGE = ["model=paper_154m", "data.sequence_length=1024", "data.micro_batch_size=1", "data.global_batch_size=4"]
_SMALL = ["model=tiny", "data.sequence_length=32", "data.micro_batch_size=1", "data.global_batch_size=2"]
# The kernels are the same, in another order at most: sums in bf16 over a few steps. A stale input would be tenths of a nat.
_TOLERANCE = 0.02
# Gradients of some micro-batches that got lost move losses by less than that in so few steps; the norm at once by several
# hundredths.
_NORM_TOLERANCE = 0.02


def _run(
    folder: Path, name: str, prefix: Path, overrides: list[str]
) -> tuple[list[float], list[float], dict[str, Any]]:
    """A run that grows half-way.

    Returns:
        Losses in nats and seconds, by step; and by name the details of its events on graphs, in order.
    """
    run_dir = folder / name
    run_settings(load_settings([
        *overrides, f"data.corpus={prefix}", f"run.steps={_STEPS}", "schedule.decay_steps=2", "schedule.warmup_steps=2",
        "tracking=none", "checkpoint=ends", "checkpoint.save_final=false", "evaluation.batches=1", "run.precision=bf16",
        f"upcycle.stages=[{{at_step: {_SWITCH}, factor: 2}}]", "upcycle.save_before=false", f"run.dir={run_dir}",
    ]))  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    events = {n: [e["details"] for e in lines if e["event"] == n] for n in ("graphs_captured", "graphs_dropped")}
    return _metric(run_dir, "lm_loss"), _metric(run_dir, "step_seconds"), events


def _metric(run_dir: Path, name: str) -> list[float]:
    """A metric by step."""
    return [json.loads(line)[name] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _apart(one: list[float], other: list[float], steps: slice) -> float:
    return max(abs(a - b) for a, b in zip(one[steps], other[steps], strict=True))


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """The same run with graphs, and twice without."""
    # Read by NCCL once, and the first run makes groups too.
    prepare_environment()
    possible = not small and have_transformer_engine() and torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name, mock.patch("train.job._report"):
        folder = Path(name)
        prefix, network = corpus(folder), _LARGE if possible else _SMALL
        plain, without, _ = _run(folder, "without", prefix, network)
        if possible:
            yield from _beside(plain, without, folder, prefix)
        else:
            yield row("CUDA graphs", "not possible here: they need Transformer Engine and a GPU")
        # What the first run compiled this one finds.
        if seconds_left() < 1.5 * sum(without):
            yield no_time_for("two runs without graphs, largest difference of loss")
            return
        again, _, _ = _run(folder, "again", prefix, network)
        yield row("two runs without graphs, largest difference of loss", _apart(plain, again, slice(None)), "nats")


def _beside(plain: list[float], without: list[float], folder: Path, prefix: Path) -> Iterator[dict[str, Any]]:
    losses, seconds, events = _run(folder, "with", prefix, [*_LARGE, "performance.cuda_graphs=attention"])
    captured, dropped = events["graphs_captured"], events["graphs_dropped"]
    told = [(e["stage"], e["graphs"]) for e in captured]
    yield row("stages with graphs, and how many", str(told), goal="the same number in both",
              met=[s for s, _ in told] == [0, 1] and told[0][1] == told[1][1] > 0, check=True)  # fmt: skip
    for what, steps in (("before", slice(_SWITCH)), ("behind", slice(_SWITCH, None))):
        apart = _apart(plain, losses, steps)
        yield row(f"losses with graphs {what} a live switch, largest difference to those without", apart, "nats",
                  goal=f"at most {_TOLERANCE}", met=apart <= _TOLERANCE, check=True)  # fmt: skip
    one, other = (_metric(folder / name, "grad_norm") for name in ("without", "with"))
    for what, step in (("before", WARMUP_STEPS), ("behind", _SWITCH + WARMUP_STEPS)):
        apart = abs(other[step] / one[step] - 1)
        yield row(f"norm of the gradient in the first step with graphs {what} a live switch, relative difference", apart,
                  goal=f"at most {_NORM_TOLERANCE}", met=apart <= _NORM_TOLERANCE, check=True)  # fmt: skip
    # The first replay comes after the capture, which is no part of a step.
    for what, steps in (("before", slice(WARMUP_STEPS, _SWITCH)), ("behind", slice(_SWITCH + WARMUP_STEPS, None))):
        ratio = statistics.median(seconds[steps]) / statistics.median(without[steps])
        yield row(f"step with graphs over one without, {what} the switch", ratio, goal="below 1", met=ratio < 1)
    for made, gone in zip(captured, dropped, strict=True):
        where = f"stage {made['stage']}"
        yield row(f"{where}: captured in", made["seconds"], "s")
        yield row(f"{where}: graphs hold", made["bytes"] / 2**20, "MiB")
        share = gone["bytes"] / max(made["bytes"], 1)
        # What libraries allocate for good in the first capture of a process stays; a later stage's must come back.
        later = made["stage"] > 0
        yield row(f"{where}: of that given back", share, goal="at least 0.9" if later else "",
                  met=share >= 0.9 if later else None)  # fmt: skip
