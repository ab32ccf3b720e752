"""Makes a checkpoint of a Mixture-of-Experts model out of one of a dense model, without a job.

`python -m upcycle from-dense`: the plan is `upcycle/dense.py`'s, carried out by `upcycle/dense_stream.py` in one process
and bounded memory; what comes out is verified, and published by rename. A run goes on from it with run.resume, at the
dense run's step, schedule and place in the data.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.hf.source import CONFIG
from parallel.errors import ConfigError
from parallel.optimizer_ages import OptimizerAges
from train.checkpoint.files import PUBLISHED
from train.checkpoint.folder import Manifest, need_space
from train.config import RunSettings
from train.offline.expand import read_source, settings_of
from train.offline.files import carry_over_files, seal_alone, staged
from train.settings import settings_to_dict
from train.start import model_identity
from train.switch import aged
from upcycle.course import Entry
from upcycle.dense import DenseRules, plan_from_dense
from upcycle.dense_stream import opened_dense
from upcycle.dense_verify import verify_from_dense
from upcycle.plan import ExpansionPlan
from upcycle.stage_config import StageConfig

# Keys that follow from options of the command.
_DECIDED = {
    "model.num_experts": "--num-experts",
    "model.top_k": "--top-k",
    "model.expert_ffn_hidden_size": "--granularity",
}
# What an import keeps of the published model's architecture; the tokenizer beside it holds for experts too.
_DENSE_ONLY = (f"{PUBLISHED}/{CONFIG}",)
_ITEMSIZE = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class DenseSource:
    """A dense checkpoint, and what shall come of it.

    Attributes:
        path: of the checkpoint.
        manifest: its own.
        settings: of the run that shall go on: those of the dense run, with experts.
    """

    path: Path
    manifest: Manifest
    settings: RunSettings

    def continuing(self) -> list[str]:
        """Settings that belong to the new model, as `KEY=VALUE`: all that differ from the defaults or the dense run's.

        So they hold with and without the preset of the dense run, and for an import, which has none.
        """
        dense, found = settings_to_dict(settings_of(self.manifest, [])), []
        mine, defaults = settings_to_dict(self.settings), settings_to_dict(RunSettings())
        for group, keys in (("model", mine["model"]), ("run", ("precision",))):
            for key in keys:
                value = mine[group][key]
                if value != defaults[group][key] or value != dense[group][key]:
                    found.append(f"{group}.{key}={_plain(value)}")
        return found


def _plain(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def open_dense(path: Path, *, experts: int, top_k: int, granularity: int, overrides: list[str]) -> DenseSource:
    """Read a dense checkpoint's manifest and the configuration in it.

    Args:
        path: a checkpoint, or a run, of which the newest checkpoint counts.
        experts: per MoE layer of what shall come of it.
        top_k: experts per token.
        granularity: shards per feed-forward.
        overrides: `KEY=VALUE` on top of the dense run's configuration.

    Raises:
        CoppiceError: if there is no complete checkpoint of a dense model, or a setting cannot be.
    """
    path, manifest = read_source(path)
    if manifest.num_experts:
        raise ConfigError(
            f"{path} has {manifest.num_experts} experts per layer, and from-dense starts from a dense model: use python -m "
            "upcycle expand"
        )
    for word in overrides:
        option = _DECIDED.get(word.partition("=")[0])
        if option is not None:
            raise ConfigError(f"{word} follows from {option}: leave it out")
    if experts < 2:
        raise ConfigError(f"--num-experts={experts} must be 2 or more: experts to choose from")
    if granularity < 1:
        raise ConfigError(f"--granularity={granularity} must be 1 or more: the shards of one feed-forward")
    width = settings_of(manifest, []).model.ffn_hidden_size // granularity
    decided = [f"model.num_experts={experts}", f"model.top_k={top_k}", f"model.expert_ffn_hidden_size={width}"]
    # The weights are those of the checkpoint, whatever its run once began with.
    settings = settings_of(manifest, [*overrides, *decided, "upcycle.stages=[]", "model.init_from=null"])
    return DenseSource(path, manifest, settings)


def plan_of_dense(source: DenseSource, rules: DenseRules) -> ExpansionPlan:
    """The plan for a dense checkpoint; only its manifest is looked at.

    Raises:
        ConfigError: naming the option, the value and the remedy.
    """
    run = source.settings.run
    plan = plan_from_dense(
        rules, source.settings.model, step=source.manifest.step, seed=run.seed, itemsize=_ITEMSIZE[run.precision]
    )
    if plan.optimizer_rule == "copy" and not any(n.startswith("exp_avg/") for n in source.manifest.fingerprints):
        raise ConfigError(
            f"--optimizer-rule=copy: {source.path} has no optimizer state to copy: use --optimizer-rule reset"
        )
    return plan


def make_from_dense(
    source: DenseSource, plan: ExpansionPlan, output: Path, *, chunk_bytes: int, say: Callable[[str], None]
) -> Manifest:
    """Write the checkpoint of experts.

    Args:
        source: the dense checkpoint; it is only read.
        plan: made for it.
        output: folder of the new checkpoint; it must not exist, or be empty.
        chunk_bytes: memory for a piece of a tensor.
        say: told of progress.

    Returns:
        The manifest of the new checkpoint.

    Raises:
        CoppiceError: naming what does not fit, or cannot be written; nothing is published then.
    """
    old, tensors = source.manifest, source.path / "tensors"
    rules = StageConfig(
        at_step=old.step,
        num_experts=plan.experts_after,
        optimizer_rule=plan.optimizer_rule,
        optimizer_scope=plan.optimizer_scope,
        bias_noise=0.0,
    )
    with staged(output) as staging, opened_dense(tensors, plan, source.settings.model) as dense:
        need_space(staging, dense.nbytes, "the checkpoint", output=output)
        found = dense.write(staging / "tensors", chunk_bytes=chunk_bytes, say=say)
        verify_from_dense(old.fingerprints, found, dense, chunk_bytes=chunk_bytes)
        carry_over_files(source.path, old.files, staging, but=_DENSE_ONLY)
        ages = OptimizerAges.from_dict(old.ages)
        if dense.has_moments:
            every = {layer.layer: range(plan.experts_after) for layer in plan.layers}
            ages = aged(ages, plan, rules, old.optimizer_step).with_new_routers(every, old.optimizer_step)
        manifest = replace(
            old,
            # Whatever layouts a dense run has gone through, the story of its experts begins here.
            stage=plan.stage,
            num_experts=plan.experts_after,
            model=model_identity(source.settings, old.vocab_size),
            fingerprints=found,
            experts=dense.experts,
            plans=[plan.to_dict()],
            stages=[Entry(rules, "offline", "the stage").to_dict()],
            ages=ages.to_dict(),
            guard=None,
            config=settings_to_dict(source.settings),
        )
        seal_alone(staging, manifest)
    return manifest
