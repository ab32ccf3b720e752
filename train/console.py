"""What a run prints, on rank 0 only: derived numbers at the start, then progress lines, or a live panel on a terminal."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from train.config import RunSettings
from train.schema.run import RunConfig

if TYPE_CHECKING:
    from train.panel import Panel


def wants_panel(choice: str, environment: Mapping[str, str]) -> bool:
    """Whether standard output of this process is to get a panel.

    Args:
        choice: `run.console`.
        environment: what says that nobody watches: a SLURM job, a CI job.
    """
    if choice == "plain" or not sys.stdout.isatty():
        return False
    if environment.get("TERM", "dumb") in ("dumb", "unknown"):
        # It would print the codes that move a cursor.
        return False
    return choice == "panel" or not (environment.get("SLURM_JOB_ID") or environment.get("CI"))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    whole = max(0, int(seconds))
    return f"{whole // 3600:d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Console:
    """Standard output of rank 0: lines, above a panel where there is one.

    Args:
        rank: of this process.
        config: the `run` group.
    """

    def __init__(self, rank: int, config: RunConfig) -> None:
        self._quiet = rank != 0
        self._config, self._steps = config, config.steps
        self._mark: tuple[int, float] | None = None
        self._panel: Panel | None = None

    def open_panel(self, doing: Callable[[], str], figures: Mapping[str, Any], settings: RunSettings) -> None:
        """Show a panel from here on, if this terminal is to have one (arguments: see `Panel`)."""
        if not self._quiet and wants_panel(self._config.console, os.environ):
            # Only where it is drawn.
            from train.panel import Panel

            self._panel = Panel(sys.stdout, doing, figures, settings)

    def close(self) -> None:
        """Give the terminal back; what is said from here on are lines alone. May be called again, by any thread."""
        panel, self._panel = self._panel, None
        if panel is not None:
            panel.close()

    def observe(self, figures: Mapping[str, Any], settings: RunSettings | None = None) -> None:
        """Leave figures for the panel; those of a step come with the settings of the run."""
        panel = self._panel
        if panel is not None:
            panel.show(figures, settings)

    def say(self, line: str) -> None:
        """Print one line."""
        if not self._quiet:
            print(line, flush=True)

    def opening(
        self, settings: RunSettings, counts: dict[str, int], layout: dict[str, int], micro_batches: int, kind: str
    ) -> None:
        """Print what was derived: parameters, layout, tokens per step."""
        model = settings.model
        counts_of = settings.upcycle.expert_counts(model.num_experts)
        stages = [n for i, n in enumerate(counts_of) if i == 0 or n != counts_of[i - 1]]
        self.say(f"run {settings.run.dir}: {settings.run.steps} steps, {settings.run.precision}")
        self.say(
            f"model: {counts['parameters_total'] / 1e6:.2f} M parameters, {counts['parameters_active'] / 1e6:.2f} M active; "
            f"{model.layers} layers, experts {' -> '.join(map(str, stages))}, top-{model.top_k}, expert module {kind}"
        )
        self.layout(settings, layout, micro_batches)
        for i, stage in enumerate(settings.upcycle.stages):
            before, after = counts_of[i : i + 2]
            grown = f"{before} -> {after} experts, {stage.selection}"
            if before == after:
                grown = f"{after} experts, made from a dense model"
            sizes = [f"{name} {size}" for name, size in stage.parallel.changes().items()]
            changes = ([grown] if stage.grows() else []) + (["layout: " + " ".join(sizes)] if sizes else [])
            self.say(f"stage {i + 1}: after step {stage.at_step}, {', '.join(changes)}")

    def layout(self, settings: RunSettings, layout: dict[str, int], micro_batches: int) -> None:
        """Print a layout, and what a step is made of in it."""
        data = settings.data
        sizes = ", ".join(f"{name} {size}" for name, size in layout.items() if size > 1 or name == "world")
        tokens = data.global_batch_size * data.sequence_length
        self.say(f"layout: {sizes}")
        self.say(
            f"tokens per step: {data.micro_batch_size} micro-batch x {micro_batches} accumulation x {layout['data']} data "
            f"ranks x {data.sequence_length} sequence = {tokens}"
        )

    def progress(self, record: dict[str, Any], next_event: str) -> None:
        """Print one line about a step, with the time left at the pace since the last line; a panel says it already."""
        panel = self._panel
        if panel is not None and not panel.hidden:
            return
        now, step = time.monotonic(), record["step"]
        left = ""
        if self._mark is not None and step > self._mark[0]:
            pace = (now - self._mark[1]) / (step - self._mark[0])
            left = f"  left {duration(pace * (self._steps - step))}"
        self._mark = (step, now)
        self.say(
            f"step {step:>6}/{self._steps}  loss {record['lm_loss']:.4f}  grad norm {record['grad_norm']:.2f}  "
            f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s{left}  next: {next_event}"
        )
