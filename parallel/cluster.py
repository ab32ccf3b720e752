"""What every rank of a cluster would hold, by arithmetic alone: for predictions, simulations and tests.

Follows mcore's folding of ranks (`parallel/config.py`) and, for optimizer state, its ZeRO-1 division: the parameters of a
rank in reverse order, each padded to a multiple of 64 elements, cut into one equal range per data rank. The running job
never uses this; it describes its real tensors (`model/holdings.py`), and a test holds the two against each other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.config import ParallelConfig
from parallel.regions import Box, flat_boxes
from parallel.reshard_plan import Holding

# Bytes per element of a master or a moment.
STATE_BYTES = 4
STATES = ("param", "exp_avg", "exp_avg_sq")


class Coordinates(NamedTuple):
    """Position of a rank along every parallel dimension."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


def coordinates(rank: int, config: ParallelConfig, world_size: int) -> Coordinates:
    """Where a rank stands; mcore's order is tensor, context, (expert,) data, pipeline, the first fastest."""
    dense, experts = config.data(world_size), config.expert_data(world_size)
    left, tensor = divmod(rank, config.tensor)
    left, context = divmod(left, config.context)
    pipeline, data = divmod(left, dense)
    left, expert_tensor = divmod(rank, config.expert_tensor)
    left, expert = divmod(left, config.expert)
    _, expert_data = divmod(left, experts)
    return Coordinates(tensor, context, data, pipeline, expert_tensor, expert, expert_data)


@dataclass(frozen=True)
class LogicalTensor:
    """A parameter of the whole network.

    Attributes:
        key: its name.
        shape: whole shape; routed experts run along the first axis.
        itemsize: bytes per element of the weight.
        stage: pipeline stage that holds it.
        expert: whether it belongs to routed experts.
        split: axis that tensor (or expert-tensor) parallelism divides; None for a copy on every rank.
        halves: 2 where gate and up are stacked along the split axis and divided each for itself.
        separate: whether every expert is a parameter of its own, as Transformer Engine and mcore's SequentialMLP have it.
    """

    key: str
    shape: tuple[int, ...]
    itemsize: int
    stage: int = 0
    expert: bool = False
    split: int | None = None
    halves: int = 1
    separate: bool = False


class _Piece(NamedTuple):
    """A block of a rank's local parameter and where it lies in the logical tensor."""

    box: Box
    strides: tuple[int, ...]
    first: int


def _parameters(
    tensor: LogicalTensor, at: Coordinates, config: ParallelConfig
) -> Iterator[tuple[LogicalTensor, int, list[_Piece]]]:
    """The parameters that a rank has of a tensor, with their elements and blocks."""
    offset, shape = [0] * len(tensor.shape), list(tensor.shape)
    if tensor.expert:
        shape[0] //= config.expert
        offset[0] = at.expert * shape[0]
    rows = 1 if tensor.separate else shape[0]
    for first in range(0, shape[0], rows):
        yield tensor, *_pieces(tensor, [offset[0] + first, *offset[1:]], [rows, *shape[1:]], at, config)


def _pieces(
    tensor: LogicalTensor, offset: list[int], shape: list[int], at: Coordinates, config: ParallelConfig
) -> tuple[int, list[_Piece]]:
    """Local elements of a parameter, and its blocks; where it lies and its extent before tensor parallelism."""
    size, index = (config.expert_tensor, at.expert_tensor) if tensor.expert else (config.tensor, at.tensor)
    if tensor.split is None or (size == 1 and tensor.halves == 1):
        return math.prod(shape), [_Piece(Box(tuple(offset), tuple(shape)), _strides(shape), 0)]
    axis = tensor.split
    part = shape[axis] // tensor.halves
    local = [*shape[:axis], shape[axis] // size, *shape[axis + 1 :]]
    strides = _strides(local)
    pieces = []
    for half in range(tensor.halves):
        begin = [*offset[:axis], half * part + index * (part // size), *offset[axis + 1 :]]
        extent = [*shape[:axis], part // size, *shape[axis + 1 :]]
        pieces.append(_Piece(Box(tuple(begin), tuple(extent)), strides, half * (part // size) * strides[axis]))
    return math.prod(local), pieces


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def round_up(number: int, multiple: int) -> int:
    """The next multiple, or the number itself if it is one."""
    return -(-number // multiple) * multiple


def zero1_range(sizes: Sequence[int], ranks: int, index: int) -> Iterator[tuple[int, int, int]]:
    """The flat ranges of one data rank in mcore's distributed optimizer with one bucket.

    Args:
        sizes: elements of each parameter, in the order of the module.
        ranks: data ranks that share the state.
        index: which one.

    Yields:
        (parameter, first element, element after the last) for every parameter that the rank owns a part of.
    """
    starts, position = [0] * len(sizes), 0
    for i in reversed(range(len(sizes))):
        starts[i] = round_up(position, 64)
        position = starts[i] + sizes[i]
    share = round_up(position, math.lcm(ranks, 128)) // ranks
    low, high = index * share, (index + 1) * share
    for i, size in enumerate(sizes):
        first, last = max(low, starts[i]), min(high, starts[i] + size)
        if first < last:
            yield i, first - starts[i], last - starts[i]


def describe_rank(
    rank: int, world_size: int, config: ParallelConfig, tensors: Sequence[LogicalTensor], *, distributed: bool = True
) -> dict[str, Holding]:
    """What one rank holds of weights, masters and moments.

    Args:
        rank: whose.
        world_size: number of ranks.
        config: parallel sizes.
        tensors: parameters of the network in the order of its modules.
        distributed: whether masters and moments are divided over data ranks (ZeRO-1).
    """
    at = coordinates(rank, config, world_size)
    held: dict[str, Holding] = {}
    data_ranks, expert_ranks = config.data(world_size) * config.context, config.expert_data(world_size)
    # Where experts are reduced over the same ranks as the rest, they share its buffers (`model/build.py`).
    shared = config.expert == 1 and data_ranks == expert_ranks
    families = [(False, True)] if shared else [(False,), (True,)]
    for kinds in families:
        mine = [t for t in tensors if t.expert in kinds and t.stage == at.pipeline]
        local = [parameter for t in mine for parameter in _parameters(t, at, config)]
        for tensor, _, pieces in local:
            _hold(held, f"weight/{tensor.key}", tensor.itemsize, [p.box for p in pieces])
        sizes = [numel for _, numel, _ in local]
        ranks = data_ranks if False in kinds else expert_ranks
        index = at.data * config.context + at.context if False in kinds else at.expert_data
        owned = zero1_range(sizes, ranks, index) if distributed else ((i, 0, n) for i, n in enumerate(sizes))
        for i, start, stop in owned:
            boxes = [box for piece in local[i][2] for box in _owned_boxes(piece, start, stop)]
            for state in STATES:
                _hold(held, f"{state}/{local[i][0].key}", STATE_BYTES, boxes)
    return held


def _hold(held: dict[str, Holding], key: str, itemsize: int, boxes: list[Box]) -> None:
    """Add boxes to what is held of a tensor."""
    known = held[key].boxes if key in held else ()
    held[key] = Holding(itemsize, (*known, *boxes))


def _owned_boxes(piece: _Piece, start: int, stop: int) -> Iterator[Box]:
    for box in flat_boxes(piece.box.shape, piece.strides, piece.first, start, stop):
        yield Box(tuple(a + b for a, b in zip(piece.box.offset, box.offset, strict=True)), box.shape)
