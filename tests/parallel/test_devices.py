"""Which devices a job may start on, and what is told of a full one."""

from pathlib import Path

import psutil
import pytest
import torch

from parallel.devices import memory_peak, out_of_memory, refuse_mixed, refuse_too_few, refuse_unlike
from parallel.errors import LaunchError


def test_more_processes_than_gpus_are_refused() -> None:
    refuse_too_few(devices=8, local_rank=7, local_processes=8)
    with pytest.raises(LaunchError, match=r"4 processes on this machine and 2 visible GPUs.*--nproc-per-node 2"):
        refuse_too_few(devices=2, local_rank=0, local_processes=4)
    # A launcher that does not say how many there are.
    with pytest.raises(LaunchError, match="3 processes on this machine and 2"):
        refuse_too_few(devices=2, local_rank=2, local_processes=1)


def test_mixed_gpus_are_refused_and_named() -> None:
    refuse_mixed(["NVIDIA H200"] * 4)
    with pytest.raises(LaunchError, match="rank 0 has a NVIDIA H200 and rank 2 a NVIDIA A100"):
        refuse_mixed(["NVIDIA H200", "NVIDIA H200", "NVIDIA A100"])


def test_a_full_device_is_told_with_place_and_remedy(tmp_path: Path) -> None:
    told = str(out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 3, "step 7", tmp_path))
    assert "rank 3 ran out of memory in step 7 (CUDA out of memory. Tried)" in told and "\n" not in told
    assert "data.micro_batch_size" in told and "model.recompute=full" in told


def test_memory_of_this_process() -> None:
    before, more = memory_peak(torch.device("cpu")), 64 << 20
    # Other tests of this process may have held more than it holds now.
    held = torch.ones(before - psutil.Process().memory_info().rss + more, dtype=torch.uint8)
    assert memory_peak(torch.device("cpu")) - before > 0.9 * more and held[-1] == 1


def test_a_library_that_one_rank_lacks_is_named() -> None:
    refuse_unlike([{"deepep"}, {"deepep"}])
    with pytest.raises(LaunchError, match="rank 0 has deepep and rank 2 has not: install the same"):
        refuse_unlike([{"deepep"}, {"deepep"}, set()])
    with pytest.raises(LaunchError, match="rank 1 has apex and rank 0 has not"):
        refuse_unlike([set(), {"apex"}])
