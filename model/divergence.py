"""How far the copies of an expert have moved apart since the expansion.

Definition: for a replica and the first of its family, 1 - cosine of their weights, estimated on a fixed random sample of
coordinates per expert matrix (the same for all experts). 0 right after the expansion; grows as copies specialise.
"""

from collections.abc import Mapping, Sequence

import torch
from megatron.core.models.gpt import GPTModel

from model.build import expert_rows, moe_parts
from parallel.layout import Layout

_SAMPLE = 1024


def _coordinates(numel: int) -> torch.Tensor:
    """Fixed random coordinates of a matrix with `numel` elements."""
    if numel <= _SAMPLE:
        return torch.arange(numel)
    return torch.randint(numel, (_SAMPLE,), generator=torch.Generator().manual_seed(numel))


def sibling_divergence(
    chunks: list[GPTModel], layout: Layout, parents: Mapping[int, Sequence[int]]
) -> dict[str, float] | None:
    """Mean, largest and smallest divergence over all replicas; collective, equal on all ranks.

    Args:
        chunks: bare model chunks.
        layout: parallel layout.
        parents: layer number -> parent of each expert, [M], in any order; a family is all with one parent.

    Returns:
        None where no expert has a copy.
    """
    numbers = sorted(parents)
    if not numbers:
        return None
    experts = len(parents[numbers[0]])
    parts = moe_parts(chunks)
    # Room for two matrices and their biases per expert, per expert-tensor rank.
    width = 4 * _SAMPLE
    values_LMC = torch.zeros(len(numbers), experts, width * layout.groups.expt_tp.size(), device=layout.device)
    if layout.groups.expt_dp.rank() == 0:
        for part in parts:
            row, used = numbers.index(part.number), [0] * experts
            for p, first, count in expert_rows(part, layout):
                flat = p.detach().reshape(count, -1)
                sample = flat[:, _coordinates(flat.shape[1]).to(flat.device)].float()
                for i in range(count):
                    start = layout.groups.expt_tp.rank() * width + used[first + i]
                    values_LMC[row, first + i, start : start + sample.shape[1]] = sample[i]
                    used[first + i] += sample.shape[1]
    layout.sum_over_world(values_LMC)
    divergences = []
    for row, number in enumerate(numbers):
        family = parents[number]
        firsts: dict[int, int] = {}
        for new in range(experts):
            first = firsts.setdefault(family[new], new)
            if first != new:
                pair = values_LMC[row, [first, new]].double()
                divergences.append(1 - torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=0).item())
    if not divergences:
        return None
    return {"mean": sum(divergences) / len(divergences), "max": max(divergences), "min": min(divergences)}
