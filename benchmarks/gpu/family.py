"""What family routing costs per step over plain top-K: benchmarks/family_routing.py on this device."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.rows import row
from parallel.compat import forget_models, prepare_megatron

prepare_megatron()

from benchmarks.family_routing import SCALES, Scale, measure  # noqa: E402
from parallel.layout import join_job, leave_job  # noqa: E402

# Two layers: 2.4 and 0.8 billion parameters, which fit side by side into 80 GB with their optimizers.
_LARGE = (
    Scale("32 to 64 experts, twice each", 32, 64, 2, 2, 2048, 3072, 4096, 1, False),
    Scale("128 to 256 experts, greedy", 128, 256, 8, 2, 1024, 512, 4096, 2, True),
)


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Router times, and what is added to a step."""
    joined = join_job(600)
    for scale in SCALES[:1] if small else _LARGE:
        forget_models()
        try:
            found = measure(scale, 2 if small else 8)
        except torch.OutOfMemoryError as e:
            yield row(scale.name, f"out of memory: {str(e).splitlines()[0]}")
            continue
        yield row(f"{scale.name}: plain step", found["seconds"]["plain"]["step"] * 1e3, "ms")
        yield row(f"{scale.name}: plain router", found["seconds"]["plain"]["router"] * 1e3, "ms")
        for name in ("families", "half released"):
            # A router that is timed alone waits for the start of each of its kernels; in a step these wait behind others.
            share, ratio = found[name]["added_share_of_step"], found[name]["step_ratio"]
            yield row(f"{scale.name}: added by {name} to a router timed alone, over a step", share)
            yield row(f"{scale.name}: whole steps, {name} over plain", ratio, goal="at most 1.02", met=ratio <= 1.02)
    leave_job(joined)
