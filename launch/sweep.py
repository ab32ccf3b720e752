"""A sweep: runs that differ in the overrides that have several values, expanded as Hydra's own sweeper does it.

    sweep = plan_sweep(["model=tiny", "schedule.learning_rate=1e-4,3e-4", "run.dir=runs/lr"], world_size=2)
    run_sweep(sweep, start)                          # one after another on this machine
    python -m launch sweep runs/lr                   # how its points stand

A run has several processes, so a sweep is expanded by the launcher, before any of them starts, and each point is a run
of its own in `SWEEP_DIR/NNN-KEY=VALUE`, which resumes, is stopped and is reported on like any other. `SWEEP_DIR/sweep.json`
says which overrides a point has; how it stands is the point's own word (`train/status.py`).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from parallel.errors import ConfigError, CoppiceError, DataError, LaunchError
from train.config import RunSettings
from train.run_files import RunFiles, make_directory, write_json
from train.settings import compose_settings, explain, load_settings, read_yaml, refuse_passed_on, register_schema
from train.status import read_status

SWEEP = "sweep.json"
# Of the folder of a point; beyond that its number has to do.
_NAME_LENGTH = 100
# Runs that the report compares at most.
_COMPARED = 8


class Ended(NamedTuple):
    """How a run that was started here has ended: its exit code, and whether this process was asked to stop."""

    code: int
    asked: bool


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        number: from 1, in the order in which points of the sweep were first asked for.
        name: of its folder.
        swept: the overrides that are its own.
        overrides: all of its run.
        settings: what they mean.
    """

    number: int
    name: str
    swept: tuple[str, ...]
    overrides: tuple[str, ...]
    settings: RunSettings

    @property
    def run_dir(self) -> Path:
        """Folder of its run."""
        return Path(self.settings.run.dir)

    def finished(self) -> bool:
        """Whether its run has come to the end that is asked for, with the settings that are asked for."""
        status = read_status(self.run_dir)
        if not status or status.get("state") != "finished" or int(status.get("step", 0)) < self.settings.run.steps:
            return False
        try:
            return read_yaml(RunFiles(self.run_dir).config) == self.settings
        except CoppiceError:
            # Of another version: its run has to say whether it can go on.
            return False


@dataclass(frozen=True)
class Sweep:
    """Runs that were planned together.

    Attributes:
        folder: that holds them.
        common: overrides that all of them have.
        points: of the command, not those of earlier ones.
        known: name and overrides of every point there has been, by number.
    """

    folder: Path
    common: tuple[str, ...]
    points: tuple[Point, ...]
    known: Mapping[int, dict[str, Any]]

    def write(self) -> None:
        """Write sweep.json.

        Raises:
            DataError: if the folder cannot be written.
        """
        make_directory(self.folder)
        points = [{"number": number, **self.known[number]} for number in sorted(self.known)]
        write_json(self.folder / SWEEP, {"common": list(self.common), "points": points})


def expand(overrides: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Split overrides into those of all points, as they were given, and those of each point.

    Raises:
        ConfigError: for what Hydra cannot parse or its basic sweeper does not do, or if there is nothing to sweep.
    """
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(config_module="configs", version_base="1.3"):
            # The loader knows the presets that `glob(...)` chooses from.
            parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(list(overrides))
            sweeps = [o for o in parsed if o.is_sweep_override()]
            (swept,) = BasicSweeper.split_arguments(sweeps, max_batch_size=None)
    except HydraException as e:
        raise ConfigError(explain(e)) from None
    if not sweeps:
        raise ConfigError("-m: nothing to sweep over: give a key several values, as schedule.learning_rate=1e-4,3e-4")
    if any(o.key_or_group == "run.dir" for o in sweeps):
        raise ConfigError("run.dir is the folder of the whole sweep: give it one value, each point gets a folder in it")
    if not swept:
        names = ", ".join(str(o.input_line) for o in sweeps)
        raise ConfigError(f"-m: {names} stands for no value at all: widen it")
    return [str(o.input_line) for o in parsed if not o.is_sweep_override()], swept


def plan_sweep(overrides: Sequence[str], world_size: int) -> Sweep:
    """Expand a sweep and check the settings of every point; nothing is written.

    Args:
        overrides: Hydra overrides, some with several values.
        world_size: processes of each run.

    Raises:
        CoppiceError: naming the point, the key, the value and the remedy.
    """
    common, expanded = expand(overrides)
    folder = Path(str(compose_settings(common).run.dir))
    known = _known_points(folder)
    numbers = {tuple(entry["overrides"]): number for number, entry in known.items()}
    points: list[Point] = []
    for swept in dict.fromkeys(map(tuple, expanded)):
        number = numbers.setdefault(swept, max(known, default=0) + 1)
        name = known[number]["name"] if number in known else point_name(number, swept)
        known[number] = {"name": name, "overrides": list(swept)}
        here = QuotedString(str(folder / name), Quote.single).with_quotes()
        own = (*common, *swept, f"run.dir={here}")
        try:
            settings = load_settings(list(own), world_size=world_size)
            refuse_passed_on(settings)
        except CoppiceError as e:
            raise type(e)(f"point {name}: {e}") from None
        points.append(Point(number, name, swept, own, settings))
    return Sweep(folder, tuple(common), tuple(points), known)


def missing_inputs(sweep: Sweep) -> list[CoppiceError]:
    """What the points that have not finished would read and do not find, an error for each that could not start."""
    # Here and not above: torch and mcore take seconds to load, and the settings are checked before.
    from parallel.compat import quiet_megatron

    quiet_megatron()
    from train.inputs import open_inputs

    found: list[CoppiceError] = []
    for point in sweep.points:
        try:
            if not point.finished():
                open_inputs(point.settings)
        except CoppiceError as e:
            found.append(type(e)(f"point {point.name}: {e}"))
    return found


def point_name(number: int, swept: Sequence[str]) -> str:
    """Folder name of a point: its number and what is its own, in letters that no shell, file system or SLURM minds."""
    words = [override.lstrip("+~").partition("=") for override in swept]
    lasts = [key.rpartition(".")[2] for key, _, _ in words]
    short = [
        f"{last if lasts.count(last) == 1 else key}={value}" for (key, _, value), last in zip(words, lasts, strict=True)
    ]
    plain = [re.sub(r"[^\w.=+-]+", "-", text, flags=re.ASCII).strip("-") for text in short]
    return f"{number:03d}-{'__'.join(plain)}"[:_NAME_LENGTH].rstrip("-_.")


def _known_points(folder: Path) -> dict[int, dict[str, Any]]:
    """What sweep.json says; nothing where there is none.

    Raises:
        ConfigError: if the folder is that of a run.
        DataError: if the file is damaged.
    """
    if RunFiles(folder).config.exists():
        raise ConfigError(f"run.dir={folder} is the folder of a run: choose another for the sweep")
    path = folder / SWEEP
    try:
        points = json.loads(path.read_text())["points"]
        return {
            int(point["number"]): {"name": str(point["name"]), "overrides": list(map(str, point["overrides"]))}
            for point in points
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({e}): restore it, or choose another run.dir") from None


def run_sweep(sweep: Sweep, start: Callable[[Point], Ended]) -> int:
    """Start the points one after another; those that have finished are passed over, one that fails holds up no other.

    Args:
        sweep: to run.
        start: starts the run of a point and waits for its end.

    Returns:
        0, or the exit code of the first point that failed.
    """
    sweep.write()
    codes: dict[int, int] = {}
    for place, point in enumerate(sweep.points, start=1):
        told = f"point {place} of {len(sweep.points)}, {point.name}"
        try:
            if point.finished():
                print(f"{told}: has finished, passed over", flush=True)
                continue
            print(f"{told}: starts", flush=True)
            ended = start(point)
        except CoppiceError as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
            ended = Ended(e.exit_code, asked=False)
        codes[point.number] = ended.code
        if ended.asked:
            print(f"{told}: stopped on request; the same command goes on from here", flush=True)
            break
    print()
    for line in table(sweep.folder, sweep.known, codes):
        print(line)
    return next((code for code in codes.values() if code), 0)


def table(folder: Path, known: Mapping[int, dict[str, Any]], codes: Mapping[int, int] | None = None) -> list[str]:
    """How the points of a sweep stand, a line each, and which has the lowest validation loss.

    Args:
        folder: of the sweep.
        known: its points, by number.
        codes: exit codes of those that have just been run.
    """
    rows = [("point", "state", "step", "validation loss")]
    losses: dict[str, float] = {}
    for number in sorted(known):
        name, code = known[number]["name"], (codes or {}).get(number, 0)
        state, steps, loss = _standing(folder / name)
        if loss is not None and state == "finished":
            losses[name] = loss
        state = f"failed (exit code {code})" if code else state
        rows.append((name, state, steps, "-" if loss is None else f"{loss:.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    ]
    if len(losses) > 1:
        lines.append(f"lowest of those that have finished: {min(losses, key=lambda name: losses[name])}")
        best = sorted(sorted(losses, key=lambda name: losses[name])[:_COMPARED])
        lines.append(f"side by side: python -m train.report compare {folder}/{{{','.join(best)}}}")
    return lines


def _standing(run_dir: Path) -> tuple[str, str, float | None]:
    """State of a run, its steps made and in all, and its last validation loss."""
    try:
        status = read_status(run_dir)
        if status is None:
            return "not started", "-", None
        evaluations = [e for e in RunFiles(run_dir).read_events() if e["event"] == "evaluation"]
    except DataError as e:
        return str(e), "-", None
    loss = evaluations[-1]["details"].get("valid_loss") if evaluations else None
    return str(status.get("state")), f"{status.get('step')}/{status.get('steps')}", loss


def add_flag(parser: argparse.ArgumentParser) -> None:
    """The option of `launch local` and `launch slurm` that makes a sweep of a run."""
    parser.add_argument("-m", "--multirun", action="store_true", help="a run for each combination of values (sweep)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m launch sweep`."""
    parser.add_argument("folder", type=Path, metavar="SWEEP_DIR", help="run.dir of the sweep")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `python -m launch sweep`."""
    known = _known_points(arguments.folder)
    if not known:
        raise LaunchError(f"{arguments.folder} holds no {SWEEP}: name the run.dir of a sweep")
    for line in table(arguments.folder, known):
        print(line)
    return 0
