"""Signs of life of a job's ranks, and who is to blame where it stands still: pure functions, for `train/watchdog.py`."""

import dis
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType

# Not resolved: code objects know the path that was imported.
_ROOT = str(Path(__file__).parents[1])
_OURS = tuple(f"{_ROOT}/{package}/" for package in ("train", "model", "parallel", "upcycle"))
# Wraps functions of torch; nobody looks for a place there.
_WRAPPER = f"{_ROOT}/parallel/cpu_runtime.py"
# Files whose code only ever waits for other ranks.
_COLLECTIVES = "/torch/distributed/distributed_c10d.py"
# What is called on the line where other code waits for them, or for a device that does.
_WAITING_CALLS = {"wait", "item", "tolist", "cpu", "synchronize", "run_backward"}
# Only there is a call of such a name what it seems to be.
_KNOWN_CODE = ("/torch/", "/megatron/", *_OURS)
_NAMED_RANKS = 4
SILENT = "gives no sign of life: its process is killed or stopped, or its machine is lost"


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        rank: of the job.
        host: its machine.
        pid: its process.
        beat: grows for as long as the process runs, whatever its main thread does.
        ticks: pieces of work that the main thread has begun; more is further.
        still_seconds: since the main thread last got anywhere.
        doing: what it is at.
        place: where in this code: FILE:LINE (FUNCTION).
        waits: whether it waits there for other ranks, or for a device that may.
        ended: empty, `finished`, `failed` (by itself), or `left` (because of another).
        error: of a rank that failed.
    """

    rank: int
    host: str
    pid: int
    beat: int = 0
    ticks: int = 0
    still_seconds: float = 0.0
    doing: str = ""
    place: str = ""
    waits: bool = False
    ended: str = ""
    error: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Sign":
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class Blame:
    """Whom the others wait for.

    Attributes:
        kind: `failed`, `silent`, `away` (somewhere else than in a collective), `behind` (has begun less than the others),
            or `all` (everybody waits, or nobody does).
        ranks: at least one.
    """

    kind: str
    ranks: tuple[int, ...]


def find_culprits(signs: Sequence[Sign], silent: Iterable[int]) -> Blame | None:
    """Whom a job that stands still waits for.

    Args:
        signs: the newest of every rank.
        silent: ranks that give none any more.

    Returns:
        None if nobody is left who could stand still.
    """
    silent = set(silent)
    failed = tuple(s.rank for s in signs if s.ended == "failed")
    if failed:
        return Blame("failed", failed)
    running = [s for s in signs if not s.ended]
    dead = tuple(s.rank for s in running if s.rank in silent)
    if dead:
        return Blame("silent", dead)
    away = tuple(s.rank for s in running if not s.waits)
    if away and len(away) < len(running):
        return Blame("away", away)
    least = min((s.ticks for s in running), default=0)
    behind = tuple(s.rank for s in running if s.ticks == least)
    if behind and len(behind) < len(running):
        return Blame("behind", behind)
    return Blame("all", behind) if behind else None


def describe(blame: Blame, signs: Sequence[Sign], states: Mapping[int, str]) -> str:
    """Name those to blame, and where they are.

    Args:
        blame: who they are.
        signs: the newest of every rank, by rank.
        states: what else is known of a rank's process, such as `killed`.
    """
    told = []
    for sign in [signs[rank] for rank in blame.ranks][:_NAMED_RANKS]:
        where = f"in {sign.doing}" + (f" at {sign.place}" if sign.place else "")
        if blame.kind == "failed":
            told.append(f"{sign} failed {where}: {sign.error}")
        elif blame.kind == "silent":
            state = states.get(sign.rank, SILENT)
            told.append(f"{sign} {state}; it was last seen {where}")
        else:
            told.append(f"{sign} is {where}")
    if len(blame.ranks) > _NAMED_RANKS:
        told.append(f"and so for {len(blame.ranks) - _NAMED_RANKS} more, to rank {blame.ranks[-1]}")
    waiting = [s for s in signs if not s.ended and s.rank not in blame.ranks]
    if blame.kind in ("away", "behind") and waiting:
        who = f"rank {waiting[0].rank} waits" if len(waiting) == 1 else f"{len(waiting)} other ranks wait"
        told.append(f"{who} at {waiting[0].place}")
    if blame.kind == "all" and len(blame.ranks) > 1:
        told.append("no rank is behind the others, the network may be what is stuck")
    return "; ".join(told)


def look_at(frame: FrameType | None) -> tuple[str, bool, tuple[tuple[CodeType, int], ...]]:
    """Where a thread is. Reads no files: a disk that hangs may be what the thread waits for.

    Args:
        frame: its innermost one.

    Returns:
        FILE:LINE (FUNCTION) of the innermost frame of this project, whether the thread waits for other ranks there, and a
        value that changes when the thread gets anywhere in this project's code.
    """
    waits = frame is not None and _waits_at(frame)
    place, path = "", []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_OURS) and code.co_filename != _WRAPPER:
            path.append((code, frame.f_lineno))
            place = place or _place(code, frame.f_lineno)
        elif not place and code.co_filename.endswith(_COLLECTIVES):
            waits = True
        frame = frame.f_back
    return place, waits, tuple(path)


def raised_at(error: BaseException) -> str:
    """FILE:LINE (FUNCTION) of the innermost frame of this project that an error came through; empty if there is none."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename.startswith(_OURS) and code.co_filename != _WRAPPER:
            place = _place(code, traceback.tb_lineno)
        traceback = traceback.tb_next
    return place


def _place(code: CodeType, line: int) -> str:
    return f"{code.co_filename[len(_ROOT) + 1 :]}:{line} ({code.co_name})"


def _waits_at(frame: FrameType) -> bool:
    code = frame.f_code
    if not any(part in code.co_filename for part in _KNOWN_CODE):
        return False
    return any(
        instruction.argval in _WAITING_CALLS
        for instruction in dis.get_instructions(code)
        if isinstance(instruction.argval, str)
        and instruction.positions is not None
        and instruction.positions.lineno == frame.f_lineno
    )
