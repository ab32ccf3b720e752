"""The run directory: where each file lies, and the only code that reads or writes its JSONL files.

A run leaves lines behind (metrics, expert load, events) that must survive a kill at any instant. Each line is one
system call, so at most the last line of a file can be torn; reading forgives that one and nothing else, and the next
append or resume moves it aside. After a resume `metrics.jsonl` and `expert_load.jsonl` hold each step once: the lines a
restarted run repeats are moved to `*.superseded.jsonl`, never deleted. `events.jsonl` is append-only.

Usage, on rank 0 only:

    files = RunFiles(run_dir)
    files.prepare()
    files.append_metrics({"step": 1, "stage": 0, "lm_loss": 9.1})
    files.append_event("checkpoint", step=1, path="checkpoints/step-00000001", seconds=0.4, bytes=1024)
    files.truncate_after(1)  # on resume from step 1
"""

import json
import math
import numbers
import os
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from train.checkpoint.files import refuse_inside

# A request to stop the run, where signals do not reach its ranks.
STOP_FILE = "stop"
DIRECTORY_MODE = 0o700
FILE_MODE = 0o644
# One for all lines: json.loads would build one per call. NaN, which we never write but others may, reads as null.
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


class RunFiles:
    """Paths, writers and readers of one run directory. Reading creates nothing."""

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)
        self.config = self.run_dir / "config.yaml"
        self.metrics = self.run_dir / "metrics.jsonl"
        self.expert_load = self.run_dir / "expert_load.jsonl"
        self.events = self.run_dir / "events.jsonl"
        self.plans = self.run_dir / "plans"
        self.checkpoints = self.run_dir / "checkpoints"
        self.report = self.run_dir / "report.html"
        # Files this object has appended to: their last line is known to be whole.
        self._whole: set[Path] = set()

    # ---- writing ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the run directory with its plans and checkpoints folders, readable by their owner only.

        From here on this process creates nothing that everybody may write to, whatever umask it was started with.

        Raises:
            DataError: if a folder is open to everybody, or cannot be created.
            CheckpointError: if it lies in a checkpoint.
        """
        refuse_open_folder(self.run_dir)
        refuse_inside("run.dir", self.run_dir)
        # There is no way to ask for it without setting it.
        umask = os.umask(0o077)
        os.umask(umask | stat.S_IWOTH)
        for folder in (self.run_dir, self.plans, self.checkpoints):
            make_directory(folder)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append the measurements of one optimizer step (see docs/report.md for the keys)."""
        self._append(self.metrics, _with_step(record))

    def append_expert_load(self, record: dict[str, Any]) -> None:
        """Append the share of tokens each expert of each MoE layer got at one step."""
        self._append(self.expert_load, _with_step(record))

    def append_event(self, event: str, step: int, **details: object) -> None:
        """Append something that happened at a step, stamped with the UTC time."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._append(self.events, {"time": now, "step": step, "event": event, "details": details})

    def truncate_after(self, step: int) -> int:
        """Keep the metrics and expert load of steps up to `step`; move later lines to `*.superseded.jsonl`.

        Called on resume, so that a step trained again is not counted twice. The moved lines are on disk before the file
        is replaced: a kill in between repeats lines in the superseded file but loses none.

        Args:
            step: the step of the checkpoint the run resumes from.

        Returns:
            How many lines were moved.

        Raises:
            DataError: a line other than the last is torn or has no step, or the disk refuses.
        """
        return sum(self._truncate(path, step) for path in (self.metrics, self.expert_load))

    def repeated_steps(self) -> int:
        """How many steps of the run were trained, and are or will be trained again."""
        try:
            return _superseded(self.metrics).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise DataError(f"{_superseded(self.metrics)}: cannot be read ({error.strerror})") from error

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics lines in file order; empty if the file does not exist yet."""
        return [record for _, record in numbered_records(self.metrics)]

    def read_expert_load(self) -> list[dict[str, Any]]:
        """All expert load lines in file order; empty if the file does not exist (a dense model)."""
        return [record for _, record in numbered_records(self.expert_load)]

    def read_events(self) -> list[dict[str, Any]]:
        """All events in file order, those of superseded attempts included."""
        return [record for _, record in numbered_records(self.events)]

    def read_plans(self) -> dict[int, dict[str, Any]]:
        """The plan of each expansion, by the step it happened after.

        Raises:
            DataError: a plan is not JSON, or has no integer step.
        """
        plans: dict[int, dict[str, Any]] = {}
        for path in sorted(self.plans.glob("step-*.json")):
            try:
                plan = json.loads(path.read_text(encoding="utf-8"))
                plans[int(plan["step"])] = plan
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: not an expansion plan ({error}): restore it or move it away") from error
            except OSError as error:
                raise DataError(f"{path}: cannot read ({error.strerror})") from error
        return plans

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        """Append one line in one system call, after moving a torn last line of a killed process aside."""
        if path not in self._whole:
            make_directory(self.run_dir)
            _repair_last_line(path)
        self._whole.discard(path)  # until this write is whole: it may end in a full disk
        _append_bytes(path, encode_line(record))
        self._whole.add(path)

    def _truncate(self, path: Path, step: int) -> int:
        if not path.exists():
            return 0
        _repair_last_line(path)
        kept = path.with_suffix(".tmp")
        moved: list[bytes] = []
        try:
            # Only the owner of the run may alter its history, whatever the umask: hence the mode.
            with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE), "wb") as file:
                for number, line in raw_lines(path):
                    whole = line.rstrip(b"\r\n") + b"\n"
                    if _step_of(line, path, number) <= step:
                        file.write(whole)
                    else:
                        moved.append(whole)
                file.flush()
                os.fsync(file.fileno())
            if moved:
                _append_bytes(_superseded(path), b"".join(moved), sync=True)
                os.replace(kept, path)
        except OSError as error:
            raise DataError(f"{path}: cannot rewrite ({error.strerror}): free space or check permissions") from error
        finally:
            kept.unlink(missing_ok=True)
        return len(moved)


def make_directory(path: Path) -> None:
    """Create a folder (and its parents) that only its owner can enter; leave an existing one as it is.

    Raises:
        DataError: the path is a file, or the folder cannot be created.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent)
    try:
        path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot create this folder ({error.strerror}): choose another run.dir") from error


def refuse_open_folder(run_dir: Path) -> None:
    """Refuse a run directory that everybody may write to: whoever puts a checkpoint there decides what the run goes on with.

    The sticky bit keeps others from replacing what is there, which will do for the run directory itself; in its folders it
    would let them add a newer checkpoint.

    Raises:
        DataError: naming the folder and the remedy.
    """
    for folder in (run_dir, run_dir / "plans", run_dir / "checkpoints"):
        mode = folder.stat().st_mode if folder.is_dir() else 0
        if mode & stat.S_IWOTH and not (folder == run_dir and mode & stat.S_ISVTX):
            raise DataError(
                f"run.dir={run_dir}: everybody may write to {folder}, and so choose what this run goes on with: "
                f"chmod o-w {folder}, or choose another run.dir"
            )


def write_json(path: Path, body: Mapping[str, Any], *, sync: bool = True) -> None:
    """Replace a small JSON file as a whole: a kill leaves the old one or the new one.

    Args:
        path: of the file.
        body: what it shall hold.
        sync: put it on the disk before it counts; not worth it for what is written again soon.

    Raises:
        DataError: if the folder cannot be written.
    """
    staging = path.with_name(f".{path.name}.tmp")
    try:
        with open(staging, "w") as file:
            json.dump(body, file, indent=1)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(staging, path)
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}): free space or check permissions") from error


def encode_line(record: dict[str, Any]) -> bytes:
    """One JSON object as one ASCII line; NaN and infinities, which JSON has no word for, become null."""
    return json.dumps(_plain(record), allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (1-based) and bytes of each line that is not blank, without a torn last line; nothing for no file.

    The lines are not parsed, apart from the last: a killed writer can tear only that one.

    Raises:
        DataError: the file cannot be read.
    """
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            held: tuple[int, bytes] | None = None
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if held is not None:
                    yield held
                held = (number, line)
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror})") from error
    if held is not None and _loads(held[1]) is not None:
        yield held


def numbered_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a JSONL file, one at a time: for runs too long to hold as dictionaries.

    Raises:
        DataError: naming file:line, when a line other than the last is torn.
    """
    return ((number, parse_line(line, path, number)) for number, line in raw_lines(path))


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Parse one line of a JSONL file.

    Raises:
        DataError: naming file:line, when the line is no JSON object.
    """
    record = _loads(line)
    if record is None:
        raise DataError(f"{path}:{number}: torn or not a JSON object: remove this line (only the last may be torn)")
    return record


def _loads(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None where there is none."""
    try:
        record = _DECODER.decode(line.decode("utf-8").strip())
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _plain(value: object) -> Any:
    """A value as JSON knows it: numbers of any library as Python's, non-finite ones as None, paths as text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a run file cannot hold a {type(value).__name__}: convert it to numbers, text, lists or dicts")


def _with_step(record: dict[str, Any]) -> dict[str, Any]:
    """The record, which a resume must be able to place: a line without a step could never be superseded."""
    if not isinstance(record.get("step"), int):
        raise TypeError(f"a line of a run file needs an integer step, not {record.get('step')!r}")
    return record


def _step_of(line: bytes, path: Path, number: int) -> int:
    step = parse_line(line, path, number).get("step")
    if not isinstance(step, int):
        raise DataError(f"{path}:{number}: step={step!r} is not an integer: remove this line")
    return step


def _superseded(path: Path) -> Path:
    """metrics.jsonl -> metrics.superseded.jsonl."""
    return path.with_name(f"{path.stem}.superseded{path.suffix}")


def _append_bytes(path: Path, data: bytes, sync: bool = False) -> None:
    """Append whole lines with one write: a kill leaves all of it, or a torn last line.

    Raises:
        DataError: the disk is full or the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, FILE_MODE)
        try:
            written = os.write(descriptor, data)  # unbuffered: nothing to flush
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}): free space or check permissions") from error
    if written != len(data):
        raise DataError(f"{path}: wrote {written} of {len(data)} bytes: free space on this disk and resume")


def _repair_last_line(path: Path) -> None:
    """Finish a whole last line that lacks its newline; move a torn one, as text, to the superseded file.

    Without this the next append would glue its line to the torn one, and the tear would no longer be at the end.
    """
    try:
        while path.exists() and path.stat().st_size:
            start, tail = _last_line(path)
            if _loads(tail) is not None:
                if not tail.endswith(b"\n"):
                    _append_bytes(path, b"\n")
                return
            if tail.strip():
                torn = {"torn_line": tail.decode("utf-8", errors="replace").rstrip()}
                _append_bytes(_superseded(path), encode_line(torn))
                os.truncate(path, start)
                return
            os.truncate(path, start)  # a blank line: look at the one before it
    except OSError as error:
        raise DataError(f"{path}: cannot repair its last line ({error.strerror})") from error


def _last_line(path: Path, block: int = 65536) -> tuple[int, bytes]:
    """Offset and bytes of the last line, read backwards from the end so that long files cost nothing."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        start, tail = end, b""
        while start > 0:
            start = max(0, start - block)
            file.seek(start)
            tail = file.read(end - start)
            # The newline that ends the last line does not start it.
            cut = tail[:-1].rfind(b"\n")
            if cut >= 0:
                return start + cut + 1, tail[cut + 1 :]
        return 0, tail
