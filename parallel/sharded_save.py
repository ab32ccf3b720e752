"""Writes sharded state dicts as mcore's torch_dist checkpoints, at once or in the background, with torch's own writer.

mcore's writer is made for asynchronous saves in another process: it starts a multiprocessing manager per rank (3 s of
imports at the first save, left behind if the rank is killed), 0.16.1 forks a process per file, and both need psutil. Here
the parts of a save are torch's public planner and writer, called one by one, so that the one part that takes long and
needs no other rank can run in a thread:

    save = begin_save(state, directory, copy=True)       # collective: plan; the state may change afterwards
    thread = Thread(target=save.write)                    # this rank's files; no collectives
    ...                                                   # training goes on
    save.finish()                                         # collective: all ranks have written, or none of it counts
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from parallel.compat import agreed
from parallel.errors import CheckpointError


class SaveInProgress:
    """One save between its plan and its end.

    Args:
        request: of mcore: what to write, and what to do when all ranks have.
        directory: where.
    """

    def __init__(self, request: Any, directory: str) -> None:
        self._request, self._directory = request, directory
        self._failure: Exception | None = None
        self.written = False

    def write(self) -> None:
        """Write this rank's files; in any thread. A failure is kept for `finish`."""
        try:
            self._request.async_fn(*self._request.async_fn_args)
        except Exception as error:
            # Whatever it is, the ranks have to agree on it first.
            self._failure = error
        self.written = True

    def finish(self) -> None:
        """Complete the checkpoint; collective, after `write` has returned on this rank.

        Raises:
            CheckpointError: on all ranks, if any could not write its files.
        """
        with agreed():
            if self._failure is not None:
                first = str(self._failure).splitlines()[0] if str(self._failure) else type(self._failure).__name__
                raise CheckpointError(f"checkpoint {self._directory} cannot be written: {first}") from self._failure
        for finalize in self._request.finalize_fns:
            finalize()


def begin_save(
    sharded_state_dict: dict[str, Any],
    directory: str,
    *,
    parallel_group: dist.ProcessGroup | None = None,
    copy: bool = False,
) -> SaveInProgress:
    """Agree on who writes what; collective.

    Args:
        sharded_state_dict: `ShardedTensor`s and `ShardedObject`s of mcore, and plain values (rank 0's are written).
            Its factories are replaced by what they build.
        directory: where to write, on storage that all ranks see; created if need be. What is in it is overwritten.
        parallel_group: data-parallel group that shares out the writing of what its ranks hold alike; without one
            the main replica of each tensor writes it.
        copy: take copies in host memory of what this rank will write, so that the state may change meanwhile.

    Raises:
        CheckpointError: on all ranks, if the shards of some tensor do not fit together, or a rank cannot make the
            directory.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    sharded, _ = save_preprocess(sharded_state_dict, False)
    _check_shards(sharded, directory)
    strategy = _strategy(copy)
    if parallel_group is not None:
        strategy = FullyParallelSaveStrategyWrapper(strategy, parallel_group)
    with agreed():
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint {directory} cannot be written: {error}") from error
    request = dist_checkpointing.save(
        sharded_state_dict, directory, strategy, validate_access_integrity=False, async_sharded_save=True
    )
    return SaveInProgress(request, directory)


def save_sharded(
    sharded_state_dict: dict[str, Any], directory: str, *, parallel_group: dist.ProcessGroup | None = None
) -> None:
    """Write a sharded state dict as a torch_dist checkpoint; returns when all ranks have written.

    Args:
        sharded_state_dict: as in `begin_save`.
        directory: as in `begin_save`.
        parallel_group: as in `begin_save`.

    Raises:
        CheckpointError: on all ranks, if the shards do not fit together, or a rank cannot write its own.
    """
    save = begin_save(sharded_state_dict, directory, parallel_group=parallel_group)
    save.write()
    save.finish()


def _check_shards(sharded: dict[str, Any], directory: str) -> None:
    """Raises on all ranks if the main replicas do not cover every tensor exactly once; mcore raises on rank 0 only."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

    _, everyones = determine_global_metadata(sharded)
    with agreed():
        try:
            validate_sharding_integrity(everyones)
        except CheckpointingException as error:
            raise CheckpointError(f"checkpoint {directory} cannot be written: {error}") from error


@functools.cache
def _strategy(copy: bool) -> Any:
    """mcore's torch_dist format, planned here and written by whoever calls the request."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        TorchDistSaveShardedStrategy,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, ShardedTensor):
            return leaf
        return dataclasses.replace(leaf, data=leaf.data.detach().to("cpu", copy=True))

    class PlannedSave(TorchDistSaveShardedStrategy):
        def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
            by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
            with agreed(), _explained(str(checkpoint_dir)):
                if copy:
                    by_key = {key: [copied(leaf) for leaf in leaves] for key, leaves in by_key.items()}
            planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            writer = FileSystemWriter(checkpoint_dir)
            state = mcore_to_pyt_state_dict(by_key, False)
            plan, metadata = _planned(state, planner, writer, str(checkpoint_dir))
            results: list[Any] = []

            def write() -> None:
                futures = writer.write_data(plan, planner)
                futures.wait()
                results.extend(futures.value())

            def finish() -> None:
                rank = dist.get_rank()
                everyones: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
                dist.gather_object(results, everyones)
                with agreed(), _explained(str(checkpoint_dir)):
                    if everyones is not None:
                        writer.finish(metadata, everyones)

            return AsyncRequest(write, (), [finish])

    return PlannedSave("torch_dist", 1)


@contextlib.contextmanager
def _explained(directory: str) -> Iterator[None]:
    """Turn what a rank's memory or disk refuses into an error that the ranks can agree on."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {directory} cannot be written: {first}") from error


def _planned(state: dict[str, Any], planner: Any, writer: FileSystemWriter, directory: str) -> tuple[Any, Any]:
    """This rank's part of the plan; on rank 0 the metadata of the whole too; collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with agreed(), _explained(directory):
        planner.set_up_planner(state, storage_meta=writer.storage_meta(), is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        mine = writer.prepare_local_plan(planner.create_local_plan())
    plans: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, plans)
    metadata = None
    with agreed(), _explained(directory):
        if plans is not None:
            plans, metadata = planner.create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
    box: list[Any] = [None]
    dist.scatter_object_list(box, plans)
    return planner.finish_plan(box[0]), metadata
