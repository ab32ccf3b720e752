"""Plans that start from a dense model, and what they draw: pure, alike everywhere, and refused in one line where impossible."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from parallel.errors import ConfigError
from parallel.optimizer_ages import OptimizerAges
from train.stage import families_of
from upcycle.course import Entry, Past, plan_course
from upcycle.dense import DenseRules, plan_from_dense
from upcycle.dense_draw import UnitSums, draw_rows, normal_row, redrawn_units
from upcycle.optimizer_rules import ages_after
from upcycle.plan import ExpansionPlan, last_growth
from upcycle.provenance import check_whole, lineage, lineage_lines, lineage_table
from upcycle.stage_config import StageConfig


def _model(**changes: Any) -> ModelConfig:
    sizes = {"layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "attention_heads": 4, "moe_period": 2}
    return ModelConfig(**(sizes | {"num_experts": 8, "top_k": 2} | changes))


def _plan(rules: DenseRules | None = None, **changes: Any) -> ExpansionPlan:
    return plan_from_dense(rules or DenseRules(), _model(**changes), step=7, seed=3, itemsize=2)


_GROUPS = DenseRules(method="virtual_group", granularity=4)


def test_a_plan_is_a_record_like_any_other() -> None:
    plan = _plan(_GROUPS, top_k=4)
    assert (plan.experts_before, plan.experts_after, plan.stage, plan.step) == (4, 8, 1, 7)
    assert [layer.layer for layer in plan.layers] == [2, 4]
    assert plan.layers[0].parents == (0, 1, 2, 3, 0, 1, 2, 3) and plan.layers[0].copies == (2, 2, 2, 2)
    assert ExpansionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.digest == _plan(_GROUPS, top_k=4).digest != _plan(_GROUPS, top_k=4, num_experts=16).digest
    check_whole(plan)
    assert plan.table()[0].startswith(
        "dense -> 8 experts after step 7 (virtual_group): in 2 layers the feed-forward, cut"
    )
    # It is a growth to everything that asks for families, and none of exact mode.
    assert last_growth([plan.to_dict()]) is not None and families_of([plan.to_dict()]) is None


def test_slices_say_range_scale_and_draw() -> None:
    plan = _plan(_GROUPS, top_k=4)
    records = [r for r in plan.records() if r.layer == 4]
    experts = [r for r in records if r.kind == "expert"]
    assert len(experts) == 8 * 3 and {r.init for r in experts} == {"copy"}
    assert {(r.expert % 4, r.sources[0].expert, r.sources[0].units) for r in experts} == {
        (shard, shard, (16 * shard, 16 * shard + 16)) for shard in range(4)
    }
    assert {r.part: r.scale for r in experts} == {"gate": 1.0, "up": 2.0, "down": 2.0}
    routers = [r for r in records if r.kind == "router"]
    assert [r.generator for r in routers] == [f"upcycling/3/4/router/{copy}" for copy in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert {(r.init, r.sources) for r in records if r.kind == "selection_bias"} == {("zero", ())}
    drawn = [r for r in _plan(DenseRules(method="drop")).records(["expert"]) if r.layer == 2]
    assert {r.init for r in drawn} == {"redraw"} and len({r.generator for r in drawn}) == 8 * 3
    ordinary = dataclasses.replace(plan, dense=None)
    assert "dense" not in ordinary.to_dict()


def test_the_story_of_a_run_begins_with_it() -> None:
    """Course, lineage and ages go on from there; a second growth chains to the shards."""
    plan = _plan(_GROUPS, top_k=4)
    rules = StageConfig(at_step=7, num_experts=8, optimizer_rule="reset", optimizer_scope="family", bias_noise=0.0)
    entry = Entry(rules, "offline", "the stage").to_dict()
    past = Past.of("there", 7, 8, [plan.to_dict()], [entry])
    assert past.experts == (8, 8)
    course = plan_course([StageConfig(at_step=9, factor=2)], 8, past)
    assert (course.first_experts, course.begun, len(course.stages)) == (8, 1, 2)
    assert plan_course([], 16, past, on_load=StageConfig(optimizer_rule="copy")).stages[-1].num_experts == 16
    with pytest.raises(ConfigError, match=r"is of a dense model, model.num_experts is 8: .* from-dense"):
        plan_course([], 8, Past("there", 7, (0,), (), ()), on_load=StageConfig())

    second = dataclasses.replace(
        plan, step=9, stage=2, experts_before=8, experts_after=16, dense=None,
        layers=tuple(dataclasses.replace(x, parents=tuple(range(8)) * 2, copies=(2,) * 8) for x in plan.layers),
    )  # fmt: skip
    chains = lineage([plan, second])[-1][2]
    assert chains[13] == (13, 5, 1)
    assert lineage_table([plan])["stages"][0] == {"stage": 0, "experts": 4}
    assert "stage 1, after step 7: 4 shards of a dense model -> 8 experts (virtual_group)" in lineage_lines([plan])

    ages = ages_after(OptimizerAges(), plan, plan.rule, 7)
    assert ages.begun() == {layer: dict.fromkeys(range(8), (7, 7)) for layer in (2, 4)} and ages.others == (None, None)


def test_routers_may_be_younger_than_their_experts() -> None:
    young = OptimizerAges().with_new_routers({1: range(2)}, 7)
    assert young and not young.restarts and set(young.states()) == {(1, "router")}
    assert OptimizerAges.from_dict(json.loads(json.dumps(young.to_dict()))) == young
    assert young.begun() == {1: {0: (7, 7), 1: (7, 7)}}
    grown = young.through({1: (0, 1, 0, 1)})
    assert set(grown.states()[1, "router"]) == {0, 1, 2, 3}
    # A replica that begins anew is as young as its row, the others keep what they had.
    anew = grown.restarted({1: (2, 3)}, 9)
    assert {e: s.begun for e, s in anew.states()[1, "router"].items()} == {0: (7, 7), 1: (7, 7), 2: (9, 9), 3: (9, 9)}
    assert {e: s.begun for e, s in anew.states()[1, "expert"].items()} == {2: (9, 9), 3: (9, 9)}
    assert OptimizerAges().restarted({1: (0, 1)}, 7).with_new_routers({1: (0, 1)}, 7).routers == ()


def test_draws_know_no_place_and_no_machine() -> None:
    # NumPy's Philox and ziggurat: numbers to be found on any machine.
    assert np.allclose(normal_row("upcycling/3/4/router", 1, 2), [2.27638046397936, 0.26237517655117426], rtol=1e-12)
    assert redrawn_units("a", 10, 0.5).tolist() == [0, 3, 4, 8, 9]
    whole = draw_rows("a", torch.arange(6), 8, slice(0, 8), (0.5, 2.0))
    assert torch.equal(draw_rows("a", torch.tensor([4, 1]), 8, slice(3, 6), (0.5, 2.0)), whole[[4, 1]][:, 3:6])
    assert len(redrawn_units("a", 100, 0.29)) == 29 and len(set(redrawn_units("a", 100, 0.29).tolist())) == 29
    large = draw_rows("b", torch.arange(64), 4096, slice(0, 4096), (0.1, 0.02)).double()
    assert abs(large.mean() - 0.1) < 5 * 0.02 / 512 and abs(large.std() - 0.02) < 5 * 0.02 / 2**9.5


def test_sums_know_no_order() -> None:
    weights = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.003
    units = torch.tensor([1, 5, 33, 49])
    found = set()
    for order in (list(range(40)), list(range(39, -1, -1))):
        sums = UnitSums(50, 40, float(weights.abs().max()))
        for first in (30, 0):
            last = 50 if first else 30
            for column in order:
                sums.add(first, weights[first:last, column : column + 1])
        found.add(sums.moments(units))
    ((mean, deviation),) = found
    assert mean == pytest.approx(float(weights[units].double().mean()), rel=1e-6)
    assert deviation == pytest.approx(float(weights[units].double().std(correction=0)), rel=1e-6)


@pytest.mark.parametrize(
    ("rules", "changes", "message"),
    [
        ({"method": "mix"}, {}, "--method=mix is unknown: use one of copy, virtual_group, drop"),
        ({"scaling": "odd"}, {}, "--scaling=odd is unknown"),
        ({"optimizer_rule": "scale"}, {}, "--optimizer-rule=scale is unknown"),
        ({"granularity": 2}, {}, "--granularity=2 needs --method=virtual_group, not copy"),
        ({"method": "virtual_group", "granularity": 3}, {}, "--num-experts=8 is not divisible by --granularity=3"),
        ({"method": "virtual_group", "granularity": 8}, {}, "--num-experts=8 is one copy of 8 shards: use 16"),
        (
            {"method": "virtual_group", "granularity": 4},
            {"ffn_hidden_size": 66, "top_k": 4},
            "model.ffn_hidden_size=66 is not divisible by --granularity=4",
        ),
        (
            {"method": "virtual_group", "granularity": 16},
            {"num_experts": 32, "top_k": 16},
            "--granularity=16 makes experts of 4 units, and a grouped matrix product takes multiples of 8",
        ),
        ({"method": "virtual_group", "granularity": 4}, {"top_k": 6}, "--top-k=6 is not a multiple of --granularity=4"),
        (
            {"method": "virtual_group", "granularity": 4},
            {"top_k": 4, "num_experts": 24, "router_groups": 4, "router_group_topk": 2},
            "model.router_groups=4 cuts copies of 4 shards apart",
        ),
        ({}, {"top_k": 1, "router_score": "softmax", "balancing": "none"}, "--top-k=1 with softmax over the chosen"),
        ({}, {"shared_expert_ffn_hidden_size": 64}, "model.shared_expert_ffn_hidden_size=64 has no source"),
        ({"method": "drop", "redraw_share": 1.0}, {}, "--redraw-share=1 must lie between 0 and 1"),
        ({"method": "drop", "optimizer_rule": "copy"}, {}, "--optimizer-rule=copy has no meaning with --method=drop"),
    ],
)
def test_what_cannot_be_is_one_line(rules: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _plan(DenseRules(**rules), **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
