"""Moves bytes between ranks for the live switch: over the job's process group, or between threads of one process.

A transport does one thing: an exchange of flat byte tensors with several peers at once. `GroupTransport` is gloo on CPU and
NCCL on GPUs; `ThreadTransport` lets a test or a simulation run many ranks in one process, through the same executor.
"""

import queue
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.distributed as dist

from parallel.errors import ExpansionError


class Transport(ABC):
    """Exchanges byte tensors with peers."""

    @abstractmethod
    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
        """Send to and receive from each peer one message; returns when all have arrived and none is needed any more.

        Messages between two ranks arrive in the order of the calls.

        Args:
            sends: peer -> uint8 tensor.
            receives: peer -> uint8 tensor to fill, of the length the peer sends.

        Raises:
            ExpansionError: if a peer is gone or does not answer in time.
        """


class GroupTransport(Transport):
    """Point-to-point messages of the job's default process group."""

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
        """See the base class."""
        operations = [dist.P2POp(dist.irecv, receives[peer], peer) for peer in sorted(receives)]
        operations += [dist.P2POp(dist.isend, sends[peer], peer) for peer in sorted(sends)]
        if not operations:
            return
        try:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        except (dist.DistError, RuntimeError) as e:
            peers = sorted(sends.keys() | receives.keys())
            raise ExpansionError(
                f"moving the training state failed between rank {dist.get_rank()} and ranks {peers} "
                f"({str(e).splitlines()[0][:160]}): start the job again; it resumes from its newest checkpoint"
            ) from None


class ThreadHub:
    """The mailboxes of the ranks that live in one process."""

    def __init__(self, world_size: int) -> None:
        pairs = [(a, b) for a in range(world_size) for b in range(world_size)]
        self.boxes: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {pair: queue.Queue() for pair in pairs}


class ThreadTransport(Transport):
    """Messages between threads of one process; each thread plays one rank."""

    def __init__(self, hub: ThreadHub, rank: int, timeout_seconds: float = 60.0) -> None:
        self.hub, self.rank, self.timeout_seconds = hub, rank, timeout_seconds

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
        """See the base class."""
        for peer, message in sends.items():
            self.hub.boxes[self.rank, peer].put(message.clone())
        for peer, buffer in receives.items():
            try:
                buffer.copy_(self.hub.boxes[peer, self.rank].get(timeout=self.timeout_seconds))
            except queue.Empty:
                raise ExpansionError(f"rank {self.rank} waited {self.timeout_seconds} s for rank {peer}") from None
