"""Finds a run's course at its start; `upcycle/course.py` is the arithmetic, here are the files that it is told by."""

from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import ConfigError
from parallel.layout import Layout
from train.buildable import check_stage
from train.checkpoint.folder import Manifest, belongs_to
from train.config import RunSettings
from train.guard import RETURNED, held_from
from train.requests import repeated_requests
from upcycle.course import Course, Past, plan_course

if TYPE_CHECKING:
    from train.run import Run


def follow(run: "Run", source: Path | None, manifest: Manifest | None) -> None:
    """Find a run's course: the stages behind its checkpoint, and those ahead as configured and requested; collective.

    Args:
        run: being opened.
        source: the checkpoint it goes on from; None for a fresh start.
        manifest: of that checkpoint.

    Raises:
        ConfigError: naming what does not fit the past, or cannot be built.
    """
    given, past = run.given, None
    if manifest and source:
        own = belongs_to(run.files.run_dir, source)
        run.started_from = manifest.started_from if own else str(source.resolve())
        past = Past.of(str(source), manifest.step, manifest.num_experts, manifest.plans, manifest.stages)
    with run.layout.together("looking for what the guard left"):
        held = held_from(run.files.run_dir) if run.layout.rank == 0 else None
    step, tokens = (manifest.step, manifest.tokens) if manifest else (0, 0)
    course = plan_course(
        given.resolved(step, tokens).upcycle.stages,
        given.model.num_experts,
        past,
        requests=repeated_requests(run, step, [entry.rules for entry in past.entries] if past else []),
        held_from=run.layout.from_rank_zero(held),
        on_load=None if given.run.resume in ("auto", "never") else given.upcycle.on_load,
        expert_ranks=given.parallel.expert,
    )
    run.take_course(course)
    for entry in course.held:
        run.console.say(
            f"{entry.rules.when(entry.key)} is left out: {RETURNED} in run.dir says why, remove it to let it happen"
        )


def settings_on(course: Course, given: RunSettings, layout: Layout) -> RunSettings:
    """What a run's settings mean on a course, if all of what is to come can be done.

    Args:
        course: the stages.
        given: settings as the user gave them.
        layout: the process groups that there are now.

    Raises:
        ConfigError: naming the stage, in mcore's words where it is mcore that refuses.
    """
    settings = given.following(course)
    settings.check_stages(layout.world_size, course)
    for number in range(course.begun + 1, len(settings.upcycle.stages) + 1):
        try:
            check_stage(settings, number, layout.machine(), layout.world_size, layout.device)
        except ConfigError as e:
            raise ConfigError(f"{course.keys[number - 1]}: {e}") from None
    return settings
