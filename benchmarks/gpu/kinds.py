"""A checkpoint written with one expert module, read with every other: the next losses agree."""

import json
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

# bf16 weights and activations, sums in another order: a few units in the last place of a loss of about 5, over 3 steps.
_TOLERANCE = 0.03


def _losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Train 6 steps with each module, the last 3 anew from its checkpoint: each by itself, and to and from the first."""
    kinds = {kind: [f"model.experts={kind}"] for kind in ("grouped", "sequential")}
    if have_transformer_engine() and torch.cuda.is_available():
        # Its layers are around all of these; torch's around the last.
        kinds = {"te": ["model.experts=te"], **kinds, "grouped in torch's layers": ["model.transformer_impl=local"]}
    # A resumed run is held against one that was not interrupted, to the last bit: kernels that add up in an order of the
    # moment are left out, here and by variables (`benchmarks/gpu/__init__.py`).
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as name, mock.patch("train.job._report"):
        folder = Path(name)
        prefix = corpus(folder)
        common = [
            "model=tiny", f"data.corpus={prefix}", "data.sequence_length=64", "data.global_batch_size=8", "run.steps=6",
            "schedule.decay_steps=1", "schedule.warmup_steps=0", "tracking=none", "checkpoint=ends", "upcycle.stages=[]",
            "evaluation.batches=1", "checkpoint.asynchronous=false",
        ]  # fmt: skip
        last, whole, halves = 0.0, {}, {}
        for kind, overrides in kinds.items():
            began, run_dir = time.monotonic(), folder / kind.replace("'", "").replace(" ", "-")
            saves = ["checkpoint.interval_steps=3", "checkpoint.keep_last=2"]
            run_settings(load_settings([*common, *saves, *overrides, f"run.dir={run_dir}"]))
            whole[kind] = _losses(run_dir)
            halves[kind] = next(path for path in (run_dir / "checkpoints").iterdir() if path.name.endswith("00003"))
            # What the first run compiles and loads the others find.
            last = time.monotonic() - began
        first, *others = kinds
        crossed = [pair for other in others for pair in ((first, other), (other, first))]
        for number, (kind, other) in enumerate([*((kind, kind) for kind in kinds), *crossed]):
            name = f"losses after a checkpoint of {kind} is read by {other}, largest difference"
            if seconds_left() < last:
                yield no_time_for(name)
                continue
            run_dir = folder / str(number)
            run_settings(load_settings(
                [*common, *kinds[other], f"run.dir={run_dir}", f"run.resume={halves[kind]}"]
            ))  # fmt: skip
            apart = max(abs(a - b) for a, b in zip(_losses(run_dir), whole[kind][3:], strict=True))
            limit = 0.0 if kind == other else _TOLERANCE
            yield row(name, apart, "nats", goal=f"at most {limit:g}", met=apart <= limit, check=True)
