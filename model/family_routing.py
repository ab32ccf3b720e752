"""Exact mode: family routing in a model's MoE layers, and its release.

Why: after an expansion plain top-K may give a token an expert and its copy, so the function jumps. Family routing keeps
the smaller model's function at the switch; a release then leads to plain top-K (docs/exact-mode.md).

How to use, on freshly built chunks (before Float16Module and DDP), and then once before every step:

    install_family_routing(chunks, {layer.layer: layer.parents for layer in plan.layers})
    set_release(chunks, schedule.fraction(steps_since_switch))

Parameters, buffers and checkpoint keys stay those of mcore's router: families come from the plan, the release from the
step (`model/release.py`), and neither is state of the model.
"""

from collections.abc import Mapping, Sequence

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter

from model.build import moe_parts
from model.families import Families
from model.family_router import FamilyRouter
from model.mcore_fields import WITHOUT_FAMILIES
from parallel.errors import ConfigError, ExpansionError


def install_family_routing(chunks: list[GPTModel], parents: Mapping[int, Sequence[int]]) -> None:
    """Replace the router of every MoE layer by a FamilyRouter at release 0, with the same parameters and keys.

    Call it on freshly built chunks, before they are wrapped; with the same arguments on every rank.

    Args:
        chunks: bare model chunks of M experts.
        parents: layer number -> [M] parent of each expert, its id in the stage before (`LayerPlan.parents`).

    Raises:
        ExpansionError: if the families do not fit the model; nothing is replaced then.
        ConfigError: if the model routes in a way that has no families.
    """
    made = []
    for part in moe_parts(chunks):
        router = part.layer.router
        if part.number not in parents:
            raise ExpansionError(f"layer {part.number} has no families: the plan is of another model")
        if type(router) is not TopKRouter:
            raise ExpansionError(
                f"layer {part.number} has a {type(router).__name__}: only mcore's TopKRouter is replaced"
            )
        _check_model(router)
        _check_families(router, part.number, parents[part.number])
        made.append((part, Families(parents[part.number], part.number, router.weight.device)))
    for part, families in made:
        part.layer.router = FamilyRouter.taking_over(part.layer.router, families)


def _check_model(router: TopKRouter) -> None:
    if router.routing_type in WITHOUT_FAMILIES:
        raise ConfigError(
            f"moe_router_load_balancing_type={router.routing_type} has no families: use mode=plain, or another balancing"
        )
    if router.router_replay is not None:
        raise ConfigError(
            "moe_enable_routing_replay=True records experts, not families: set it to False, or use mode=plain"
        )


def _check_families(router: TopKRouter, layer: int, parents: Sequence[int]) -> None:
    """Refuse families of another size, and families that lie in several routing groups."""
    experts, groups = router.num_experts, router.config.moe_router_num_groups or 1
    if len(parents) != experts:
        raise ExpansionError(
            f"layer {layer}: {len(parents)} parents for {experts} experts: the plan is of another model"
        )
    before = max(parents) + 1
    if min(parents) < 0 or before % groups:
        raise ExpansionError(
            f"layer {layer}: parents from {min(parents)} to {before - 1} are not the experts of a smaller model"
            + (f" with {groups} routing groups" if groups > 1 else "")
        )
    for expert, parent in enumerate(parents):
        if expert * groups // experts != parent * groups // before:
            raise ExpansionError(
                f"layer {layer}: expert {expert} is in another of the {groups} routing groups than its parent {parent}: "
                "replicas must stay inside their routing group"
            )


def family_routers(chunks: list[GPTModel]) -> list[FamilyRouter]:
    """The family routers of this rank's chunks; none where family routing is not installed."""
    return [part.layer.router for part in moe_parts(chunks) if isinstance(part.layer.router, FamilyRouter)]


def set_release(chunks: list[GPTModel], fraction: float) -> None:
    """Set how far family routing is let go, on every rank alike; without family routers it does nothing.

    Args:
        chunks: bare model chunks.
        fraction: 0 routes over families, 1 is mcore's plain top-K; between, see docs/exact-mode.md.

    Raises:
        ValueError: if the fraction is outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"release fraction {fraction} must lie between 0 and 1")
    for router in family_routers(chunks):
        if router.release != fraction:
            router.let_go(fraction)


def remove_family_routing(chunks: list[GPTModel]) -> None:
    """Put mcore's plain router back everywhere, with its parameters, buffers and hooks; `set_release(chunks, 1.0)` routes
    the same and can be taken back."""
    for part in moe_parts(chunks):
        if isinstance(part.layer.router, FamilyRouter):
            part.layer.router = part.layer.router.plain()
