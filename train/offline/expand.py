"""Plans and expansions without a training job: from a configuration or a checkpoint, with the job's own parts.

`plan_of_settings` and `plan_of_checkpoint` decide what a job would decide; `expand_offline` carries a plan out on a
checkpoint's files, tensor by tensor in bounded memory, into a checkpoint that is bit for bit what the job would have
saved. Rules that go by gradients or loads take the model over batches, as the job does at the same place: the run is
restored from the checkpoint into a folder that is thrown away.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel.compat import prepare_megatron
from parallel.config import ParallelConfig
from parallel.errors import CheckpointError, ConfigError, ExpansionError
from parallel.layout import Layout, join_job, leave_job
from parallel.optimizer_ages import OptimizerAges
from train.checkpoint.files import is_sealed, wrong_files
from train.checkpoint.folder import Manifest, list_checkpoints, need_space, read_manifest
from train.config import RunSettings
from train.data.stream import open_corpora
from train.expansion import Amounts, decide, measure, wants_batches
from train.guard import held_from
from train.offline.files import carry_over_files, seal_alone, staged
from train.run import Run
from train.settings import explain, settings_from_dict
from train.switch import aged
from upcycle.course import Course, Entry, Past, plan_course, require_released
from upcycle.plan import ExpansionPlan
from upcycle.stage_config import StageConfig, StageParallel
from upcycle.stream import stream_expand, stream_weight_scores
from upcycle.verify import verify_expansion

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A checkpoint to plan from, with the settings and the course of its run.

    Attributes:
        path: of the checkpoint.
        manifest: its own.
        settings: of its run, with the user's overrides; stages as configured.
        course: stages entered and to come.
    """

    path: Path
    manifest: Manifest
    settings: RunSettings
    course: Course

    def next_rules(self) -> StageConfig:
        """The next stage of the run, as configured.

        Raises:
            ConfigError: if there is none.
        """
        coming = self.course.stages[self.course.begun :]
        if not coming:
            raise ConfigError(f"{self.path} has no stage to come in its configuration: say --factor or --num-experts")
        return coming[0]

    def restored(self, world_size: int) -> RunSettings:
        """Settings that restore the run where the checkpoint stands, on any number of processes.

        One process takes no layout; several take that of the checkpoint's stage.
        """
        layout = ParallelConfig(timeout_seconds=self.settings.parallel.timeout_seconds)
        if world_size > 1:
            layout = self.settings.following(self.course).parallel_of(self.course.begun)
        # A run does not list that its experts were made of a dense model: it begins with them.
        first = int(bool(self.manifest.plans and self.manifest.plans[0].get("dense")))
        stages = self.course.stages[first : self.course.begun]
        begun = [replace(s, at_tokens=None, parallel=StageParallel()) for s in stages]
        return replace(
            self.settings,
            model=replace(self.settings.model, num_experts=self.course.first_experts),
            parallel=layout,
            # Nobody evaluates, and the corpora of the sets may be elsewhere.
            evaluation=replace(self.settings.evaluation, sets=[]),
            # Nothing is trained for as long as graphs would take to pay, and it may be on CPU.
            performance=replace(self.settings.performance, cuda_graphs="none", expert_parallel_overlap=False),
            upcycle=replace(self.settings.upcycle, stages=begun),
        )

    def with_next(self, rules: StageConfig) -> tuple[RunSettings, Entry]:
        """The settings of the run with a stage that begins at the checkpoint, and its entry.

        Raises:
            ConfigError: if the stage cannot be.
        """
        entry = Entry(replace(rules, at_tokens=None, at_step=self.manifest.step), "offline", "the stage")
        course = self.course.cut(self.course.begun).with_next(entry)
        settings = self.settings.following(course)
        entry.rules.check(entry.key)
        settings.check_stages(self.manifest.layout["world"], course)
        return settings, entry


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run.

    Raises:
        CheckpointError: if there is none.
    """
    if is_sealed(path):
        return path
    own = list_checkpoints(path)
    if not own:
        raise CheckpointError(f"{path} is neither a complete checkpoint nor a run directory with one")
    return own[-1]


def read_source(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint that a path names, all of whose files are there, and its manifest.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    path = find_checkpoint(path)
    manifest = read_manifest(path)
    # What they hold is checked by whoever reads them: a load and an expansion compare every tensor with its fingerprint.
    problem = wrong_files(path, manifest.files, "sizes")
    if problem is not None:
        raise CheckpointError(f"checkpoint {path}: {problem}: use an older checkpoint")
    return path, manifest


def settings_of(manifest: Manifest, overrides: list[str]) -> RunSettings:
    """The settings of the run that wrote a checkpoint, with `KEY=VALUE` on top.

    Raises:
        ConfigError: if an override cannot be.
    """
    try:
        values = OmegaConf.merge(OmegaConf.create(manifest.config), OmegaConf.from_dotlist(overrides))
    except OmegaConfBaseException as e:
        raise ConfigError(explain(e)) from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{' '.join(overrides)} is no YAML: {' '.join(str(e).split())}") from None
    return settings_from_dict(dict(OmegaConf.to_container(values)))  # type: ignore[arg-type]


def open_source(path: Path, overrides: list[str]) -> Source:
    """Read a checkpoint's manifest and the configuration in it.

    Args:
        path: a checkpoint, or a run, of which the newest checkpoint counts.
        overrides: `KEY=VALUE` on top of the configuration, such as a corpus that has moved.

    Raises:
        CoppiceError: if there is no complete checkpoint, or an override cannot be.
    """
    path, manifest = read_source(path)
    settings = settings_of(manifest, overrides)
    past = Past.of(str(path), manifest.step, manifest.num_experts, manifest.plans, manifest.stages)
    resolved = settings.resolved(manifest.step, manifest.tokens)
    # Its own run may have grown it on load.
    held = held_from(path.parent.parent)
    course = plan_course(resolved.upcycle.stages, _told_experts(past, settings), past, held_from=held)
    # A stage must lie before the end of the run, and a finished run has ended.
    steps = max(settings.run.steps, manifest.step + 1)
    settings = replace(settings, run=replace(settings.run, steps=steps))
    return Source(path, manifest, settings, course)


def _told_experts(past: Past, settings: RunSettings) -> int:
    """`model.num_experts` of the configuration, or the experts of the first stage where that was before a growth on load."""
    return settings.model.num_experts if settings.model.num_experts in past.experts else past.experts[0]


def plan_of_settings(settings: RunSettings, scores: Amounts | None) -> list[ExpansionPlan]:
    """The plans of all stages of a configuration, as far as they can be known without a model.

    Args:
        settings: checked and resolved.
        scores: utility [E] per layer number for the first stage that needs one.

    Raises:
        ExpansionError: if a stage goes by scores that are not given.
    """
    if not settings.upcycle.stages:
        raise ConfigError("upcycle.stages is empty: say --factor or --num-experts, or name a configuration with stages")
    world = smallest_world(settings)
    plans = []
    for number, rules in enumerate(settings.upcycle.stages, start=1):
        needed = rules.grows() and rules.selection != "uniform"
        if needed and scores is None:
            raise ExpansionError(
                f"upcycle.stages[{number - 1}].selection={rules.selection} goes by the utility of trained experts: name a "
                "checkpoint to plan from, give --scores FILE, or use --selection uniform"
            )
        _check_scores(scores if needed else None, settings, number)
        plans.append(decide(settings, number, world, scores if needed else None, None))
        # Measured on one stage, they say nothing of the next.
        scores = None if needed else scores
    return plans


def _check_scores(scores: Amounts | None, settings: RunSettings, number: int) -> None:
    experts = settings.experts_of(number - 1)
    layers = settings.model.moe_layer_numbers()
    for layer in layers if scores is not None else ():
        given = len((scores or {}).get(layer, ()))
        if given != experts:
            raise ExpansionError(
                f"--scores has {given} numbers for layer {layer}, which has {experts} experts in stage {number - 1}: give "
                f"one number per expert for each of the layers {', '.join(map(str, layers))}"
            )


def plans_of(path: Path) -> list[dict[str, Any]]:
    """The plans a checkpoint has gone through, as dicts; of a run, those of its newest checkpoint."""
    return read_manifest(find_checkpoint(path)).plans


def smallest_world(settings: RunSettings) -> int:
    """The fewest processes that every stage's layout fits on."""
    layouts = settings.upcycle.layouts(settings.parallel)
    return math.lcm(*(_world_of(layout) for layout in layouts))


def _world_of(layout: ParallelConfig) -> int:
    dense, experts = layout.tensor * layout.context, layout.expert * layout.expert_tensor
    return math.lcm(dense, experts) * layout.pipeline


def plan_of_checkpoint(
    source: Source, rules: StageConfig, *, scores: Amounts | None = None, chunk_bytes: int, say: Say
) -> tuple[ExpansionPlan, Entry]:
    """The plan that a job would make where a checkpoint stands.

    Args:
        source: the checkpoint.
        rules: the stage; its trigger is ignored.
        scores: utility [E] per layer number, instead of measuring it.
        chunk_bytes: memory for reading weights.
        say: told what takes long.

    Raises:
        CoppiceError: if the stage cannot be, or the model cannot be run here.
    """
    manifest = source.manifest
    settings, entry = source.with_next(rules)
    number, loads = manifest.stage + 1, None
    world = manifest.layout["world"]
    if scores is not None:
        _check_scores(scores, settings, number)
    elif wants_batches(rules):
        scores, loads = _measured(source, rules, say)
    elif rules.grows() and rules.selection != "uniform":
        say(f"reading the weights of the experts of {source.path}")
        scores = stream_weight_scores(
            source.path / "tensors", manifest.experts, manifest.num_experts, chunk_bytes=chunk_bytes
        )
    return decide(settings, number, world, scores, loads), entry


def _measured(source: Source, rules: StageConfig, say: Say) -> tuple[Amounts | None, Amounts | None]:
    """Restore the run from the checkpoint in a temporary folder, and measure there; collective under torchrun."""
    prepare_megatron()
    world, manifest = int(os.environ.get("WORLD_SIZE", "1")), source.manifest
    settings = source.restored(world)
    if rules.scoring_batches > settings.run.steps - manifest.step:
        # The run is over or nearly so: let the training stream go on.
        steps = manifest.step + rules.scoring_batches
        settings = replace(settings, run=replace(settings.run, steps=steps))
    say(f"taking {rules.scoring_batches} batches over {source.path}, processes: {world}")
    corpora = open_corpora(settings.data)
    joined = join_job(settings.parallel.timeout_seconds)
    try:
        layout = Layout.create(settings.parallel, settings.run.seed)
        made = ""
        with layout.together("making a temporary folder"):
            if layout.rank == 0:
                made = tempfile.mkdtemp(prefix="coppice-plan-")
        folder = layout.from_rank_zero(made)
        settings = replace(settings, run=replace(settings.run, dir=folder, resume=str(source.path)))
        try:
            run, _, _ = Run.restore(settings, layout, corpora)
            try:
                measured = measure(run, rules)
            finally:
                run.close()
            # No rank may still read what rank 0 removes.
            run.layout.barrier()
            return measured
        finally:
            if layout.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        leave_job(joined)


def expand_offline(
    source: Source, plan: ExpansionPlan, entry: Entry, output: Path, *, chunk_bytes: int, say: Say
) -> Manifest:
    """Write the checkpoint that a job would have saved right after the expansion.

    Args:
        source: the checkpoint of E experts; it is only read.
        plan: made for it.
        entry: the stage that the plan begins.
        output: folder of the new checkpoint; it must not exist, or be empty.
        chunk_bytes: memory for a piece of a tensor.
        say: told of progress.

    Returns:
        The manifest of the new checkpoint.

    Raises:
        CoppiceError: naming what does not fit, or cannot be written; nothing is published then.
    """
    old = source.manifest
    entries = source.course.entries[: source.course.begun]
    require_released(entries, old.step, str(source.path), "expanding it")
    if plan.experts_after == plan.experts_before:
        raise ExpansionError(f"the plan adds no experts to {source.path}: any layout reads that checkpoint as it is")
    check_plan(plan, source)
    with staged(output) as staging:
        grown = plan.experts_after / plan.experts_before
        size = sum(size for name, (size, _) in old.files.items() if name.startswith("tensors/"))
        need_space(staging, int(size * grown), "the checkpoint", output=output)
        found = stream_expand(
            source.path / "tensors", staging / "tensors", plan, old.experts, chunk_bytes=chunk_bytes, say=say
        )
        verify_expansion(old.fingerprints, found, plan, old.experts)
        carry_over_files(source.path, old.files, staging)
        ages = aged(OptimizerAges.from_dict(old.ages), plan, entry.rules, old.optimizer_step)
        manifest = replace(
            old,
            stage=plan.stage,
            num_experts=plan.experts_after,
            fingerprints=found,
            plans=[*old.plans, plan.to_dict()],
            stages=[*old.stages, entry.to_dict()],
            ages=ages.to_dict(),
            guard=None,
        )
        seal_alone(staging, manifest)
    return manifest


def check_plan(plan: ExpansionPlan, source: Source) -> None:
    """Refuse a plan that was made for another place.

    Raises:
        ExpansionError: naming both.
    """
    manifest = source.manifest
    if plan.dense is not None:
        raise ExpansionError(
            f"the plan makes experts of a dense model, and {source.path} has experts: use expand's own plan"
        )
    told, here = (plan.step, plan.stage, plan.experts_before), (manifest.step, manifest.stage + 1, manifest.num_experts)
    if told != here:
        raise ExpansionError(
            f"the plan is for step {told[0]}, stage {told[1]}, {told[2]} experts, and {source.path} is at step {here[0]}, "
            f"before stage {here[1]}, with {here[2]} experts: make a plan for this checkpoint"
        )
