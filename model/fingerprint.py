"""Fingerprints of training state that do not depend on the layout: what lets Coppice refuse instead of guess.

The fingerprint of a tensor is a sum over its elements, modulo 2^64, of a polynomial in their bits. A sum does not care
which rank holds which part, so ZeRO-1 ranges, expert-parallel shards and tensor-parallel shards add up to the same
number in every layout, and equal numbers mean equal bits in some order, collisions aside. Tensors that run over experts
get one number per expert. A tensor of zeros has the fingerprint 0.

Let x be the bits of an element, read as a signed integer of w bits. It counts with x^2 + C x, computed in integers of 2w
bits (and shifted to the upper half of the number where 2w = 32), for an odd constant C between 2^(w+1) and
2^2w - 2^(w+1). Changing x by d changes this by d (2x + d + C): for even d the second factor is odd, for odd d it is no
multiple of 2^2w, so one changed element is always seen. Two changes that cancel in a plain sum, d and -d, are seen as
well, unless the elements have traded places (or d times the difference of 2x + d is a multiple of 2^2w); unrelated
changes escape with a chance of about 2^-2w.

Used after every load (moments really are those that were saved) and around an expansion (copies equal their parents,
everything else is untouched). Every rank reads all it holds, so copies of a tensor are compared on the way: replicas
that have drifted apart are an error (`take_fingerprints`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel

from model.build import expert_rows, moe_parts
from model.sharded_state import model_state
from parallel.errors import CheckpointError, CoppiceError
from parallel.layout import Layout
from parallel.optimizer_state import optimizer_views

# name of state -> checkpoint key of the parameter -> one number per row (expert or router row), or a single one
Fingerprints = dict[str, list[int]]

# C as a signed integer: the golden ratio in 64 bits, and in 32 bits made odd.
_FACTOR = {torch.int64: -0x61C8864680B583EB, torch.int32: -0x61C8864F}
# Room for widened elements: the second-level cache of a CPU core, where the passes over it cost little; on a GPU enough
# to hide the start of a kernel.
_ROOM_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}
# "No copy here", in what is compared between replicas.
_ABSENT = torch.iinfo(torch.int64).min


def tensor_sums(tensor: torch.Tensor, start: int, row_numel: int, rows: int) -> torch.Tensor:
    """Fingerprints of the rows of a tensor of which part is here, [rows] int64, computed in bounded memory.

    Args:
        tensor: the elements start, start + 1, ... of the flattened tensor.
        start: first element.
        row_numel: elements per row.
        rows: rows of the whole tensor.
    """
    # The CPU runtime looks at every call of torch, which takes as long as the work on a small tensor.
    with torch._C.DisableTorchFunction():
        bits = tensor.detach().reshape(-1)
        if bits.element_size() == 8:
            # Two halves of 32 bits each.
            bits, start, row_numel = bits.view(torch.int32), 2 * start, 2 * row_numel
        elif bits.element_size() > 1:
            bits = bits.view(torch.int32 if bits.element_size() == 4 else torch.int16)
        wide = torch.int64 if bits.element_size() == 4 else torch.int32
        sums = torch.zeros(rows, dtype=wide, device=bits.device)
        _add_up(bits, start, row_numel, sums)
        return sums if wide == torch.int64 else sums.to(torch.int64) << 32


def _add_up(bits: torch.Tensor, start: int, row_numel: int, sums: torch.Tensor) -> None:
    """Add the polynomial of integers to the sums of their rows, [rows], in whose type it is computed."""
    wide, stop, position = sums.dtype, bits.numel(), 0
    room = torch.empty(min(_ROOM_BYTES[bits.device.type] // wide.itemsize, stop), dtype=wide, device=bits.device)
    while position < stop:
        row, column = divmod(start + position, row_numel)
        fit = min(stop - position, room.numel())
        # Whole rows at a time, or a stretch of one row.
        whole = column == 0 and fit >= row_numel
        count, width = (fit // row_numel, row_numel) if whole else (1, min(fit, row_numel - column))
        end = position + count * width
        values = room[: end - position].copy_(bits[position:end]).view(count, width)
        linear = values.sum(dim=1, dtype=wide)
        sums[row : row + count] += values.mul_(values).sum(dim=1, dtype=wide).add_(linear, alpha=_FACTOR[wide])
        position = end


class Part(NamedTuple):
    """Arguments of `tensor_sums`."""

    tensor: torch.Tensor
    start: int
    row_numel: int
    rows: int


def sums_of(parts: Sequence[Part]) -> list[torch.Tensor]:
    """`tensor_sums` of many tensors, by as many threads as torch may use on CPU.

    A thread per tensor: an operation on a cacheful of numbers is too short to be shared out among threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(part.tensor.device.type != "cpu" for part in parts):
        return [tensor_sums(*part) for part in parts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda part: tensor_sums(*part), parts))
    finally:
        # What the workers set holds for themselves, and for threads that begin later.
        torch.set_num_threads(threads)


class _Entry(NamedTuple):
    """A tensor of the whole job."""

    name: str
    # Rows, and tensor-parallel shards; one shard where every tensor-parallel rank holds the whole.
    rows: int
    shards: int
    # Whether every data-parallel rank holds a copy.
    replicated: bool


class _Piece(NamedTuple):
    """What one rank holds of a tensor."""

    entry: _Entry
    first: int
    shard: int
    part: Part
    # Whether this rank counts it, so that each element is counted once over the world.
    speaks: bool


class _Slots:
    """Where the numbers of a parameter or buffer go: its key, rows, shard, and which rank counts it."""

    def __init__(self, chunks: list[GPTModel], layout: Layout) -> None:
        parts = moe_parts(chunks)
        self._groups = layout.groups
        self._total = chunks[0].config.num_moe_experts or 0
        self._expert_rows = {id(p): (first, count) for part in parts for p, first, count in expert_rows(part, layout)}
        self._routers = {id(t) for part in parts for t in part.layer.router.state_dict(keep_vars=True).values()}
        self._keys: dict[int, str] = {}
        for part in model_state(chunks, layout).values():
            for leaf in part.values():
                if torch.is_tensor(getattr(leaf, "data", None)):
                    self._keys[id(leaf.data)] = leaf.key

    def __contains__(self, tensor: Any) -> bool:
        return id(tensor) in self._keys

    def piece(self, state: str, of: torch.Tensor, tensor: torch.Tensor, start: int, *, sharded: bool) -> _Piece:
        """Describe the state of a parameter or buffer.

        Args:
            state: weight, param, exp_avg or exp_avg_sq.
            of: the parameter or buffer.
            tensor: its state, the elements from `start` on of the flattened parameter.
            start: first element.
            sharded: whether the data-parallel ranks share the elements out, instead of holding all of them each.
        """
        expert = id(of) in self._expert_rows
        first, rows, total = 0, 1, 1
        if expert:
            (first, rows), total = self._expert_rows[id(of)], self._total
        elif id(of) in self._routers:
            rows = total = of.shape[0]
        tensor_group = self._groups.expt_tp if expert else self._groups.tp
        data_group = self._groups.expt_dp if expert else self._groups.dp_cp
        split = bool(getattr(of, "tensor_model_parallel", False))
        speaks = (split or tensor_group.rank() == 0) and (sharded or data_group.rank() == 0)
        if getattr(of, "shared", False):
            # The output's copy of a tied embedding, on the last pipeline stage.
            speaks = False
        return _Piece(
            entry=_Entry(f"{state}/{self._keys[id(of)]}", total, tensor_group.size() if split else 1, not sharded),
            first=first,
            shard=tensor_group.rank() if split else 0,
            part=Part(tensor, start, max(1, of.numel() // rows), rows),
            speaks=speaks,
        )


def _pieces(chunks: list[GPTModel], optimizer: Any, layout: Layout) -> Iterator[_Piece]:
    """Everything this rank holds of weights, persistent buffers, masters and moments."""
    slots = _Slots(chunks, layout)
    for chunk in chunks:
        for tensor in chunk.state_dict(keep_vars=True).values():
            if tensor in slots:
                yield slots.piece("weight", tensor, tensor, 0, sharded=False)
    for view in optimizer_views(optimizer) if optimizer is not None else ():
        for name, tensor in view.tensors.items():
            yield slots.piece(name, view.param, tensor, view.start, sharded=view.sharded)


def take_fingerprints(
    chunks: list[GPTModel], optimizer: Any, layout: Layout, *, error: type[CoppiceError] = CheckpointError
) -> Fingerprints:
    """Fingerprints of weights, buffers, masters and moments, equal on all ranks; collective.

    Args:
        chunks: bare model chunks.
        optimizer: their optimizer; None for weights and buffers alone.
        layout: the layout of both.
        error: what to raise where replicas disagree.

    Returns:
        `weight/<key>`, `param/<key>` (fp32 masters), `exp_avg/<key>`, `exp_avg_sq/<key>` -> numbers, one per expert where
        the tensor runs over experts.

    Raises:
        CoppiceError: of the given kind, on all ranks, if ranks that hold the same part of a tensor do not hold the same
            bits, naming the first such tensor and two ranks. What the data-parallel ranks share out has no replicas.
    """
    pieces = list(_pieces(chunks, optimizer, layout))
    told = layout.gather_objects(sorted({piece.entry for piece in pieces}))
    entries = sorted({entry for theirs in told for entry in theirs})
    at = _offsets([entry.rows for entry in entries])
    totals = torch.zeros(at[-1], dtype=torch.int64, device=layout.device)
    copies_at = _offsets([entry.rows * entry.shards if entry.replicated else 0 for entry in entries])
    # The largest value of each number and the largest of its complement, which gives the smallest, in one collective.
    copies = torch.full((2, copies_at[-1]), _ABSENT, dtype=torch.int64, device=layout.device)
    index = {entry: i for i, entry in enumerate(entries)}
    # An fp32 weight is its own master: read it once.
    parts = {id(piece.part.tensor): piece.part for piece in pieces}
    found = dict(zip(parts, sums_of(list(parts.values())), strict=True))
    for piece in pieces:
        entry, number = piece.entry, index[piece.entry]
        sums = found[id(piece.part.tensor)].to(layout.device)
        if piece.speaks:
            totals[at[number] + piece.first :][: len(sums)] += sums
        if entry.replicated:
            here = copies[:, copies_at[number] + piece.shard * entry.rows + piece.first :][:, : len(sums)]
            torch.maximum(here, torch.stack((sums, ~sums)), out=here)
    _check_replicas(copies, entries, copies_at, layout, error)
    layout.sum_over_world(totals)
    numbers = totals.tolist()
    return {entry.name: numbers[begin:end] for entry, begin, end in zip(entries, at, at[1:], strict=False)}


def _offsets(sizes: list[int]) -> list[int]:
    """Where consecutive stretches begin, and the end of the last."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


def _check_replicas(
    copies: torch.Tensor, entries: list[_Entry], at: list[int], layout: Layout, error: type[CoppiceError]
) -> None:
    """Raise on all ranks if ranks disagree on a number; collective.

    Args:
        copies: the numbers of this rank and their complements, `_ABSENT` where it holds nothing, [2, total] int64.
        entries: the tensors.
        at: where the numbers of each entry begin, shard by shard.
        layout: parallel layout.
        error: what to raise.
    """
    world = layout.max_over_world(copies.clone())
    differ = (world[0] != ~world[1]) & (world != _ABSENT).any(dim=0)
    if not bool(differ.any()):
        return
    place = int(differ.nonzero()[0])
    found = layout.gather_objects((*copies[:, place].tolist(), _coordinates(layout)))
    # A rank whose own two copies differ shows it in the second number.
    holders = [(who, (high, low)) for high, low, who in found if (high, low) != (_ABSENT, _ABSENT)]
    common = Counter(value for _, value in holders).most_common(1)[0][0]
    others = [who for who, value in holders if value != common] or [holders[0][0]]
    usual = next(who for who, value in holders if value == common)
    number = max(i for i in range(len(entries)) if at[i] <= place)
    entry = entries[number]
    what = f"expert {(place - at[number]) % entry.rows} of {entry.name}" if entry.rows > 1 else entry.name
    raise error(
        f"replicas disagree: {what} has other bits on {others[0]} than on {usual}: resume from the last checkpoint; if it "
        "happens again, the memory or the network of one of these ranks is at fault"
    )


def _coordinates(layout: Layout) -> str:
    groups = layout.groups
    return (
        f"rank {layout.rank} (data {groups.dp.rank()}, tensor {groups.tp.rank()}, context {groups.cp.rank()}, pipeline "
        f"{groups.pp.rank()}, expert {groups.ep.rank()})"
    )


def first_difference(expected: Fingerprints, found: Fingerprints) -> str | None:
    """The first name whose numbers differ or that only one side has; None if all agree."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return name
    return None
