"""The families of one MoE layer, and who stands for a family at a token.

After an expansion the experts of a layer come in families: copies of one parent. Family routing asks, for every token
and family, which member is the family's *representative*: the one with the best selection score. Right after the switch
members are exact copies and tie; ties go by the token's position in its sequence, so they split evenly, without random
numbers, alike in every layout and again alike when activations are recomputed.

Shapes: T tokens, S positions of a sequence on this rank, B sequences, E families, M experts, G families of more than one
member, R members of the largest family.
"""

from collections.abc import Sequence

import torch

from parallel.errors import ExpansionError

# Selection scores closer than this count as equal: above what one matrix product makes of two equal rows (a few units in
# the last place of a logit), far below one step of loss-free balancing (1e-3).
TIE = 2.0**-14
# A Kronecker sequence: positions times an irrational number, modulo 1. The golden ratio spreads a run of n positions evenly
# but for O(log n) of them, two at most in the lengths tested, and resonates with no period of the text.
_GOLDEN = 0.6180339887498949
# Families and layers start at different points, so that siblings of one rank do not meet the same tokens everywhere.
_FAMILY_STEP = 0.7548776662466927
_LAYER_STEP = 0.5698402909980532


def sequence_positions(
    length: int, *, tensor: tuple[int, int] = (0, 1), context: tuple[int, int] = (0, 1)
) -> torch.Tensor:
    """Positions in the whole sequence of the tokens that this rank routes, [S] int64.

    Context parallelism gives rank c of C the chunks c and 2C-1-c of 2C (mcore's `get_batch_on_this_cp_rank`); sequence
    parallelism then cuts what a rank has into consecutive pieces.

    Args:
        length: S, tokens per sequence on this rank.
        tensor: (rank, size) of the group that splits sequences under sequence parallelism; (0, 1) without it.
        context: (rank, size) of the context-parallel group.
    """
    share = length * tensor[1]
    if context[1] == 1 or share % 2:
        mine = torch.arange(share) + context[0] * share
    else:
        chunk = share // 2
        mine = torch.cat([torch.arange(chunk) + part * chunk for part in (context[0], 2 * context[1] - 1 - context[0])])
    return mine[tensor[0] * length : (tensor[0] + 1) * length]


class Families:
    """Lookup tables of one layer's families.

    Args:
        parents: [M] parent of each expert, its id in the stage before: 0 to E-1, every one at least once, in any order.
        layer: number of the layer; shifts how ties split.
        device: of the router.

    Attributes:
        parents: [M], as given.
        count: E.
        sizes: [E] members of each family.

    Raises:
        ExpansionError: if a parent between 0 and E-1 has no copy.
    """

    def __init__(self, parents: Sequence[int], layer: int, device: torch.device) -> None:
        self.parents = tuple(parents)
        self.count = max(parents) + 1
        self.layer = layer
        members: list[list[int]] = [[] for _ in range(self.count)]
        for expert, parent in enumerate(parents):
            members[parent].append(expert)
        for parent, family in enumerate(members):
            if not family:
                raise ExpansionError(f"layer {layer}: parent {parent} has no copy; a family has one member at least")
        self.sizes = tuple(len(family) for family in members)
        grown = [family for family in members if len(family) > 1]
        width = max(self.sizes)
        self._width = width
        self.parents_M = torch.tensor(parents, device=device)
        self._first_E = torch.tensor([family[0] for family in members], device=device)
        self._grown_G = torch.tensor([e for e in range(self.count) if self.sizes[e] > 1], device=device)
        # Short families are filled up with their first member, which `_bonus` keeps from winning twice.
        padded = [family + family[:1] * (width - len(family)) for family in grown]
        self._members = torch.tensor(padded, dtype=torch.int64, device=device).flatten()
        self._starts_G = torch.arange(len(grown), device=device) * width
        self._in_order = self._members.tolist() == list(range(len(parents)))
        self._bonus: dict[tuple[int, ...], torch.Tensor] = {}

    def representatives(self, selection_SBM: torch.Tensor, **rank: tuple[int, int]) -> torch.Tensor:
        """The expert that stands for each family at each token, [T, E] int64; a row names no expert twice.

        Args:
            selection_SBM: [S, B, M] selection scores in fp32 or wider.
            **rank: see `sequence_positions`.
        """
        length, batch, _ = selection_SBM.shape
        tokens = length * batch
        groups = len(self._grown_G)
        if not groups:
            return self._first_E.expand(tokens, -1)
        members = selection_SBM if self._in_order else selection_SBM.index_select(2, self._members)
        scores_SBGR = members.view(length, batch, groups, self._width) + self._tie_bonus(length, rank)
        if self._width == 2:  # argmax over two is slow on CPU
            slots_TG = (scores_SBGR[..., 1] > scores_SBGR[..., 0]).view(tokens, groups).long()
        else:
            slots_TG = scores_SBGR.argmax(-1).view(tokens, groups)
        chosen_TG = self._members.take(slots_TG + self._starts_G)
        if groups == self.count:
            return chosen_TG
        return self._first_E.repeat(tokens, 1).index_copy_(1, self._grown_G, chosen_TG)

    def _tie_bonus(self, length: int, rank: dict[str, tuple[int, int]]) -> torch.Tensor:
        """[S, 1, G, R] fp32: at most TIE for the member whose turn it is at a position, less for those after it."""
        key = (length, *(number for name in sorted(rank) for number in rank[name]))
        if key not in self._bonus:
            grown = [size for size in self.sizes if size > 1]
            sizes_G1 = torch.tensor(grown)[:, None]
            start_G = torch.tensor([e * _FAMILY_STEP for e in range(self.count) if self.sizes[e] > 1]).double()
            phase_SG = sequence_positions(length, **rank)[:, None].double() * _GOLDEN + start_G
            turn_SG = ((phase_SG + self.layer * _LAYER_STEP).frac() * sizes_G1.T).long()
            slot_R = torch.arange(self._width)
            after_SGR = (slot_R - turn_SG[..., None]) % sizes_G1
            bonus_SGR = (TIE * (1 - after_SGR / sizes_G1)).masked_fill(slot_R >= sizes_G1, float("-inf"))
            # A run has few shapes: one for training, one for a last short batch.
            if len(self._bonus) > 8:
                self._bonus.clear()
            self._bonus[key] = bonus_SGR[:, None].to(self.parents_M.device)
        return self._bonus[key]

    def total(self, values_TM: torch.Tensor) -> torch.Tensor:
        """Sum over the members of each family, [T, E]; differentiable."""
        return values_TM.new_zeros(len(values_TM), self.count).index_add(1, self.parents_M, values_TM)

    def spread(self, values_TE: torch.Tensor, weights_TM: torch.Tensor) -> torch.Tensor:
        """Divide what each family has among its members by their weights, [T, M]; differentiable.

        Args:
            values_TE: of the families.
            weights_TM: positive; only their ratios inside a family matter. Equal ones give equal parts.
        """
        part_TE = values_TE / (self.total(weights_TM) + 1e-20)
        return weights_TM * part_TE.index_select(1, self.parents_M)
