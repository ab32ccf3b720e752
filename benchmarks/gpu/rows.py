"""Rows of the result, and what the sections share."""

import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import DEADLINE

if TYPE_CHECKING:
    from train.run import Run


def row(
    name: str, value: Any, unit: str = "", *, goal: str = "", met: bool | None = None, check: bool = False
) -> dict[str, Any]:
    """A figure.

    Args:
        name: what was measured, shape included.
        value: number or text.
        unit: of the number.
        goal: in words; none for a plain figure.
        met: whether the goal is met.
        check: whether missing the goal is an error and not a wish.
    """
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": met, "check": check}


# Transformer Engine's grouped product for Hopper as one kernel of CUTLASS, which it takes only when it is told; it looks at
# every product.
CUTLASS = {"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"}


def print_row(found: dict[str, Any]) -> None:
    """Hand a row to the process that collects them."""
    print("ROW " + json.dumps(found), flush=True)


def seconds_left() -> float:
    """Until this section is stopped; without an end outside of `benchmarks/gpu_check.py`."""
    return float(os.environ.get(DEADLINE, "inf")) - time.monotonic()


def no_time_for(what: str) -> dict[str, Any]:
    """A row for what is left out, because the section would be stopped in the middle of it."""
    return row(
        what, f"not measured: {max(0.0, seconds_left()):.0f} s were left; --sections of one name has all of the time"
    )


@contextlib.contextmanager
def opened(settings: Any) -> Iterator["Run"]:
    """A run that is open inside; its memory is free afterwards, however that ended."""
    from parallel.devices import empty_cache
    from parallel.layout import Layout
    from train.data.stream import open_corpora
    from train.run import Run

    run = Run.open(settings, Layout.create(settings.parallel, 1), open_corpora(settings.data))
    try:
        yield run
    finally:
        run.close()
        # A switch that failed may have let go of half of it.
        with contextlib.suppress(AttributeError):
            run.stage.release()
        gc.collect()
        empty_cache(run.layout.device)


def device() -> torch.device:
    """Where to measure."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], repeats: int, warm_up: int = 2) -> float:
    """Median seconds of a call, the device waited for each time."""
    times = []
    for i in range(warm_up + repeats):
        synchronize()
        began = time.perf_counter()
        function()
        synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_ceiling(size: int) -> float:
    """TFLOP/s of a square bf16 product on random data: what a matrix product can reach here."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 10) / 1e12


def corpus(folder: Path) -> Path:
    """A small corpus of this repository's own sources, byte tokens."""
    from train.corpus.build import CorpusRequest, build_corpus

    root = Path(__file__).resolve().parents[2]
    inputs = tuple(str(root / name) for name in ("train", "model", "docs"))
    request = CorpusRequest(inputs=inputs, output=str(folder / "corpus"), validation_fraction=0.2)
    build_corpus(request, say=lambda line: None)
    return folder / "corpus"


def fitting(candidates: list[list[str]], processes: int = 1, flash: bool = True) -> list[str]:
    """The first of several runs that fits this device by the arithmetic of `python -m launch plan`.

    Args:
        candidates: overrides of each, the most wanted first; the last is taken if none fits.
        processes: that share it.
        flash: attention keeps no scores.
    """
    from launch.plan_hints import needed_bytes
    from launch.plan_inputs import settings_without_corpus

    if not torch.cuda.is_available():
        return candidates[0]
    free, _ = torch.cuda.mem_get_info()
    # Buffers of kernels, of a switch's messages and of the allocator are not in the arithmetic.
    room = free * 0.9 - 4 * 2**30
    for overrides in candidates:
        if needed_bytes(settings_without_corpus(overrides, processes), processes, 320, flash, 2**30) <= room:
            return overrides
    return candidates[-1]
