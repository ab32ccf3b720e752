"""Parts: the work of reading a corpus, cut into pieces of about equal size that any process can do.

What: `plan_parts` cuts large JSONL files at line ends and Parquet files at row groups, and joins small files.
Why: processes share the parts out, and a build that was stopped goes on with those it had not finished. The cuts
follow from the files alone, not from the number of processes, and no byte of the corpus hangs on them.
How: `parts = plan_parts(sources, "text", workers.map)`; train/corpus/documents.py reads one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from parallel.errors import DataError
from train.corpus.sources import JSONL, PARQUET, TEXT, Source, opened
from train.extras import optional_package

VERSION = 1  # of the rules below; another one makes the parts of a stopped build useless
SMALLEST_BYTES, LARGEST_BYTES = 4 << 20, 256 << 20
WANTED_PARTS = 1024
MOST_PIECES = 4096
UNPACKED_RATIO = 4  # guessed size of packed text; only the evenness of the parts hangs on it
# A packed file cannot be entered in the middle: each piece unpacks what is before it, half the file on average.
PACKED_PIECES = 16
_BLOCK_BYTES = 1 << 20

Map = Callable[[Callable[[Source], list["Piece"]], Sequence[Source]], Iterable[list["Piece"]]]


@dataclass(frozen=True)
class Piece:
    """A file or a run of its lines or rows."""

    source: Source
    weight_bytes: int
    """About how much text it has."""
    start: int = 0
    """JSONL: offset of the first line in the unpacked file. Parquet: first row group."""
    stop: int | None = None
    """Where the next piece starts; None: the end of the file."""
    first: int = 1
    """Number of the first line or row, counted from 1."""


Part = tuple[Piece, ...]


def plan_parts(sources: Sequence[Source], text_key: str, run: Map) -> list[Part]:
    """Cuts the sources into parts, in order: the documents of all parts are the documents of all sources.

    Args:
        sources: the files.
        text_key: the column of Parquet files that must be there and hold text.
        run: an ordered map over sources, which may use other processes.

    Raises:
        DataError: a file cannot be read, or is a Parquet file without that column.
    """
    total = sum(source.size_bytes * (UNPACKED_RATIO if source.packed else 1) for source in sources)
    wanted = min(max(total // WANTED_PARTS, SMALLEST_BYTES), LARGEST_BYTES)
    large = [source for source in sources if _is_cut(source, wanted)]
    cut = dict(zip(large, run(partial(_cut, text_key, wanted), large), strict=True))
    parts: list[Part] = []
    pieces: list[Piece] = []
    weight = 0
    for source in sources:
        for piece in cut.get(source) or [_whole(source)]:
            pieces.append(piece)
            weight += piece.weight_bytes
            if len(pieces) == MOST_PIECES or weight >= wanted:
                parts.append(tuple(pieces))
                pieces, weight = [], 0
    return [*parts, tuple(pieces)] if pieces else parts


def _whole(source: Source) -> Piece:
    return Piece(source, source.size_bytes * (UNPACKED_RATIO if source.packed else 1))


def _is_cut(source: Source, wanted_bytes: int) -> bool:
    return source.kind == PARQUET or (source.kind == JSONL and _whole(source).weight_bytes > wanted_bytes)


def _cut(text_key: str, wanted_bytes: int, source: Source) -> list[Piece]:
    """The pieces of one file; runs in any process."""
    assert source.kind != TEXT
    if source.kind == PARQUET:
        return _cut_parquet(source, text_key, wanted_bytes)
    with opened(source) as stream:
        cuts, size_bytes = cut_lines(stream, wanted_bytes)
    if source.packed:
        cuts = cuts[:: -(-len(cuts) // PACKED_PIECES)]
    stops: list[int | None] = [*(start for start, _ in cuts[1:]), None]
    return [
        Piece(source, (size_bytes if stop is None else stop) - start, start, stop, line)
        for (start, line), stop in zip(cuts, stops, strict=True)
    ]


def cut_lines(stream: BinaryIO, wanted_bytes: int) -> tuple[list[tuple[int, int]], int]:
    """Reads a stream through and finds where to cut it: at the first line end after every `wanted_bytes`.

    Returns:
        Offset and number (from 1) of the first line of every piece, and the size of the stream in bytes.
    """
    cuts = [(0, 1)]
    offset, line, target = 0, 1, wanted_bytes
    while block := stream.read(_BLOCK_BYTES):
        at = 0
        while target <= offset + len(block) and (end := block.find(b"\n", max(target - offset - 1, at))) >= 0:
            line += block.count(b"\n", at, end + 1)
            at = end + 1
            cuts.append((offset + at, line))
            target = offset + at + wanted_bytes
        line += block.count(b"\n", at)
        offset += len(block)
    if cuts[-1][0] == offset and len(cuts) > 1:
        cuts.pop()
    return cuts, offset


def _cut_parquet(source: Source, text_key: str, wanted_bytes: int) -> list[Piece]:
    with opened(source, unpack=False) as stream:
        file = open_parquet(source, stream)
        _refuse_column(source, file.schema_arrow, text_key)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        # By path: a column with columns inside takes more than one place.
        paths = [groups[0].column(place).path_in_schema for place in range(groups[0].num_columns)] if groups else []
        pieces: list[Piece] = []
        start, first, row, weight = 0, 1, 1, 0
        for number, group in enumerate(groups, start=1):
            weight += group.column(paths.index(text_key)).total_uncompressed_size
            row += group.num_rows
            if weight >= wanted_bytes or number == len(groups):
                pieces.append(Piece(source, weight, start, number, first))
                start, first, weight = number, row, 0
    return pieces or [Piece(source, 0, 0, 0)]


def open_parquet(source: Source, stream: BinaryIO) -> Any:
    """A pyarrow ParquetFile.

    Raises:
        DataError: it is something else, damaged or cut off.
    """
    pyarrow = optional_package("pyarrow", f"INPUT {source.path}", "parquet")
    parquet = optional_package("pyarrow.parquet", f"INPUT {source.path}", "parquet")
    try:
        return parquet.ParquetFile(stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged_parquet(source, error) from error


def damaged_parquet(source: Source, error: Exception) -> DataError:
    """What is said of a Parquet file that pyarrow cannot read."""
    reason = str(error).partition("\n")[0]
    return DataError(f"{source.path}: not a Parquet file, damaged or cut off ({reason}): copy it again or leave it out")


def _refuse_column(source: Source, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        columns = ", ".join(schema.names[:8]) or "none"
        raise DataError(
            f"{source.path}: no column {text_key!r} (columns: {columns}): name the text's column with --text-key"
        )
    kind = schema.field(text_key).type
    # A dictionary is how a column of few different texts is stored; its texts are the values.
    name = str(getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind)
    if name not in ("string", "large_string", "string_view"):
        raise DataError(f"{source.path}: column {text_key!r} holds {kind} instead of string: choose with --text-key")
