"""FP8 through an expansion: losses beside those of bf16, and the step time of both."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.rows import corpus, no_time_for, row, seconds_left
from parallel.compat import prepare_megatron
from parallel.transformer_engine import have_transformer_engine

prepare_megatron()

from train.job import run_settings  # noqa: E402
from train.settings import load_settings  # noqa: E402

_STEPS = 20


def _run(folder: Path, name: str, prefix: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Metrics of a run that grows half-way."""
    run_settings(load_settings([
        "model=paper_154m", f"data.corpus={prefix}", "data.sequence_length=1024", "data.micro_batch_size=4",
        "data.global_batch_size=8", f"run.steps={_STEPS}", "schedule.decay_steps=2", "schedule.warmup_steps=2",
        "tracking=none", "checkpoint=ends", "checkpoint.save_final=false", "evaluation.batches=1",
        f"upcycle.stages=[{{at_step: {_STEPS // 2}, factor: 2}}]", f"run.dir={folder / name}", *overrides,
    ]))  # fmt: skip
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Each recipe that this card computes, against bf16."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if small or not have_transformer_engine() or capability < (8, 9):
        yield row("FP8", "not possible here: needs Transformer Engine and compute capability 8.9")
        return
    recipes = ["delayed", "tensorwise", *(["blockwise"] if capability >= (9, 0) else []),
               *(["mxfp8"] if capability >= (10, 0) else [])]  # fmt: skip
    with tempfile.TemporaryDirectory() as name, mock.patch("train.job._report"):
        folder = Path(name)
        prefix = corpus(folder)
        began = time.monotonic()
        plain = _run(folder, "bf16", prefix, [])
        longest = time.monotonic() - began
        for recipe in recipes:
            if seconds_left() < longest:
                yield no_time_for(f"FP8 {recipe}")
                continue
            try:
                found = _run(folder, recipe, prefix, ["model.fp8=hybrid", f"model.fp8_recipe={recipe}"])
            except Exception as e:  # the next recipe may work
                yield row(
                    f"FP8 {recipe}", f"failed: {type(e).__name__}: {str(e).splitlines()[0]}", met=False, check=True
                )
                continue
            apart = max(abs(a["lm_loss"] - b["lm_loss"]) for a, b in zip(plain, found, strict=True))
            seconds = [statistics.median(m["step_seconds"] for m in run[-5:]) for run in (found, plain)]
            # Tenths of a nat would be a bug, not rounding: 3 mantissa bits, averaged over thousands of tokens.
            yield row(f"FP8 {recipe} through an expansion, largest difference of loss to bf16", apart, "nats",
                      goal="at most 0.1", met=apart <= 0.1, check=True)  # fmt: skip
            yield row(f"FP8 {recipe}, step time over bf16", seconds[0] / seconds[1])
