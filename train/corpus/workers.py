"""Worker processes of the corpus command: they end with it, whatever ends it.

What: `Workers.map` runs a function over tasks, in this process or shared out among others.
Why: a build may be killed at any moment. Its workers must not outlive it, or the command that goes on with the build
would find them still writing; and one that the system kills (memory) has to be an error, not a hang.
How: `with Workers(8) as workers: for result in workers.map(function, tasks): ...`
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TypeVar

from parallel.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """A pool of processes, started when there is the first work to share."""

    def __init__(self, count: int) -> None:
        """Remembers the number of processes; one means this process itself."""
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        self._held_open: Connection | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held_open is not None and error is not None:
            self._held_open.close()  # the workers leave at once, in the middle of their work
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._held_open is not None:
            self._held_open.close()

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task], ordered: bool = True) -> Iterator[Result]:
        """Yields the results, in the order of the tasks or as they come.

        Raises:
            DataError: a process was killed. Errors of the function itself come through as they are.
        """
        if self._count == 1 or len(tasks) <= 1:
            yield from map(function, tasks)
            return
        try:
            futures = [self._started().submit(function, task) for task in tasks]
            for future in futures if ordered else as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed (out of memory?): run the same command again, with fewer --workers"
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # this process may have threads of torch and tokenizers
            watched, self._held_open = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self._count, context, _prepare, (watched,))
        return self._pool


def _prepare(watched: Connection) -> None:
    """First act of a worker process: it leaves when the other end of the pipe closes, with the command or by it."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # `tokenizers`: the processes are the threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command says when to leave

    def leave() -> None:
        try:
            watched.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
