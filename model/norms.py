"""L2 norms of gradients and of parameters, by what the parameters are for.

The groups are the same for every network, so the number of figures is bounded; those a network lacks are left out.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from model.build import moe_parts
from parallel.layout import Layout
from parallel.optimizer_state import OptimizerView, optimizer_views

GROUPS = ("embedding", "attention", "router", "experts", "shared_experts", "dense_mlp", "norms", "output")
# The first that occurs in a parameter's name decides. A norm inside attention is a norm.
_MARKS = (
    ("layernorm", "norms"),
    # Transformer Engine's, part of the linear layer after it.
    (".layer_norm_", "norms"),
    (".self_attention.", "attention"),
    (".mlp.router.", "router"),
    (".mlp.experts.", "experts"),
    (".mlp.shared_experts.", "shared_experts"),
    (".mlp.", "dense_mlp"),
    ("embedding.", "embedding"),
    ("output_layer.", "output"),
)


def group_of(name: str) -> str:
    """The group of a parameter by its name in the module tree.

    Raises:
        ValueError: for a name that fits none.
    """
    for mark, group in _MARKS:
        if mark in name:
            return group
    raise ValueError(f"parameter {name} is in no group of model/norms.py: add its mark")


class NormMeter:
    """Norms of one stage over all ranks.

    Args:
        chunks: bare model chunks; they are not kept.
        layout: their layout.
    """

    def __init__(self, chunks: list[GPTModel], layout: Layout) -> None:
        self._layout = layout
        self._groups = {id(p): GROUPS.index(group_of(name)) for chunk in chunks for name, p in chunk.named_parameters()}
        self._experts = {id(p) for part in moe_parts(chunks) for p in part.layer.experts.parameters()}

    def _counted(self, optimizer: Any) -> Iterator[tuple[int, OptimizerView]]:
        """The state that this rank counts, so that each element counts once over the world, with its group."""
        groups = self._layout.groups
        for view in optimizer_views(optimizer):
            p = view.param
            expert = id(p) in self._experts
            tensor_rank = (groups.expt_tp if expert else groups.tp).rank()
            data_rank = (groups.expt_dp if expert else groups.dp_cp).rank()
            split = bool(getattr(p, "tensor_model_parallel", False))
            once = (split or tensor_rank == 0) and (view.sharded or data_rank == 0)
            # The output's copy of a tied embedding, on the last pipeline stage, is the embedding's.
            if once and not getattr(p, "shared", False):
                yield self._groups[id(p)], view

    @torch.no_grad()
    def squares(self, optimizer: Any) -> torch.Tensor:
        """This rank's sums of squares; their sum over the world is that of the whole network.

        Args:
            optimizer: that of the model, right after a step.

        Returns:
            [2, groups] fp64 on the device: of the step's gradients as the optimizer took them (clipped), and of the fp32
            parameters.
        """
        device = self._layout.device
        found: list[dict[int, list[torch.Tensor]]] = [{}, {}]
        for group, view in self._counted(optimizer):
            if view.key.grad is not None:
                found[0].setdefault(group, []).append(view.key.grad)
            found[1].setdefault(group, []).append(view.tensors["param"].detach())
        totals = torch.zeros(2, len(GROUPS), dtype=torch.float64, device=device)
        for row, tensors_of in enumerate(found):
            for group, tensors in tensors_of.items():
                norms = torch.stack(torch._foreach_norm(tensors))
                totals[row, group] = norms.double().square().sum()
        return totals


def norm_figures(squares: torch.Tensor, clipped_by: float | None) -> dict[str, float | None]:
    """`grad_norm_GROUP`, before clipping, and `param_norm_GROUP` of the groups that the network has.

    Args:
        squares: [2, groups] over the world, as `NormMeter.squares` gives a rank's.
        clipped_by: factor that clipping put on the gradients; 1 where it did nothing, None for a step that was skipped,
            whose gradients nobody took.
    """
    figures: dict[str, float | None] = {}
    gradients, parameters = squares.sqrt().tolist()
    for group, gradient, parameter in zip(GROUPS, gradients, parameters, strict=True):
        if parameter > 0:
            figures[f"grad_norm_{group}"] = gradient / clipped_by if clipped_by else None
            figures[f"param_norm_{group}"] = parameter
    return figures


def clip_factor(norm: float, limit: float) -> float | None:
    """What mcore multiplies gradients with to clip them: limit / (norm + 1e-6) where that is below 1; no limit is 0.

    None where the norm is not finite: the step was skipped.
    """
    if not math.isfinite(norm):
        return None
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
