"""One job at a time on a run directory, one command at a time on a folder that is being written.

By a lock that the system gives back whenever the process ends, however it ends.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from parallel.errors import DataError, LaunchError
from train.run_files import refuse_open_folder

LOCK = "lock"
# The file system has no locks; two jobs are then the user's care.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Held(Exception):
    """Another process holds a lock; the message says which."""


def hold(path: Path) -> IO[str] | None:
    """Take the lock of a file, which is made for it, until the file that is returned is closed or the process ends.

    Returns:
        The open file; None where the file system has no locks.

    Raises:
        Held: if another process has it.
        OSError: if the file cannot be written.
    """
    while True:
        file = open(path, "a+")  # noqa: SIM115 - held open on purpose
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.seek(0)
            holder = file.read()
            file.close()
            if e.errno in _UNSUPPORTED:
                return None
            raise Held(_who(holder)) from None
        if os.fstat(file.fileno()).st_nlink:
            break
        # Whoever held it has removed it just now: it keeps nobody off any more.
        file.close()
    file.truncate(0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}))
    file.flush()
    return file


def lock_run(run_dir: Path) -> IO[str] | None:
    """Take the lock of a run directory, until the file that is returned is closed or the process ends.

    Returns:
        The open file; None where the file system has no locks.

    Raises:
        LaunchError: if another process holds it, naming that process.
        DataError: if the folder cannot be written, or everybody may write to it.
    """
    # The lock is the first thing that a run writes.
    refuse_open_folder(run_dir)
    path = run_dir / LOCK
    try:
        if not os.access(run_dir, os.W_OK):
            # The lock of an earlier job can still be opened there; nothing else can be made.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return hold(path)
    except Held as e:
        raise LaunchError(
            f"run.dir={run_dir} is in use by {e}: wait for it, stop it, or choose another run.dir"
        ) from None
    except OSError as e:
        raise DataError(f"{path}: cannot write ({e.strerror}): choose another run.dir") from None


def _who(holder: str) -> str:
    try:
        told = json.loads(holder)
        return f"process {told['pid']} on {told['host']}, since {told['since']}"
    except (ValueError, KeyError, TypeError):
        return "another job"
