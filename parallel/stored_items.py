"""Reads boxes of the tensors that lie in the files of a torch_dist checkpoint, each an archive of `torch.save`.

torch's own reader loads an archive whole for every part of it that is asked for: a tensor of 64 experts, stored in one
piece and wanted expert by expert, would be read 64 times. Here the bytes of a box are read from where they lie in the file
into the tensor that wants them.

    with StoredItems(folder) as items:
        items.read_into(Item("__0_0.distcp", 0, 4096), Box((4, 0), (2, 64)), target)
"""

import ctypes
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast

import torch

from parallel.regions import Box, first_element

_OPEN_FILES = 16
# A box whose stretches of consecutive elements are shorter is cut out of the whole item.
_SHORTEST_READ_BYTES = 1 << 16


class Item(NamedTuple):
    """Where one archive lies."""

    file: str
    offset: int
    length: int


class _Place(NamedTuple):
    """What an archive holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    # Where the elements begin in the file; None where they do not lie there in order.
    begin: int | None


def _run(box: Box, shape: Sequence[int]) -> int:
    """How many elements of a box are consecutive in the flattened tensor."""
    count = 1
    for wanted, size in zip(reversed(box.shape), reversed(shape), strict=True):
        count *= wanted
        if wanted != size:
            break
    return count


class _Window(io.RawIOBase):
    """One archive inside a file of many."""

    def __init__(self, file: io.RawIOBase, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = 0
        # The kernel gives at most 2 GiB at a time, and torch takes less than it asked for as the end of the archive.
        while count < len(view) and (more := self._file.readinto(view[count:])):
            count += more
        self._at += count
        return count


class StoredItems:
    """The archives of one checkpoint.

    Args:
        directory: that holds the files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, io.RawIOBase] = {}
        self._places: dict[Item, _Place] = {}
        self._last: tuple[Item, torch.Tensor] | None = None

    def __enter__(self) -> "StoredItems":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._last = None
        self._close_files()

    def _close_files(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, name: str) -> io.RawIOBase:
        file = self._open.get(name)
        if file is None:
            if len(self._open) == _OPEN_FILES:
                self._close_files()
            # Unbuffered: reads are large, or go through a window's few headers.
            file = self._open[name] = open(self._directory / name, "rb", buffering=0)  # noqa: SIM115
        return file

    def window(self, item: Item) -> IO[bytes]:
        """An item as a file of its own; good until the next call of anything here.

        Raises:
            OSError: if the file cannot be opened.
        """
        return cast(IO[bytes], _Window(self._file(item.file), item.offset, item.length))

    def place(self, item: Item) -> _Place:
        """Shape and type of an item's tensor, and where its elements begin.

        Raises:
            One of `UNREADABLE` (`parallel/safe_pickle.py`): if the item is not an archive of one tensor.
        """
        if item not in self._places:
            # On the meta device torch reads the description and notes where the data would have come from.
            tensor = self._load(item, "meta")
            begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
            if begin is not None and tensor.is_contiguous():
                begin += item.offset + tensor.storage_offset() * tensor.element_size()
                if begin + tensor.nbytes > item.offset + item.length:
                    raise EOFError("it ends early")
            else:
                begin = None
            self._places[item] = _Place(tuple(tensor.shape), tensor.dtype, begin)
        return self._places[item]

    def read_into(self, item: Item, box: Box, target: torch.Tensor) -> None:
        """Fill a tensor with a box of an item's.

        Memory: at most another `target`; an item whose elements lie out of order, or in whose file the box is scattered
        in small stretches, is read whole, and kept until another one is.

        Args:
            item: of one tensor.
            box: a block of it.
            target: of the box's shape; anywhere, of any type.

        Raises:
            One of `UNREADABLE` (`parallel/safe_pickle.py`): if the file cannot be read, or is not what it should be.
        """
        shape, dtype, begin = self.place(item)
        run = _run(box, shape)
        if begin is None or (run != box.numel and run * dtype.itemsize < _SHORTEST_READ_BYTES):
            whole = self._whole(item)
            for axis, (first, count) in enumerate(zip(*box, strict=True)):
                whole = whole.narrow(axis, first, count)
            target.copy_(whole)
        else:
            self._read_runs(self._file(item.file), _Place(shape, dtype, begin), box, target)

    def _read_runs(self, file: io.RawIOBase, place: _Place, box: Box, target: torch.Tensor) -> None:
        """Read a box, one stretch of consecutive elements after another."""
        if _run(box, place.shape) != box.numel:
            axis = next(axis for axis, count in enumerate(box.shape) if count != 1)
            before, after = box.shape[:axis], box.shape[axis + 1 :]
            for i in range(box.shape[axis]):
                offset = (*box.offset[:axis], box.offset[axis] + i, *box.offset[axis + 1 :])
                self._read_runs(file, place, Box(offset, (*before, 1, *after)), target.narrow(axis, i, 1))
            return
        ready = target.is_cpu and target.dtype == place.dtype and target.is_contiguous()
        memory = target if ready else torch.empty(box.shape, dtype=place.dtype)
        assert place.begin is not None
        at = place.begin + first_element(place.shape, box) * place.dtype.itemsize
        _fill(file, at, _bytes_of(memory))
        if not ready:
            target.copy_(memory)

    def _whole(self, item: Item) -> torch.Tensor:
        """All of an item; the last one is kept."""
        if self._last is None or self._last[0] != item:
            # The old one goes first: there is room for one.
            self._last = None
            self._last = item, self._load(item, "cpu")
        return self._last[1]

    def _load(self, item: Item, device: str) -> torch.Tensor:
        tensor = torch.load(self.window(item), map_location=device, weights_only=True)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"it holds a {type(tensor).__name__}, not a tensor")
        return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which must outlive it. (`numpy()` would forbid its storage to be resized.)"""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _fill(file: io.RawIOBase, at: int, view: memoryview) -> None:
    """Read bytes from a place in a file until a buffer is full."""
    file.seek(at)
    while len(view):
        # The kernel gives at most 2 GiB at a time.
        count = file.readinto(view)
        if not count:
            raise EOFError("the file ends early")
        view = view[count:]
