"""Keys of profiling: which steps, on which ranks, and what is kept of them (docs/profiling.md)."""

from dataclasses import dataclass, field

from parallel.errors import ConfigError


@dataclass
class ProfileConfig:
    """A trace of a few steps, in run.dir/profile (docs/profiling.md)."""

    # First and last step to profile, both included; null: off.
    steps: list[int] | None = None
    # Ranks that profile; each writes files of its own.
    ranks: list[int] = field(default_factory=lambda: [0])
    # Allocations as well; on a GPU also a snapshot for pytorch.org/memory_viz.
    memory: bool = True
    # Input shapes of operators; the table then has a row for each shape.
    shapes: bool = False

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        steps = self.steps
        if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ConfigError(
                f"profile.steps={steps} must be the first and the last step to profile, such as [10,12], or null"
            )
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ConfigError(f"profile.ranks={self.ranks} must name ranks, each once, such as [0]")

    def check(self, run_steps: int, world_size: int) -> None:
        """Check that there are such steps and ranks.

        Args:
            run_steps: optimizer steps of the run.
            world_size: processes of the job.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        if self.steps is None:
            return
        if self.steps[1] > run_steps:
            raise ConfigError(f"profile.steps={self.steps} ends after run.steps={run_steps}: profile earlier steps")
        if max(self.ranks) >= world_size:
            raise ConfigError(
                f"profile.ranks={self.ranks}: there is no rank {max(self.ranks)} of {world_size} processes: "
                f"use 0 to {world_size - 1}"
            )
