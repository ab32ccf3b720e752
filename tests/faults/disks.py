"""Faults of disks and clocks, injected into a rank of `run_under_agent`; its process is thrown away afterwards.

A folder that cannot be written is one whose mode says so; root, whom no mode binds, meets a file system that is mounted
read-only instead: each touch that would write is refused by an audit hook, as the kernel would.
"""

import datetime
import errno
import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "os.utime",
    "os.link",
    "os.symlink",
)


@functools.cache
def modes_bind() -> bool:
    """Whether a folder's mode can keep this process from writing there: not with root's capabilities."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o500)
        return not os.access(folder, os.W_OK)


class ReadOnly:
    """A folder that can be made read-only and writable again.

    Args:
        folder: with all below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._on = False
        self._hooked = False

    def __str__(self) -> str:
        return os.strerror(errno.EACCES if modes_bind() else errno.EROFS)

    def begin(self) -> None:
        """From now on nothing can be written there; called on every rank."""
        self._on = True
        if modes_bind():
            self.folder.chmod(0o500)
        elif not self._hooked:
            self._hooked = True
            sys.addaudithook(self._hear)

    def end(self) -> None:
        """From now on everything can be again; called on every rank."""
        self._on = False
        if modes_bind():
            self.folder.chmod(0o700)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._on and (event in _CHANGES or (event == "open" and arguments[2] & _WRITING)):
            for path in arguments[:2]:
                if isinstance(path, str | os.PathLike) and self._holds(os.fspath(path)):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    def _holds(self, path: str) -> bool:
        return path == str(self.folder) or path.startswith(f"{self.folder}/")


class _Slow:
    """A file whose writes take their time.

    Args:
        file: opened for writing.
        bytes_per_second: that it takes in.
    """

    def __init__(self, file: Any, bytes_per_second: float) -> None:
        self._file, self._rate = file, bytes_per_second

    def write(self, data: Any) -> int:
        time.sleep(memoryview(data).nbytes / self._rate)
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def slow_disk(bytes_per_second: float, done: Callable[[], bool]) -> None:
    """Let this process write tensors of checkpoints in the background at this rate only.

    Args:
        bytes_per_second: that the disk takes in.
        done: the last of a file waits for this too, however slow everything else is.
    """
    from torch.distributed.checkpoint.filesystem import FileSystem

    create = FileSystem.create_stream

    @contextmanager
    def slowly(self: Any, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            # Any save writes in threads of its own; one in the background is run by a thread as well (`SaveTask.start`).
            behind = mode == "wb" and any(thread.name == "checkpoint" for thread in threading.enumerate())
            yield _Slow(stream, bytes_per_second) if behind else stream
            while behind and not done():
                time.sleep(0.01)

    FileSystem.create_stream = slowly  # type: ignore[method-assign, assignment]


class WrongClock:
    """The wall clock of this process, of which every module of ours is told: off by some hours.

    Args:
        hours: to begin with.
    """

    def __init__(self, hours: float = 0.0) -> None:
        self.hours = hours
        real_time, real_datetime = time.time, datetime.datetime

        class Wrong(real_datetime):  # type: ignore[valid-type, misc]
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return real_datetime.now(tz) + datetime.timedelta(hours=self.hours)

        time.time = lambda: real_time() + 3600 * self.hours
        datetime.datetime = Wrong  # type: ignore[misc]
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("train", "parallel", "model", "upcycle") and hasattr(module, "datetime"):
                module.datetime = Wrong  # type: ignore[attr-defined]

    def stamp(self, path: Path) -> None:
        """Give a folder and all in it the time that it was written at by this clock."""
        for one in (path, *path.rglob("*")):
            os.utime(one, (time.time(), time.time()))


def at_step(step: int, act: Callable[[], None]) -> None:
    """Do something on this rank right after a step of the run, before anything is evaluated or saved."""
    from train.run import Run

    make = Run._one_step

    def made(self: Run) -> bool:
        stopping = make(self)
        if self.step == step:
            # Every rank has made the step, and none goes on before all have acted.
            act()
            self.layout.barrier()
        return stopping

    Run._one_step = made  # type: ignore[method-assign]
