"""The expansion inside the running job, by way of the checkpoint: score, plan, save, transform, rebuild, load, verify.

Between two optimizer steps, on all ranks or none. Nothing of the old stage is lost before the new one is verified: its
checkpoint is complete on disk first, and the new one is published only after verification.
"""

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.build import count_parameters
from model.fingerprint import take_fingerprints
from model.sharded_state import expert_keys
from parallel.errors import ExpansionError
from train import random_state
from train.checkpoint import Manifest, checkpoint_name
from train.stage import build_stage
from train.step import run_micro_batches
from upcycle.plan import ExpansionPlan, plan_expansion
from upcycle.transform import expand_checkpoint
from upcycle.utility import gradient_scores, weight_scores
from upcycle.verify import verify_expansion

if TYPE_CHECKING:
    from train.run import Run


class _Clock:
    """Seconds per named act of the switch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def act(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def expand(run: "Run") -> None:
    """Grow the experts of a run in place; on return the next step trains the larger model.

    Raises:
        ExpansionError: if ranks disagree on the plan, or anything is not as the plan says afterwards. The stage before
            is complete in its checkpoint.
    """
    clock = _Clock()
    before_loss = run.evaluate()
    with clock.act("plan"):
        plan = make_plan(run)
    for line in plan.table():
        run.console.say(line)
    with clock.act("save"):
        source = run.persistence.save_unless_saved()
    _grow(run, plan, source, clock)
    after_loss = run.evaluate()
    pause = sum(clock.seconds.values())
    run.event(
        "expansion",
        stage=run.stage.number,
        from_experts=plan.experts_before,
        to_experts=plan.experts_after,
        selection=dict(plan.selection),
        plan=str(_plan_file(run, plan).relative_to(run.files.run_dir)),
        valid_loss_before=before_loss,
        valid_loss_after=after_loss,
        pause_seconds=pause,
        seconds=clock.seconds,
        **count_parameters(run.settings.model, run.stage.chunks, run.layout),
    )
    change = (
        "" if before_loss is None or after_loss is None else f", validation loss {before_loss:.4f} -> {after_loss:.4f}"
    )
    run.console.say(
        f"expanded {plan.experts_before} -> {plan.experts_after} experts in {pause:.1f} s, verified{change}"
    )


def make_plan(run: "Run") -> ExpansionPlan:
    """Score the experts if the rule wants it, plan, and make sure that every rank has the same plan.

    Raises:
        ExpansionError: if ranks disagree; nothing has moved yet.
    """
    rules = run.settings.upcycle.stages[run.stage.number]
    run.stage.gather_parameters()
    scores = None
    if rules.selection != "uniform":
        scores = (
            _gradient_scores(run, rules.scoring_batches)
            if rules.utility == "grad_norm"
            else weight_scores(run.stage.chunks, run.layout, run.stage.num_experts)
        )
    plan = plan_expansion(
        rules,
        run.settings.model,
        stage=run.stage.number + 1,
        experts_before=run.stage.num_experts,
        scores=scores,
        seed=run.settings.run.seed,
    )
    digests = run.layout.gather_objects(plan.digest)
    if len(set(digests)) > 1:
        odd = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise ExpansionError(f"rank {odd} made another expansion plan than rank 0; nothing was changed")
    with run.layout.together("writing the plan"):
        if run.layout.rank == 0:
            _plan_file(run, plan).write_text(json.dumps(plan.to_dict()))
    return plan


def _plan_file(run: "Run", plan: ExpansionPlan) -> Path:
    return run.files.plans / f"step-{plan.step:08d}.json"


def _gradient_scores(run: "Run", batches: int) -> dict[int, list[float]]:
    """Scores over the batches that training will see next; they are peeked at, not consumed."""
    config, stage = run.stage.chunks[0].config, run.stage
    available = sum(s.samples for s in run.data.segments) - run.samples
    count = max(1, min(batches, available // run.settings.data.global_batch_size))
    generators = random_state.capture()

    def accumulate() -> None:
        finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func
        # Neither reduce gradients nor move the selection bias: this is no step.
        config.finalize_model_grads_func, config.no_sync_func = None, contextlib.nullcontext
        try:
            with contextlib.ExitStack() as stack:
                for chunk in stage.wrapped:
                    stack.enter_context(chunk.no_sync())
                for number in range(count):
                    first = run.samples + number * run.settings.data.global_batch_size
                    run_micro_batches(stage, run.layout, run.data.peek(first), forward_only=False)
        finally:
            config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync

    scores = gradient_scores(stage.chunks, stage.wrapped, run.layout, stage.num_experts, accumulate, count)
    random_state.restore(generators)
    stage.load.reset()
    return scores


def _grow(run: "Run", plan: ExpansionPlan, source: Path, clock: _Clock) -> None:
    """Replace the stage of a run by the next one, through the checkpoint in `source`."""
    layout, persistence = run.layout, run.persistence
    old = persistence.manifest()
    experts = old.experts
    generators = random_state.capture()
    needed = persistence.needed_bytes(plan.experts_after / plan.experts_before)
    number = run.stage.number + 1
    # Filled once the new stage stands; published with it.
    manifest = Manifest(**vars(old))

    def write(staging: Path) -> None:
        with clock.act("transform"):
            expand_checkpoint(source / "tensors", staging / "tensors", plan, experts, layout)
        with clock.act("rebuild"):
            run.stage.release()
            gc.collect()
            run.stage = build_stage(run.settings, number, layout, run.vocab_size)
        with clock.act("load"):
            persistence.load_stage(staging / "tensors", old.optimizer_step)
            run.stage.scheduler.load_state_dict(old.scheduler)
            random_state.restore(generators)
            with layout.together("saving generator states"):
                random_state.save(staging / "rng", layout.rank)
        with clock.act("verify"):
            found = take_fingerprints(run.stage.chunks, run.stage.optimizer, layout)
            verify_expansion(old.fingerprints, found, plan, experts)
        run.plans.append(plan.to_dict())
        manifest.stage, manifest.num_experts = number, plan.experts_after
        manifest.fingerprints = found
        manifest.experts = expert_keys(run.stage.chunks, layout)
        manifest.plans = list(run.plans)

    began = time.perf_counter()
    path = persistence.folder.write(checkpoint_name(run.step, number, expanded=True), manifest, needed, write)
    persistence.saved(path, time.perf_counter() - began)
