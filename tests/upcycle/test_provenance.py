"""Provenance: ancestor chains of every expert over any number of stages, as text and as data."""

import itertools
import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from parallel.errors import ExpansionError
from tests.upcycle.plans import amounts, growths
from upcycle.plan import ExpansionPlan, LayerPlan, plan_expansion
from upcycle.provenance import MAX_FAMILIES, families, lineage, lineage_lines, lineage_table, telling_layers, unevenness
from upcycle.stage_config import StageConfig, StageParallel


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


@st.composite
def histories(draw: st.DrawFn) -> list[ExpansionPlan]:
    """The plans of a random run: expansions and changes of layout, in two layers."""
    plans: list[ExpansionPlan] = []
    experts = draw(st.integers(2, 6))
    model = ModelConfig(layers=2, num_experts=experts, top_k=1)
    for stage in range(1, draw(st.integers(1, 4)) + 1):
        if draw(st.booleans()):
            growth = draw(growths(experts=experts))
            rules = growth.rules(draw(st.sampled_from(["greedy", "sampling"])), "spread")
            ranks = growth.ep_ranks
        else:
            rules, ranks = StageConfig(at_step=5, parallel=StageParallel(expert=1)), 1
        scores = {n: draw(amounts(experts)) for n in model.moe_layer_numbers()}
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
    return plans


@given(histories())
def test_random_chains_keep_every_founder(plans: list[ExpansionPlan]) -> None:
    founders = plans[0].experts_before
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
        ([_plan(1, 2, (1, 0))], "adds no experts, but in layer 1 not all of them keep their ids"),
    ],
)
def test_plans_that_do_not_follow_each_other_are_refused(plans: list[ExpansionPlan], message: str) -> None:
    with pytest.raises(ExpansionError, match=message):
        lineage(plans)
    with pytest.raises(ExpansionError, match=message):
        lineage_lines(plans)
    with pytest.raises(ExpansionError, match=message):
        lineage_table(plans)


def _chained(counts: Sequence[int], layers: int = 1, selection: str = "uniform") -> list[ExpansionPlan]:
    """Plans of a run through these expert counts; the utility of an expert is its id plus its layer, in some order."""
    model = ModelConfig(layers=layers, num_experts=counts[0], top_k=1)
    plans = []
    for stage, (before, after) in enumerate(itertools.pairwise(counts), start=1):
        scores = {n: [float((7 * e + n) % before) for e in range(before)] for n in model.moe_layer_numbers()}
        rules = StageConfig(at_step=10 * stage, num_experts=after, selection=selection)
        plans.append(
            plan_expansion(
                rules,
                model,
                stage=stage,
                experts_before=before,
                scores=None if selection == "uniform" else scores,
                seed=1,
            )
        )
    return plans


def test_the_table_of_2_to_6_to_12() -> None:
    table = lineage_table(_chained([2, 6, 12], layers=2))
    assert json.loads(json.dumps(table)) == table
    assert [(s["stage"], s["experts"], s.get("step")) for s in table["stages"]] == [
        (0, 2, None),
        (1, 6, 10),
        (2, 12, 20),
    ]
    assert [entry["layer"] for entry in table["layers"]] == [1, 2]
    # Expert e of 12 was e // 2 of 6, and that one was e // 6 of 2.
    assert table["layers"][1]["chains"] == [[e, e // 2, e // 6] for e in range(12)]
    assert table["layers"][1]["utilities"] == [None, None]
    assert lineage_table(_chained([2, 6, 12], layers=2), layer=2)["layers"] == table["layers"][1:]
    assert lineage_table([]) == {"stages": [], "layers": []}


@given(histories())
def test_table_and_lines_say_what_the_plans_say(plans: list[ExpansionPlan]) -> None:
    table, last = lineage_table(plans), lineage(plans)[-1]
    for entry in table["layers"]:
        assert [tuple(chain) for chain in entry["chains"]] == list(last[entry["layer"]])
        assert entry["utilities"] == [
            None if p.experts_after == p.experts_before else list(p.layer(entry["layer"]).scores or ()) for p in plans
        ]
        # All of a layer's lines together name every parent of every expert once.
        told: list[tuple[int, int, int]] = []
        stage = 0
        for line in lineage_lines(plans, entry["layer"]):
            if found := re.match(r"stage (\d+), ", line):
                stage = int(found.group(1))
            text = re.sub("utility.*|was.*", "", line.replace("not copied:", ""))
            if re.match(r" +\d+ -> ", text):
                told += [(stage, parent, new) for parent, new in _pairs(text)]
        grown = [plan for plan in plans if plan.experts_after > plan.experts_before]
        expected = [(p.stage, parent, new) for p in grown for new, parent in enumerate(p.layer(entry["layer"]).parents)]
        assert sorted(told) == sorted(expected)


def _pairs(text: str) -> list[tuple[int, int]]:
    """Parent and new id of each `parent -> ids` on a line."""
    found = []
    for parent, ids in re.findall(r"(\d+) -> ((?:\d+(?:-\d+)?(?:, (?!\d+ ->))?)+)", text):
        for part in ids.strip(", ").split(", "):
            low, _, high = part.strip().partition("-")
            found += [(int(parent), new) for new in range(int(low), int(high or low) + 1)]
    return found


def test_the_lines_of_a_small_run() -> None:
    plans = [
        ExpansionPlan(
            10,
            1,
            3,
            6,
            (LayerPlan(1, (0, 1, 1, 1, 2, 2), (1, 3, 2), (0.5, 4.0, 2.0)),),
            {"rule": "greedy", "utility": "grad_norm"},
        ),
        ExpansionPlan(20, 2, 6, 6, (LayerPlan(1, tuple(range(6)), (1,) * 6),), {"rule": "none"}),
        ExpansionPlan(
            30,
            3,
            6,
            7,
            (LayerPlan(1, (3, 0, 1, 2, 3, 4, 5), (1, 1, 1, 2, 1, 1)),),
            {"rule": "uniform"},
            {"rule": "spread"},
        ),
    ]
    assert lineage_lines(plans) == [
        "stage 1, after step 10: 3 -> 6 experts (greedy by grad_norm, placement near)",
        "  layer 1: 2 of 3 experts copied",
        "    1 -> 1-3  utility 4",
        "    2 -> 4, 5  utility 2",
        "    not copied: 0 -> 0",
        "stage 2, after step 20: change of layout, the 6 experts keep their ids",
        "stage 3, after step 30: 6 -> 7 experts (uniform, placement spread)",
        "  layer 1: 1 of 6 experts copied",
        "    3 -> 0, 4  was 1 in stage 0",
        "    not copied: 0 -> 1, 1 -> 2, 2 -> 3, 4 -> 5, 5 -> 6",
    ]
    with pytest.raises(ExpansionError, match="no layer 2 in the plans: the layers with experts are 1"):
        lineage_lines(plans, layer=2)
    assert lineage_lines([]) == ["no plans: the experts are those of the first stage"]


@pytest.mark.parametrize("selection", ["uniform", "greedy"])
def test_the_lines_of_a_large_model_are_bounded(selection: str) -> None:
    plans = _chained([256, 512], layers=61, selection=selection)
    lines = lineage_lines(plans)
    assert len(lines) <= 1 + 3 * (MAX_FAMILIES + 3) + 1 and all(len(line) <= 160 for line in lines)
    shown = [line for line in lines if line.startswith("  layer")]
    copied = 256 if selection == "uniform" else 86
    assert shown == [f"  layer {n}: {copied} of 256 experts copied" for n in (1, 31, 61)]
    left = f"    and {copied - MAX_FAMILIES} more families of 2" + (" to 4" if selection == "greedy" else "")
    assert lines.count(left) == 3
    assert lines[-1] == "left out: 58 of 61 layers; shown: the first, the middle and the last one"
    # Of one layer nothing is left out.
    whole = lineage_lines(plans, layer=31)
    assert sum(line.count("->") for line in whole[2:]) == 256 and not any("more" in line for line in whole)


def test_telling_layers() -> None:
    even, once, twice = [[0, 0, 1, 1], [0, 1, 2, 3]], [[0, 0, 0, 1], [0, 1, 2, 3]], [[0, 0, 0, 1], [0, 0, 1, 2, 3]]
    assert unevenness(even) == 0 < unevenness(once) < unevenness(twice)
    assert unevenness([]) == 0
    layers = {1: once, 3: once, 5: twice, 7: even, 9: even}
    assert telling_layers(layers) == ([1, 5, 9], "the first, the last and the one that grew most unevenly")
    assert telling_layers(dict.fromkeys((2, 4, 6), once))[0] == [2, 4, 6]
    assert telling_layers({4: even})[0] == [4]
    assert families([2, 0, 2]) == {0: [1], 2: [0, 2]}
