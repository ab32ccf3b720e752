"""Runs a function on several processes with a gloo group, from plain pytest.

Why: every claim about layouts needs real processes. Starting Python, torch and mcore takes seconds, so a fork server
imports them once per test session and a child costs about a tenth of a second.

How to use: the function must be importable by name (module level), its arguments and result picklable.

    def _sum(offset: int) -> float:
        value = torch.tensor([torch.distributed.get_rank() + offset])
        torch.distributed.all_reduce(value)
        return value.item()

    def test_sum() -> None:
        assert run_distributed(_sum, 2, 10) == [21, 21]
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parents[1])
_GRACE_SECONDS = 1.0  # after the first failure, for the others to report theirs
_EXIT_SECONDS = 20.0  # after its report, or the end of its pipe, for a process to end by itself
_TAIL_CHARACTERS = 6000
_SERVER_MARK = "COPPICE_TEST_FORK_SERVER"

# CUDA does not outlive a fork, and Transformer Engine starts it when it is imported: where there is a GPU, ranks begin anew.
_forks = not Path("/dev/nvidia0").exists()
_context = multiprocessing.get_context("forkserver" if _forks else "spawn")
_context.set_forkserver_preload(["tests.preload"])


class RankError(RuntimeError):
    """A rank died, hung, or raised something that cannot be sent to the test."""


class _ChildTraceback(Exception):
    """Carries the text of a child's traceback; Python shows it as the cause of the exception."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclasses.dataclass(frozen=True)
class _Report:
    """What a rank sends back: its pickled result, or its failure."""

    time: float
    result: bytes | None = None
    error: bytes | None = None
    text: str = ""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240, init: bool = True, **kwargs: Any
) -> list[Any]:
    """Calls `fn(*args, **kwargs)` on `world_size` processes and returns their results in rank order.

    Args:
        fn: module-level function.
        world_size: number of processes.
        *args: positional arguments of `fn`.
        timeout: seconds until the call counts as hung; the stacks of all ranks are then part of the error.
        init: prepare mcore and create the gloo process group. False sets the environment variables only (RANK,
            WORLD_SIZE, MASTER_ADDR, ...), as torchrun does, so that `fn` can be a whole program.
        **kwargs: keyword arguments of `fn`.

    Raises:
        RankError: a rank died or hung.
        Exception: the first exception that a rank raised, with that rank's traceback as its cause.
    """
    call = pickle.dumps((fn, args, kwargs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    environment |= {"LOCAL_WORLD_SIZE": str(world_size)}
    with tempfile.TemporaryDirectory(prefix="coppice-ranks-") as folder:
        processes, pipes = [], []
        try:
            for rank in range(world_size):
                receiver, sender = _context.Pipe(duplex=False)
                log = f"{folder}/{rank}"
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # Not daemonic: saving a checkpoint starts processes of its own.
                process = _context.Process(target=_child, args=(sender, call, ranked, log, init), name=f"rank {rank}")
                _start(process)
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            reports = _collect(processes, pipes, time.monotonic() + timeout)
            _raise_first_failure(reports, processes, folder, timeout)
            for process in processes:
                process.join(_EXIT_SECONDS)
            stuck = [process.name for process in processes if process.exitcode is None]
            if stuck:
                raise RankError(f"{', '.join(stuck)} finished but did not exit within {_EXIT_SECONDS} s")
        finally:
            for process in processes:
                _kill(process)
            for pipe in pipes:
                pipe.close()
            for rank in range(world_size):
                _echo(f"{folder}/{rank}", rank)
    return [_unpack(report.result) for report in reports if report and report.result]


def _pack(value: Any) -> bytes:
    """Pickles a result. mcore 0.19 changes how plain pickle stores tensors, and reading that would import mcore."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(packed), weights_only=False)


def free_port() -> int:
    """A port nobody holds, below those that the system hands out for connections: one of these may be gone by the time the
    ranks listen, with a second test session on the same machine it sometimes is.
    """
    while True:
        port = secrets.choice(range(15000, 32000))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextlib.contextmanager
def _plain_main() -> Iterator[None]:
    """Hides pytest's `__main__`, which multiprocessing would otherwise import again in every child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start(process: Any) -> None:
    with _plain_main():
        process.start()


def start_server() -> None:
    """Starts the fork server, which imports in the background; `run_distributed` waits for it."""
    from multiprocessing import forkserver

    if not _forks:
        return
    # The server does not get our sys.path, and it must not start a server when it imports this module.
    search = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    with _environment(PYTHONPATH=os.pathsep.join(search), **{_SERVER_MARK: "1"}), _plain_main():
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _collect(processes: list[Any], pipes: list[Any], deadline: float) -> list[_Report | None]:
    """Waits for every rank's report; stops soon after the first failure, and at the deadline."""
    reports: list[_Report | None] = [None] * len(pipes)
    waiting = set(range(len(pipes)))
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready = multiprocessing.connection.wait([pipes[rank] for rank in waiting], left)
        for rank in [rank for rank in waiting if pipes[rank] in ready]:
            waiting.remove(rank)
            try:
                report: _Report = pipes[rank].recv()
            except EOFError:  # died without a word
                processes[rank].join(_EXIT_SECONDS)
                report = _Report(time.monotonic(), text="died")
            reports[rank] = report
            if report.result is None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return reports


def _raise_first_failure(reports: list[_Report | None], processes: list[Any], folder: str, timeout: float) -> None:
    """Raises what tells most: a rank that died, else the first exception, else the stacks of the ranks that hang."""
    dead = [rank for rank, report in enumerate(reports) if report and report.text == "died"]
    if dead:
        codes = ", ".join(f"rank {rank} with exit code {processes[rank].exitcode}" for rank in dead)
        raise RankError(f"died without a report: {codes}\n" + "".join(_tail(folder, rank) for rank in dead))
    failures = [(report.time, rank, report) for rank, report in enumerate(reports) if report and report.result is None]
    if failures:
        _, rank, report = min(failures, key=lambda failure: failure[0])
        cause = _ChildTraceback(f"rank {rank} of {len(reports)} raised:\n{report.text}{_tail(folder, rank)}")
        error: BaseException = RankError(f"rank {rank} raised {report.text.splitlines()[-1]}")
        if report.error is not None:
            with contextlib.suppress(Exception):
                error = pickle.loads(report.error)
        raise error from cause
    hanging = [rank for rank, report in enumerate(reports) if report is None]
    if hanging:
        stacks = "".join(_stack(processes[rank], folder, rank) for rank in hanging)
        raise RankError(f"ranks {hanging} did not finish within {timeout} s; their stacks:\n{stacks}")


def _stack(process: Any, folder: str, rank: int) -> str:
    os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes the stacks of all threads
    time.sleep(0.3)
    text = Path(f"{folder}/{rank}.stack").read_text() if Path(f"{folder}/{rank}.stack").exists() else "not started\n"
    return f"--- rank {rank} ---\n{text}{_tail(folder, rank)}"


def _tail(folder: str, rank: int) -> str:
    path = Path(f"{folder}/{rank}")
    text = path.read_text(errors="replace")[-_TAIL_CHARACTERS:] if path.exists() else ""
    return f"--- output of rank {rank} ---\n{text}" if text else ""


def _echo(path: str, rank: int) -> None:
    """Hands a rank's output to pytest's capture."""
    if Path(path).exists() and (text := Path(path).read_text(errors="replace")):
        print(f"--- output of rank {rank} ---\n{text}", end="")


def _kill(process: Any) -> None:
    """Ends a rank and whatever it started (it leads its own process group)."""
    if process.exitcode is None:
        process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(5)
    process.close()


def _child(sender: Any, call: bytes, environment: dict[str, str], log: str, init: bool) -> None:
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    stacks = open(f"{log}.stack", "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    try:
        result = _pack(_call(call, init))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = None
        sender.send(_Report(time.monotonic(), error=pickled, text=text))
    else:
        sender.send(_Report(time.monotonic(), result=result))
    sys.stdout.flush()
    sys.stderr.flush()


def _call(call: bytes, init: bool) -> Any:
    import torch

    torch.set_num_threads(1)
    if not init:
        fn, args, kwargs = pickle.loads(call)
        return fn(*args, **kwargs)
    from parallel.compat import prepare_megatron

    prepare_megatron()
    torch.distributed.init_process_group("gloo")
    fn, args, kwargs = pickle.loads(call)
    result = fn(*args, **kwargs)
    # A rank that raised skips this: waiting for the others could take for ever.
    torch.distributed.destroy_process_group()
    return result


if _SERVER_MARK not in os.environ:
    start_server()
