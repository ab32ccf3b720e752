"""Who sends what to whom when a training state moves from one layout to another: the pure half of the live switch.

Every rank publishes what it holds now and what it will hold, as boxes of logical tensors (`parallel/regions.py`). For each
tensor the planner walks through what every receiver needs, takes what lies on the receiver already, fetches each remaining
element exactly once however many replicas are made of it, and spreads the fetches over the ranks that hold the element.
An expansion enters as a map of rows: new row -> old row of the tensors that run over experts; everything else keeps its
place. So one planner serves growth in experts, a change of expert-parallel or tensor-parallel size, and both together.

The plan is data. `plan_rank` gives one rank its copies, receives and sends from the tensors that this rank touches;
`traffic` adds up the bytes between all ranks, on a laptop if need be; the executor is in `parallel/reshard.py`.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.errors import ExpansionError
from parallel.regions import Box, intersect, shift, subtract


class Holding(NamedTuple):
    """What one rank holds of one logical tensor: bytes per element and disjoint boxes."""

    itemsize: int
    boxes: tuple[Box, ...]


# key of a logical tensor -> what a rank holds of it
Holdings = Mapping[str, Holding]
# key -> old row of each new row along the first axis; None where rows keep their place
Rows = Callable[[str], Sequence[int] | None]
# Steps of the redistribution, in order; each is finished on a rank before its next begins.
Wave = tuple[int, ...]


class Copy(NamedTuple):
    """A block of the old tensor and the place of the same shape in the new one."""

    source: Box
    target: Box


@dataclass
class Fetch:
    """A block of an old tensor that travels between two ranks, and what the receiver makes of it."""

    key: str
    itemsize: int
    source: Box
    targets: list[Copy] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.source.numel * self.itemsize


@dataclass
class KeyPlan:
    """What one receiver does for one tensor: copies out of its own memory, and fetches by sending rank."""

    local: list[Copy] = field(default_factory=list)
    fetches: dict[int, list[Fetch]] = field(default_factory=dict)


@dataclass
class WavePlan:
    """What one rank does in one wave. Both ends of a pair list their fetches in the same order."""

    local: list[tuple[str, Copy]] = field(default_factory=list)
    receives: dict[int, list[Fetch]] = field(default_factory=dict)
    sends: dict[int, list[Fetch]] = field(default_factory=dict)


@dataclass
class RankPlan:
    """What one rank does, wave by wave."""

    rank: int
    waves: dict[Wave, WavePlan]

    def received_bytes(self) -> dict[int, int]:
        """Bytes from each peer."""
        total: dict[int, int] = {}
        for wave in self.waves.values():
            for peer, fetches in wave.receives.items():
                total[peer] = total.get(peer, 0) + sum(f.nbytes for f in fetches)
        return total

    def sent_bytes(self) -> int:
        """Bytes to all peers."""
        return sum(f.nbytes for w in self.waves.values() for fetches in w.sends.values() for f in fetches)

    def copied_elements(self) -> int:
        """Elements copied within this rank."""
        return sum(copy.source.numel for w in self.waves.values() for _, copy in w.local)

    def max_peers(self) -> int:
        """Most peers that this rank exchanges with in one wave, in either direction."""
        return max((max(len(w.receives), len(w.sends)) for w in self.waves.values()), default=0)


class _Index:
    """The distinct boxes of one old tensor with the ranks that hold them, found by their rows."""

    def __init__(self, held: Mapping[int, Holding]) -> None:
        holders: dict[Box, list[int]] = {}
        for rank in sorted(held):
            for box in held[rank].boxes:
                holders.setdefault(box, []).append(rank)
        self.entries = sorted(holders.items())
        self._starts = [_first_row(box) for box, _ in self.entries]
        self._tallest = max((_rows(box) for box, _ in self.entries), default=0)

    def touching(self, box: Box) -> Iterator[tuple[Box, list[int]]]:
        """Boxes that may meet `box`."""
        low = bisect.bisect_right(self._starts, _first_row(box) - self._tallest)
        high = bisect.bisect_left(self._starts, _first_row(box) + _rows(box))
        for position in range(low, high):
            yield self.entries[position]


def _first_row(box: Box) -> int:
    return box.offset[0] if box.offset else 0


def _rows(box: Box) -> int:
    return box.shape[0] if box.shape else 1


def map_rows(box: Box, rows: Sequence[int] | None) -> Iterator[Copy]:
    """Split a box of the new tensor into blocks that are blocks of the old one as well."""
    if rows is None:
        yield Copy(box, box)
        return
    first, count = box.offset[0], box.shape[0]
    start = 0
    for i in range(1, count + 1):
        if i == count or rows[first + i] != rows[first + i - 1] + 1:
            shape = (i - start, *box.shape[1:])
            source = Box((rows[first + start], *box.offset[1:]), shape)
            yield Copy(source, Box((first + start, *box.offset[1:]), shape))
            start = i


def plan_key(
    key: str, old: Mapping[int, Holding], new: Mapping[int, Holding], rows: Sequence[int] | None, ranks_per_node: int
) -> dict[int, KeyPlan]:
    """Plan one logical tensor for every rank that needs some of it.

    Args:
        key: its name, for messages.
        old: what each rank holds of it.
        new: what each rank shall hold.
        rows: old row of each new row along the first axis; None where rows keep their place.
        ranks_per_node: a holder on the receiver's own node is preferred.

    Returns:
        Receiver -> its copies and fetches.

    Raises:
        ExpansionError: if nobody holds what a rank needs.
    """
    index = _Index(old)
    plans: dict[int, KeyPlan] = {}
    for rank, holding in new.items():
        plan = plans[rank] = KeyPlan()
        own = old[rank].boxes if rank in old else ()
        fetched: list[Fetch] = []
        for box in holding.boxes:
            for need in map_rows(box, rows):
                left = [need.source]
                for mine in own:
                    left = _satisfy(left, mine, need, plan.local)
                for fetch in fetched:
                    left = _satisfy(left, fetch.source, need, fetch.targets)
                for block in left:
                    fetched += _fetch(key, holding.itemsize, block, need, rank, index, ranks_per_node, plan)
    return plans


def _satisfy(wanted: list[Box], available: Box, need: Copy, into: list[Copy]) -> list[Box]:
    """Take out of `wanted` what `available` holds, note the copies, and return the rest."""
    left: list[Box] = []
    for block in wanted:
        common = intersect(block, available)
        if common is None:
            left.append(block)
        else:
            into.append(Copy(common, shift(common, need.source, need.target)))
            left += subtract(block, common)
    return left


def _fetch(
    key: str,
    itemsize: int,
    block: Box,
    need: Copy,
    rank: int,
    index: _Index,
    ranks_per_node: int,
    plan: KeyPlan,
) -> list[Fetch]:
    """Find holders for a block that is not on the receiver."""
    made, left = [], [block]
    for box, holders in index.touching(block):
        if not left:
            break
        rest: list[Box] = []
        for wanted in left:
            common = intersect(wanted, box)
            if common is None:
                rest.append(wanted)
                continue
            fetch = Fetch(key, itemsize, common, [Copy(common, shift(common, need.source, need.target))])
            near = [r for r in holders if r // ranks_per_node == rank // ranks_per_node] or holders
            plan.fetches.setdefault(near[rank % len(near)], []).append(fetch)
            made.append(fetch)
            rest += subtract(wanted, common)
        left = rest
    if left:
        raise ExpansionError(
            f"rank {rank} needs {key} at {left[0].offset} (extent {left[0].shape}) and no rank holds it: the two stages "
            "are not of one model"
        )
    return made


def _by_key(holdings: Mapping[int, Holdings], keys: Iterable[str]) -> dict[str, dict[int, Holding]]:
    wanted = set(keys)
    found: dict[str, dict[int, Holding]] = {key: {} for key in wanted}
    for rank, held in holdings.items():
        for key in held.keys() & wanted:
            found[key][rank] = held[key]
    return found


def plan_rank(
    rank: int,
    old: Mapping[int, Holdings],
    new: Mapping[int, Holdings],
    rows: Rows,
    wave_of: Callable[[str], Wave],
    ranks_per_node: int = 8,
) -> RankPlan:
    """The part of one rank, from what all ranks hold and shall hold.

    Args:
        rank: whose part.
        old: rank -> what it holds now.
        new: rank -> what it shall hold.
        rows: row map of each tensor (see `Rows`).
        wave_of: in which wave a tensor moves; the same on all ranks.
        ranks_per_node: for choosing near holders.

    Raises:
        ExpansionError: if nobody holds what a rank needs.
    """
    keys = sorted(old.get(rank, {}).keys() | new.get(rank, {}).keys(), key=lambda k: (wave_of(k), k))
    olds, news = _by_key(old, keys), _by_key(new, keys)
    waves: dict[Wave, WavePlan] = {}
    for key in keys:
        wave = waves.setdefault(wave_of(key), WavePlan())
        for receiver, plan in plan_key(key, olds[key], news[key], rows(key), ranks_per_node).items():
            if receiver == rank:
                wave.local += [(key, copy) for copy in plan.local]
                for peer, fetches in plan.fetches.items():
                    wave.receives.setdefault(peer, []).extend(fetches)
            elif rank in plan.fetches:
                wave.sends.setdefault(receiver, []).extend(plan.fetches[rank])
    for wave in waves.values():
        for side in (wave.receives, wave.sends):
            for fetches in side.values():
                # Larger elements first keep every element of a message aligned.
                fetches.sort(key=lambda f: -f.itemsize)
    return RankPlan(rank, waves)


def traffic(
    old: Mapping[int, Holdings], new: Mapping[int, Holdings], rows: Rows, ranks_per_node: int = 8
) -> dict[tuple[int, int], int]:
    """Bytes between every pair (sender, receiver) of ranks, for a cluster that need not exist."""
    keys = sorted({key for held in new.values() for key in held})
    olds, news = _by_key(old, keys), _by_key(new, keys)
    total: dict[tuple[int, int], int] = {}
    for key in keys:
        for receiver, plan in plan_key(key, olds[key], news[key], rows(key), ranks_per_node).items():
            for sender, fetches in plan.fetches.items():
                pair = (sender, receiver)
                total[pair] = total.get(pair, 0) + sum(f.nbytes for f in fetches)
    return total


def least_bytes(old: Mapping[int, Holdings], new: Mapping[int, Holdings], rows: Rows) -> int:
    """Fewest bytes that any plan can move: what each rank needs, counted once, less what it holds already."""
    total = 0
    for rank, held in new.items():
        mine = old.get(rank, {})
        for key, holding in held.items():
            known: list[Box] = list(mine[key].boxes) if key in mine else []
            for box in holding.boxes:
                for need in map_rows(box, rows(key)):
                    left = [need.source]
                    for have in known:
                        left = [rest for block in left for rest in subtract(block, have)]
                    total += holding.itemsize * sum(block.numel for block in left)
                    known += left
    return total
