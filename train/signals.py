"""Stop requests: a signal or a file sets a flag, and all ranks act on it together or not at all.

SIGTERM, SIGINT, SIGUSR1, or a file `RUN_DIR/stop` (what a batch script can leave where signals do not reach the ranks).
torchrun and SLURM deliver a signal several times; the handler only takes note of the first. Everything that can outlast a
step polls: the loop with the sum of its loss, evaluation and scoring between batches, the switch before anything moves,
and whatever builds data before and after it.

    with StopRequest(run_dir, layout) as stop:
        while ...:
            ...
            if stop.agreed():        # collective: every rank gets the same answer
                break
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from parallel.errors import DataError
from train.run_files import STOP_FILE

if TYPE_CHECKING:
    from parallel.layout import Layout

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def follow_parent() -> None:
    """Let the system send this process SIGTERM when its parent dies; Linux only, elsewhere nothing.

    Ranks whose agent was killed would train on with nobody to stop them or to notice that one of them has died; and an
    agent whose launcher was killed would let them.
    """
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Stopping(Exception):
    """All ranks agreed to stop in the middle of something that can be done again; the loop saves and ends."""


class StopRequest:
    """Remembers the first request to stop. Use as a context manager; handlers are put back afterwards.

    Args:
        run_dir: where rank 0 looks for the file.
        rank: of this process.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.name: str | None = None
        self._file = run_dir / STOP_FILE if rank == 0 else None
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.name = self.name or signal.Signals(number).name

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wanted(self) -> bool:
        """Whether this rank knows of a request."""
        # `os.path.exists` says no where the folder cannot be looked into; one rank must not fail alone.
        if self.name is None and self._file is not None and os.path.exists(self._file):
            self.name = f"file {self._file}"
        return self.name is not None

    def agreed(self, layout: "Layout") -> bool:
        """Whether any rank knows of a request; collective, the same answer everywhere."""
        return bool(layout.sum_over_world(torch.tensor([float(self.wanted())], device=layout.device)).item())

    def raise_if_agreed(self, layout: "Layout") -> None:
        """End what is going on if any rank knows of a request; collective.

        Raises:
            Stopping: on every rank.
        """
        if self.agreed(layout):
            raise Stopping

    def told(self, layout: "Layout") -> str:
        """What asked first, for the records; collective."""
        return next((name for name in layout.gather_objects(self.name) if name), "unknown")

    def clear(self) -> None:
        """Remove the file, once the request is carried out; rank 0.

        Raises:
            DataError: if the folder cannot be written.
        """
        if self._file is not None:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as e:
                raise DataError(
                    f"{self._file}: cannot be removed ({e.strerror}): remove it, or the next start stops at once"
                ) from None
