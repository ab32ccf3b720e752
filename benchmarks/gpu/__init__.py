"""Sections of `benchmarks/gpu_check.py`, the most valuable first: what each measures, how long it may take, where it is."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What the whole may take, in seconds.
WHOLE = 470
# Variable that tells a section when it is stopped, on the clock that all processes of a machine share (`time.monotonic`).
DEADLINE = "COPPICE_GPU_CHECK_DEADLINE"


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        about: one line.
        seconds: that it has at least, on a card of the class of an H100 with 16 cores beside it; when its time is over it is
            stopped, and rows printed by then count.
        module: in this folder; its `rows(small)` yields the rows.
        many: it runs on several processes, one per GPU, and is left out where there is only one.
        variables: of its environment, for libraries that read them when they are loaded.
    """

    about: str
    seconds: int
    module: str
    many: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Callable[[bool], Iterable[dict[str, Any]]]:
        """The function that measures, imported only in the section's own process."""
        function: Callable[[bool], Iterable[dict[str, Any]]]
        function = importlib.import_module(f"benchmarks.gpu.{self.module}").rows
        return function


# cuBLAS and Transformer Engine without kernels that add up in an order of the moment.
_REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}

SECTIONS = {
    "machine": Section("what is here: card, libraries, the ceiling of a bf16 product", 30, "machine"),
    "switch": Section("the live switch: bit-identical to the checkpoint path, pause, peak memory", 90, "switch"),
    "train": Section("step time and MFU of whole models, ours over a bare mcore loop", 110, "train"),
    "several": Section("on all GPUs: 7B to 13B, EP growth, dispatchers, overlap", 110, "several", many=True),
    "experts": Section("grouped GEMM over the ceiling, by tokens and skew", 25, "experts"),
    "fp8": Section("FP8 through an expansion, against bf16", 45, "fp8"),
    "graphs": Section("CUDA graphs of attention through an expansion, against none", 45, "graphs"),
    "family": Section("family routing's cost per step", 25, "family"),
    "peer": Section("one MoE block beside torchtitan's", 25, "peer"),
    "kinds": Section("one checkpoint read by every expert module: the same losses", 40, "kinds", variables=_REPEATABLE),
    "faults": Section("on purpose: out of memory, too many processes, a collective that times out", 35, "faults"),
}
