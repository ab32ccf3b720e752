"""Documents of a corpus: reading the texts of a part.

What: `read_part` yields the documents of a part, bad ones with what is wrong with them.
Why: a corpus must never lose or change a document without a word, so every fault has its file and line, and whoever
reads decides whether it stops the build or is counted.
How: train/corpus/splits.py reads every part to check it, train/corpus/encoding.py to tokenize it.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from train.corpus.parts import Part, Piece, damaged_parquet, open_parquet
from train.corpus.sources import JSONL, TEXT, opened
from train.extras import optional_package

LONGEST_DOCUMENT_BYTES = 2**31 - 2  # an .idx file stores lengths as int32, the end-of-document token included
BAD_BYTES = -1  # the size of a document with a fault
_BLOCK_BYTES = 1 << 20
_ROWS = 256  # of a Parquet file in memory at once; documents may be long


class _Fault(Exception):
    """What is wrong with one document."""


@dataclass(frozen=True)
class Document:
    """One text: a whole file, one line of a JSONL file or one row of a Parquet file."""

    name: str
    text: str
    """Empty when there was nothing but white space."""
    bytes: int
    """Length in UTF-8; BAD_BYTES when there is a fault."""
    fault: str | None = None
    """File, line and what is wrong there; None when nothing is."""


def read_part(part: Part, text_key: str) -> Iterator[Document]:
    """Reads the documents of a part in order, empty and bad ones included.

    Raises:
        DataError: unreadable, damaged or changed file.
    """
    for piece in part:
        reader = {TEXT: _read_text, JSONL: _read_lines}.get(piece.source.kind, _read_rows)
        yield from reader(piece, text_key)


def _read_text(piece: Piece, text_key: str) -> Iterator[Document]:
    """The whole file is one document."""
    source, place = piece.source, str(piece.source.path)
    with opened(source) as stream:
        try:
            if not source.packed:
                _refuse_long(source.size_bytes, place)  # before it fills the memory
            data = stream.read(LONGEST_DOCUMENT_BYTES + 1)
            start = len(data) - len(_unmarked(data))
            text, size_bytes = _measured(_decoded(data[start:], place, start, count_lines=True), place)
            if source.ending == ".json":
                _refuse_lines(text, place)
        except _Fault as fault:
            yield Document(source.name, "", BAD_BYTES, str(fault))
        else:
            yield Document(source.name, text, size_bytes)


def _read_lines(piece: Piece, text_key: str) -> Iterator[Document]:
    """Every line is a JSON object; lines of white space are no documents."""
    with opened(piece.source) as stream:
        _skip(stream, piece)
        offset = piece.start
        for number, line in enumerate(stream, start=piece.first):
            if line.strip():
                place = f"{piece.source.path}:{number}"
                name = f"{piece.source.name}:{number}"
                start = len(line) - len(_unmarked(line)) if offset == 0 else 0
                try:
                    line_text = _decoded(line[start:], place, offset + start)
                    text, size_bytes = _measured(_json_text(line_text, place, text_key), place)
                except _Fault as fault:
                    yield Document(name, "", BAD_BYTES, str(fault))
                else:
                    yield Document(name, text, size_bytes)
            offset += len(line)
            if offset == piece.stop:
                return


def _skip(stream: BinaryIO, piece: Piece) -> None:
    """Goes to the first line of the piece: packed files have to be unpacked up to there."""
    if not piece.source.packed:
        stream.seek(piece.start)
        return
    left = piece.start
    while left and (block := stream.read(min(left, _BLOCK_BYTES))):
        left -= len(block)


def _read_rows(piece: Piece, text_key: str) -> Iterator[Document]:
    """Every row of a Parquet file is a document."""
    source = piece.source
    number = piece.first
    with opened(source, unpack=False) as stream:
        for value in _column(piece, stream, text_key):
            name, place = f"{source.name}:{number}", f"{source.path}:{number}"
            try:
                if value is None:
                    raise _Fault(f"{place}: no text in column {text_key!r} of this row")
                text, size_bytes = _measured(_decoded(value, place), place)
            except _Fault as fault:
                yield Document(name, "", BAD_BYTES, str(fault))
            else:
                yield Document(name, text, size_bytes)
            number += 1


def _column(piece: Piece, stream: BinaryIO, text_key: str) -> Iterator[bytes | None]:
    """The text column of a run of row groups, as bytes: the file does not promise that they are UTF-8."""
    pyarrow = optional_package("pyarrow", f"INPUT {piece.source.path}", "parquet")
    file = open_parquet(piece.source, stream)
    groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
    try:
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[text_key], use_threads=False):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            yield from column.cast(pyarrow.large_binary()).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged_parquet(piece.source, error) from error


def _unmarked(data: bytes) -> bytes:
    """The start of a file without its byte order mark."""
    return data.removeprefix(codecs.BOM_UTF8)


def _decoded(data: bytes, place: str, offset: int = 0, count_lines: bool = False) -> str:
    """Decodes bytes.

    Args:
        data: bytes of one document.
        place: file, and line or row if there is one.
        offset: where the bytes start in what `place` names.
        count_lines: tell the line of a bad byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f":{data[: error.start].count(10) + 1}" if count_lines else ""
        raise _Fault(
            f"{place}{line}: not UTF-8 text at byte offset {offset + error.start} (0x{data[error.start]:02x}): "
            "convert the file to UTF-8 or leave it out"
        ) from error


def _json_text(line: str, place: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"{place}: not a JSON object ({error})") from error
    if not isinstance(record, dict):
        raise _Fault(f"{place}: a JSON {type(record).__name__} instead of an object with the key {key!r}")
    if key not in record:
        keys = ", ".join(sorted(record)[:8]) or "none"
        raise _Fault(f"{place}: no key {key!r} (keys: {keys}): name the text's key with --text-key")
    text = record[key]
    if not isinstance(text, str):
        raise _Fault(f"{place}: key {key!r} holds a JSON {type(text).__name__} instead of a string")
    return text


def _refuse_lines(text: str, place: str) -> None:
    """JSON lines under a name that promises one JSON value, as some published corpora have, are no single document."""
    lines = text.split("\n", 2)[:2]
    try:
        if len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines):
            raise _Fault(
                f"{place}: every line is a JSON object, not the file: let its name end in .jsonl (a link will do)"
            )
    except (ValueError, RecursionError):
        return  # one value over several lines: text like any other


def _measured(text: str, place: str) -> tuple[str, int]:
    """The text, empty if it is nothing but white space, and its length in UTF-8."""
    if not text or text.isspace():
        return "", 0
    try:
        size_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise _Fault(f"{place}: character {error.start} of the text is a lone surrogate, not Unicode text") from error
    _refuse_long(size_bytes, place)
    return text, size_bytes


def _refuse_long(size_bytes: int, place: str) -> None:
    if size_bytes > LONGEST_DOCUMENT_BYTES:
        raise _Fault(
            f"{place}: a document of {size_bytes} bytes, the format takes {LONGEST_DOCUMENT_BYTES}: split it into "
            "several files, lines or rows"
        )
