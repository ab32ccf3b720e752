"""`RunSettings`: the groups of a run's configuration together, and the checks that need more than one of them.

The groups are in `train/schema/`, those of the network, the layout and the stages beside what they configure.

`configs/` holds values only. `train/settings.py` composes them with Hydra; `RunSettings.check` refuses what cannot run,
before any process group or device is touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.alignment import check_grouped, check_groups
from model.biases import check_biases
from model.config import ModelConfig, divides
from model.context_parallel import check_context
from model.expert_overlap import refuse_overlap
from model.fp8 import check_sizes
from model.graphs import refuse_graphs
from model.performance import PerformanceConfig
from model.recompute import check_layers
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from train.schema.checkpoint import CheckpointConfig
from train.schema.data import DataConfig
from train.schema.evaluation import EvaluationConfig
from train.schema.health import HealthConfig
from train.schema.optimizer import OptimizerSettings, ScheduleConfig
from train.schema.profile import ProfileConfig
from train.schema.run import RunConfig
from train.schema.tracking import TrackingConfig
from upcycle.config import UpcycleConfig
from upcycle.course import Course

# Micro-batches that a chunk of an interleaved pipeline takes in a row.
_GROUP = "microbatch_group_size_per_vp_stage"


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
        # What the machine has to say is heard later.
        graphs, bf16 = self.performance.cuda_graphs, self.run.precision == "bf16"
        context = max(self.parallel_of(stage).context for stage in range(len(self.upcycle.stages) + 1))
        refuse_graphs(self.model, graphs, bf16=bf16, documents=self.data.document_attention, context=context)

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
        softmax = self.model.mcore.get("softmax_type") or "vanilla"
        if softmax != "vanilla":
            raise ConfigError(
                f"data.document_attention=true cannot be combined with model.mcore.softmax_type={softmax}: no attention of "
                "Transformer Engine computes it of documents end to end; drop one of them"
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
        bf16 = self.run.precision == "bf16"
        for stage, experts in enumerate(self.upcycle.expert_counts(self.model.num_experts)):
            check_groups(self.model, experts, self.parallel_of(stage), stage)
            if stage >= begun:
                # What the machine has to say is heard later.
                refuse_overlap(self.model, self.performance, experts, self.parallel_of(stage), bf16=bf16)

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

    def experts_of(self, stage: int) -> int:
        """Experts per MoE layer in a stage, the first being 0; 0 for a dense model."""
        return self.upcycle.expert_counts(self.model.num_experts)[stage]

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
        check_context(model, parallel, self.run.precision, keys)
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
        check_grouped(model, parallel, self.run.precision, keys)
        check_biases(model, parallel, keys)
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
            group = model.mcore.get(_GROUP)
            if group is not None and not (
                parallel.pipeline <= group <= accumulation and (accumulation % group or group) >= parallel.pipeline
            ):
                raise ConfigError(
                    f"model.mcore.{_GROUP}={group} must lie between {pipeline}={parallel.pipeline} and the {accumulation} "
                    f"micro-batches of a step on each data-parallel rank, and leave none or {parallel.pipeline} over: leave "
                    "it out"
                )
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
