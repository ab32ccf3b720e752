"""Kills ranks of whole runs at seeded moments: after a time, or at the n-th touch of a file of the run.

The second kind is where the danger is: between the opening, writing, flushing, renaming and removing of files, which the
interpreter announces to an audit hook. What was going on is read from the stack of the main thread before the process dies.
"""

import os
import random
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train.trainer import train_here

# Function names on the stack -> what they mean, the innermost known one first.
_PHASES = {
    "save_tensors": "save", "_publish": "save", "retire": "save", "save_unless_saved": "save", "seal": "save",
    "through_memory": "switch", "through_checkpoint": "switch", "make_plan": "scoring and plan", "expand": "switch",
    "evaluate": "evaluation", "optimizer_step": "step", "record_step": "step", "_one_step": "step",
    "load_tensors": "load", "load": "load", "find_start": "start", "restore": "start", "build_stage": "start",
    "open_corpora": "start", "join_job": "start", "create": "start", "write_report": "report", "_report": "report",
}  # fmt: skip
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Shot:
    """One kill.

    Attributes:
        victims: ranks that die.
        events: at this touch of a file of the run; 0 for a kill by time.
        seconds: after this time.
    """

    victims: tuple[int, ...]
    events: int = 0
    seconds: float = 0.0


def draw_shot(rng: random.Random, ranks: int, events: int, seconds: float) -> Shot:
    """A random kill: one rank or all, six in ten at a file.

    Args:
        rng: seeded.
        ranks: processes of the job.
        events: touches of files that a rank makes in a whole run.
        seconds: that a whole run takes.
    """
    everyone = tuple(range(ranks))
    victims = everyone if rng.random() < 0.3 else (rng.choice(everyone),)
    if rng.random() < 0.6:
        return Shot(victims, events=rng.randint(1, events))
    return Shot(victims, seconds=rng.uniform(0.0, seconds))


def _phase() -> str:
    """What the main thread is doing."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return next((_PHASES[name] for name in names if name in _PHASES), "other")


def train_under_fire(overrides: list[str], run_dir: str, shot: Shot, told: str) -> tuple[str, int]:
    """A whole run on this rank, unless it is killed; where it fell is written to the file `told` first.

    Returns:
        Why the run ended, and how often this rank touched a file of it.
    """
    rank, touched = int(os.environ["RANK"]), 0

    def die() -> None:
        with open(told, "a") as file:
            file.write(_phase() + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in _EVENTS and arguments and run_dir in str(arguments[0]):
            touched += 1
            if shot.events and rank in shot.victims and touched == shot.events:
                die()

    sys.addaudithook(hear)
    if shot.seconds and rank in shot.victims:
        timer = threading.Timer(shot.seconds, die)
        timer.daemon = True
        timer.start()
    return train_here(overrides), touched


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    from train.checkpoint import list_checkpoints

    own = list_checkpoints(run_dir)
    return int(own[-1].name[5:13]) if own else 0
