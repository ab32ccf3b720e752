"""The course of a run: the stages it has entered and those to come, wherever each of them came from.

A stage may be configured (`upcycle.stages`), requested by an operator while the run was on its way, made when a checkpoint
of fewer experts was loaded, or made by the offline command. What a run has entered is in its checkpoints, one entry per
plan; what is to come follows from the configuration and from requests that are waiting. `plan_course` puts both together,
so that everything else sees one list of stages with steps. Pure Python, the same on every rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

from parallel.errors import ConfigError, ExpansionError
from upcycle.stage_config import StageConfig, StageParallel

ORIGINS = ("configured", "requested", "on_load", "offline")
# A configuration may begin its story after such a stage, with the experts that it left.
_NEW_STORY = ("on_load", "offline")


@dataclass(frozen=True)
class Entry:
    """One stage of a course.

    Attributes:
        rules: as configured, with the step it begins at.
        origin: one of `ORIGINS`.
        key: what messages call it.
    """

    rules: StageConfig
    origin: str
    key: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Entry":
        """The inverse of `to_dict`."""
        rules = dict(values["rules"])
        rules["parallel"] = StageParallel(**rules["parallel"])
        return cls(StageConfig(**rules), values["origin"], values["key"])


@dataclass(frozen=True)
class Past:
    """What a checkpoint says of the stages before it.

    Attributes:
        where: names the checkpoint in messages.
        step: optimizer steps made.
        experts: per stage, the first included.
        entries: stages entered, in order.
        steps: the step after which each of them began.
    """

    where: str
    step: int
    experts: tuple[int, ...]
    entries: tuple[Entry, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(
        cls,
        where: str,
        step: int,
        experts: int,
        plans: Sequence[Mapping[str, Any]],
        entries: Sequence[Mapping[str, Any]],
    ) -> "Past":
        """From the contents of a checkpoint's manifest.

        Args:
            where: the checkpoint.
            step: of the manifest.
            experts: of the manifest; of the first stage if there are no plans.
            plans: as dicts.
            entries: as dicts, one per plan.
        """
        first = plans[0]["experts_before"] if plans else experts
        if plans and plans[0].get("dense"):
            # The shards of a dense model were no experts: the story of these begins with all of them.
            first = plans[0]["experts_after"]
        return cls(
            where=where,
            step=step,
            experts=(first, *(plan["experts_after"] for plan in plans)),
            entries=tuple(Entry.from_dict(entry) for entry in entries),
            steps=tuple(plan["step"] for plan in plans),
        )


@dataclass(frozen=True)
class Course:
    """All stages of a run after its first.

    Attributes:
        first_experts: experts of the first stage.
        entries: stages in order.
        begun: how many of them the run has entered.
        expert_ranks: expert-parallel size of the stages before the first entry that sets one; None for the configured one.
        held: configured stages that are left out, because the guard has returned from there.
    """

    first_experts: int
    entries: tuple[Entry, ...]
    begun: int = 0
    expert_ranks: int | None = None
    held: tuple[Entry, ...] = ()

    @property
    def stages(self) -> list[StageConfig]:
        """The rules of every stage."""
        return [entry.rules for entry in self.entries]

    @property
    def keys(self) -> list[str]:
        """What messages call each stage."""
        return [entry.key for entry in self.entries]

    def with_next(self, entry: Entry) -> "Course":
        """With one more stage, before those to come."""
        entries = (*self.entries[: self.begun], entry, *self.entries[self.begun :])
        return replace(self, entries=entries)

    def entered(self) -> "Course":
        """After the next stage has begun."""
        return replace(self, begun=self.begun + 1)

    def back_to(self, stages: int) -> "Course":
        """With all but the first `stages` stages ahead again."""
        return replace(self, begun=min(self.begun, stages))

    def cut(self, stages: int) -> "Course":
        """With the first `stages` stages only."""
        return replace(self, entries=self.entries[:stages], begun=min(self.begun, stages))


def plan_course(
    configured: Sequence[StageConfig],
    experts: int,
    past: Past | None = None,
    *,
    requests: Sequence[Entry] = (),
    held_from: int | None = None,
    on_load: StageConfig | None = None,
    expert_ranks: int = 1,
) -> Course:
    """Put together what a run has been through and what it is told.

    Args:
        configured: `upcycle.stages`, with steps.
        experts: `model.num_experts`.
        past: of the checkpoint to go on from; None for a fresh start.
        requests: taken by the run at a step that `past` does not reach any more; they are repeated where they were.
        held_from: leave out what was configured from this step on (the guard has returned from it).
        on_load: rules of the expansion that a checkpoint of fewer experts goes through first; None refuses one.
        expert_ranks: `parallel.expert`.

    Raises:
        ConfigError: naming the first stage that does not fit the past, and the remedy.
    """
    past = past or Past("", 0, (experts,), (), ())
    start, entries, grown, base = _story(past, experts), [], [], None
    held: tuple[Entry, ...] = ()
    if start is None and held_from is not None and held_from <= past.step and experts > past.experts[-1]:
        # The guard has returned from growing it.
        start = len(past.entries)
    if start is None:
        if experts and not past.experts[-1]:
            raise ConfigError(
                f"checkpoint {past.where} is of a dense model, model.num_experts is {experts}: make experts of it first, "
                "with python -m upcycle from-dense (docs/dense-to-moe.md)"
            )
        if on_load is None or experts <= past.experts[-1]:
            raise _other_experts(past, experts)
        start, base = len(past.entries), gcd(expert_ranks, past.experts[-1])
        sizes = StageParallel(expert=expert_ranks) if expert_ranks != base else StageParallel()
        rules = replace(on_load, at_step=past.step, num_experts=experts, parallel=sizes)
        grown = [Entry(rules, "on_load", "upcycle.on_load")]
    # Their layouts were those of another configuration.
    entries += [replace(e, rules=replace(e.rules, parallel=StageParallel())) for e in past.entries[:start]]
    told = [Entry(stage, "configured", f"upcycle.stages[{i}]") for i, stage in enumerate(configured)]
    for number in range(start, len(past.entries)):
        entry = past.entries[number]
        if told and _is(told[0].rules, past, number):
            mine = told.pop(0)
            entries.append(replace(mine, rules=replace(mine.rules, at_step=past.steps[number])))
        elif entry.origin != "configured":
            entries.append(entry)
        else:
            raise _changed(past, number, told[0] if told else None)
    if held_from is not None:
        held = tuple(entry for entry in told if entry.rules.at_step >= held_from)
        told = [entry for entry in told if entry.rules.at_step < held_from]
    coming = [*told, *requests]
    for entry in coming:
        if entry.rules.at_step < past.step:
            raise ConfigError(
                f"{entry.rules.when(entry.key)} lies before checkpoint {past.where} (step {past.step}), which did not enter "
                "this stage: use a later step or an earlier checkpoint"
            )
    coming = [*grown, *sorted(coming, key=lambda entry: entry.rules.at_step)]
    return Course(past.experts[0], (*entries, *coming), len(past.entries), base, held)


def _story(past: Past, experts: int) -> int | None:
    """How many stages of the past came before the configuration's own: those that left `experts` experts."""
    starts = [0, *(i + 1 for i, entry in enumerate(past.entries) if entry.origin in _NEW_STORY)]
    return next((start for start in reversed(starts) if past.experts[start] == experts), None)


def _is(stage: StageConfig, past: Past, number: int) -> bool:
    """Whether a configured stage is the one that the past entered as its stage `number`."""
    entered = past.entries[number].rules
    same_time = stage.at_step == past.steps[number] or (stage.at_tokens or 0) == (entered.at_tokens or -1)
    same_size = stage.target(past.experts[number]) == past.experts[number + 1]
    return same_time and same_size and (stage.mode == entered.mode or not entered.grows())


def _other_experts(past: Past, experts: int) -> ConfigError:
    there = past.experts[0]
    remedy = "choose another run.dir, or the settings it was made with"
    if experts > past.experts[-1]:
        remedy += f"; to grow it on load, name it: run.resume={past.where} with a new run.dir"
    return ConfigError(
        f"checkpoint {past.where} is of another model: model.num_experts was {there} there and is {experts} here: {remedy}"
    )


def _changed(past: Past, number: int, told: Entry | None) -> ConfigError:
    """What does not fit about a stage that was configured, and entered, before."""
    before, after = past.experts[number : number + 2]
    went = f"checkpoint {past.where} went on with {after} experts after step {past.steps[number]}"
    if told is None:
        return ConfigError(
            f"upcycle.stages ends before a stage that is over: {went}: list all stages, past expansions cannot be changed"
        )
    key, stage, mode = told.key, told.rules, past.entries[number].rules.mode
    if stage.at_step == past.steps[number] and stage.target(before) == after:
        return ConfigError(
            f"{key}.mode={stage.mode}, but checkpoint {past.where} was expanded with mode={mode}: past expansions cannot "
            "be changed"
        )
    return ConfigError(
        f"{key} gives {stage.target(before)} experts after step {stage.at_step}, but {went}: past expansions cannot be "
        "changed"
    )


def release_fraction(entries: Sequence[Entry], step: int) -> float:
    """How far the last expansion among stages entered has let go of family routing; 1 is plain top-K."""
    for entry in reversed(entries):
        if entry.rules.grows():
            return entry.rules.release_fraction(step)
    return 1.0


def require_released(entries: Sequence[Entry], step: int, where: str, what: str) -> None:
    """Refuse what only a model with plain routing can go through.

    Args:
        entries: stages entered.
        step: optimizer steps made.
        where: the checkpoint.
        what: what was asked for, such as "expanding".

    Raises:
        ExpansionError: naming the step at which the release ends.
    """
    if release_fraction(entries, step) == 1.0:
        return
    ends = max(entry.rules.released_at() for entry in entries)
    raise ExpansionError(
        f"{where} still routes over the families of its last expansion (step {step}, released at step {ends}): {what} would "
        f"give another function than the one that was trained: train on to step {ends} first"
    )
