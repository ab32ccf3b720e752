"""Weights & Biases: one run through stops, requeues, returns and expansions."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.schema.tracking import TrackingConfig
from train.tracking.queue import Position


class WandbSink:
    """A run at Weights & Biases, or its files where `tracking.mode` is offline.

    Args:
        config: the `tracking` group.
        run_dir: files go to run_dir/wandb.
        run_id: of the run, continued if there is one.
        settings: resolved configuration to show beside the run.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, run_id: str, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            name=config.name or run_dir.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            mode=config.mode,  # type: ignore[arg-type]
            config=settings,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        # W&B's own step only rises, and drops what comes late: it counts the steps trained, repeated ones too, and the
        # step of the run is the axis. So what was trained again after a kill or a rollback is seen, and one run goes on.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def numbers(self, at: Position, values: Mapping[str, float]) -> None:
        """Send figures of a step."""
        self._run.log({**values, "step": at.step}, step=at.trained)

    def summary(self, at: Position, values: Mapping[str, Any]) -> None:
        """Put values into the run's summary."""
        del at
        self._run.summary.update(dict(values))

    def picture(self, at: Position, name: str, png: bytes) -> None:
        """Send a picture of a step."""
        import wandb

        # W&B takes pictures as this library's, which matplotlib brings.
        from PIL import Image

        self._run.log({name: wandb.Image(Image.open(io.BytesIO(png))), "step": at.step}, step=at.trained)

    def keep(self, at: Position, path: Path, kind: str) -> None:
        """Send a file as an artefact of the run."""
        import wandb

        del at
        artifact = wandb.Artifact(f"{self._run.id}-{path.stem}", type=kind)
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def go_back(self, step: int) -> None:
        """Nothing: the steps come again under higher numbers of W&B's own."""

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()
