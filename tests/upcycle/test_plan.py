"""Plans: who descends from whom, where they stand, and that a plan reads back as it was; over many random cases."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from parallel.errors import ExpansionError
from tests.upcycle.plans import Growth, amounts, growths
from upcycle.plan import ExpansionPlan, LayerPlan, plan_expansion
from upcycle.stage_config import StageConfig, StageParallel

_SELECTIONS = ("uniform", "greedy", "sampling")
_PLACEMENTS = ("near", "spread", "auto")


def _plan(growth: Growth, rules: StageConfig, scores: object, loads: object, *, seed: int = 7) -> ExpansionPlan:
    return plan_expansion(
        rules, growth.model(), stage=1, experts_before=growth.experts, scores=scores, seed=seed, loads=loads,
        ep_ranks=growth.ep_ranks, ep_ranks_before=growth.ep_before,
    )  # fmt: skip


def _layers(data: st.DataObject, experts: int) -> dict[int, list[float]]:
    return {n: data.draw(amounts(experts)) for n in (2, 4)}


@given(st.data(), st.sampled_from(_SELECTIONS), st.sampled_from(_PLACEMENTS))
def test_plan_round_trips_and_is_deterministic(data: st.DataObject, selection: str, placement: str) -> None:
    growth = data.draw(growths(uniform=selection == "uniform"))
    rules = growth.rules(selection, placement, temperature=data.draw(st.floats(0.1, 10)))
    scores = None if selection == "uniform" else _layers(data, growth.experts)
    loads = _layers(data, growth.experts) if data.draw(st.booleans()) else None
    plan = _plan(growth, rules, scores, loads)
    assert _plan(growth, rules, scores, loads).digest == plan.digest
    back = ExpansionPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert back == plan and back.digest == plan.digest
    assert [layer.layer for layer in plan.layers] == [2, 4]
    for layer in plan.layers:
        assert len(layer.parents) == growth.after
        assert [layer.parents.count(e) for e in range(growth.experts)] == list(layer.copies)
        replicas = set(layer.replicas())
        # One original per family, the lowest id.
        assert sorted(layer.parents[j] for j in range(growth.after) if j not in replicas) == list(range(growth.experts))
        assert all(layer.parents[j] in layer.parents[:j] for j in replicas)
    records = list(plan.records())
    assert len(records) == 3 * 2 * growth.after
    assert all(r.sources[0].expert == plan.layer(r.layer).parents[r.expert] for r in records)
    assert len(plan.table()) == 3


@given(st.data(), growths(), st.sampled_from(["greedy", "sampling"]))
def test_copies_do_not_depend_on_the_layout(data: st.DataObject, growth: Growth, selection: str) -> None:
    scores, loads = _layers(data, growth.experts), _layers(data, growth.experts)
    alone = Growth(growth.groups, growth.experts, growth.after, growth.cap, 1, 1)
    single = _plan(alone, alone.rules(selection, "near"), scores, None)
    for placement in _PLACEMENTS:
        plan = _plan(growth, growth.rules(selection, placement), scores, loads)
        assert [layer.copies for layer in plan.layers] == [layer.copies for layer in single.layers]
    near = _plan(growth, growth.rules(selection, "near"), scores, loads)
    assert near.layers == single.layers


def test_draws_are_named_by_seed_stage_and_layer() -> None:
    model, scores = ModelConfig(layers=2, num_experts=16), {1: [1.0] * 16, 2: [1.0] * 16}

    def copies(seed: int, stage: int) -> list[tuple[int, ...]]:
        rules = StageConfig(at_step=5, num_experts=24, selection="sampling")
        plan = plan_expansion(rules, model, stage=stage, experts_before=16, scores=scores, seed=seed)
        assert plan.selection["temperature"] == 1.0
        return [layer.copies for layer in plan.layers]

    assert copies(7, 1) == copies(7, 1)
    assert len({*copies(7, 1), *copies(7, 2), *copies(8, 1)}) == 6


@pytest.mark.parametrize(("first", "factors", "counts"), [(2, (3, 2), [6, 12]), (4, (2, 2, 3), [8, 16, 48])])
def test_uniform_chains_keep_families_together(first: int, factors: tuple[int, ...], counts: list[int]) -> None:
    experts, found = first, []
    for stage, factor in enumerate(factors, start=1):
        plan = plan_expansion(
            StageConfig(at_step=stage, factor=factor), ModelConfig(layers=1, num_experts=first),
            stage=stage, experts_before=experts, scores=None, seed=0,
        )  # fmt: skip
        assert plan.layers[0].parents == tuple(e for e in range(experts) for _ in range(factor))
        experts = plan.experts_after
        found.append(experts)
    assert found == counts


def test_measured_load_is_recorded_and_told() -> None:
    model, loads = ModelConfig(layers=1, num_experts=4), {1: [6.0, 1.0, 1.0, 2.0]}
    rules = StageConfig(
        at_step=3, num_experts=6, selection="greedy", placement="spread", parallel=StageParallel(expert=2)
    )
    plan = plan_expansion(
        rules, model, stage=1, experts_before=4, scores={1: [9.0, 1.0, 1.0, 1.0]}, seed=0, loads=loads, ep_ranks=2,
    )  # fmt: skip
    # Three copies of 2 each: one and two of them, with 1 + 2 and 1 beside them; 5 a rank.
    assert plan.layers[0].copies == (3, 1, 1, 1)
    (record,) = plan.placement["layers"]
    assert record == {
        "layer": 1, "load_before": 1.4, "load_after": 1.0, "load_shares": [0.5, 0.5], "moved": record["moved"],
        "within_bound": True,
    }  # fmt: skip
    assert (plan.placement["rule"], plan.placement["ep_ranks_before"], plan.placement["ep_ranks_after"]) == (
        "spread",
        2,
        2,
    )
    assert plan.table()[1] == (
        "  layer 1: 3 x r=1, 1 x r=3; expected load of ranks, max/mean 1.400 -> 1.000; "
        f"{record['moved']} experts come from another rank"
    )


def test_a_bound_that_cannot_be_kept_is_told() -> None:
    rules = StageConfig(at_step=3, factor=2, placement="auto", max_load_imbalance=1.01)
    # One expert has nearly all tokens, and of its two copies one rank of four can only hold one.
    plan = plan_expansion(
        rules, ModelConfig(layers=1, num_experts=4), stage=1, experts_before=4, scores=None, seed=0,
        loads={1: [97.0, 1.0, 1.0, 1.0]}, ep_ranks=4,
    )  # fmt: skip
    (record,) = plan.placement["layers"]
    assert not record["within_bound"] and plan.placement["bound"] == 1.01
    assert record["load_after"] == pytest.approx(4 * (97 / 2 + 1 / 2) / 100)
    assert plan.table()[1].endswith("the load bound is not met")


def test_without_expert_ranks_nothing_is_recorded_of_them() -> None:
    plan = plan_expansion(
        StageConfig(at_step=5, factor=2), ModelConfig(layers=1, num_experts=4), stage=1, experts_before=4, scores=None,
        seed=7, loads={1: [1.0] * 4},
    )  # fmt: skip
    assert plan.placement == {"rule": "near"}


@pytest.mark.parametrize("model", [ModelConfig(layers=4, moe_period=2, num_experts=4), ModelConfig(num_experts=0)])
def test_a_change_of_layout_leaves_every_expert_where_it_is(model: ModelConfig) -> None:
    rules = StageConfig(at_step=5, parallel=StageParallel(expert=2))
    plan = plan_expansion(
        rules, model, stage=2, experts_before=model.num_experts, scores=None, seed=7, ep_ranks=2, ep_ranks_before=1
    )
    assert plan.experts_after == plan.experts_before == model.num_experts
    assert plan.selection == {"rule": "none"} and plan.bias_noise == 0
    assert plan.layers == tuple(LayerPlan(n, (0, 1, 2, 3), (1, 1, 1, 1)) for n in model.moe_layer_numbers())
    assert all(layer.replicas() == [] for layer in plan.layers)
    assert plan.table() == [f"layout change after step 5: the {model.num_experts} experts stay as they are"]
    assert ExpansionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


# As the first version wrote it, byte for byte.
_OLD_BODY = {
    "format": 1, "step": 3, "stage": 1, "experts_before": 2, "experts_after": 3,
    "layers": [{"layer": 1, "parents": [0, 1, 1], "copies": [1, 2], "scores": [0.5, 2.0]}],
    "selection": {"rule": "greedy", "utility": "grad_norm", "max_extra_copies": 3, "scoring_batches": 10},
    "placement": {"rule": "near"}, "optimizer_rule": "copy", "bias_noise": 0.001, "seed": 1234,
}  # fmt: skip
_OLD = {**_OLD_BODY, "digest": "e6d0c6a419cd4b57e24eca1bb4864f0197119349532d5845eae66516b2f32b1c"}


def _signed(body: dict[str, object]) -> dict[str, object]:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {**body, "digest": hashlib.sha256(text.encode()).hexdigest()}


def test_a_plan_of_the_first_version_is_read() -> None:
    plan = ExpansionPlan.from_dict(_OLD)
    assert plan.layers == (LayerPlan(1, (0, 1, 1), (1, 2), (0.5, 2.0)),)
    assert plan.layers[0].replicas() == [2] and plan.table()[1] == "  layer 1: 1 x r=1, 1 x r=2"


def test_a_plan_that_lacks_a_field_of_today_is_read() -> None:
    # What a plan looks like to a later version that has learned another field: signed over what it has.
    body = {k: v for k, v in _OLD_BODY.items() if k != "bias_noise"}
    assert ExpansionPlan.from_dict(_signed(body)).bias_noise == 0.0


def test_changed_plan_is_refused() -> None:
    with pytest.raises(ExpansionError, match=r"plan of step 3 was changed .* digest does not fit"):
        ExpansionPlan.from_dict({**_OLD, "layers": [{**_OLD_BODY["layers"][0], "parents": [0, 0, 1]}]})  # type: ignore[index]
    with pytest.raises(ExpansionError, match="format 9 is unknown"):
        ExpansionPlan.from_dict({**_OLD, "format": 9})
    with pytest.raises(ExpansionError, match=r"not one that this version reads: .*colour"):
        ExpansionPlan.from_dict(_signed({**_OLD_BODY, "colour": "red"}))
    with pytest.raises(ExpansionError, match="not one that this version reads: 'layers'"):
        ExpansionPlan.from_dict(_signed({k: v for k, v in _OLD_BODY.items() if k != "layers"}))
    with pytest.raises(ExpansionError, match="no layer 3"):
        ExpansionPlan.from_dict(_OLD).layer(3)
