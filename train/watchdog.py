"""Ends a job that stands still or has lost a rank with an error that names the rank, long before collectives time out.

Each rank posts a sign of life about once a second, on a board that all see (`parallel/heartbeat.py`): a beat, how much work
its main thread has begun, what that is at, and where. Where nobody has got anywhere for `health.hang_seconds`, whoever
sees it first pronounces a verdict, one for all ranks: who is to blame (`train/signs.py`). Every process that still can
ends with it. A collective that fails because its other end is gone is explained the same way.

    watchdog.start(run)                  # collective; without it everything else does nothing
    watchdog.begin("step 12")            # per piece of work: one count, no call of the system
    with watchdog.act("evaluation"):
        watchdog.tick()
    gone = watchdog.explain(error)       # in the main thread, which has caught an error
    watchdog.end(error)

Getting anywhere is: a piece of work begun, another line of this project's code (looked at once a second), or a MiB read or
written, so that a slow save or the index of a large corpus is no hang. Time counts as it passes for this process: one that
was suspended with its job goes on. Two threads, because whoever keeps the board may be what hangs.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from parallel.errors import LaunchError
from parallel.flight_recorder import where_records_lie, write_record
from parallel.heartbeat import Board, BoardLostError, board_keeper, lost_connection
from train.named import named
from train.signs import SILENT, Blame, Sign, describe, find_culprits, look_at, raised_at
from train.status import tell_failure

if TYPE_CHECKING:
    from train.run import Run

_BEAT_SECONDS = 1.0
# Beats that a rank may miss; less on this machine, where its process can be asked for.
_MISSED_BEATS, _MISSED_BEATS_HERE = 4.0, 1.5
# Ranks that look at all signs in a second while a job stands still: what whoever keeps the board has to bear.
_LOOKS_PER_SECOND = 64
# What a thread that is at a file reads or writes between two beats; log lines are less.
_MOVED_BYTES = 1 << 20
# For files of the run that may be on the disk that hangs.
_TELL_SECONDS = 5.0
_VERDICT, _BLANK = "verdict", "-"


@dataclass(frozen=True)
class _Verdict:
    """Why the job ends. `by`: the rank that says so; `hung`: no main thread can be expected to end by itself."""

    message: str
    by: int
    hung: bool


class Watchdog:
    """Sees to it that a job does not wait for a rank that will never come."""

    def __init__(self) -> None:
        # Work that was begun; what it is.
        self._ticks = 0
        self._doing = "the start"
        self._watching = False

    # ---- what the main thread tells ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """Take note that the main thread has got on."""
        self._ticks += 1

    @property
    def doing(self) -> str:
        """What the main thread is at."""
        return self._doing

    def begin(self, what: str) -> None:
        """Name what goes on from here."""
        self._doing = what
        self._ticks += 1

    @contextlib.contextmanager
    def act(self, what: str) -> Iterator[None]:
        """Name what goes on inside, in traces too; after an error the name stays, for whoever explains it."""
        outer = self._doing
        self.begin(what)
        with named(what):
            yield
        self.begin(outer)

    # ---- beginning and end ------------------------------------------------------------------------------------------

    def start(self, run: "Run") -> None:
        """Watch a run from here on, if it has more than one process and is to be watched; collective."""
        limit = run.settings.health.hang_seconds
        if limit is None or run.layout.world_size == 1:
            return
        self._run, self._limit = run, float(limit)
        self._rank, self._world = run.layout.rank, run.layout.world_size
        self._beat = min(_BEAT_SECONDS, self._limit / 8)
        self._look_every = max(self._beat, self._world / _LOOKS_PER_SECOND)
        self._main = threading.current_thread().ident or 0
        self._process = psutil.Process()
        self._sign = Sign(self._rank, socket.gethostname(), os.getpid(), doing=self._doing)
        self._members = run.layout.gather_objects(self._sign)
        self._signs: list[Sign] = []
        # Seconds of this process, which stand while it is stopped, and when it last saw another beat of each rank.
        self._seen: list[float] = [0.0] * self._world
        self._clock = self._answered = self._looked = 0.0
        self._still = 0.0
        self._known: tuple[Any, ...] = ()
        self._bytes = 0
        self._explaining, self._lost = False, False
        # How this rank has ended, its error, and where that was raised.
        self._ended = ("", "", "")
        self._proposal: _Verdict | None = None
        self._verdict: _Verdict | None = None
        self._verdict_at = 0.0
        self._over, self._wake = threading.Event(), threading.Event()
        # The same for all ranks, and another one for each run of these processes.
        name = f"watchdog/{run.layout.from_rank_zero(uuid.uuid4().hex)}"
        reached = True
        try:
            self._board = Board(name, min(30.0, max(5.0, self._limit / 4)))
            if self._rank == 0:
                self._board.post(_VERDICT, _BLANK)
            self._board.post(str(self._rank), self._sign.to_json())
        except BoardLostError:
            reached = False
        if not all(run.layout.gather_objects(reached)):
            # The launcher has just died: its ranks have been asked to stop, and save and leave without it.
            run.console.say(f"nobody watches for ranks that hang: {self._board_is_gone()}")
            return
        self._watching = True
        self._talker = threading.Thread(target=self._talk, name="watchdog talks", daemon=True)
        self._talker.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def end(self, error: BaseException | None = None) -> None:
        """Stop watching, and tell the others how this rank has ended; may be called again."""
        if not self._watching:
            return
        self._watching = False
        ended = "finished" if error is None else "left" if self._explaining else "failed"
        told = f"{type(error).__name__}: {error}".splitlines()[0] if error else ""
        self._ended = (ended, told, raised_at(error) if error else "")
        self._over.set()
        self._wake.set()
        self._talker.join(2 * _BEAT_SECONDS)

    def explain(self, error: BaseException) -> LaunchError | None:
        """Find out whether an error is due to another rank that is gone; takes a few seconds if it may be.

        Args:
            error: that the main thread has caught.

        Returns:
            The error to end with instead; `speaks` on the one rank that is to tell of it. None if no rank is gone.
        """
        if not self._watching or not lost_connection(error):
            return None
        self._explaining, self._signs = True, []
        deadline = time.monotonic() + (_MISSED_BEATS + 4) * self._beat
        while self._verdict is None and time.monotonic() < deadline:
            blame = self._gone()
            if blame is not None:
                self._pronounce(blame, f"{self._doing} cannot go on", hung=False)
            elif self._lost or self._clock - self._answered > _MISSED_BEATS * self._beat:
                self._decree(f"{self._doing} cannot go on: {self._board_is_gone()}: {_REMEDY}", hung=False)
            else:
                self._wake.set()
                time.sleep(self._beat / 4)
        verdict = self._verdict
        if verdict is None or verdict.hung:
            self._explaining = False
        if verdict is None:
            return None
        if verdict.hung:
            # The connection went with a process that the verdict has ended. So is this one, by the other thread.
            threading.Event().wait(4 * _TELL_SECONDS)
        known = LaunchError(verdict.message)
        known.speaks = verdict.by == self._rank
        return known

    # ---- the thread that talks to the board -------------------------------------------------------------------------

    def _talk(self) -> None:
        beat = 0
        try:
            while True:
                beat += 1
                # Asked first: what is posted last must be how the run ended.
                over = self._over.is_set()
                ended, error, place = self._ended
                sign = replace(self._sign, beat=beat, doing=self._doing, ended=ended, error=error)
                sign = replace(sign, place=place or sign.place)
                self._board.post(str(self._rank), sign.to_json())
                if over:
                    return
                self._read_verdict()
                if self._explaining or (
                    self._still > self._limit / 8 and self._clock - self._looked >= self._look_every
                ):
                    self._look()
                self._answered = self._clock
                self._wake.wait(self._beat)
                self._wake.clear()
        except BoardLostError:
            self._lost = True

    def _read_verdict(self) -> None:
        proposal = self._proposal
        if proposal is None:
            (text,) = self._board.read([_VERDICT])
        else:
            text = self._board.post_first(_VERDICT, json.dumps(asdict(proposal)), _BLANK)
        if text != _BLANK and self._verdict is None:
            self._verdict_at, self._verdict = self._clock, _Verdict(**json.loads(text))

    def _look(self) -> None:
        signs = [Sign.from_json(text) for text in self._board.read(map(str, range(self._world)))]
        # After a while without a look nothing is known of how long a rank has been silent.
        first = not self._signs or self._clock - self._looked > 3 * self._look_every
        for sign in signs:
            if first or self._signs[sign.rank].beat != sign.beat:
                self._seen[sign.rank] = self._clock
        self._looked, self._signs = self._clock, signs

    # ---- the thread that watches ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        # Rank 0 is the first to judge if it can: the records of the run are its own.
        patience = self._limit + 3 * self._beat * min(self._rank, 2)
        while not self._over.wait(self._beat):
            now = time.monotonic()
            # A gap is not time in which the job stood still: this process was stopped, perhaps with all others.
            passed, before = min(now - before, 2 * self._beat), now
            self._clock += passed
            if self._explaining:
                continue
            self._still = 0.0 if self._moved() else self._still + passed
            verdict = self._verdict
            if verdict is not None:
                # Who is not stuck learns from its own collective that a rank is gone, and ends in order.
                if verdict.hung or self._clock - self._verdict_at > 3 * _BEAT_SECONDS:
                    self._leave(verdict)
            elif self._still >= patience:
                self._judge()

    def _moved(self) -> bool:
        """Take a look at the main thread: whether it has got anywhere since the last one."""
        place, waits, path = look_at(sys._current_frames().get(self._main))
        moved = self._bytes
        # What the system refuses to tell counts as nothing read or written.
        with contextlib.suppress(psutil.Error, OSError, AttributeError):
            counters = self._process.io_counters()
            self._bytes = counters.read_chars + counters.write_chars
        known: tuple[Any, ...] = (self._ticks, path)
        on = known != self._known or self._bytes - moved >= _MOVED_BYTES
        self._known = known
        self._sign = replace(
            self._sign,
            ticks=self._ticks,
            doing=self._doing,
            place=place,
            waits=waits,
            still_seconds=0.0 if on else self._still,
        )
        return on

    def _judge(self) -> None:
        """Pronounce a verdict if nobody has got anywhere for too long, as far as this rank can see."""
        if self._lost or self._clock - self._answered > max(self._limit / 2, _MISSED_BEATS * self._beat):
            self._decree(f"{self._stands_still()}: {self._board_is_gone()}: {_REMEDY_HUNG}", hung=True)
            return
        if not self._signs:
            return
        for sign in self._signs:
            if sign.rank != self._rank and not sign.ended:
                still = sign.still_seconds + self._clock - self._seen[sign.rank]
                # A sign is as old as the look at it, and its own clock ticks in beats.
                if still < self._limit - 2 * self._beat:
                    return
        signs = [self._sign if sign.rank == self._rank else sign for sign in self._signs]
        blame = find_culprits(signs, self._silent())
        if blame is not None:
            self._pronounce(blame, self._stands_still(), hung=True)

    def _silent(self) -> list[int]:
        quiet = max(_MISSED_BEATS * self._beat, 2 * self._look_every)
        return [
            s.rank
            for s in self._signs
            if s.rank != self._rank and not s.ended and self._clock - self._seen[s.rank] >= quiet
        ]

    def _gone(self) -> Blame | None:
        """Who has failed or is gone for certain, for the main thread that has lost a connection."""
        signs = self._signs
        failed = tuple(s.rank for s in signs if s.ended == "failed")
        if failed:
            return Blame("failed", failed)
        killed = [
            s.rank
            for s in signs
            if not s.ended
            and self._clock - self._seen[s.rank] >= _MISSED_BEATS_HERE * self._beat
            and self._state_here(s) == _KILLED
        ]
        gone = tuple(sorted({*killed, *self._silent()}))
        return Blame("silent", gone) if gone else None

    def _state_here(self, sign: Sign) -> str | None:
        """What the system knows of a process on this machine."""
        if sign.host != self._sign.host:
            return None
        try:
            status = psutil.Process(sign.pid).status()
        except psutil.NoSuchProcess:
            return _KILLED
        except (psutil.Error, OSError):
            return None
        if status == psutil.STATUS_STOPPED:
            return "gives no sign of life: its process is stopped (SIGSTOP)"
        return _KILLED if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else None

    # ---- verdicts ---------------------------------------------------------------------------------------------------

    def _stands_still(self) -> str:
        return f"{self._doing} has not got on for {self._still:.0f} s"

    def _board_is_gone(self) -> str:
        rank, address = board_keeper()
        if rank is None:
            return f"the launcher at {address}, through which the ranks see each other, gives no sign of life"
        keeper = self._members[rank]
        return f"{keeper} {self._state_here(keeper) or SILENT}; the ranks see each other through it ({address})"

    def _pronounce(self, blame: Blame, what: str, *, hung: bool) -> None:
        """Put a verdict on the board; that of another rank, if it was faster, is as good."""
        states = {rank: state for rank in blame.ranks if (state := self._state_here(self._signs[rank])) is not None}
        remedy = _REMEDY_HUNG + where_records_lie() if hung else _REMEDY
        signs = [self._sign if sign.rank == self._rank else sign for sign in self._signs]
        self._proposal = _Verdict(f"{what}: {describe(blame, signs, states)}: {remedy}", self._rank, hung)
        deadline = time.monotonic() + 3 * _BEAT_SECONDS
        while self._verdict is None and not self._lost and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(self._beat / 20)
        if self._verdict is None:
            self._verdict = self._proposal

    def _decree(self, message: str, *, hung: bool) -> None:
        """A verdict without a board: the ranks cannot agree who tells, so one of each machine does, and rank 1."""
        tells = self._rank == 1 or self._rank % self._run.layout.ranks_per_node == 0
        self._verdict = _Verdict(message, self._rank if tells else -1, hung)

    def _leave(self, verdict: _Verdict) -> None:
        """End this process from beside its main thread."""
        if verdict.by == self._rank:
            # Python's own stream may be what the main thread is stuck in.
            os.write(2, f"error: {verdict.message}\n".encode())
        aside = threading.Thread(target=self._tell, args=(verdict,), daemon=True)
        aside.start()
        aside.join(_TELL_SECONDS)
        if verdict.by == self._rank:
            # Whoever keeps the board ends last, so that all have read it.
            time.sleep(2.5 * self._beat)
        os._exit(LaunchError.exit_code)

    def _tell(self, verdict: _Verdict) -> None:
        write_record(self._rank)
        if verdict.by == self._rank:
            tell_failure(self._run, LaunchError(verdict.message), here=True)
        self._run.console.close()
        for stream in (sys.stdout, sys.stderr):
            # A stream whose reader is gone.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


_KILLED = "is gone: its process was killed"
_REMEDY = "start the job again, it resumes from its newest checkpoint"
_REMEDY_HUNG = f"{_REMEDY}; if it is only slow, raise health.hang_seconds"
