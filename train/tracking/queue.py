"""What all trackers share: a queue and a thread of its own, so that the run never waits for a tracker.

JSONL in the run directory is the source of truth; a tracker that is slow, full, broken or absent costs a line, not a step.
A `Sink` (`tracking_wandb.py`, `tracking_tensorboard.py`) is opened, fed and closed on the thread alone.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from train.run_files import RunFiles
from train.tracking.names import tracked_figures

_QUEUE = 10_000
_FINISH_SECONDS = 20.0
# Different names a run may send; every chart costs its reader, and a service may refuse more.
MAX_NAMES = 512
# Load maps drawn at evaluations take at most this share of the time; those of expansions and the end come on top, unless the
# last one took longer than so many seconds.
_DRAWING_SHARE, _DRAWING_SECONDS = 0.02, 5.0
LOAD_MAP = "load/map"


class Position(NamedTuple):
    """Where in a run something was seen: its step, and how many were trained by then, repeated ones too."""

    step: int
    trained: int


class Sink(Protocol):
    """One backend. Whatever its methods raise ends the tracker with one line, never the run."""

    def numbers(self, at: Position, values: Mapping[str, float]) -> None:
        """Send figures of a step by name."""

    def summary(self, at: Position, values: Mapping[str, Any]) -> None:
        """Put values beside the run as a whole."""

    def picture(self, at: Position, name: str, png: bytes) -> None:
        """Send a picture."""

    def keep(self, at: Position, path: Path, kind: str) -> None:
        """Keep a small file."""

    def go_back(self, step: int) -> None:
        """Take note that steps after this one are trained again."""

    def close(self) -> None:
        """Flush and end."""


class Tracker:
    """A tracker that does nothing: ranks above 0, and tracking.backend=none.

    Args:
        run_id: of the run at Weights & Biases, which goes on there after jobs that were tracked otherwise.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record figures of one step, by their keys in metrics.jsonl."""

    def expansion(self, step: int, stage: int, values: Mapping[str, Any]) -> None:
        """Mark the beginning of a stage with what is known of it: `from_experts`, `to_experts` and more."""

    def draw_load(self, step: int, *, always: bool = False) -> None:
        """Send the map of expert load so far, unless one was drawn too shortly before and it need not be `always`."""

    def go_back(self, step: int, repeated: int) -> None:
        """Take note that the run goes on from `step`, and how many of its steps, in all, are trained again.

        Called when a run goes back, before the first step is logged again.
        """

    def keep(self, step: int, path: Path, kind: str) -> None:
        """Keep a small file with the run, such as a plan."""

    def close(self) -> None:
        """Flush and end."""


class QueuedTracker(Tracker):
    """A sink behind a queue.

    Args:
        name: of the backend, for messages.
        files: of the run, with its figures.
        run_id: see `Tracker`.
        repeated: steps trained again so far.
        open_sink: called on the thread.
    """

    def __init__(
        self, name: str, files: RunFiles, run_id: str | None, repeated: int, open_sink: Callable[[], Sink]
    ) -> None:
        super().__init__(run_id)
        self._name, self._files, self._repeated = name, files, repeated
        self._open_sink = open_sink
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(maxsize=_QUEUE)
        self._dropped = 0
        # Those of the thread: names sent, when the next map may be drawn, how long the last one took, what was told.
        self._names: set[str] = set()
        self._next_drawing = self._drawing_took = 0.0
        self._told: set[str] = set()
        self._over = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    # ---- what the run tells -----------------------------------------------------------------------------------------

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Queue figures of one step."""
        at, values = self._at(step), dict(values)
        self._do(lambda sink: sink.numbers(at, self._bounded(tracked_figures(values))))

    def expansion(self, step: int, stage: int, values: Mapping[str, Any]) -> None:
        """Queue the mark of a new stage: a point in the charts, lines in the summary, and the map of load before it."""
        at = self._at(step)
        known = {key: value for key, value in values.items() if value is not None}

        def act(sink: Sink) -> None:
            grown = float(known["to_experts"] > known["from_experts"])
            marks = {"expansion/marker": grown, **{f"expansion/{key}": float(value) for key, value in known.items()}}
            sink.numbers(at, self._bounded(marks))
            sink.summary(
                at, {f"expansion/stage_{stage}/{key}": value for key, value in {"step": step, **known}.items()}
            )

        self._do(act)
        self.draw_load(step, always=True)

    def draw_load(self, step: int, *, always: bool = False) -> None:
        """Queue a drawing of the load map; files are read and drawn on the thread."""
        at = self._at(step)
        self._do(lambda sink: self._draw(sink, at, always))

    def go_back(self, step: int, repeated: int) -> None:
        """Queue that steps after `step` come again."""
        self._repeated = repeated
        self._do(lambda sink: sink.go_back(step))

    def keep(self, step: int, path: Path, kind: str) -> None:
        """Queue a file."""
        at = self._at(step)
        self._do(lambda sink: sink.keep(at, path, kind))

    def close(self) -> None:
        """Give the tracker a moment to finish; it never holds the run up for longer."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=_FINISH_SECONDS)
        except queue.Full:
            self._dropped += 1
        self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive() or self._dropped:
            print(f"{self._name} is behind; {self._remedy()}", file=sys.stderr, flush=True)

    def _at(self, step: int) -> Position:
        return Position(step, step + self._repeated)

    def _do(self, act: Callable[[Sink], None]) -> None:
        """Queue something; drop it if the tracker is thousands of steps behind."""
        if self._over:
            return
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            self._dropped += 1
            self._tell("full", f"{self._name} is {_QUEUE} entries behind, new ones are dropped; {self._remedy()}")

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            sink = self._open_sink()
        except Exception as e:
            self._over = True
            self._tell("end", f"{self._name} is not available ({type(e).__name__}: {e}); {self._remedy()}")
            return
        try:
            while (act := self._queue.get()) is not None:
                act(sink)
            sink.close()
        except Exception as e:
            self._tell("end", f"{self._name} has stopped ({type(e).__name__}: {e}); {self._remedy()}")
        self._over = True

    def _bounded(self, figures: dict[str, float]) -> dict[str, float]:
        """The figures without those that would be one name too many."""
        new = [name for name in figures if name not in self._names]
        left_out = new[max(0, MAX_NAMES - len(self._names)) :]
        self._names.update(set(new) - set(left_out))
        if left_out:
            self._tell(
                "names", f"{self._name} is sent no more than {MAX_NAMES} names, not {left_out[0]}; {self._remedy()}"
            )
        return {name: value for name, value in figures.items() if name in self._names}

    def _draw(self, sink: Sink, at: Position, always: bool) -> None:
        began = time.monotonic()
        too_slow = self._drawing_took > _DRAWING_SECONDS
        if (began < self._next_drawing and (too_slow or not always)) or not self._files.expert_load.exists():
            return
        try:
            # Here and not above: the drawing library takes a second.
            from train.report.load_map import load_map_png

            png = load_map_png(self._files.run_dir)
        except Exception as e:
            self._tell("map", f"the map of expert load could not be drawn ({type(e).__name__}: {e})")
            return
        if png is not None:
            sink.picture(at, LOAD_MAP, png)
        self._drawing_took = time.monotonic() - began
        self._next_drawing = time.monotonic() + self._drawing_took / _DRAWING_SHARE

    def _remedy(self) -> str:
        return f"every figure is in {self._files.metrics}"

    def _tell(self, what: str, line: str) -> None:
        """Say something once."""
        if what not in self._told:
            self._told.add(what)
            print(line, file=sys.stderr, flush=True)
