"""What a checkpoint may have unpickled: descriptions of tensors, tensors and plain values; nothing that runs code.

Why: `.metadata` and every item of a torch_dist checkpoint are pickles, and a pickle can name any function to call. torch
reads `.metadata` with `pickle.load` and items of bytes with `weights_only=False`, mcore's readers go through both. Here
are replacements, not checks before use: what is read is read once, and by these.

    index = read_index(folder)                    # `.metadata`
    values = load_plain(folder / "common.pt")     # an archive of `torch.save`: tensors, numbers, text, lists, dicts
    IndexReader(folder, index)                    # for torch's and mcore's own ways of loading
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from parallel.errors import CheckpointError
from parallel.regions import Box
from parallel.stored_items import Item, StoredItems

# Every global that an index of tensors is made of, as torch 2.13 to 2.15 write it, besides the types of elements.
_INDEX_GLOBALS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    # Where it was written; Python 3.13 has another name for the module.
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip
# How torch names a global that `weights_only` does not let through.
_WANTED = re.compile(r"GLOBAL ([\w.]+)")
# What torch.load raises on an archive that is damaged or not one.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError,
              pickle.UnpicklingError)  # fmt: skip


class _Refused(pickle.UnpicklingError):
    """A file asks for what no checkpoint needs."""


class _IndexUnpickler(pickle.Unpickler):
    """Lets a pickle build nothing but torch's descriptions of stored tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_GLOBALS.get(module, ()):
            # Python 3.11 and 3.12 have no pathlib._local.
            return getattr(importlib.import_module(module.removesuffix("._local")), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Refused(f"{module}.{name}")


def read_index(directory: str | Path) -> Metadata:
    """What `.metadata` says of a checkpoint's tensors and files. No code in it is run.

    Raises:
        CheckpointError: if it is missing, damaged, hostile, or of a kind that this torch does not know.
    """
    path = Path(directory) / ".metadata"
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
    except _Refused as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    # A field that this torch does not know is a TypeError or an AttributeError, depending on its class.
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        pickle.UnpicklingError,
    ) as e:
        raise CheckpointError(f"checkpoint {directory} cannot be read by torch {torch.__version__}: {e}") from e
    for info in (index.storage_data or {}).values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{path} names the file {name!r}, which is not in its folder: it is damaged or malicious; do not load it"
            )
    return index


def load_plain(source: Path | IO[bytes], name: str | Path | None = None) -> Any:
    """Read an archive of `torch.save` that holds tensors and plain values, to CPU. No code in it is run.

    Args:
        source: a file, or an open one.
        name: what to call it in errors, where `source` has no path.

    Raises:
        CheckpointError: naming the file, if it asks for anything else, is damaged, or cannot be read.
    """
    name = source if name is None and isinstance(source, Path) else name
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise unreadable(name, error) from None


def unreadable(path: Any, error: BaseException, what: str = "") -> CheckpointError:
    """What to raise for a file that `torch.load(..., weights_only=True)` fails on.

    Args:
        path: of the file.
        error: one of `UNREADABLE`.
        what: was being read.
    """
    text = str(error)
    wanted = _WANTED.search(text)
    if isinstance(error, pickle.UnpicklingError) and wanted:
        return CheckpointError(_refusal(path, wanted[1]))
    # torch's own words come after some advice to load it anyway.
    why = text.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()
    subject = f"{path}: {what}" if what else path
    return CheckpointError(
        f"{subject} cannot be read ({why[0] if why else type(error).__name__}): use another checkpoint"
    )


def _refusal(path: Any, wanted: str) -> str:
    return f"{path}: it wants {wanted}, which no checkpoint needs: it is damaged or malicious; do not load it"


class IndexReader(FileSystemReader):
    """torch's reader of checkpoints, with an index that `read_index` has read.

    Args:
        directory: of the checkpoint.
        index: its own.
    """

    def __init__(self, directory: str | Path, index: Metadata) -> None:
        super().__init__(directory)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, whichever of its names torch asks for; no file is read."""
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan asks for, each part of an item by itself and straight into its place where that is on CPU.

        Raises:
            CheckpointError: naming the file, if one cannot be read, or is not what the index says.
        """
        places = self.storage_data
        if any(places[request.storage_index].transform_descriptors for request in plan.items):
            # Compressed by an extension of torch.
            return super().read_data(plan, planner)

        def item_of(request: ReadItem) -> Item:
            info = places[request.storage_index]
            return Item(info.relative_path, info.offset, info.length)

        with StoredItems(Path(self.path)) as stored:
            for request in sorted(plan.items, key=item_of):
                item = item_of(request)
                try:
                    if request.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(request, io.BytesIO(stored.window(item).read()))
                        continue
                    target = planner.resolve_tensor(request).detach()
                    box = Box(tuple(request.storage_offsets), tuple(request.lengths))
                    stored.read_into(item, box, target)
                    planner.commit_tensor(request, target)
                except UNREADABLE as e:
                    raise unreadable(Path(self.path) / item.file, e, request.storage_index.fqn) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_bytes(self, key: str) -> Any:
        """The value of an item of bytes, as `load_plain` reads it.

        Raises:
            CheckpointError: as `load_plain`.
        """
        (info,) = (info for at, info in (self._index.storage_data or {}).items() if at.fqn == key)
        path = Path(self.path) / info.relative_path
        try:
            with StoredItems(Path(self.path)) as stored:
                content = stored.window(Item(info.relative_path, info.offset, info.length)).read()
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read ({e.strerror}): use another checkpoint") from None
        return load_plain(io.BytesIO(content), f"{path} ({key})")
