"""The events of a run for a report: which of them hold, and what its evaluations measured.

A resumed run repeats events; those that a later attempt replaced are marked superseded and left out of every figure.

Usage: `events = load_events(RunFiles(run_dir))`, then `load_evaluations(events)`.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parallel.errors import DataError
from train.run_files import RunFiles, numbered_records

# Where an evaluation of the new model lies behind the step of the switch: after the line at + 0.5.
BEHIND = 0.75


# What is measured between siblings at an evaluation, and what of each validation set.
SPREADS = ("sibling_divergence", "sibling_moment_divergence", "routing_agreement")
SET_FIGURES = ("loss", "perplexity", "bits_per_byte", "tokens")


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
    `spreads` has mean, min and max by the name of the measure (SPREADS), `sets` the figures by the name of the
    validation set (SET_FIGURES); both hold only what was recorded.
    """

    step: int
    position: float
    valid_loss: float | None
    tokens: float | None
    spreads: dict[str, dict[str, float]]
    sets: dict[str, dict[str, float]]


def number(value: object) -> float | None:
    """A finite number, or None: what a run did not record must not look like zero."""
    if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
        return float(value)
    return None


def load_events(files: RunFiles) -> list[Event]:
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


def model_sizes(events: list[Event]) -> dict[int, tuple[float | None, float | None]]:
    """Parameters, total and active, by number of experts, from each start and each expansion that recorded them."""
    sizes: dict[int, tuple[float | None, float | None]] = {}
    for event in events:
        experts = number(event.details.get({"start": "num_experts", "expansion": "to_experts"}.get(event.name, "")))
        total, active = (number(event.details.get(f"parameters_{key}")) for key in ("total", "active"))
        if event.name in ("start", "expansion") and total is not None:
            sizes[int(experts or 0)] = (total, active)
    return sizes


def load_evaluations(events: list[Event]) -> list[Evaluation]:
    """The evaluations by position. The trainer writes the one that follows a switch just before the expansion event."""
    found: list[Evaluation] = []
    grown_at: int | None = None
    for event in events:
        if event.superseded:
            continue
        if event.name == "evaluation":
            found.append(_evaluation(event, BEHIND if event.step == grown_at else 0.0))
        elif event.name == "expansion":
            grown_at = event.step
            if found and found[-1].step == event.step and _is_outcome(found[-1].valid_loss, event):
                found[-1] = replace(found[-1], position=event.step + BEHIND)
    # Of several at one position the last stands: a restarted run repeats them.
    by_position = {evaluation.position: evaluation for evaluation in found}
    return [by_position[position] for position in sorted(by_position)]


def _evaluation(event: Event, behind: float) -> Evaluation:
    spreads = {name: _numbers(event.details.get(name), ("mean", "min", "max")) for name in SPREADS}
    sets = event.details.get("sets")
    figures = {name: _numbers(row, SET_FIGURES) for name, row in sets.items()} if isinstance(sets, dict) else {}
    return Evaluation(
        step=event.step,
        position=event.step + behind,
        valid_loss=number(event.details.get("valid_loss")),
        tokens=number(event.details.get("tokens")),
        spreads={name: values for name, values in spreads.items() if values},
        sets={name: values for name, values in figures.items() if values},
    )


def _numbers(raw: object, keys: tuple[str, ...]) -> dict[str, float]:
    """Those of the keys that hold a finite number."""
    values = {key: number(raw.get(key)) for key in keys} if isinstance(raw, dict) else {}
    return {key: value for key, value in values.items() if value is not None}


def _is_outcome(loss: float | None, expansion: Event) -> bool:
    """Whether a validation loss is the one an expansion recorded right after the switch."""
    return loss is not None and loss == number(expansion.details.get("valid_loss_after"))


def load_checkpoints(events: list[Event]) -> list[Event]:
    """The last checkpoint event of each path, by step: one written again replaced the first."""
    last = {str(event.details.get("path", "")): event for event in events if event.name == "checkpoint"}
    return sorted(last.values(), key=lambda event: event.step)
