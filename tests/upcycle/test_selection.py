"""Copies per expert: sums, caps, ties, draws, over many random cases."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ExpansionError
from tests.upcycle.plans import Growth, amounts, growths
from upcycle.selection import greedy_copies, named_generator, sampled_copies, select_copies, uniform_copies


@given(st.data(), st.integers(2, 40), st.integers(1, 5))
def test_greedy_fills_the_target_under_the_cap(data: st.DataObject, experts: int, cap: int) -> None:
    scores = data.draw(amounts(experts))
    extra = data.draw(st.integers(1, experts * cap))
    copies = greedy_copies(scores, experts + extra, cap)
    assert sum(copies) == experts + extra
    assert min(copies) >= 1 and max(copies) <= 1 + cap
    # floor(q / n) experts get the whole cap, at most one gets the rest (arXiv 2604.19835, section 4).
    assert sum(r == 1 + cap for r in copies) == extra // cap
    assert sum(1 < r < 1 + cap for r in copies) == (1 if extra % cap else 0)
    # Never more copies for a less useful expert.
    order = sorted(range(experts), key=lambda e: (-scores[e], e))
    assert [copies[e] for e in order] == sorted(copies, reverse=True)


def test_greedy_matches_the_papers_example() -> None:
    # E = 32, 32 extra slots, cap 3: ten experts with r = 4, one with r = 3, 21 alone.
    copies = greedy_copies([float(32 - e) for e in range(32)], 64, 3)
    assert [copies.count(r) for r in (4, 3, 2, 1)] == [10, 1, 0, 21]
    assert copies[:11] == [4] * 10 + [3]


def test_ties_go_to_the_lower_id() -> None:
    assert greedy_copies([1.0, 5.0, 5.0, 1.0], 6, 1) == [1, 2, 2, 1]
    assert greedy_copies([2.0] * 4, 6, 2) == [3, 1, 1, 1]


@pytest.mark.parametrize(("before", "after"), [(8, 12), (4, 9)])
def test_uniform_needs_a_multiple(before: int, after: int) -> None:
    with pytest.raises(ExpansionError, match=f"{before} experts to {after}"):
        uniform_copies(before, after)


@pytest.mark.parametrize("rule", ["greedy", "sampling"])
def test_cap_too_small_names_the_remedy(rule: str) -> None:
    with pytest.raises(ExpansionError, match=r"max_extra_copies=1 is too small.*raise it by 1"):
        select_copies(rule, [1.0, 2.0], 2, 6, 1, 1, generator="a")


@given(st.data(), growths(), st.sampled_from(["greedy", "sampling"]))
def test_every_routing_group_grows_by_itself_under_the_cap(data: st.DataObject, growth: Growth, rule: str) -> None:
    experts, groups = growth.experts, growth.groups
    scores = data.draw(amounts(experts))
    copies = select_copies(rule, scores, experts, growth.after, growth.cap, groups, generator="g")
    width = experts // groups
    for group in range(groups):
        assert sum(copies[group * width : (group + 1) * width]) == growth.after // groups
    assert min(copies) >= 1 and max(copies) <= 1 + growth.cap


@given(st.data(), st.integers(2, 20), st.integers(1, 3), st.floats(0.01, 100), st.integers(0, 2**32))
def test_draws_are_repeatable_and_do_not_depend_on_the_scale(
    data: st.DataObject, experts: int, cap: int, temperature: float, seed: int
) -> None:
    # Whole numbers times a power of two: the scaled scores are exact, so nothing but the rule can tell them apart.
    scores = [float(n) for n in data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))]
    after = experts + data.draw(st.integers(1, experts * cap))
    copies, scaled = (
        sampled_copies([s * unit for s in scores], after, cap, temperature, named_generator(f"x/{seed}"))
        for unit in (1.0, 2.0**-40)
    )
    assert copies == scaled
    assert sum(copies) == after and min(copies) >= 1 and max(copies) <= 1 + cap


@given(st.permutations([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), st.integers(1, 18), st.integers(1, 3))
def test_cold_sampling_is_greedy(scores: list[float], extra: int, cap: int) -> None:
    after = 6 + min(extra, 6 * cap)
    # The closest scores differ by 1 / 10.5 of the mean: at temperature 1e-4 the odds are e^-952, which is 0 in a float.
    assert sampled_copies(scores, after, cap, 1e-4, random.Random(0)) == greedy_copies(scores, after, cap)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_odds_are_the_softmax_of_score_over_mean(temperature: float) -> None:
    scores = [1.0, 2.0, 3.0, 6.0]
    odds = [math.exp(s / 3.0 / temperature) for s in scores]
    draws, counts = 20_000, [0] * 4
    for number in range(draws):
        copies = sampled_copies(scores, 5, 1, temperature, named_generator(f"draw/{number}"))
        counts[copies.index(2)] += 1
    for count, odd in zip(counts, odds, strict=True):
        share = odd / sum(odds)
        # Five standard deviations of a binomial share; the draws are fixed by their names, so this never flickers.
        assert abs(count / draws - share) < 5 * math.sqrt(share * (1 - share) / draws)


def test_zero_scores_are_drawn_alike() -> None:
    drawn = {tuple(sampled_copies([0.0] * 3, 4, 1, 1.0, named_generator(str(n)))) for n in range(60)}
    assert drawn == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


def test_a_named_generator_is_the_same_everywhere() -> None:
    # SHA-256 and Python's Mersenne Twister, so these hold for every machine and Python; another name, other draws.
    assert named_generator("selection/7/1/2").random() == 0.49539640968215126
    assert named_generator("selection/7/1/4").random() != named_generator("selection/7/1/2").random()


@pytest.mark.parametrize("score", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("rule", ["greedy", "sampling"])
def test_a_score_that_cannot_be_ranked_is_refused(rule: str, score: float) -> None:
    with pytest.raises(ExpansionError, match=rf"utility of expert 1 is {score}.*selection={rule}"):
        select_copies(rule, [1.0, score], 2, 4, 3, 1)


def test_an_unknown_rule_and_missing_scores_are_refused() -> None:
    with pytest.raises(ExpansionError, match="selection=best is unknown"):
        select_copies("best", [1.0, 1.0], 2, 4, 3, 1)
    with pytest.raises(ExpansionError, match="selection=sampling needs scores"):
        select_copies("sampling", None, 2, 4, 3, 1)
