"""How fast family routing is let go after an expansion in exact mode: a pure function of the steps since the switch.

Fraction 0 is family routing (the function of the smaller model), 1 is plain top-K over all experts. What lies between is
defined in `model/family_routing.py`. The schedule holds no state: the step count in the checkpoint is enough.

    schedule = ReleaseSchedule(steps=1000, shape="cosine", hold_steps=200)
    set_release(chunks, schedule.fraction(step - switch_step))
"""

import math
from dataclasses import dataclass

from parallel.errors import ConfigError

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class ReleaseSchedule:
    """Fraction released by steps since the switch: 0 at the switch, rising from `hold_steps` on, 1 `steps` later."""

    # Optimizer steps from the last step of pure family routing to the first of plain top-K.
    steps: int
    # `linear`, or `cosine` (slow at both ends).
    shape: str = "linear"
    # Optimizer steps of pure family routing before that, in which siblings grow apart undisturbed.
    hold_steps: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        if self.steps < 1:
            raise ConfigError(f"release.steps={self.steps} must be 1 or more: the steps from family to plain routing")
        if self.hold_steps < 0:
            raise ConfigError(f"release.hold_steps={self.hold_steps} must be 0 or more")
        if self.shape not in SHAPES:
            raise ConfigError(f"release.shape={self.shape} is unknown: use one of {', '.join(SHAPES)}")

    def fraction(self, steps_since_switch: int) -> float:
        """The fraction that holds for one step.

        Args:
            steps_since_switch: optimizer steps that the larger model has made; 0 in its first step.

        Returns:
            In [0, 1], never falling; exactly 0.0 up to `hold_steps` and exactly 1.0 from `hold_steps + steps` on.
        """
        gone = steps_since_switch - self.hold_steps
        if gone <= 0:
            return 0.0
        if gone >= self.steps:
            return 1.0
        part = gone / self.steps
        return part if self.shape == "linear" else (1.0 - math.cos(math.pi * part)) / 2

    def finished(self, steps_since_switch: int) -> bool:
        """Whether routing is plain top-K at that step."""
        return self.fraction(steps_since_switch) == 1.0
