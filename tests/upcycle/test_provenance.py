"""Provenance: ancestor chains of every expert over any number of stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from parallel.errors import ExpansionError
from tests.upcycle.plans import amounts, growths
from upcycle.config import StageConfig, StageParallel
from upcycle.plan import ExpansionPlan, LayerPlan, plan_expansion
from upcycle.provenance import lineage


def test_chains_lead_back_to_the_first_stage() -> None:
    plans = [
        ExpansionPlan(3, 1, 2, 3, (LayerPlan(1, (0, 1, 0), (2, 1)), LayerPlan(4, (0, 1, 1), (1, 2)))),
        ExpansionPlan(5, 2, 3, 3, tuple(LayerPlan(n, (0, 1, 2), (1, 1, 1)) for n in (1, 4))),
        ExpansionPlan(9, 3, 3, 4, (LayerPlan(1, (2, 0, 1, 2), (1, 1, 2)), LayerPlan(4, (0, 1, 2, 2), (1, 1, 2)))),
    ]
    stages = lineage(plans)
    assert stages[0] == {1: ((0,), (1,)), 4: ((0,), (1,))}
    assert stages[1][1] == ((0, 0), (1, 1), (2, 0))
    assert stages[2][4] == ((0, 0, 0), (1, 1, 1), (2, 2, 1))
    assert stages[3][1] == ((0, 2, 2, 0), (1, 0, 0, 0), (2, 1, 1, 1), (3, 2, 2, 0))
    assert lineage([]) == []


@given(st.data(), st.integers(2, 6))
def test_random_chains_keep_every_founder(data: st.DataObject, experts: int) -> None:
    plans: list[ExpansionPlan] = []
    model, founders = ModelConfig(layers=2, num_experts=experts, top_k=1), experts
    for stage in range(1, data.draw(st.integers(1, 4)) + 1):
        if data.draw(st.booleans()):
            growth = data.draw(growths(experts=experts))
            rules = growth.rules(data.draw(st.sampled_from(["greedy", "sampling"])), "spread")
            ranks = growth.ep_ranks
        else:
            rules, ranks = StageConfig(at_step=5, parallel=StageParallel(expert=1)), 1
        scores = {n: data.draw(amounts(experts)) for n in model.moe_layer_numbers()}
        plans.append(
            plan_expansion(
                rules,
                model,
                stage=stage,
                experts_before=experts,
                scores=scores,
                seed=1,
                ep_ranks=ranks,
                ep_ranks_before=1,
            )
        )
        experts = plans[-1].experts_after
    stages = lineage(plans)
    assert len(stages) == len(plans) + 1
    for number, plan in enumerate(plans, start=1):
        for layer in plan.layers:
            chains = stages[number][layer.layer]
            # Each chain is the expert's own id and then, unchanged, its parent's chain.
            assert [chain[0] for chain in chains] == list(range(plan.experts_after))
            assert all(c[1:] == stages[number - 1][layer.layer][layer.parents[c[0]]] for c in chains)
            assert {chain[-1] for chain in chains} == set(range(founders))


def _plan(stage: int, before: int, parents: tuple[int, ...], layer: int = 1, after: int | None = None) -> ExpansionPlan:
    copies = tuple(parents.count(e) for e in range(before))
    return ExpansionPlan(stage, stage, before, after or len(parents), (LayerPlan(layer, parents, copies),))


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([_plan(2, 2, (0, 1, 1))], "the plan into stage 1 is missing: found that of stage 2"),
        ([_plan(1, 2, (0, 1, 1)), _plan(2, 4, (0, 1, 2, 3, 3))], "starts from 4 experts .* stage 1 has 3"),
        ([_plan(1, 2, (0, 1, 1)), _plan(2, 3, (0, 1, 2, 2), layer=2)], r"in layers \[2\].* in \[1\]"),
        ([_plan(1, 2, (0, 1, 2))], "does not say where every expert of layer 1"),
        ([_plan(1, 2, (0, 1), after=4)], "does not say where every expert of layer 1"),
    ],
)
def test_plans_that_do_not_follow_each_other_are_refused(plans: list[ExpansionPlan], message: str) -> None:
    with pytest.raises(ExpansionError, match=message):
        lineage(plans)
