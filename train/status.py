"""How a run stands, for whoever supervises it: `RUN_DIR/status.json`, replaced as a whole.

Rank 0 writes it; where a rank is lost or hangs, the one that found out.

After a signal the exit code of torchrun says nothing, and a killed process leaves none: a batch script asks this file.

    {"state": "running", "step": 120, "steps": 1000, "time": ..., "host": ..., "pid": ...}
    {"state": "stopped", "reason": "SIGTERM", "exit_code": 0, ...}      start it again to go on
    {"state": "finished", ...}                                          nothing is left to do
    {"state": "failed", "reason": "...", "exit_code": 4, ...}

`running` is written at the start, with every progress line and every checkpoint; one whose `time` is old was killed.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import CoppiceError, DataError
from train.run_files import write_json

if TYPE_CHECKING:
    from train.run import Run

STATUS = "status.json"


def write_status(run_dir: Path, state: str, step: int, steps: int, **details: Any) -> None:
    """Replace the status file.

    Args:
        run_dir: of the run.
        state: running, stopped, finished or failed.
        step: optimizer steps made.
        steps: of the whole run.
        **details: what else there is to say, such as `reason` and `exit_code`.

    Raises:
        DataError: if the folder cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = {"state": state, "step": step, "steps": steps, "time": now, "host": socket.gethostname(), "pid": os.getpid()}
    write_json(run_dir / STATUS, {**body, **details}, sync=False)


def tell_status(run: "Run", state: str, **details: Any) -> None:
    """Say how a run stands; rank 0 writes."""
    if run.layout.rank == 0:
        run.write(lambda: _tell(run, state, details))


def _tell(run: "Run", state: str, details: dict[str, Any]) -> None:
    try:
        newest = run.persistence.newest
    except OSError as e:
        raise DataError(f"{e.filename}: cannot be read ({e.strerror})") from None
    name = newest.name if newest else None
    write_status(run.files.run_dir, state, run.step, run.settings.run.steps, checkpoint=name, **details)


def tell_failed_start(run_dir: Path, error: CoppiceError) -> None:
    """Say that a start has failed, where a status of an earlier one would be taken for the answer; rank 0."""
    try:
        before = read_status(run_dir)
        if before is not None:
            write_status(
                run_dir,
                "failed",
                int(before["step"]),
                int(before["steps"]),
                reason=str(error),
                exit_code=error.exit_code,
            )
    except (CoppiceError, KeyError, ValueError, TypeError):
        # The start has failed already, and its own error says more.
        return


def tell_failure(run: "Run", error: BaseException, *, here: bool | None = None) -> None:
    """Record why a run ends without having been asked to; on this rank alone, whatever else fails.

    Args:
        run: that ends.
        error: its end.
        here: whether this rank writes; None leaves it to rank 0, which may be the one that is lost.
    """
    if not (run.layout.rank == 0 if here is None else here):
        return
    known = isinstance(error, CoppiceError)
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    code = error.exit_code if isinstance(error, CoppiceError) else 1
    run.write(lambda: run.files.append_event("stop", run.step, reason="failed", error=reason))
    run.write(lambda: _tell(run, "failed", {"reason": reason, "exit_code": code}))


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What the run last said; None where there is no run, or an older version's.

    Raises:
        DataError: if the file is damaged.
    """
    path = run_dir / STATUS
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as e:
        raise DataError(f"{path} is damaged ({e}): remove it") from None
