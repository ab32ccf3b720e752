"""Names stretches of the run for whoever looks at a trace: torch.profiler's, or Nsight Systems' through NVTX.

    with named("forward_backward"):
        ...

Costs well below a microsecond while nobody profiles.
"""

from types import TracebackType

import torch
from torch.profiler import record_function


class named:
    """A context in which traces carry a name.

    Args:
        act: what goes on inside.
    """

    __slots__ = ("_act", "_on_device", "_range")

    def __init__(self, act: str) -> None:
        self._act = act
        self._range: record_function | None = None
        self._on_device = False

    def __enter__(self) -> None:
        # Asked first: entering a range that nobody records takes microseconds.
        if torch.autograd._profiler_enabled():
            self._range = record_function(self._act)
            self._range.__enter__()
        if torch.cuda.is_initialized():
            self._on_device = True
            torch.cuda.nvtx.range_push(self._act)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_device:
            torch.cuda.nvtx.range_pop()
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
