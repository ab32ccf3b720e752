"""Typed schema of a run. One dataclass per group; every key a user can set is a field here, with its unit.

`configs/` holds values only. `train/settings.py` composes them with Hydra; `RunSettings.check` refuses what cannot run,
before any process group or device is touched.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.config import ModelConfig, divides, one_of, positive
from model.fp8 import check_sizes
from model.performance import PerformanceConfig
from model.recompute import check_layers
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from train.data.config import DataConfig
from train.profile_config import ProfileConfig
from upcycle.config import UpcycleConfig
from upcycle.course import Course


@dataclass
class RunConfig:
    """The run itself."""

    # Folder of everything the run writes: config, metrics, events, plans, checkpoints, report.
    dir: str = "runs/default"
    # Root of every random choice: initialisation, data order, expansion noise.
    seed: int = 1234
    # Optimizer steps in all, over all stages.
    steps: int = 1000
    # auto continues from the newest complete checkpoint in run.dir, never starts anew in an empty folder, or a path.
    resume: str = "auto"
    # bf16 (fp32 masters and gradients) or fp32.
    precision: str = "bf16"
    # Save and stop after this step although run.steps is larger (a planned interruption); null runs to the end.
    stop_at_step: int | None = None
    # A progress line every so many steps.
    log_interval_steps: int = 10
    # What a terminal shows: a live panel or lines. auto: lines on SLURM and in CI; no terminal gets a panel it cannot show.
    console: str = "auto"
    # A row of per-expert load (the heat map of the report) every so many steps.
    load_interval_steps: int = 5

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("steps", "stop_at_step", "log_interval_steps", "load_interval_steps"):
            positive(f"run.{key}", getattr(self, key))
        positive("run.seed", self.seed, zero=True)
        one_of("run.precision", self.precision, ("bf16", "fp32"))
        one_of("run.console", self.console, ("auto", "panel", "plain"))
        if not self.dir:
            raise ConfigError("run.dir is empty: name a folder for the run")


@dataclass
class OptimizerSettings:
    """AdamW as mcore builds it: Transformer Engine's, NVIDIA Apex's or torch's, by what is installed."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    # Gradients are scaled down to this global norm; 0 leaves them.
    clip_grad: float = 1.0
    # Shard masters and moments over data-parallel ranks (ZeRO-1).
    distributed: bool = True
    # Reduce gradients while the backward pass still runs; gather parameters while the forward pass runs.
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optimizer.{key}={getattr(self, key)} must lie in [0, 1)")
        positive("optimizer.epsilon", self.epsilon)
        positive("optimizer.weight_decay", self.weight_decay, zero=True)
        positive("optimizer.clip_grad", self.clip_grad, zero=True)
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            raise ConfigError(
                "optimizer.overlap_param_gather=true needs optimizer.distributed=true and "
                "optimizer.overlap_grad_reduce=true"
            )


@dataclass
class ScheduleConfig:
    """Learning rate over the run, in optimizer steps."""

    # wsd (warmup, stable, decay), cosine, linear or constant.
    style: str = "wsd"
    learning_rate: float = 3e-4
    # Learning rate at the end of the decay.
    min_learning_rate: float = 3e-5
    warmup_steps: int = 0
    # Length of the last phase of wsd; null means a tenth of the run.
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        one_of("schedule.style", self.style, ("wsd", "cosine", "linear", "constant"))
        positive("schedule.learning_rate", self.learning_rate)
        positive("schedule.min_learning_rate", self.min_learning_rate, zero=True)
        positive("schedule.warmup_steps", self.warmup_steps, zero=True)
        positive("schedule.decay_steps", self.decay_steps)
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"schedule.min_learning_rate={self.min_learning_rate} is above "
                f"schedule.learning_rate={self.learning_rate}: lower it"
            )


@dataclass
class CheckpointConfig:
    """What is kept, and when."""

    # Save every so many steps; null saves only at expansions, stops and the end.
    interval_steps: int | None = 500
    # Ordinary checkpoints kept; those right before and after an expansion are kept for ever. null keeps all.
    keep_last: int | None = 2
    # Checkpoints of steps that this divides are kept too; null keeps none of them.
    keep_every_steps: int | None = None
    # Write what is due at an interval in the background, from a copy in host memory; other saves are waited for.
    asynchronous: bool = True
    # What happens when a save at an interval fails: stop, or continue without it.
    on_failure: str = "stop"
    # Save the end of the run. Stops and expansions are saved always.
    save_final: bool = True
    # full, or model_only to accept a checkpoint without usable optimizer state knowingly; a run does so once.
    load: str = "full"
    # With model_only: begin the schedule anew, over the steps that are left; otherwise it goes on where it stood.
    reset_schedule: bool = False
    # How deep the files of a checkpoint are checked before it is loaded: sizes, or digests (all contents, by all ranks).
    verify: str = "digests"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        positive("checkpoint.interval_steps", self.interval_steps)
        positive("checkpoint.keep_last", self.keep_last)
        positive("checkpoint.keep_every_steps", self.keep_every_steps)
        one_of("checkpoint.load", self.load, ("full", "model_only"))
        one_of("checkpoint.on_failure", self.on_failure, ("stop", "continue"))
        one_of("checkpoint.verify", self.verify, ("sizes", "digests"))
        if self.reset_schedule and self.load == "full":
            raise ConfigError(
                "checkpoint.reset_schedule=true needs checkpoint.load=model_only: Adam's moments belong to the schedule "
                "they were made under"
            )


# Name of the set that is the held-out part of the training blend.
BLEND_SET = "valid"
_MAX_SETS = 16


def check_set_name(key: str, name: str) -> None:
    """Check the name of a validation set.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if not re.fullmatch("[a-z0-9_-]+", name):
        raise ConfigError(f"{key}={name!r}: use lower-case letters, digits, - and _")


@dataclass
class EvaluationSet:
    """One named validation set."""

    # Name of the set in events, trackers and the report: lower-case letters, digits, - and _.
    name: str = ""
    # What `python -m train.corpus ... --output PREFIX` was given.
    prefix: str = ""
    # Part of the corpus that is evaluated: valid (held out by the corpus command) or train.
    split: str = "valid"
    # Global batches per evaluation; null takes `evaluation.batches`.
    batches: int | None = None


@dataclass
class EvaluationConfig:
    """Validation loss on the held-out part of the training corpora, and on sets of your own."""

    # Evaluate every so many steps; null evaluates only around expansions and at the end.
    interval_steps: int | None = 100
    # Global batches per evaluation and set.
    batches: int = 8
    # Validation sets beside the held-out part of the training corpora (docs/evaluation.md).
    sets: list[EvaluationSet] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        positive("evaluation.interval_steps", self.interval_steps)
        positive("evaluation.batches", self.batches)
        if len(self.sets) > _MAX_SETS:
            raise ConfigError(f"evaluation.sets holds {len(self.sets)} sets: use {_MAX_SETS} at most")
        seen = {BLEND_SET: "the held-out part of the training corpora"}
        for i, entry in enumerate(self.sets):
            key = f"evaluation.sets[{i}]"
            check_set_name(f"{key}.name", entry.name)
            if entry.name in seen:
                raise ConfigError(f"{key}.name={entry.name} is the name of {seen[entry.name]}: choose another")
            seen[entry.name] = key
            if not entry.prefix:
                raise ConfigError(f"{key}.prefix is empty: name a corpus")
            one_of(f"{key}.split", entry.split, ("valid", "train"))
            positive(f"{key}.batches", entry.batches)


@dataclass
class HealthConfig:
    """What a run does about steps that go wrong (`train/health.py`)."""

    # Bad steps in a row that are too many; before that, those that are not finite are skipped and counted.
    bad_steps: int = 5
    # A loss above this many times the mean of the window makes a step bad too; null: only what is not finite.
    spike_factor: float | None = None
    # Good steps in the window.
    spike_window_steps: int = 50
    # stop, or rollback: go back to the newest checkpoint from before them and train on without their samples.
    action: str = "stop"
    # Times that one job goes back before it stops.
    max_rollbacks: int = 3
    # Seconds in which no rank gets anywhere, after which the job ends and names the rank it waits for; null waits on.
    hang_seconds: int | None = 300

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("bad_steps", "spike_window_steps", "max_rollbacks", "hang_seconds"):
            positive(f"health.{key}", getattr(self, key))
        one_of("health.action", self.action, ("stop", "rollback"))
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ConfigError(f"health.spike_factor={self.spike_factor} must be above 1: every step would be a spike")


@dataclass
class TrackingConfig:
    """Charts of a run (docs/tracking.md). JSONL in run.dir is the source of truth; the run never waits for a tracker."""

    # Weights & Biases, TensorBoard event files under run.dir, or nothing.
    backend: str = "wandb"
    # Of W&B: offline (files under run.dir), or online.
    mode: str = "offline"
    project: str = "coppice"
    # Display name at W&B; null takes the name of run.dir.
    name: str | None = None

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            ConfigError: naming the key and the value.
        """
        one_of("tracking.backend", self.backend, ("none", "wandb", "tensorboard"))
        one_of("tracking.mode", self.mode, ("offline", "online"))


def _first_keys() -> dict[str, str]:
    """Where the sizes of the first stage's layout are set, by name."""
    return {name: f"parallel.{name}" for name in ParallelConfig.__dataclass_fields__}


@dataclass
class RunSettings:
    """Everything a run is told: the root of the configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)

    def check(self, world_size: int) -> None:
        """Check every combination of values for a number of processes.

        Raises:
            ConfigError: naming the keys, the values and the remedy.
        """
        self._check_layout(world_size, self.parallel, _first_keys())
        self.check_schedule(0)
        self.profile.check(self.run.steps, world_size)
        self.upcycle.check_triggers()
        saves_before = self.upcycle.save_before or self.upcycle.path == "checkpoint"
        self.upcycle.guard.check(saves_before, self.evaluation.interval_steps is not None)
        self.resolved().check_stages(world_size, settled=not self._may_go_on())
        self.data.corpora()
        for i, phase in enumerate(self.data.schedule):
            phase.check(f"data.schedule[{i}]", self.run.steps)
        self._check_documents()

    def _check_documents(self) -> None:
        """Refuse what documents that are kept apart cannot be combined with."""
        if not self.data.document_attention:
            return
        for number in range(len(self.upcycle.stages) + 1):
            context = self.parallel_of(number).context
            if context > 1:
                raise ConfigError(
                    f"data.document_attention=true cannot be combined with context parallelism ({context} ranks in stage "
                    f"{number}): megatron-core would need every document to be a multiple of {2 * context} tokens; use a "
                    "context size of 1"
                )
        for name in ("window_size", "masked_softmax_fusion"):
            if self.model.mcore.get(name):
                raise ConfigError(
                    f"data.document_attention=true cannot be combined with model.mcore.{name}={self.model.mcore[name]}: "
                    "megatron-core's attention passes over the mask of documents then; drop one of them"
                )

    def _may_go_on(self) -> bool:
        """Whether a checkpoint may decide which steps numbers of tokens mean: a batch may have had another size before."""
        by_tokens = any(stage.at_tokens is not None for stage in self.upcycle.stages)
        fresh = self.run.resume in ("auto", "never") and not (Path(self.run.dir) / "checkpoints").is_dir()
        return by_tokens and not fresh

    def check_stages(self, world_size: int, course: Course | None = None, *, settled: bool = True) -> None:
        """Check the stages and their layouts; every stage has its step by now.

        Args:
            world_size: processes of the job.
            course: which of the stages are over, and what messages call them; None before a run has begun.
            settled: as in `UpcycleConfig.check`.

        Raises:
            ConfigError: naming the keys, the values and the remedy.
        """
        begun, names = (course.begun, course.keys) if course else (0, None)
        self.upcycle.check(self.model, self.parallel, self.run.steps, begun=begun, keys=names, settled=settled)
        for parallel, keys in self._later_layouts(begun, names):
            self._check_layout(world_size, parallel, keys)

    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step."""
        return self.data.global_batch_size * self.data.sequence_length

    def resolved(self, step: int = 0, tokens: int = 0) -> "RunSettings":
        """With the step of every stage that begins at a number of tokens.

        Args:
            step: where the run stands.
            tokens: training tokens it has seen by then.
        """
        return replace(self, upcycle=self.upcycle.resolved(step, tokens, self.tokens_per_step()))

    def following(self, course: Course) -> "RunSettings":
        """The settings of a run on its course: the experts of its first stage, and all of its stages with their steps."""
        parallel = self.parallel
        if course.expert_ranks is not None:
            parallel = replace(parallel, expert=course.expert_ranks)
        return replace(
            self,
            model=replace(self.model, num_experts=course.first_experts),
            parallel=parallel,
            upcycle=replace(self.upcycle, stages=course.stages),
        )

    def parallel_of(self, stage: int) -> ParallelConfig:
        """The parallel layout of a stage, the first being 0."""
        return self.upcycle.layouts(self.parallel)[stage]

    def _later_layouts(
        self, begun: int, names: Sequence[str] | None
    ) -> Iterator[tuple[ParallelConfig, dict[str, str]]]:
        """The layout of every stage to come that changes it, with the dotted key at which each of its sizes is set."""
        keys = _first_keys()
        for i, stage in enumerate(self.upcycle.stages):
            if stage.parallel.changes():
                key = names[i] if names else f"upcycle.stages[{i}]"
                keys |= {name: f"{key}.parallel.{name}" for name in stage.parallel.changes()}
                if i >= begun:
                    yield self.parallel_of(i + 1), dict(keys)

    def _check_layout(self, world_size: int, parallel: ParallelConfig, keys: Mapping[str, str]) -> None:
        model, data = self.model, self.data
        data_ranks = parallel.data(world_size, keys)
        check_sizes(model, parallel, self.run.precision, keys)
        check_layers(model, parallel, keys["pipeline"])
        if parallel.expert > 1 and not model.num_experts:
            raise ConfigError(f"{keys['expert']}={parallel.expert} needs experts: model.num_experts=0 is a dense model")
        if parallel is self.parallel:
            # Of later stages `upcycle.check` knows the number.
            divides("model.num_experts", model.num_experts, "parallel.expert", parallel.expert)
        divides(
            "model.expert_ffn_hidden_size",
            model.expert_ffn_hidden_size,
            keys["expert_tensor"],
            parallel.expert_tensor,
        )
        tensor, pipeline, virtual = keys["tensor"], keys["pipeline"], keys["virtual_pipeline"]
        divides("model.attention_heads", model.attention_heads, tensor, parallel.tensor)
        if model.kv_heads is not None and model.kv_heads % parallel.tensor and parallel.tensor % model.kv_heads:
            raise ConfigError(
                f"model.kv_heads={model.kv_heads} and {tensor}={parallel.tensor} do not divide each other: "
                "change one of them"
            )
        for name in ("hidden_size", "vocab_multiple", "ffn_hidden_size", "shared_expert_ffn_hidden_size"):
            divides(f"model.{name}", getattr(model, name) or 0, tensor, parallel.tensor)
        divides("model.layers", model.layers, f"{pipeline} x {virtual}", parallel.pipeline * parallel.chunks())
        divides(
            "data.sequence_length",
            data.sequence_length,
            f"2 x {keys['context']} x {tensor}",
            (2 * parallel.context if parallel.context > 1 else 1) * parallel.tensor,
        )
        # Only the sizes that a stage sets are worth naming: the data-parallel size follows from them.
        changed = [keys[name] for name in ("tensor", "pipeline", "context") if keys[name] != f"parallel.{name}"]
        ranks = "data-parallel ranks" + (f" (processes / {' / '.join(changed)})" if changed else "")
        divides(
            "data.global_batch_size",
            data.global_batch_size,
            f"data.micro_batch_size x {ranks}",
            data.micro_batch_size * data_ranks,
        )
        accumulation = data.global_batch_size // (data.micro_batch_size * data_ranks)
        if parallel.chunks() > 1:
            divides(
                f"gradient accumulation (data.global_batch_size / data.micro_batch_size / {ranks})",
                accumulation,
                pipeline,
                parallel.pipeline,
            )

    def check_schedule(self, begins: int) -> None:
        """Check that the schedule fits into the steps of the run from one on.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        run, schedule, decay = self.run, self.schedule, self.schedule.decay_steps or 0
        since = f" - {begins}" if begins else ""
        if schedule.warmup_steps >= run.steps - begins:
            raise ConfigError(
                f"schedule.warmup_steps={schedule.warmup_steps} must be below run.steps={run.steps}{since}: "
                "shorten the warm-up or raise run.steps"
            )
        if schedule.style == "wsd" and decay > run.steps - begins - schedule.warmup_steps:
            raise ConfigError(
                f"schedule.decay_steps={decay} does not fit between the warm-up ({schedule.warmup_steps}) and "
                f"run.steps={run.steps}{since}: shorten it"
            )
