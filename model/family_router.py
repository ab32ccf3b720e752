"""mcore's router with families: top-K over families, one replica inside each, let go of step by step.

At release 0 the function is the smaller model's: mcore's own top-K runs on one column per family, that of its
representative. At release 1 it is mcore's plain top-K over all experts, bit for bit. In between every expert competes,
and the odds of those that do not represent their family are scaled by the release. What is decided here and why:
docs/exact-mode.md. To use it: `model/family_routing.py`.

Shapes: T tokens, S positions, B sequences, E families (experts before the switch), M experts, K top-k.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter

from model.families import Families


class FamilyRouter(TopKRouter):
    """mcore's TopKRouter with families. Made from a plain router by `taking_over`, never by its constructor.

    Attributes:
        families: of this layer.
        release: 0 routes over families, 1 is plain top-K, bit for bit mcore's.
    """

    families: Families
    release: float
    # Share of all token slots that balancing gives each expert, [M] fp32, summing to 1; None where it is even.
    _share_M: torch.Tensor | None
    # The largest of them times M.
    _largest_share: float

    @classmethod
    def taking_over(cls, router: TopKRouter, families: Families) -> "FamilyRouter":
        """A family router with the parameters, buffers and hooks of a plain one, which must not be used any more."""
        new = cls.__new__(cls)
        new.__dict__.update(router.__dict__)
        new.families = families
        new.let_go(0.0)
        return new

    def plain(self) -> TopKRouter:
        """mcore's router with the parameters, buffers and hooks of this one, which must not be used any more."""
        router = TopKRouter.__new__(TopKRouter)
        router.__dict__.update({k: v for k, v in self.__dict__.items() if k not in FamilyRouter.__annotations__})
        return router

    def let_go(self, fraction: float) -> None:
        """Set the release, in [0, 1], and the load that balancing aims at.

        Even over families and even inside each under family routing, where the smaller model's balancing stood; even over
        experts at the end; in between the mean of the two.
        """
        self.release = float(fraction)
        families = self.families
        experts, even = len(families.parents), len(set(families.sizes)) == 1
        shares = [
            (1 - self.release) / (families.count * families.sizes[parent]) + self.release / experts
            for parent in families.parents
        ]
        self._share_M = None if even else torch.tensor(shares, device=self.weight.device)
        self._largest_share = max(shares) * experts

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts and gates.

        Args:
            logits: [S, B, M] of the gate.
            padding_mask: [S, B] bool, as in mcore.

        Returns:
            Gates [T, M] and the map of chosen experts [T, M] bool, T = S x B.
        """
        if self.release == 1.0:
            return super().routing(logits, padding_mask)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        chosen_TE = self.families.representatives(self._selection(logits), **self._rank())
        logits_TM = logits.view(-1, logits.shape[-1])
        route = self._over_families if self.release == 0.0 else self._while_released
        probs, routing_map = route(logits_TM, chosen_TE, padding_mask, logits.shape[:2])
        counted = routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]
        self._apply_expert_bias(counted)
        self._aim_balancing(counted)
        return probs, routing_map

    @torch.no_grad()
    def _selection(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores by which members of a family are compared, in the shape of the logits: what top-K would compare.

        Without a selection bias logits order members as their scores do, and keep differences that scores round away.
        """
        if self.expert_bias is None:
            return logits.float()
        return self._member_scores(logits) + self.expert_bias

    def _rank(self) -> dict[str, tuple[int, int]]:
        """What `sequence_positions` needs to know of this rank."""
        split = self.config.sequence_parallel
        return {
            "tensor": (self.tp_group.rank(), self.tp_group.size()) if split else (0, 1),
            "context": (self.cp_group.rank(), self.cp_group.size()),
        }

    def _over_families(
        self,
        logits_TM: torch.Tensor,
        chosen_TE: torch.Tensor,
        padding_mask: torch.Tensor | None,
        shape: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The smaller model's routing on the representatives' logits, [T, E], and back to [T, M]."""
        logits_TE = self.apply_z_loss(logits_TM.gather(1, chosen_TE), padding_mask=padding_mask)
        bias_TE = None if self.expert_bias is None else self.expert_bias.take(chosen_TE)
        probs_TE, map_TE = self._top_k(logits_TE, bias_TE)
        padded = self.config.moe_pad_expert_input_to_capacity
        if not padded:
            # A family takes what its parent took.
            probs_TE, map_TE = self._drop(probs_TE, map_TE, 1.0)
        probs_TM = torch.zeros_like(logits_TM).scatter(1, chosen_TE, probs_TE)
        map_TM = torch.zeros_like(logits_TM, dtype=torch.bool).scatter(1, chosen_TE, map_TE)
        if padded:
            # The dispatcher counts on exactly an expert's capacity in every column.
            probs_TM, map_TM = self._drop(probs_TM, map_TM, 1.0)
        if self._losses_wanted():
            map_TE, scores_TE = self._scores_for_losses(logits_TE, padding_mask)
            map_for_losses_TM = torch.zeros_like(logits_TM, dtype=map_TE.dtype).scatter(1, chosen_TE, map_TE)
            scores_TM = self.families.spread(scores_TE, self._member_scores(logits_TM))
            probs_TM = self._attach_losses(probs_TM, scores_TM, map_for_losses_TM, padding_mask, shape)
        return probs_TM, map_TM

    def _while_released(
        self,
        logits_TM: torch.Tensor,
        chosen_TE: torch.Tensor,
        padding_mask: torch.Tensor | None,
        shape: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain top-K over [T, M] in which the odds of every member but the representative are scaled by `release`."""
        raw_TM = logits_TM
        others_TM = torch.ones_like(logits_TM, dtype=torch.bool).scatter_(1, chosen_TE, False)
        logits_TM = torch.where(others_TM, raw_TM + math.log(self.release), raw_TM)
        logits_TM = self.apply_z_loss(logits_TM, padding_mask=padding_mask)
        bias_TM = self.expert_bias
        if bias_TM is not None:
            # Odds of 0 leave a score of 0, to which the bias is added: from the lowest bias of all it beats no family.
            bias_TM = torch.where(others_TM, torch.lerp(bias_TM.min(), bias_TM, self.release), bias_TM)
        probs_TM, map_TM = self._top_k(logits_TM, bias_TM)
        padded = self.config.moe_pad_expert_input_to_capacity
        probs_TM, map_TM = self._drop(probs_TM, map_TM, 1.0 if padded else self._largest_share)
        if self._losses_wanted():
            map_for_losses_TM, scores_TM = self._scores_for_losses(logits_TM, padding_mask)
            scores_TM = self.families.spread(self.families.total(scores_TM), self._member_scores(raw_TM))
            probs_TM = self._attach_losses(probs_TM, scores_TM, map_for_losses_TM, padding_mask, shape)
        return probs_TM, map_TM

    def _top_k(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """mcore's own top-K with every option of this model, on [T, E] or [T, M] columns."""
        config = self.config
        return topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=bias,
            # Transformer Engine's kernel takes one bias per column, not per token.
            fused=config.moe_router_fusion and bias is None,
        )

    def _drop(self, probs: torch.Tensor, routing_map: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """mcore's capacity limit per column, the configured one times `factor`."""
        config = self.config
        if config.moe_expert_capacity_factor is None:
            return probs, routing_map
        return apply_router_token_dropping(
            probs,
            routing_map,
            router_topk=self.topk,
            capacity_factor=config.moe_expert_capacity_factor * factor,
            drop_policy=config.moe_token_drop_policy,
            pad_to_capacity=config.moe_pad_expert_input_to_capacity,
        )

    def _losses_wanted(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()

    def _scores_for_losses(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, fused=self.config.moe_router_fusion, padding_mask=padding_mask
        )

    def _member_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores [..., M] in fp32; for softmax they mean something only relative to each other. Differentiable."""
        logits = logits.float()
        if self.score_function == "softmax":
            return torch.softmax(logits, dim=-1)
        return torch.sigmoid(logits) if self.score_function == "sigmoid" else F.softplus(logits).sqrt()

    def _attach_losses(
        self,
        probs_TM: torch.Tensor,
        scores_TM: torch.Tensor,
        map_TM: torch.Tensor,
        padding_mask: torch.Tensor | None,
        shape: Sequence[int],
    ) -> torch.Tensor:
        """Attach mcore's balancing losses, each expert weighted by the inverse of the load it should have.

        Args:
            probs_TM: gates, which carry the losses into the graph.
            scores_TM: the scores of families divided among members by the members' scores: at ties evenly, and with a
                gradient that lifts a member without tokens, which is no representative anywhere.
            map_TM: tokens counted as routed, by score alone as in mcore.
            padding_mask: [T] or None.
            shape: (S, B).
        """
        if self._share_M is not None:
            scores_TM = scores_TM / (self._share_M * len(self._share_M))
        padded = padding_mask is not None
        length, batch = shape
        probs_TM = self._apply_aux_loss(probs_TM, scores_TM, map_TM, with_padding_mask=padded)
        probs_TM = self._apply_seq_aux_loss(probs_TM, scores_TM, map_TM, length, batch, with_padding_mask=padded)
        return self._apply_global_aux_loss(probs_TM, scores_TM, map_TM, with_padding_mask=padded)

    def _aim_balancing(self, routing_map: torch.Tensor) -> None:
        """Shift the counters by which mcore moves the selection bias, so that it aims at the shares of `let_go`.

        mcore compares each expert's count with the mean over experts. Counts are lowered by what an expert should get above
        the mean, so an expert that gets its share is at the mean; their sum stays.
        """
        if self._share_M is not None and self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert -= routing_map.sum() * (self._share_M - 1 / len(self._share_M))
