"""What is here."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.gpu.rows import device, matmul_ceiling, row, seconds_of, synchronize
from parallel.compat import prepare_megatron, versions
from parallel.compiler import compile_obstacle
from parallel.devices import peak_tflops


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """The card, the libraries, what has to be compiled on it, and the ceilings."""
    for name, version in versions().items():
        yield row(f"version of {name}", version)
    cuda = torch.cuda.is_available()
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        yield row("card", properties.name)
        yield row("cards", torch.cuda.device_count())
        yield row("memory", properties.total_memory / 2**30, "GiB")
        yield row("compute capability", f"{properties.major}.{properties.minor}")
        yield row("CUDA of torch", str(torch.version.cuda))
        if torch.distributed.is_nccl_available():
            yield row("NCCL of torch", ".".join(map(str, torch.cuda.nccl.version())))
    yield row("processor cores", os.cpu_count())
    yield row("memory of the host", psutil.virtual_memory().total / 2**30, "GiB")
    yield row("room for temporary files", shutil.disk_usage(tempfile.gettempdir()).free / 2**30, "GiB")
    try:
        import transformer_engine.pytorch as te

        linear = te.Linear(64, 64, params_dtype=torch.bfloat16)
        linear(torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
        yield row("Transformer Engine", "loads and runs")
    except Exception as e:  # whatever it is, it is the figure
        yield row("Transformer Engine", f"not usable: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    ceiling = matmul_ceiling(256 if small else 8192)
    yield row("ceiling of a bf16 product", ceiling, "TFLOP/s")
    peak = peak_tflops(torch.cuda.get_device_name()) if cuda else None
    if peak:
        yield row("ceiling over the data sheet's peak", ceiling / peak)
    yield row("a copy on the device, read and written", _copied(1 << (20 if small else 30)), "GB/s")
    # Last: should it fail, the rest is known. What it has compiled the other sections find on the disk.
    yield from _compiled()


def _copied(size: int) -> float:
    source, target = (torch.empty(size, dtype=torch.uint8, device=device()) for _ in range(2))
    return 2 * size / seconds_of(lambda: target.copy_(source), 10) / 1e9


def _compiled() -> Iterator[dict[str, Any]]:
    """The first call of a function that mcore has compiled, and one more, which finds it."""
    prepare_megatron()
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    if torch.cuda.is_available() and compile_obstacle():
        yield row("mcore's compiled functions", f"run uncompiled: {compile_obstacle()}")
        return
    for what in ("mcore's compiled functions: first call", "mcore's compiled functions: second call"):
        gate_up = torch.randn(256, 128, device=device(), dtype=torch.bfloat16, requires_grad=True)
        probs = torch.rand(256, 1, device=device(), requires_grad=True)
        began = time.perf_counter()
        weighted_bias_swiglu_impl(gate_up, None, probs).sum().backward()
        synchronize()
        yield row(what, time.perf_counter() - began, "s")
