"""Documents of a corpus: finding the files, reading them, and choosing which are held out.

What: `find_sources` lists the files of the inputs, `read_documents` yields their texts, `scan` and `assign_splits`
decide for every document whether it is trained on, held out or left out.
Why: the choice has to be the same on every machine and in every order of work, so it hangs on a document's own name
and the seed; and a bad byte in the last file has to stop a build before it wrote the first one.
How: train/corpus.py runs the four in this order, and `read_documents` once more to write.
"""

import codecs
import fnmatch
import hashlib
import json
import os
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import DataError

DEFAULT_INCLUDE = ("*.txt", "*.md", "*.rst", "*.py", "*.jsonl")
STDLIB = "stdlib"
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
LONGEST_DOCUMENT_BYTES = 2**31 - 2  # an .idx file stores lengths as int32, the end-of-document token included
LEFT_OUT, TRAIN, VALID = 0, 1, 2  # what becomes of a document


@dataclass(frozen=True)
class Source:
    """One file to read."""

    path: Path
    name: str
    """Stable name, without the folders above the INPUT: the same on every machine, so the same documents are held
    out there."""


@dataclass(frozen=True)
class Document:
    """One text: a whole file or one line of a JSONL file."""

    name: str
    text: str
    """Empty when there was nothing but white space."""
    bytes: int
    """Length in UTF-8."""


def find_sources(inputs: Sequence[str], include: Sequence[str]) -> tuple[list[Source], int]:
    """Lists the files of the inputs, in input order, folders walked in sorted order.

    Args:
        inputs: files, folders, or `stdlib`.
        include: globs for the files of a folder.

    Returns:
        The sources, each file once, and how many times a file was reached again.

    Raises:
        DataError: an input is missing, a folder cannot be read, or no file matches.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    labels: dict[str, int] = {}
    found = 0
    for entry in inputs:
        root = Path(sysconfig.get_paths()["stdlib"]) if entry == STDLIB else Path(entry)
        if not root.exists():
            raise DataError(f"INPUT {entry}: no such file or folder")
        if not root.is_dir() and not root.is_file():
            raise DataError(
                f"INPUT {entry}: neither a file nor a folder (files are read twice): write it to a file first"
            )
        label = STDLIB if entry == STDLIB else root.resolve().name
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:  # a/part.jsonl and b/part.jsonl must not share document names
            label = f"{label}~{labels[label]}"
        if entry == STDLIB:
            members = [(path, f"{label}/{name}") for path, name in _walk(root, ["*.py"], STDLIB_SKIPPED)]
        elif root.is_dir():
            members = [(path, f"{label}/{name}") for path, name in _walk(root, include, frozenset())]
        else:
            members = [(root, label)]
        for path, name in members:
            found += 1
            if (real := path.resolve()) not in seen:
                seen.add(real)
                sources.append(Source(path, name))
    if not sources:
        raise DataError(f"INPUT {' '.join(inputs)}: no file in it matches --include {' '.join(include)}")
    return sources, found - len(sources)


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


def read_documents(sources: Iterable[Source], text_key: str) -> Iterator[Document]:
    """Reads the documents of all sources in order, empty ones included.

    Raises:
        DataError: unreadable file, text that is not UTF-8, or a JSONL line that is not an object with the text key;
            the message has the file and the byte or line.
    """
    for source in sources:
        try:
            with source.path.open("rb") as stream:
                if source.path.suffix == ".jsonl":
                    offset = 0
                    for number, line in enumerate(stream, start=1):
                        if line.strip():
                            text = _json_text(_decode(line, source.path, offset), f"{source.path}:{number}", text_key)
                            yield _document(f"{source.name}:{number}", text, f"{source.path}:{number}")
                        offset += len(line)
                else:
                    _refuse_long(os.fstat(stream.fileno()).st_size, str(source.path))  # before it fills the memory
                    yield _document(source.name, _decode(stream.read(), source.path, 0), str(source.path))
        except OSError as error:
            raise DataError(f"cannot read {source.path}: {error.strerror}") from error


def _decode(data: bytes, path: Path, offset: int) -> str:
    """Decodes bytes that start at `offset` of the file; a byte order mark at its start is dropped."""
    if offset == 0 and data.startswith(codecs.BOM_UTF8):
        data, offset = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise DataError(
            f"{path}: not UTF-8 text at byte offset {place} (0x{data[error.start]:02x}): "
            "convert the file to UTF-8 or leave it out"
        ) from error


def _json_text(line: str, place: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: a JSON {type(record).__name__} instead of an object with the key {key!r}")
    if key not in record:
        keys = ", ".join(sorted(record)[:8]) or "none"
        raise DataError(f"{place}: no key {key!r} (keys: {keys}): name the text's key with --text-key")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{place}: key {key!r} holds a JSON {type(text).__name__} instead of a string")
    return text


def _document(name: str, text: str, place: str) -> Document:
    if not text or text.isspace():
        return Document(name, "", 0)
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(
            f"{place}: character {error.start} of the text is a lone surrogate, not Unicode text"
        ) from error
    _refuse_long(size, place)
    return Document(name, text, size)


def _refuse_long(size_bytes: int, place: str) -> None:
    if size_bytes > LONGEST_DOCUMENT_BYTES:
        raise DataError(
            f"{place}: a document of {size_bytes} bytes, the format takes {LONGEST_DOCUMENT_BYTES}: split it into "
            "several files or JSONL lines"
        )


def scan(documents: Iterable[Document], seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The first pass: reads everything once, so that bad input is found before anything is written.

    Returns:
        Sizes in bytes (0: empty) [documents] and two random 64-bit numbers drawn from seed and name [documents, 2].
    """
    sizes, draws = array("q"), array("Q")
    for document in documents:
        digest = hashlib.blake2b(f"{seed}\0{document.name}".encode(), digest_size=16).digest()
        sizes.append(document.bytes)
        draws.append(int.from_bytes(digest[:8], "little"))
        draws.append(int.from_bytes(digest[8:], "little"))
    return np.frombuffer(sizes, dtype=np.int64), np.frombuffer(draws, dtype=np.uint64).reshape(-1, 2)


def assign_splits(
    sizes: npt.NDArray[Any], draws: npt.NDArray[Any], fraction: float, limit_bytes: int | None
) -> npt.NDArray[Any]:
    """Decides for every document whether it is left out, trained on or held out.

    A document is held out when its own draw is below `fraction`, so adding documents moves none of the others; the
    exception is that two or more documents always leave at least one on each side.

    Args:
        sizes: bytes per document, 0 for empty ones.
        draws: two uniform 64-bit numbers per document: for the split, and for the order of the sample.
        fraction: expected share of held-out documents; 0 for none.
        limit_bytes: cap on the text taken: documents are taken in the order of their draw while they fit.

    Returns:
        LEFT_OUT, TRAIN or VALID per document (uint8).
    """
    codes = np.zeros(len(sizes), dtype=np.uint8)
    taken = np.flatnonzero(sizes)
    if limit_bytes is not None:
        room, chosen = limit_bytes, []
        for index in taken[np.argsort(draws[taken, 1], kind="stable")].tolist():
            if sizes[index] <= room:
                room -= int(sizes[index])
                chosen.append(index)
        taken = np.array(sorted(chosen), dtype=np.int64)
    codes[taken] = TRAIN
    if fraction > 0 and len(taken) >= 2:
        draw = draws[taken, 0]
        held_out = draw < np.uint64(int(fraction * 2**64))
        if not held_out.any():
            held_out[np.argmin(draw)] = True
        if held_out.all():
            held_out[np.argmax(draw)] = False
        codes[taken[held_out]] = VALID
    return codes


def reread_documents(
    sources: Sequence[Source], text_key: str, sizes: npt.NDArray[Any], codes: npt.NDArray[Any]
) -> Iterator[tuple[int, Document]]:
    """Reads the documents again, with what was decided about each.

    Args:
        sources: as in the first pass.
        text_key: as in the first pass.
        sizes: bytes per document as the first pass found them.
        codes: LEFT_OUT, TRAIN or VALID per document; those left out are not given.

    Raises:
        DataError: a file changed since the first pass.
    """
    number = 0
    for document in read_documents(sources, text_key):
        if number >= len(sizes) or document.bytes != sizes[number]:
            raise DataError(f"{document.name}: changed while the corpus was being built: run again")
        if codes[number] != LEFT_OUT:
            yield int(codes[number]), document
        number += 1
    if number != len(sizes):
        raise DataError(f"{sources[-1].path}: lost documents while the corpus was being built: run again")
