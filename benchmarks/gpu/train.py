"""Whole models: step time, MFU, ours over a bare mcore loop, one expert module over another."""

import gc
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import corpus, row, synchronize
from parallel.compat import prepare_megatron
from parallel.transformer_engine import have_transformer_engine

prepare_megatron()

from benchmarks.step_overhead import paired_seconds  # noqa: E402
from parallel.devices import device_peak  # noqa: E402
from parallel.layout import Layout, join_job, leave_job  # noqa: E402
from train.data.stream import open_corpora  # noqa: E402
from train.run import Run  # noqa: E402
from train.settings import load_settings  # noqa: E402

# Name -> overrides: an interleaved network of the class of 1 B active, and a fine-grained one of many narrow experts.
_LARGE = {
    "interleaved, 32 experts top-2": [
        "model=paper_7b", "model.layers=8", "data.sequence_length=4096", "data.micro_batch_size=2",
        "data.global_batch_size=4",
    ],
    "fine-grained, 256 experts top-8": [
        "model=paper_1b", "model.hidden_size=1024", "model.attention_heads=8", "model.kv_heads=8",
        "model.expert_ffn_hidden_size=512", "data.sequence_length=4096", "data.micro_batch_size=2",
        "data.global_batch_size=4",
    ],
}  # fmt: skip
_SMALL = {
    "tiny": ["model=tiny", "data.sequence_length=32", "data.micro_batch_size=2", "data.global_batch_size=4"],
}  # fmt: skip


def _settings(overrides: list[str], kind: str, prefix: Path, folder: Path) -> Any:
    return load_settings([
        *overrides, f"model.experts={kind}", f"data.corpus={prefix}", f"run.dir={folder}", "run.steps=100000",
        "schedule.decay_steps=1", "upcycle.stages=[]", "tracking=none", "evaluation.batches=1", "checkpoint=ends",
        "run.log_interval_steps=1000",
    ])  # fmt: skip


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Per network and expert module the step time, TFLOP/s per card, MFU and peak memory."""
    kinds = (["te"] if have_transformer_engine() and torch.cuda.is_available() else []) + ["grouped", "sequential"]
    joined = join_job(600)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = corpus(folder)
        for network, overrides in (_SMALL if small else _LARGE).items():
            tokens_per_second: dict[str, float] = {}
            for kind in kinds:
                run_dir = folder / f"{network.split(',')[0]}-{kind}"
                try:
                    for found in _measured(f"{network}, {kind}", overrides, kind, prefix, run_dir, small):
                        if found["unit"] == "tokens/s":
                            tokens_per_second[kind] = found["value"]
                        yield found
                except torch.OutOfMemoryError as e:
                    yield row(f"{network}, {kind}", f"out of memory: {str(e).splitlines()[0]}")
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if tokens_per_second.get("te") and tokens_per_second.get("grouped"):
                ratio = tokens_per_second["grouped"] / tokens_per_second["te"]
                yield row(
                    f"{network}: ours over Transformer Engine, throughput",
                    ratio,
                    goal="at least 0.95",
                    met=ratio >= 0.95,
                )
    leave_job(joined)


def _measured(
    name: str, overrides: list[str], kind: str, prefix: Path, run_dir: Path, small: bool
) -> Iterator[dict[str, Any]]:
    settings = _settings(overrides, kind, prefix, run_dir)
    run = Run.open(settings, Layout.create(settings.parallel, 1), open_corpora(settings.data))
    block, pairs = (1, 1) if small else (4, 4)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = paired_seconds(run, pairs, block, synchronize)
    ours, bare = (statistics.median(times[side] for times in found) for side in ("ours", "bare"))
    observer = run._observe()
    rate = observer.step_flops / ours / 1e12
    parameters = sum(p.numel() for chunk in run.stage.chunks for p in chunk.parameters())
    yield row(f"{name}: parameters", parameters / 1e9, "B")
    yield row(f"{name}: step", ours * 1e3, "ms")
    yield row(f"{name}: throughput", settings.tokens_per_step() / ours, "tokens/s")
    yield row(f"{name}: model FLOPs", rate, "TFLOP/s")
    peak = device_peak(run.layout.device)
    if peak:
        yield row(f"{name}: MFU", rate / peak, goal="at least 0.45 (interleaved)", met=rate / peak >= 0.45)
        yield row(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    yield row(f"{name}: ours over a bare mcore loop", ours / bare, goal="at most 1.02", met=ours / bare <= 1.02)
    run.close()
    run.stage.release()
