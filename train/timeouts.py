"""Collectives that fail or time out though no rank is known to be gone: what the user is told, and how the process ends.

Before that, `train/watchdog.py` names the rank that hangs. This is for what it does not see: `health.hang_seconds=null`, and
a rank that is at work for longer than `parallel.timeout_seconds` while the others wait for it.
"""

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from parallel.errors import CoppiceError, LaunchError
from parallel.flight_recorder import RecordWatch, timed_out, write_record
from parallel.heartbeat import lost_connection
from train.signs import look_at, raised_at
from train.status import tell_failure

if TYPE_CHECKING:
    from train.run import Run

# For files of the run that may be on the disk that hangs, and for the records of the other ranks.
_TELL_SECONDS = 5.0


def explain_timeout(run: "Run", error: BaseException) -> LaunchError | None:
    """What to end with instead of a failed collective's own error; None for other errors. Writes the rank's record."""
    if isinstance(error, CoppiceError) or not lost_connection(error):
        return None
    write_record(run.layout.rank)
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return timed_out(run.layout.rank, f"{run.watchdog.doing} at {raised_at(error)}", said)


def watch_for_timeouts(run: "Run") -> contextlib.AbstractContextManager[object]:
    """A block in which this process ends with an error of ours when NCCL has written down that a collective timed out."""
    if run.layout.device.type != "cuda" or run.layout.world_size == 1:
        return contextlib.nullcontext()
    main = threading.current_thread().ident or 0
    return RecordWatch(run.layout.rank, lambda: _end(run, main))


def _end(run: "Run", main: int) -> None:
    """End this process from beside its main thread."""
    place, _, _ = look_at(sys._current_frames().get(main))
    error = timed_out(run.layout.rank, f"{run.watchdog.doing} at {place}")
    # Python's own stream may be what the main thread is stuck in.
    os.write(2, f"error: {error}\n".encode())
    aside = threading.Thread(target=tell_failure, args=(run, error), daemon=True)
    aside.start()
    aside.join(_TELL_SECONDS)
    # Whoever keeps the board through which ranks are told to write theirs must not go first.
    time.sleep(_TELL_SECONDS)
    os._exit(LaunchError.exit_code)
