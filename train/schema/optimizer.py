"""The `optimizer` and `schedule` groups."""

from dataclasses import dataclass

from model.config import one_of, positive, toggle
from parallel.errors import ConfigError


@dataclass
class OptimizerSettings:
    """AdamW as mcore builds it: Transformer Engine's, NVIDIA Apex's or torch's, by what is installed."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    # Gradients are scaled down to this global norm; 0 leaves them.
    clip_grad: float = 1.0
    # Shard masters and moments over data-parallel ranks (ZeRO-1).
    distributed: bool = True
    # Reduce gradients while the backward pass still runs: auto, true or false.
    overlap_grad_reduce: bool | str = "auto"
    # Gather parameters while the forward pass runs: auto, true or false.
    overlap_param_gather: bool | str = "auto"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optimizer.{key}={getattr(self, key)} must lie in [0, 1)")
        positive("optimizer.epsilon", self.epsilon)
        positive("optimizer.weight_decay", self.weight_decay, zero=True)
        positive("optimizer.clip_grad", self.clip_grad, zero=True)
        for key in ("overlap_grad_reduce", "overlap_param_gather"):
            toggle(f"optimizer.{key}", getattr(self, key))
        if self.overlap_param_gather is True and not (self.distributed and self.overlap_grad_reduce is not False):
            raise ConfigError(
                "optimizer.overlap_param_gather=true needs optimizer.distributed=true and "
                "optimizer.overlap_grad_reduce=true"
            )


@dataclass
class ScheduleConfig:
    """Learning rate over the run, in optimizer steps."""

    # wsd (warmup, stable, decay), cosine, linear or constant.
    style: str = "wsd"
    learning_rate: float = 3e-4
    # Learning rate at the end of the decay.
    min_learning_rate: float = 3e-5
    warmup_steps: int = 0
    # Length of the last phase of wsd; null means a tenth of the run.
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        one_of("schedule.style", self.style, ("wsd", "cosine", "linear", "constant"))
        positive("schedule.learning_rate", self.learning_rate)
        positive("schedule.min_learning_rate", self.min_learning_rate, zero=True)
        positive("schedule.warmup_steps", self.warmup_steps, zero=True)
        positive("schedule.decay_steps", self.decay_steps)
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"schedule.min_learning_rate={self.min_learning_rate} is above "
                f"schedule.learning_rate={self.learning_rate}: lower it"
            )
