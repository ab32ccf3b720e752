"""The process groups of a run as one object that is passed around, never fetched from globals.

`join_job` joins the job's process group; `Layout.create` forms mcore's groups and seeds its RNG trackers, `Layout.change`
replaces them by those of another layout on the same processes, `leave_job` gives everything back. The rest of the code
asks the layout for coordinates and collectives; only this package touches torch.distributed or mcore.parallel_state.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel import errors
from parallel.config import ParallelConfig
from parallel.devices import empty_cache, refuse_mixed, refuse_too_few, refuse_unlike
from parallel.errors import CoppiceError, LaunchError
from parallel.flight_recorder import flight_recorder
from parallel.graphs import leave_default_stream, seed_replayed_streams
from parallel.machine import Machine, this_machine


def _check_rendezvous() -> None:
    """Refuse a rendezvous port that somebody else holds, before torch waits on it.

    Under torchrun the agent owns the store, so the port is meant to be taken.

    Raises:
        LaunchError: naming the port.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or os.environ.get("RANK", "0") != "0":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            raise LaunchError(
                f"MASTER_PORT={port} on {host} cannot be used ({e.strerror}): choose a free port, or start with "
                "`torchrun --standalone`"
            ) from None


def join_job(timeout_seconds: int, records: Path | None = None, *, graphs: bool = False) -> bool:
    """Join the job's process group: NCCL where there is CUDA, gloo otherwise; a single process needs no launcher.

    Args:
        timeout_seconds: after which a collective that a rank never joined ends the job.
        records: folder for what the flight recorder writes then.
        graphs: whether this process will capture CUDA graphs; on a GPU it computes on a stream of its own then.

    Returns:
        Whether this call joined; False where the caller's process had joined already and has to leave by itself.

    Raises:
        LaunchError: if the port is taken, the other processes do not appear in time, or the GPUs are too few or of
            different kinds.
    """
    if dist.is_initialized():
        return False
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    alone: dict[str, Any] = {}
    if "MASTER_PORT" not in os.environ:
        if os.environ["WORLD_SIZE"] != "1":
            raise LaunchError("MASTER_PORT is not set: start with torchrun, or export MASTER_ADDR and MASTER_PORT")
        # Nobody to meet: no port is needed, and the next job of this process can do the same.
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        _check_rendezvous()
    cuda = torch.cuda.is_available()
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        refuse_too_few(torch.cuda.device_count(), local, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.cuda.set_device(local)
        if graphs:
            leave_default_stream()
    for name, value in flight_recorder(records).items():
        os.environ.setdefault(name, value)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds), **alone)
    except (dist.DistError, RuntimeError, ValueError) as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first = str(e).splitlines()[0]
        raise LaunchError(
            f"rank {os.environ['RANK']} could not join the {os.environ['WORLD_SIZE']} processes at MASTER_ADDR:"
            f"MASTER_PORT={where} ({first}): check that the port is free and every process was started"
        ) from None
    if cuda:
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, this_machine(torch.device("cuda", local), 1))
        try:
            refuse_mixed([machine.gpu for machine in told])
            refuse_unlike([machine.libraries for machine in told])
        except LaunchError:
            dist.destroy_process_group()
            raise
    return True


def _destroy_groups() -> None:
    """Let mcore forget its process groups, and destroy each that this rank is in.

    mcore's `destroy_model_parallel` destroys a few gloo groups and only forgets the rest (0.16.1 and 0.19.2 alike), whose
    sockets, threads and NCCL communicators would stay until the job ends. It keeps a list of all groups it made.
    """
    made = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    # First, because 0.19 gives back a context that needs its communicators.
    parallel_state.destroy_model_parallel()
    # In the order they were made, which is the same on every rank of a group.
    for group in dict.fromkeys(made):
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


@dataclass
class Layout:
    """Sizes, this rank's coordinates, and the process groups of one parallel layout.

    Attributes:
        config: sizes of the parallel dimensions.
        world_size: processes of the job.
        rank: this process, from 0.
        ranks_per_node: processes on this machine.
        data_size: data-parallel ranks of the dense parameters.
        data_rank: this rank among them.
        groups: mcore's process groups; empty once the layout was changed.
        device: where tensors live.
        graphs: whether CUDA graphs are captured, which takes generators of another kind.
    """

    config: ParallelConfig
    world_size: int
    rank: int
    ranks_per_node: int
    data_size: int
    data_rank: int
    groups: ProcessGroupCollection
    device: torch.device
    graphs: bool = False

    @classmethod
    def create(cls, config: ParallelConfig, seed: int, *, graphs: bool = False) -> "Layout":
        """Form the process groups and seed the generators; collective.

        Args:
            config: sizes of the parallel dimensions.
            seed: of the generators (`seed_streams`).
            graphs: whether CUDA graphs are captured, which takes generators of another kind.

        Raises:
            ConfigError: if the sizes do not fit the number of processes.
        """
        world = dist.get_world_size()
        config.data(world)
        if parallel_state.model_parallel_is_initialized():
            _destroy_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=config.interleaved(),
            context_parallel_size=config.context,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=config.expert_tensor,
            # mcore makes a duration of it, which takes fractions.
            distributed_timeout_minutes=config.timeout_seconds / 60,  # type: ignore[arg-type]
        )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        layout = cls(
            config=config,
            world_size=world,
            rank=dist.get_rank(),
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
            data_size=parallel_state.get_data_parallel_world_size(),
            data_rank=parallel_state.get_data_parallel_rank(),
            groups=ProcessGroupCollection.use_mpu_process_groups(),
            device=device,
            graphs=graphs,
        )
        layout.seed_streams(seed)
        return layout

    def change(self, config: ParallelConfig, seed: int) -> "Layout":
        """Replace the process groups of this layout by those of another one on the same processes; collective.

        What was built on the old groups must be gone, or at least done with them: they are destroyed first, so that their
        communicators and those of the new layout are never held together. This object keeps no groups.

        Args:
            config: sizes of the parallel dimensions from now on.
            seed: of the generators (`seed_streams`); another one than before, or their streams begin again.

        Raises:
            ConfigError: if the sizes do not fit the number of processes; nothing was changed then.
        """
        config.data(self.world_size)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # No rank may still be in a collective of a group that another one destroys.
        self.barrier()
        # Sockets and threads of a gloo group live as long as anything refers to it.
        self.groups = ProcessGroupCollection()
        _destroy_groups()
        empty_cache(self.device)
        return Layout.create(config, seed, graphs=self.graphs)

    def seed_streams(self, seed: int) -> None:
        """Start the generators of this rank: torch's, and mcore's streams, one per tensor and expert coordinate.

        Args:
            seed: from which mcore derives the seed of each stream.
        """
        if self.graphs:
            seed_replayed_streams(seed)
        else:
            tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        torch.manual_seed(seed)

    def machine(self) -> Machine:
        """What this process runs on."""
        return this_machine(self.device, self.ranks_per_node)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the input embedding."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def describe(self) -> dict[str, int]:
        """The sizes as plain numbers, for logs, events and checkpoints."""
        return self.config.describe(self.world_size)

    def sum_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def max_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest value of each element over all ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def min_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Smallest value of each element over all ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def sum_over(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Sum a tensor over one of `groups`, in place."""
        if group.size() > 1:
            dist.all_reduce(tensor, group=group)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Collect one small picklable value per rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_rank_zero(self, value: Any) -> Any:
        """Give every rank the value that rank 0 holds."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu") if self.device.type == "cpu" else self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        # NCCL's barrier is a sum on a device; unless told which, torch takes the current one and warns that it guessed.
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run a block that may fail on one rank, and make every rank fail if any did.

        A lone rank that raises leaves the others in their next collective until the time-out; here the failure is agreed
        on first. The block must not contain collectives that the failing rank would skip.

        Args:
            what: the act, for the message on the ranks that did not fail.

        Raises:
            CoppiceError: the rank's own error, or on the other ranks one of the same kind that names the rank.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as e:
            failure = e
        try:
            told = self.gather_objects(None if failure is None else (type(failure).__name__, str(failure)))
        except (RuntimeError, dist.DistError) as e:
            # A rank is gone. What this rank knows of its own says more than the lost connection.
            if failure is not None:
                raise failure from None
            raise LaunchError(
                f"{what}: another rank is gone ({str(e).splitlines()[0]}): start the job again; it resumes from its newest "
                "checkpoint"
            ) from None
        failed = [rank for rank, message in enumerate(told) if message is not None]
        if failure is not None:
            if isinstance(failure, CoppiceError):
                failure.speaks = self.rank == failed[0]
            raise failure
        if failed:
            kind, message = told[failed[0]]
            error: CoppiceError = getattr(errors, kind, CoppiceError)(f"{what} failed on rank {failed[0]}: {message}")
            error.speaks = False
            raise error


def leave_job(joined: bool) -> None:
    """Destroy mcore's groups, and leave the process group if `join_job` joined it.

    No rank waits for another: one that failed leaves alone. Destroying a group of NCCL waits until its last collective is
    done, which it never is where another rank has not come; so while an error is on its way out of a job on several GPUs,
    its groups are left to the end of the process, at which torch gives them up.
    """
    lost = sys.exc_info()[0] is not None and dist.is_initialized() and dist.get_world_size() > 1
    if lost and dist.get_backend() == "nccl":
        return
    if parallel_state.model_parallel_is_initialized():
        _destroy_groups()
    if joined and dist.is_initialized():
        dist.destroy_process_group()
