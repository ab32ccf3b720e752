"""Which expert came from which, back to the first stage: the plans of a run, chained. Pure Python on global expert ids.

A checkpoint's manifest and `plans/` hold one plan per stage that began; together they are the family tree of every expert.

    for layer, chains in lineage(plans)[-1].items():
        chains[5]                                  # (5, 2, 1): expert 5 of stage 2 was 2 in stage 1 and 1 in stage 0
    print("\n".join(lineage_lines(plans)))         # families by layer and stage, bounded whatever the model's size
    json.dumps(lineage_table(plans))               # all of it, for other programs
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from parallel.errors import ExpansionError
from upcycle.plan import ExpansionPlan, LayerPlan

# The ids of an expert and its ancestors, from its own stage back to stage 0.
Chain = tuple[int, ...]

# What `lineage_lines` shows unless it is asked for one layer: layers, and families of each layer in each stage.
MAX_LAYERS, MAX_FAMILIES = 4, 12
# Experts without copies on one line.
_PER_LINE = 12


def lineage(plans: Sequence[ExpansionPlan]) -> list[Mapping[int, tuple[Chain, ...]]]:
    """The ancestors of every expert of every stage.

    Args:
        plans: those of a run from its first stage on, in order; changes of layout belong to them.

    Returns:
        For each stage, the first included: layer number -> for each of its experts the chain of ids back to stage 0, so of
        stage + 1 numbers. Empty without plans.

    Raises:
        ExpansionError: if a plan is missing, of another run, or not whole.
    """
    if not plans:
        return []
    numbers = [layer.layer for layer in plans[0].layers]
    first = tuple((expert,) for expert in range(plans[0].experts_before))
    stages: list[Mapping[int, tuple[Chain, ...]]] = [dict.fromkeys(numbers, first)]
    experts = plans[0].experts_before
    for number, plan in enumerate(plans, start=1):
        if plan.stage != number:
            raise ExpansionError(
                f"the plan into stage {number} is missing: found that of stage {plan.stage} in its place"
            )
        if plan.experts_before != experts or [layer.layer for layer in plan.layers] != numbers:
            raise ExpansionError(
                f"the plan of step {plan.step} starts from {plan.experts_before} experts in layers "
                f"{[layer.layer for layer in plan.layers]}, but stage {number - 1} has {experts} in {numbers}: it is of "
                "another run"
            )
        check_whole(plan)
        before = stages[-1]
        stages.append(
            {
                layer.layer: tuple((new, *before[layer.layer][parent]) for new, parent in enumerate(layer.parents))
                for layer in plan.layers
            }
        )
        experts = plan.experts_after
    return stages


def check_whole(plan: ExpansionPlan) -> None:
    """Check that a plan names an expert of the stage before as parent of each new expert, in every layer.

    Where their number stays, in a change of layout, each expert must be its own parent: readers count on that.

    Raises:
        ExpansionError: naming the layer.
    """
    old = range(plan.experts_before)
    for layer in plan.layers:
        if len(layer.parents) != plan.experts_after or not all(isinstance(p, int) and p in old for p in layer.parents):
            raise ExpansionError(
                f"the plan of step {plan.step} does not say where every expert of layer {layer.layer} comes from"
            )
        if plan.experts_after == plan.experts_before and list(layer.parents) != list(old):
            raise ExpansionError(
                f"the plan of step {plan.step} adds no experts, but in layer {layer.layer} not all of them keep their ids"
            )


def families(parents: Sequence[int]) -> dict[int, list[int]]:
    """The new ids of each old expert that has any, ascending; the first of a family stands for the original.

    Args:
        parents: parent of each new expert, [M].
    """
    found: dict[int, list[int]] = {parent: [] for parent in sorted(set(parents))}
    for new, parent in enumerate(parents):
        found[parent].append(new)
    return found


def telling_layers(parents: Mapping[int, Sequence[Sequence[int]]]) -> tuple[list[int], str]:
    """Three layers that stand for many: the first, the one that grew most unevenly, the last.

    Where all grew equally unevenly, as under `uniform`, the one in the middle takes the place of the most uneven.

    Args:
        parents: layer number -> for each stage that began, the parent of each new expert.

    Returns:
        The layers, ascending, each once; and in words how they were chosen.
    """
    numbers = sorted(parents)
    uneven = {n: round(unevenness(parents[n]), 9) for n in numbers}
    if len(set(uneven.values())) == 1:
        third, words = numbers[len(numbers) // 2], "the first, the middle and the last one"
    else:
        third = max(numbers, key=lambda n: uneven[n])
        words = "the first, the last and the one that grew most unevenly"
    return sorted({numbers[0], third, numbers[-1]}), words


def unevenness(parents: Sequence[Sequence[int]]) -> float:
    """Variance of the descendants of each expert of the oldest stage over their mean squared; 0 where all have equally many.

    Args:
        parents: of one layer: for each stage that began, the parent of each new expert.
    """
    founders: Sequence[int] = range(1 + max(parents[0])) if parents else (0,)
    for stage in parents:
        founders = [founders[parent] for parent in stage]
    counts = [len(ids) for ids in families(founders).values()]
    mean = sum(counts) / len(counts)
    return sum((count - mean) ** 2 for count in counts) / len(counts) / mean**2


def lineage_table(plans: Sequence[ExpansionPlan], layer: int | None = None) -> dict[str, Any]:
    """The whole family tree in JSON-able form.

    Args:
        plans: as for `lineage`.
        layer: only this one; all by default.

    Returns:
        `stages`: number and experts of each, the first included, with the step, rules and digest of the plan it began
        with. `layers`: for each layer `chains`, of every expert of the last stage the ids from there back to stage 0, and
        `utilities`, those of all experts before each plan, null where its rule needs none. No layers without plans.

    Raises:
        ExpansionError: as `lineage`, or if there is no such layer.
    """
    stages = lineage(plans)
    if not plans:
        return {"stages": [], "layers": []}
    entries: list[dict[str, Any]] = [{"stage": 0, "experts": plans[0].experts_before}]
    for plan in plans:
        entries.append(
            {
                "stage": plan.stage,
                "experts": plan.experts_after,
                "step": plan.step,
                "selection": dict(plan.selection),
                "placement": plan.placement.get("rule"),
                "digest": plan.digest,
            }
        )
    layers = []
    for number in _asked(plans, layer):
        scores = [plan.layer(number).scores for plan in plans]
        layers.append(
            {
                "layer": number,
                "chains": [list(chain) for chain in stages[-1][number]],
                "utilities": [None if values is None else list(values) for values in scores],
            }
        )
    return {"stages": entries, "layers": layers}


def lineage_lines(plans: Sequence[ExpansionPlan], layer: int | None = None) -> list[str]:
    """The family tree for a terminal: stage by stage and layer by layer, each family as `parent -> new ids`.

    Largest families come first, of equals those of the highest utility. Of many layers the telling ones are shown
    (`telling_layers`), and of each the largest families; what is left out is counted.

    Args:
        plans: as for `lineage`.
        layer: show this one, and all of it.

    Raises:
        ExpansionError: as `lineage`, or if there is no such layer.
    """
    stages = lineage(plans)
    if not plans:
        return ["no plans: the experts are those of the first stage"]
    shown, words = _asked(plans, layer), ""
    count = len(shown)
    if count > MAX_LAYERS:
        shown, words = telling_layers({n: [plan.layer(n).parents for plan in plans] for n in shown})
    lines = []
    for plan, before in zip(plans, stages, strict=False):
        head = f"stage {plan.stage}, after step {plan.step}: "
        if plan.experts_after == plan.experts_before:
            lines.append(f"{head}change of layout, the {plan.experts_after} experts keep their ids")
            continue
        if plan.dense is not None:
            shards = "the feed-forward" if plan.experts_before == 1 else f"{plan.experts_before} shards"
            lines.append(f"{head}{shards} of a dense model -> {plan.experts_after} experts ({plan.dense.method})")
            for number in shown:
                lines += _layer_lines(plan.layer(number), before[number], bounded=layer is None)
            continue
        rule = str(plan.selection.get("rule", "selection not recorded"))
        rule += f" by {plan.selection['utility']}" if "utility" in plan.selection else ""
        place = plan.placement.get("rule", "not recorded")
        lines.append(f"{head}{plan.experts_before} -> {plan.experts_after} experts ({rule}, placement {place})")
        for number in shown:
            lines += _layer_lines(plan.layer(number), before[number], bounded=layer is None)
    if len(shown) < count:
        lines.append(f"left out: {count - len(shown)} of {count} layers; shown: {words}")
    return lines


def _asked(plans: Sequence[ExpansionPlan], layer: int | None) -> list[int]:
    """The layers asked for.

    Raises:
        ExpansionError: if there is no such layer.
    """
    numbers = [each.layer for each in plans[0].layers] if plans else []
    if layer is None or not plans:
        return numbers
    if layer not in numbers:
        raise ExpansionError(f"no layer {layer} in the plans: the layers with experts are {_ids_text(numbers)}")
    return [layer]


def _layer_lines(layer: LayerPlan, before: Sequence[Chain], *, bounded: bool) -> list[str]:
    """The families of one layer in one stage: those that grew a line each, those that did not together."""
    found = families(layer.parents)
    scores = layer.scores or (0.0,) * len(before)
    grown = sorted((p for p in found if len(found[p]) > 1), key=lambda p: (-len(found[p]), -scores[p], p))
    single = [p for p in found if len(found[p]) == 1]
    shown = grown[:MAX_FAMILIES] if bounded else grown
    lines = [f"  layer {layer.layer}: {len(grown)} of {len(before)} experts copied"]
    for parent in shown:
        text = f"    {parent} -> {_ids_text(found[parent])}"
        if layer.scores is not None:
            text += f"  utility {layer.scores[parent]:.3g}"
        if len(before[parent]) > 1:
            text += f"  was {before[parent][-1]} in stage 0"
        lines.append(text)
    if len(shown) < len(grown):
        sizes = sorted({len(found[p]) for p in grown[len(shown) :]})
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        lines.append(f"    and {len(grown) - len(shown)} more families of {size}")
    pairs = [f"{p} -> {found[p][0]}" for p in single]
    rows = [", ".join(pairs[i : i + _PER_LINE]) for i in range(0, len(pairs), _PER_LINE)]
    if rows and bounded and len(rows) > 1:
        rows = [f"{rows[0]} and {len(pairs) - _PER_LINE} more"]
    return lines + [f"    {'not copied:' if i == 0 else '           '} {row}" for i, row in enumerate(rows)]


def _ids_text(ids: Sequence[int]) -> str:
    """Ascending ids, with three or more neighbours as a range: `2, 5-9, 12`."""
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1] + 1]
    parts: list[str] = []
    for start, end in pairwise([*starts, len(ids)]):
        run = ids[start:end]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(i) for i in run]
    return ", ".join(parts)
