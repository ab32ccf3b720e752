"""What a report says, computed from a run directory: columns of numbers, stages, expansions, checkpoints, load history.

Separate from drawing and from HTML so that the numbers can be tested and printed alone. A resumed run repeats events;
those that a later attempt replaced are marked superseded and left out of every figure and total.
Shape suffix: S recorded steps.

Usage: `record = load_run(Path("runs/a"))`
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import DataError
from train.report_load import LoadHistory, load_histories
from train.report_plans import read_plan
from train.run_files import RunFiles, numbered_records

Floats = npt.NDArray[np.float64]

METRICS = (
    "tokens",
    "lm_loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "expert_load_max",
    "expert_load_min",
    "expert_load_entropy",
    "dead_experts",
)
# Where an evaluation of the new model lies behind the step of the switch: after the line at + 0.5.
BEHIND = 0.75
# Share of a stage averaged for "training loss at its end", and the most steps that may be.
END_SHARE, END_STEPS = 0.05, 100


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    time: str
    step: int
    name: str
    details: dict[str, Any]
    superseded: bool = False


@dataclass(frozen=True)
class Evaluation:
    """One validation: mean loss in nats per token, and how far replicas of one parent have moved apart.

    `position` is where it lies on a step axis: its step, or just behind the switch for one that measured its outcome.
    """

    step: int
    position: float
    valid_loss: float | None
    divergence: dict[str, float] | None


@dataclass(frozen=True)
class Expansion:
    """One switch, as its event and its plan recorded it. Fields are None where the run did not record them.

    Without a plan that can be used `plan_problem` says why, as a sentence.
    """

    step: int
    from_experts: int
    to_experts: int
    selection: str
    loss_before: float | None
    loss_after: float | None
    pause_seconds: float | None
    seconds: dict[str, float]
    plan: dict[str, Any] | None
    plan_problem: str

    @property
    def position(self) -> float:
        """Where it lies on a step axis: after its step, before the next."""
        return self.step + 0.5


@dataclass(frozen=True)
class Stage:
    """A stretch of steps with one expert count: `[start, stop)` are rows of the columns."""

    index: int
    num_experts: int
    start: int
    stop: int
    first_step: int
    last_step: int
    tokens: float | None
    parameters_total: float | None
    parameters_active: float | None
    end_loss: float | None
    end_loss_steps: int
    tokens_per_second: float | None
    step_seconds: float | None


@dataclass(frozen=True)
class RunRecord:
    """Everything a report shows."""

    name: str
    files: RunFiles
    steps_S: Floats
    columns: dict[str, Floats]
    stages: list[Stage]
    expansions: list[Expansion]
    evaluations: list[Evaluation]
    events: list[Event]
    loads: list[LoadHistory]
    start: dict[str, Any]
    status: str
    config_text: str
    checkpoints: list[Event]

    def has(self, column: str) -> bool:
        """Whether the run recorded any number under this name."""
        return bool(np.isfinite(self.columns[column]).any())

    @property
    def last_step(self) -> int:
        """The last trained step."""
        return int(self.steps_S[-1])

    @property
    def end_loss(self) -> tuple[float | None, int, str]:
        """Loss at the end of the run, its step and its kind: the last validation, else the last training losses."""
        validations = [e for e in self.evaluations if e.valid_loss is not None]
        if validations:
            return validations[-1].valid_loss, validations[-1].step, "validation"
        return self.stages[-1].end_loss, self.stages[-1].last_step, "training"


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        DataError: it does not exist, is no run directory, has no metrics yet, or holds a line that is not what it says.
    """
    files = RunFiles(run_dir)
    if not files.run_dir.is_dir():
        raise DataError(f"{run_dir}: no such directory: give the directory of a run")
    if not files.metrics.exists() and not files.events.exists():
        raise DataError(f"{run_dir}: not a run directory (no metrics.jsonl, no events.jsonl): give the one of a run")
    steps_S, columns, stage_S, experts_S = _columns(files)
    events = _events(files)
    start = next((event.details for event in reversed(events) if event.name == "start"), {})
    expansions = _expansions(files, events, steps_S, stage_S, experts_S)
    config_text = ""
    if files.config.exists():
        config_text = files.config.read_text(encoding="utf-8", errors="replace")
    return RunRecord(
        name=files.run_dir.resolve().name,
        files=files,
        steps_S=steps_S,
        columns=columns,
        stages=_stages(steps_S, columns, stage_S, experts_S, _sizes(events)),
        expansions=expansions,
        evaluations=_evaluations(events),
        events=events,
        loads=load_histories(files),
        start=start,
        status=_status(events, int(steps_S[-1])),
        config_text=config_text,
        checkpoints=_checkpoints(events),
    )


def number(value: object) -> float | None:
    """A finite number, or None: what a run did not record must not look like zero."""
    if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
        return float(value)
    return None


def _columns(files: RunFiles) -> tuple[Floats, dict[str, Floats], Floats, Floats]:
    """The metrics as columns, sorted by step, each step once (the last line wins), null and absent as NaN."""
    keys = ("step", "stage", "num_experts", *METRICS)
    blocks: list[Floats] = []
    # In blocks: a long run's metrics as Python numbers would take ten times their size as an array.
    records = numbered_records(files.metrics)
    while block := list(itertools.islice(records, 10_000)):
        try:
            blocks.append(np.array([[*map(record.get, keys)] for _, record in block], dtype=np.float64))
        except (TypeError, ValueError):
            raise _bad_metric(files, block, keys) from None
        if not np.isfinite(blocks[-1][:, 0]).all():
            raise _bad_metric(files, block, keys)
    if not blocks:
        raise DataError(f"{files.metrics}: empty: the run has not finished its first step, so there is nothing to show")
    table = np.concatenate(blocks)
    # The sort is stable: of several lines with one step the last written stands.
    table = table[np.argsort(table[:, 0], kind="stable")]
    table = table[np.append(table[1:, 0] != table[:-1, 0], True)]
    columns = {key: np.ascontiguousarray(table[:, i]) for i, key in enumerate(keys)}
    return columns["step"], {key: columns[key] for key in METRICS}, columns["stage"], columns["num_experts"]


def _bad_metric(files: RunFiles, block: list[tuple[int, dict[str, Any]]], keys: tuple[str, ...]) -> DataError:
    """The error for the first value of a block that is not a number, or the first line without a step."""
    for line, record in block:
        for key in keys:
            value = record.get(key)
            if not isinstance(value, int | float) and not (value is None and key != "step"):
                return DataError(f"{files.metrics}:{line}: {key}={value!r} is not a number: remove this line")
    return DataError(f"{files.metrics}: holds a value that is not a number")


def _events(files: RunFiles) -> list[Event]:
    """All events; those a resume, or the guard, took back are marked superseded (their steps were trained again)."""
    events: list[Event] = []
    for line, record in numbered_records(files.events):
        step, name, details = record.get("step"), record.get("event"), record.get("details") or {}
        if not isinstance(step, int) or not isinstance(name, str) or not isinstance(details, dict):
            raise DataError(f"{files.events}:{line}: not an event (step, event, details): remove this line")
        if name in ("resume", "return"):
            experts = number(details.get("num_experts"))
            first = next((i for i, event in enumerate(events) if _taken_back(event, step, experts)), len(events))
            if 0 < first < len(events) and events[first].name == "expansion" and events[first - 1].name == "evaluation":
                # The evaluation of the switch's outcome stands just before it.
                first -= _is_outcome(number(events[first - 1].details.get("valid_loss")), events[first])
            events[first:] = [replace(event, superseded=True) for event in events[first:]]
        events.append(Event(str(record.get("time", "")), step, name, details))
    return events


def _taken_back(event: Event, step: int, experts: float | None) -> bool:
    """Whether resuming at `step` with `experts` experts undoes this event (and all that follow it)."""
    if event.superseded or event.step != step:
        return event.step > step and not event.superseded
    grown = number(event.details.get("to_experts")) if event.name == "expansion" else None
    return grown is not None and experts is not None and grown > experts


def _sizes(events: list[Event]) -> dict[int, tuple[float | None, float | None]]:
    """Parameters, total and active, by number of experts, from each start and each expansion that recorded them."""
    sizes: dict[int, tuple[float | None, float | None]] = {}
    for event in events:
        experts = number(event.details.get({"start": "num_experts", "expansion": "to_experts"}.get(event.name, "")))
        total, active = (number(event.details.get(f"parameters_{key}")) for key in ("total", "active"))
        if event.name in ("start", "expansion") and total is not None:
            sizes[int(experts or 0)] = (total, active)
    return sizes


def _evaluations(events: list[Event]) -> list[Evaluation]:
    """The evaluations by position. The trainer writes the one that follows a switch just before the expansion event."""
    found: list[Evaluation] = []
    grown_at: int | None = None
    for event in events:
        if event.superseded:
            continue
        if event.name == "evaluation":
            raw = event.details.get("sibling_divergence")
            values = {key: number(raw.get(key)) for key in ("mean", "min", "max")} if isinstance(raw, dict) else {}
            known = {key: value for key, value in values.items() if value is not None}
            position = event.step + (BEHIND if event.step == grown_at else 0.0)
            found.append(Evaluation(event.step, position, number(event.details.get("valid_loss")), known or None))
        elif event.name == "expansion":
            grown_at = event.step
            if found and found[-1].step == event.step and _is_outcome(found[-1].valid_loss, event):
                found[-1] = replace(found[-1], position=event.step + BEHIND)
    # Of several at one position the last stands: a restarted run repeats them.
    by_position = {evaluation.position: evaluation for evaluation in found}
    return [by_position[position] for position in sorted(by_position)]


def _is_outcome(loss: float | None, expansion: Event) -> bool:
    """Whether a validation loss is the one an expansion recorded right after the switch."""
    return loss is not None and loss == number(expansion.details.get("valid_loss_after"))


def _checkpoints(events: list[Event]) -> list[Event]:
    """The last checkpoint event of each path, by step: one written again replaced the first."""
    last = {str(event.details.get("path", "")): event for event in events if event.name == "checkpoint"}
    return sorted(last.values(), key=lambda event: event.step)


def _expansions(
    files: RunFiles, events: list[Event], steps_S: Floats, stage_S: Floats, experts_S: Floats
) -> list[Expansion]:
    """One per expansion event, plus one per change of stage that has no event (a kill between the two)."""
    switches = [event for event in events if event.name == "expansion" and not event.superseded]
    found = {event.step: _expansion(files, event.step, event.details) for event in switches}
    for row in np.flatnonzero(_changed(stage_S)):
        step, following = int(steps_S[row - 1]), int(steps_S[row])
        if not any(step <= known < following for known in found):
            counts = {"from_experts": float(experts_S[row - 1]), "to_experts": float(experts_S[row])}
            found[step] = _expansion(files, step, counts)
    return [found[step] for step in sorted(found)]


def _expansion(files: RunFiles, step: int, details: dict[str, Any]) -> Expansion:
    before, after = (int(number(details.get(f"{end}_experts")) or 0) for end in ("from", "to"))
    plan, problem = read_plan(files, step, before, after)
    seconds = details.get("seconds")
    parts = {key: number(value) for key, value in seconds.items()} if isinstance(seconds, dict) else {}
    return Expansion(
        step=step,
        from_experts=before,
        to_experts=after,
        selection=selection_text(details.get("selection")),
        loss_before=number(details.get("valid_loss_before")),
        loss_after=number(details.get("valid_loss_after")),
        pause_seconds=number(details.get("pause_seconds")),
        seconds={key: value for key, value in parts.items() if value is not None},
        plan=plan,
        plan_problem=problem,
    )


_RULE_KEYS = ("rule", "name")


def selection_text(value: object) -> str:
    """A rule with its settings: `greedy: utility grad_norm, max_extra_copies 3`; a bare name as it is."""
    if not isinstance(value, dict):
        return str(value) if value is not None else "not recorded"
    rest = ", ".join(f"{key} {item}" for key, item in value.items() if key not in _RULE_KEYS)
    name = next((str(value[key]) for key in _RULE_KEYS if key in value), "")
    return f"{name}: {rest}" if name and rest else name or rest


def _changed(values: Floats) -> npt.NDArray[np.bool_]:
    """True where a value differs from the one before; NaN counts as no change."""
    changed = np.zeros(len(values), dtype=bool)
    changed[1:] = (values[1:] != values[:-1]) & np.isfinite(values[1:]) & np.isfinite(values[:-1])
    return changed


def _stages(
    steps_S: Floats,
    columns: dict[str, Floats],
    stage_S: Floats,
    experts_S: Floats,
    sizes: dict[int, tuple[float | None, float | None]],
) -> list[Stage]:
    edges = [0, *np.flatnonzero(_changed(stage_S)).tolist(), len(steps_S)]
    stages = []
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        experts = int(number(float(experts_S[begin])) or 0)
        total, active = sizes.get(experts, (None, None))
        tail = max(1, min(END_STEPS, round(END_SHARE * (end - begin))))
        before = columns["tokens"][begin - 1] if i else 0.0
        stages.append(
            Stage(
                index=int(number(float(stage_S[begin])) or 0),
                num_experts=experts,
                start=begin,
                stop=end,
                first_step=int(steps_S[begin]),
                last_step=int(steps_S[end - 1]),
                tokens=number(float(columns["tokens"][end - 1] - before)),
                parameters_total=total,
                parameters_active=active,
                end_loss=_mean(columns["lm_loss"][end - tail : end]),
                end_loss_steps=tail,
                tokens_per_second=_median(columns["tokens_per_second"][begin:end]),
                step_seconds=_median(columns["step_seconds"][begin:end]),
            )
        )
    return stages


def _mean(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _median(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _status(events: list[Event], last_step: int) -> str:
    """How the run ended, from the last of its starts, resumes and stops."""
    turns = [event for event in events if event.name in ("start", "resume", "stop")]
    if not turns or turns[-1].name != "stop":
        return f"unfinished: last recorded step {last_step:,}"
    reason = str(turns[-1].details.get("reason", "unknown"))
    words = {
        "finished": "finished",
        "requested": "stopped on request",
        "stop_at_step": "stopped at the configured step",
        "failed": "failed",
    }
    return f"{words.get(reason, f'stopped ({reason})')} at step {turns[-1].step:,}"
