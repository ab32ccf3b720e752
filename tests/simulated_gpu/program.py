"""One rank of a run on simulated GPUs: `python -m tests.simulated_gpu.program LIBRARY ANSWER LIMIT OVERRIDE...`.

Writes to ANSWER, as JSON, how the run ended and what it did with the device.
"""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

from tests.simulated_gpu import library


def main() -> None:
    """Run, and tell."""
    path, answer, limit, *overrides = sys.argv[1:]
    warnings.filterwarnings("ignore")
    waits = library.start(Path(path))
    # Only then.
    from unittest import mock

    import torch

    from parallel import cpu_runtime
    from parallel.compat import prepare_megatron
    from tests.simulated_gpu.torch_cuda import limit_bytes
    from tests.train.trainer import train_here

    prepare_megatron()
    from megatron.core.tensor_parallel import mappings

    # gloo lacks it on any device.
    mappings._gather_along_first_dim = cpu_runtime._uneven_gather(mappings._gather_along_first_dim)
    from train import expansion, run

    in_steps: Counter[str] = Counter()
    peaks: dict[str, list[int]] = {"step": [], "switch": []}
    held: list[int] = []

    def measured(name: str, original: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            torch.cuda.reset_peak_memory_stats()
            with waits.counted(in_steps if name == "step" else Counter()):
                result = original(*arguments, **options)  # type: ignore[operator]
            peaks[name].append(torch.cuda.max_memory_allocated())
            if name == "step":
                held.append(torch.cuda.memory_allocated())
            return result

        return call

    limit_bytes(int(limit))
    with (
        mock.patch.object(run, "optimizer_step", measured("step", run.optimizer_step)),
        mock.patch.object(expansion, "through_memory", measured("switch", expansion.through_memory)),
    ):
        try:
            reason = train_here(overrides)
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
    told = {"reason": reason, "waits": waits.places, "waits_in_steps": in_steps, "peaks": peaks, "held": held}
    Path(answer).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
