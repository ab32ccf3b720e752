"""Which expert came from which, back to the first stage: the plans of a run, chained. Pure Python on global expert ids.

A checkpoint's manifest and `plans/` hold one plan per stage that began; together they are the family tree of every expert.

    for layer, chains in lineage(plans)[-1].items():
        chains[5]                                  # (5, 2, 1): expert 5 of stage 2 was 2 in stage 1 and 1 in stage 0
"""

from collections.abc import Mapping, Sequence

from parallel.errors import ExpansionError
from upcycle.plan import ExpansionPlan

# The ids of an expert and its ancestors, from its own stage back to stage 0.
Chain = tuple[int, ...]


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
        grown = {}
        for layer in plan.layers:
            if len(layer.parents) != plan.experts_after or not all(0 <= p < experts for p in layer.parents):
                raise ExpansionError(
                    f"the plan of step {plan.step} does not say where every expert of layer {layer.layer} comes from"
                )
            before = stages[-1][layer.layer]
            grown[layer.layer] = tuple((new, *before[parent]) for new, parent in enumerate(layer.parents))
        stages.append(grown)
        experts = plan.experts_after
    return stages
