"""Profiles a few steps of a run on chosen ranks (docs/profiling.md).

    with run.profiler.step(12):      # begins before the first step that is asked for, ends after the last
        ...
    run.profiler.end()               # what there is by now, of a run that stops before

Begun and ended between steps, so that all others run as without it; what happens between two profiled steps (an
evaluation, an expansion) is in the trace. A trace that cannot be written is told of and changes nothing else.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import profile, supported_activities

from parallel.errors import CoppiceError
from train.named import named
from train.run_files import make_directory

if TYPE_CHECKING:
    from train.run import Run

# Rows of the table of operators.
_ROWS = 50
# Allocations and frees that a snapshot goes back.
_MEMORY_ENTRIES = 100_000


class Profiler:
    """Profiles the steps that `profile.steps` names, once per job."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        # What is still to be profiled, and whether it is under way; the same on all ranks.
        self._wanted = run.settings.profile.steps
        self._under_way = False
        # On ranks that profile.
        self._profile: profile | None = None
        # First and last step that have been profiled.
        self._first = self._last = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Train step `number` inside, profiled if that is asked for."""
        wanted = self._wanted
        if wanted and not self._under_way and wanted[0] <= number <= wanted[1]:
            self._begin(number, wanted[1])
        with named(f"step {number}"):
            yield
        self._last = max(self._last, number)
        if wanted and self._under_way and number >= wanted[1]:
            self.end()

    def end(self) -> None:
        """Write what has been profiled, if anything is under way; all ranks go on together, so that no step waits for it."""
        if not self._under_way:
            return
        found, self._profile = self._profile, None
        self._wanted, self._under_way = None, False
        if found is not None:
            with self._told("profile"):
                found.stop()
                with self._run.watchdog.act(f"writing the profile of {self._span}"):
                    self._write(found)
            self._stop_history()
        with self._run.watchdog.act(f"waiting for the profile of {self._span}"):
            self._run.layout.barrier()

    def abandon(self) -> None:
        """Leave after an error: no trace, since ending one waits for the device; what memory was used for is known here."""
        if self._profile is not None and self._keeps_history:
            with self._told("memory snapshot"):
                self._publish("memory.pickle", torch.cuda.memory._dump_snapshot)
        self._profile = None

    @property
    def _span(self) -> str:
        return f"steps {self._first}-{max(self._first, self._last)}"

    @property
    def _keeps_history(self) -> bool:
        return self._run.settings.profile.memory and torch.cuda.is_initialized()

    def _begin(self, number: int, last: int) -> None:
        config, run = self._run.settings.profile, self._run
        self._under_way, self._first, self._last = True, number, 0
        run.event("profile", steps=[number, last], ranks=list(config.ranks))
        if run.layout.rank not in config.ranks:
            return
        with self._told("profile"):
            if self._keeps_history:
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_ENTRIES, stacks="python")
            begun = profile(
                activities=supported_activities(),
                profile_memory=config.memory,
                record_shapes=config.shapes,
                acc_events=True,
            )
            begun.start()
            self._profile = begun
        if self._profile is None:
            self._stop_history()

    def _stop_history(self) -> None:
        if self._keeps_history:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, found: profile) -> None:
        began, run = time.perf_counter(), self._run
        trace = self._publish("trace.json.gz", found.export_chrome_trace)
        run.watchdog.tick()
        table = found.key_averages(group_by_input_shape=run.settings.profile.shapes).table(
            sort_by=f"self_{'cuda' if torch.cuda.is_initialized() else 'cpu'}_time_total", row_limit=_ROWS
        )
        about = f"rank {run.layout.rank}, {self._span}, operators by their own time"
        self._publish("txt", lambda path: Path(path).write_text(f"{about}\n{table}\n"))
        if self._keeps_history:
            run.watchdog.tick()
            self._publish("memory.pickle", torch.cuda.memory._dump_snapshot)
        if run.layout.rank == min(run.settings.profile.ranks):
            size, seconds = trace.stat().st_size / 2**20, time.perf_counter() - began
            # On rank 0 there may be a panel to print above.
            say = run.console.say if run.layout.rank == 0 else partial(print, flush=True)
            say(
                f"step {run.step}: profile of {self._span} in {trace.parent}, "
                f"{size:.1f} MiB per rank, written in {seconds:.1f} s"
            )

    def _publish(self, ending: str, write: Callable[[str], object]) -> Path:
        """Have a file written, under its name only when it is whole."""
        folder = self._run.files.run_dir / "profile" / self._span.replace("steps ", "step-")
        make_directory(folder)
        path = folder / f"rank-{self._run.layout.rank}.{ending}"
        staging = path.with_name(f".{path.name}")
        try:
            write(str(staging))
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)
        return path

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Tell of a failure inside, and go on."""
        try:
            yield
        except (CoppiceError, OSError, RuntimeError) as e:
            # RuntimeError: the libraries behind the profiler refuse, or are missing.
            words = " ".join(str(e).split()) or type(e).__name__
            print(
                f"rank {self._run.layout.rank}: no {what} of {self._span} ({words}); training goes on",
                file=sys.stderr,
                flush=True,
            )
