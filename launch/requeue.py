"""What a batch job does after its run has ended: start again, or leave the queue. Asked by the script of `launch slurm`.

    python -m launch.requeue begin RUN_DIR --job 17 --chain 17 --steps 1000     `go`, or `end CODE`
    python -m launch.requeue end RUN_DIR --chain 17 --code 1 --asked USR1       `again CODE`, or `end CODE`

The answer goes to standard output, the reason in a line to standard error. `torchrun`'s exit code says nothing of a
run that was signalled, so the run's own word counts (`RUN_DIR/status.json`), and whether a checkpoint was made. What was
decided, and how often in a row nothing was gained, is kept in `RUN_DIR/restarts.json`. Neither torch nor Hydra is
imported: minutes before a time limit this has to be quick.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parallel.errors import CoppiceError, DataError, LaunchError
from train.checkpoint.files import MARKER, place_of
from train.run_files import STOP_FILE, write_json
from train.status import read_status

RESTARTS = "restarts.json"
# First word of a stop file that the batch script left; anything else is the user's.
OUR_STOP = "slurm"
_KEPT = 50


@dataclass(frozen=True)
class Outcome:
    """How one start of the run ended.

    Attributes:
        status: the run's last word; None if this start never said one.
        code: exit code of srun.
        asked: the signal with which the script asked the run to stop: USR1 before a time limit, TERM from `scancel`, a
            requeue or the limit itself; empty for neither.
        preempted: SLURM wants the nodes for another job.
        ran_before: an earlier start of this run got as far as a status.
    """

    status: dict[str, Any] | None
    code: int
    asked: str = ""
    preempted: bool = False
    ran_before: bool = False


@dataclass(frozen=True)
class Decision:
    """What the job does now.

    Attributes:
        again: start the run again, in this job or the next of a chain.
        exit_code: of the job, unless SLURM starts it again.
        why: for the log.
        final: the other jobs of a chain need not start it either.
    """

    again: bool
    exit_code: int
    why: str
    final: bool = True


def decide(outcome: Outcome, without_progress: int, bound: int) -> Decision:
    """Whether to start a run again.

    Args:
        outcome: of the start that has ended.
        without_progress: starts in a row, this one included, that made no new checkpoint.
        bound: how many of them may be followed by another.
    """
    again, code, why = _wish(outcome)
    if outcome.asked == "TERM":
        # scancel, a time limit, or a requeue, which SLURM carries out by itself.
        return Decision(False, code, f"SLURM ends this job; {why}", final=False)
    if not again:
        return Decision(False, code, why)
    if without_progress > bound:
        return Decision(
            False,
            code or LaunchError.exit_code,
            f"{why}; not started again: {without_progress} starts in a row made no new checkpoint "
            f"(--max-restarts-without-progress={bound})",
        )
    return Decision(True, code, why)


def _wish(outcome: Outcome) -> tuple[bool, int, str]:
    """Whether another start would help, the exit code if there is none, and why."""
    status, failed_as = outcome.status, outcome.code or 1
    if status is None:
        if outcome.code > 128:
            return True, failed_as, f"killed before the run began (srun: exit code {outcome.code})"
        if outcome.ran_before:
            return True, failed_as, f"this start failed before the run went on (srun: exit code {outcome.code})"
        return False, failed_as, f"the run never began (srun: exit code {outcome.code}); its message is above"
    state, step, reason = status.get("state"), status.get("step"), str(status.get("reason", ""))
    if state == "finished":
        return False, 0, f"finished after step {step}"
    if state == "stopped":
        if reason == "stop_at_step":
            return False, 0, f"stopped after step {step} as run.stop_at_step asks"
        if outcome.asked == "USR1":
            return True, 0, f"stopped after step {step}, before the time limit"
        if outcome.preempted:
            return True, 0, f"stopped after step {step} for a job that goes first"
        return False, 0, f"stopped after step {step} by request ({reason})"
    if state == "failed":
        code = int(status.get("exit_code") or failed_as)
        mends = code == LaunchError.exit_code
        return mends, code, f"failed after step {step}: {reason}"
    return True, failed_as, f"killed after step {step} (srun: exit code {outcome.code})"


@dataclass
class Restarts:
    """The starts of a run under SLURM, as kept beside its status.

    Attributes:
        chain: first job of the chain, or the only one; a new submission counts anew.
        without_progress: starts in a row that made no new checkpoint.
        checkpoint: furthest step and stage that a checkpoint has held.
        before: the status that the running start found; one like it is not its own.
        running: a start has begun, and nobody has said how it ended.
        ended: exit code with which the run was given up or done; None while there is more to come.
        starts: one entry per start, newest last.
    """

    chain: str
    without_progress: int = 0
    checkpoint: list[int] = field(default_factory=lambda: [-1, 0])
    before: dict[str, Any] | None = None
    running: bool = False
    ended: int | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: Path, chain: str) -> "Restarts":
        """What is known of a chain; counts of an earlier one are dropped, the list of starts is kept.

        Raises:
            DataError: if the file is damaged.
        """
        path = run_dir / RESTARTS
        try:
            found = cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls(chain)
        except (OSError, ValueError, TypeError) as e:
            raise DataError(f"{path} is damaged ({e}): remove it") from None
        return found if found.chain == chain else cls(chain, starts=found.starts)

    def write(self, run_dir: Path) -> None:
        """Replace the file.

        Raises:
            DataError: if the folder cannot be written.
        """
        self.starts = self.starts[-_KEPT:]
        write_json(run_dir / RESTARTS, asdict(self))

    def count(self, run_dir: Path) -> None:
        """Compare the newest checkpoint with the furthest so far, at the end of a start."""
        newest = newest_checkpoint(run_dir)
        self.without_progress = 0 if newest > self.checkpoint else self.without_progress + 1
        self.checkpoint = max(newest, self.checkpoint)


def newest_checkpoint(run_dir: Path) -> list[int]:
    """Step and stage of the furthest complete checkpoint; [-1, 0] without one."""
    found = [[-1, 0]]
    for marker in run_dir.glob(f"checkpoints/*/{MARKER}"):
        place = place_of(marker.parent)
        if place is not None:
            found.append(list(place))
    return max(found)


def begin(run_dir: Path, job: str, chain: str, steps: int, bound: int) -> int | None:
    """Take note of a start.

    Args:
        run_dir: of the run.
        job: id of this job.
        chain: id of the first job of its chain; its own without one.
        steps: that the run is to make.
        bound: how many starts without a new checkpoint may be followed by another.

    Returns:
        None to go on, or the exit code of a job that has nothing to do.
    """
    known, status = Restarts.read(run_dir, chain), read_status(run_dir)
    if known.running:
        # SLURM ended that start and its script with it: a lost node, preemption, or a requeue by hand.
        known.starts[-1]["ended"] = "with its job"
        known.count(run_dir)
    else:
        known.checkpoint = max(known.checkpoint, newest_checkpoint(run_dir))
    known.before, known.running = status, False
    if status and status.get("state") == "finished" and int(status.get("step") or 0) >= steps:
        _say(f"nothing to do: the run finished after step {status['step']}")
        known.ended = 0
    elif known.ended is not None:
        _say(f"nothing to do: an earlier job ended this chain (exit code {known.ended}); submit the run again to go on")
    elif known.without_progress > bound:
        _say(
            f"not started again: {known.without_progress} starts in a row made no new checkpoint "
            f"(--max-restarts-without-progress={bound}); submit it again to go on"
        )
        known.ended = LaunchError.exit_code
    else:
        _drop_our_stop(run_dir)
        known.running = True
        known.starts.append({"job": job, "began": _now(), "ended": None, "checkpoint": known.checkpoint})
    known.write(run_dir)
    return known.ended


def end(run_dir: Path, chain: str, outcome: Outcome, bound: int) -> Decision:
    """Decide what comes after a start, and take note of it.

    Args:
        run_dir: of the run.
        chain: as for `begin`.
        outcome: what the script knows; its status is read here.
        bound: how many starts without a new checkpoint may be followed by another.
    """
    known, status = Restarts.read(run_dir, chain), read_status(run_dir)
    fresh = status is not None and status != known.before
    known.count(run_dir)
    outcome = Outcome(
        status if fresh else None, outcome.code, outcome.asked, outcome.preempted, ran_before=known.before is not None
    )
    decision = decide(outcome, known.without_progress, bound)
    if known.starts:
        known.starts[-1] |= {
            "ended": _now(),
            "checkpoint": known.checkpoint,
            "again": decision.again,
            "why": decision.why,
        }
    known.running = False
    known.ended = None if decision.again or not decision.final else decision.exit_code
    known.write(run_dir)
    _say(decision.why + ("; starts again" if decision.again else ""))
    return decision


def _drop_our_stop(run_dir: Path) -> None:
    """Remove a request to stop that was meant for an earlier start, which was killed before it looked."""
    path = run_dir / STOP_FILE
    try:
        if path.exists() and path.read_text().startswith(f"{OUR_STOP} "):
            path.unlink()
    except OSError as e:
        raise DataError(f"{path}: cannot be removed ({e.strerror}): remove it, or the run stops at once") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> int:
    """Answer a batch script."""
    parser = argparse.ArgumentParser(prog="python -m launch.requeue", description=__doc__.split("\n", 1)[0])
    parser.add_argument("when", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", default="", help="id of this job")
    parser.add_argument("--chain", default="", help="id of the first job of its chain")
    parser.add_argument("--steps", type=int, default=0, help="steps that the run is to make")
    parser.add_argument("--bound", type=int, default=2, help="starts without a new checkpoint that may be repeated")
    parser.add_argument("--code", type=int, default=0, help="exit code of srun")
    parser.add_argument("--asked", default="", help="signal that the script passed on: USR1 or TERM")
    parser.add_argument("--preempted", action="store_true", help="SLURM wants the nodes back")
    given = parser.parse_args(words)
    try:
        if given.when == "begin":
            over = begin(given.run_dir, given.job, given.chain, given.steps, given.bound)
            print("go" if over is None else f"end {over}")
        else:
            outcome = Outcome(None, given.code, given.asked, given.preempted)
            decision = end(given.run_dir, given.chain, outcome, given.bound)
            print("again" if decision.again else "end", decision.exit_code)
    except CoppiceError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
