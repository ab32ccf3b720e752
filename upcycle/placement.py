"""In which order the experts of the new stage stand, and so on which expert-parallel rank each of them is. Pure Python.

mcore gives every expert-parallel rank a run of M / R neighbouring ids, so a placement is an order of the parents. Rules:

    near     ascending parents: replicas stand beside their parent, a uniform expansion at unchanged R moves no expert
    spread   the copies of a family on different ranks, expected load even over ranks
    auto     fewest experts fetched from other ranks such that the busiest rank stays under a bound on its expected load

The expected load of a copy is its parent's measured load over the copies in the family. Under group-limited routing a
routing group is a block of neighbouring ids and keeps the families it has. Copies fill *cells*: what a rank and a routing
group have in common, all of a rank's slots without routing groups. `auto` searches by swaps of two copies, from `near`,
from the order that keeps most copies at home, and from `spread` where those cannot meet the bound: no proof of least
traffic, which is as hard as packing bins. Legend: E experts before, M after, R expert-parallel ranks, G routing groups.

    placed = place([2, 1, 1], rule="spread", ep_ranks=2, loads_E=[4.0, 1.0, 1.0])
    placed.parents                                            # (0, 1, 0, 2)
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from parallel.errors import ExpansionError

# Relative change of a load below which two loads count as the same: well above rounding, far below any use.
_SAME = 1e-9


@dataclass(frozen=True)
class Placed:
    """The order of one layer's experts and what it means for the ranks.

    Attributes:
        parents: parent of each new expert, [M].
        load_R: expected load of each expert-parallel rank, in the unit of the loads given.
        fetches: experts that ranks need and do not hold, a parent counted once per rank whatever copies are made of it
            there; None where homes are unknown.
        within_bound: False if `auto` found no order that keeps its bound; it is then the best that was found.
    """

    parents: tuple[int, ...]
    load_R: tuple[float, ...]
    fetches: int | None
    within_bound: bool = True


def imbalance(load_R: Sequence[float]) -> float:
    """Load of the busiest rank over the mean; 1 where all are equal or nothing is loaded."""
    total = math.fsum(load_R)
    return max(load_R) * len(load_R) / total if total else 1.0


def contiguous(experts: int, ep_ranks: int) -> list[range]:
    """The ids on each expert-parallel rank, as mcore deals them."""
    share = experts // ep_ranks
    return [range(rank * share, (rank + 1) * share) for rank in range(ep_ranks)]


class _Board:
    """Copies in cells, with the load of every rank and the experts it has to fetch."""

    def __init__(
        self,
        copies_E: Sequence[int],
        weight_E: Sequence[float],
        ep_ranks: int,
        groups: int,
        homes: Sequence[Collection[int]] | None,
    ) -> None:
        self.copies, self.weight = copies_E, weight_E
        self.homes = None if homes is None else [frozenset(home) for home in homes]
        after, width = sum(copies_E), len(copies_E) // groups
        per_rank, per_group = after // ep_ranks, after // groups
        edges = sorted({*range(0, after + 1, per_rank), *range(0, after + 1, per_group)})
        self.size = [stop - start for start, stop in itertools.pairwise(edges)]
        self.rank = [start // per_rank for start in edges[:-1]]
        self.cells_of_group: list[list[int]] = [[] for _ in range(groups)]
        self.cells_of_rank: list[list[int]] = [[] for _ in range(ep_ranks)]
        self.group = [start // per_group for start in edges[:-1]]
        for cell, (group, rank) in enumerate(zip(self.group, self.rank, strict=True)):
            self.cells_of_group[group].append(cell)
            self.cells_of_rank[rank].append(cell)
        self.per_group = per_group
        self.group_of = [expert // width for expert in range(len(copies_E))]
        # Expert -> its copies, per cell.
        self.held: list[dict[int, int]] = [{} for _ in self.size]
        self.free = list(self.size)
        self.load = [0.0] * ep_ranks

    def put(self, expert: int, cell: int) -> None:
        """Add one copy."""
        self.held[cell][expert] = self.held[cell].get(expert, 0) + 1
        self.free[cell] -= 1
        self.load[self.rank[cell]] += self.weight[expert]

    def take(self, expert: int, cell: int) -> None:
        """Remove one copy."""
        if self.held[cell][expert] == 1:
            del self.held[cell][expert]
        else:
            self.held[cell][expert] -= 1
        self.free[cell] += 1
        self.load[self.rank[cell]] -= self.weight[expert]

    def swap(self, e: int, a: int, f: int, b: int) -> None:
        """Exchange a copy of `e` in cell `a` with one of `f` in cell `b`."""
        self.take(e, a)
        self.take(f, b)
        self.put(f, a)
        self.put(e, b)

    def fair_share(self, expert: int, cell: int) -> int:
        """Most copies in a cell when a family is dealt out evenly."""
        return -(-self.copies[expert] * self.size[cell] // self.per_group)

    def away(self, expert: int, cell: int) -> bool:
        """Whether a cell's rank would have to fetch an expert."""
        return self.homes is not None and expert not in self.homes[self.rank[cell]]

    def swap_cost(self, e: int, a: int, f: int, b: int) -> int:
        """Experts more to fetch after `swap`."""
        cost = 0
        for leaving, coming, cell in ((e, f, a), (f, e, b)):
            cost -= self.held[cell][leaving] == 1 and self.away(leaving, cell)
            cost += coming not in self.held[cell] and self.away(coming, cell)
        return cost

    def fetches(self) -> int:
        """Experts that ranks have to fetch."""
        return sum(self.away(expert, cell) for cell, held in enumerate(self.held) for expert in held)

    def parents(self) -> tuple[int, ...]:
        """The order of the new experts; ascending parents within a cell, so within a rank too."""
        return tuple(e for held in self.held for e in sorted(held) for _ in range(held[e]))

    def insert(self, expert: int, may_hold: Callable[[int, int], bool]) -> bool:
        """Add a copy to the least loaded cell that may hold it, moving others on where all such cells are full.

        A breadth-first search for an augmenting path, so False means that no arrangement of the copies so far has room.
        """

        def open_to(e: int) -> Iterator[int]:
            cells = self.cells_of_group[self.group_of[e]]
            allowed = (cell for cell in cells if cell not in came_from and may_hold(e, cell))
            yield from sorted(allowed, key=lambda cell: (self.load[self.rank[cell]], cell))

        # Cell -> the cell before it on the path and the expert that would move from there.
        came_from: dict[int, tuple[int, int]] = {}
        for cell in open_to(expert):
            came_from[cell] = (-1, expert)
        queue = deque(came_from)
        while queue:
            cell = queue.popleft()
            if self.free[cell]:
                while cell >= 0:
                    before, moving = came_from[cell]
                    if before >= 0:
                        self.take(moving, before)
                    self.put(moving, cell)
                    cell = before
                return True
            for f in sorted(self.held[cell]):
                for other in open_to(f):
                    came_from[other] = (cell, f)
                    queue.append(other)
        return False


def _fill_near(board: _Board) -> None:
    """Ascending parents."""
    cell = 0
    for expert, copies in enumerate(board.copies):
        for _ in range(copies):
            while not board.free[cell]:
                cell += 1
            board.put(expert, cell)


def _fill_spread(board: _Board) -> None:
    """Heaviest copies first, each to the least loaded rank that has not its share of the family; then even out."""

    def may_hold(expert: int, cell: int) -> bool:
        return board.held[cell].get(expert, 0) < board.fair_share(expert, cell)

    for expert in sorted(range(len(board.copies)), key=lambda e: (-board.weight[e], e)):
        for _ in range(board.copies[expert]):
            # Shares rounded up always have room: copies x slots / slots of the group is a fractional solution.
            board.insert(expert, may_hold)
    _lower_peak(board, 0.0, may_hold)


def _fill_home(board: _Board) -> None:
    """As many copies as possible where their parent is already; the rest together with their siblings."""
    left: list[tuple[int, int]] = []
    for expert, copies in enumerate(board.copies):
        unplaced = sum(not board.insert(expert, lambda e, cell: not board.away(e, cell)) for _ in range(copies))
        if unplaced:
            left.append((-unplaced, expert))
    for unplaced, expert in sorted(left):
        for _ in range(-unplaced):
            cells = (cell for cell in board.cells_of_group[board.group_of[expert]] if board.free[cell])
            board.put(expert, min(cells, key=lambda c: (expert not in board.held[c], -board.free[c], c)))


def _lower_peak(board: _Board, limit: float, may_hold: Callable[[int, int], bool] | None = None) -> None:
    """Swap copies off the busiest rank until its load is within `limit`, or no swap lowers it.

    Takes the swap with the fewest additional fetches per load gained; of those that cost nothing the one that gains most.
    """
    weight, load = board.weight, board.load
    while True:
        busiest = max(range(len(load)), key=lambda r: (load[r], -r))
        peak, best = load[busiest], None
        if peak <= limit:
            return
        for a in board.cells_of_rank[busiest]:
            for b in board.cells_of_group[board.group[a]]:
                room = load[board.rank[b]]
                # Half the difference is the most that a swap can gain.
                if (peak - room) / 2 <= peak * _SAME:
                    continue
                for e in board.held[a]:
                    for f in board.held[b]:
                        shift = weight[e] - weight[f]
                        top = max(peak - shift, room + shift)
                        if top >= peak * (1 - _SAME):
                            continue
                        if may_hold and not (may_hold(e, b) and may_hold(f, a)):
                            continue
                        cost, gain = board.swap_cost(e, a, f, b), peak - max(top, limit)
                        choice = (max(cost, 0) / gain, cost, -gain, e, f, a, b)
                        best = choice if best is None else min(best, choice)
        if best is None:
            return
        e, f, a, b = best[3:]
        board.swap(e, a, f, b)


def _save_fetches(board: _Board, limit: float) -> None:
    """Swap copies back towards their homes while no rank is loaded beyond `limit`, or beyond the peak there is."""
    limit = max(limit, *board.load)
    swapped = True
    while swapped:
        swapped = False
        for a in range(len(board.size)):
            for e in sorted(board.held[a]):
                if e in board.held[a] and board.away(e, a):
                    swapped = _send_home(board, e, a, limit) or swapped


def _send_home(board: _Board, e: int, a: int, limit: float) -> bool:
    """Swap a copy of `e` out of cell `a` to where that saves fetches; False if there is no such place."""
    for b in board.cells_of_group[board.group[a]]:
        if b == a or (board.away(e, b) and e not in board.held[b]):
            continue
        for f in sorted(board.held[b]):
            shift = board.weight[e] - board.weight[f]
            after = max(board.load[board.rank[a]] - shift, board.load[board.rank[b]] + shift)
            if f != e and after <= limit and board.swap_cost(e, a, f, b) < 0:
                board.swap(e, a, f, b)
                return True
    return False


def _auto(new_board: Callable[[], _Board], limit: float) -> tuple[_Board, bool]:
    """The best order that the search finds, and whether the load of every rank is within `limit`."""
    found: list[tuple[float, int, int, _Board]] = []
    for number, fill in enumerate((_fill_near, _fill_home, _fill_spread)):
        if fill is _fill_spread and min(found)[0] <= limit:
            break
        board = new_board()
        fill(board)
        _lower_peak(board, limit)
        _save_fetches(board, limit)
        found.append((max(limit, *board.load), board.fetches(), number, board))
    peak, _, _, board = min(found)
    return board, peak <= limit


def _check(copies_E: Sequence[int], ep_ranks: int, groups: int, loads_E: Sequence[float] | None, homes: object) -> None:
    """Refuse sizes that do not go together."""
    after = sum(copies_E)
    if after % ep_ranks or after % groups or len(copies_E) % groups:
        raise ExpansionError(
            f"{len(copies_E)} -> {after} experts cannot be placed on {ep_ranks} expert-parallel ranks in {groups} routing "
            "groups: the ranks must divide the experts after, the groups both numbers"
        )
    if homes is not None and len(homes) != ep_ranks:  # type: ignore[arg-type]
        raise ExpansionError(f"homes of {len(homes)} ranks do not fit {ep_ranks} expert-parallel ranks")  # type: ignore[arg-type]
    if loads_E is not None and len(loads_E) != len(copies_E):
        raise ExpansionError(f"loads of {len(loads_E)} experts do not fit the {len(copies_E)} experts before")
    if loads_E is not None and not all(math.isfinite(load) and load >= 0 for load in loads_E):
        raise ExpansionError("the measured load of an expert is negative or no number: it cannot be placed by load")


def place(
    copies_E: Sequence[int],
    *,
    rule: str = "near",
    ep_ranks: int = 1,
    loads_E: Sequence[float] | None = None,
    homes: Sequence[Collection[int]] | None = None,
    groups: int = 1,
    bound: float = 1.25,
) -> Placed:
    """Order the experts of one layer of the new stage.

    Args:
        copies_E: copies of each old expert, the original included.
        rule: `near`, `spread` or `auto`.
        ep_ranks: expert-parallel size of the new stage, R.
        loads_E: measured load of each old expert in any unit; None takes all as equally busy.
        homes: old experts that each expert-parallel rank of the new stage holds already; None where that is unknown.
        groups: routing groups, G; 1 without group-limited routing.
        bound: largest load of the busiest rank over the mean, for `auto`.

    Raises:
        ExpansionError: if sizes do not go together, or the rule is unknown.
    """
    _check(copies_E, ep_ranks, groups, loads_E, homes)
    loads = [1.0] * len(copies_E) if loads_E is None else list(loads_E)
    weight_E = [load / copies for load, copies in zip(loads, copies_E, strict=True)]

    def new_board() -> _Board:
        return _Board(copies_E, weight_E, ep_ranks, groups, homes)

    board, within = new_board(), True
    if rule == "near" or ep_ranks == 1:
        _fill_near(board)
    elif rule == "spread":
        _fill_spread(board)
    elif rule == "auto":
        # A little slack, so that a bound which holds exactly is not missed by rounding.
        board, within = _auto(new_board, bound * math.fsum(loads) / ep_ranks * (1 + _SAME))
    else:
        raise ExpansionError(f"placement={rule} is unknown: use near, spread or auto")
    parents = board.parents()
    load_R = tuple(math.fsum(weight_E[parents[j]] for j in ids) for ids in contiguous(len(parents), ep_ranks))
    return Placed(parents, load_R, None if homes is None else board.fetches(), within)
