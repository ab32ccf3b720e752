"""An operator's requests to a live run: expand now, at the next step boundary, on all ranks or none.

    RUN_DIR/requests/request-TIME-ID.json           waiting; what `python -m upcycle request` leaves
    RUN_DIR/requests/request-TIME-ID.taken.json     taken after "step"
    RUN_DIR/requests/request-TIME-ID.refused.json   with the "reason"
    RUN_DIR/requests/request-TIME-ID.undone.json    taken, and undone by the guard

Rank 0 looks into the folder once a step; that a request waits travels with the sum of the step's loss, so all ranks learn
of it together. A run that resumes from before a step at which it took a request repeats it there: resumed equals
uninterrupted. Files are written under another name and renamed, and none is ever deleted but for its successor.
"""

import getpass
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError, CoppiceError, DataError, ExpansionError
from train.run_files import RunFiles, make_directory, write_json
from train.settings import read_yaml, stage_from_dict
from upcycle.course import Course, Entry
from upcycle.stage_config import StageConfig

if TYPE_CHECKING:
    from train.run import Run

FORMAT = 1
_MARKS = ("taken", "refused", "undone")


class RequestFolder:
    """The requests of one run directory. The run itself uses it on rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "requests"

    def waiting(self) -> Path | None:
        """The oldest request that nobody has decided on."""
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise DataError(f"{self.root}: cannot be read ({e.strerror})") from None
        # A mark is written before the waiting file goes: with both there, the mark holds.
        decided = {name.split(".")[0] for name in names if name.split(".")[1:2] and name.split(".")[1] in _MARKS}
        waiting = sorted(n for n in names if n.startswith("request-") and n.count(".") == 1 and n.endswith(".json"))
        return next((self.root / name for name in waiting if name.split(".")[0] not in decided), None)

    def write(self, rules: Mapping[str, Any]) -> Path:
        """Leave a request.

        Args:
            rules: keys of an element of `upcycle.stages`, without a trigger.

        Raises:
            DataError: if the folder cannot be written.
        """
        now = datetime.now(UTC)
        body = {
            "format": FORMAT,
            "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "by": f"{_user()}@{socket.gethostname()}",
            "rules": dict(rules),
        }
        make_directory(self.root)
        path = self.root / f"request-{now:%Y%m%dT%H%M%S%f}-{secrets.token_hex(2)}.json"
        write_json(path, body)
        return path

    def read(self, path: Path) -> dict[str, Any]:
        """What a request asks for.

        Raises:
            DataError: if it is no request of a known format.
        """
        try:
            body = json.loads(path.read_text())
            if body["format"] != FORMAT or not isinstance(body["rules"], dict):
                raise ValueError(f"format {body['format']}")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{path} is no request that this version reads ({e}): use python -m upcycle request"
            ) from None
        return dict(body)

    def mark(self, path: Path, mark: str, **details: Any) -> None:
        """Say what became of a request: `taken`, `refused` or `undone`.

        Raises:
            DataError: if the folder cannot be written.
        """
        try:
            body = json.loads(path.read_text())
        except (OSError, ValueError):
            body = {}
        write_json(path.with_name(f"{path.name.split('.')[0]}.{mark}.json"), {**body, **details})
        path.unlink(missing_ok=True)

    def answer(self, path: Path) -> tuple[str, dict[str, Any]] | None:
        """What became of a request, and the file that says so; None while it waits."""
        for mark in _MARKS:
            marked = path.with_name(f"{path.name.split('.')[0]}.{mark}.json")
            if marked.exists():
                return mark, json.loads(marked.read_text())
        return None

    def taken(self) -> list[tuple[Path, int, dict[str, Any]]]:
        """Requests that were taken: file, step, and rules."""
        found = []
        for path in sorted(self.root.glob("request-*.taken.json")):
            if path.with_name(path.name.replace(".taken.", ".undone.")).exists():
                continue
            body = self.read(path)
            if not isinstance(body.get("step"), int):
                raise DataError(f"{path} does not say when it was taken: restore it, or remove it to leave it out")
            found.append((path, body["step"], body["rules"]))
        return found


def _user() -> str:
    """Who asks: a name, or the number of a user that the system has no name for, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def leave_request(run_dir: Path, rules: Mapping[str, Any]) -> tuple[RequestFolder, Path]:
    """Leave a request for a run, after a look whether it could be taken; the run itself decides.

    Args:
        run_dir: of the run.
        rules: keys of an element of `upcycle.stages`, without a trigger.

    Returns:
        The folder and the file.

    Raises:
        CoppiceError: if this is no run, it has finished, or the stage cannot be.
    """
    files = RunFiles(run_dir)
    if not files.config.is_file():
        raise DataError(f"{run_dir} is no run directory: it has no {files.config.name}")
    events = files.read_events()
    starts = [event for event in events if event["event"] in ("start", "stop")]
    if starts and starts[-1]["event"] == "stop" and starts[-1]["details"].get("reason") == "finished":
        raise ExpansionError(
            f"{run_dir} has finished at step {starts[-1]['step']}: nothing will take a request; start it again with a "
            "larger run.steps first, or use python -m upcycle expand"
        )
    settings = read_yaml(files.config)
    metrics = files.read_metrics()
    step, experts = (metrics[-1]["step"], metrics[-1]["num_experts"]) if metrics else (0, settings.model.num_experts)
    layouts = [event["details"]["layout"] for event in events if event["details"].get("layout")]
    entry = request_entry("the request", rules, max(1, step))
    if layouts:
        sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
        layout = replace(settings.parallel, **{name: layouts[-1][name] for name in sizes})
        settings = replace(settings, parallel=layout)
        course = Course(experts, (entry,))
        settings.following(course).check_stages(layouts[-1]["world"], course)
    folder = RequestFolder(run_dir)
    return folder, folder.write(rules)


def request_entry(name: str, rules: Mapping[str, Any], step: int) -> Entry:
    """A request as a stage that begins after `step`.

    Args:
        name: of its file, for messages.
        rules: as the file has them.
        step: where the run stands.

    Raises:
        ConfigError: for an unknown key or a value that is impossible by itself.
    """
    stage = stage_from_dict(rules, name)
    if stage.at_tokens is not None or stage.at_step != -1:
        raise ConfigError(f"{name}: a request is taken at the next step: drop at_step and at_tokens")
    stage = replace(stage, at_step=step)
    stage.check(name)
    return Entry(stage, "requested", name)


def repeated_requests(run: "Run", step: int, entered: list[StageConfig]) -> list[Entry]:
    """Requests that the run took at a step that it has gone back behind, to be repeated; collective.

    Args:
        run: being opened.
        step: of the checkpoint it goes on from; 0 for a fresh start.
        entered: stages that this checkpoint has entered.
    """
    with run.layout.together("reading requests"):
        told = RequestFolder(run.files.run_dir).taken() if run.layout.rank == 0 else []
        told = run.layout.from_rank_zero([(path.name, at, rules) for path, at, rules in told])
    known = {stage.at_step for stage in entered}
    again = [(name, at, rules) for name, at, rules in told if at >= step and at not in known]
    for name, at, _ in again:
        run.console.say(f"{name} is repeated at step {at}, where it was taken; remove the file to leave it out")
    return [request_entry(name, rules, at) for name, at, rules in again]


def take_request(run: "Run") -> bool:
    """Decide on the oldest waiting request; collective. True if the run's next stage begins here.

    What cannot be done is refused in the request's file and in the run's events, and training goes on.
    """
    folder, rank = RequestFolder(run.files.run_dir), run.layout.rank
    found: tuple[str, dict[str, Any] | None, str] | None = None
    with run.layout.together("reading a request"):
        path = folder.waiting() if rank == 0 else None
        if path is not None:
            try:
                found = (path.name, folder.read(path)["rules"], "")
            except CoppiceError as e:
                found = (path.name, None, str(e))
    found = run.layout.from_rank_zero(found)
    if found is None:
        return False
    name, rules, problem = found
    if rules is not None:
        try:
            run.take_course(run.course.with_next(request_entry(name, rules, run.step)))
        except CoppiceError as e:
            # Every rank judges the same words by the same rules.
            problem = str(e)
    mark = "refused" if problem else "taken"
    with run.layout.together("answering a request"):
        if rank == 0:
            folder.mark(folder.root / name, mark, step=run.step, reason=problem or None)
    run.event("request", file=name, outcome=mark, reason=problem or None)
    run.console.say(f"step {run.step}: {name} {mark}{f': {problem}' if problem else ''}")
    return not problem


def refuse_waiting(run: "Run", reason: str) -> None:
    """Refuse whatever still waits; collective."""
    with run.layout.together("answering requests"):
        if run.layout.rank == 0:
            folder = RequestFolder(run.files.run_dir)
            while (path := folder.waiting()) is not None:
                folder.mark(path, "refused", reason=reason)
                run.console.say(f"{path.name} refused: {reason}")


def undo_requests(run: "Run", step: int) -> None:
    """Mark the requests taken from `step` on as undone, so that no resume repeats them; rank 0."""
    folder = RequestFolder(run.files.run_dir)
    for path, at, _ in folder.taken():
        if at >= step:
            folder.mark(path, "undone")
