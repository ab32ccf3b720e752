"""The expansion inside the running job: score, plan, save, switch, verify, go on.

Between two optimizer steps, on all ranks or none. The stage before is complete in its checkpoint first (unless
`upcycle.save_before=false`); `train/switch.py` then carries the state over.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.build import count_parameters
from model.load import restored_counters
from parallel.cluster import coordinates
from parallel.config import ParallelConfig
from parallel.errors import ExpansionError
from parallel.redistribute import Redistribution
from parallel.transformer_engine import counted_as_one_step
from train import random_state
from train.acceleration import changed, choice_lines
from train.config import RunSettings
from train.evaluation import Evaluated, evaluate
from train.graphs import drop_graphs
from train.guard import Guard
from train.health import beyond
from train.signals import Stopping
from train.step import run_micro_batches
from train.switch import Clock, through_checkpoint, through_memory
from upcycle.placement import contiguous
from upcycle.plan import ExpansionPlan, plan_expansion
from upcycle.stage_config import StageConfig
from upcycle.utility import GRADIENT_UTILITIES, gradient_scores, weight_scores

if TYPE_CHECKING:
    from train.run import Run

# Layer number -> a utility or load per expert, [E].
Amounts = Mapping[int, Sequence[float]]


def expand(run: "Run") -> None:
    """Take a run into its next stage in place; on return the next step trains there.

    Raises:
        ExpansionError: if ranks disagree on the plan, a rank fails, or anything is not as the plan says afterwards. The
            stage before is complete in its checkpoint.
        Stopping: on all ranks, if any was asked to stop before anything has moved, or during the evaluation afterwards.
    """
    clock, options = Clock(run.watchdog), run.settings.upcycle
    decided = run.stage.choices
    run.persistence.settle()
    # Scoring takes the model over batches in its own way, and needs the room.
    drop_graphs(run, "the switch")
    before = evaluate(run)
    with clock.act("plan"):
        plan = make_plan(run)
    for line in plan.table():
        run.console.say(line)
    saved: Path | None = None
    if options.save_before or options.path == "checkpoint":
        with clock.act("save"):
            saved = run.persistence.save_unless_saved(own=True)
    # From here on it is quicker to finish than to do it again.
    run.stop.raise_if_agreed(run.layout)
    if before is not None and plan.experts_after > plan.experts_before:
        run.guard = Guard(run.step, plan.stage, before.loss, saved.name if saved else None)
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
    for line in choice_lines(changed(decided, run.stage.choices)):
        run.console.say(line)
    _announce(run, plan, clock, before, moved)


def _announce(
    run: "Run", plan: ExpansionPlan, clock: Clock, before: Evaluated | None, moved: Redistribution | None
) -> None:
    """Evaluate again, and tell what happened.

    Raises:
        ExpansionError: if exact mode did not keep the loss.
    """
    after, stopping = None, False
    try:
        after = evaluate(run)
    except Stopping:
        # What happened is to be told first; whoever resumes evaluates.
        stopping = True
    before_loss, after_loss = (evaluated.loss if evaluated else None for evaluated in (before, after))
    if plan.mode == "exact" and before_loss is not None and after_loss is not None:
        # Rounding alone: the same tokens meet copies of the same weights.
        allowed = before_loss * (1e-3 if run.settings.run.precision == "bf16" else 1e-5)
        if abs(after_loss - before_loss) > allowed:
            raise ExpansionError(
                f"after the expansion in exact mode the validation loss went from {before_loss} to {after_loss}: start "
                "the job again: it resumes from its newest checkpoint"
            )
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
        layout=run.layout.describe(),
        moved_bytes=moved.sent if moved else None,
        least_bytes=moved.least if moved else None,
        valid_loss_before=before_loss,
        valid_loss_after=after_loss,
        sets=_per_set(before, after),
        pause_seconds=pause,
        seconds=clock.seconds,
        **count_parameters(run.settings.model, run.stage.chunks, run.layout),
    )
    change = (
        "" if before_loss is None or after_loss is None else f", validation loss {before_loss:.4f} -> {after_loss:.4f}"
    )
    told = {"from_experts": plan.experts_before, "to_experts": plan.experts_after, "pause_seconds": pause}
    losses = {"valid_loss_before": before_loss, "valid_loss_after": after_loss}
    run.tracker.expansion(run.step, run.stage.number, {**told, **losses})
    run.tracker.keep(run.step, _plan_file(run, plan), "expansion-plan")
    what = f"expanded {plan.experts_before} -> {plan.experts_after} experts" if grown else "changed the layout"
    run.console.say(f"{what} in {pause:.1f} s, verified{change}")
    if stopping:
        raise Stopping


def _per_set(before: Evaluated | None, after: Evaluated | None) -> dict[str, dict[str, float | None]]:
    """Losses before and after by validation set, in nats per token; None after where a request to stop came first."""
    return {
        name: {"loss_before": figures.loss, "loss_after": after.sets[name].loss if after else None}
        for name, figures in (before.sets if before else {}).items()
    }


def make_plan(run: "Run") -> ExpansionPlan:
    """Score the experts and measure their load if the rules want it, plan, and make sure that every rank has the same plan.

    Raises:
        ExpansionError: if ranks disagree; nothing has moved yet.
    """
    scores, loads = measure(run, run.settings.upcycle.stages[run.stage.number])
    plan = decide(run.settings, run.stage.number + 1, run.layout.world_size, scores, loads)
    digests = run.layout.gather_objects(plan.digest)
    if len(set(digests)) > 1:
        odd = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise ExpansionError(f"rank {odd} made another expansion plan than rank 0; nothing was changed")
    with run.layout.together("writing the plan"):
        if run.layout.rank == 0:
            _plan_file(run, plan).write_text(json.dumps(plan.to_dict()))
    return plan


def decide(
    settings: RunSettings, number: int, world_size: int, scores: Amounts | None, loads: Amounts | None
) -> ExpansionPlan:
    """The plan of a stage, from what was measured; the same wherever it is made.

    Args:
        settings: of the run, on its course.
        number: of the stage that begins.
        world_size: processes of the run.
        scores: utility [E] per layer number; None for rules that need none.
        loads: measured load [E] per layer number; None takes all experts as equally busy.

    Raises:
        ExpansionError: if a rule cannot reach the target.
    """
    before, after = settings.parallel_of(number - 1), settings.parallel_of(number)
    experts = settings.experts_of(number - 1)
    return plan_expansion(
        settings.upcycle.stages[number - 1],
        settings.model,
        stage=number,
        experts_before=experts,
        scores=scores,
        seed=settings.run.seed,
        loads=loads,
        ep_ranks=after.expert,
        ep_ranks_before=before.expert,
        homes=homes(experts, before, after, world_size),
    )


def homes(experts: int, before: ParallelConfig, after: ParallelConfig, world_size: int) -> list[set[int]] | None:
    """For each expert-parallel rank of the new layout, the old experts that all processes behind it hold already.

    None where layers move between pipeline ranks, because a process then holds no expert of most of its new layers.
    """
    if (before.pipeline, before.chunks()) != (after.pipeline, after.chunks()):
        return None
    blocks = contiguous(experts, before.expert)
    held: list[set[int]] = [set(range(experts)) for _ in range(after.expert)]
    for rank in range(world_size):
        held[coordinates(rank, after, world_size).expert] &= set(blocks[coordinates(rank, before, world_size).expert])
    return held


def _plan_file(run: "Run", plan: ExpansionPlan) -> Path:
    return run.files.plans / f"step-{plan.step:08d}.json"


def wants_gradients(rules: StageConfig) -> bool:
    """Whether the rules go by gradients."""
    return rules.selection != "uniform" and rules.utility in GRADIENT_UTILITIES


def wants_batches(rules: StageConfig) -> bool:
    """Whether the rules go by anything that takes the model over batches."""
    return rules.grows() and (wants_gradients(rules) or rules.placement != "near")


def measure(run: "Run", rules: StageConfig) -> tuple[Amounts | None, Amounts | None]:
    """Scores and loads [E] per layer number, as far as the rules need them; None for what they do not.

    Loads are those of the batches that gradients are taken over, or of forward passes alone where only placement asks.
    """
    stage = run.stage
    stage.gather_parameters()
    scores: Amounts | None = None
    if rules.selection != "uniform" and not wants_gradients(rules):
        scores = weight_scores(stage.chunks, run.layout, stage.num_experts)
    if not wants_batches(rules):
        return scores, None
    generators = random_state.capture()
    stage.load.reset()
    try:
        if wants_gradients(rules):
            scores = _gradient_scores(run, rules)
        else:
            # Nothing may change but the count of tokens: no gradients, and the routers' own counters are put back.
            with torch.no_grad(), restored_counters(stage.moe_parts()):
                _peek(run, rules.scoring_batches, forward_only=True)
    finally:
        random_state.restore(generators)
    share_LE = stage.load.take(run.layout)
    return scores, {number: row.tolist() for number, row in zip(stage.load.layer_numbers, share_LE, strict=True)}


def _peek(run: "Run", wanted: int, *, forward_only: bool) -> None:
    """Run the batches that training will see next; they are not consumed."""
    first, batch = run.samples, run.settings.data.global_batch_size
    with run.watchdog.act("scoring for the switch"):
        for _ in range(wanted):
            run.watchdog.tick()
            run.stop.raise_if_agreed(run.layout)
            first = beyond(first, batch, run.skipped_data)
            run_micro_batches(run.stage, run.layout, run.data.peek(first), forward_only=forward_only)
            first += batch


def _gradient_scores(run: "Run", rules: StageConfig) -> dict[int, list[float]]:
    """Scores from the gradients of the batches that training will see next."""
    config, stage = run.stage.chunks[0].config, run.stage

    def accumulate() -> None:
        finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func
        # Neither reduce gradients nor move the selection bias: this is no step.
        config.finalize_model_grads_func, config.no_sync_func = None, contextlib.nullcontext
        try:
            with contextlib.ExitStack() as stack:
                for chunk in stage.wrapped:
                    stack.enter_context(chunk.no_sync())
                stack.enter_context(counted_as_one_step(stage.wrapped))
                _peek(run, rules.scoring_batches, forward_only=False)
        finally:
            config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync

    return gradient_scores(
        stage.chunks,
        stage.wrapped,
        run.layout,
        stage.num_experts,
        accumulate,
        rules.scoring_batches,
        utility=rules.utility,
    )
