"""Sends metrics to Weights & Biases from a thread of its own, so that the run never waits for it.

JSONL in the run directory is the source of truth; a tracker that is slow, full or absent costs a log line, not a step.
"""

import queue
import sys
import threading
from pathlib import Path
from typing import Any

from train.config import TrackingConfig

_QUEUE = 10_000
_FINISH_SECONDS = 20.0


class Tracker:
    """A tracker that does nothing: ranks above 0, and tracking.backend=none."""

    run_id: str | None = None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record numbers of one step."""

    def close(self) -> None:
        """Flush and end."""


class WandbTracker(Tracker):
    """Weights & Biases behind a queue.

    Args:
        config: the `tracking` group.
        run_dir: files go to run_dir/wandb when offline.
        run_id: id of the run to continue after a resume; a new one is drawn otherwise.
        settings: resolved configuration to show beside the run.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, run_id: str | None, settings: dict[str, Any]) -> None:
        import uuid

        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._config, self._dir, self._settings = config, run_dir, settings
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(maxsize=_QUEUE)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            import wandb

            run = wandb.init(
                project=self._config.project,
                name=self._config.name or self._dir.name,
                id=self.run_id,
                resume="allow",
                dir=str(self._dir),
                mode=self._config.mode,  # type: ignore[arg-type]
                config=self._settings,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except Exception as e:
            print(f"wandb is not available ({type(e).__name__}: {e}); metrics are in {self._dir}", file=sys.stderr)
            return
        # A resumed run logs from the step it continues at; W&B keeps the order by the step we give.
        while (item := self._queue.get()) is not None:
            run.log(item[1], step=item[0])
        run.finish()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Queue numbers of one step; drop them if the tracker is thousands of steps behind."""
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._dropped += 1

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
            print(f"wandb is behind; every figure is in {self._dir}/metrics.jsonl", file=sys.stderr)


def open_tracker(
    config: TrackingConfig, run_dir: Path, run_id: str | None, settings: dict[str, Any], rank: int
) -> Tracker:
    """The tracker of this rank: only rank 0 talks to one."""
    if rank != 0 or config.backend == "none":
        return Tracker()
    return WandbTracker(config, run_dir, run_id, settings)
