"""What every `auto` of a run's performance becomes on a machine, and why: pure rules, one per key.

Each rule says first whether the key can be true at all, which is what an explicit `true` is held against, then whether it
is worth it, which is what `auto` becomes. The conditions are mcore's own (0.16.1 and 0.19.2: `transformer_config.py`,
`moe/token_dispatcher.py`, `moe/fused_a2a.py`, `tensor_parallel/layers.py`); where speed decides, the reason says so. What
of it was measured on a GPU: docs/gpu.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from model.config import ModelConfig
from model.expert_overlap import KEY as OVERLAP
from model.expert_overlap import nothing_to_hide, refuse_overlap
from model.graphs import KEY, WARMUP_STEPS, refuse_graphs
from model.performance import PerformanceConfig
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from parallel.machine import Machine

# Sizes of a group that every DeepEP has settings for, beyond those inside a node; and those that only newer ones have, which
# are not chosen, but left to the installed one where a user asks for them.
_DEEPEP_ACROSS_NODES = (16, 24, 32, 64, 128, 144, 160)
_DEEPEP_IN_NODE = (2, 4, 8)
_DEEPEP_NEWER = (48, 96)
_BLACKWELL, _HOPPER = (10, 0), (9, 0)
# Major compute capabilities for which torch has one kernel for a grouped product (aten's `_grouped_mm_cuda`).
_GROUPED_KERNELS = (9, 10)


@dataclass(frozen=True)
class Choice:
    """One decision.

    Attributes:
        key: dotted, as a user sets it.
        value: what it became.
        why: in one sentence.
        automatic: whether the user left it to `auto`.
    """

    key: str
    value: bool | str
    why: str
    automatic: bool


@dataclass(frozen=True)
class Situation:
    """All that the rules look at: one stage of a run on a machine.

    Attributes:
        model: the network.
        num_experts: experts per MoE layer in the stage; 0 for a dense model.
        performance: what the user asked for.
        overlap_grad_reduce: the key of the optimizer.
        overlap_param_gather: the same.
        sharded: whether masters and moments are divided over data ranks.
        parallel: layout of the stage.
        world_size: processes.
        bf16: precision of the run.
        families: whether the stage routes in families (exact mode).
        documents: whether attention keeps documents apart.
        machine: where it runs.
    """

    model: ModelConfig
    num_experts: int
    performance: PerformanceConfig
    overlap_grad_reduce: bool | str
    overlap_param_gather: bool | str
    sharded: bool
    parallel: ParallelConfig
    world_size: int
    bf16: bool
    families: bool
    documents: bool
    machine: Machine

    @property
    def spread(self) -> int:
        """Ranks that tokens travel between in an MoE layer."""
        return self.parallel.expert * self.parallel.expert_tensor if self.num_experts else 1

    @property
    def replicas(self) -> int:
        """Ranks that reduce gradients with each other: of dense parameters or of experts, whichever are more."""
        dense = self.parallel.data(self.world_size) * self.parallel.context
        return max(dense, self.parallel.expert_data(self.world_size))

    @property
    def across_nodes(self) -> bool:
        """Whether tokens leave the node: the ranks that share a layer's experts are neighbours, and may straddle nodes."""
        return self.machine.ranks_per_node % self.spread != 0


# mcore's field for every key of `performance` that is true or false; those of MoE layers begin with moe_.
_TOGGLES = {
    "permute_fusion": "moe_permute_fusion",
    "router_fusion": "moe_router_fusion",
    "rope_fusion": "apply_rope_fusion",
    "cross_entropy_fusion": "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion": "gradient_accumulation_fusion",
    "shared_expert_overlap": "moe_shared_expert_overlap",
    "expert_parallel_overlap": "overlap_moe_expert_parallel_comm",
}
_DISPATCHER, _BACKEND = "moe_token_dispatcher_type", "moe_flex_dispatcher_backend"

_IMPLEMENTATION, _EXPERTS = "model.transformer_impl", "model.experts"

# What stands in the way (None: nothing), whether it is worth it, and why.
_Verdict = tuple[str | None, bool, str]


def choose(at: Situation) -> tuple[Choice, ...]:
    """Decide every key of a stage.

    Args:
        at: the stage and the machine.

    Raises:
        ConfigError: naming a key that was set to what cannot be, what stands in the way, and the remedy.
    """
    choices = _modules(at)
    at = replace(at, model=_with_modules(at.model, choices))
    dispatcher = _dispatcher(at)
    choices.append(dispatcher)
    if dispatcher.value == "flex":
        choices.append(_backend(at))
    elif at.performance.flex_backend != "auto":
        raise ConfigError(
            f"performance.flex_backend={at.performance.flex_backend} is of the flex dispatcher, and this is "
            f"{dispatcher.value} ({dispatcher.why}): use performance.flex_backend=auto, or model.dispatcher=flex"
        )
    overlap = _expert_parallel(at, dispatcher)
    choices += overlap
    woven = any(choice.value for choice in overlap)
    wishes: list[tuple[str, bool | str, _Verdict]] = [
        *((f"performance.{name}", getattr(at.performance, name), rule(at)) for name, rule in _RULES.items()),
        (
            "performance.shared_expert_overlap",
            at.performance.shared_expert_overlap,
            _shared_experts(at, dispatcher, woven),
        ),
        ("optimizer.overlap_grad_reduce", at.overlap_grad_reduce, _grad_reduce(at)),
    ]
    choices += [_decided(*wish) for wish in wishes]
    gather = _param_gather(at, bool(choices[-1].value))
    return (*choices, _decided("optimizer.overlap_param_gather", at.overlap_param_gather, gather), *_graphs(at))


def _decided(key: str, wish: bool | str, verdict: _Verdict) -> Choice:
    obstacle, worth, why = verdict
    if isinstance(wish, bool):
        if wish and obstacle:
            raise ConfigError(f"{key}=true cannot be here: {obstacle}: use {key}=auto or false")
        return Choice(key, wish, "as set", automatic=False)
    return Choice(key, worth and not obstacle, obstacle or why, automatic=True)


# ---- whose modules ---------------------------------------------------------------------------------------------------


def _modules(at: Situation) -> list[Choice]:
    """Whose layers, and whose experts where there are any."""
    layers = _layers(at)
    return [layers, _experts(at, layers.value == "transformer_engine")] if at.num_experts else [layers]


def _with_modules(model: ModelConfig, choices: list[Choice]) -> ModelConfig:
    decided = {c.key.split(".")[1]: str(c.value) for c in choices if c.key in (_IMPLEMENTATION, _EXPERTS)}
    return replace(model, **decided)  # type: ignore[arg-type]


def _layers(at: Situation) -> Choice:
    key, wish, there = _IMPLEMENTATION, at.model.transformer_impl, at.machine.has("transformer-engine")
    if wish == "transformer_engine" and not there:
        raise ConfigError(
            f"{key}={wish} needs Transformer Engine and a CUDA device: install both (docs/gpu.md) or use {key}=auto"
        )
    if wish != "auto":
        return Choice(key, wish, "as set", automatic=False)
    if there:
        return Choice(key, "transformer_engine", "installed: attention that keeps no scores", automatic=True)
    return Choice(key, "local", "Transformer Engine is not installed" if at.machine.gpu else "on CPU", automatic=True)


def _experts(at: Situation, engine: bool) -> Choice:
    key, wish, needs = _EXPERTS, at.model.experts, _needs_its_experts(at.model)
    if wish == "te" and not engine:
        raise ConfigError(
            f"{key}=te needs Transformer Engine and a CUDA device: install both (docs/gpu.md) or use {key}=auto"
        )
    if wish not in ("auto", "te") and needs:
        raise ConfigError(
            f"{needs} needs the experts of Transformer Engine, not {key}={wish}: use {key}=auto, or leave it out"
        )
    if wish != "auto":
        return Choice(key, wish, "as set", automatic=False)
    if not engine:
        return Choice(
            key, "grouped", "without layers of Transformer Engine" if at.machine.gpu else "on CPU", automatic=True
        )
    if needs:
        return Choice(key, "te", f"{needs} is of Transformer Engine's", automatic=True)
    if not at.bf16:
        return Choice(key, "te", "torch's grouped product for GPUs is of bf16, and the run is fp32", automatic=True)
    if at.machine.capability[0] not in _GROUPED_KERNELS:
        return Choice(key, "te", f"torch has no kernel of grouped products for {at.machine.gpu}", automatic=True)
    # Measured: benchmarks/results/gpu_check.json, sections experts and peer.
    return Choice(
        key, "grouped", "one kernel for all experts, where Transformer Engine starts one for each", automatic=True
    )


def _needs_its_experts(model: ModelConfig) -> str | None:
    """What is asked for that only Transformer Engine's experts do."""
    if model.fp8 != "none":
        return f"model.fp8={model.fp8}"
    return "model.mcore.use_te_activation_func=true" if model.mcore.get("use_te_activation_func") else None


# ---- dispatcher ------------------------------------------------------------------------------------------------------


def _flex_obstacle(at: Situation) -> str | None:
    """What stands in the way of the flex dispatcher."""
    if not at.num_experts:
        return "the model is dense"
    if at.machine.gpu is None:
        return "it needs a GPU"
    if not at.machine.has("deepep") and not at.machine.has("hybridep"):
        return "neither DeepEP nor HybridEP is installed"
    if at.spread == 1:
        return "every rank has all experts"
    if not at.bf16:
        return "its kernels send bf16, and the run is fp32"
    if at.performance.shared_expert_overlap is True:
        return "performance.shared_expert_overlap=true needs alltoall"
    return None


def _dispatcher(at: Situation) -> Choice:
    key, wish, obstacle = "model.dispatcher", at.model.dispatcher, _flex_obstacle(at)
    if wish == "flex" and obstacle:
        raise ConfigError(f"{key}=flex cannot be here: {obstacle}: use {key}=alltoall (docs/gpu.md)")
    if wish != "auto":
        return Choice(key, wish, "as set", automatic=False)
    if obstacle:
        return Choice(key, "alltoall", obstacle if at.machine.gpu else "on CPU", automatic=True)
    if not at.across_nodes:
        return Choice(key, "alltoall", f"all {at.spread} ranks of a token's experts are in one node", automatic=True)
    if at.machine.has("hybridep") and at.machine.capability >= _BLACKWELL:
        return Choice(
            key, "flex", f"tokens go to {at.spread} ranks in several nodes, and HybridEP is there", automatic=True
        )
    if at.machine.capability < _HOPPER or not at.machine.has("deepep"):
        return Choice(
            key, "alltoall", f"nothing installed is made for several nodes of {at.machine.gpu}", automatic=True
        )
    if at.machine.ranks_per_node == 8 and at.spread in _DEEPEP_ACROSS_NODES:
        why = f"tokens go to {at.spread} ranks in several nodes, and DeepEP sends each once per node"
        return Choice(key, "flex", why, automatic=True)
    why = f"DeepEP has no settings for {at.spread} ranks on nodes of {at.machine.ranks_per_node}"
    return Choice(key, "alltoall", why, automatic=True)


def _backend(at: Situation) -> Choice:
    """The library of the flex dispatcher; called where one is there."""
    key, wish = "performance.flex_backend", at.performance.flex_backend
    if wish != "auto":
        if not at.machine.has(wish):
            raise ConfigError(f"{key}={wish} is not installed: install it (docs/gpu.md), or use {key}=auto")
        chosen = Choice(key, wish, "as set", automatic=False)
    elif at.machine.has("hybridep") and at.machine.capability >= _BLACKWELL:
        chosen = Choice(key, "hybridep", f"made for the links between {at.machine.gpu}s", automatic=True)
    elif at.machine.has("deepep"):
        chosen = Choice(key, "deepep", "installed", automatic=True)
    else:
        chosen = Choice(key, "hybridep", "the one that is installed", automatic=True)
    if chosen.value == "deepep" and at.spread not in (*_DEEPEP_IN_NODE, *_DEEPEP_ACROSS_NODES, *_DEEPEP_NEWER):
        raise ConfigError(
            f"model.dispatcher=flex: DeepEP has no settings for {at.spread} ranks (parallel.expert x "
            "parallel.expert_tensor): use model.dispatcher=alltoall, or another parallel.expert"
        )
    return chosen


# ---- fusions ---------------------------------------------------------------------------------------------------------


def _engine(at: Situation, why: str) -> _Verdict:
    """Of what needs Transformer Engine and nothing else."""
    obstacle = None if at.machine.has("transformer-engine") else "it needs Transformer Engine and a GPU"
    if at.model.transformer_impl == "local":
        return obstacle, False, f"{_IMPLEMENTATION}=local keeps Transformer Engine out"
    return obstacle, True, why


def _permute(at: Situation) -> _Verdict:
    if not at.num_experts:
        return "the model is dense", False, ""
    obstacle, worth, why = _engine(at, "one kernel of Transformer Engine instead of several of torch")
    if obstacle is None and at.machine.compile_obstacle:
        obstacle = f"Transformer Engine compiles it with Triton, which cannot here: {at.machine.compile_obstacle}"
    return obstacle, worth, why


def _router(at: Situation) -> _Verdict:
    if not at.num_experts:
        return "the model is dense", False, ""
    if at.families:
        return "the stage routes in families (exact mode), which is a router of our own", False, ""
    if at.model.fp8 != "none":
        # Seen on an H200: autograd refuses, because mcore sends experts tokens more by writing into the kernel's result.
        return "mcore pads for model.fp8 what the kernel keeps for its backward pass", False, ""
    return _engine(at, "scores, top-K and balancing loss in one kernel of Transformer Engine")


def _rope(at: Situation) -> _Verdict:
    if at.model.attention == "mla" and at.model.rope_scaling != "yarn":
        return "mcore fuses the rotation of latent attention for yarn only", False, ""
    if at.documents:
        return "documents are kept apart, and positions begin anew in each", False, ""
    obstacle, worth, why = _engine(at, "one kernel of Transformer Engine")
    if at.model.attention == "mla":
        return obstacle, False, "mcore calls it experimental for latent attention"
    return obstacle, worth, why


def _cross_entropy(at: Situation) -> _Verdict:
    return None if at.machine.gpu else "it is compiled for GPUs", True, "fewer passes over the logits"


def _accumulation(at: Situation) -> _Verdict:
    if at.machine.has("apex"):
        return None, True, "weight gradients go straight into the fp32 buffers"
    if at.model.transformer_impl != "transformer_engine":
        return "mcore's layers need NVIDIA Apex's weight-gradient extension for it", False, ""
    return None, True, "weight gradients of Transformer Engine's layers go straight into the fp32 buffers"


_RULES: dict[str, Callable[[Situation], _Verdict]] = {
    "permute_fusion": _permute,
    "router_fusion": _router,
    "rope_fusion": _rope,
    "cross_entropy_fusion": _cross_entropy,
    "gradient_accumulation_fusion": _accumulation,
}


# ---- overlap ---------------------------------------------------------------------------------------------------------


def _shared_experts(at: Situation, dispatcher: Choice, woven: bool) -> _Verdict:
    if not at.num_experts or at.model.shared_expert_ffn_hidden_size is None:
        return "the model has no shared experts", False, ""
    if woven:
        return f"tokens travel under another micro-batch ({OVERLAP})", False, ""
    if dispatcher.value != "alltoall":
        return f"it needs model.dispatcher=alltoall, not {dispatcher.value}", False, ""
    if at.model.recompute == "selective" and "shared_experts" in at.model.recompute_modules:
        return "shared experts are computed again (model.recompute_modules)", False, ""
    if at.machine.gpu is None:
        return None, False, "on CPU nothing overlaps"
    if at.spread == 1:
        return None, False, "tokens do not travel"
    return None, True, "shared experts are computed while tokens travel"


def _expert_parallel(at: Situation, dispatcher: Choice) -> list[Choice]:
    """The overlap where it was asked for; it is never chosen, because it costs memory and no GPU has shown its worth."""
    if not at.performance.expert_parallel_overlap:
        return []
    model = replace(at.model, dispatcher=str(dispatcher.value))
    gpu = at.machine.gpu is not None
    refuse_overlap(model, at.performance, at.num_experts, at.parallel, bf16=at.bf16, gpu=gpu)
    why = nothing_to_hide(at.num_experts, at.parallel)
    if why:
        return [Choice(OVERLAP, False, f"nothing to hide: {why}", automatic=False)]
    return [Choice(OVERLAP, True, "as set; not run on several GPUs yet", automatic=False)]


def _grad_reduce(at: Situation) -> _Verdict:
    if at.machine.gpu is None:
        return None, False, "on CPU nothing overlaps"
    if at.replicas == 1:
        return None, False, "no rank shares parameters with another"
    return None, True, f"gradients of {at.replicas} ranks are reduced while the backward pass runs"


def _param_gather(at: Situation, reducing: bool) -> _Verdict:
    if not at.sharded:
        return "it needs optimizer.distributed=true", False, ""
    if not reducing:
        return "it needs optimizer.overlap_grad_reduce", False, ""
    return None, at.machine.gpu is not None, "weights are gathered while the forward pass runs"


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def _graphs(at: Situation) -> list[Choice]:
    """Graphs where they were asked for; they are never chosen, because no GPU has shown yet what they are worth."""
    wish = at.performance.cuda_graphs
    engine = at.machine.has("transformer-engine")
    refuse_graphs(
        at.model,
        wish,
        bf16=at.bf16,
        documents=at.documents,
        context=at.parallel.context,
        gpu=at.machine.gpu is not None,
        engine=engine,
    )
    if wish == "none":
        return []
    why = f"as set: captured after {WARMUP_STEPS} steps of the stage, and dropped before the next"
    return [Choice(KEY, wish, why, automatic=False)]


# ---- what mcore is told ----------------------------------------------------------------------------------------------


def resolved(at: Situation, choices: tuple[Choice, ...]) -> tuple[ModelConfig, PerformanceConfig]:
    """The settings with every choice in the place of its `auto`."""
    values = {choice.key: choice.value for choice in choices}
    performance = {key.split(".")[1]: value for key, value in values.items() if key.startswith("performance.")}
    return (
        replace(_with_modules(at.model, list(choices)), dispatcher=str(values["model.dispatcher"])),
        replace(at.performance, **performance),  # type: ignore[arg-type]
    )


def mcore_fields(model: ModelConfig, performance: PerformanceConfig) -> dict[str, Any]:
    """mcore's fields for decided keys; whatever is still `auto` is off.

    Args:
        model: the network.
        performance: of `resolved`.
    """
    fields: dict[str, Any] = {
        field: getattr(performance, name) is True
        for name, field in _TOGGLES.items()
        if model.num_experts or not field.startswith("moe_")
    }
    if model.num_experts:
        fields[_DISPATCHER] = "alltoall" if model.dispatcher == "auto" else model.dispatcher
        if model.dispatcher == "flex" and performance.flex_backend != "auto":
            fields[_BACKEND] = performance.flex_backend
    return fields
