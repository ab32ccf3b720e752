"""Sections of `benchmarks/gpu_check.py`: what each measures, how long it may take, where its code is."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        about: one line.
        seconds: after which it is stopped.
        module: in this folder; its `rows(small)` yields the rows.
    """

    about: str
    seconds: int
    module: str

    def load(self) -> Callable[[bool], Iterable[dict[str, Any]]]:
        """The function that measures, imported only in the section's own process."""
        function: Callable[[bool], Iterable[dict[str, Any]]]
        function = importlib.import_module(f"benchmarks.gpu.{self.module}").rows
        return function


SECTIONS = {
    "machine": Section("what is here: card, libraries, the ceiling of a bf16 product", 40, "machine"),
    "experts": Section("our grouped GEMM over the ceiling, by tokens and skew", 70, "experts"),
    "kinds": Section("one checkpoint read by every expert module: the same losses", 80, "kinds"),
    "switch": Section("the live switch: bit-identical to the checkpoint path, pause, peak memory", 90, "switch"),
    "fp8": Section("FP8 through an expansion, against bf16", 70, "fp8"),
    "train": Section("step time and MFU of whole models, ours over a bare mcore loop", 130, "train"),
}
