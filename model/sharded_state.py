"""Saves and loads the tensors of a model and its optimizer as an mcore torch_dist checkpoint, at any layout.

mcore's `fully_reshardable` optimizer format stores each master and moment under the key and shape of its parameter, so
one description of keys serves weights and optimizer state alike. Everything that is not a tensor (Adam's step, schedule,
positions) travels in the checkpoint's manifest (`train/checkpoint/folder.py`), because mcore's own plain part differs
between EP=1 and EP>1 and between mcore versions.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from model.build import moe_parts
from parallel.compat import OPTIMIZER_METADATA
from parallel.errors import CheckpointError
from parallel.layout import Layout
from parallel.optimizer_state import (
    OptimizerView,
    allocate_state,
    chained,
    clear_moments,
    forget_step,
    optimizer_views,
    set_step,
)
from parallel.regions import flat_boxes
from parallel.sharded_load import load_sharded
from parallel.sharded_save import KnownPlan, SaveInProgress, begin_save

OPTIMIZER_PREFIX = "optimizer.state."
MASTER_PREFIX = "optimizer.state.param."


def metadata(layout: Layout) -> dict[str, Any]:
    """How mcore shall shape sharded state: resharding optimizer format, one key per layer."""
    return {**OPTIMIZER_METADATA, "dp_cp_group": layout.groups.dp_cp}


def model_state(chunks: list[GPTModel], layout: Layout) -> dict[str, Any]:
    """Sharded description of the weights and persistent buffers of this rank's chunks.

    Without the extra state of linear layers: it exists for FP8 only, differs between expert modules, and is rebuilt.
    """
    state = {}
    for i, chunk in enumerate(chunks):
        full = chunk.sharded_state_dict(metadata=metadata(layout))
        state[f"model{i}"] = {key: leaf for key, leaf in full.items() if not isinstance(leaf, ShardedObject)}
    return state


def optimizer_state(optimizer: Any, model: dict[str, Any], layout: Layout, *, loading: bool) -> list[Any]:
    """mcore's sharded optimizer state, one tree per optimizer of the chain, under the distributed optimizer's keys."""
    flat = {f"{name}.{key}": value for name, part in model.items() for key, value in part.items()}
    trees = []
    for single in chained(optimizer):
        tree = single.sharded_state_dict(flat, is_loading=loading, metadata=metadata(layout))
        if not isinstance(single, DistributedOptimizer):
            _use_distributed_keys(single, tree, flat, loading)
        trees.append(tree)
    return trees


def _own_optimizer_state(optimizer: Any, model: dict[str, Any], layout: Layout, *, loading: bool) -> list[Any]:
    """`optimizer_state` where every data rank writes, or reads, the ranges of its own.

    mcore collects masters and moments of all data ranks on each of them first; that takes three copies of the model and
    most of the time of a save. To load, it has every rank read all of them into host memory, and lets Transformer Engine's
    Adam make its moments a second time beside the first. A range of a parameter is a few boxes of its tensor, and
    checkpoints are made of boxes.
    """
    owned = [single for single in chained(optimizer) if isinstance(single, DistributedOptimizer)]
    if not owned:
        return optimizer_state(optimizer, model, layout, loading=loading)
    of_parameter: dict[int, list[tuple[ShardedTensor, tuple[int, ...], int]]] = {}
    for _, leaf in sharded_leaves(model):
        parts = _parts(leaf)
        if parts is None:
            return optimizer_state(optimizer, model, layout, loading=loading)
        of_parameter[id(leaf.data)] = parts
    trees: list[Any] = []
    for single in chained(optimizer):
        if single not in owned:
            trees += optimizer_state(single, model, layout, loading=loading)
            continue
        boxes: list[ShardedTensor] = []
        for view in optimizer_views(single):
            for part, strides, first in of_parameter[id(view.param)]:
                boxes.extend(_boxes(view, part, strides, first))
        trees.append(boxes)
    return trees


def _parts(leaf: ShardedBase) -> list[tuple[ShardedTensor, tuple[int, ...], int]] | None:
    """The logical tensors a parameter is stored as, with strides and first element of each in the parameter's memory.

    None if they are not views of it.
    """
    if isinstance(leaf, ShardedTensor):
        built, probe = [leaf], leaf.data
    else:
        # Built out of a tensor without memory: they are views, which tells where in the parameter they lie.
        probe = torch.empty(leaf.data.shape, dtype=leaf.data.dtype, device="meta")
        built = [part for _, part in sharded_leaves(dataclasses.replace(leaf, data=probe).build())]
        if not all(
            isinstance(part, ShardedTensor) and part.data is not None and part.data._base is probe for part in built
        ):
            return None
    return [
        (
            part,
            (0,) * part.prepend_axis_num + tuple(part.data.stride()),
            part.data.storage_offset() if part is not leaf else 0,
        )
        for part in built
    ]


def _boxes(view: OptimizerView, part: ShardedTensor, strides: tuple[int, ...], first: int) -> Iterator[ShardedTensor]:
    """What a flat range of masters and moments covers of one logical tensor."""
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    stop = view.start + view.tensors["param"].numel()
    # The data ranks hold different ranges; whether another rank holds the same one is said by the rest.
    replica_id = (*part.replica_id[:-1], 0)
    for box in flat_boxes(shape, strides, first, view.start, stop):
        at = first + sum(o * s for o, s in zip(box.offset, strides, strict=True)) - view.start
        for name, tensor in view.tensors.items():
            data = tensor.detach().as_strided(box.shape, strides, tensor.storage_offset() + at)
            yield ShardedTensor(
                key=f"{OPTIMIZER_PREFIX}{name}.{part.key}",
                data=data,
                dtype=data.dtype,
                local_shape=box.shape,
                global_shape=tuple(part.global_shape),
                global_offset=tuple(a + b for a, b in zip(part.global_offset, box.offset, strict=True)),
                axis_fragmentations=None,
                replica_id=replica_id,
            )


def _use_distributed_keys(single: Any, tree: dict[str, Any], model: dict[str, Any], loading: bool) -> None:
    """Name masters as the distributed optimizer does, so that either kind reads what the other wrote."""
    for _, leaf in sharded_leaves(tree):
        leaf.key = leaf.key.replace(f"{OPTIMIZER_PREFIX}fp32_param.", MASTER_PREFIX, 1)
    if isinstance(single, FP32Optimizer) and not loading:
        # The weights are their own masters; the distributed optimizer will look for both.
        mine = {id(p) for p in single.get_parameters()}
        tree["masters"] = [
            dataclasses.replace(leaf, key=MASTER_PREFIX + leaf.key) for leaf in model.values() if id(leaf.data) in mine
        ]


def sharded_leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], ShardedBase]]:
    """The sharded entries of a tree of dicts and lists, with their paths."""
    if isinstance(tree, ShardedBase):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from sharded_leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from sharded_leaves(value, (*path, index))


def _flatten(trees: list[Any]) -> dict[str, ShardedBase]:
    """Sharded leaves only, under unique names; the names are not stored, the keys of the leaves are."""
    return {"/".join(map(str, path)): leaf for path, leaf in sharded_leaves(trees)}


def _write_back(trees: list[Any], loaded: dict[str, Any]) -> None:
    """Put loaded tensors where their descriptions were."""
    for path, _ in list(sharded_leaves(trees)):
        node: Any = trees
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = loaded["/".join(map(str, path))]


def begin_save_tensors(
    directory: Path,
    chunks: list[GPTModel],
    optimizer: Any,
    layout: Layout,
    *,
    copy: bool,
    known: KnownPlan | None = None,
) -> SaveInProgress:
    """Begin to write weights, buffers, masters and moments; collective over all ranks.

    Args:
        directory: for the tensors.
        chunks: bare model chunks.
        optimizer: their optimizer.
        layout: of both.
        copy: take copies in host memory, so that training may go on while they are written.
        known: the plan of the last save of the same chunks and layout, to be used again (`begin_save`).

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    state = model_state(chunks, layout)
    state["optimizer"] = _flatten(_own_optimizer_state(optimizer, dict(state), layout, loading=False))
    return begin_save(state, str(directory), parallel_group=layout.groups.dp_cp, copy=copy, known=known)


def save_tensors(directory: Path, chunks: list[GPTModel], optimizer: Any, layout: Layout) -> None:
    """Write weights, buffers, masters and moments; collective over all ranks.

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    save = begin_save_tensors(directory, chunks, optimizer, layout, copy=False)
    save.write()
    save.finish()


def load_tensors(
    directory: Path, chunks: list[GPTModel], optimizer: Any, layout: Layout, *, step: int, with_optimizer: bool = True
) -> None:
    """Load weights, buffers, masters and moments saved under any layout; collective over all ranks.

    Args:
        directory: what `save_tensors` wrote.
        chunks: bare model chunks to fill.
        optimizer: their optimizer; its masters, moments and step count are set.
        layout: the current layout.
        step: Adam's step count at the save.
        with_optimizer: False keeps fresh moments and takes the masters from the weights.

    Raises:
        CheckpointError: naming the first key that the checkpoint lacks or that this model does not know.
    """
    allocate_state(optimizer)
    request = model_state(chunks, layout)
    trees: list[Any] = []
    memory: dict[int, list[torch.Tensor]] = {}
    if with_optimizer:
        trees = _own_optimizer_state(optimizer, dict(request), layout, loading=True)
        memory = {i: [box.data for box in tree] for i, tree in enumerate(trees) if isinstance(tree, list)}
        request["optimizer"] = _flatten(trees)
    loaded, missing, unexpected = load_sharded(request, str(directory), strict=False)
    plain_fp32 = all(isinstance(single, FP32Optimizer) for single in chained(optimizer))
    ignored = () if with_optimizer else (OPTIMIZER_PREFIX,)
    _refuse_difference(directory, missing, unexpected, (MASTER_PREFIX,) if plain_fp32 and with_optimizer else ignored)
    _fill(directory, chunks, loaded)
    if not with_optimizer:
        optimizer.reload_model_params()
        clear_moments(optimizer)
        set_step(optimizer, 0)
        return
    _write_back(trees, loaded["optimizer"])
    forget_step(optimizer)
    for i, (single, tree) in enumerate(zip(chained(optimizer), trees, strict=True)):
        if i in memory:
            for own, tensor in zip(memory[i], tree, strict=True):
                # Read into its place already, as a rule.
                if own.data_ptr() != tensor.data_ptr():
                    own.copy_(tensor)
        elif isinstance(single, DistributedOptimizer):
            # Its load_state_dict would put one shared step tensor into every state; this reads tensors only.
            single.load_parameter_state_from_fully_reshardable(tree["param_state"])
        else:
            _load_plain(single, tree)
    set_step(optimizer, step)


def load_weights(directory: Path, chunks: list[GPTModel], layout: Layout) -> None:
    """Load weights and buffers alone, saved under any layout; collective over all ranks.

    Args:
        directory: what `save_tensors` wrote; its optimizer state is not read.
        chunks: bare model chunks to fill.
        layout: the current layout.

    Raises:
        CheckpointError: naming the first key that the checkpoint lacks or that this model does not know.
    """
    loaded, missing, unexpected = load_sharded(model_state(chunks, layout), str(directory), strict=False)
    _refuse_difference(directory, missing, unexpected, (OPTIMIZER_PREFIX,))
    _fill(directory, chunks, loaded)


def _fill(directory: Path, chunks: list[GPTModel], loaded: dict[str, Any]) -> None:
    """Copy loaded weights and buffers into the chunks."""
    for i, chunk in enumerate(chunks):
        left = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        absent = [key for key in left.missing_keys if not key.endswith("_extra_state")] + left.unexpected_keys
        if absent:
            raise CheckpointError(f"checkpoint {directory} does not fit this model: {absent[0]} was not filled")


def _load_plain(single: Any, tree: dict[str, Any]) -> None:
    """Copy loaded tensors into an optimizer whose state is not sharded over data ranks, parameter by parameter."""
    inner = tree.get("optimizer", tree)
    params = [p for group in single.optimizer.param_groups for p in group["params"]]
    for index, param in enumerate(params):
        for name, tensor in inner["state"][index].items():
            single.optimizer.state[param][name].copy_(tensor)
    for masters, values in zip(
        getattr(single, "fp32_from_float16_groups", ()), tree.get("fp32_from_fp16_params", ()), strict=True
    ):
        for master, value in zip(masters, values, strict=True):
            master.data.copy_(value)


def _refuse_difference(directory: Path, missing: set[str], unexpected: set[str], ignored: tuple[str, ...]) -> None:
    unexpected = {k for k in unexpected if not k.startswith(ignored)}
    if missing:
        first = min(missing)
        hint = (
            ": to go on knowingly with fresh moments use checkpoint.load=model_only"
            if all(k.startswith(OPTIMIZER_PREFIX) for k in missing)
            else ": it is of another model"
        )
        raise CheckpointError(f"checkpoint {directory} lacks {len(missing)} keys of this run, first {first}{hint}")
    if unexpected:
        raise CheckpointError(
            f"checkpoint {directory} holds {len(unexpected)} keys that this run does not know, first "
            f"{min(unexpected)}: it is of another model"
        )


def expert_keys(chunks: list[GPTModel], layout: Layout) -> dict[str, dict[str, Any]]:
    """Which checkpoint keys run over experts on their first axis, over all ranks.

    Returns:
        key -> {"layer": number from 1, "kind": expert | router | selection_bias}. Masters and moments are stored under
        `optimizer.state.<name>.<key>` and follow their parameter.
    """
    found: dict[str, dict[str, Any]] = {}
    parts = moe_parts(chunks)
    for part in model_state(chunks, layout).values():
        for _, leaf in sharded_leaves(part):
            for moe in parts:
                if leaf.key.startswith(f"{moe.prefix}experts."):
                    found[leaf.key] = {"layer": moe.number, "kind": "expert"}
                elif leaf.key == f"{moe.prefix}router.expert_bias":
                    found[leaf.key] = {"layer": moe.number, "kind": "selection_bias"}
                elif leaf.key.startswith(f"{moe.prefix}router."):
                    found[leaf.key] = {"layer": moe.number, "kind": "router"}
    merged: dict[str, dict[str, Any]] = {}
    for theirs in layout.gather_objects(found):
        merged.update(theirs)
    return dict(sorted(merged.items()))


def parameter_of(key: str) -> tuple[str, str]:
    """Split a checkpoint key into (kind of state, parameter key): `weight` or the optimizer state's name."""
    if key.startswith(OPTIMIZER_PREFIX):
        name, parameter = key[len(OPTIMIZER_PREFIX) :].split(".", 1)
        return name, parameter
    return "weight", key
