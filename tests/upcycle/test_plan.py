"""Plans: who descends from whom, over many random cases."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from parallel.errors import ExpansionError
from upcycle.config import StageConfig
from upcycle.plan import ExpansionPlan, plan_expansion
from upcycle.selection import greedy_copies, select_copies, uniform_copies


def _scores(data: st.DataObject, experts: int) -> list[float]:
    return data.draw(st.lists(st.floats(0, 1e6), min_size=experts, max_size=experts))


@given(st.data(), st.integers(2, 40), st.integers(1, 5))
def test_greedy_fills_the_target_under_the_cap(data: st.DataObject, experts: int, cap: int) -> None:
    scores = _scores(data, experts)
    extra = data.draw(st.integers(1, experts * cap))
    copies = greedy_copies(scores, experts + extra, cap)
    assert sum(copies) == experts + extra
    assert min(copies) >= 1 and max(copies) <= 1 + cap
    # floor(q / n) experts get the whole cap, at most one gets the rest (arXiv 2604.19835, section 4).
    assert sum(r == 1 + cap for r in copies) >= extra // cap
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


def test_cap_too_small_names_the_remedy() -> None:
    with pytest.raises(ExpansionError, match=r"max_extra_copies=1 is too small.*raise it by 1"):
        greedy_copies([1.0, 2.0], 6, 1)


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(2, 4))
def test_families_stay_inside_their_routing_group(data: st.DataObject, groups: int, width: int, factor: int) -> None:
    experts = groups * width
    copies = select_copies("greedy", _scores(data, experts), experts, experts * factor, 2 * factor, groups)
    for group in range(groups):
        assert sum(copies[group * width : (group + 1) * width]) == width * factor


def _model() -> ModelConfig:
    return ModelConfig(layers=4, moe_period=2, num_experts=4)


@given(st.data(), st.sampled_from([2, 3, 4]), st.sampled_from(["uniform", "greedy"]))
def test_plan_round_trips_and_is_deterministic(data: st.DataObject, factor: int, rule: str) -> None:
    rules = StageConfig(at_step=5, factor=factor, selection=rule, max_extra_copies=4)
    scores = {n: _scores(data, 4) for n in (2, 4)} if rule == "greedy" else None
    plan = plan_expansion(rules, _model(), stage=1, experts_before=4, scores=scores, seed=7)
    again = plan_expansion(rules, _model(), stage=1, experts_before=4, scores=scores, seed=7)
    assert plan.digest == again.digest
    assert ExpansionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert [layer.layer for layer in plan.layers] == [2, 4]
    for layer in plan.layers:
        assert len(layer.parents) == 4 * factor and list(layer.parents) == sorted(layer.parents)
        assert [layer.parents.count(e) for e in range(4)] == list(layer.copies)
        assert len(layer.replicas()) == 4 * factor - 4
    records = list(plan.records())
    assert len(records) == 3 * 2 * 4 * factor
    assert all(r.sources[0].expert == plan.layer(r.layer).parents[r.expert] for r in records)


def test_several_expansions_in_a_row_keep_families_together() -> None:
    experts, counts = 2, []
    for factor in (3, 2):
        plan = plan_expansion(
            StageConfig(at_step=1, factor=factor), ModelConfig(layers=1, num_experts=experts),
            stage=1, experts_before=experts, scores=None, seed=0,
        )  # fmt: skip
        experts = plan.experts_after
        counts.append(experts)
        assert plan.layers[0].parents == tuple(e for e in range(experts // factor) for _ in range(factor))
    assert counts == [6, 12]


def test_changed_plan_is_refused() -> None:
    plan = plan_expansion(StageConfig(at_step=5, factor=2), _model(), stage=1, experts_before=4, scores=None, seed=7)
    value = plan.to_dict()
    value["layers"][0]["parents"][0] = 3
    with pytest.raises(ExpansionError, match="digest does not fit"):
        ExpansionPlan.from_dict(value)
    with pytest.raises(ExpansionError, match="format 9 is unknown"):
        ExpansionPlan.from_dict({**plan.to_dict(), "format": 9})
    with pytest.raises(ExpansionError, match="no layer 3"):
        plan.layer(3)
