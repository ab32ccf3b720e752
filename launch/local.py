"""Starts a run on one machine under torchrun, with the checks and the quiet that torchrun itself does not give.

Settings are checked once before any process starts, a port in use is named, and when a rank fails its own message is the
last word instead of the agent's traceback.
"""

import os
import signal
import socket
import subprocess
import sys

from parallel.errors import LaunchError
from train.settings import load_settings


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


def run_local(processes: int, port: int | None, overrides: list[str]) -> int:
    """Start the ranks and wait for them; a stop signal is passed on once.

    Returns:
        0, or the exit code of the first rank that failed.

    Raises:
        CoppiceError: if the settings or the port cannot be used; nothing was started.
    """
    if processes < 1:
        raise LaunchError(f"--processes={processes} must be 1 or more")
    load_settings(overrides, world_size=processes)
    if port is not None:
        check_port(port)
    # The agent reports failures of ranks with a traceback of its own; the rank has said what is wrong.
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "COPPICE_LAUNCHED": "local"}
    agent = subprocess.Popen(
        torchrun_command(processes, port, overrides), env=environment, stderr=subprocess.PIPE, text=True
    )

    def forward(number: int, frame: object) -> None:
        del frame
        agent.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = 0
    assert agent.stderr is not None
    agent_speaks = False
    for line in agent.stderr:
        if line.startswith(("W1", "E1", "W0", "E0")) and "torch/distributed/" in line:
            continue
        agent_speaks = agent_speaks or (line.startswith("Traceback") and not line.startswith("[rank"))
        if "exitcode" in line and "pid:" in line and not code:
            code = abs(int(line.split(":")[1].split("(")[0]))
        if not agent_speaks:
            sys.stderr.write(line)
            sys.stderr.flush()
    status = agent.wait()
    return (code or 1) if status else 0
