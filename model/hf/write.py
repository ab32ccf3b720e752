"""Writes safetensors as a stream: shards of limited size and their index, with a piece of a tensor in memory at a time.

The library writes a file from tensors that are all in memory. Its format is a header of sizes and offsets and then the
tensors' bytes, so with the sizes known beforehand a file can be written in order (huggingface.co/docs/safetensors, Format).

    writer = ShardWriter(folder, {"lm_head.weight": ((128, 64), torch.bfloat16)}, shard_bytes=5 << 30)
    for name in writer.order:
        writer.begin(name)
        writer.append(piece)            # as often as it takes
    writer.finish()
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from model.hf.source import DTYPES, INDEX, SINGLE
from parallel.errors import CheckpointError
from parallel.stream_files import close_flushed

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 8


class ShardWriter:
    """The shards of one model.

    Args:
        folder: exists.
        tensors: name -> shape and type, in the order in which they will be written.
        shard_bytes: size of a shard; a larger tensor has a shard for itself.

    Attributes:
        order: names in the order in which they have to be written.
        total_bytes: of all tensors.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int
    ) -> None:
        self._folder, self._tensors, self.order = folder, dict(tensors), list(tensors)
        shards: list[list[str]] = []
        room = 0
        for name in self.order:
            size = self._bytes(name)
            if not shards or size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(name)
            room -= size
        self._shards = shards
        self.total_bytes = sum(self._bytes(name) for name in self.order)
        self._file: IO[bytes] | None = None
        self._next = 0
        self._left = 0

    def _bytes(self, name: str) -> int:
        shape, dtype = self._tensors[name]
        return math.prod(shape) * dtype.itemsize

    def file_of(self, shard: int) -> str:
        """Name of a shard's file, as published models have it."""
        return SINGLE if len(self._shards) == 1 else f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def begin(self, name: str) -> None:
        """Go on with the next tensor."""
        if self._left or self.order[self._next] != name:
            raise AssertionError(
                f"{name} is out of turn: {self.order[self._next]} is next, {self._left} bytes are owed"
            )
        for number, shard in enumerate(self._shards):
            if shard[0] == name:
                self._open(number)
        self._next += 1
        self._left = self._bytes(name)

    def append(self, piece: torch.Tensor) -> None:
        """Write the next elements of the current tensor.

        Args:
            piece: contiguous, on CPU, of the tensor's type.
        """
        data = piece.reshape(-1).view(torch.uint8).numpy().data
        if len(data) > self._left or self._file is None:
            raise AssertionError(f"{len(data)} bytes given, {self._left} owed")
        self._file.write(data)
        self._left -= len(data)

    def _open(self, number: int) -> None:
        close_flushed(self._file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in self._shards[number]:
            shape, dtype = self._tensors[name]
            end = at + self._bytes(name)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN)
        self._file = open(self._folder / self.file_of(number), "wb")  # noqa: SIM115 (`close_flushed` closes it)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def finish(self) -> None:
        """Flush, and write the index where there are several shards.

        Raises:
            CheckpointError: if a tensor was not written.
        """
        close_flushed(self._file)
        self._file = None
        if self._left or self._next != len(self.order):
            raise CheckpointError(
                f"{self._folder} is not complete: {len(self.order) - self._next} tensors were not written"
            )
        if len(self._shards) > 1:
            where = {name: self.file_of(number) for number, shard in enumerate(self._shards) for name in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2))
