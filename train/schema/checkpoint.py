"""The `checkpoint` group: when one is saved, which are kept, and how one is loaded."""

from dataclasses import dataclass

from model.config import one_of, positive
from parallel.errors import ConfigError


@dataclass
class CheckpointConfig:
    """What is kept, and when."""

    # Save every so many steps; null saves only at expansions, stops and the end.
    interval_steps: int | None = 500
    # Ordinary checkpoints kept; those right before and after an expansion are kept for ever. null keeps all.
    keep_last: int | None = 2
    # Checkpoints of steps that this divides are kept too; null keeps none of them.
    keep_every_steps: int | None = None
    # Write what is due at an interval in the background, from a copy in host memory; other saves are waited for.
    asynchronous: bool = True
    # What happens when a save at an interval fails: stop, or continue without it.
    on_failure: str = "stop"
    # Save the end of the run. Stops and expansions are saved always.
    save_final: bool = True
    # full, or model_only to accept a checkpoint without usable optimizer state knowingly; a run does so once.
    load: str = "full"
    # With model_only: begin the schedule anew, over the steps that are left; otherwise it goes on where it stood.
    reset_schedule: bool = False
    # How deep the files of a checkpoint are checked before it is loaded: sizes, or digests (all contents, by all ranks).
    verify: str = "digests"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        positive("checkpoint.interval_steps", self.interval_steps)
        positive("checkpoint.keep_last", self.keep_last)
        positive("checkpoint.keep_every_steps", self.keep_every_steps)
        one_of("checkpoint.load", self.load, ("full", "model_only"))
        one_of("checkpoint.on_failure", self.on_failure, ("stop", "continue"))
        one_of("checkpoint.verify", self.verify, ("sizes", "digests"))
        if self.reset_schedule and self.load == "full":
            raise ConfigError(
                "checkpoint.reset_schedule=true needs checkpoint.load=model_only: Adam's moments belong to the schedule "
                "they were made under"
            )
