"""Typed schema of the `upcycle` group: the list of stages that follow the first one of a run."""

from dataclasses import asdict, dataclass, field, replace

from model.config import ModelConfig, divides, one_of, positive
from model.release import SHAPES, ReleaseSchedule
from parallel.config import ParallelConfig
from parallel.errors import ConfigError

SELECTIONS = ("uniform", "greedy", "sampling")
UTILITIES = ("grad_norm", "weight_norm", "saliency")
OPTIMIZER_RULES = ("copy", "reset", "reset_momentum", "scale")
OPTIMIZER_SCOPES = ("replicas", "family", "all")
PLACEMENTS = ("near", "spread", "auto")
PATHS = ("live", "checkpoint")
MODES = ("plain", "exact")
# Half-width of the noise on replicas' selection bias in plain mode (arXiv 2604.19835, Definition 3.1).
BIAS_NOISE = 1e-3


@dataclass(frozen=True)
class OptimizerRule:
    """A rule for optimizer state at an expansion.

    Attributes:
        rule: one of `OPTIMIZER_RULES`.
        scope: one of `OPTIMIZER_SCOPES`; `family` adds the originals of experts that were copied.
        scale: the factor s of `scale`; None takes 1/sqrt(r), r being the copies in the family.
    """

    rule: str = "copy"
    scope: str = "replicas"
    scale: float | None = None

    def check(self, key: str) -> None:
        """Check the values.

        Args:
            key: prefix of the keys in messages, such as `upcycle.stages[0]`.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for name, value, known in (("rule", self.rule, OPTIMIZER_RULES), ("scope", self.scope, OPTIMIZER_SCOPES)):
            if value not in known:
                raise ConfigError(f"{key}.optimizer_{name}={value} is unknown: use one of {', '.join(known)}")
        if self.scale is not None and self.rule != "scale":
            raise ConfigError(
                f"{key}.optimizer_scale={self.scale} has no effect with {key}.optimizer_rule={self.rule}: leave it "
                "out, or use the rule scale"
            )
        if self.scale is not None and not 0 < self.scale <= 1:
            raise ConfigError(
                f"{key}.optimizer_scale={self.scale} must be above 0 and at most 1: a replica sees part of its "
                "parent's tokens; the rule reset is what a factor of 0 would be"
            )

    @property
    def restarts(self) -> tuple[bool, bool]:
        """Whether the first and the second moment begin anew."""
        return self.rule in ("reset", "reset_momentum"), self.rule == "reset"


@dataclass
class StageParallel:
    """Sizes of parallel dimensions that change with a stage; null keeps the size before it."""

    # Ranks that share each dense matrix.
    tensor: int | None = None
    # Ranks that share the stack of layers.
    pipeline: int | None = None
    # Model chunks per pipeline rank.
    virtual_pipeline: int | None = None
    # Ranks that share each sequence.
    context: int | None = None
    # Ranks that share the experts of each MoE layer.
    expert: int | None = None
    # Ranks that share each expert's matrices.
    expert_tensor: int | None = None

    def changes(self) -> dict[str, int]:
        """The sizes that are set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def apply(self, base: ParallelConfig) -> ParallelConfig:
        """The layout after the change.

        Raises:
            ConfigError: if the sizes do not go together.
        """
        return replace(base, **self.changes())

    def check(self, key: str, base: ParallelConfig) -> None:
        """Check the sizes by themselves and with those that stay.

        Args:
            key: prefix of the keys in messages, such as `upcycle.stages[0].parallel`.
            base: the layout before.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for name, value in self.changes().items():
            if value < 1:
                raise ConfigError(f"{key}.{name}={value} must be 1 or more")
        try:
            self.apply(base)
        except ConfigError as e:
            raise ConfigError(f"{key}: {e}") from None


@dataclass
class StageConfig:
    """One stage: an expansion, a change of the parallel layout, or both at once.

    Give `factor` (E becomes factor x E) or `num_experts` (the new count), not both; neither for a change of layout alone.
    """

    # Optimizer step after which the stage begins; the next step trains the larger model.
    at_step: int = -1
    factor: int | None = None
    num_experts: int | None = None
    # Parallel sizes from this stage on, such as {expert: 4}; the number of processes stays.
    parallel: StageParallel = field(default_factory=StageParallel)
    # Copies per expert: the same for all; the most useful first, under a cap; or drawn by utility under it, from a seed.
    selection: str = "uniform"
    # How useful an expert is: squared norm of its mean gradient (arXiv 2604.19835 section 4) or of its weights, or the
    # product of the two norms, not squared.
    utility: str = "grad_norm"
    # Extra copies one expert may get under greedy and sampling.
    max_extra_copies: int = 3
    # Under sampling: an expert is drawn with probability softmax(utility / mean utility / temperature).
    temperature: float = 1.0
    # Batches averaged for grad_norm and saliency; they are peeked at, not consumed.
    scoring_batches: int = 10
    # Adam's moments at an expansion: copy the parent's, reset both, reset_momentum only the first, or scale them.
    optimizer_rule: str = "copy"
    # What the rule applies to: replicas, family (the originals of copied experts too) or all parameters.
    optimizer_scope: str = "replicas"
    # Under scale: factor on the first moment, its square on the second; null means 1/sqrt(copies in the family).
    optimizer_scale: float | None = None
    # Steps over which the whole learning rate rises from near zero again after the switch.
    rewarm_steps: int = 0
    # Factor on the learning rate of all router rows right after the switch, moving back to 1.
    router_lr_multiplier: float = 1.0
    # The same for the weights of replicas.
    replica_lr_multiplier: float = 1.0
    # Steps until both multipliers are 1 again.
    lr_multiplier_steps: int = 0
    # plain routes over all experts at once; exact keeps the function by routing over families, then lets go of them.
    mode: str = "plain"
    # Under exact: steps of pure family routing after the switch.
    release_hold_steps: int = 0
    # Under exact: steps after those until routing is plain.
    release_steps: int = 1000
    # Under exact: how the release goes, linear or cosine.
    release_shape: str = "cosine"
    # Half-width of the uniform noise on the selection bias of replicas; null is 0.001 in plain mode and 0 in exact mode.
    bias_noise: float | None = None
    # Factor on model.bias_update_rate right after the switch, so that balancing finds the replicas' new shares faster.
    bias_rate_multiplier: float = 1.0
    # Steps until that factor is 1 again, falling linearly.
    bias_rate_steps: int = 0
    # Where replicas go: near their parent, spread over expert-parallel ranks by load, or auto (least traffic under a bound).
    placement: str = "near"
    # Under auto: bound on the expected load of the busiest expert-parallel rank over the mean.
    max_load_imbalance: float = 1.25

    def check(self, key: str) -> None:
        """Check the values that need no other stage.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        if self.at_step < 1:
            raise ConfigError(f"{key}.at_step={self.at_step} must be 1 or more: the optimizer step to expand after")
        if self.factor is not None and self.num_experts is not None:
            raise ConfigError(f"{key}: give either factor or num_experts (got {self.factor} and {self.num_experts})")
        if not self.grows() and not self.parallel.changes():
            raise ConfigError(
                f"{key} changes nothing: give factor or num_experts to expand, or parallel sizes to change"
            )
        if self.factor is not None and self.factor < 2:
            raise ConfigError(f"{key}.factor={self.factor} must be 2 or more: an expansion adds experts")
        one_of(f"{key}.selection", self.selection, SELECTIONS)
        one_of(f"{key}.utility", self.utility, UTILITIES)
        self.rule().check(key)
        positive(f"{key}.rewarm_steps", self.rewarm_steps, zero=True)
        positive(f"{key}.lr_multiplier_steps", self.lr_multiplier_steps, zero=True)
        for name in ("router_lr_multiplier", "replica_lr_multiplier"):
            value = getattr(self, name)
            positive(f"{key}.{name}", value)
            if value != 1 and not self.lr_multiplier_steps:
                raise ConfigError(
                    f"{key}.{name}={value} has no effect with {key}.lr_multiplier_steps=0: say for how many steps"
                )
        positive(f"{key}.max_extra_copies", self.max_extra_copies)
        positive(f"{key}.temperature", self.temperature)
        positive(f"{key}.scoring_batches", self.scoring_batches)
        positive(f"{key}.bias_noise", self.bias_noise, zero=True)
        positive(f"{key}.bias_rate_multiplier", self.bias_rate_multiplier)
        positive(f"{key}.bias_rate_steps", self.bias_rate_steps, zero=True)
        if self.bias_rate_multiplier != 1 and not self.bias_rate_steps:
            raise ConfigError(
                f"{key}.bias_rate_multiplier={self.bias_rate_multiplier} has no effect with {key}.bias_rate_steps=0: say "
                "for how many steps"
            )
        one_of(f"{key}.mode", self.mode, MODES)
        if self.mode == "exact":
            self._check_exact(key)
        one_of(f"{key}.placement", self.placement, PLACEMENTS)
        if self.max_load_imbalance < 1:
            raise ConfigError(
                f"{key}.max_load_imbalance={self.max_load_imbalance} must be 1 or more: the busiest rank over the mean"
            )
        if not self.grows():
            # Experts keep their order when none is added, so that these two would silently do nothing.
            for name, value, default in (
                ("selection", self.selection, "uniform"),
                ("placement", self.placement, "near"),
            ):
                if value != default:
                    raise ConfigError(
                        f"{key}.{name}={value} needs more experts: add factor or num_experts, or drop {key}.{name}"
                    )

    def _check_exact(self, key: str) -> None:
        if not self.grows():
            raise ConfigError(f"{key}.mode=exact needs more experts: add factor or num_experts, or drop {key}.mode")
        if self.bias_noise:
            raise ConfigError(
                f"{key}.bias_noise={self.bias_noise} would change the function in {key}.mode=exact, where position tells "
                f"copies apart: drop {key}.bias_noise"
            )
        positive(f"{key}.release_steps", self.release_steps)
        positive(f"{key}.release_hold_steps", self.release_hold_steps, zero=True)
        one_of(f"{key}.release_shape", self.release_shape, SHAPES)

    def noise(self) -> float:
        """Half-width of the noise on the selection bias of replicas."""
        if self.bias_noise is not None:
            return self.bias_noise
        return BIAS_NOISE if self.mode == "plain" else 0.0

    def released_at(self) -> int:
        """The first step that routes over all experts plainly; `at_step` in plain mode."""
        return self.at_step + (self.release_hold_steps + self.release_steps if self.mode == "exact" else 0)

    def release_fraction(self, step: int) -> float:
        """How far family routing is let go for the step after `step`; 1 is plain top-K."""
        if self.mode == "plain":
            return 1.0
        schedule = ReleaseSchedule(self.release_steps, self.release_shape, self.release_hold_steps)
        return schedule.fraction(step - self.at_step)

    def rule(self) -> OptimizerRule:
        """What happens to optimizer state."""
        return OptimizerRule(self.optimizer_rule, self.optimizer_scope, self.optimizer_scale)

    def grows(self) -> bool:
        """Whether the number of experts changes; else only the layout does."""
        return self.factor is not None or self.num_experts is not None

    def target(self, experts: int) -> int:
        """Experts after this stage's beginning, given those before."""
        if self.factor is not None:
            return self.factor * experts
        return self.num_experts if self.num_experts is not None else experts


@dataclass
class UpcycleConfig:
    """The stages of a run after the first, in order, and how the job goes from one to the next."""

    stages: list[StageConfig] = field(default_factory=list)
    # live moves the training state between ranks in memory, checkpoint goes through the disk; the result is the same.
    path: str = "live"
    # Save the stage before as a complete checkpoint first, kept for ever: what a failed switch resumes from. The checkpoint
    # path always does.
    save_before: bool = True
    # Save the new stage right away; the checkpoint path always does.
    save_after: bool = False
    # Staging memory of the live path per rank and direction, in MiB.
    transfer_chunk_mib: int = 64

    def release_fraction(self, number: int, step: int) -> float:
        """How far stage `number` has let go of family routing after `step`; 1 is plain top-K, as before any expansion."""
        for stage in reversed(self.stages[:number]):
            if stage.grows():
                return stage.release_fraction(step)
        return 1.0

    def bias_rate_factor(self, number: int, step: int) -> float:
        """Factor on the selection bias's update rate in stage `number` for the step after `step`."""
        if number == 0:
            return 1.0
        stage = self.stages[number - 1]
        left = max(0.0, 1 - (step - stage.at_step) / stage.bias_rate_steps) if stage.bias_rate_steps else 0.0
        return 1.0 + (stage.bias_rate_multiplier - 1.0) * left

    def layouts(self, base: ParallelConfig) -> list[ParallelConfig]:
        """The parallel layout of every stage, the first included; changes accumulate.

        Raises:
            ConfigError: if the sizes of a stage do not go together.
        """
        found = [base]
        for stage in self.stages:
            found.append(stage.parallel.apply(found[-1]))
        return found

    def expert_counts(self, first: int) -> list[int]:
        """Experts per stage, the first stage included: `[E, E1, E2, ...]`."""
        counts = [first]
        for stage in self.stages:
            counts.append(stage.target(counts[-1]))
        return counts

    def check(self, model: ModelConfig, parallel: ParallelConfig, steps: int) -> None:
        """Check the stages against the model, the layout and the length of the run.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        if any(stage.grows() for stage in self.stages) and not model.num_experts:
            raise ConfigError("upcycle.stages needs experts: model.num_experts=0 is a dense model")
        one_of("upcycle.path", self.path, PATHS)
        positive("upcycle.transfer_chunk_mib", self.transfer_chunk_mib)
        before, last, decided = model.num_experts, 0, "parallel.expert"
        released = 0
        for i, stage in enumerate(self.stages):
            key = f"upcycle.stages[{i}]"
            stage.check(key)
            stage.parallel.check(f"{key}.parallel", parallel)
            parallel = stage.parallel.apply(parallel)
            if stage.parallel.expert is not None:
                decided = f"{key}.parallel.expert"
            if stage.at_step <= last:
                raise ConfigError(f"{key}.at_step={stage.at_step} must come after the previous expansion at {last}")
            if stage.at_step >= steps:
                raise ConfigError(
                    f"{key}.at_step={stage.at_step} is past the end of the run (run.steps={steps}): "
                    "expand earlier or raise run.steps"
                )
            after = stage.target(before)
            if stage.grows() and stage.at_step < released:
                raise ConfigError(
                    f"{key}.at_step={stage.at_step} comes before routing over families has ended (step {released}): "
                    "expand later, or shorten the release of the stage before"
                )
            released = max(released, stage.released_at())
            if stage.grows():
                self._check_target(key, stage, before, after, model, decided, parallel.expert)
            elif parallel.expert > 1 and after % parallel.expert:
                raise ConfigError(
                    f"{decided}={parallel.expert} does not divide the {after} experts of this stage: use a divisor of "
                    f"{after}, or expand at this step as well"
                )
            elif parallel.expert > 1 and not after:
                raise ConfigError(f"{decided}={parallel.expert} needs experts: model.num_experts=0 is a dense model")
            before, last = after, stage.at_step

    def _check_target(
        self,
        key: str,
        stage: StageConfig,
        before: int,
        after: int,
        model: ModelConfig,
        expert_key: str,
        expert: int,
    ) -> None:
        name = f"{key}.num_experts" if stage.factor is None else f"{key}.factor x experts"
        if after <= before:
            raise ConfigError(f"{name}={after} must be above the {before} experts before it: an expansion adds experts")
        divides(name, after, expert_key, expert)
        if model.router_groups is not None:
            divides(name, after, "model.router_groups", model.router_groups)
        if stage.selection == "uniform":
            if after % before:
                raise ConfigError(
                    f"{name}={after} is not a multiple of the {before} experts before it: use "
                    f"{key}.selection=greedy, or a multiple"
                )
        elif after > before * (1 + stage.max_extra_copies):
            need = -(-after // before) - 1
            raise ConfigError(
                f"{key}.max_extra_copies={stage.max_extra_copies} is too small for {before} -> {after} experts: "
                f"use {key}.max_extra_copies={need} or more"
            )
        if stage.mode == "exact":
            if model.balancing == "sinkhorn":
                raise ConfigError(
                    f"{key}.mode=exact has no families under model.balancing=sinkhorn: use {key}.mode=plain"
                )
            return
        if model.balancing != "loss_free":
            raise ConfigError(
                f"{key}.mode=plain needs model.balancing=loss_free, not {model.balancing}: exact copies get the same "
                f"tokens unless a selection bias tells them apart: use {key}.mode=exact (docs/exact-mode.md)"
            )
        if stage.noise() == 0 and model.bias_update_rate == 0:
            raise ConfigError(
                f"{key}.bias_noise=0 with model.bias_update_rate=0 leaves copies identical for ever: raise one of them"
            )
