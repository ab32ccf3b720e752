"""Speed of fingerprints (`model/fingerprint.py`) beside the formula they had before, on state of real sizes.

    python benchmarks/fingerprints.py [--threads 1 2] [--repeats 5] [--device cpu|cuda]

Old and new read the same tensors in turn; with two threads, torch shares out every operation of the old formula and
Coppice the tensors. Told are gigabytes of state per second of wall time (the best of the repeats:
anything else that runs can only slow a pass down), and on CPU per second of processor time, which holds on a busy machine
too: the ratio is of those. Beside them the speed of a plain sum of 64-bit words, which is what memory and caches give.
Writes benchmarks/results/fingerprints.json (one file; a run on CUDA writes fingerprints_cuda.json).
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.compat import prepare_megatron, versions

_RESULTS = Path(__file__).parent / "results"
_MIB = 1 << 20

# name -> elements of a tensor, elements per row, tensors, first element
_SHAPES = {
    "1 tensor of 64 Mi": (64 * _MIB, 64 * _MIB, 1, 0),
    "8 stacks of 8 experts of 1 Mi": (8 * _MIB, _MIB, 8, 0),
    "8 ZeRO-1 ranges of such, odd start": (8 * _MIB - 1001, _MIB, 8, 1001),
    "8 tensors of 8 Ki rows of 1 Ki": (8 * _MIB, 1024, 8, 0),
    "4096 tensors of 1 Ki": (1024, 1024, 4096, 0),
}
# (tensor, first element, elements per row, rows) of each tensor -> anything
Read = Callable[[Sequence[Any]], Any]


def old_sums(tensor: torch.Tensor, start: int, row_numel: int, rows: int) -> torch.Tensor:
    """The fingerprints of manifest format 1: every element through the splitmix64 finaliser in 64 bits."""
    flat = tensor.detach().reshape(-1)
    sums = torch.zeros(rows, dtype=torch.int64, device=flat.device)
    for offset in range(0, flat.numel(), 1 << 24):
        part = flat[offset : offset + (1 << 24)]
        x = part.view({2: torch.int16, 4: torch.int32}[part.element_size()]).to(torch.int64) - 0x61C8864680B583EB
        x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
        x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
        x = x ^ (x >> 31)
        if rows == 1:
            sums[0] += x.sum()
        else:
            first = start + offset
            sums.index_add_(0, torch.arange(first, first + x.numel(), device=x.device) // row_numel, x)
    return sums


def plain_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Reads everything once; no fingerprint."""
    return tensor[: tensor.numel() // 8 * 8].view(torch.int64).sum()


def seconds(read: Read, parts: Sequence[Any]) -> tuple[float, float]:
    """Wall and processor seconds of one pass over the tensors."""
    wall, cpu = time.perf_counter(), time.process_time()
    read(parts)
    if parts[0][0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, dtype: torch.dtype, device: str, repeats: int, functions: dict[str, Read]) -> dict[str, Any]:
    """Old, new and the plain sum in turn on one shape; gigabytes per second."""
    from model.fingerprint import Part

    numel, row_numel, count, start = _SHAPES[name]
    rows = -(-(start + numel) // row_numel)
    noise = torch.randn(count * numel, device=device).to(dtype)
    # Tensors of their own: DDP's and the optimizer's buffers are aligned, ranges inside them need not be.
    parts = [Part(tensor.clone(), start, row_numel, rows) for tensor in noise.split(numel)]
    del noise
    gigabytes = count * numel * dtype.itemsize / 1e9
    best = {which: (float("inf"), float("inf")) for which in functions}
    for repeat in range(repeats + 1):
        for which, read in functions.items():
            taken = seconds(read, parts)
            if repeat:  # the first pass warms up
                best[which] = min(best[which][0], taken[0]), min(best[which][1], taken[1])
    row: dict[str, Any] = {"shape": name, "dtype": str(dtype).removeprefix("torch.")}
    for which, (wall, cpu) in best.items():
        row[f"{which}_gb_per_second"] = gigabytes / wall
        if device == "cpu":
            row[f"{which}_gb_per_processor_second"] = gigabytes / cpu
    clock = "processor_second" if device == "cpu" else "second"
    row["ratio"] = row[f"new_gb_per_{clock}"] / row[f"old_gb_per_{clock}"]
    return row


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of torch (default 1 and 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes, the best counts (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    prepare_megatron()
    from model.fingerprint import sums_of

    functions: dict[str, Read] = {
        "old": lambda parts: [old_sums(*part) for part in parts],
        "new": sums_of,
        "plain": lambda parts: [plain_sum(part[0]) for part in parts],
    }
    rows = []
    for threads in options.threads if options.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        for name in _SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                row = {"threads": threads} | measure(name, dtype, options.device, options.repeats, functions)
                rows.append(row)
                text = ", ".join(f"{x} {row[f'{x}_gb_per_second']:.2f}" for x in functions)
                if options.device == "cpu":
                    text += "; per processor second " + ", ".join(
                        f"{x} {row[f'{x}_gb_per_processor_second']:.2f}" for x in functions
                    )
                print(f"{threads} threads, {name}, {row['dtype']}: GB/s {text}; ratio {row['ratio']:.1f}", flush=True)
    result = {"machine": _machine(options.device), "versions": versions(), "date": time.strftime("%Y-%m-%d"),
              "command": "python " + " ".join(sys.argv),
              "load_average": os.getloadavg()[0], "repeats": options.repeats, "rows": rows}  # fmt: skip
    _RESULTS.mkdir(exist_ok=True)
    target = _RESULTS / ("fingerprints.json" if options.device == "cpu" else "fingerprints_cuda.json")
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
