"""The `run` group: its folder, length, precision and what a terminal shows."""

from dataclasses import dataclass

from model.config import one_of, positive
from parallel.errors import ConfigError


@dataclass
class RunConfig:
    """The run itself."""

    # Folder of everything the run writes: config, metrics, events, plans, checkpoints, report.
    dir: str = "runs/default"
    # Root of every random choice: initialisation, data order, expansion noise.
    seed: int = 1234
    # Optimizer steps in all, over all stages.
    steps: int = 1000
    # auto continues from the newest complete checkpoint in run.dir, never starts anew in an empty folder, or a path.
    resume: str = "auto"
    # bf16 (fp32 masters and gradients) or fp32.
    precision: str = "bf16"
    # Save and stop after this step although run.steps is larger (a planned interruption); null runs to the end.
    stop_at_step: int | None = None
    # A progress line every so many steps.
    log_interval_steps: int = 10
    # What a terminal shows: a live panel or lines. auto: lines on SLURM and in CI; no terminal gets a panel it cannot show.
    console: str = "auto"
    # A row of per-expert load (the heat map of the report) every so many steps.
    load_interval_steps: int = 5

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("steps", "stop_at_step", "log_interval_steps", "load_interval_steps"):
            positive(f"run.{key}", getattr(self, key))
        positive("run.seed", self.seed, zero=True)
        one_of("run.precision", self.precision, ("bf16", "fp32"))
        one_of("run.console", self.console, ("auto", "panel", "plain"))
        if not self.dir:
            raise ConfigError("run.dir is empty: name a folder for the run")
        if not self.resume:
            raise ConfigError("run.resume is empty: use auto, never or the path of a checkpoint")
