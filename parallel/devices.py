"""What a device can do and how full it is."""

import psutil
import torch

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
