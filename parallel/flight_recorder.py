"""torch's flight recorder: what the collectives of a rank were at, written down when one has failed or timed out.

torch keeps the last collectives of every process in memory. When one of NCCL's times out it writes them to a file by itself
and ends the process a minute later; when one of gloo's does, or a rank hangs for other reasons, `write_record` writes the
same file. `python -m torch.distributed.flight_recorder.fr_trace` reads the files of all ranks side by side.
"""

import contextlib
import io
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.errors import LaunchError

_PREFIX = "nccl-trace-rank-"
# Records that this process has written, and not torch by itself.
_ours: set[Path] = set()


def flight_recorder(records: Path | None) -> dict[str, str]:
    """Variables that keep the flight recorder on: what every rank was waiting for when a collective timed out.

    Under plain torchrun it is still in time to set them before the first group is made.

    Args:
        records: folder for what it writes, `nccl-trace-rank-R`; None leaves torch's (/tmp).
    """
    found = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if records is not None:
        # Torch adds the rank. The second name is the older one.
        prefix = f"{records.absolute()}/{_PREFIX}"
        found |= {"TORCH_FR_DUMP_TEMP_FILE": prefix, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix}
    return found


def record_path(rank: int | str) -> Path:
    """Where the record of a rank lies, once it is written: where torch was told to write it."""
    return Path(f"{os.environ.get('TORCH_FR_DUMP_TEMP_FILE', f'/tmp/{_PREFIX}')}{rank}")


def _dump() -> Callable[[], bytes] | None:
    """What gives the record of this process; None where torch keeps none (of gloo, older ones)."""
    # Here and not above: a launcher that only wants the variables has no use for torch.
    import torch

    ours: Any = torch._C._distributed_c10d
    nccl = getattr(ours, "_dump_nccl_trace", None) if torch.cuda.is_available() else None
    return nccl or getattr(ours, "_dump_fr_trace", None)


def write_record(rank: int) -> None:
    """Write what the collectives of this rank were at, where torch keeps a record and the folder can be written."""
    dump, path = _dump(), record_path(rank)
    with contextlib.suppress(OSError, RuntimeError):
        if dump is not None:
            # First: it is no news to whoever watches for torch's.
            _ours.add(path)
            path.write_bytes(dump())


class _Plain(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers, which is all there is in a record."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def open_collective(path: Path) -> str | None:
    """The first collective in a record that was not completed, in words; None if all were, or the record cannot be read.

    gloo marks none as completed, and a failed one as done with: the last one stands for it.
    """
    try:
        entries = _Plain(io.BytesIO(path.read_bytes())).load()["entries"]
        waiting = [entry for entry in entries if entry["state"] != "completed"]
        if not waiting:
            return None
        entry = next((entry for entry in waiting if not entry.get("retired")), waiting[-1])
        sizes = " ".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"])
        group, described = entry["process_group"][:2]
        name = described if described not in ("", "undefined") else group
        number = entry["p2p_seq_id"] if entry.get("is_p2p") else entry["collective_seq_id"]
        return f"{entry['profiling_name']} of {sizes} (number {number} of group {name})"
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def where_records_lie() -> str:
    """For the end of a message: the records of all ranks, and what reads them; empty where torch keeps none."""
    if _dump() is None:
        return ""
    whole = record_path("R")
    return (
        f"; what the collectives of each rank R were at: {whole}, side by side by `python -m "
        f"torch.distributed.flight_recorder.fr_trace -p {whole.name[:-1]} {whole.parent}`"
    )


def timed_out(rank: int, place: str, said: str = "") -> LaunchError:
    """What to tell of a rank whose collective has failed or timed out, though no other rank is known to be gone.

    Args:
        rank: that tells; its record is looked for.
        place: where it is.
        said: torch's own words, if it has spoken.
    """
    path = record_path(rank)
    there, collective = path.is_file(), open_collective(path)
    if collective or said or not there:
        what = f"rank {rank} waited in vain in {place}" + (f" for {collective}" if collective else "")
        what += f" ({said})" if said else ""
        what += ": another rank has not come to it, came to another one, or is gone"
    else:
        what = f"rank {rank} was in {place} with no collective open, while others waited for it in vain"
    found = LaunchError(
        f"{what}: start the job again, it resumes from its newest checkpoint; if a rank is only slow, raise "
        f"parallel.timeout_seconds{where_records_lie() if there else ''}"
    )
    # Every rank knows something of its own.
    found.speaks = True
    return found


class RecordWatch:
    """Looks whether torch has written this process's record by itself: one of NCCL's collectives has timed out.

    torch ends the process a minute after that (four times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC, in which all ranks get to
    write theirs), with words of its own that name neither the record nor what to do.

    Args:
        rank: of this process.
        found: called in a thread of its own, once.
        poll_seconds: between two looks; not often, because many ranks may look at one file system.
    """

    def __init__(self, rank: int, found: Callable[[], None], poll_seconds: float = 2.0) -> None:
        self._path, self._found, self._poll = record_path(rank), found, poll_seconds
        # One of an earlier start may lie there.
        self._before = self._stamp()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="flight recorder", daemon=True)

    def __enter__(self) -> "RecordWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def _watch(self) -> None:
        seen = self._before
        while not self._over.wait(self._poll):
            stamp = self._stamp()
            # Twice the same: it is complete.
            if stamp not in (None, self._before) and stamp == seen:
                if self._path not in _ours:
                    self._found()
                return
            seen = stamp
