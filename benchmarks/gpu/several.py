"""What needs several GPUs, one process on each: 7B to 13B, growth of EP, dispatchers and overlap."""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import corpus, device, fitting, opened, row, synchronize
from parallel.compat import prepare_megatron

prepare_megatron()

from benchmarks.gpu.switch import BESIDE_DISK, both_paths, largest, switched  # noqa: E402
from parallel.config import ParallelConfig  # noqa: E402
from parallel.layout import Layout, join_job, leave_job  # noqa: E402
from parallel.machine import this_machine  # noqa: E402
from train.settings import load_settings  # noqa: E402

_TINY = ["model=tiny", "data.sequence_length=32"]


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Rows are the same on all ranks; the first prints them."""
    processes = int(os.environ["WORLD_SIZE"])
    joined = join_job(100)
    # All processes are on one machine: the first one's folder is theirs.
    box = Layout.create(ParallelConfig(expert=processes), 1)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(box.from_rank_zero(own))
        if box.rank == 0:
            corpus(folder)
        box.barrier()
        prefix = folder / "corpus"
        few = _TINY if small else BESIDE_DISK
        # Groups of NCCL are made anew at a switch that changes EP.
        yield from both_paths(few, prefix, folder, processes, first=max(1, processes // 2))
        sizes = [_TINY] if small else [
            ["model=paper_7b", f"model.layers={n}", "data.sequence_length=1024"] for n in (20, 16, 12, 8, 4, 2)
        ]  # fmt: skip
        chosen = sizes[0]
        if torch.cuda.is_available():
            grow = "upcycle.stages=[{at_step: 2, factor: 2}]"
            common = [f"parallel.expert={processes}", "data.micro_batch_size=1", f"data.global_batch_size={processes}"]
            planned = [[*x, *common, grow, "run.steps=6", "schedule.decay_steps=2"] for x in sizes]
            chosen = sizes[planned.index(fitting(planned, processes, flash=False))]
            # Free memory differs by what each card runs: all take the first one's choice.
            chosen = box.from_rank_zero(chosen)
        found = switched("live", chosen, prefix, folder / "largest", processes)
        yield from largest(found, f"the largest up to 7B to 13B, EP {processes}")
        yield from _choices(small, processes, prefix, folder)
        box.barrier()
    leave_job(joined)


def _choices(small: bool, processes: int, prefix: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Step time of four micro-batches with each dispatcher, and with overlap on and off."""
    network = _TINY if small else ["model=paper_7b", "model.layers=8", "data.sequence_length=4096"]
    machine = this_machine(device(), processes)
    flex = machine.has("deepep") or machine.has("hybridep")
    kinds = {
        "alltoall": ["model.dispatcher=alltoall", "optimizer.overlap_grad_reduce=false",
                     "optimizer.overlap_param_gather=false"],
        "alltoall, overlap": ["model.dispatcher=alltoall", "optimizer.overlap_grad_reduce=true",
                              "optimizer.overlap_param_gather=true"],
        **({"flex": ["model.dispatcher=flex", "optimizer.overlap_grad_reduce=false",
                    "optimizer.overlap_param_gather=false"]} if flex else {}),
        # On CPU there are no streams to put it on.
        **({"alltoall, overlap also of experts": ["model.dispatcher=alltoall", "optimizer.overlap_grad_reduce=true",
                                                  "optimizer.overlap_param_gather=true",
                                                  "performance.expert_parallel_overlap=true"]}
           if torch.cuda.is_available() else {}),
    }  # fmt: skip
    seconds: dict[str, float] = {}
    for number, (name, options) in enumerate(kinds.items()):
        seconds[name] = _step_seconds([*network, *options], processes, prefix, folder / f"choice-{number}", small)
        yield row(f"EP {processes}, {name}: step", seconds[name] * 1e3, "ms")
        if number:
            yield row(f"EP {processes}, {name} over alltoall, step time", seconds[name] / seconds["alltoall"])
    if not flex:
        yield row("flex dispatcher", "not measured: neither DeepEP nor HybridEP is installed")


def _step_seconds(overrides: list[str], processes: int, prefix: Path, run_dir: Path, small: bool) -> float:
    """Median of the slowest rank's steps, after two to warm up."""
    settings = load_settings([
        *overrides, f"data.corpus={prefix}", f"run.dir={run_dir}", f"parallel.expert={processes}", "run.steps=100000",
        "data.micro_batch_size=1", f"data.global_batch_size={4 * processes}", "schedule.decay_steps=1",
        "upcycle.stages=[]", "tracking=none", "evaluation.batches=1", "checkpoint=ends", "run.log_interval_steps=1000",
    ], processes)  # fmt: skip
    times = []
    with opened(settings) as run:
        for _ in range(4 if small else 10):
            run.layout.barrier()
            synchronize()
            began = time.perf_counter()
            run._one_step()
            synchronize()
            times.append(max(run.layout.gather_objects(time.perf_counter() - began)))
    return statistics.median(times[2:])
