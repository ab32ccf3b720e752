"""The expansion inside the running job: score, plan, save, switch, verify, go on.

Between two optimizer steps, on all ranks or none. The stage before is complete in its checkpoint first (unless
`upcycle.save_before=false`); `train/switch.py` then carries the state over.
"""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from model.build import count_parameters
from parallel.errors import ExpansionError
from parallel.redistribute import Redistribution
from train import random_state
from train.step import run_micro_batches
from train.switch import Clock, through_checkpoint, through_memory
from upcycle.plan import ExpansionPlan, plan_expansion
from upcycle.utility import gradient_scores, weight_scores

if TYPE_CHECKING:
    from train.run import Run


def expand(run: "Run") -> None:
    """Take a run into its next stage in place; on return the next step trains there.

    Raises:
        ExpansionError: if ranks disagree on the plan, a rank fails, or anything is not as the plan says afterwards. The
            stage before is complete in its checkpoint.
    """
    clock, options = Clock(), run.settings.upcycle
    before_loss = run.evaluate()
    with clock.act("plan"):
        plan = make_plan(run)
    for line in plan.table():
        run.console.say(line)
    saved: Path | None = None
    if options.save_before or options.path == "checkpoint":
        with clock.act("save"):
            saved = run.persistence.save_unless_saved()
    moved: Redistribution | None = None
    if options.path == "live":
        moved = through_memory(run, plan, saved, clock)
        for line in moved.table():
            run.console.say(line)
        if options.save_after:
            with clock.act("save"):
                run.persistence.save_unless_saved()
    else:
        assert saved is not None
        through_checkpoint(run, plan, saved, clock)
    _announce(run, plan, clock, before_loss, moved)


def _announce(
    run: "Run", plan: ExpansionPlan, clock: Clock, before_loss: float | None, moved: Redistribution | None
) -> None:
    """Evaluate again, and tell what happened."""
    after_loss = run.evaluate()
    pause = sum(clock.seconds.values())
    grown = plan.experts_after > plan.experts_before
    run.event(
        "expansion" if grown else "layout_change",
        stage=run.stage.number,
        from_experts=plan.experts_before,
        to_experts=plan.experts_after,
        selection=dict(plan.selection),
        plan=str(_plan_file(run, plan).relative_to(run.files.run_dir)),
        path=run.settings.upcycle.path,
        layout=run.layout.config.describe(run.layout.world_size),
        moved_bytes=moved.sent if moved else None,
        least_bytes=moved.least if moved else None,
        valid_loss_before=before_loss,
        valid_loss_after=after_loss,
        pause_seconds=pause,
        seconds=clock.seconds,
        **count_parameters(run.settings.model, run.stage.chunks, run.layout),
    )
    change = (
        "" if before_loss is None or after_loss is None else f", validation loss {before_loss:.4f} -> {after_loss:.4f}"
    )
    what = f"expanded {plan.experts_before} -> {plan.experts_after} experts" if grown else "changed the layout"
    run.console.say(f"{what} in {pause:.1f} s, verified{change}")


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
