"""How far the copies of an expert have moved apart since the expansion: in weights, in Adam's first moments, in routing.

Definition: for a replica and the first of its family, the cosine of their vectors, estimated on a fixed random sample of
coordinates per expert matrix (the same for all experts). Divergence is 1 - cosine: 0 right after the expansion; it grows
as copies specialise. The routing agreement is the cosine of their router rows: while it is 1, the router cannot tell
them apart but by their biases.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from model.build import MoEPart, expert_rows, moe_parts
from parallel.layout import Layout
from parallel.optimizer_state import optimizer_views

_SAMPLE = 1024

# Elements `start`, `start + 1`, ... of a flattened parameter.
_Piece = tuple[torch.Tensor, int]
Spread = dict[str, float]


def _coordinates(numel: int) -> torch.Tensor:
    """Fixed random coordinates of a matrix with `numel` elements."""
    if numel <= _SAMPLE:
        return torch.arange(numel)
    return torch.randint(numel, (_SAMPLE,), generator=torch.Generator().manual_seed(numel))


def _sampled(pieces: Sequence[_Piece], rows: int, row_numel: int) -> torch.Tensor:
    """What lies in some pieces of a parameter at the sampled coordinates of its rows, [rows, S] fp32, zero elsewhere."""
    device = pieces[0][0].device
    places = torch.arange(rows)[:, None] * row_numel + _coordinates(row_numel)
    places, values = places.to(device), torch.zeros(places.shape, device=device)
    for tensor, start in pieces:
        inside = (places >= start) & (places < start + tensor.numel())
        values[inside] = tensor.detach().reshape(-1)[places[inside] - start].float()
    return values


class Siblings:
    """The families of the last expansion, compared.

    Args:
        chunks: bare model chunks.
        layout: parallel layout.
        parents: layer number -> parent of each expert, [M], in any order; a family is all with one parent.
    """

    def __init__(self, chunks: list[GPTModel], layout: Layout, parents: Mapping[int, Sequence[int]]) -> None:
        self._parts, self._layout, self._parents = moe_parts(chunks), layout, parents
        self._numbers = sorted(parents)
        self._experts = len(parents[self._numbers[0]]) if parents else 0

    def figures(self, optimizer: Any) -> dict[str, Spread | None]:
        """All comparisons; collective, equal on all ranks.

        Args:
            optimizer: that of the model.

        Returns:
            `sibling_divergence` (weights), `sibling_moment_divergence` (Adam's first moments) and `routing_agreement`
            (router rows): mean, max and min over replicas and layers; None where no expert has a copy, and for moments
            where they are zero.
        """
        agreement = self._cosines(self._router_rows())
        return {
            "sibling_divergence": self.weights(),
            "sibling_moment_divergence": _spread([1 - c for c in self._cosines(self._moments(optimizer))]),
            "routing_agreement": _spread(agreement),
        }

    def weights(self) -> Spread | None:
        """Divergence of the weights; collective."""
        return _spread([1 - c for c in self._cosines(self._weights())])

    def _weights(self) -> torch.Tensor:
        speaks = self._layout.groups.expt_dp.rank() == 0
        pieces = {id(p): [(p, 0)] for part in self._parts for p in part.layer.experts.parameters() if speaks}
        return self._expert_vectors(pieces)

    def _moments(self, optimizer: Any) -> torch.Tensor:
        pieces: dict[int, list[_Piece]] = {}
        for view in optimizer_views(optimizer):
            if "exp_avg" in view.tensors and (view.sharded or self._layout.groups.expt_dp.rank() == 0):
                pieces.setdefault(id(view.param), []).append((view.tensors["exp_avg"], view.start))
        return self._expert_vectors(pieces)

    def _grown(self) -> Iterator[tuple[int, MoEPart]]:
        """Row and part of the layers here that have families."""
        for part in self._parts:
            if part.number in self._parents:
                yield self._numbers.index(part.number), part

    def _expert_vectors(self, pieces: Mapping[int, Sequence[_Piece]]) -> torch.Tensor:
        """Samples of every expert, [L, M, S] fp32, the same on all ranks; collective.

        Args:
            pieces: what this rank gives of each parameter, by its id.
        """
        groups = self._layout.groups
        # Room for two matrices and their biases per expert, per expert-tensor rank.
        width = 4 * _SAMPLE
        shape = (len(self._numbers), self._experts, width * groups.expt_tp.size())
        values_LMC = torch.zeros(shape, device=self._layout.device)
        for row, part in self._grown():
            used = [groups.expt_tp.rank() * width] * self._experts
            for p, first, count in expert_rows(part, self._layout):
                row_numel, start = p.numel() // count, used[first]
                size = min(row_numel, _SAMPLE)
                used[first : first + count] = [start + size] * count
                if id(p) in pieces:
                    sample = _sampled(pieces[id(p)], count, row_numel)
                    values_LMC[row, first : first + count, start : start + size] = sample
        return self._layout.sum_over_world(values_LMC)

    def _router_rows(self) -> torch.Tensor:
        """Sampled router rows, [L, M, S] fp32, the same on all ranks; collective."""
        groups = self._layout.groups
        hidden = self._parts[0].layer.config.hidden_size if self._parts else 0
        size = int(self._layout.max_over_world(torch.tensor(min(hidden, _SAMPLE), device=self._layout.device)))
        values_LMC = torch.zeros(len(self._numbers), self._experts, size, device=self._layout.device)
        if groups.tp.rank() == 0 and groups.dp_cp.rank() == 0:
            for row, part in self._grown():
                weight = part.layer.router.weight
                values_LMC[row] = _sampled([(weight, 0)], self._experts, weight.shape[1])
        return self._layout.sum_over_world(values_LMC)

    def _cosines(self, values_LMC: torch.Tensor) -> list[float]:
        """Cosine of each replica to the first of its family, where neither vector is zero."""
        pairs = []
        for row, number in enumerate(self._numbers):
            firsts: dict[int, int] = {}
            for new, parent in enumerate(self._parents[number]):
                first = firsts.setdefault(parent, new)
                if first != new:
                    pairs.append(values_LMC[row, [first, new]])
        if not pairs:
            return []
        stacked = torch.stack(pairs).double()
        cosines = torch.nn.functional.cosine_similarity(stacked[:, 0], stacked[:, 1], dim=1)
        there = (stacked.square().sum(dim=2) > 0).all(dim=1)
        found: list[float] = cosines[there].tolist()
        return found


def _spread(values: Sequence[float]) -> Spread | None:
    return {"mean": sum(values) / len(values), "max": max(values), "min": min(values)} if values else None
