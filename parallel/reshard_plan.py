"""Who sends what to whom when a training state moves from one layout to another: the pure half of the live switch.

Every rank publishes what it holds now and what it will hold, as boxes of logical tensors (`parallel/regions.py`). For each
tensor the planner walks through what every receiver needs, takes what lies on the receiver already, fetches each remaining
element exactly once however many replicas are made of it, and spreads the fetches over the ranks that hold the element.
An expansion enters as a map of rows: new row -> old row of the tensors that run over experts; everything else keeps its
place. So one planner serves growth in experts, a change of expert-parallel or tensor-parallel size, and both together.

The plan is data. `plan_rank` gives one rank its copies, receives and sends from the tensors that this rank touches;
`traffic` adds up the bytes between all ranks, on a laptop if need be; the executor is in `parallel/reshard.py`.

The whole job waits while its ranks plan. A cluster has many ranks, but few different holdings of a tensor: receivers that
hold and need the same are planned once, a rank looks only at those that may need what it holds, and boxes are found by
their rows. What a rank works through then grows with what it holds and exchanges, hardly with the number of ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.errors import ExpansionError
from parallel.regions import Box, ByRows, intersect, rows_of, shift, subtract


class Holding(NamedTuple):
    """What one rank holds of one logical tensor: bytes per element and disjoint boxes."""

    itemsize: int
    boxes: tuple[Box, ...]


# key of a logical tensor -> what a rank holds of it
Holdings = Mapping[str, Holding]
# Holdings with the ranks that have them; a rank may be in several parts, which have no key in common then.
Parts = Sequence[tuple[Holdings, Sequence[int]]]
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


class _Holders:
    """The ranks that hold a box of an old tensor."""

    def __init__(self, ranks: Iterable[int], ranks_per_node: int) -> None:
        self._ranks, self._per_node = sorted(ranks), ranks_per_node
        self._on_node: dict[int, list[int]] = {}
        for rank in self._ranks:
            self._on_node.setdefault(rank // ranks_per_node, []).append(rank)

    def sender_to(self, rank: int) -> int:
        """The one that a receiver fetches the box from: on its own node if there is any; holders take turns."""
        near = self._on_node.get(rank // self._per_node, self._ranks)
        return near[rank % len(near)]


@dataclass
class _Pattern:
    """What all receivers do that hold and need the same of a tensor; only who sends to them differs."""

    local: list[Copy] = field(default_factory=list)
    fetches: list[tuple[Fetch, _Holders]] = field(default_factory=list)

    def plan_for(self, rank: int) -> KeyPlan:
        """What one of them does."""
        plan = KeyPlan(list(self.local))
        for fetch, holders in self.fetches:
            plan.fetches.setdefault(holders.sender_to(rank), []).append(fetch)
        return plan


# What is held of a tensor -> the ranks that hold just that.
_Alike = Mapping[Holding, Sequence[int]]


class _Planner:
    """Plans one logical tensor.

    Args:
        key: its name, for messages.
        old: what ranks hold of it.
        new: what ranks shall hold.
        rows: old row of each new row along the first axis; None where rows keep their place.
        ranks_per_node: a holder on the receiver's own node is preferred.
    """

    def __init__(self, key: str, old: _Alike, new: _Alike, rows: Sequence[int] | None, ranks_per_node: int) -> None:
        self._key, self._old, self._new, self._rows, self._per_node = key, old, new, rows, ranks_per_node
        self._number_of: dict[int, int] | None = None
        self._index: tuple[ByRows, list[list[int]]] | None = None
        self._holders: dict[int, _Holders] = {}

    def plan(self, of: int | None = None) -> Iterator[tuple[int, KeyPlan]]:
        """Receivers and what they do: of all, or of one rank and of those that fetch anything and may do so from it.

        Raises:
            ExpansionError: if nobody holds what a rank needs.
        """
        offered: Sequence[Box] = ()
        if of is not None:
            offered = next((holding.boxes for holding, ranks in self._old.items() if of in ranks), ())
        offered_rows = {row for box in offered for row in rows_of(box)} if self._rows else set()
        for wanted, ranks in self._new.items():
            own = of in ranks
            if of is not None and not own and not self._may_need(wanted, offered, offered_rows):
                continue
            needs = [need for box in wanted.boxes for need in map_rows(box, self._rows)]
            for boxes, receivers in self._alike(ranks):
                pattern = self._pattern(needs, wanted.itemsize, boxes, receivers[0])
                if of is not None and not pattern.fetches:
                    receivers = [of] if own and of in receivers else []
                for rank in receivers:
                    yield rank, pattern.plan_for(rank)

    def _may_need(self, wanted: Holding, offered: Sequence[Box], offered_rows: set[int]) -> bool:
        """Whether a receiver may need anything of what a rank holds."""
        if self._rows is None:
            return any(intersect(box, have) for box in wanted.boxes for have in offered)
        return any(self._rows[row] in offered_rows for box in wanted.boxes for row in rows_of(box))

    def _alike(self, ranks: Sequence[int]) -> Iterator[tuple[Sequence[Box], Sequence[int]]]:
        """Some ranks by what they hold."""
        olds = list(self._old.items())
        if len(olds) == 1 and olds[0][1] == ranks:
            yield olds[0][0].boxes, ranks
            return
        if self._number_of is None:
            self._number_of = {rank: number for number, (_, holders) in enumerate(olds) for rank in holders}
        alike: dict[int, list[int]] = {}
        for rank in ranks:
            alike.setdefault(self._number_of.get(rank, -1), []).append(rank)
        for number, same in alike.items():
            yield olds[number][0].boxes if number >= 0 else (), same

    def _pattern(self, needs: Sequence[Copy], itemsize: int, own: Sequence[Box], rank: int) -> _Pattern:
        """Plan the needs of a receiver: `rank`, or any other that holds the same boxes."""
        pattern, mine, fetched = _Pattern(), ByRows(own), ByRows()
        for need in needs:
            left = [need.source]
            for position in mine.near(need.source):
                left = _satisfy(left, mine.boxes[position], need, pattern.local)
            for position in fetched.near(need.source) if left else ():
                left = _satisfy(left, fetched.boxes[position], need, pattern.fetches[position][0].targets)
            for block in left:
                for common, holders in self._find(block, rank):
                    copy = Copy(common, shift(common, need.source, need.target))
                    pattern.fetches.append((Fetch(self._key, itemsize, common, [copy]), holders))
                    fetched.add(common)
        return pattern

    def _find(self, block: Box, rank: int) -> list[tuple[Box, _Holders]]:
        """Holders for a block that is not on the receiver."""
        if self._index is None:
            ranks: dict[Box, list[int]] = {}
            for holding, holders in self._old.items():
                for box in holding.boxes:
                    ranks.setdefault(box, []).extend(holders)
            boxes = sorted(ranks)
            self._index = ByRows(boxes), [ranks[box] for box in boxes]
        index, ranks_of = self._index
        found, left = [], [block]
        for position in index.near(block):
            if not left:
                break
            rest: list[Box] = []
            for wanted in left:
                common = intersect(wanted, index.boxes[position])
                if common is None:
                    rest.append(wanted)
                    continue
                if position not in self._holders:
                    self._holders[position] = _Holders(ranks_of[position], self._per_node)
                found.append((common, self._holders[position]))
                rest += subtract(wanted, common)
            left = rest
        if left:
            raise ExpansionError(
                f"rank {rank} needs {self._key} at {left[0].offset} (extent {left[0].shape}) and no rank holds it: the two "
                "stages are not of one model"
            )
        return found


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
    olds, news = (
        _by_key(parts_of({rank: {key: holding} for rank, holding in held.items()}), [key])[key] for held in (old, new)
    )
    return dict(_Planner(key, olds, news, rows, ranks_per_node).plan())


def parts_of(holdings: Mapping[int, Holdings]) -> Parts:
    """One part per rank."""
    return [(held, (rank,)) for rank, held in holdings.items()]


def _by_key(parts: Parts, keys: Iterable[str]) -> dict[str, dict[Holding, list[int]]]:
    wanted = set(keys)
    found: dict[str, dict[Holding, list[int]]] = {key: {} for key in wanted}
    for held, ranks in parts:
        for key in held.keys() & wanted:
            found[key].setdefault(held[key], []).extend(ranks)
    return found


def plan_rank(
    rank: int,
    old: Mapping[int, Holdings] | Parts,
    new: Mapping[int, Holdings] | Parts,
    rows: Rows,
    wave_of: Callable[[str], Wave],
    ranks_per_node: int = 8,
) -> RankPlan:
    """The part of one rank, from what all ranks hold and shall hold.

    Args:
        rank: whose part.
        old: rank -> what it holds now; or the same in parts.
        new: rank -> what it shall hold; or the same in parts.
        rows: row map of each tensor (see `Rows`).
        wave_of: in which wave a tensor moves; the same on all ranks.
        ranks_per_node: for choosing near holders.

    Raises:
        ExpansionError: if nobody holds what a rank needs.
    """
    before, after = (parts_of(side) if isinstance(side, Mapping) else side for side in (old, new))
    mine = {key for held, ranks in (*before, *after) if rank in ranks for key in held}
    keys = sorted(mine, key=lambda k: (wave_of(k), k))
    olds, news = _by_key(before, keys), _by_key(after, keys)
    waves: dict[Wave, WavePlan] = {}
    for key in keys:
        wave = waves.setdefault(wave_of(key), WavePlan())
        for receiver, plan in _Planner(key, olds[key], news[key], rows(key), ranks_per_node).plan(rank):
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
    olds, news = _by_key(parts_of(old), keys), _by_key(parts_of(new), keys)
    total: dict[tuple[int, int], int] = {}
    for key in keys:
        for receiver, plan in _Planner(key, olds[key], news[key], rows(key), ranks_per_node).plan():
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
            known = ByRows(mine[key].boxes if key in mine else ())
            for box in holding.boxes:
                for need in map_rows(box, rows(key)):
                    left = [need.source]
                    for position in known.near(need.source):
                        left = [rest for block in left for rest in subtract(block, known.boxes[position])]
                    total += holding.itemsize * sum(block.numel for block in left)
                    for block in left:
                        known.add(block)
    return total
