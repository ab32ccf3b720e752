"""mcore's index files: those that a stopped job left half-written are dropped, and a disk that refuses them is named.

What: `drop_broken` before the first dataset is built, `built` around every building of one.
Why: mcore writes an index straight under its final name and takes any file of that name for a whole one, so that a job
killed there would never start again; and it tells of a full disk in a traceback.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from parallel.errors import DataError


def drop_broken(cache: Path) -> list[str]:
    """Remove index files that are not whole; mcore makes them again. For one process, before others read there.

    Args:
        cache: folder of the index files; need not exist.

    Returns:
        Names of the files that were removed.

    Raises:
        DataError: if one cannot be removed.
    """
    broken = []
    for path in sorted(cache.glob("*.npy")):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            broken.append(path)
    try:
        for path in broken:
            path.unlink()
    except OSError as e:
        raise DataError(f"{e.filename} is damaged and cannot be removed ({e.strerror}): remove it") from None
    return [path.name for path in broken]


@contextlib.contextmanager
def built(cache: Path) -> Iterator[None]:
    """Around the building of a dataset, which writes its index.

    Args:
        cache: folder of the index files.

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
