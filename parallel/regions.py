"""Boxes in the index space of a logical tensor, and the boxes that a rank's memory covers.

Everything a rank holds of a training state (a weight, one expert of a stack, a tensor-parallel slice, a flat ZeRO-1 range
of a master or a moment) is a list of boxes of *logical* tensors. Two layouts of the same tensor then meet in intersections
of boxes, which is all that the planner (`parallel/reshard_plan.py`) needs. Pure Python: no tensors, no processes.

    flat_boxes((4, 3), (3, 1), 0, 2, 8)   # elements 2..7 of a [4, 3] matrix: three boxes
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A block of a logical tensor: first index and extent along every axis."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    def holds(self, other: "Box") -> bool:
        """Whether another box lies inside this one."""
        return all(
            a <= b and b + m <= a + n
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )


def intersect(a: Box, b: Box) -> Box | None:
    """The common block of two boxes; None if there is none."""
    if a == b:
        return a
    offset, shape = [], []
    for i, n, j, m in zip(*a, *b, strict=True):
        first = i if i > j else j
        count = (i + n if i + n < j + m else j + m) - first
        if count <= 0:
            return None
        offset.append(first)
        shape.append(count)
    return Box(tuple(offset), tuple(shape))


def subtract(a: Box, b: Box) -> list[Box]:
    """What is left of `a` without `b`, as disjoint boxes."""
    common = intersect(a, b)
    if common is None:
        return [a]
    left = []
    offset, shape = list(a.offset), list(a.shape)
    for axis in range(len(shape)):
        first, count = common.offset[axis], common.shape[axis]
        before, after = first - offset[axis], offset[axis] + shape[axis] - first - count
        if before:
            left.append(Box(tuple(offset), (*shape[:axis], before, *shape[axis + 1 :])))
        if after:
            start = (*offset[:axis], first + count, *offset[axis + 1 :])
            left.append(Box(start, (*shape[:axis], after, *shape[axis + 1 :])))
        offset[axis], shape[axis] = first, count
    return left


def first_element(shape: Sequence[int], box: Box) -> int:
    """Position of a box's first element in the flattened tensor."""
    position = 0
    for size, offset in zip(shape, box.offset, strict=True):
        position = position * size + offset
    return position


def shift(box: Box, source: Box, target: Box) -> Box:
    """Move a box by the distance from `source` to `target`."""
    moved = tuple(o - s + t for o, s, t in zip(box.offset, source.offset, target.offset, strict=True))
    return Box(moved, box.shape)


def pieces_of(box: Box, limit: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `limit` elements, in order of its elements."""
    if box.numel <= limit:
        yield box
        return
    axis = next(i for i, n in enumerate(box.shape) if n > 1)
    rest = box.numel // box.shape[axis]
    rows = max(1, limit // rest)
    for first in range(0, box.shape[axis], rows):
        count = min(rows, box.shape[axis] - first)
        offset = (*box.offset[:axis], box.offset[axis] + first, *box.offset[axis + 1 :])
        yield from pieces_of(Box(offset, (*box.shape[:axis], count, *box.shape[axis + 1 :])), limit)


def flat_boxes(shape: Sequence[int], strides: Sequence[int], offset: int, start: int, stop: int) -> list[Box]:
    """The blocks of a strided array whose elements lie in a flat range of memory.

    Args:
        shape: extent of the array along every axis.
        strides: its strides in elements, descending as in row-major order (a slice of such an array will do).
        offset: position of its first element.
        start: first position of the range.
        stop: position after the last.

    Returns:
        Disjoint boxes relative to the array, in order of memory; at most about twice as many as there are axes.
    """
    return list(_flat_boxes(tuple(shape), tuple(strides), offset, start, stop))


def _flat_boxes(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, start: int, stop: int) -> Iterator[Box]:
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset >= stop or offset + span <= start or 0 in shape:
        return
    if start <= offset and offset + span <= stop:
        yield Box((0,) * len(shape), shape)
        return
    count, stride, inner = shape[0], strides[0], shape[1:]
    if count == 1:
        for box in _flat_boxes(inner, strides[1:], offset, start, stop):
            yield Box((0, *box.offset), (1, *box.shape))
        return
    row_span = span - (count - 1) * stride
    # Rows that touch the range, and among them the run of those that lie in it whole.
    first = max(0, (start - offset - row_span) // stride + 1)
    last = min(count - 1, (stop - 1 - offset) // stride)
    whole_first = max(first, -(-(start - offset) // stride))
    whole_last = min(last, (stop - offset - row_span) // stride)
    row = first
    while row <= last:
        if whole_first <= row <= whole_last:
            yield Box((row,) + (0,) * len(inner), (whole_last - row + 1, *inner))
            row = whole_last + 1
            continue
        for box in _flat_boxes(inner, strides[1:], offset + row * stride, start, stop):
            yield Box((row, *box.offset), (1, *box.shape))
        row += 1


class ByRows:
    """Boxes of one tensor, to be found by their rows (the first axis) without looking at all of them.

    A search is quick as long as no box is much taller than the others.
    """

    def __init__(self, boxes: Iterable[Box] = ()) -> None:
        self.boxes: list[Box] = []
        # (first row, position), ascending.
        self._starts: list[tuple[int, int]] = []
        self._tallest = 0
        for box in boxes:
            self.add(box)

    def add(self, box: Box) -> None:
        """Append a box."""
        rows = rows_of(box)
        bisect.insort(self._starts, (rows.start, len(self.boxes)))
        self._tallest = max(self._tallest, len(rows))
        self.boxes.append(box)

    def near(self, box: Box) -> list[int]:
        """Positions, ascending, of all boxes that share elements with `box`, and maybe of some that do not."""
        rows = rows_of(box)
        low = bisect.bisect_left(self._starts, (rows.start - self._tallest + 1,))
        high = bisect.bisect_left(self._starts, (rows.stop,))
        return sorted(position for _, position in self._starts[low:high])


def rows_of(box: Box) -> range:
    """The rows that a box lies in; a number without axes is one row."""
    return range(box.offset[0], box.offset[0] + box.shape[0]) if box.shape else range(1)
