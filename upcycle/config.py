"""Typed schema of the `upcycle` group: the list of expansions a run makes."""

from dataclasses import dataclass, field

from model.config import ModelConfig, divides, one_of, positive
from parallel.config import ParallelConfig
from parallel.errors import ConfigError

SELECTIONS = ("uniform", "greedy")
UTILITIES = ("grad_norm", "weight_norm")
OPTIMIZER_RULES = ("copy",)


@dataclass
class StageConfig:
    """One expansion. Give `factor` (E becomes factor x E) or `num_experts` (the new count), not both."""

    # Optimizer step after which the expansion happens; the next step trains the larger model.
    at_step: int = -1
    factor: int | None = None
    num_experts: int | None = None
    # How many copies each expert gets: the same for all, or the most useful first under a cap.
    selection: str = "uniform"
    # What greedy ranks by: squared norm of the mean gradient (arXiv 2604.19835 section 4), or of the weights.
    utility: str = "grad_norm"
    # Extra copies one expert may get under greedy.
    max_extra_copies: int = 3
    # Batches averaged for grad_norm; they are peeked at, not consumed.
    scoring_batches: int = 10
    # What happens to the optimizer state of replicas: copy takes the parent's moments.
    optimizer_rule: str = "copy"
    # Half-width of the uniform noise on the selection bias of replicas, which lets balancing tell them apart.
    bias_noise: float = 1e-3

    def check(self, key: str) -> None:
        """Check the values that need no other stage.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        if self.at_step < 1:
            raise ConfigError(f"{key}.at_step={self.at_step} must be 1 or more: the optimizer step to expand after")
        if (self.factor is None) == (self.num_experts is None):
            raise ConfigError(f"{key}: give either factor or num_experts (got {self.factor} and {self.num_experts})")
        if self.factor is not None and self.factor < 2:
            raise ConfigError(f"{key}.factor={self.factor} must be 2 or more: an expansion adds experts")
        one_of(f"{key}.selection", self.selection, SELECTIONS)
        one_of(f"{key}.utility", self.utility, UTILITIES)
        one_of(f"{key}.optimizer_rule", self.optimizer_rule, OPTIMIZER_RULES)
        positive(f"{key}.max_extra_copies", self.max_extra_copies)
        positive(f"{key}.scoring_batches", self.scoring_batches)
        positive(f"{key}.bias_noise", self.bias_noise, zero=True)

    def target(self, experts: int) -> int:
        """Experts after this expansion, given those before."""
        return self.factor * experts if self.factor is not None else int(self.num_experts or 0)


@dataclass
class UpcycleConfig:
    """The expansions of a run, in order."""

    stages: list[StageConfig] = field(default_factory=list)

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
        if self.stages and not model.num_experts:
            raise ConfigError("upcycle.stages needs experts: model.num_experts=0 is a dense model")
        before, last = model.num_experts, 0
        for i, stage in enumerate(self.stages):
            key = f"upcycle.stages[{i}]"
            stage.check(key)
            if stage.at_step <= last:
                raise ConfigError(f"{key}.at_step={stage.at_step} must come after the previous expansion at {last}")
            if stage.at_step >= steps:
                raise ConfigError(
                    f"{key}.at_step={stage.at_step} is past the end of the run (run.steps={steps}): "
                    "expand earlier or raise run.steps"
                )
            after = stage.target(before)
            self._check_target(key, stage, before, after, model, parallel)
            before, last = after, stage.at_step

    def _check_target(
        self, key: str, stage: StageConfig, before: int, after: int, model: ModelConfig, parallel: ParallelConfig
    ) -> None:
        name = f"{key}.num_experts" if stage.factor is None else f"{key}.factor x experts"
        if after <= before:
            raise ConfigError(f"{name}={after} must be above the {before} experts before it: an expansion adds experts")
        divides(name, after, "parallel.expert", parallel.expert)
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
        if model.balancing != "loss_free":
            raise ConfigError(
                f"{key} needs model.balancing=loss_free, not {model.balancing}: exact copies get the same tokens "
                "unless a selection bias tells them apart (docs/upcycling.md)"
            )
        if stage.bias_noise == 0 and model.bias_update_rate == 0:
            raise ConfigError(
                f"{key}.bias_noise=0 with model.bias_update_rate=0 leaves copies identical for ever: raise one of them"
            )
