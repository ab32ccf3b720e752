"""Reads and writes the files of a torch_dist checkpoint piece by piece: one process, no process group, bounded memory.

Why: loading and saving as mcore does it needs every tensor whole in some rank's memory. Here a caller names a box of a
stored tensor and gets its bytes straight from where they lie in a file, and hands over new tensors a box at a time. Not
torch's planner and writer for the latter: that writer keeps the last piece of every tensor until its file is complete.

The format is torch's own: `.metadata` says which box of which tensor lies where in which `.distcp` file, and each box is
an archive of `torch.save`. What mcore adds to make it a checkpoint of its own is in `parallel/compat.py`.

How to use:

    with StoredTensors(folder) as stored:
        rows = stored.read("decoder.layers.0.mlp.router.weight", Box((4, 0), (2, 64)))
    with TensorWriter(other) as writer:
        for box in pieces((8, 64), 4, chunk_bytes):
            writer.add(key, (8, 64), box, tensor)
        writer.finish()
"""

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from parallel.errors import CheckpointError
from parallel.regions import Box, intersect
from parallel.safe_pickle import UNREADABLE, read_index, unreadable
from parallel.stored_items import Item, StoredItems

# Files are begun anew at this size, so that many ranks that load have many files to read from.
_FILE_BYTES = 4 << 30


def pieces(shape: Sequence[int], itemsize: int, chunk_bytes: int) -> Iterator[Box]:
    """Cut a tensor into boxes of at most `chunk_bytes` each, in the order of its elements, without gaps.

    Rows of the first axis stay whole where one fits; a larger row is cut along the next axis, and so on. So each box is
    a run of consecutive elements of the flattened tensor.

    Args:
        shape: of the tensor.
        itemsize: bytes per element.
        chunk_bytes: the limit; an element is never cut.
    """
    room = max(1, chunk_bytes // itemsize)
    whole = tuple(shape)
    if math.prod(whole) <= room:
        yield Box((0,) * len(whole), whole)
        return
    row = math.prod(whole[1:])
    if row <= room:
        step, zeros = room // row, (0,) * (len(whole) - 1)
        for first in range(0, whole[0], step):
            yield Box((first, *zeros), (min(step, whole[0] - first), *whole[1:]))
        return
    for first in range(whole[0]):
        for part in pieces(whole[1:], itemsize, chunk_bytes):
            yield Box((first, *part.offset), (1, *part.shape))


def close_flushed(file: IO[bytes] | None) -> None:
    """Close a file once its bytes are on the disk; nothing where none is open."""
    if file is not None:
        file.flush()
        os.fsync(file.fileno())
        file.close()


class _Shard(NamedTuple):
    """A stored box of a tensor, and the archive that holds it."""

    box: Box
    item: Item


class StoredTensor(NamedTuple):
    """Shape and type of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


class StoredTensors:
    """The tensors of a checkpoint, read a box at a time.

    Args:
        directory: folder of a torch_dist checkpoint.

    Attributes:
        tensors: key -> shape and type, in the order in which they lie in the files.

    Raises:
        CheckpointError: if the index cannot be read, or a file is missing or shorter than the index says.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = read_index(directory)
        self._shards: dict[str, list[_Shard]] = {}
        known: dict[str, StoredTensor] = {}
        for key, stored in index.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                known[key] = StoredTensor(tuple(stored.size), stored.properties.dtype)
                self._shards[key] = [self._shard(index, key, chunk) for chunk in stored.chunks]
                if sum(shard.box.numel for shard in self._shards[key]) != math.prod(stored.size):
                    raise CheckpointError(f"checkpoint {directory} does not hold all of {key}: use another checkpoint")
        order = sorted(known, key=lambda key: min((s.item for s in self._shards[key]), default=Item("", 0, 0)))
        self.tensors = {key: known[key] for key in order}
        self._check_files()
        self._items = StoredItems(directory)

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._items.__exit__(kind, error, trace)

    def _shard(self, index: Metadata, key: str, chunk: ChunkStorageMetadata) -> _Shard:
        info = (index.storage_data or {}).get(MetadataIndex(key, chunk.offsets))
        if info is None or getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"checkpoint {self._directory} holds {key} in a form that cannot be read in pieces (compressed, or without "
                "its place in a file): use a checkpoint that Coppice wrote"
            )
        return _Shard(Box(tuple(chunk.offsets), tuple(chunk.sizes)), Item(info.relative_path, info.offset, info.length))

    def _check_files(self) -> None:
        """Before anything is done with the first of them."""
        ends: dict[str, int] = {}
        for shards in self._shards.values():
            for _, item in shards:
                ends[item.file] = max(ends.get(item.file, 0), item.offset + item.length)
        for name, end in ends.items():
            path = self._directory / name
            try:
                size = path.stat().st_size
            except OSError as e:
                raise CheckpointError(f"{path} cannot be read ({e.strerror}): use another checkpoint") from None
            if size < end:
                raise CheckpointError(f"{path} is truncated, {size:,} of {end:,} bytes: use another checkpoint")

    def read(self, key: str, box: Box) -> torch.Tensor:
        """A box of a tensor, shaped as the box.

        Raises:
            CheckpointError: as `read_into`.
        """
        tensor = torch.empty(box.shape, dtype=self.tensors[key].dtype)
        self.read_into(key, box, tensor)
        return tensor

    def read_into(self, key: str, box: Box, target: torch.Tensor) -> None:
        """Fill a tensor with a box of a stored one.

        Memory: as `StoredItems.read_into`.

        Args:
            key: of the stored tensor.
            box: any block of it.
            target: contiguous, on CPU, of the box's shape and the stored type.

        Raises:
            CheckpointError: if a file cannot be read, or does not hold what the index says.
        """
        filled = 0
        for shard in self._shards[key]:
            common = intersect(shard.box, box)
            if common is None:
                continue
            there = Box(tuple(c - s for c, s in zip(common.offset, shard.box.offset, strict=True)), common.shape)
            here = target
            for axis, (first, at, count) in enumerate(zip(box.offset, *common, strict=True)):
                here = here.narrow(axis, at - first, count)
            try:
                self._read_shard(key, shard, there, here)
            except UNREADABLE as e:
                raise unreadable(self._directory / shard.item.file, e, key) from e
            filled += common.numel
        if filled != box.numel:
            raise CheckpointError(f"checkpoint {self._directory} does not hold all of {key}: use another checkpoint")

    def _read_shard(self, key: str, shard: _Shard, box: Box, target: torch.Tensor) -> None:
        """Fill `target` with a box of a shard, counted from the shard's first element."""
        place = self._items.place(shard.item)
        if place.shape != shard.box.shape or place.dtype != self.tensors[key].dtype:
            raise ValueError(f"it holds {list(place.shape)} {place.dtype}, not {list(shard.box.shape)}")
        self._items.read_into(shard.item, box, target)


class TensorWriter:
    """Writes tensors a box at a time; nothing stays in memory. Complete once `finish` has returned.

    Args:
        directory: an existing folder.
        file_bytes: size after which another file is begun.
    """

    def __init__(self, directory: Path, file_bytes: int = _FILE_BYTES) -> None:
        self._directory, self._file_bytes = directory, file_bytes
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._files = 0
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            # Left open by an error; what it could not flush is lost with it.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def add(self, key: str, shape: Sequence[int], box: Box, tensor: torch.Tensor) -> None:
        """Write a box of a tensor.

        Args:
            key: of the whole tensor.
            shape: of the whole tensor.
            box: where this part lies in it; the boxes of a tensor must not overlap.
            tensor: the part, on CPU, contiguous, alone in its memory.

        Raises:
            CheckpointError: if the disk is full, or fails.
        """
        properties = TensorProperties(dtype=tensor.dtype)
        whole = self._tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size(shape), []))
        index = MetadataIndex(key, box.offset, len(whole.chunks))
        whole.chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)))
        with self._writing():
            file = self._current()
            offset = file.tell()
            torch.save(tensor, file)
            length = file.tell() - offset
        info = _StorageInfo(os.path.basename(file.name), offset, length)
        self._results.append(WriteResult(index, length, info))

    def _current(self) -> io.BufferedWriter:
        if self._file is not None and self._file.tell() >= self._file_bytes:
            close_flushed(self._file)
            self._file = None
        if self._file is None:
            # As torch names the files of rank 0.
            self._file = open(self._directory / f"__0_{self._files}.distcp", "wb")  # noqa: SIM115 (`close_flushed` closes it)
            self._files += 1
        return self._file

    def finish(self) -> None:
        """Flush to disk and write the index.

        Raises:
            CheckpointError: if the disk is full, or fails, or a tensor is not complete.
        """
        for key, whole in self._tensors.items():
            if sum(math.prod(chunk.sizes) for chunk in whole.chunks) != math.prod(whole.size):
                raise CheckpointError(
                    f"checkpoint {self._directory} was given only a part of {key}: it is not complete"
                )
        with self._writing():
            close_flushed(self._file)
            self._file = None
            writer = FileSystemWriter(self._directory)
            writer.set_up_storage_writer(True)
            writer.finish(Metadata(state_dict_metadata=dict(self._tensors)), [self._results])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch.save closes its archive on the way out, and what that raises hides the cause.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise CheckpointError(
                f"checkpoint {self._directory} cannot be written ({cause.strerror or cause}): free space, or choose another "
                "folder"
            ) from error
