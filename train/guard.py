"""The guard after an expansion: validation loss is watched, and a run that does not recover is stopped or taken back.

Every evaluation from the one right after the switch on is compared with the loss right before it. When the last
`upcycle.guard.evaluations` of them lie more than `upcycle.guard.max_increase` above, the guard trips:

    stop     the state is saved and the run ends with an error; started again it refuses, until the bound is raised or
             the action is off
    return   the run goes back to the checkpoint before the expansion, in the same job, and trains on without it
    off      nothing

A return is recorded in `RUN_DIR/returned.json` before anything else happens, so that a kill in between cannot undo it: a
run that finds the file leaves out every configured stage from that step on.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import DataError, ExpansionError
from train.checkpoint.folder import read_manifest
from train.health import go_back
from train.requests import undo_requests
from train.run_files import write_json
from upcycle.config import GUARD_KEPT, GuardConfig

if TYPE_CHECKING:
    from train.run import Run

RETURNED = "returned.json"


@dataclass
class Guard:
    """What the guard has seen since the last expansion; part of every checkpoint.

    Attributes:
        step: of the expansion.
        stage: that it began.
        reference: validation loss right before it, in nats per token.
        checkpoint: folder name of the stage before; None if it was not saved.
        losses: validation losses since, oldest first.
        last_step: of the last of them; one step counts once, also where a run resumes at it.
    """

    step: int
    stage: int
    reference: float
    checkpoint: str | None
    losses: list[float] = field(default_factory=list)
    last_step: int = -1

    def observe(self, step: int, loss: float) -> None:
        """Take note of an evaluation."""
        if step != self.last_step:
            self.losses, self.last_step = [*self.losses, loss][-GUARD_KEPT:], step

    def tripped(self, config: GuardConfig) -> bool:
        """Whether the last evaluations all lie above the bound. A loss that is no number does."""
        last = self.losses[-config.evaluations :]
        bound = self.reference + config.max_increase
        return config.action != "off" and len(last) == config.evaluations and all(not loss <= bound for loss in last)

    def reason(self, config: GuardConfig) -> str:
        """What happened, for people."""
        last = ", ".join(f"{loss:.4f}" for loss in self.losses[-config.evaluations :])
        return (
            f"after the expansion at step {self.step} validation loss was {last} in the last {config.evaluations} "
            f"evaluations, over upcycle.guard.max_increase={config.max_increase} above the {self.reference:.4f} before it"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def refuse_tripped(run: "Run") -> None:
    """Refuse to go on where the guard has stopped the run before.

    Raises:
        ExpansionError: with what to change.
    """
    if run.guard is not None and run.guard.tripped(run.settings.upcycle.guard):
        raise _stopped(run, run.guard)


def watch(run: "Run") -> None:
    """Act on the evaluations so far; collective.

    Raises:
        ExpansionError: if the guard stops the run; its state is saved.
    """
    config = run.settings.upcycle.guard
    if run.guard is None or not run.guard.tripped(config):
        return
    reason = run.guard.reason(config)
    run.event("guard", action=config.action, reason=reason)
    run.console.say(f"step {run.step}: guard: {reason}")
    if config.action == "return" and run.guard.checkpoint is not None:
        _go_back(run, run.guard, reason)
        return
    run.persistence.save_unless_saved()
    raise _stopped(run, run.guard)


def _stopped(run: "Run", guard: Guard) -> ExpansionError:
    back = ""
    if guard.checkpoint is not None:
        back = f"; or go back with run.resume={run.files.checkpoints / guard.checkpoint} and other stages"
    return ExpansionError(
        f"stopped by the guard: {guard.reason(run.settings.upcycle.guard)}: to go on from here raise "
        f"upcycle.guard.max_increase or use upcycle.guard.action=off{back}"
    )


def _go_back(run: "Run", guard: Guard, reason: str) -> None:
    """Take the run back to the stage before the expansion, without the stages from there on."""
    assert guard.checkpoint is not None
    source = run.files.checkpoints / guard.checkpoint
    run.persistence.settle()
    with run.layout.together("going back before the expansion"):
        manifest = read_manifest(source)
        if run.layout.rank == 0:
            # In this order: whatever a kill leaves undone, the next start comes here again or is past it.
            run.persistence.folder.set_aside_after(source)
            undo_requests(run, guard.step)
            _record(run.files.run_dir, guard.step, run.step, reason)
    run.take_course(run.course.cut(manifest.stage))
    left = run.step
    go_back(run, source)
    run.event("return", from_step=left, checkpoint=str(source), num_experts=manifest.num_experts, reason=reason)
    run.console.say(
        f"went back from step {left} to {guard.checkpoint}: {manifest.num_experts} experts, state verified; no expansion "
        f"from here on ({RETURNED} in run.dir says why)"
    )


def _record(run_dir: Path, step: int, left: int, reason: str) -> None:
    # What an earlier return left out stays left out.
    step = min(step, held_from(run_dir) or step)
    write_json(run_dir / RETURNED, {"step": step, "left_at_step": left, "reason": reason})


def held_from(run_dir: Path) -> int | None:
    """The step from which configured stages are left out, because the guard has returned from it.

    Raises:
        DataError: if the record is damaged.
    """
    path = run_dir / RETURNED
    try:
        return int(json.loads(path.read_text())["step"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({e}): restore it, or remove it to let the stages happen again") from None
