"""Starts whole runs on simulated GPUs and brings back what they tell."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.distributed import free_port
from tests.simulated_gpu import library

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RankOnGpu:
    """What one rank of a run told.

    Attributes:
        reason: why the run ended; an error by its type and words.
        waits: place -> how often the host waited for the device, over the whole run.
        waits_in_steps: the same, inside optimizer steps only.
        step_peaks: most bytes of the device in each optimizer step.
        held: bytes of the device after each optimizer step.
        switch_peaks: most bytes of the device in each live switch.
    """

    reason: str
    waits: dict[str, int]
    waits_in_steps: dict[str, int]
    step_peaks: list[int]
    held: list[int]
    switch_peaks: list[int]


def environment(gpus: int) -> dict[str, str]:
    """Variables with which any program, and what it starts, sees a machine with so many simulated GPUs."""
    paths = [str(Path(__file__).with_name("site")), str(_ROOT)]
    return {
        "SIMULATED_GPU": str(library.compiled()),
        "SIMULATED_GPUS": str(gpus),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def run_on_gpus(
    overrides: list[str], folder: Path, processes: int = 1, *, limit: int = 0, timeout: float = 300
) -> list[RankOnGpu]:
    """One whole run with one simulated GPU per process.

    Args:
        overrides: Hydra overrides.
        folder: for what the ranks tell.
        processes: of the run.
        limit: bytes of each device; 0 for no limit.
        timeout: seconds.

    Raises:
        RuntimeError: with the output of a rank that told nothing.
    """
    path, ranks = library.compiled(), []
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}  # fmt: skip
    for rank in range(processes):
        answer = folder / f"rank-{rank}.json"
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.simulated_gpu.program", str(path), str(answer), str(limit), *overrides],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=_ROOT,
                stdout=(folder / f"rank-{rank}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    try:
        for process in ranks:
            process.wait(timeout)
    finally:
        for process in ranks:
            process.kill()
    return [_told(folder, rank) for rank in range(processes)]


def _told(folder: Path, rank: int) -> RankOnGpu:
    answer = folder / f"rank-{rank}.json"
    if not answer.exists():
        raise RuntimeError(f"rank {rank} told nothing:\n{(folder / f'rank-{rank}.log').read_text()[-4000:]}")
    told = json.loads(answer.read_text())
    return RankOnGpu(
        reason=told["reason"],
        waits=told["waits"],
        waits_in_steps=told["waits_in_steps"],
        step_peaks=told["peaks"]["step"],
        held=told["held"],
        switch_peaks=told["peaks"]["switch"],
    )
