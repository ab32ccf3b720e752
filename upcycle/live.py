"""The live path of an expansion: the training state goes from the old stage to the new one in memory.

The same plan and the same result, bit for bit, as the checkpoint path (`upcycle/transform.py`): rows of every tensor that
runs over experts are copied from their parents, everything else keeps its place, and the selection bias of replicas gets
its noise.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from model.build import moe_parts
from model.holdings import StageState, wave_of
from parallel.layout import Layout
from parallel.redistribute import Redistribution, redistribute
from upcycle.plan import ExpansionPlan
from upcycle.transform import bias_noise


def move_state(
    old: StageState,
    new: StageState,
    plan: ExpansionPlan,
    experts: Mapping[str, Mapping[str, Any]],
    layout: Layout,
    *,
    chunk_bytes: int,
) -> Redistribution:
    """Fill the larger stage from the smaller one; collective over all ranks.

    Args:
        old: the smaller stage; its memory is freed on the way if `free_as_it_goes` was called.
        new: the larger stage, blank.
        plan: the expansion, the same on every rank.
        experts: checkpoint keys with an expert axis (`model.sharded_state.expert_keys`).
        layout: the layout of the larger stage.
        chunk_bytes: staging memory per rank and direction.

    Raises:
        ExpansionError: on all ranks, if the two stages do not fit together or a rank fails.
    """
    parents = {layer.layer: layer.parents for layer in plan.layers}

    def rows(key: str) -> tuple[int, ...] | None:
        known = experts.get(key.split("/", 1)[1])
        return parents[known["layer"]] if known else None

    with torch.no_grad():
        return redistribute(old, new, rows, wave_of, layout, chunk_bytes=chunk_bytes)


def add_bias_noise(chunks: list[GPTModel], plan: ExpansionPlan) -> None:
    """Add the plan's noise to the selection bias of replicas, on every rank alike."""
    if plan.bias_noise == 0 or plan.experts_after == plan.experts_before:
        return
    for part in moe_parts(chunks):
        bias = part.layer.router.expert_bias
        if bias is not None:
            bias += bias_noise(plan, plan.layer(part.number)).to(bias)
