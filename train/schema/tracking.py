"""The `tracking` group: where charts go."""

from dataclasses import dataclass

from model.config import one_of
from parallel.errors import ConfigError


@dataclass
class TrackingConfig:
    """Charts of a run (docs/tracking.md). JSONL in run.dir is the source of truth; the run never waits for a tracker."""

    # Weights & Biases, TensorBoard event files under run.dir, or nothing.
    backend: str = "wandb"
    # Of W&B: offline (files under run.dir), or online.
    mode: str = "offline"
    project: str = "coppice"
    # Display name at W&B; null takes the name of run.dir.
    name: str | None = None

    def __post_init__(self) -> None:
        """Check choices and names.

        Raises:
            ConfigError: naming the key and the value.
        """
        one_of("tracking.backend", self.backend, ("none", "wandb", "tensorboard"))
        one_of("tracking.mode", self.mode, ("offline", "online"))
        if not self.project:
            raise ConfigError("tracking.project is empty: name a project")
        if self.name == "":
            raise ConfigError("tracking.name is empty: give a name, or null for that of run.dir")
