"""Where the figures of a run are shown while it goes on: Weights & Biases, TensorBoard, or nowhere.

JSONL in the run directory is the source of truth; the run never waits for a tracker (`queue.py`). Names of figures
are in `names.py`, the backends in `wandb.py` and `tensorboard.py`.

    refuse_missing(settings.tracking)            # on every rank, before anything else
    tracker = open_tracker(...)
    tracker.log(step, {"lm_loss": 2.5})
    tracker.close()
"""

import importlib.util
import uuid
from typing import Any

from parallel.errors import ConfigError
from train.run_files import RunFiles
from train.schema.tracking import TrackingConfig
from train.tracking.queue import QueuedTracker, Tracker
from train.tracking.tensorboard import TensorboardSink
from train.tracking.wandb import WandbSink


def refuse_missing(config: TrackingConfig) -> None:
    """Refuse a backend whose package is not installed.

    Raises:
        ConfigError: with the remedy.
    """
    if config.backend != "none" and importlib.util.find_spec(config.backend) is None:
        extra = "coppice[tensorboard]" if config.backend == "tensorboard" else config.backend
        raise ConfigError(
            f"tracking.backend={config.backend}: the package {config.backend} is not installed: "
            f"pip install '{extra}', or use tracking.backend=none"
        )


def open_tracker(
    config: TrackingConfig, files: RunFiles, run_id: str | None, settings: dict[str, Any], rank: int, step: int = 0
) -> Tracker:
    """The tracker of this rank: only rank 0 talks to one.

    Args:
        config: the `tracking` group.
        files: of the run.
        run_id: id at W&B of the run to continue after a resume; a new one is drawn where one is needed.
        settings: resolved configuration to show beside the run.
        rank: of this process.
        step: that the run goes on from.
    """
    if rank != 0 or config.backend == "none":
        return Tracker(run_id)
    repeated = files.repeated_steps()
    if config.backend == "tensorboard":
        tracker = QueuedTracker(config.backend, files, run_id, repeated, lambda: TensorboardSink(files.run_dir, step))
    else:
        wandb_id = run_id or uuid.uuid4().hex[:8]
        tracker = QueuedTracker(
            config.backend, files, wandb_id, repeated, lambda: WandbSink(config, files.run_dir, wandb_id, settings)
        )
    tracker.keep(step, files.config, "config")
    return tracker
