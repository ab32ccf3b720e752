"""A checkpoint written with one expert module, read with every other: the next losses agree."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.rows import corpus, row
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
    """Train 3 steps with each module, and 3 more with each other one from its checkpoint."""
    kinds = (["te"] if have_transformer_engine() and torch.cuda.is_available() else []) + ["grouped", "sequential"]
    with tempfile.TemporaryDirectory() as name, mock.patch("train.job._report"):
        folder = Path(name)
        prefix = corpus(folder)
        common = [
            "model=tiny", f"data.corpus={prefix}", "data.sequence_length=64", "data.global_batch_size=8", "run.steps=6",
            "schedule.decay_steps=1", "schedule.warmup_steps=0", "tracking=none", "checkpoint=ends", "upcycle.stages=[]",
            "evaluation.batches=1",
        ]  # fmt: skip
        whole: dict[str, list[float]] = {}
        for kind in kinds:
            run_settings(load_settings([*common, f"model.experts={kind}", f"run.dir={folder}/{kind}"]))
            whole[kind] = _losses(folder / kind)
            first = [*common, f"model.experts={kind}", f"run.dir={folder}/{kind}-half", "run.stop_at_step=3"]
            run_settings(load_settings(first))
        for kind in kinds:
            source = next((folder / f"{kind}-half" / "checkpoints").glob("step-*"))
            for other in kinds:
                run_dir = folder / f"{kind}-{other}"
                run_settings(load_settings(
                    [*common, f"model.experts={other}", f"run.dir={run_dir}", f"run.resume={source}"]
                ))  # fmt: skip
                apart = max(abs(a - b) for a, b in zip(_losses(run_dir), whole[kind][3:], strict=True))
                limit = 0.0 if kind == other else _TOLERANCE
                yield row(
                    f"losses after a checkpoint of {kind} is read by {other}, largest difference", apart, "nats",
                    goal=f"at most {limit:g}", met=apart <= limit, check=True,
                )  # fmt: skip
