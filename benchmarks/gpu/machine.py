"""What is here."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.rows import matmul_ceiling, row
from parallel.compat import versions
from parallel.devices import peak_tflops


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """The card, the libraries, and the ceiling."""
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
