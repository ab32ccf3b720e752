"""Kills processes of whole jobs at seeded moments: after a time, or at the n-th touch of a file of the run.

The second kind is where the danger is: between the opening, writing, flushing, renaming and removing of files, which the
interpreter announces to an audit hook. What was going on is read from the stack of the main thread before anything dies.
"""

import dataclasses
import functools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.train.trainer import train_here

# Function names on the stack -> what they mean, the innermost known one first.
_PHASES = {
    "save_tensors": "save", "_publish": "save", "retire": "save", "save_unless_saved": "save", "seal": "save",
    "through_memory": "switch", "through_checkpoint": "switch", "make_plan": "scoring and plan", "expand": "switch",
    "evaluate": "evaluation", "optimizer_step": "step", "record_step": "step", "_one_step": "step", "save_if_due": "save",
    "load_tensors": "load", "load": "load", "find_start": "start", "restore": "start", "build_stage": "start",
    "open_corpora": "start", "join_job": "start", "create": "start", "write_report": "report", "_report": "report",
}  # fmt: skip
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")

# About what a switch or a save of the small run takes.
_SOON = 0.15
# Who dies: a rank, all ranks, torchrun's agent (the ranks find out), or all of them at once, as a machine does.
VICTIMS = ("a rank", "all ranks", "the agent", "the machine")


@dataclass(frozen=True)
class Shot:
    """One kill.

    Attributes:
        victim: one of `VICTIMS`; None for nobody.
        rank: on which the moment comes.
        events: at this touch of a file of the run; 0 for a kill by time.
        seconds: after this time.
        since: what the time counts from: empty for the start of the job, `switch` or `save` for the first of these.
    """

    victim: str | None = None
    rank: int = 0
    events: int = 0
    seconds: float = 0.0
    since: str = ""

    def sooner(self) -> "Shot":
        """The same kill in half the time."""
        return dataclasses.replace(self, events=(self.events + 1) // 2, seconds=self.seconds / 2)


def draw_shots(rng: random.Random, ranks: int, events: int, seconds: float) -> Iterator[Shot]:
    """Random kills without end; of every four, each victim has one.

    Half at a file, two in ten at any time, three in ten soon after a switch or a save has begun.

    Args:
        rng: seeded.
        ranks: processes of the job, besides the agent.
        events: touches of files that a rank makes in a whole run.
        seconds: that a whole run takes.
    """
    while True:
        for victim in rng.sample(VICTIMS, len(VICTIMS)):
            rank = rng.randrange(ranks)
            kind = rng.random()
            if kind < 0.5:
                yield Shot(victim, rank, events=rng.randint(1, events))
            elif kind < 0.7:
                yield Shot(victim, rank, seconds=rng.uniform(0.0, seconds))
            else:
                yield Shot(
                    victim, rank, seconds=rng.uniform(0.0, _SOON), since=rng.choice(("switch", "switch", "save"))
                )


def _phase() -> str:
    """What the main thread is doing."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return next((_PHASES[name] for name in names if name in _PHASES), "other")


def _kill(victim: str) -> None:
    agent = os.getppid()
    if victim == "the machine":
        # The agent and its ranks are one process group (`tests/distributed.py`).
        os.killpg(0, signal.SIGKILL)
    elif victim == "the agent":
        os.kill(agent, signal.SIGKILL)
    elif victim == "all ranks":
        for rank in psutil.Process(agent).children():
            if rank.pid != os.getpid():
                rank.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Survived:
    """A run of which this rank saw the end.

    Attributes:
        reason: why it ended.
        events: how often this rank touched a file of it.
        seconds: that it took.
    """

    reason: str
    events: int
    seconds: float


def train_under_fire(overrides: list[str], run_dir: str, shot: Shot, told: str, report: bool) -> Survived:
    """A whole run on this rank of `run_under_agent`, unless it is killed; `told` gets a line about each kill first."""
    mine = shot.victim is not None and int(os.environ["RANK"]) == shot.rank
    touched = 0
    # Both threads may come to it.
    once = threading.Lock()

    def fire() -> None:
        assert shot.victim is not None
        if once.acquire(blocking=False):
            with open(told, "a") as file:
                file.write(json.dumps([shot.victim, _phase()]) + "\n")
            _kill(shot.victim)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in _EVENTS and arguments and run_dir in str(arguments[0]):
            touched += 1
            if mine and shot.events and touched == shot.events:
                fire()

    def count_down() -> None:
        timer = threading.Timer(shot.seconds, fire)
        timer.daemon = True
        timer.start()

    sys.addaudithook(hear)
    if mine and shot.since:
        _at_the_first(shot.since, count_down)
    elif mine and shot.seconds:
        count_down()
    began = time.perf_counter()
    reason = train_here(overrides, report=report)
    # What comes later would hit the agent's own end.
    once.acquire(blocking=False)
    return Survived(reason, touched, time.perf_counter() - began)


def _at_the_first(act: str, then: Callable[[], None]) -> None:
    """Call something when this process first comes to a switch or a save."""
    from train import expansion
    from train.checkpoint.persistence import Persistence

    owner, name = {"switch": (expansion, "through_memory"), "save": (Persistence, "_begin")}[act]
    original, waiting = getattr(owner, name), [True]

    @functools.wraps(original)
    def watched(*args: Any, **options: Any) -> Any:
        if waiting:
            waiting.clear()
            then()
        return original(*args, **options)

    setattr(owner, name, watched)


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    from train.checkpoint.folder import list_checkpoints, step_of

    own = list_checkpoints(run_dir)
    return step_of(own[-1]) if own else 0
