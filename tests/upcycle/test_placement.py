"""Placement: every copy has a slot, families stay in their routing group, ranks keep their bounds; many random cases."""

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ExpansionError
from tests.upcycle.plans import Growth, amounts, growths
from upcycle.placement import contiguous, imbalance, place
from upcycle.selection import select_copies

RULES = ("near", "spread", "auto")


def _copies(data: st.DataObject, growth: Growth) -> list[int]:
    scores = data.draw(amounts(growth.experts))
    return select_copies("greedy", scores, growth.experts, growth.after, growth.cap, growth.groups)


def _homes(data: st.DataObject, growth: Growth) -> list[Collection[int]] | None:
    ids = st.sets(st.integers(0, growth.experts - 1))
    return data.draw(st.none() | st.lists(ids, min_size=growth.ep_ranks, max_size=growth.ep_ranks))


def _fetches(parents: Sequence[int], homes: Sequence[Collection[int]]) -> int:
    ranks = contiguous(len(parents), len(homes))
    return sum(len({parents[j] for j in ids} - set(home)) for ids, home in zip(ranks, homes, strict=True))


@given(st.data(), growths(), st.sampled_from(RULES), st.floats(1, 3))
def test_every_copy_has_a_slot(data: st.DataObject, growth: Growth, rule: str, bound: float) -> None:
    copies, homes = _copies(data, growth), _homes(data, growth)
    loads = data.draw(st.none() | amounts(growth.experts))
    terms = {"ep_ranks": growth.ep_ranks, "groups": growth.groups, "loads_E": loads, "homes": homes, "bound": bound}
    placed = place(copies, rule=rule, **terms)
    assert place(copies, rule=rule, **terms) == placed
    assert Counter(placed.parents) == dict(enumerate(copies))
    # A routing group is a block of neighbouring ids, before and after.
    per_group, width = growth.after // growth.groups, growth.experts // growth.groups
    assert all(parent // width == new // per_group for new, parent in enumerate(placed.parents))
    ranks = [[placed.parents[j] for j in ids] for ids in contiguous(growth.after, growth.ep_ranks)]
    assert all(parents == sorted(parents) for parents in ranks)
    weight = [load / r for load, r in zip(loads or [1.0] * growth.experts, copies, strict=True)]
    assert list(placed.load_R) == [math.fsum(weight[p] for p in parents) for parents in ranks]
    assert placed.fetches == (None if homes is None else _fetches(placed.parents, homes))
    if rule == "near":
        assert list(placed.parents) == sorted(placed.parents)
    if rule != "auto":
        assert placed.within_bound


@given(st.data(), growths())
def test_spread_deals_families_out_evenly(data: st.DataObject, growth: Growth) -> None:
    copies, loads = _copies(data, growth), data.draw(st.none() | amounts(growth.experts))
    placed = place(copies, rule="spread", ep_ranks=growth.ep_ranks, groups=growth.groups, loads_E=loads)
    per_group, width = growth.after // growth.groups, growth.experts // growth.groups
    for rank in contiguous(growth.after, growth.ep_ranks):
        for parent in range(growth.experts):
            block = range(parent // width * per_group, (parent // width + 1) * per_group)
            slots = len([j for j in rank if j in block])
            held = sum(placed.parents[j] == parent for j in rank)
            # A rank with all slots of its group holds the family, one with none holds none of it; rounded up between.
            assert held <= math.ceil(copies[parent] * slots / per_group)


@given(st.data(), growths(), st.floats(1, 3))
def test_auto_keeps_its_bound_or_says_that_it_does_not(data: st.DataObject, growth: Growth, bound: float) -> None:
    copies, loads = _copies(data, growth), data.draw(amounts(growth.experts))
    homes = data.draw(st.lists(
        st.sets(st.integers(0, growth.experts - 1)), min_size=growth.ep_ranks, max_size=growth.ep_ranks
    ))  # fmt: skip
    near, spread, auto = (
        place(
            copies, rule=rule, ep_ranks=growth.ep_ranks, groups=growth.groups, loads_E=loads, homes=homes, bound=bound
        )
        for rule in RULES
    )
    # Loads are sums of at most 100 terms: rounding is below 100 x 2^-53 of them, the search's slack 1e-9.
    keeps = imbalance(auto.load_R) <= bound * (1 + 2e-9)
    assert auto.within_bound <= keeps
    assert keeps <= (auto.within_bound or imbalance(auto.load_R) >= bound * (1 - 2e-9))
    if imbalance(near.load_R) <= bound and auto.within_bound:
        assert auto.fetches is not None and near.fetches is not None and auto.fetches <= near.fetches
    # Where nothing keeps the bound it is no worse than either of the others.
    if not auto.within_bound:
        assert max(auto.load_R) <= min(max(near.load_R), max(spread.load_R)) * (1 + 2e-9)


@given(st.integers(1, 8), st.integers(1, 4), st.sampled_from([2, 3, 4]), st.floats(1, 3))
def test_uniform_growth_at_the_same_size_moves_nothing(ranks: int, local: int, factor: int, bound: float) -> None:
    experts = ranks * local
    near, auto = (
        place([factor] * experts, rule=rule, ep_ranks=ranks, homes=contiguous(experts, ranks), bound=bound)
        for rule in ("near", "auto")
    )
    assert near.fetches == 0 and near.parents == auto.parents and imbalance(near.load_R) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_twice_the_experts_on_twice_the_ranks_need_not_move(ranks: int) -> None:
    """EP R -> 2R on 2R processes: process g held the experts of old rank g mod R, four of them."""
    homes = contiguous(4 * ranks, ranks) * 2
    near = place([2] * 4 * ranks, ep_ranks=2 * ranks, homes=homes)
    auto = place([2] * 4 * ranks, rule="auto", ep_ranks=2 * ranks, homes=homes)
    # In order of parents process g needs two experts of old rank g / 2, which it is for the first and the last only.
    assert near.fetches == 2 * (2 * ranks - 2)
    assert auto.fetches == 0 and imbalance(auto.load_R) == 1 and auto.within_bound


def test_spread_evens_out_what_near_piles_up() -> None:
    copies, loads = [3, 1, 1, 1, 1, 1], [6.0, 1, 1, 1, 1, 2]
    near = place(copies, ep_ranks=4, loads_E=loads)
    spread = place(copies, rule="spread", ep_ranks=4, loads_E=loads)
    assert near.parents == (0, 0, 0, 1, 2, 3, 4, 5) and near.load_R == (4, 3, 2, 3)
    assert sorted(spread.load_R) == [3, 3, 3, 3]
    assert [set(spread.parents[j] for j in ids) for ids in contiguous(8, 4)].count({0}) == 0


def _least_fetches(
    copies: tuple[int, ...], weight: Sequence[float], homes: Sequence[Collection[int]], limit: float
) -> int | None:
    """Fewest fetches of any order under the limit, by trying all of them; None if there is none."""
    slots = sum(copies) // len(homes)

    @functools.cache
    def rest(rank: int, left: tuple[int, ...]) -> int | None:
        if rank == len(homes):
            return 0
        best = None
        for taken in itertools.product(*(range(min(slots, n) + 1) for n in left)):
            if sum(taken) != slots or sum(n * w for n, w in zip(taken, weight, strict=True)) > limit:
                continue
            after = rest(rank + 1, tuple(n - k for n, k in zip(left, taken, strict=True)))
            if after is not None:
                total = after + sum(k > 0 and e not in homes[rank] for e, k in enumerate(taken))
                best = total if best is None else min(best, total)
        return best

    return rest(0, copies)


def test_auto_is_close_to_the_least_traffic_there_is() -> None:
    """Against every order of small cases: no bound missed that can be kept, nearly always the fewest fetches."""
    rng, kept, least, found = random.Random(5), 0, 0, 0
    for _ in range(100):
        ranks, slots = rng.choice([2, 3, 4]), rng.choice([2, 3])
        experts = rng.randint(max(2, ranks * slots // 2), ranks * slots - 1)
        copies = [1] * experts
        for _ in range(ranks * slots - experts):
            copies[rng.randrange(experts)] += 1
        loads = [rng.lognormvariate(0, 0.7) for _ in range(experts)]
        homes = [{e for e in range(experts) if rng.random() < 1.3 / ranks} for _ in range(ranks)]
        bound = rng.choice([1.1, 1.25, 1.5])
        placed = place(copies, rule="auto", ep_ranks=ranks, loads_E=loads, homes=homes, bound=bound)
        weight = [load / r for load, r in zip(loads, copies, strict=True)]
        best = _least_fetches(tuple(copies), weight, homes, bound * sum(loads) / ranks * (1 + 1e-9))
        assert placed.within_bound == (best is not None)
        if best is not None and placed.fetches is not None:
            assert placed.fetches >= best
            kept, least, found = kept + 1, least + best, found + placed.fetches
    # A search, so not always the optimum: measured on these fixed cases, 116 fetches where 112 would do. Not to get worse.
    assert (kept, least) == (69, 112) and found <= 116


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep_ranks": 3}, "2 -> 4 experts cannot be placed on 3 expert-parallel ranks"),
        ({"groups": 4}, "in 4 routing groups"),
        ({"ep_ranks": 2, "rule": "far"}, "placement=far is unknown"),
        ({"ep_ranks": 2, "homes": [[0]]}, "homes of 1 ranks do not fit 2"),
        ({"loads_E": [1.0]}, "loads of 1 experts do not fit the 2"),
        ({"loads_E": [1.0, math.nan]}, "negative or no number"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ExpansionError, match=message):
        place([3, 1], **options)  # type: ignore[arg-type]
