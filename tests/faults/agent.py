"""Whole jobs under torchrun's own agent, started in a fraction of a second: agent and ranks are forked with all in memory.

The agent is the one that `torchrun` runs (`torch.distributed.launcher`), in a process of its own; its ranks are its children,
as under torchrun, so it can be killed, it notices when one of them dies, and they notice when it does.
"""

import contextlib
import os
import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed import RankError, run_distributed

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        results: what each rank returned; empty unless all ended well.
        codes: rank -> exit code of those that the agent saw fail first; a negative one is a signal.
        agent_died: whether the agent was killed.
    """

    results: list[Any] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    agent_died: bool = False


def run_under_agent(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 300) -> Ended:
    """Run `fn(*args)` on the ranks of a job, until all of its processes are gone: an agent's death alone does not end it.

    Args:
        fn: function of a module; RANK and the like are set, as under torchrun.
        ranks: processes besides the agent.
        *args: of `fn`.
        timeout: seconds until the job counts as hung.

    Raises:
        RankError: if it hung.
    """
    try:
        # The ranks hold the agent's end of the pipe too, so that "died" is said when the last of them is gone.
        (ended,) = run_distributed(_agent, 1, fn, ranks, args, init=False, timeout=timeout)
    except RankError as error:
        if "died without a report: rank 0 with exit code -9" not in str(error):
            raise
        return Ended(agent_died=True)
    return Ended(*ended)


def _agent(fn: Callable[..., Any], ranks: int, args: tuple[Any, ...]) -> tuple[list[Any], dict[int, int]]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in _LAUNCHED:
        del os.environ[name]
    # As torchrun --standalone has it.
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="fork", run_id=uuid.uuid4().hex,
    )  # fmt: skip
    try:
        results = elastic_launch(config, _rank)(os.getpid(), fn, args)
    except ChildFailedError as error:
        return [], {rank: failure.exitcode for rank, failure in error.failures.items()}
    return [results[rank] for rank in range(ranks)], {}


def _rank(agent: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from train.signals import follow_parent

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        # torchrun's ranks do not inherit the agent's handlers.
        signal.signal(number, signal.SIG_DFL)
    # Nor its sockets: a store that is gone would seem to listen, for as long as a rank has them.
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if os.readlink(entry).startswith("socket:"):
                os.close(int(entry.name))
    # As `python -m train` does under torchrun.
    follow_parent()
    result = fn(*args)
    if os.getppid() != agent:
        # Nobody is left to wait for.
        os._exit(0)
    return result
