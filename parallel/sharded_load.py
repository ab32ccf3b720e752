"""Reads mcore's torch_dist checkpoints: what a sharded state dict asks for, and what a checkpoint says of its contents.

`load_sharded` is mcore's `dist_checkpointing.load` with readers that run no code (`parallel/safe_pickle.py`), a check of
keys and shapes before anything is read, and failures that every rank shares. Both versions' ways of keeping plain values are
read. `parallel/sharded_save.py` writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.errors import CheckpointError
from parallel.safe_pickle import IndexReader, load_plain, read_index, unreadable

# The object in which 0.19 keeps the plain values.
_COMMON = "common_state"


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
