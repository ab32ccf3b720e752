"""The seam to megatron-core: everything that differs between its versions (0.16.1 to 0.19.2), and nothing else.

Why: expansions touch corners of mcore that move between releases (specs of MoE layers, metric trackers, checkpoint
strategies). Whoever needs one of these calls it here; no other file tests for a version. Features are tested for, not
version numbers.

How to use: `prepare_megatron()` first thing in a process, then the rest as needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import io
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.cpu_runtime import install_cpu_runtime
from parallel.errors import CheckpointError, ConfigError
from parallel.installed import installed
from parallel.many_tensors import use_many_at_once
from parallel.safe_pickle import IndexReader, load_plain, read_index, unreadable
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

# The object in which 0.19 keeps the plain values.
_COMMON = "common_state"


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


def prepare_megatron() -> None:
    """Makes mcore usable in this process: CPU runtime where there is no CUDA, an upstream bug bridged, less noise.

    Raises:
        LaunchError: this mcore version cannot run on CPU (see `install_cpu_runtime`), or on GPUs a Transformer Engine is
            installed that cannot be used (`refuse_unusable`).
    """
    quiet_megatron()
    if torch.cuda.is_available():
        # Before mcore's own import, which takes an ImportError for absence and lets other errors through.
        refuse_unusable()
    else:
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


def gradient_memory(wrapped: Any) -> list[torch.Tensor]:
    """The flat gradients of a chunk in mcore's DistributedDataParallel, dense and expert; empty ones left out."""
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    return [buffer.grad_data for buffer in buffers if buffer.grad_data.numel()]


def forget_models() -> None:
    """Empties what mcore keeps of models outside of them: it is sized by layers, or holds old process groups alive.

    The MoE metrics are global; rotary embeddings are kept, groups and all, by the cache of their own `forward`.
    """
    from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding
    from megatron.core.transformer.moe import fused_a2a, moe_utils

    # Made for the first layer that sends, with its group and number of local experts: after a switch both are others.
    # DeepEP's looks at its group by itself, but keeps the old one alive until then.
    fused_a2a._buffer = fused_a2a._hybrid_ep_buffer = None
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


def refuse_unknown_fields(cls: type, fields: Mapping[str, Any]) -> None:
    """Refuse fields that an mcore config of this version does not have.

    Args:
        cls: `TransformerConfig` or a subclass.
        fields: by name.

    Raises:
        ConfigError: naming the field and the nearest known one.
    """
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "remove it"
            version = importlib.metadata.version("megatron-core")
            raise ConfigError(
                f"{cls.__name__} of megatron-core {version} has no field {name}={fields[name]!r}: {remedy}"
            )


def make_transformer_config(cls: type[Config], **fields: Any) -> Config:
    """Builds an mcore config, naming what this mcore version does not know.

    Args:
        cls: `TransformerConfig` or a subclass.
        **fields: its fields.

    Raises:
        ConfigError: a field is unknown, or mcore refuses the combination.
    """
    refuse_unknown_fields(cls, fields)
    try:
        return cls(**fields)
    except (AssertionError, NotImplementedError, ValueError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"megatron-core refuses this model: {told}") from error


def load_sharded(
    sharded_state_dict: dict[str, Any], directory: str, *, strict: bool = True
) -> tuple[dict[str, Any], set[str], set[str]]:
    """Loads what a sharded state dict asks for from a torch_dist checkpoint, whatever the layout that wrote it.

    No code in the checkpoint is run (`parallel/safe_pickle.py`).

    Args:
        sharded_state_dict: `ShardedTensor`s and `ShardedObject`s of mcore; the tensors in it are filled in place.
        directory: a checkpoint written by `save_sharded`.
        strict: raise if a key is asked for and not stored; otherwise the result lacks it.

    Returns:
        The loaded state dict; keys asked for by any rank and not stored (missing); keys stored and asked for by none
        (unexpected). The sets are the same on all ranks.

    Raises:
        CheckpointError: on all ranks, if there is no checkpoint, it cannot be read, it asks for code to be run, a tensor
            in it has another shape, or (strict) a key is missing.
    """
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values

    with agreed():
        require_complete(directory)
        reader = IndexReader(directory, read_index(directory))
        stored = _shapes_in(reader.read_metadata().state_dict_metadata)
    asked = asked_by_all(sharded_state_dict)
    missing, unexpected = asked.keys() - stored.keys(), stored.keys() - asked.keys()
    if strict and missing:
        raise CheckpointError(
            f"checkpoint {directory} lacks {len(missing)} of {len(asked)} keys that this model needs, "
            f"first {min(missing)}: it is of another model, or was saved without that part"
        )
    for key in sorted(asked.keys() & stored.keys()):
        if asked[key] is not None and stored[key] is not None and asked[key] != stored[key]:
            raise CheckpointError(f"checkpoint {directory} has {key} of shape {stored[key]}, this model {asked[key]}")
    if missing:
        _, sharded_state_dict = extract_matching_values(
            sharded_state_dict, lambda leaf: bool(_shapes_of(leaf).keys() & missing)
        )
    return _loaded(sharded_state_dict, directory, reader), missing, unexpected


def _loaded(sharded_state_dict: dict[str, Any], directory: str, reader: IndexReader) -> dict[str, Any]:
    """`dist_checkpointing.load`, with readers that run no code in place of mcore's and torch's; collective."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.dict_utils import merge
    from megatron.core.dist_checkpointing.mapping import apply_factory_merges
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
    from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

    force_all_tensors_to_non_fp8(sharded_state_dict)
    wanted, fixed, factories = load_preprocess(sharded_state_dict)
    wanted, _ = extract_sharded_base(wanted)
    _, everyones = determine_global_metadata(wanted)
    with agreed():
        try:
            # On rank 0 only, in 0.16.
            validate_sharding_integrity(everyones)
            state = _plain_values(directory, reader)
            merge(state, fixed)
            merge(state, _read_sharded(wanted, reader))
        except (OSError, CheckpointingException, torch.distributed.checkpoint.CheckpointException) as error:
            raise _reason(error, directory) from error
    merged: dict[str, Any] = apply_factory_merges(state, factories)
    return merged


def _reason(error: BaseException, directory: str) -> CheckpointError:
    """What to raise for what a load has failed with; torch wraps errors of ours and others."""
    why: BaseException = error
    for failure, _ in getattr(error, "failures", {}).values():
        if isinstance(failure, CheckpointError):
            why = failure
        elif isinstance(failure, pickle.UnpicklingError):
            why = unreadable("a tensor", failure)
    return CheckpointError(f"checkpoint {directory} cannot be read: {why}")


def _plain_values(directory: str, reader: IndexReader) -> dict[str, Any]:
    """The values of a checkpoint that are not sharded: in a file of their own in 0.16, a stored object in 0.19."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    file = Path(directory) / "common.pt"
    key = ShardedObject(_COMMON, None, (1,), (0,)).unique_key
    if file.exists():
        values = load_plain(file)
    elif key in reader.read_metadata().state_dict_metadata:
        (values,) = reader.read_bytes(key)
    else:
        raise CheckpointError(f"checkpoint {directory} cannot be read: it has neither {file.name} nor {_COMMON}")
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint {directory} cannot be read: its plain values are a {type(values).__name__}")
    return values


def _read_sharded(wanted: dict[str, Any], reader: IndexReader) -> dict[str, Any]:
    """`TorchDistLoadShardedStrategy.load`; every rank reads by itself what it asks for."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreLoadPlanner,
        _replace_sharded_keys_with_state_dict_keys,
        _replace_state_dict_keys_with_sharded_keys,
        _restore_dict_types,
        _unwrap_pyt_sharded_tensor,
        mcore_to_pyt_state_dict,
    )

    class Planner(MCoreLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            key = read_item.dest_index.fqn
            self.state_dict[key] = load_plain(value, key)

    tensors = [leaf for leaf in nested_values(wanted) if isinstance(leaf, ShardedTensor)]
    by_key, flat, renamed = _replace_state_dict_keys_with_sharded_keys(wanted)
    state = mcore_to_pyt_state_dict(by_key, True)
    planner = Planner(
        shapes_validation_sharded_tensors=[leaf for leaf in tensors if not leaf.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={leaf.key: leaf for leaf in tensors if leaf.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    torch.distributed.checkpoint.load(state, storage_reader=reader, planner=planner, no_dist=True)
    read = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
    found: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(read, flat, renamed)
    _restore_dict_types(found, wanted)
    return found


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Raises on every rank what any rank raises inside: 0.19 reads without telling the other ranks of a failure."""
    failure: CheckpointError | None = None
    try:
        yield
    except CheckpointError as caught:
        failure = caught
    everyones: list[CheckpointError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, failure)
    for rank, error in enumerate(everyones):
        if error is not None:
            raise failure or CheckpointError(f"{error} (on rank {rank})")


def asked_by_all(sharded_state_dict: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Keys and shapes that any rank asks for; each rank knows its own pipeline stage and experts only."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, _asked_shapes(sharded_state_dict))
    return {key: shape for of_rank in gathered for key, shape in of_rank.items()}


def _asked_shapes(sharded_state_dict: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Global shapes of what this rank asks for, by key; None where any shape is accepted."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return {key: shape for leaf in nested_values(sharded_state_dict) for key, shape in _shapes_of(leaf).items()}


def _shapes_of(leaf: Any) -> dict[str, tuple[int, ...] | None]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    if isinstance(leaf, ShardedTensorFactory):  # stands for several tensors, built when needed
        return _asked_shapes({"built": leaf.build()})
    if isinstance(leaf, ShardedTensor):
        return {leaf.key: None if leaf.allow_shape_mismatch else tuple(leaf.global_shape)}
    return {leaf.key: None} if isinstance(leaf, ShardedObject) else {}


def require_complete(directory: str | os.PathLike[str]) -> None:
    """Refuse a folder that is not a complete checkpoint: mcore writes `metadata.json` last.

    Raises:
        CheckpointError: naming the folder.
    """
    if not os.path.isfile(os.path.join(directory, "metadata.json")):
        raise CheckpointError(f"{directory} holds no complete checkpoint (metadata.json is missing)")


def mark_complete(directory: str | os.PathLike[str]) -> None:
    """Make a checkpoint that mcore loads out of files in torch's format (`parallel/stream_files.py`); no plain values.

    They go into `common.pt`, as 0.16 keeps them; 0.19 reads it too where it finds one.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    try:
        torch.save({}, os.path.join(directory, "common.pt"))
        save_config(CheckpointingConfig("torch_dist", 1), os.fspath(directory))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be written: {error}") from error


def _read_metadata(directory: str) -> dict[str, Any]:
    """What a checkpoint says of its contents. mcore's own reader fails on torch 2.15, which stores one field more."""
    require_complete(directory)
    return read_index(directory).state_dict_metadata


def _shapes_in(metadata: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Global shapes of what is stored, by key; None for objects."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    shapes: dict[str, tuple[int, ...] | None] = {}
    for key, stored in metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            shapes[key] = tuple(stored.size)
        else:
            shapes[ShardedObject.empty_from_unique_key(key).key] = None
    shapes.pop(_COMMON, None)
    return shapes


def checkpoint_tensors(directory: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of every tensor in a torch_dist checkpoint, without reading the tensors.

    Raises:
        CheckpointError: the directory holds no complete checkpoint.
    """
    return {
        key: (tuple(stored.size), stored.properties.dtype)
        for key, stored in _read_metadata(directory).items()
        if isinstance(stored, TensorStorageMetadata)
    }
