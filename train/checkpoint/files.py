"""The files of a checkpoint: sealed when it is complete, checked before it is believed.

    manifest.json    lists every other file with its size and SHA-256
    complete.json    the SHA-256 of manifest.json; written last, removed first: without it nothing counts

A file that was cut, flipped, swapped, lost or taken from elsewhere is found before anything is loaded from it. One that is
not listed is none of the checkpoint's, and nothing reads it: editors and file systems leave some behind.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import CheckpointError

if TYPE_CHECKING:
    from train.checkpoint.folder import Manifest

MANIFEST = "manifest.json"
MARKER = "complete.json"
# What belongs to a published model besides its weights, in a run directory and in an imported checkpoint.
PUBLISHED = "huggingface"
# Names that say which rank wrote a file: tensors of torch_dist, and generator states.
_RANK = re.compile(r"(?:__|rank-)0*(\d+)(?:_\d+)*\.(?:distcp|pt)$")
# Torch's index of the tensors: the one file of a checkpoint that has a hidden name.
_INDEX = ".metadata"
# What is read where it is found, listed or not.
_READ_IF_THERE = ("tensors/common.pt", f"{PUBLISHED}/")
_READ_BYTES = 1 << 22
_FOLDER = re.compile(r"step-(\d{8})(?:-stage(\d+))?$")


def place_of(folder: Path) -> tuple[int, int] | None:
    """Step of a checkpoint, and stage of one that an expansion has made (else 0), by its name; None if it has another."""
    match = _FOLDER.match(folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def file_names(folder: Path) -> list[str]:
    """Every file in a checkpoint's folder but the two that seal it, relative to it, sorted.

    Hidden ones are left out, such as `.nfs...` and `.snapshot` of file systems, which come and go by themselves.

    Raises:
        OSError: if a folder cannot be read.
    """
    names = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(root, name) for name in files if name == _INDEX or not name.startswith(".")]
    found = (path.relative_to(folder).as_posix() for path in names)
    return sorted(name for name in found if name not in (MANIFEST, MARKER))


def _raise(error: OSError) -> None:
    raise error


def extra_files(folder: Path, files: Mapping[str, Sequence[Any]]) -> list[str]:
    """Files that lie in a checkpoint's folder and are not its own; nothing reads them.

    Args:
        folder: of the checkpoint.
        files: as its manifest lists them.

    Raises:
        OSError: if a folder cannot be read.
    """
    return [name for name in file_names(folder) if name not in files]


def written_by(names: Iterable[str], rank: int) -> list[str]:
    """The files that a rank wrote, so that it finds them in its own cache; what nobody's name is on is rank 0's."""
    mine = []
    for name in names:
        match = _RANK.search(name)
        if (int(match[1]) if match else 0) == rank:
            mine.append(name)
    return mine


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: if it cannot be read.
    """
    state = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            state.update(block)
    return state.hexdigest()


def digests(folder: Path, names: Sequence[str], threads: int = 4, *, flush: bool = False) -> dict[str, list[Any]]:
    """Size in bytes and SHA-256 of some files, by name; hashing lets go of Python's lock, so threads help.

    Args:
        folder: that holds them.
        names: relative to it.
        threads: that digest at once.
        flush: bring them to the disk as well, which works while they are digested.

    Raises:
        OSError: if one cannot be read, or the disk refuses.
    """
    many = max(1, min(threads, len(names)))
    with ThreadPoolExecutor(many) as pool, ThreadPoolExecutor(many) as disk:
        flushed = disk.map(lambda name: _flush(folder / name), names) if flush else iter(())
        sums = list(pool.map(lambda name: digest(folder / name), names))
        # What a thread has raised is raised here.
        list(flushed)
    return {name: [(folder / name).stat().st_size, value] for name, value in zip(names, sums, strict=True)}


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path, manifest: "Manifest", files: Mapping[str, Sequence[Any]]) -> None:
    """Write the manifest with the list of files, and then the marker.

    Args:
        folder: of the checkpoint, under its staging name.
        manifest: what it says about itself.
        files: `digests` of every other file.

    Raises:
        OSError: if the disk refuses.
    """
    text = json.dumps({**asdict(manifest), "files": dict(files)})
    _write(folder / MANIFEST, text)
    _write(folder / MARKER, json.dumps({"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))
    _flush(folder)


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def is_sealed(folder: Path) -> bool:
    """Whether a folder claims to be a complete checkpoint."""
    return (folder / MARKER).is_file()


def refuse_inside(option: str, path: Path) -> None:
    """Refuse to write inside a complete checkpoint: it is retired with all that lies in it.

    Args:
        option: the key or option that names the place, for the message.
        path: what would be written, or begun.

    Raises:
        CheckpointError: if it lies in a checkpoint, or is one.
    """
    place = path.resolve()
    for folder in (place, *place.parents):
        if is_sealed(folder):
            raise CheckpointError(
                f"{option}={path} lies in the checkpoint {folder}, which is complete and takes no other file: name a place "
                "outside it"
            )


def broken_seal(folder: Path) -> str | None:
    """What is wrong with the two files that seal a checkpoint; None if the manifest is what was written."""
    try:
        told = json.loads((folder / MARKER).read_text())["manifest_sha256"]
    except FileNotFoundError:
        return f"it is not a complete checkpoint: it has no {MARKER}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} is empty or damaged"
    try:
        found = digest(folder / MANIFEST)
    except FileNotFoundError:
        return f"it is not a complete checkpoint: it has no {MANIFEST}"
    except OSError as e:
        return f"{MANIFEST} cannot be read ({e.strerror})"
    return None if found == told else f"{MANIFEST} is not the one that was written"


def wrong_files(
    folder: Path, files: Mapping[str, Sequence[Any]], level: str, part: tuple[int, int] = (0, 1)
) -> str | None:
    """The first thing that is wrong with the files of a checkpoint; None if they are those that were written.

    Args:
        folder: of the checkpoint.
        files: as its manifest lists them.
        level: `sizes` looks at names and sizes, `digests` at contents too.
        part: (i, n) leaves the contents of all but every n-th file, from the i-th on, to others.
    """
    try:
        return _wrong_files(folder, files, level, part)
    except OSError as e:
        return f"{e.filename or folder} cannot be read ({e.strerror})"


def _size(path: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _wrong_files(folder: Path, files: Mapping[str, Sequence[Any]], level: str, part: tuple[int, int]) -> str | None:
    found = {name: _size(folder / name) for name in files}
    for name in files:
        if found[name] is None:
            return f"{name} is missing"
    for name in extra_files(folder, files):
        if name.startswith(_READ_IF_THERE):
            return f"{name} does not belong to it"
    for name, (size, _) in files.items():
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes instead of {size:,}"
    if level != "digests":
        return None
    mine = sorted(files, key=lambda name: (-int(files[name][0]), name))[part[0] :: part[1]]
    for name, (_, value) in digests(folder, mine).items():
        if value != files[name][1]:
            return f"{name} is damaged: its contents are not what was written"
    return None
