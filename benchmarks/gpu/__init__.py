"""Sections of `benchmarks/gpu_check.py`, the most valuable first: what each measures, how long it may take, where it is."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# What the whole may take, in seconds: a section gets its own limit or what is left of this.
WHOLE = 470


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        about: one line.
        seconds: after which it is stopped; rows printed by then count.
        module: in this folder; its `rows(small)` yields the rows.
        many: it runs on several processes, one per GPU, and is left out where there is only one.
    """

    about: str
    seconds: int
    module: str
    many: bool = False

    def load(self) -> Callable[[bool], Iterable[dict[str, Any]]]:
        """The function that measures, imported only in the section's own process."""
        function: Callable[[bool], Iterable[dict[str, Any]]]
        function = importlib.import_module(f"benchmarks.gpu.{self.module}").rows
        return function


SECTIONS = {
    "machine": Section("what is here: card, libraries, the ceiling of a bf16 product", 25, "machine"),
    "switch": Section("the live switch: bit-identical to the checkpoint path, pause, peak memory", 90, "switch"),
    "train": Section("step time and MFU of whole models, ours over a bare mcore loop", 95, "train"),
    "several": Section("on all GPUs: 7B to 13B, EP growth, dispatchers, overlap", 110, "several", many=True),
    "experts": Section("grouped GEMM over the ceiling, by tokens and skew", 40, "experts"),
    "fp8": Section("FP8 through an expansion, against bf16", 50, "fp8"),
    "graphs": Section("CUDA graphs of attention through an expansion, against none", 35, "graphs"),
    "family": Section("family routing's cost per step", 25, "family"),
    "peer": Section("one MoE block beside torchtitan's", 25, "peer"),
    "kinds": Section("one checkpoint read by every expert module: the same losses", 35, "kinds"),
    "faults": Section("on purpose: out of memory, too many processes, a collective that times out", 50, "faults"),
}
