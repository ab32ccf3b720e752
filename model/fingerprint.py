"""Fingerprints of training state that do not depend on the layout: what lets Coppice refuse instead of guess.

The fingerprint of a tensor is the sum over its elements of a mixed form of their bits, modulo 2^64. A sum does not care
which rank holds which part, so ZeRO-1 ranges, expert-parallel shards and tensor-parallel shards add up to the same
number in every layout, and equal numbers mean equal bits in some order (64-bit collisions aside). Tensors that run over
experts get one number per expert.

Used after every load (moments really are those that were saved) and around an expansion (copies equal their parents,
everything else is untouched).
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from model.build import expert_rows, moe_parts
from model.sharded_state import model_state
from parallel.layout import Layout
from parallel.optimizer_state import optimizer_views

# name of state -> checkpoint key of the parameter -> one number per row (expert or router row), or a single one
Fingerprints = dict[str, list[int]]

# Odd 64-bit constants of the splitmix64 finaliser (Steele et al., OOPSLA 2014), as signed integers.
_MIX_1 = -0x61C8864680B583EB
_MIX_2 = -0x40A7B892E31B1A47
_MIX_3 = -0x6B2FB644ECCEEE15


def mix_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of every element's bits, [numel] int64."""
    flat = tensor.detach().reshape(-1).contiguous()
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    x = flat.to(torch.int64) + _MIX_1
    x = (x ^ (x >> 30)) * _MIX_2
    x = (x ^ (x >> 27)) * _MIX_3
    return x ^ (x >> 31)


# Elements hashed at a time: the 64-bit temporaries of a whole expert stack would not fit beside a training state.
_CHUNK = 1 << 24


def tensor_sums(tensor: torch.Tensor, start: int, row_numel: int, rows: int) -> torch.Tensor:
    """Fingerprints of the rows of a tensor, [rows] int64, computed in bounded memory; arguments as for `row_sums`."""
    flat = tensor.detach().reshape(-1)
    sums = torch.zeros(rows, dtype=torch.int64, device=flat.device)
    for offset in range(0, flat.numel(), _CHUNK):
        sums += row_sums(mix_bits(flat[offset : offset + _CHUNK]), start + offset, row_numel, rows)
    return sums


def row_sums(values: torch.Tensor, start: int, row_numel: int, rows: int) -> torch.Tensor:
    """Add hashed elements up per row, [rows] int64.

    Args:
        values: hashes of the elements start, start+1, ... of a flattened tensor.
        start: first element.
        row_numel: elements per row.
        rows: rows of the tensor.
    """
    sums = torch.zeros(rows, dtype=torch.int64, device=values.device)
    if rows == 1:
        sums[0] = values.sum()
        return sums
    index = torch.arange(start, start + values.numel(), device=values.device) // row_numel
    return sums.index_add_(0, index, values)


class _Slot:
    """Where a parameter's numbers go: its key, first row, rows held here, rows in all."""

    def __init__(self, key: str, first: int, rows: int, total: int) -> None:
        self.key, self.first, self.rows, self.total = key, first, rows, total


def _slots(chunks: list[GPTModel], layout: Layout) -> dict[int, _Slot]:
    """id of a parameter or buffer -> its slot."""
    slots: dict[int, _Slot] = {}
    experts = {id(p): (first, count) for part in moe_parts(chunks) for p, first, count in expert_rows(part, layout)}
    routers = {id(t) for part in moe_parts(chunks) for t in part.layer.router.state_dict(keep_vars=True).values()}
    total = chunks[0].config.num_moe_experts or 0
    for part in model_state(chunks, layout).values():
        for leaf in part.values():
            data = getattr(leaf, "data", None)
            if not torch.is_tensor(data):
                continue
            if id(data) in experts:
                slots[id(data)] = _Slot(leaf.key, *experts[id(data)], total)
            elif id(data) in routers:
                slots[id(data)] = _Slot(leaf.key, 0, data.shape[0], data.shape[0])
            else:
                slots[id(data)] = _Slot(leaf.key, 0, 1, 1)
    return slots


class _Speakers:
    """Which ranks count a tensor, so that each element is counted once over the world."""

    def __init__(self, chunks: list[GPTModel], layout: Layout) -> None:
        self.layout = layout
        self.experts = {id(p) for part in moe_parts(chunks) for p in part.layer.experts.parameters()}

    def tensor_copy(self, tensor: torch.Tensor) -> bool:
        """False on the tensor-parallel ranks that only repeat rank 0, and for a tied output embedding."""
        if getattr(tensor, "shared", False):
            return False
        group = self.layout.groups.expt_tp if id(tensor) in self.experts else self.layout.groups.tp
        return bool(getattr(tensor, "tensor_model_parallel", False)) or group.rank() == 0

    def data_copy(self, tensor: torch.Tensor) -> bool:
        """False on the data-parallel ranks that only repeat rank 0."""
        group = self.layout.groups.expt_dp if id(tensor) in self.experts else self.layout.groups.dp_cp
        return group.rank() == 0


def take_fingerprints(chunks: list[GPTModel], optimizer: Any, layout: Layout) -> Fingerprints:
    """Fingerprints of weights, buffers, masters and moments, equal on all ranks; collective.

    Returns:
        `weight/<key>`, `param/<key>` (fp32 masters), `exp_avg/<key>`, `exp_avg_sq/<key>` -> numbers, one per expert where
        the tensor runs over experts.
    """
    slots, speakers = _slots(chunks, layout), _Speakers(chunks, layout)
    local: dict[tuple[str, int], torch.Tensor] = {}

    def add(name: str, slot: _Slot, rows: torch.Tensor) -> None:
        total = local.setdefault((f"{name}/{slot.key}", slot.total), torch.zeros(slot.total, dtype=torch.int64))
        total[slot.first : slot.first + slot.rows] += rows.cpu()

    for chunk in chunks:
        for tensor in chunk.state_dict(keep_vars=True).values():
            slot = slots.get(id(tensor)) if torch.is_tensor(tensor) else None
            if slot and speakers.tensor_copy(tensor) and speakers.data_copy(tensor):
                add("weight", slot, tensor_sums(tensor, 0, max(1, tensor.numel() // slot.rows), slot.rows))
    for view in optimizer_views(optimizer):
        slot = slots[id(view.param)]
        if speakers.tensor_copy(view.param) and (view.sharded or speakers.data_copy(view.param)):
            for name, tensor in view.tensors.items():
                numel = max(1, view.param.numel() // slot.rows)
                add(name, slot, tensor_sums(tensor, view.start, numel, slot.rows))
    names = sorted({name for theirs in layout.gather_objects(sorted(local)) for name in theirs})
    flat = torch.cat([local.get(n, torch.zeros(n[1], dtype=torch.int64)) for n in names]).to(layout.device)
    layout.sum_over_world(flat)
    split = flat.cpu().split([total for _, total in names])
    return {name: numbers.tolist() for (name, _), numbers in zip(names, split, strict=True)}


def first_difference(expected: Fingerprints, found: Fingerprints) -> str | None:
    """The first name whose numbers differ or that only one side has; None if all agree."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return name
    return None
