"""The seam to megatron-core: everything that differs between its versions (0.16.1 to 0.19.2), and nothing else.

Why: expansions touch corners of mcore that move between releases (specs of MoE layers, metric trackers, checkpoint
strategies). Whoever needs one of these calls it here; no other file tests for a version. Features are tested for, not
version numbers.

How to use: `prepare_megatron()` first thing in a process, then the rest as needed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import platform
import warnings
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from parallel.cpu_runtime import install_cpu_runtime
from parallel.errors import CheckpointError, ConfigError, LaunchError

Config = TypeVar("Config")

# How every sharded state dict of ours is written. `fully_reshardable` is the only optimizer format that survives a
# change of layout; one key per layer ('decoder.layers.{i}.') lets layers differ in their number of experts.
# Callers add 'dp_cp_group' (the process group) to a copy.
OPTIMIZER_METADATA: MappingProxyType[str, Any] = MappingProxyType(
    {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
    }
)


def have_transformer_engine() -> bool:
    """Whether NVIDIA Transformer Engine can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def versions() -> dict[str, str]:
    """Versions that decide how a run behaves, for the run's records; an absent package is left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("coppice", "megatron-core", "transformer-engine", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def prepare_megatron() -> None:
    """Makes mcore usable in this process: CPU runtime where there is no CUDA, an upstream bug bridged, less noise.

    Raises:
        LaunchError: a package that mcore needs but does not require is missing.
    """
    if importlib.util.find_spec("psutil") is None:
        raise LaunchError("package psutil is missing, and megatron-core cannot write a checkpoint without it: install it")
    quiet_megatron()
    if not torch.cuda.is_available():
        install_cpu_runtime()
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 reads this name in every router call but binds it only if Transformer Engine imports (GPU too).
        moe_utils.te_general_gemm = None


def quiet_megatron() -> None:
    """Silences what mcore says at import, construction and every step, and that a user of Coppice cannot act on."""
    # "Transformer Engine is not installed", "full scope is deprecated", "MimoModelConfig is experimental", ...
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # torch >= 2.13 renames collectives that mcore calls every step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # the distributed optimizer sets .grad on slices of parameters
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"


def layer_submodules(spec: Any) -> Any:
    """The `submodules` of a spec: a `ModuleSpec` in 0.16, a `functools.partial` for MoE layers in 0.19."""
    if isinstance(spec, functools.partial):
        return spec.keywords["submodules"]
    return spec.submodules


def moe_submodules(layer_spec: Any) -> Any:
    """The `MoESubmodules` (experts, shared_experts, router) of a transformer layer's spec."""
    return layer_submodules(layer_submodules(layer_spec).mlp)


def use_experts(layer_spec: Any, experts_cls: type) -> None:
    """Makes a layer's spec build its experts with `experts_cls`.

    Args:
        layer_spec: spec of one MoE transformer layer, changed in place.
        experts_cls: called as `experts_cls(num_local_experts, config, [submodules], pg_collection=..., [name=...])`.
    """
    moe_submodules(layer_spec).experts = experts_cls


def mark_expert_parameters(model: torch.nn.Module, *, tensor: int, expert: int, expert_tensor: int) -> None:
    """Marks the experts' parameters for reduction over the expert groups; call it before the model is wrapped in DDP.

    mcore 0.16.1 does so only when EP > 1. With EP = 1 and another tensor parallel size for experts than for the rest it
    reduces their gradients over the wrong ranks, without an error (0.19.2 does it right).

    Args:
        model: a model with `MoELayer`s, or one pipeline chunk of it.
        tensor: tensor parallel size of the dense part.
        expert: expert parallel size.
        expert_tensor: tensor parallel size of the experts.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = expert == 1 and expert_tensor == tensor  # type: ignore[attr-defined]


def reset_moe_metrics() -> None:
    """Forgets mcore's global MoE metrics: they are sized by layers and hold the process groups of the old layout."""
    from megatron.core.transformer.moe import moe_utils

    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


def make_transformer_config(cls: type[Config], **fields: Any) -> Config:
    """Builds an mcore config, naming what this mcore version does not know.

    Args:
        cls: `TransformerConfig` or a subclass.
        **fields: its fields.

    Raises:
        ConfigError: a field is unknown, or mcore refuses the combination.
    """
    known = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "remove it"
            version = importlib.metadata.version("megatron-core")
            raise ConfigError(f"{cls.__name__} of megatron-core {version} has no field {name}={fields[name]!r}: {remedy}")
    try:
        return cls(**fields)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"megatron-core refuses this model: {error}") from error


def save_sharded(
    sharded_state_dict: dict[str, Any],
    directory: str,
    *,
    parallel_group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Writes a sharded state dict as a torch_dist checkpoint; returns when all ranks have written.

    Args:
        sharded_state_dict: mcore `ShardedTensor`s (and plain values, equal on all ranks). Same keys on all ranks.
        directory: where to write; created if need be, must be empty.
        parallel_group: data-parallel group over which replicated tensors are shared out for writing; None writes
            each tensor on its main replica.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    os.makedirs(directory, exist_ok=True)
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    if parallel_group is not None:
        strategy = FullyParallelSaveStrategyWrapper(strategy, parallel_group)
    options = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # the default needs nvidia-resiliency-ext
    dist_checkpointing.save(sharded_state_dict, directory, strategy, **options)


def load_sharded(
    sharded_state_dict: dict[str, Any], directory: str, *, strict: bool = True
) -> tuple[dict[str, Any], set[str], set[str]]:
    """Loads what a sharded state dict asks for from a torch_dist checkpoint, at any layout.

    Args:
        sharded_state_dict: mcore `ShardedTensor`s to fill; the tensors in it are filled in place.
        directory: a checkpoint written by `save_sharded`.
        strict: raise if a key is asked for and not stored.

    Returns:
        The loaded state dict; keys asked for that the checkpoint lacks (missing); stored keys not asked for
        (unexpected).

    Raises:
        CheckpointError: the directory holds no checkpoint, or (strict) a key is missing.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import StrictHandling

    try:
        # mcore counts from the checkpoint's side: its 'missing' are stored keys that were not asked for.
        state, not_asked, not_stored = dist_checkpointing.load(
            sharded_state_dict, directory, strict=StrictHandling.RETURN_ALL
        )
    except CheckpointingException as error:
        raise CheckpointError(f"checkpoint {directory} cannot be loaded: {error}") from error
    if strict and not_stored:
        raise CheckpointError(
            f"checkpoint {directory} lacks {len(not_stored)} keys of this model, first {min(not_stored)}"
        )
    return state, not_stored, not_asked


def checkpoint_tensors(directory: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of every tensor in a torch_dist checkpoint, without reading the tensors.

    Raises:
        CheckpointError: the directory holds no checkpoint.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        metadata = dist_checkpointing.load_tensors_metadata(directory)
    except CheckpointingException as error:
        raise CheckpointError(f"{directory} is not a checkpoint: {error}") from error
    return {key: (tuple(tensor.global_shape), tensor.dtype) for key, tensor in metadata.items()}
