"""Sends metrics to Weights & Biases from a thread of its own, so that the run never waits for it.

JSONL in the run directory is the source of truth; a tracker that is slow, full or absent costs a log line, not a step.
"""

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import TrackingConfig
from train.run_files import RunFiles

_QUEUE = 10_000
_FINISH_SECONDS = 20.0


class Tracker:
    """A tracker that does nothing: ranks above 0, and tracking.backend=none."""

    run_id: str | None = None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record numbers of one step."""

    def repeat(self, steps: int) -> None:
        """Take note of how many steps of the run, in all, are trained again.

        Called when a run starts or goes back, before the first step is logged again.
        """

    def keep(self, path: Path, kind: str) -> None:
        """Keep a small file with the run, such as a plan."""

    def close(self) -> None:
        """Flush and end."""


class WandbTracker(Tracker):
    """Weights & Biases behind a queue.

    Args:
        config: the `tracking` group.
        run_dir: files go to run_dir/wandb when offline.
        run_id: id of the run to continue after a resume; a new one is drawn otherwise.
        settings: resolved configuration to show beside the run.
        repeated: steps trained again so far.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, run_id: str | None, settings: dict[str, Any], repeated: int
    ) -> None:
        import uuid

        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._config, self._dir, self._settings = config, run_dir, settings
        self._repeated = repeated
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(maxsize=_QUEUE)
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
        # W&B's own step only rises, and drops what comes late: it counts the steps trained, repeated ones too, and the
        # step of the run is the axis. So what was trained again after a kill or a rollback is seen, and one run goes on.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        while (act := self._queue.get()) is not None:
            act(run)
        run.finish()

    def _do(self, act: Callable[[Any], None]) -> None:
        """Queue something; drop it if the tracker is thousands of steps behind."""
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            self._dropped += 1

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Queue numbers of one step."""
        counted = step + self._repeated
        self._do(lambda run: run.log({**values, "step": step}, step=counted))

    def repeat(self, steps: int) -> None:
        """Take note of how many steps of the run, in all, are trained again."""
        self._repeated = steps

    def keep(self, path: Path, kind: str) -> None:
        """Queue a file as an artefact of the run."""

        def act(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{self.run_id}-{path.stem}", type=kind)
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._do(act)

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
    config: TrackingConfig, files: RunFiles, run_id: str | None, settings: dict[str, Any], rank: int
) -> Tracker:
    """The tracker of this rank: only rank 0 talks to one."""
    if rank != 0 or config.backend == "none":
        return Tracker()
    tracker = WandbTracker(config, files.run_dir, run_id, settings, files.repeated_steps())
    tracker.keep(files.config, "config")
    return tracker
