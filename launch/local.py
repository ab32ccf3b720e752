"""Starts a run on one machine under torchrun, with the checks and the quiet that torchrun itself does not give.

Settings are checked once before any process starts, a port in use is named, and when a rank fails its own message is the
last word instead of the agent's traceback.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from launch.environment import with_defaults
from launch.sweep import Ended, add_flag, missing_inputs, plan_sweep, run_sweep
from parallel.errors import LaunchError
from train.config import RunSettings
from train.console import wants_panel
from train.run_files import RunFiles
from train.settings import load_settings
from train.signals import follow_parent

# Log lines of torchrun's agent, such as "W1122 08:08:09.846000 32096 torch/distributed/run.py:874] ..."; where torch lies
# below the current folder the path begins there.
_AGENT_LOG = re.compile(r"[WEI]\d{4} [\d:.]+ +\d+ (?:\S*/)?torch/distributed/")

_AGENT_FILES = ("torch/distributed/run.py", "torch/distributed/elastic/")
_TERMINATED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m launch local`."""
    parser.add_argument("--processes", type=int, required=True, help="processes to start (one per GPU where there are)")
    parser.add_argument("--port", type=int, help="rendezvous port; a free one by default")
    add_flag(parser)
    parser.add_argument("overrides", nargs="*", help="settings, as for `python -m train`")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `python -m launch local`."""
    processes, port = arguments.processes, arguments.port
    if not arguments.multirun:
        return run_local(processes, port, arguments.overrides)
    _check(processes, port)
    sweep = plan_sweep(arguments.overrides, processes)
    for missing in missing_inputs(sweep):
        raise missing
    return run_sweep(sweep, lambda point: run_ranks(processes, port, list(point.overrides), point.settings))


def check_port(port: int) -> None:
    """Refuse a rendezvous port that is in use.

    Raises:
        LaunchError: naming the port and the remedy.
    """
    if not 0 < port < 65536:
        raise LaunchError(f"--port={port} is no port: use 1024 to 65535, or leave it out for a free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise LaunchError(f"--port={port} cannot be used ({e.strerror}): choose another, or leave it out") from None


def torchrun_command(processes: int, port: int | None, overrides: list[str]) -> list[str]:
    """The command line that starts the ranks."""
    where = ["--standalone"] if port is None else ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [
        sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(processes), "-m", "train", *overrides,
    ]  # fmt: skip


def relay(lines: Iterable[str], out: TextIO) -> int:
    """Pass on what the ranks say and leave out what torchrun's agent adds.

    Args:
        lines: standard error of torchrun, ranks and agent mixed.
        out: where the ranks' lines go.

    Returns:
        Exit code of a rank that failed by itself, as the agent reports it; 0 if none did.
    """
    code, agent_speaks = 0, False
    traceback: list[str] = []
    for line in lines:
        if traceback:
            traceback.append(line)
            if line.startswith((" ", "\t")):
                continue
            # The traceback is complete: the agent's own goes through torchrun, and is the last thing it prints.
            agent_speaks = agent_speaks or any(place in x for x in traceback for place in _AGENT_FILES)
            if not agent_speaks:
                out.writelines(traceback)
            traceback = []
        elif line.startswith("Traceback (most recent call last)"):
            traceback = [line]
        elif agent_speaks:
            exited = re.match(r"\s*exitcode\s*:\s*(-?\d+)", line)
            # A negative code is a signal, mostly the agent's own to the other ranks.
            if exited and code in (0, _TERMINATED):
                code = int(exited[1]) if int(exited[1]) > 0 else 128 - int(exited[1])
        elif not _AGENT_LOG.match(line):
            out.write(line)
        out.flush()
    return code


def run_local(processes: int, port: int | None, overrides: list[str]) -> int:
    """Check a run, start its ranks and wait for them.

    Returns:
        0, or the exit code of the first rank that failed.

    Raises:
        CoppiceError: if the settings or the port cannot be used; nothing was started.
    """
    _check(processes, port)
    return run_ranks(processes, port, overrides, load_settings(overrides, world_size=processes)).code


def _check(processes: int, port: int | None) -> None:
    if processes < 1:
        raise LaunchError(f"--processes={processes} must be 1 or more")
    if port is not None:
        check_port(port)


def run_ranks(processes: int, port: int | None, overrides: list[str], settings: RunSettings) -> Ended:
    """Start the ranks of a run that has been checked, and wait for them; a stop signal is passed on once."""
    environment = with_defaults(os.environ)
    # A session of its own: Ctrl-C reaches this process alone, which passes it on.
    agent = subprocess.Popen(
        torchrun_command(processes, port, overrides),
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=follow_parent,
    )  # fmt: skip
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        del frame
        if not asked:
            print("stopping after this step, with a checkpoint", file=sys.stderr, flush=True)
            agent.send_signal(signal.SIGTERM)
        asked.append(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    assert agent.stderr is not None
    code = relay(agent.stderr, sys.stderr)
    status = agent.wait()
    if status and wants_panel(settings.run.console, environment):
        # Rank 0 may have been killed with its panel open.
        from train.panel import RESTORE

        print(RESTORE, end="", flush=True)
    for number, handler in before.items():
        signal.signal(number, handler)
    if status and asked and _stopped_as_asked(Path(settings.run.dir)):
        return Ended(0, asked=True)
    if code > 128:
        # A killed rank has no last word of its own.
        print(
            f"error: a rank was killed by {signal.Signals(code - 128).name}: out of memory, or from outside; the same "
            "command goes on from the newest checkpoint",
            file=sys.stderr,
        )
    return Ended((code or 1) if status else 0, asked=bool(asked))


def _stopped_as_asked(run_dir: Path) -> bool:
    """Whether the run says that it stopped in order; torchrun's exit code is no witness after a signal."""
    events = RunFiles(run_dir).read_events()
    return bool(events) and events[-1]["event"] == "stop" and events[-1]["details"]["reason"] != "failed"
