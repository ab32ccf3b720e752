"""How many tokens each expert gets, counted where the router decides, and the few figures that summarise it.

Definitions (per MoE layer, over all tokens of a step on all ranks): load of an expert = token slots routed to it; share =
load / sum of loads. Even routing has every share at 1/E.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from model.build import MoEPart
from parallel.layout import Layout


class ExpertLoad:
    """Counts routed token slots per expert through forward hooks on the routers.

    Args:
        parts: MoE layers on this rank.
        layer_numbers: numbers (from 1) of all MoE layers of the network.
        num_experts: experts per MoE layer.
        device: where this rank computes, also if it holds no MoE layer.
    """

    def __init__(
        self, parts: list[MoEPart], layer_numbers: tuple[int, ...], num_experts: int, device: torch.device
    ) -> None:
        self.layer_numbers = layer_numbers
        self._rows = {number: row for row, number in enumerate(layer_numbers)}
        self._counts_LE = torch.zeros(len(layer_numbers), max(1, num_experts), dtype=torch.int64, device=device)
        self._parts = parts
        self._hooks: list[Any] = []
        # Sum over tokens of the entropy of the router's scores / log E, and the tokens, per layer.
        self._entropy_2L = torch.zeros(2, len(layer_numbers), dtype=torch.float64, device=device)
        self._watches = False
        self.attach()

    def attach(self) -> None:
        """Start counting."""
        self._hooks = [
            part.layer.router.register_forward_hook(self._hook(self._rows[part.number])) for part in self._parts
        ]

    def _hook(self, row: int) -> Any:
        def count(module: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            # Evaluation must not mix into the load of training; recomputation counts twice, which leaves shares alone.
            if module.training:
                self._counts_LE[row] += outputs[1].sum(dim=0)
                if self._watches:
                    self._add_entropy(row, module, inputs[0])

        return count

    def watch_router(self, on: bool) -> None:
        """Measure the entropy of the router's scores from now on, or no longer; what was measured is forgotten."""
        self._watches = on
        self._entropy_2L.zero_()

    @torch.no_grad()
    def _add_entropy(self, row: int, router: Any, hidden: torch.Tensor) -> None:
        """Count the tokens of a forward pass.

        Args:
            row: of the layer.
            router: mcore's router.
            hidden: its input, [S, B, H].
        """
        logits_TE = router.gating(hidden).float().flatten(0, -2)
        if router.score_function == "softmax":
            scores_TE = logits_TE.softmax(dim=-1)
        else:
            scores_TE = logits_TE.sigmoid()
            scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        entropy_T = torch.special.entr(scores_TE).sum(dim=-1)
        self._entropy_2L[0, row] += entropy_T.double().sum() / math.log(scores_TE.shape[1])
        self._entropy_2L[1, row] += len(entropy_T)

    def router_entropy(self) -> torch.Tensor:
        """This rank's sums since `watch_router`, [2, L] fp64: of the entropy / log E over tokens, and of the tokens."""
        return self._entropy_2L.clone()

    def take(self, layout: Layout) -> torch.Tensor:
        """Share of each expert since the last call, [L, E] fp64 on the CPU, rows summing to 1; equal on all ranks."""
        counts_LE = layout.sum_over_world(self._counts_LE.clone()).double().cpu()
        self._counts_LE.zero_()
        return counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)

    def reset(self) -> None:
        """Forget what was counted."""
        self._counts_LE.zero_()

    def remove(self) -> None:
        """Stop counting and detach the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def count_exactly(parts: list[MoEPart]) -> None:
    """Keep the counters of loss-free balancing in fp32, after Float16Module has made bf16 of them.

    mcore adds each micro-batch's tokens to them and sums them over ranks. bf16 counts to 256: above it small numbers of
    tokens are rounded, and in the end lost, and the bias moves by what is left. The update rate is rounded as well.
    """
    for part in parts:
        counts = part.layer.router.local_tokens_per_expert
        if counts is not None:
            counts.data = counts.data.float()


@contextlib.contextmanager
def restored_counters(parts: list[MoEPart]) -> Iterator[None]:
    """Put the routers' buffers back after a block: looking must leave load balancing as it was."""
    kept = {buffer: buffer.clone() for part in parts for buffer in part.layer.router.buffers()}
    try:
        yield
    finally:
        for buffer, value in kept.items():
            buffer.copy_(value)


def load_figures(
    share_LE: torch.Tensor, top_k: int, parents: Sequence[Sequence[int]] | None = None
) -> dict[str, float]:
    """The bounded figures of a load matrix.

    Args:
        share_LE: [L, E] shares, rows summing to 1.
        top_k: experts chosen per token.
        parents: [L][E] parent of each expert at the last expansion; None before any.

    Returns:
        `expert_load_max` and `expert_load_min`: largest and smallest share over its even share (neutral 1);
        `expert_load_p10`, `_p50`, `_p90`: percentiles of the same over experts and layers;
        `expert_load_top` and `expert_load_bottom`: mean of the top_k largest (smallest) of a layer, mean over layers;
        `expert_load_entropy`: mean over layers of entropy / log E (1 is even); `dead_experts`: (layer, expert) pairs
        without a token; after an expansion also `dead_replicas`: those of them that have a sibling (neutral 0), and
        `family_load_max`, `family_load_min`: largest and smallest share of a family over 1 / families.
    """
    if share_LE.numel() == 0:
        return {}
    experts = share_LE.shape[1]
    dead_LE = share_LE == 0
    of_families = {}
    if parents is not None:
        parents_LE = torch.tensor(parents)
        families_LE = torch.zeros_like(share_LE).scatter_add(1, parents_LE, share_LE)
        families = int(parents_LE.max()) + 1
        sizes_LE = torch.zeros_like(parents_LE).scatter_add(1, parents_LE, torch.ones_like(parents_LE))
        of_families = {
            "dead_replicas": int((dead_LE & (sizes_LE.gather(1, parents_LE) > 1)).sum()),
            "family_load_max": (families_LE.max() * families).item(),
            "family_load_min": (families_LE[:, :families].min() * families).item(),
        }
    sorted_LE = share_LE.sort(dim=1).values * experts
    percentiles = torch.quantile(sorted_LE.flatten(), torch.tensor([0.1, 0.5, 0.9], dtype=share_LE.dtype)).tolist()
    entropy_L = -(share_LE * share_LE.clamp(min=1e-30).log()).sum(dim=1)
    return {
        "expert_load_max": (share_LE.max() * experts).item(),
        "expert_load_min": (share_LE.min() * experts).item(),
        **dict(zip(("expert_load_p10", "expert_load_p50", "expert_load_p90"), percentiles, strict=True)),
        "expert_load_top": sorted_LE[:, -top_k:].mean().item(),
        "expert_load_bottom": sorted_LE[:, :top_k].mean().item(),
        "expert_load_entropy": (entropy_L.mean() / torch.log(torch.tensor(float(experts)))).item(),
        "dead_experts": int(dead_LE.sum()),
        **of_families,
    }
