"""What a device can do, how full it is, and which set of devices a job may start on."""

from collections.abc import Collection, Sequence
from pathlib import Path

import psutil
import torch

from parallel.errors import LaunchError

# Dense bf16 matrix products in TFLOP/s, without sparsity, from NVIDIA's data sheets; the first that occurs in the name of
# the device counts. docs/metrics.md lists them.
_PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("H800", 989.4),
    ("GH200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10", 125.0),
)


def peak_tflops(name: str) -> float | None:
    """Peak of dense bf16 products of a device by its name, in TFLOP/s; None if it is not known here."""
    return next((peak for mark, peak in _PEAK_TFLOPS if mark in name), None)


def device_peak(device: torch.device) -> float | None:
    """Peak of a device, in TFLOP/s; None on CPU and where it is not known."""
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory_peak(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU since the last call, or the memory that this process has now on CPU."""
    if device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(peak)


def held_bytes(device: torch.device) -> int:
    """Bytes that torch holds of a GPU once what it only keeps for later is given back; 0 on CPU."""
    if device.type != "cuda":
        return 0
    empty_cache(device)
    return int(torch.cuda.memory_reserved(device))


def empty_cache(device: torch.device) -> None:
    """Give back the blocks that torch keeps cached on a GPU: NCCL and kernels' libraries allocate past torch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def refuse_too_few(devices: int, local_rank: int, local_processes: int) -> None:
    """Refuse more processes on a machine than it has GPUs, before any of them is touched.

    Raises:
        LaunchError: naming both numbers.
    """
    if local_rank >= devices or local_processes > devices:
        raise LaunchError(
            f"{max(local_processes, local_rank + 1)} processes on this machine and {devices} visible GPUs: start one "
            f"process per GPU (--nproc-per-node {devices}), or show it more (CUDA_VISIBLE_DEVICES)"
        )


def refuse_mixed(kinds: Sequence[str]) -> None:
    """Refuse GPUs of different kinds in one job: all would wait for the slowest, and what fits on one may not on another.

    Args:
        kinds: name of each rank's device, in rank order.

    Raises:
        LaunchError: naming two ranks.
    """
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise LaunchError(
                f"rank 0 has a {kinds[0]} and rank {rank} a {kind}: use machines of one kind, or choose with "
                "CUDA_VISIBLE_DEVICES"
            )


def refuse_unlike(libraries: Sequence[Collection[str]]) -> None:
    """Refuse ranks with other libraries than rank 0: they would compute and send in other ways, and wait for ever.

    Args:
        libraries: what is installed where each rank runs, in rank order.

    Raises:
        LaunchError: naming a rank and a library.
    """
    for rank, found in enumerate(libraries):
        for library in sorted(set(found) ^ set(libraries[0])):
            with_it, without = (0, rank) if library in libraries[0] else (rank, 0)
            raise LaunchError(
                f"rank {with_it} has {library} and rank {without} has not: install the same on every machine "
                "(`python -m launch preflight` compares them)"
            )


def out_of_memory(error: BaseException, rank: int, place: str, folder: Path) -> LaunchError:
    """What to tell of a rank whose device is full; on a GPU its memory is written down first.

    Args:
        error: torch's.
        rank: whose.
        place: what it was doing.
        folder: for the snapshot.
    """
    snapshot = ""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        path = folder / f"out-of-memory-rank-{rank}.pickle"
        try:
            torch.cuda.memory._dump_snapshot(str(path))
            snapshot = f"; what lay in memory: {path} (pytorch.org/memory_viz)"
        except (OSError, RuntimeError) as e:
            snapshot = f"; no snapshot could be written ({e})"
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    found = LaunchError(
        f"rank {rank} ran out of memory in {place} ({said}): lower data.micro_batch_size or data.sequence_length, use "
        "model.recompute=full, or share out more (parallel.expert, parallel.tensor); `python -m launch plan` says what "
        f"takes how much{snapshot}"
    )
    # This rank knows, whatever the others make of its silence.
    found.speaks = True
    return found
