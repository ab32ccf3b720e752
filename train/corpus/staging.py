"""The staging folder of a corpus build: where a build grows, and what a stopped one leaves for the next.

What: `staging_folder` gives a hidden folder beside PREFIX, one command at a time; `Staging.begin` keeps the finished
parts in it if they belong to the same build, and clears it otherwise.
Why: tokenizing takes hours on large corpora, and jobs get killed. A build that failed before it had finished a part
leaves nothing at all.
How: `with staging_folder("data/x", say) as staging: staging.begin(key); ...`; docs/data.md tells users about it.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from parallel.errors import ConfigError, DataError

Say = Callable[[str], None]
_LOCK, _KEY = "lock", "key"
# The file system has no locks; two commands on one PREFIX are then the user's care.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """The folder; made by `staging_folder`."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self._say = say

    def begin(self, key: str) -> None:
        """Clears the folder, unless what is in it was made under the same key.

        Args:
            key: says what the build is made of: equal keys, equal parts.
        """
        path = self.folder / _KEY
        parts = self.finished_parts()
        if path.exists() and path.read_text() == key:
            if parts:
                self._say(f"going on with the build that was stopped: {parts:,} parts are finished")
            return
        if parts:
            self._say(f"{self.folder} is of other inputs or options: its {parts:,} finished parts are dropped")
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                entry.unlink()
        path.write_text(key)

    def finished_parts(self) -> int:
        """Number of parts that need not be made again."""
        return sum(entry.suffix == ".npy" for entry in self.folder.iterdir())


@contextlib.contextmanager
def staging_folder(prefix: str, say: Say) -> Iterator[Staging]:
    """Gives the staging folder of PREFIX; it goes away at the end, and on failure if no part is finished.

    Args:
        prefix: PREFIX.
        say: takes the line that tells what was kept.

    Raises:
        ConfigError: another command is building the same PREFIX.
        DataError: in place of an OSError from anything done with the folder.
    """
    parent = Path(prefix).parent
    folder = parent / f".{Path(prefix).name}.partial"
    made: list[Path] = []
    lock: IO[str] | None = None
    try:
        missing = [folder for folder in (folder, parent, *parent.parents) if not folder.exists()]
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
            made.append(each)
        lock = _locked(folder, prefix)
        yield Staging(folder, say)
    except BaseException as error:
        if lock is not None:
            lock.close()
        kept = lock is not None and _leave(folder, say)
        for each in reversed(made):
            with contextlib.suppress(OSError):  # not empty: parts were kept, or somebody else uses it
                each.rmdir()
        if isinstance(error, OSError):
            # strerror is "No space left on device", "Permission denied" and so on
            remedy = (
                "make room or choose another folder" if error.errno in _FULL else "choose a folder you can write to"
            )
            left = "run the same command again to go on" if kept else "nothing was left behind"
            raise DataError(
                f"--output={prefix}: cannot write the corpus: {error.strerror or error} ({left}): {remedy}"
            ) from error
        raise
    lock.close()  # first: a remote file system cannot remove a folder with an open file
    shutil.rmtree(folder)


def _locked(folder: Path, prefix: str) -> IO[str]:
    lock = open(folder / _LOCK, "w")  # noqa: SIM115 - held open on purpose
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return lock
        lock.close()
        raise ConfigError(f"--output={prefix}: another command is building it: wait for it, or stop it") from error
    if not os.fstat(lock.fileno()).st_nlink:  # that command ended just now, and took the folder along
        lock.close()
        raise ConfigError(f"--output={prefix}: another command was building it until now: run again")
    return lock


def _leave(folder: Path, say: Say) -> bool:
    """After a failure: keeps finished parts and says so, or removes the folder."""
    with contextlib.suppress(OSError):
        if parts := Staging(folder, say).finished_parts():
            say(f"kept {parts:,} finished parts in {folder}: the same command goes on with them")
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False
