"""mcore's index files: those that are not what was written are dropped, and a disk that refuses them is named.

What: `drop_broken` before the first dataset is built, `built` around every building of one. The process that writes an index
keeps the digest of each file in `digests.json` beside them; what is not on record there is not trusted.
Why: mcore writes an index straight under its final name, does not wait for the disk, and takes any file of that name for a
whole one. A job killed there would never start again, and flipped or zeroed contents are another order of the data, which
no error tells of. It also tells of a full disk in a traceback.
"""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from train.checkpoint.files import digests
from train.run_files import write_json

RECORD = "digests.json"


def drop_broken(cache: Path) -> list[str]:
    """Remove index files that are not what was written; mcore makes them again. For one process, before others read there.

    Every file is read once, which takes seconds for the largest corpora.

    Args:
        cache: folder of the index files; need not exist.

    Returns:
        Names of the files that were removed.

    Raises:
        DataError: if one cannot be removed.
    """
    record = _recorded(cache)
    paths = sorted(cache.glob("*.npy"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(_digest, paths))
    broken = [path for path, told in zip(paths, found, strict=True) if told is None or told != record.get(path.name)]
    if not broken:
        return []
    # First, so that what is made anew after a kill in between is recorded anew.
    _write(cache, {name: told for name, told in record.items() if cache / name not in broken})
    try:
        for path in broken:
            path.unlink()
    except OSError as e:
        raise DataError(f"{e.filename} is damaged and cannot be removed ({e.strerror}): remove it") from None
    return [path.name for path in broken]


@contextlib.contextmanager
def built(cache: Path, *, records: bool) -> Iterator[None]:
    """Around the building of a dataset, which writes its index.

    Args:
        cache: folder of the index files.
        records: whether this process is the one that writes there, and keeps the record.

    Raises:
        DataError: if the disk refuses, which mcore tells without the reason, or in numpy's words.
    """
    try:
        yield
    except Exception as e:
        disk = e if isinstance(e, OSError) else e.__cause__
        if not isinstance(disk, OSError):
            raise
        raise DataError(
            f"{cache}: the index of the samples cannot be written or read ({disk.strerror or disk}): make room, or choose "
            "another folder"
        ) from e
    if records:
        # Other ranks are past the building already; what could not be recorded is only made again by the next start.
        with contextlib.suppress(DataError, OSError):
            _record_new(cache)


def _record_new(cache: Path) -> None:
    record = _recorded(cache)
    new = [path.name for path in sorted(cache.glob("*.npy")) if path.name not in record]
    if new:
        _write(cache, {**record, **digests(cache, new)})


def _recorded(cache: Path) -> dict[str, Any]:
    """Size and digest of index files by name; nothing where there is no record that can be read."""
    try:
        record = json.loads((cache / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _digest(path: Path) -> list[Any] | None:
    try:
        return digests(path.parent, [path.name])[path.name]
    except OSError:
        return None


def _write(cache: Path, record: dict[str, Any]) -> None:
    # Of files that somebody has removed nothing need be known.
    write_json(cache / RECORD, {name: told for name, told in record.items() if (cache / name).exists()})
