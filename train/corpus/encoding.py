"""Tokenizing a part of a corpus into a file of its own, in any process.

What: `encode_part` writes the tokens of the chosen documents of a part to NUMBER.bin and their lengths to NUMBER.npy;
`finished_part` tells whether that was done, `read_encoded` gives the tokens back.
Why: parts that are finished stay when a build is stopped. The .npy appears last and at once, on the disk: it says
that the part is whole.
How: train/corpus/build.py shares the tasks out and joins the files in order.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from parallel.errors import DataError
from train.corpus.documents import Document, read_part
from train.corpus.parts import Part
from train.data.tokenizers import Tokenizer, build_tokenizer

BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once


@dataclass(frozen=True)
class TokenizerTask:
    """What a process needs to build the tokenizer; the file is the copy in the staging folder, which nobody changes."""

    spec: str
    eod: int
    digest: str


@dataclass(frozen=True)
class EncodeTask:
    """One part to tokenize."""

    number: int
    part: Part
    text_key: str
    sizes: npt.NDArray[Any]
    """Bytes per document as the first pass found them, 0 or below for those without text (int64)."""
    chosen: npt.NDArray[np.bool_]
    """Documents to tokenize."""
    tokenizer: TokenizerTask
    append_eod: bool
    dtype: str
    """numpy name of the type of a token."""
    folder: Path


@dataclass(frozen=True)
class Encoded:
    """What became of a task."""

    documents: int
    tokens: int
    text_bytes: int


def encode_part(task: EncodeTask) -> Encoded:
    """Tokenizes one part.

    Raises:
        DataError: a file changed since the first pass, or is gone.
        OSError: the files cannot be written.
    """
    tokenizer = _tokenizer(task.tokenizer)
    ending = np.array([tokenizer.eod] if task.append_eod else [], dtype=task.dtype)
    lengths: list[int] = []
    text_bytes = 0
    tokens, marks = _paths(task.folder, task.number)
    with _appearing(tokens) as stream:
        for batch in _batches(task):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            lengths += [len(ids) + len(ending) for ids in encoded]
            text_bytes += sum(document.bytes for document in batch)
            pieces = [piece for ids in encoded for piece in (ids, ending)]
            stream.write(np.concatenate(pieces).astype(task.dtype).data)
    with _appearing(marks) as stream:
        np.save(stream, np.array(lengths, dtype=np.int64))
    return Encoded(len(lengths), sum(lengths), text_bytes)


@functools.lru_cache(maxsize=1)
def _tokenizer(task: TokenizerTask) -> Tokenizer:
    """The tokenizer, built once per process."""
    tokenizer = build_tokenizer(task.spec, eod=task.eod)
    if tokenizer.digest != task.digest:
        raise DataError(f"--tokenizer={task.spec}: changed while the corpus was being built: run again")
    return tokenizer


def _batches(task: EncodeTask) -> Iterator[list[Document]]:
    """The chosen documents, some megabytes at a time; they must be what the first pass saw."""
    batch: list[Document] = []
    batch_bytes = number = 0
    for number, document in enumerate(read_part(task.part, task.text_key), start=1):
        if number > len(task.sizes) or document.bytes != task.sizes[number - 1]:
            raise DataError(f"{document.name}: changed while the corpus was being built: run again")
        if task.chosen[number - 1]:
            batch.append(document)
            batch_bytes += document.bytes
            if batch_bytes >= BATCH_BYTES:
                yield batch
                batch, batch_bytes = [], 0
    if number != len(task.sizes):
        raise DataError(f"{task.part[-1].source.path}: changed while the corpus was being built: run again")
    if batch:
        yield batch


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:07}.bin", folder / f"{number:07}.npy"


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name once it is whole and on the disk."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(path)


def finished_part(task: EncodeTask) -> Encoded | None:
    """What an earlier command made of a task; None if it did not finish it.

    Raises:
        DataError: the files of the part are damaged.
    """
    tokens, marks = _paths(task.folder, task.number)
    if not marks.exists():
        return None
    lengths = np.load(marks)
    total = int(lengths.sum())
    if len(lengths) != task.chosen.sum() or tokens.stat().st_size != total * np.dtype(task.dtype).itemsize:
        raise DataError(f"{tokens}: damaged: delete the folder {task.folder} and run again")
    return Encoded(len(lengths), total, int(task.sizes[task.chosen].sum()))


def read_encoded(task: EncodeTask) -> Iterator[npt.NDArray[Any]]:
    """The tokens of each document of a finished part, in order."""
    tokens, marks = _paths(task.folder, task.number)
    lengths = np.load(marks)
    # An empty file cannot be mapped.
    data = np.memmap(tokens, dtype=task.dtype, mode="r") if lengths.any() else np.empty(0, dtype=task.dtype)
    end = 0
    for length in lengths.tolist():
        yield data[end : end + length]
        end += length
