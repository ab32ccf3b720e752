"""A notice board that all ranks of a job see, on a connection of its own: what a rank posts there is seen by the others
even while its main thread is stuck in a collective.

It is the job's own key-value store: torchrun's launcher keeps it, or rank 0 where the ranks were started without one.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from parallel.errors import LaunchError

# A store that is there answers at once.
_CONNECT = timedelta(seconds=5)


class BoardLostError(Exception):
    """Whoever keeps the board does not answer any more."""


class Board:
    """Small texts by name. Calls wait for whoever keeps the board: none belongs into a thread that must not wait.

    Args:
        name: of the board; another one for every run of a job.
        timeout_seconds: after which a call fails. Only some calls heed it: one may wait for ever on a host that is gone.

    Raises:
        BoardLostError: if nobody keeps the board any more.
    """

    def __init__(self, name: str, timeout_seconds: float) -> None:
        # A copy has a connection of its own. The job's may be in use by the main thread, for as long as that is stuck.
        # torch's own description of stores lacks half of what they have.
        ours: Any = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        patience, ours_has = timedelta(seconds=timeout_seconds), ours.timeout
        # A copy connects for as long as the original is patient, which is minutes where its keeper is gone.
        ours.set_timeout(min(patience, _CONNECT))
        try:
            store = ours.clone()
        except RuntimeError as e:
            raise BoardLostError(str(e)) from e
        finally:
            ours.set_timeout(ours_has)
        store.set_timeout(patience)
        self._store = dist.PrefixStore(name, store)

    def post(self, key: str, text: str) -> None:
        """Replace what is posted under a key.

        Raises:
            BoardLostError: if nobody keeps the board any more.
        """
        try:
            self._store.set(key, text)
        except RuntimeError as e:
            raise BoardLostError(str(e)) from e

    def post_first(self, key: str, text: str, blank: str) -> str:
        """Post under a key unless somebody has done so since `blank` was posted there; what is there afterwards.

        Raises:
            BoardLostError: if nobody keeps the board any more.
        """
        try:
            return self._store.compare_set(key, blank, text).decode()
        except RuntimeError as e:
            raise BoardLostError(str(e)) from e

    def read(self, keys: Iterable[str]) -> list[str]:
        """What is posted under some keys, which must have been posted once.

        Raises:
            BoardLostError: if nobody keeps the board any more.
        """
        try:
            return [value.decode() for value in self._store.multi_get(list(keys))]
        except RuntimeError as e:
            raise BoardLostError(str(e)) from e


def board_keeper() -> tuple[int | None, str]:
    """Rank that keeps the board, None where it is the launcher; and the address."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0), address


def lost_connection(error: BaseException | None) -> bool:
    """Whether an error is, or was raised because of, a collective that failed: another rank may be gone."""
    while error is not None:
        if isinstance(error, dist.DistError | LaunchError):
            return True
        # gloo raises bare RuntimeErrors; all have a path of its sources in them.
        if isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl")):
            return True
        error = error.__cause__
    return False
