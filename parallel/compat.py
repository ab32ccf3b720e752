"""The seam to megatron-core: everything that differs between its versions (0.16.1 to 0.19.2), and nothing else.

Why: expansions touch corners of mcore that move between releases (specs of MoE layers, metric trackers, checkpoint
strategies). Whoever needs one of these calls it here; no other file tests for a version. Features are tested for, not
version numbers.

How to use: `prepare_megatron()` first thing in a process, then the rest as needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import shutil
import warnings
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint

from parallel.compiler import compile_obstacle
from parallel.cpu_runtime import disable_compile, install_cpu_runtime
from parallel.errors import ConfigError
from parallel.installed import installed
from parallel.many_tensors import use_many_at_once
from parallel.transformer_engine import refuse_unusable

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


def versions() -> dict[str, str]:
    """Versions that decide how a run behaves, for the run's records; an absent package is left out."""
    found = installed(("torch", "coppice", "megatron-core", "transformer-engine", "numpy"))
    # Says of which CUDA it is, also where its metadata does not.
    found["torch"] = torch.__version__
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


class _NoFP8:
    """Stands in for Transformer Engine's state of 8-bit floats where that is not installed."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Never."""
        return False

    @staticmethod
    def reset() -> None:
        """Nothing is kept."""


def _no_context(**unused: Any) -> contextlib.AbstractContextManager[None]:
    """Stands in for Transformer Engine's contexts, which change nothing without 8-bit floats."""
    return contextlib.nullcontext()


def can_discard_outputs() -> bool:
    """Whether mcore can free a tensor in the forward pass and bring it back in the backward pass on this machine.

    From 0.19 on it compiles a C++ function for that, at its first use.
    """
    from megatron.core.tensor_parallel import random
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    if not hasattr(random, "_get_share_storage"):
        return True
    return is_ninja_available() and shutil.which(get_cxx_compiler()) is not None


def before_megatron() -> None:
    """What comes before the first import of mcore: less noise; on GPUs a look at its compiler and Transformer Engine.

    Raises:
        LaunchError: on GPUs a Transformer Engine is installed that cannot be used (`refuse_unusable`).
    """
    quiet_megatron()
    if torch.cuda.is_available():
        if compile_obstacle():
            disable_compile()
        # mcore takes an ImportError for absence and lets other errors through.
        refuse_unusable()


def prepare_megatron() -> None:
    """Makes mcore usable in this process: CPU runtime where there is no CUDA, an upstream bug bridged, less noise.

    On a GPU mcore's small functions run uncompiled where they cannot be compiled (`compile_obstacle`).

    Raises:
        LaunchError: this mcore version cannot run on CPU (see `install_cpu_runtime`), or on GPUs a Transformer Engine is
            installed that cannot be used (`refuse_unusable`).
    """
    before_megatron()
    if not torch.cuda.is_available():
        install_cpu_runtime()
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    no_gpu = not torch.cuda.is_available()
    if no_gpu or not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 reads this name in every router call but binds it only if Transformer Engine imports (GPU too). Where it
        # does and there is no GPU, both versions would call a product that needs one.
        moe_utils.te_general_gemm = None
    if no_gpu or not hasattr(random, "FP8GlobalStateManager"):
        # Bound only if Transformer Engine imports, and read whenever a norm is computed again (GPU too). Its own look for a
        # GPU.
        random.FP8GlobalStateManager = _NoFP8
        random.activation_recompute_forward = random.fp8_autocast = _no_context
    if not isinstance(multi_latent_attention.TELinear, type):
        # Its import of TE's wrappers succeeds without TE, and it asks isinstance() of a stand-in: every MLA layer fails.
        multi_latent_attention.HAVE_TE = False
    use_many_at_once()
    save_without_crc()


def save_without_crc() -> None:
    """Leave out the CRC of what torch.save writes in this thread; torch before 2.13 leaves it out in all of them then.

    It takes longer than the writing, and nothing reads it: torch.load does not, and checkpoints have the SHA-256 of every
    file.
    """
    torch.serialization.set_crc32_options(False)


# Warnings that mcore's use of torch provokes (attributed to torch's files, or to the CPU runtime's).
_HARMLESS_WARNINGS = (
    r".*torch\.distributed\.\w+` is deprecated",  # torch >= 2.13 renames collectives that mcore calls every step
    "TypedStorage is deprecated",  # freeing gradient buffers
    "The .grad attribute of a Tensor that is not a leaf",  # the distributed optimizer works on slices of parameters
    "Please use DTensor instead and we are deprecating ShardedTensor",  # saving, as the next two: loading
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
    "The argument order of load has been changed",
)


def quiet_megatron() -> None:
    """Silences what mcore says at import, construction, every step and every save; a user can act on none of it."""
    # "Transformer Engine is not installed", "full scope is deprecated", "MimoModelConfig is experimental", ...
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    for message in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
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


def is_moe_layer(layer_spec: Any) -> bool:
    """Whether a transformer layer's spec has experts."""
    return hasattr(moe_submodules(layer_spec), "experts")


def use_experts(layer_spec: Any, experts_cls: type) -> None:
    """Makes a layer's spec build its experts with `experts_cls`.

    Args:
        layer_spec: spec of one MoE transformer layer, changed in place.
        experts_cls: called as `experts_cls(num_local_experts, config, [submodules], pg_collection=..., [name=...])`.
    """
    moe_submodules(layer_spec).experts = experts_cls


def norms_uncompressed_queries() -> bool:
    """Whether latent attention with norms of compressed keys has to norm uncompressed queries too (0.19, not 0.16)."""
    return importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config") is not None


def graph_fields(warmup_steps: int) -> dict[str, Any]:
    """mcore's fields for CUDA graphs of attention by Transformer Engine; which parts are captured has another name in 0.19.

    Args:
        warmup_steps: of a stage before they are captured; mcore warms kernels up the less for it.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    parts = "cuda_graph_modules" if "cuda_graph_modules" in known else "cuda_graph_scope"
    return {"cuda_graph_impl": "transformer_engine", parts: ["attn"], "cuda_graph_warmup_steps": warmup_steps}


def unmark_whole_weights(chunk: torch.nn.Module) -> None:
    """Take the mark of a tensor-parallel part off the weights of Transformer Engine that every tensor rank holds whole.

    These are the down projections of latent attention. 0.16 leaves the mark on them, and then counts them once per rank in
    the norm of the gradient; so would whoever asks a parameter whether it is a part.
    """
    from megatron.core.extensions import transformer_engine

    whole = getattr(transformer_engine, "TELinear", None)
    for module in chunk.modules():
        # Those that are cut are of classes below it.
        if type(module) is whole:
            for parameter in module.parameters():
                parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def gradient_memory(wrapped: Any) -> list[torch.Tensor]:
    """The flat gradients of a chunk in mcore's DistributedDataParallel, dense and expert; empty ones left out."""
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    return [buffer.grad_data for buffer in buffers if buffer.grad_data.numel()]


def forget_models() -> None:
    """Empties what is kept of models outside of them: it is sized by layers, or holds old process groups alive.

    The MoE metrics are global; rotary embeddings are kept, groups and all, by the cache of their own `forward`. Delayed
    scaling reduces the amax of every layer that it has ever seen, over the group of that time: behind a change of layout one
    that is destroyed. A model in 8 bits must not run again.
    """
    from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import fused_a2a, moe_utils

    # Made for the first layer that sends, with its group and number of local experts: after a switch both are others.
    # DeepEP's looks at its group by itself, but keeps the old one alive until then.
    fused_a2a._buffer = fused_a2a._hybrid_ep_buffer = None
    random.FP8GlobalStateManager.reset()
    for module in (rotary_pos_embedding, yarn_rotary_pos_embedding):
        for cls in vars(module).values():
            forget = getattr(getattr(cls, "forward", None), "cache_clear", None)
            if forget is not None:
                forget()
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


def make_transformer_config(cls: type[Config], **fields: Any) -> Config:
    """Builds an mcore config.

    Args:
        cls: `TransformerConfig` or a subclass.
        **fields: its fields.

    Raises:
        ConfigError: mcore refuses the combination.
    """
    try:
        return cls(**fields)
    except (AssertionError, NotImplementedError, ValueError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"megatron-core refuses this model: {told}") from error
