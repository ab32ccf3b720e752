"""Whole models: step time, MFU, ours over a bare mcore loop, one expert module over another."""

import collections
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.rows import corpus, device, fitting, no_time_for, opened, row, seconds_left, synchronize
from parallel.compat import prepare_megatron
from parallel.transformer_engine import have_transformer_engine

prepare_megatron()

from benchmarks.step_overhead import paired_seconds  # noqa: E402
from parallel.devices import device_peak, empty_cache  # noqa: E402
from parallel.layout import join_job, leave_job  # noqa: E402
from train.checkpoint.persistence import Persistence  # noqa: E402
from train.settings import load_settings  # noqa: E402

# Seconds that the timed steps of one module may take, and that one needs to be begun at all.
_STEP_SECONDS, _LEAST_SECONDS = 12.0, 8.0
# Of the longest in a step that are named.
_KERNELS = 16
_COMMON = ["data.sequence_length=4096", "upcycle.stages=[]"]
# Name -> overrides, the most wanted first: an interleaved network of the class of 1 B active and 7 B in all (20 layers), and
# a fine-grained one of many narrow experts. The first that fits the card is measured. Eight micro-batches to a step: a
# single card steps all of the optimizer, which a job divides over its ranks.
_LARGE = {
    "interleaved, 32 experts top-2": [
        ["model=paper_7b", f"model.layers={layers}", f"data.micro_batch_size={batch}",
         f"data.global_batch_size={8 * batch}", *_COMMON]
        for batch, least in ((4, 8), (2, 4), (1, 2)) for layers in (20, 18, 16, 14, 12, 10, 8, 6, 4, 2) if layers >= least
    ],
    "fine-grained, 256 experts top-8": [
        ["model=paper_1b", f"model.layers={layers}", "model.hidden_size=1024", "model.attention_heads=8",
         "model.kv_heads=8", "model.ffn_hidden_size=4096", "model.expert_ffn_hidden_size=512",
         f"data.micro_batch_size={batch}", f"data.global_batch_size={8 * batch}", *_COMMON]
        for layers in (8, 6, 4, 3) for batch in (4, 2, 1)
    ],
}  # fmt: skip
_SMALL = {
    "tiny": [["model=tiny", "data.sequence_length=32", "data.micro_batch_size=2", "data.global_batch_size=4",
              "upcycle.stages=[]"]],
}  # fmt: skip


def _settings(overrides: list[str], kind: str, prefix: Path, folder: Path) -> Any:
    return load_settings([
        *overrides, f"model.experts={kind}", f"data.corpus={prefix}", f"run.dir={folder}", "run.steps=100000",
        "schedule.decay_steps=1", "tracking=none", "evaluation.batches=1", "checkpoint=ends",
        "run.log_interval_steps=1000",
    ])  # fmt: skip


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Per network and expert module the step time, TFLOP/s per card, MFU and peak memory.

    Layers and attention are Transformer Engine's with every module where that is installed, else torch's.
    """
    engine = have_transformer_engine() and torch.cuda.is_available()
    fast = ["grouped", *(["te"] if engine else [])]
    joined = join_job(600)
    networks = _SMALL if small else _LARGE
    rate: dict[tuple[str, str], float] = {}
    longest = _LEAST_SECONDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = corpus(folder)
        # Chosen once: all modules train the same network. Torch's attention keeps its scores, for one layer at a time under
        # recomputation.
        again = [] if engine else ["model.recompute=selective"]
        sizes = {n: fitting([[*x, *again] for x in networks[n]], flash=engine) for n in networks}
        # Experts one by one are slow and known to be: they come last, should time run out.
        for network, kind in [(n, k) for n in networks for k in fast] + [(n, "sequential") for n in networks]:
            if seconds_left() < longest:
                yield no_time_for(f"{network}, {kind}")
                continue
            began = time.monotonic()
            try:
                yield from _measured(
                    network, sizes[network], kind, prefix, folder / f"{network[:4]}-{kind}", small, rate
                )
            except torch.OutOfMemoryError as e:
                rate[network, kind] = 0.0
                yield row(f"{network}, {kind}", f"out of memory: {str(e).splitlines()[0]}")
            gc.collect()
            empty_cache(device())
            longest = max(longest, time.monotonic() - began)
            if kind == "te" and rate[network, kind] and rate.get((network, "grouped")):
                ratio = rate[network, "grouped"] / rate[network, kind]
                yield row(f"{network}: our experts over Transformer Engine's, throughput of the whole model", ratio,
                          goal="at least 0.95", met=ratio >= 0.95)  # fmt: skip
    leave_job(joined)


def _measured(
    network: str, overrides: list[str], kind: str, prefix: Path, run_dir: Path, small: bool,
    rates: dict[tuple[str, str], float],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of one network with one expert module; its tokens per second go to `rates`."""
    settings, name = _settings(overrides, kind, prefix, run_dir), f"{network}, {kind}"
    # Nothing is saved here, and a lent machine's disk may be smaller than a checkpoint.
    with mock.patch.object(Persistence, "check_space"), opened(settings) as run:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        # What is compiled or loaded at its first use comes first; then as many steps as there is time for.
        (first,) = paired_seconds(run, 1, 1, synchronize)
        pairs, block = (1, 1) if small else next(
            (p, b) for p, b in ((3, 3), (3, 1), (2, 1), (1, 1)) if 2 * (p + 1) * b * first["ours"] < _STEP_SECONDS or p == 1
        )  # fmt: skip
        found = paired_seconds(run, pairs, block, synchronize)
        ours = statistics.median(times["ours"] for times in found)
        ratio = statistics.median(times["ours"] / times["bare"] for times in found)
        rate = run._observe().step_flops / ours / 1e12
        rates[network, kind] = settings.tokens_per_step() / ours
        parameters = sum(p.numel() for chunk in run.stage.chunks for p in chunk.parameters())
        model, data = settings.model, settings.data
        yield row(
            f"{name}: size",
            f"{parameters / 1e9:.2f} B parameters, {model.layers} layers, hidden {model.hidden_size}, vocabulary of "
            f"{run.vocab_size}, {data.micro_batch_size} x {data.sequence_length} tokens, recomputation {model.recompute}",
        )
        yield row(f"{name}: step", ours * 1e3, "ms")
        yield row(f"{name}: throughput", settings.tokens_per_step() / ours, "tokens/s")
        yield row(f"{name}: model FLOPs", rate, "TFLOP/s")
        peak = device_peak(run.layout.device)
        if peak:
            wanted = network.startswith("interleaved") and kind != "sequential"
            yield row(f"{name}: MFU", rate / peak, goal="at least 0.45" if wanted else "",
                      met=rate / peak >= 0.45 if wanted else None)  # fmt: skip
            yield row(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        yield row(f"{name}: ours over a bare mcore loop, {pairs} pairs of {block} steps", ratio, goal="at most 1.02",
                  met=ratio <= 1.02)  # fmt: skip
        if kind == "grouped" and torch.cuda.is_available():
            yield from _kernels(name, run)


def _kernels(name: str, run: Any) -> Iterator[dict[str, Any]]:
    """Where a step's time on the card goes: how long a kernel was at work, how many there were, the longest by name."""
    seen = torch.profiler.supported_activities()
    # Where there is no such activity there are no kernels: a simulated GPU.
    with torch.profiler.profile(activities=seen & {torch.profiler.ProfilerActivity.CUDA} or seen) as profile:
        run._one_step()
        synchronize()
    kernels = [event for event in profile.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    if not spans:
        yield row(f"{name}: kernels of a step", "not seen by torch's profiler here")
        return
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy, end = busy + max(0.0, last - max(first, end)), max(end, last)
    yield row(f"{name}: share of a step in which a kernel is at work, under the profiler", busy / (end - spans[0][0]))
    yield row(f"{name}: kernels in a step", len(kernels))
    spent: collections.Counter[str] = collections.Counter()
    for event in kernels:
        spent[event.name] += event.time_range.elapsed_us()
    for kernel, microseconds in spent.most_common(_KERNELS):
        yield row(f"{name}: {kernel[:90]}", microseconds / 1e3, "ms of a step")
