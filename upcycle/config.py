"""Typed schema of the `upcycle` group: the list of stages that follow the first one of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from model.config import ModelConfig, divides, one_of, positive
from model.mcore_fields import WITHOUT_FAMILIES
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from upcycle.stage_config import StageConfig

PATHS = ("live", "checkpoint")
GUARD_ACTIONS = ("stop", "return", "off")
# Validation losses that the guard remembers.
GUARD_KEPT = 64


@dataclass
class GuardConfig:
    """Watches the validation loss after an expansion (`train/guard.py`)."""

    # What happens when it trips: stop the run, return to the checkpoint before the expansion and train on without it, or
    # off.
    action: str = "stop"
    # Bound on the validation loss above the one right before the expansion, in nats per token.
    max_increase: float = 0.5
    # Evaluations in a row above the bound that trip it; the one right after the switch counts.
    evaluations: int = 3

    def check(self, saves_before: bool, evaluates: bool) -> None:
        """Check the values, and that the action can be carried out.

        Args:
            saves_before: whether the stage before an expansion is saved.
            evaluates: whether the run evaluates at intervals.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        one_of("upcycle.guard.action", self.action, GUARD_ACTIONS)
        positive("upcycle.guard.max_increase", self.max_increase)
        positive("upcycle.guard.evaluations", self.evaluations)
        if self.evaluations > GUARD_KEPT:
            raise ConfigError(
                f"upcycle.guard.evaluations={self.evaluations} is more than the {GUARD_KEPT} that are kept: use fewer"
            )
        if self.action != "return":
            return
        if not saves_before:
            raise ConfigError(
                "upcycle.guard.action=return has nowhere to return to with upcycle.save_before=false: use "
                "upcycle.save_before=true, or upcycle.guard.action=stop"
            )
        if not evaluates:
            raise ConfigError(
                "upcycle.guard.action=return has nothing to watch with evaluation.interval_steps=null: set an interval, or "
                "use upcycle.guard.action=stop"
            )


@dataclass
class UpcycleConfig:
    """The stages of a run after the first, in order, and how the job goes from one to the next."""

    stages: list[StageConfig] = field(default_factory=list)
    # Rules of the expansion that is made when run.resume names a checkpoint of fewer experts than model.num_experts; keys
    # as in an element of stages, without trigger and size.
    on_load: StageConfig = field(default_factory=StageConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    # live moves the training state between ranks in memory, checkpoint goes through the disk; the result is the same.
    path: str = "live"
    # Save the stage before as a complete checkpoint first, kept for ever: what a failed switch resumes from. The checkpoint
    # path always does.
    save_before: bool = True
    # Save the new stage right away; the checkpoint path always does.
    save_after: bool = False
    # Staging memory of the live path per rank and direction, in MiB.
    transfer_chunk_mib: int = 64
    # Live path: keep the old stage in (pinned) host memory while the new one is built and filled. The device then never
    # holds more than one stage, and the pause is longer by the way there and back.
    offload: bool = False

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

    def resolved(self, step: int, tokens: int, tokens_per_step: int) -> "UpcycleConfig":
        """With the step of every stage that begins at a number of tokens (`StageConfig.resolved`)."""
        return replace(self, stages=[stage.resolved(step, tokens, tokens_per_step) for stage in self.stages])

    def check_triggers(self) -> None:
        """Check what a user said of when stages begin; before `resolved`.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for i, stage in enumerate(self.stages):
            stage.check_trigger(f"upcycle.stages[{i}]")
        fixed = StageConfig()
        for name in ("at_step", "at_tokens", "factor", "num_experts", "parallel"):
            value = getattr(self.on_load, name)
            if value != getattr(fixed, name):
                key = f"upcycle.on_load.{name}"
                if name == "parallel":
                    size, value = next(iter(self.on_load.parallel.changes().items()))
                    key = f"{key}.{size}"
                raise ConfigError(
                    f"{key}={value} has no meaning: the expansion is made where the checkpoint stands, to "
                    f"model.num_experts and the sizes of parallel: drop {key}"
                )
        # Any factor will do: that of the checkpoint is not known yet.
        replace(self.on_load, factor=2).check("upcycle.on_load")

    def check(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        steps: int,
        *,
        begun: int = 0,
        keys: Sequence[str] | None = None,
        settled: bool = True,
    ) -> None:
        """Check the stages against the model, the layout and the length of the run; after `resolved`.

        Args:
            model: the network of the first stage.
            parallel: its layout.
            steps: of the run.
            begun: stages that the run has entered already; they are not judged again.
            keys: what messages call each stage; None for its place in the list.
            settled: False while a checkpoint may still say that another step is meant by a number of tokens; order and end
                are judged later then.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        if any(stage.grows() for stage in self.stages) and not model.num_experts:
            raise ConfigError("upcycle.stages needs experts: model.num_experts=0 is a dense model")
        one_of("upcycle.path", self.path, PATHS)
        positive("upcycle.transfer_chunk_mib", self.transfer_chunk_mib)
        if self.offload and self.path != "live":
            raise ConfigError(
                f"upcycle.offload=true needs upcycle.path=live, not {self.path}: through a checkpoint the old stage is gone "
                "before the new one is built"
            )
        # Only what is expanded offline can begin before the first step (`check_triggers`): a model that was imported.
        before, last, decided = model.num_experts, -1, "parallel.expert"
        released = 0
        for i, stage in enumerate(self.stages):
            key = keys[i] if keys else f"upcycle.stages[{i}]"
            if i < begun:
                parallel = stage.parallel.apply(parallel)
                before, last, released = stage.target(before), stage.at_step, max(released, stage.released_at())
                continue
            stage.check(key)
            stage.parallel.check(f"{key}.parallel", parallel)
            parallel = stage.parallel.apply(parallel)
            if stage.parallel.expert is not None:
                decided = f"{key}.parallel.expert"
            if settled and stage.at_step <= last:
                raise ConfigError(f"{stage.when(key)} must come after the previous expansion at {last}")
            if settled and stage.at_step >= steps:
                raise ConfigError(
                    f"{stage.when(key)} is past the end of the run (run.steps={steps}): expand earlier or raise run.steps"
                )
            after = stage.target(before)
            if settled and stage.grows() and stage.at_step < released:
                raise ConfigError(
                    f"{stage.when(key)} comes before routing over families has ended (step {released}): expand later, or "
                    "shorten the release of the stage before"
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
            kind = model.mcore.get("moe_router_load_balancing_type")
            if kind in WITHOUT_FAMILIES:
                raise ConfigError(
                    f"{key}.mode=exact has no families under model.mcore.moe_router_load_balancing_type={kind}: leave the "
                    "field out"
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
