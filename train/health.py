"""Steps that go wrong: skipped, counted, and after too many in a row an end or a way back.

A step whose loss or gradient is not finite updates nothing by them: weights, moments and the schedule of the learning rate
stay as they were; the selection bias, which goes by counts of tokens, moves, and the batch counts as seen. With
`health.spike_factor` a loss far above the mean of the last good ones is bad as well; its update has been made by then. After
`health.bad_steps` bad steps in a row

    stop       the run ends with an error that names the batches; the newest checkpoint is from before or between them
    rollback   the run goes back to the newest checkpoint from before the first of them, in the same job, and trains on
               without their batches

What was left out is in `RUN_DIR/skipped_data.json`, written before anything else, so that a kill cannot undo it: every later
start leaves out the same samples.
"""

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import CoppiceError, DataError
from train.checkpoint.folder import Manifest, list_checkpoints, read_manifest, step_of
from train.graphs import drop_graphs
from train.run_files import write_json
from train.schema.health import HealthConfig
from train.stage import build_stage

if TYPE_CHECKING:
    from train.run import Run

SKIPPED = "skipped_data.json"
# First sample and number of samples of a stretch of the training stream.
Stretch = tuple[int, int]


@dataclass
class Health:
    """What the last steps were like; part of every checkpoint.

    Attributes:
        losses: of the last good steps, oldest first, as many as the window holds.
        bad: bad steps in a row up to now.
        first_step: the first of them.
        stretches: their samples.
    """

    losses: list[float] = field(default_factory=list)
    bad: int = 0
    first_step: int = 0
    stretches: list[list[int]] = field(default_factory=list)

    def judge(self, config: HealthConfig, step: int, loss: float, finite: bool, samples: Stretch) -> str | None:
        """Take note of a step.

        Args:
            config: the `health` group.
            step: its number.
            loss: mean over the batch, in nats per token.
            finite: whether loss and gradient were finite on all ranks.
            samples: of its batch.

        Returns:
            What was bad about it; None for a good one.
        """
        reason = None
        if not finite:
            reason = "its loss or gradient is not finite; nothing was updated"
        elif config.spike_factor is not None and len(self.losses) >= config.spike_window_steps:
            mean = math.fsum(self.losses) / len(self.losses)
            if loss > config.spike_factor * mean:
                reason = f"its loss, {loss:.4f}, is {loss / mean:.2f} times the mean of {len(self.losses)} good steps"
        if reason is None:
            keep = config.spike_window_steps if config.spike_factor is not None else 0
            self.losses = [*self.losses, loss][-keep:] if keep else []
            self.bad, self.stretches = 0, []
            return None
        self.first_step = self.first_step if self.bad else step
        self.bad, self.stretches = self.bad + 1, [*self.stretches, list(samples)]
        return reason

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def beyond(sample: int, batch: int, skipped: Sequence[Stretch]) -> int:
    """The first sample from `sample` on at which a whole batch touches nothing that is left out.

    Args:
        sample: where the run stands in the training stream.
        batch: samples per step.
        skipped: stretches that are left out.
    """
    for first, count in sorted(skipped):
        if first < sample + batch and sample < first + count:
            sample = first + count
    return sample


def left_out(sample: int, skipped: Sequence[Stretch]) -> int:
    """Samples before `sample` that were left out."""
    return sum(max(0, min(sample, first + count) - first) for first, count in skipped)


def read_skipped(run_dir: Path) -> list[Stretch]:
    """Stretches of the training stream that a run leaves out.

    Raises:
        DataError: if the record is damaged.
    """
    path = run_dir / SKIPPED
    try:
        return [(int(first), int(count)) for first, count in json.loads(path.read_text())["stretches"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({e}): restore it, or remove it to train on what was left out") from None


def attend(run: "Run", reason: str | None, samples: Stretch) -> None:
    """Act on the step that was just made; collective.

    Args:
        run: after the step.
        reason: what `Health.judge` said of it.
        samples: of its batch.

    Raises:
        CoppiceError: if the run is to stop, or cannot go back.
    """
    if reason is None:
        return
    config, health = run.settings.health, run.health
    first, count = samples
    run.event("bad_step", reason=reason, first_sample=first, samples=count, in_a_row=health.bad)
    run.console.say(f"step {run.step} is bad: {reason}; samples {first} to {first + count - 1}, {health.bad} in a row")
    if health.bad < config.bad_steps:
        return
    # What is on its way to the disk is from before them.
    run.persistence.settle()
    told = ", ".join(f"{a} to {a + n - 1}" for a, n in health.stretches)
    what = (
        f"{health.bad} bad steps in a row from step {health.first_step} on, with the samples {told}; the last: {reason}"
    )
    if config.action == "stop":
        raise CoppiceError(
            f"{what}: resume from an earlier checkpoint with a lower schedule.learning_rate or optimizer.clip_grad, or use "
            "health.action=rollback to leave these samples out"
        )
    source = _checkpoint_before(run, health.first_step, what)
    stretches = sorted({*run.skipped_data, *((a, n) for a, n in health.stretches)})
    with run.layout.together("leaving out samples"):
        if run.layout.rank == 0:
            # First, so that a kill in between leads through the same steps to the same place.
            run.persistence.folder.set_aside_after(source)
            body = {"stretches": [list(stretch) for stretch in stretches], "last_reason": what}
            write_json(run.files.run_dir / SKIPPED, body)
    left, run.skipped_data = run.step, stretches
    manifest = go_back(run, source)
    run.event("return", from_step=left, checkpoint=str(source), num_experts=manifest.num_experts, reason=what)
    run.console.say(
        f"went back from step {left} to {source.name}, state verified; these samples are left out from here on"
    )


def _checkpoint_before(run: "Run", step: int, what: str) -> Path:
    """The newest checkpoint of the run from before a step, agreed on by all ranks.

    Raises:
        CoppiceError: if there is none, or the run has gone back often enough.
    """
    found: Path | None = None
    with run.layout.together("looking for a checkpoint to go back to"):
        if run.layout.rank == 0:
            own = [path for path in list_checkpoints(run.files.run_dir) if step_of(path) < step]
            found = own[-1] if own else None
    found = run.layout.from_rank_zero(found)
    if found is None:
        raise CoppiceError(f"{what}: no checkpoint of this run is from before them: lower checkpoint.interval_steps")
    run.rollbacks += 1
    if run.rollbacks > run.settings.health.max_rollbacks:
        raise CoppiceError(
            f"{what}: this job has gone back {run.settings.health.max_rollbacks} times already (health.max_rollbacks): the "
            "data is not what is wrong; lower schedule.learning_rate"
        )
    return found


def go_back(run: "Run", source: Path) -> Manifest:
    """Put a run where one of its checkpoints stands, in the same job; collective.

    The stages after the checkpoint's are ahead again, unless the run's course was cut before.

    Args:
        run: between two steps.
        source: one of its own checkpoints.

    Returns:
        The manifest of that checkpoint.
    """
    with run.layout.together("going back to a checkpoint"):
        manifest = read_manifest(source)
    drop_graphs(run, "going back")
    run.stage.release()
    gc.collect()
    run.course = run.course.back_to(manifest.stage)
    layout = run.enter_layout(manifest.stage)
    full = run.persistence.enter(source, manifest, full=source != run.persistence.left_behind)
    run.stage = build_stage(
        run.settings,
        manifest.stage,
        layout,
        run.vocab_size,
        manifest.plans,
        schedule_begins=run.schedule_begins,
    )
    run.reopen_data(manifest)
    run.persistence.load(source, manifest, full=full)
    return manifest
