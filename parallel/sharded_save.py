"""Writes sharded state dicts as mcore's torch_dist checkpoints, at once or in the background, with torch's own writer.

mcore's writer is made for asynchronous saves in another process: it starts a multiprocessing manager per rank (3 s of
imports at the first save, left behind if the rank is killed), 0.16.1 forks a process per file, and both need psutil. Here
the parts of a save are torch's public planner and writer, called one by one, so that the one part that takes long and
needs no other rank can run in a thread:

    save = begin_save(state, directory, copy=True)       # collective: plan; the state may change afterwards
    thread = Thread(target=save.write)                    # this rank's files; no collectives
    ...                                                   # training goes on
    save.finish()                                         # collective: all ranks have written, or none of it counts

The files are then in the system's cache. Whoever counts on them after a crash flushes them (`train/checkpoint/files.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from parallel.compat import save_without_crc
from parallel.errors import CheckpointError
from parallel.sharded_load import agreed

# A rank writes up to so many files at once, of at least so many bytes each: copying into the system's cache, and digesting
# a file later, keep one core busy each.
_FILES, _FILE_BYTES = 4, 1 << 28


@dataclasses.dataclass
class KnownPlan:
    """The plan of one save, for the next of the same tensors from the same places: agreeing on it takes most of the time.

    Attributes:
        signature: of what this rank has described.
        mine: which of it this rank writes, counted in the order of the description.
        plan: how.
        metadata: of the whole checkpoint; on rank 0.
    """

    signature: bytes = b""
    mine: Sequence[int] = ()
    plan: SavePlan | None = None
    metadata: Metadata | None = None


class _Request(NamedTuple):
    """What is left to do of a save that is planned."""

    async_fn: Callable[..., None]
    async_fn_args: tuple[Any, ...]
    finalize_fns: list[Callable[[], None]]


class SaveInProgress:
    """One save between its plan and its end.

    Args:
        request: what to write, and what to do when all ranks have.
        directory: where.
    """

    def __init__(self, request: _Request, directory: str) -> None:
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
    known: KnownPlan | None = None,
) -> SaveInProgress:
    """Agree on who writes what; collective.

    Args:
        sharded_state_dict: `ShardedTensor`s and `ShardedObject`s of mcore, and plain values (rank 0's are written).
            Its factories are replaced by what they build.
        directory: where to write, on storage that all ranks see; created if need be. What is in it is overwritten.
        parallel_group: data-parallel group that shares out the writing of what its ranks hold alike; without one
            the main replica of each tensor writes it.
        copy: take copies in host memory of what this rank will write, so that the state may change meanwhile.
        known: of the last save, used again if all ranks describe the same as then, and replaced otherwise. It must be
            another one for another `parallel_group`.

    Raises:
        CheckpointError: on all ranks, if the shards of some tensor do not fit together, or a rank cannot make the
            directory.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import mcore_to_pyt_state_dict

    sharded, plain = save_preprocess(sharded_state_dict, False)
    leaves = list(nested_values(sharded))
    known = known or KnownPlan()
    signature = _signature(leaves)
    hits: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hits, known.signature == signature)
    if not all(hits):
        known.signature = b""
        _check_shards(sharded, directory)
        known.mine = _share_out(sharded, leaves, parallel_group)
    with agreed(), _explained(directory):
        os.makedirs(directory, exist_ok=True)
        by_key: dict[str, list[Any]] = defaultdict(list)
        for i in known.mine:
            leaf = leaves[i]
            by_key[getattr(leaf, "unique_key", leaf.key)].append(_copied(leaf) if copy else leaf)
        state = mcore_to_pyt_state_dict(by_key, False)
        if not copy and torch.cuda.is_initialized():
            # Whoever writes reads on another stream, which does not wait for what was computed on this one.
            torch.cuda.current_stream().synchronize()
        planner, writer = _planner(), _writer(directory)
        planner.set_up_planner(state, storage_meta=writer.storage_meta(), is_coordinator=dist.get_rank() == 0)
        writer.set_up_storage_writer(dist.get_rank() == 0, rank=dist.get_rank(), use_collectives=True)
    if not all(hits):
        known.plan, known.metadata = _planned(planner, writer, directory)
        known.signature = signature
    plan, common = planner.finish_plan(known.plan), io.BytesIO()
    torch.save(plain, common)
    return SaveInProgress(_request(plan, planner, writer, known.metadata, common.getvalue()), directory)


def _request(
    plan: SavePlan, planner: Any, writer: FileSystemWriter, metadata: Metadata | None, common: bytes
) -> _Request:
    """What is left to do: this rank's files, and then, together, the index and the mark of a complete checkpoint."""
    results: list[Any] = []
    directory, rank = str(writer.path), dist.get_rank()

    def write() -> None:
        if rank == 0:
            # Where 0.16 keeps what is not sharded; 0.19 reads it too where it finds it.
            with open(os.path.join(directory, "common.pt"), "wb") as file:
                file.write(common)
        parts = _parts(plan)
        # Not torch's own threads: what one of them raises is lost, and its part of the checkpoint with it.
        with ThreadPoolExecutor(len(parts), initializer=save_without_crc) as pool:
            for written in pool.map(lambda part: writer.write_data(part, planner).wait(), parts):
                results.extend(written)

    def finish() -> None:
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        everyones: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(results, everyones)
        with agreed(), _explained(directory):
            if everyones is not None and metadata is not None:
                # torch writes into it where everything lies.
                writer.finish(dataclasses.replace(metadata), everyones)
                save_config(CheckpointingConfig("torch_dist", 1), directory)

    return _Request(write, (), [finish])


def _parts(plan: SavePlan) -> list[SavePlan]:
    """A rank's plan, one file each, of about the same size."""
    sizes = [_bytes_of(item) for item in plan.items]
    count = max(1, min(_FILES, sum(sizes) // _FILE_BYTES))
    if count == 1:
        return [plan]
    loads, dealt = [0] * count, [[] for _ in range(count)]  # type: tuple[list[int], list[list[WriteItem]]]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        file = loads.index(min(loads))
        loads[file] += sizes[i]
        dealt[file].append(plan.items[i])
    names = [dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{i}_") for i in range(count)]
    # Few large tensors may not fill as many files.
    parts = [(items, name) for items, name in zip(dealt, names, strict=True) if items]
    return [dataclasses.replace(plan, items=items, storage_data=name) for items, name in parts]


def _bytes_of(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _writer(directory: str) -> FileSystemWriter:
    """torch's writer, one that neither waits for the disk nor copies ahead from a GPU.

    Who calls the checkpoint complete flushes its files. With copies ahead it would wait for a stream even if there is
    nothing to copy. In a thread of its own that is the stream of the first GPU, whichever is this rank's, and would end a
    capture of CUDA graphs.
    """
    return FileSystemWriter(directory, sync_files=False, per_thread_copy_ahead=0)


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


def _signature(leaves: Sequence[Any]) -> bytes:
    """A digest of everything that decides how this rank's part is written, besides the numbers in it."""
    state = hashlib.sha256()
    for leaf in leaves:
        fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if field.name != "data"}
        state.update(repr((type(leaf).__name__, sorted(fields.items()))).encode())
    return state.digest()


def _share_out(sharded: dict[str, Any], leaves: Sequence[Any], group: dist.ProcessGroup | None) -> list[int]:
    """Which leaves this rank writes; collective in the group. Marks them as main replicas."""
    from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
    from megatron.core.dist_checkpointing.mapping import is_main_replica
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        distribute_main_replicas_with_precomputed_distribution as distribute,
    )

    if group is not None:
        distribute(sharded, group, determine_main_replica_uniform_distribution(sharded, group))
    return [i for i, leaf in enumerate(leaves) if is_main_replica(leaf.replica_id)]


def _copied(leaf: Any) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if not isinstance(leaf, ShardedTensor):
        return leaf
    return dataclasses.replace(
        leaf, data=leaf.data.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    )


def _planner() -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    return MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)


@contextlib.contextmanager
def _explained(directory: str) -> Iterator[None]:
    """Turn what a rank's memory or disk refuses into an error that the ranks can agree on."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {directory} cannot be written: {first}") from error


def _planned(planner: Any, writer: FileSystemWriter, directory: str) -> tuple[SavePlan, Metadata | None]:
    """This rank's part of the plan; on rank 0 the metadata of the whole too; collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with agreed(), _explained(directory):
        mine = writer.prepare_local_plan(planner.create_local_plan())
    plans: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, plans)
    metadata = None
    with agreed(), _explained(directory):
        if plans is not None:
            plans, metadata = planner.create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
            _check_whole(metadata, directory)
    box: list[Any] = [None]
    dist.scatter_object_list(box, plans)
    return box[0], metadata


def _check_whole(metadata: Metadata, directory: str) -> None:
    """Refuse a gap, which torch overlooks on one rank and mcore where shards are of different sizes."""
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if held != math.prod(stored.size):
                raise CheckpointError(
                    f"checkpoint {directory} cannot be written: the ranks hold {held:,} of {math.prod(stored.size):,} "
                    f"elements of {key}"
                )
