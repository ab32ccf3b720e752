"""The switch from one stage to the next: two ways to carry the training state over, with the same result bit for bit.

`through_memory` moves it between the ranks in memory (`upcycle/live.py`), `through_checkpoint` transforms the old stage's
checkpoint on disk (`upcycle/transform.py`). Either ends with the new stage verified; whatever is not a tensor sized by
experts (schedule, generators, Adam's step count) is carried over by both alike.
"""

import contextlib
import gc
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.fingerprint import take_fingerprints
from model.holdings import describe_stage
from model.sharded_state import expert_keys
from parallel.devices import empty_cache
from parallel.errors import ExpansionError
from parallel.host_memory import refuse_too_little
from parallel.layout import Layout
from parallel.optimizer_ages import OptimizerAges
from parallel.optimizer_state import get_step, has_moments, set_step
from parallel.redistribute import Redistribution
from train import random_state
from train.checkpoint.folder import checkpoint_name, read_manifest
from train.stage import build_stage
from train.watchdog import Watchdog
from upcycle.live import add_bias_noise, move_state
from upcycle.optimizer_rules import ages_after, apply_rule, attach, rates_after
from upcycle.plan import ExpansionPlan
from upcycle.stage_config import StageConfig
from upcycle.transform import expand_checkpoint
from upcycle.verify import verify_expansion

if TYPE_CHECKING:
    from train.run import Run


class Clock:
    """Seconds per named act of the switch; the watchdog is told of each."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.seconds: dict[str, float] = {}
        self._watchdog = watchdog

    @contextlib.contextmanager
    def act(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to an act."""
        began = time.perf_counter()
        with self._watchdog.act(f"the switch ({name})"):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass
class _Carried:
    """What is neither a tensor nor sized by experts and goes from stage to stage: schedule and generators."""

    scheduler: dict[str, Any]
    generators: dict[str, Any]
    layout: Layout

    @classmethod
    def of(cls, run: "Run") -> "_Carried":
        return cls(run.stage.scheduler.state_dict(), random_state.capture(), run.layout)

    def give(self, run: "Run") -> None:
        run.stage.scheduler.load_state_dict(self.scheduler)
        if run.layout is self.layout:
            random_state.restore(self.generators)
        else:
            # Another layout has other streams. They start here, whatever building the stage has drawn.
            run.seed_streams()


@contextlib.contextmanager
def _out_of_memory_explained(what: str) -> Iterator[None]:
    """Turn a rank's lack of memory into an error that names the remedy.

    Raises:
        ExpansionError: instead of what torch or Python raises then.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as e:
        raise ExpansionError(
            f"{what} ran out of memory ({str(e).splitlines()[0] if str(e) else 'no details'}): start the job again, it "
            "resumes from its newest checkpoint; lower upcycle.transfer_chunk_mib, or give the stage a larger "
            "parallel.expert"
        ) from e


def through_memory(run: "Run", plan: ExpansionPlan, saved: Path | None, clock: Clock) -> Redistribution:
    """Replace the stage of a run by the next one, moving its state in memory and freeing the old as the new one fills.

    Args:
        run: between two steps.
        plan: the expansion, agreed on by all ranks.
        saved: checkpoint of the current state, if there is one.
        clock: told where the time goes.

    Raises:
        ExpansionError: on all ranks, if a rank fails or the new stage is not what the plan says.
    """
    options = run.settings.upcycle
    with clock.act("describe"):
        with run.layout.together("reading the checkpoint before the switch"):
            before = read_manifest(saved).fingerprints if saved else None
        if before is None:
            before = take_fingerprints(run.stage.chunks, run.stage.optimizer, run.layout, error=ExpansionError)
        carried = _Carried.of(run)
        experts = expert_keys(run.stage.chunks, run.layout)
        told = run.layout.gather_objects((get_step(run.stage.optimizer), has_moments(run.stage.optimizer)))
        step, moments = max(step for step, _ in told), any(has for _, has in told)
        old = describe_stage(run.stage.chunks, run.stage.optimizer, run.layout, moments=moments)
        if options.offload:
            refuse_too_little(old.host_bytes(), socket.gethostname(), run.layout)
    with clock.act("rebuild"):
        # The order keeps the peak low: first everything goes that the new stage does not need, and the new stage gets no
        # gradients until the old one is gone. Blocks that torch keeps cached are given back, for those who allocate past it.
        run.stage.release_gradients()
        if options.offload:
            what = "moving the old stage to host memory"
            with run.layout.together(what), _out_of_memory_explained(what), torch.no_grad():
                old.move_to_host()
        number, plans = run.stage.number + 1, [*run.plans, plan.to_dict()]
        run.stage.release()
        gc.collect()
        empty_cache(run.layout.device)
        layout = run.enter_layout(number)
        with layout.together("building the next stage"), _out_of_memory_explained("building the next stage"):
            run.stage = build_stage(
                run.settings, number, layout, run.vocab_size, plans, schedule_begins=run.schedule_begins, blank=True
            )
            new = describe_stage(run.stage.chunks, run.stage.optimizer, layout, moments=moments)
    with clock.act("move"):
        old.free_as_it_goes()
        chunk_bytes = options.transfer_chunk_mib << 20
        with _out_of_memory_explained("moving the training state"):
            moved = move_state(old, new, plan, experts, layout, chunk_bytes=chunk_bytes)
        del old
        empty_cache(layout.device)
        with layout.together("completing the next stage"), _out_of_memory_explained("completing the next stage"):
            add_bias_noise(run.stage.chunks, plan)
            set_step(run.stage.optimizer, step)
            apply_rule(plan, plan.rule, run.stage.chunks, run.stage.optimizer, layout)
            carried.give(run)
    with clock.act("verify"):
        found = take_fingerprints(run.stage.chunks, run.stage.optimizer, layout, error=ExpansionError)
        verify_expansion(before, found, plan, experts)
    with (
        clock.act("move"),
        layout.together("completing the next stage"),
        _out_of_memory_explained("completing the next stage"),
    ):
        # Last, because verifying takes memory of its own.
        run.stage.restore_gradients()
    run.enter_stage(plans)
    _let_age(run, plan, step)
    return moved


def _let_age(run: "Run", plan: ExpansionPlan, adam_step: int) -> None:
    """From the next step on, state that the expansion reset is updated by its own age, and rates of their own hold."""
    run.ages = aged(run.ages, plan, run.settings.upcycle.stages[run.stage.number - 1], adam_step)
    attach(run.ages, run.stage.optimizer, run.stage.chunks, run.layout)


def aged(ages: OptimizerAges, plan: ExpansionPlan, rules: StageConfig, adam_step: int) -> OptimizerAges:
    """Ages and learning rates of optimizer state after an expansion.

    Args:
        ages: before it.
        plan: the expansion.
        rules: the stage as configured.
        adam_step: Adam's step count at the expansion.
    """
    return rates_after(
        ages_after(ages, plan, plan.rule, adam_step),
        plan,
        adam_step,
        router=rules.router_lr_multiplier,
        replicas=rules.replica_lr_multiplier,
        steps=rules.lr_multiplier_steps,
    )


def through_checkpoint(run: "Run", plan: ExpansionPlan, source: Path, clock: Clock) -> None:
    """Replace the stage of a run by the next one through the checkpoint in `source`, and publish the new one.

    Args:
        run: between two steps.
        plan: the expansion, agreed on by all ranks.
        source: checkpoint of the current state.
        clock: told where the time goes.

    Raises:
        ExpansionError: if the new stage is not what the plan says; it is not published then.
        CheckpointError: if the disk fails.
    """
    persistence = run.persistence
    old = persistence.manifest()
    carried = _Carried.of(run)
    number, plans = run.stage.number + 1, [*run.plans, plan.to_dict()]
    folder, name, began = persistence.folder, checkpoint_name(run.step, number, expanded=True), time.perf_counter()
    tensors = folder.reserve(name, persistence.needed_bytes(plan.experts_after / plan.experts_before)) / "tensors"
    with clock.act("transform"):
        expand_checkpoint(source / "tensors", tensors, plan, old.experts, run.layout)
    # The disk has time until the new stage stands; it is built from what the system still has in its cache.
    with folder.reading_back(name) as files:
        with clock.act("rebuild"):
            run.stage.release()
            gc.collect()
            empty_cache(run.layout.device)
            layout = run.enter_layout(number)
            run.stage = build_stage(
                run.settings, number, layout, run.vocab_size, plans, schedule_begins=run.schedule_begins
            )
        with clock.act("load"):
            persistence.load_stage(tensors, old.optimizer_step)
            carried.give(run)
            with layout.together("saving generator states"):
                random_state.save(tensors.parent / "rng", layout.rank)
        with clock.act("verify"):
            found = take_fingerprints(run.stage.chunks, run.stage.optimizer, layout, error=ExpansionError)
            verify_expansion(old.fingerprints, found, plan, old.experts)
        run.enter_stage(plans)
        _let_age(run, plan, old.optimizer_step)
        manifest = replace(
            old,
            ages=run.ages.to_dict(),
            stage=number,
            num_experts=plan.experts_after,
            layout=layout.describe(),
            fingerprints=found,
            experts=expert_keys(run.stage.chunks, layout),
            plans=list(run.plans),
            stages=[entry.to_dict() for entry in run.course.entries[: run.course.begun]],
            guard=run.guard.to_dict() if run.guard else None,
        )
        with clock.act("publish"):
            mine: dict[str, list[Any]] = {}
            with layout.together("reading a checkpoint back"):
                mine = files()
            path = folder.publish(name, manifest, mine)
    persistence.saved(path, time.perf_counter() - began, manifest)
