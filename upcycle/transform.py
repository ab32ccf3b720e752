"""The checkpoint path of an expansion: reads a sharded checkpoint of E experts, writes one of M.

This is the slow, simple executor: the oracle that the live path must equal bit for bit, and recovery. It knows tensors
only by their checkpoint keys: weights, masters and both moments of an expert are all copied along the expert axis by the
same index, everything else is carried over untouched. Ranks share the tensors out: each holds its part of the old and the
new checkpoint in memory, and no tensor is read twice. `upcycle/stream.py` does the same in one process and bounded
memory, with the functions here that know what a new row is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from model.sharded_state import parameter_of
from parallel.errors import ExpansionError
from parallel.layout import Layout
from parallel.optimizer_state import MOMENTS
from parallel.sharded_load import checkpoint_tensors, load_sharded
from parallel.sharded_save import save_sharded
from upcycle.optimizer_rules import rule_tensor
from upcycle.plan import ExpansionPlan, LayerPlan


def bias_noise(plan: ExpansionPlan, layer: LayerPlan) -> torch.Tensor:
    """Noise on the selection bias of the replicas of one layer, [M] fp32; zero for originals.

    U(-delta, delta) as in arXiv 2604.19835, Definition 3.1, from a generator named by (seed, stage, layer).
    """
    name = f"expansion-noise/{plan.seed}/{plan.stage}/{layer.layer}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    noise_M = (torch.rand(len(layer.parents), generator=generator) * 2 - 1) * plan.bias_noise
    replicas = torch.zeros(len(layer.parents), dtype=torch.bool)
    replicas[layer.replicas()] = True
    return torch.where(replicas, noise_M, torch.zeros(()))


def parents_of(
    key: str, shape: Sequence[int], plan: ExpansionPlan, experts: Mapping[str, Mapping[str, Any]]
) -> tuple[int, ...] | None:
    """Which old row of a tensor each new row is a copy of, [M]; None for a tensor that does not run over experts.

    Args:
        key: checkpoint key, of a weight, buffer, master or moment.
        shape: of the tensor in the smaller stage; experts on the first axis where it has them.
        plan: the expansion.
        experts: checkpoint key of a parameter -> {"layer", "kind"} (`model.sharded_state.expert_keys`).

    Raises:
        ExpansionError: if the tensor does not have E experts, or the plan does not know its layer.
    """
    _, parameter = parameter_of(key)
    if parameter not in experts:
        return None
    if shape[0] != plan.experts_before:
        raise ExpansionError(f"{key} has {shape[0]} experts, the plan starts from {plan.experts_before}")
    return plan.layer(experts[parameter]["layer"]).parents


def finish_rows(
    key: str, copied: torch.Tensor, plan: ExpansionPlan, experts: Mapping[str, Mapping[str, Any]], first: int = 0
) -> torch.Tensor:
    """What the larger stage holds in rows of a tensor that were copied from their parents.

    Args:
        key: checkpoint key, of a weight, buffer, master or moment.
        copied: the new rows first, first + 1, ..., or a part of a row; may be changed in place.
        plan: the expansion.
        experts: checkpoint key of a parameter -> {"layer", "kind"}.
        first: new id of the first row; means nothing where the tensor does not run over experts.
    """
    state, parameter = parameter_of(key)
    layer = plan.layer(experts[parameter]["layer"]) if parameter in experts else None
    if layer is not None and experts[parameter]["kind"] == "selection_bias" and state == "weight":
        copied = copied + bias_noise(plan, layer)[first : first + copied.shape[0]].to(copied.dtype)
    if state in MOMENTS:
        rule_tensor(state, copied, plan, None if layer is None else layer.layer, plan.rule, first)
    return copied


def expand_tensor(
    key: str, old: torch.Tensor, plan: ExpansionPlan, experts: Mapping[str, Mapping[str, Any]]
) -> torch.Tensor:
    """The tensor that the larger stage holds under `key`; `old` may be changed in place.

    Args:
        key: checkpoint key, of a weight, buffer, master or moment.
        old: the whole tensor of the smaller stage; experts on the first axis where it has them.
        plan: the expansion.
        experts: checkpoint key of a parameter -> {"layer", "kind"} (`model.sharded_state.expert_keys`).

    Raises:
        ExpansionError: if the tensor does not have E experts, or the plan asks for what this executor cannot do.
    """
    parents = parents_of(key, old.shape, plan, experts)
    copied = old if parents is None else old.index_select(0, torch.tensor(parents))
    return finish_rows(key, copied, plan, experts)


def share_out(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Deal keys to ranks so that bytes are even: largest first, each to the rank with the least so far."""
    loads, dealt = [0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[int], list[list[str]]]
    for key in sorted(sizes, key=lambda k: (-sizes[k], k)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[key]
        dealt[rank].append(key)
    return dealt


def _whole(key: str, tensor: torch.Tensor) -> ShardedTensor:
    """A tensor that one rank holds in full."""
    return ShardedTensor.from_rank_offsets(key, tensor, replica_id=0)


def expand_checkpoint(
    source: Path, target: Path, plan: ExpansionPlan, experts: Mapping[str, Mapping[str, Any]], layout: Layout
) -> None:
    """Write the tensors of the larger stage; collective over all ranks.

    Args:
        source: tensors of the smaller stage, as `model.sharded_state.save_tensors` wrote them.
        target: empty folder for the larger stage's.
        plan: the expansion; the same on every rank.
        experts: keys with an expert axis.
        layout: any layout; only the number of ranks matters.

    Raises:
        ExpansionError: if checkpoint and plan do not fit.
        CheckpointError: if a folder cannot be read or written.
    """
    with layout.together("reading the checkpoint to expand"):
        stored = checkpoint_tensors(str(source))
        for key in experts:
            if key not in stored:
                raise ExpansionError(f"checkpoint {source} lacks {key}: it is of another model")
    sizes = {key: torch.Size(shape).numel() * dtype.itemsize for key, (shape, dtype) in stored.items()}
    mine = share_out(sizes, layout.world_size)[layout.rank]
    old = {key: _whole(key, torch.empty(stored[key][0], dtype=stored[key][1])) for key in mine}
    loaded, _, _ = load_sharded(old, str(source))
    with layout.together("expanding the checkpoint"):
        new = {key: _whole(key, expand_tensor(key, loaded.pop(key), plan, experts)) for key in mine}
    save_sharded(new, str(target))
