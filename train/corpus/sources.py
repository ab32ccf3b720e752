"""Files of a corpus: finding them, and opening them whether they are packed or not.

What: `find_sources` lists the files of the inputs (files, globs, folders, `stdlib`), `opened` gives the bytes of one,
unpacked.
Why: a corpus has to be the same on every machine, so a file's name does not hang on where the data lies, and a file
that changes, or ends too early, while it is read stops the build.
How: train/corpus/parts.py cuts the sources into parts of work, train/corpus/documents.py reads them.
"""

import bz2
import fnmatch
import glob
import gzip
import io
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from parallel.errors import DataError
from train.extras import optional_package

PACKED = (".gz", ".bz2", ".xz", ".zst")
# What folders are searched for; every name also packed.
DEFAULT_INCLUDE = (
    *(f"*{end}{packed}" for end in (".txt", ".md", ".rst", ".py", ".jsonl") for packed in ("", *PACKED)),
    "*.parquet",
)
STDLIB = "stdlib"
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
_BLOCK_BYTES = 1 << 20
_PACKED_BLOCK_BYTES = 1 << 17


@dataclass(frozen=True)
class Source:
    """One file to read."""

    path: Path
    name: str
    """Stable name, without the folders above the INPUT: the same on every machine, so the same documents are held
    out there."""
    size_bytes: int
    """On the disk, packed or not."""
    mtime_ns: int

    @property
    def packed(self) -> str:
        """The ending that says how the file is packed; empty when it is not."""
        return self.path.suffix if self.path.suffix in PACKED else ""

    @property
    def kind(self) -> str:
        """TEXT, JSONL or PARQUET, told by the name."""
        return {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}.get(self.ending, TEXT)

    @property
    def ending(self) -> str:
        """The ending of the name, in small letters and without that of the packing."""
        return Path(self.path.name.removesuffix(self.packed)).suffix.lower()


def find_sources(inputs: Sequence[str], include: Sequence[str]) -> tuple[list[Source], int]:
    """Lists the files of the inputs, in input order, folders and globs in sorted order.

    Args:
        inputs: files, globs, folders, or `stdlib`.
        include: globs for the files of a folder.

    Returns:
        The sources, each file once, and how many times a file was reached again.

    Raises:
        DataError: an input is missing, a folder cannot be read, no file matches, or a folder has a file packed and
            unpacked.
        ConfigError: a file needs a package that is not installed.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    labels: dict[str, int] = {}
    found = 0
    for entry in inputs:
        for path, name in _members(entry, include, labels):
            found += 1
            if (real := path.resolve()) not in seen:
                seen.add(real)
                sources.append(_source(path, name, entry))
    if not sources:
        raise DataError(f"INPUT {' '.join(inputs)}: no file in it matches --include {' '.join(include)}")
    return sources, found - len(sources)


def _source(path: Path, name: str, entry: str) -> Source:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    source = Source(path, name, status.st_size, status.st_mtime_ns)
    if source.packed == ".zst":
        optional_package("zstandard", f"INPUT {entry}: {path}")
    if source.kind == PARQUET:
        optional_package("pyarrow.parquet", f"INPUT {entry}: {path}", "parquet")
    return source


def _members(entry: str, include: Sequence[str], labels: dict[str, int]) -> list[tuple[Path, str]]:
    """The files of one INPUT with their names; `labels` counts the first parts of the names that were given out."""
    root = Path(sysconfig.get_paths()["stdlib"]) if entry == STDLIB else Path(entry)
    if not root.exists():
        if not glob.has_magic(entry):
            raise DataError(f"INPUT {entry}: no such file or folder")
        return _matching(entry, labels)
    if root.is_file():
        return [(root, _label(root.resolve().name, labels))]
    if not root.is_dir():
        raise DataError(f"INPUT {entry}: neither a file nor a folder (files are read twice): write it to a file first")
    if entry == STDLIB:
        files = list(_walk(root, ["*.py"], STDLIB_SKIPPED))
    else:
        files = list(_walk(root, include, frozenset()))
        _refuse_both_packings(entry, {name for _, name in files})
    label = _label(STDLIB if entry == STDLIB else root.resolve().name, labels)
    return [(path, f"{label}/{name}") for path, name in files]


def _label(name: str, labels: dict[str, int]) -> str:
    """A name not given out yet: a/part.jsonl and b/part.jsonl must not share document names."""
    labels[name] = labels.get(name, 0) + 1
    return name if labels[name] == 1 else f"{name}~{labels[name]}"


def _matching(pattern: str, labels: dict[str, int]) -> list[tuple[Path, str]]:
    """The files of a glob, named as if the folder before its first wildcard had been the INPUT."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    files = [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file()]
    if not files:
        raise DataError(f"INPUT {pattern}: no file matches")
    label = _label(root.resolve().name, labels)
    return [(path, f"{label}/{path.relative_to(root).as_posix()}") for path in files]


def _walk(root: Path, include: Sequence[str], skipped: frozenset[str]) -> Iterator[tuple[Path, str]]:
    """Yields path and slash-separated name under `root` of the wanted files; hidden files and folders are not taken."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for file in sorted(files):
            name = (Path(folder).relative_to(root) / file).as_posix()
            if not file.startswith(".") and any(
                fnmatch.fnmatchcase(name if "/" in glob else file, glob) for glob in include
            ):
                yield Path(folder) / file, name


def _refuse_both_packings(entry: str, names: set[str]) -> None:
    """Somebody who unpacked a file and kept the packed one does not mean to train on both."""
    for name in sorted(names):
        for packed in PACKED:
            if name.endswith(packed) and (plain := name.removesuffix(packed)) in names:
                raise DataError(
                    f"INPUT {entry}: holds {plain} and {name}: take one of them with --include, such as "
                    f"--include '*{Path(plain).suffix}'"
                )


@contextmanager
def opened(source: Source, unpack: bool = True) -> Iterator[BinaryIO]:
    """Opens a source; at the end it must still be what `find_sources` saw.

    Args:
        source: the file.
        unpack: give what is packed in it, not its own bytes.

    Raises:
        DataError: it cannot be read, is damaged or cut off, or changed since `find_sources` saw it.
    """
    try:
        with source.path.open("rb") as raw:
            _refuse_changed(source, raw)
            yield _unpacked(raw, source) if unpack and source.packed else raw
            _refuse_changed(source, raw)
    except (EOFError, zlib.error, lzma.LZMAError, _ZstdError) as error:
        raise _damaged(source, error) from error
    except OSError as error:
        if error.errno is None:  # what gzip and bz2 raise for bytes that are not theirs
            raise _damaged(source, error) from error
        raise DataError(f"cannot read {source.path}: {error.strerror}") from error


def _refuse_changed(source: Source, raw: IO[bytes]) -> None:
    status = os.fstat(raw.fileno())
    if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.mtime_ns):
        raise DataError(f"{source.path}: changed while the corpus was being built: run again")


def _damaged(source: Source, error: Exception) -> DataError:
    return DataError(f"{source.path}: damaged or cut off ({error}): copy the file again or leave it out")


def _unpacked(raw: BinaryIO, source: Source) -> BinaryIO:
    """A buffered stream of what a packed file holds; files of several streams one after the other are read through."""
    readers: dict[str, Callable[[BinaryIO], Any]] = {
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
        ".zst": lambda raw: _ZstdReader(raw, source),
    }
    stream = readers[source.packed](raw)
    return io.BufferedReader(stream, _BLOCK_BYTES)


class _ZstdError(Exception):
    """A zstandard stream that is damaged or ends too early."""


class _ZstdReader(io.RawIOBase):
    """Reads zstandard frames; unlike the package's own stream_reader, it tells a cut-off file from a whole one."""

    def __init__(self, raw: BinaryIO, source: Source) -> None:
        self._raw = raw
        self._package = optional_package("zstandard", f"INPUT {source.path}")
        self._frame: Any = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._packed = self._packed or self._raw.read(_PACKED_BLOCK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise _ZstdError("the last zstandard frame is not complete")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def _decompress(self) -> None:
        """Turns the packed bytes into text, up to the end of the frame."""
        if self._frame is None:
            self._frame = self._package.ZstdDecompressor().decompressobj()
        try:
            self._text, self._packed = memoryview(self._frame.decompress(self._packed)), b""
        except self._package.ZstdError as error:
            raise _ZstdError(str(error)) from error
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
