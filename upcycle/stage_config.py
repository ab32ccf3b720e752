"""Typed schema of one entry of `upcycle.stages`: when a stage begins, how its experts are made, how training goes on."""

from dataclasses import asdict, dataclass, field, replace

from model.config import one_of, positive
from model.release import SHAPES, ReleaseSchedule
from parallel.config import ParallelConfig
from parallel.errors import ConfigError

SELECTIONS = ("uniform", "greedy", "sampling")
UTILITIES = ("grad_norm", "weight_norm", "saliency")
OPTIMIZER_RULES = ("copy", "reset", "reset_momentum", "scale")
OPTIMIZER_SCOPES = ("replicas", "family", "all")
PLACEMENTS = ("near", "spread", "auto")
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

    # Optimizer step after which the stage begins; the next step trains the larger model. -1: given by at_tokens.
    at_step: int = -1
    # Training tokens after which the stage begins, in place of at_step: at the first step boundary that has seen them.
    at_tokens: int | None = None
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

    def check_trigger(self, key: str) -> None:
        """Check that one of `at_step` and `at_tokens` says when the stage begins, as a user gave them.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        if self.at_tokens is None:
            if self.at_step == -1:
                raise ConfigError(f"{key} does not say when it begins: give at_step or at_tokens")
            if self.at_step < 1:
                raise ConfigError(f"{key}.at_step={self.at_step} must be 1 or more: the optimizer step to expand after")
            return
        if self.at_step != -1:
            raise ConfigError(f"{key}: give either at_step or at_tokens (got {self.at_step} and {self.at_tokens})")
        positive(f"{key}.at_tokens", self.at_tokens)

    def resolved(self, step: int, tokens: int, tokens_per_step: int) -> "StageConfig":
        """The same stage with the step that `at_tokens` means; itself where `at_step` was given.

        Args:
            step: where the run stands.
            tokens: training tokens it has seen by then.
            tokens_per_step: of the steps to come.
        """
        if self.at_tokens is None:
            return self
        return replace(self, at_step=step - (tokens - self.at_tokens) // tokens_per_step)

    def when(self, key: str) -> str:
        """The trigger as a user gave it, for messages."""
        if self.at_tokens is None:
            return f"{key}.at_step={self.at_step}"
        return f"{key}.at_tokens={self.at_tokens} (step {self.at_step})"

    def check(self, key: str) -> None:
        """Check the values that need no other stage, apart from the trigger.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
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
        positive(f"{key}.release_steps", self.release_steps)
        positive(f"{key}.release_hold_steps", self.release_hold_steps, zero=True)
        one_of(f"{key}.release_shape", self.release_shape, SHAPES)
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
