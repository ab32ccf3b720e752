"""What a report says, computed from a run directory: columns of numbers, stages, expansions, checkpoints, load history.

Separate from drawing and from HTML so that the numbers can be tested and printed alone. A resumed run repeats events;
those that a later attempt replaced are marked superseded and left out of every figure and total.
Shape suffix: S recorded steps.

Usage: `record = load_run(Path("runs/a"))`
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import DataError
from train.report.columns import Floats, load_columns, step_parts
from train.report.events import (
    Evaluation,
    Event,
    load_checkpoints,
    load_evaluations,
    load_events,
    model_sizes,
    number,
)
from train.report.load import LoadHistory, load_histories
from train.report.plans import read_plan
from train.run_files import RunFiles

# Share of a stage averaged for "training loss at its end", and the most steps that may be.
END_SHARE, END_STEPS = 0.05, 100


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
    """A stretch of steps with one expert count: `[start, stop)` are rows of the columns.

    Speeds are medians over its steps, memory is the peak.
    """

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
    tflops_per_device: float | None
    mfu: float | None
    memory_bytes: float | None
    # Mean seconds of each part of a step; empty where the run timed none.
    part_seconds: dict[str, float]


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
    steps_S, columns = load_columns(files)
    events = load_events(files)
    start = next((event.details for event in reversed(events) if event.name == "start"), {})
    expansions = _expansions(files, events, steps_S, columns)
    config_text = ""
    if files.config.exists():
        config_text = files.config.read_text(encoding="utf-8", errors="replace")
    return RunRecord(
        name=files.run_dir.resolve().name,
        files=files,
        steps_S=steps_S,
        columns=columns,
        stages=_stages(steps_S, columns, model_sizes(events)),
        expansions=expansions,
        evaluations=load_evaluations(events),
        events=events,
        loads=load_histories(files),
        start=start,
        status=_status(events, int(steps_S[-1])),
        config_text=config_text,
        checkpoints=load_checkpoints(events),
    )


def _expansions(files: RunFiles, events: list[Event], steps_S: Floats, columns: dict[str, Floats]) -> list[Expansion]:
    """One per expansion event, plus one per change of stage that has no event (a kill between the two)."""
    switches = [event for event in events if event.name == "expansion" and not event.superseded]
    found = {event.step: _expansion(files, event.step, event.details) for event in switches}
    experts_S = columns["num_experts"]
    for row in np.flatnonzero(_changed(columns["stage"])):
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
    sizes: dict[int, tuple[float | None, float | None]],
) -> list[Stage]:
    edges = [0, *np.flatnonzero(_changed(columns["stage"])).tolist(), len(steps_S)]
    parts = step_parts(columns)
    stages = []
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        experts = int(number(float(columns["num_experts"][begin])) or 0)
        total, active = sizes.get(experts, (None, None))
        tail = max(1, min(END_STEPS, round(END_SHARE * (end - begin))))
        before = columns["tokens"][begin - 1] if i else 0.0
        means = {name: _mean(seconds[begin:end]) for name, seconds in parts.items()}
        memory = columns["memory_bytes"][begin:end]
        stages.append(
            Stage(
                index=int(number(float(columns["stage"][begin])) or 0),
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
                tflops_per_device=_median(columns["tflops_per_device"][begin:end]),
                mfu=_median(columns["mfu"][begin:end]),
                memory_bytes=float(np.nanmax(memory)) if np.isfinite(memory).any() else None,
                part_seconds={name: mean for name, mean in means.items() if mean is not None},
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
