"""The `health` group: what a run does about steps that go wrong."""

from dataclasses import dataclass

from model.config import one_of, positive
from parallel.errors import ConfigError


@dataclass
class HealthConfig:
    """What a run does about steps that go wrong (`train/health.py`)."""

    # Bad steps in a row that are too many; before that, those that are not finite are skipped and counted.
    bad_steps: int = 5
    # A loss above this many times the mean of the window makes a step bad too; null: only what is not finite.
    spike_factor: float | None = None
    # Good steps in the window.
    spike_window_steps: int = 50
    # stop, or rollback: go back to the newest checkpoint from before them and train on without their samples.
    action: str = "stop"
    # Times that one job goes back before it stops.
    max_rollbacks: int = 3
    # Seconds in which no rank gets anywhere, after which the job ends and names the rank it waits for; null waits on.
    hang_seconds: int | None = 300

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("bad_steps", "spike_window_steps", "max_rollbacks", "hang_seconds"):
            positive(f"health.{key}", getattr(self, key))
        one_of("health.action", self.action, ("stop", "rollback"))
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ConfigError(f"health.spike_factor={self.spike_factor} must be above 1: every step would be a spike")
