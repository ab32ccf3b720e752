"""Balancing under family routing: values of the losses, what they and loss-free balancing aim at, capacity limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.model.grown_model import (
    EXPERTS,
    FAMILIES,
    LOSS_FREE,
    MOE_LAYERS,
    SOFTMAX,
    build,
    build_grown,
    forward,
    layout_of,
    model_config,
    routers,
)


def _balancing_losses(changes: dict[str, Any], families: str) -> tuple[list[float], list[float], int]:
    from megatron.core.transformer.moe import moe_utils, router

    config, layout = model_config(**changes), layout_of()
    small, large = build(config, layout), build_grown(config, layout, FAMILIES[families])
    seen: list[float] = []

    class Scaler(moe_utils.MoEAuxLossAutoScaler):  # every auxiliary loss passes here on its way into the graph
        @staticmethod
        def forward(ctx: Any, output: torch.Tensor, aux_loss: torch.Tensor) -> torch.Tensor:
            seen.append(aux_loss.item())
            return moe_utils.MoEAuxLossAutoScaler.forward(ctx, output, aux_loss)

    router.MoEAuxLossAutoScaler = Scaler  # this process is the test's own
    forward(small, loss=True)
    before, seen = seen, []
    forward(large, loss=True)
    return before, seen, len(MOE_LAYERS)


@pytest.mark.parametrize("balancing", ["aux_loss", "seq_aux_loss", "global_aux_loss", "loss_free"])
@pytest.mark.parametrize("families", ["uneven", "scattered"])
def test_losses_have_the_smaller_models_values(balancing: str, families: str) -> None:
    [(before, after, layers)] = run_distributed(_balancing_losses, 1, {"balancing": balancing}, families)
    assert len(before) == 2 * layers  # z-loss and balancing loss
    assert min(before) > 1e-3
    # Means of fp32 values over 144 tokens, in another order.
    assert after == pytest.approx(before, rel=1e-6)


def _one_router(changes: dict[str, Any], families: str, siblings: float) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A family router in which one member of each family takes most of its tokens; its input; parents."""
    parents = torch.tensor(FAMILIES[families])
    chunks = build_grown(model_config(**changes), layout_of(), FAMILIES[families])
    router, noise = routers(chunks)[0], torch.Generator().manual_seed(4)
    common = torch.randn(32, generator=noise)
    hidden = torch.randn(64, 16, 32, generator=noise) * 0.7 + common
    with torch.no_grad():
        router.weight += 0.02 * torch.randn(router.weight.shape, generator=noise)
        router.weight[_firsts(parents)] += siblings * common / common.norm()
    return router, hidden, parents


def _firsts(parents: torch.Tensor) -> list[int]:
    return [parents.tolist().index(parent) for parent in range(EXPERTS)]


def _loads(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return router(hidden)[1].sum(0)


def _worst_share(loads: torch.Tensor, parents: torch.Tensor) -> float:
    """Largest share that one member has of its family's tokens, over the even share 1 / r."""
    return max(
        (loads[parents == p].max() * (parents == p).sum() / loads[parents == p].sum()).item() for p in range(EXPERTS)
    )


def _loss_free_balancing(fraction: float) -> tuple[float, list[float]]:
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    router, hidden, parents = _one_router(LOSS_FREE, "uneven", 0.05)
    router.expert_bias.zero_()
    router.let_go(fraction)
    before = _worst_share(_loads(router, hidden), parents)
    late = torch.zeros(len(parents))
    for step in range(1000):
        router.local_tokens_per_expert.zero_()
        loads_M = router(hidden)[1].sum(0)
        assert router.local_tokens_per_expert.sum().item() == pytest.approx(2 * 64 * 16, rel=1e-5)
        router.expert_bias.copy_(get_updated_expert_bias(router.local_tokens_per_expert, router.expert_bias, 1e-3))
        late += loads_M / 200 if step >= 800 else 0
    return before, late.tolist()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_loss_free_balancing_aims_from_even_families_to_even_experts(fraction: float) -> None:
    [(before, loads)] = run_distributed(_loss_free_balancing, 1, fraction)
    parents = torch.tensor(FAMILIES["uneven"])
    sizes_M = torch.bincount(parents)[parents]
    aim_M = 2 * 64 * 16 * ((1 - fraction) / (EXPERTS * sizes_M) + fraction / len(parents))
    assert before > 1.5
    # The bias moves in steps of 1e-3, which tip a few of the 1024 tokens to and fro: a few per cent of a load.
    torch.testing.assert_close(torch.tensor(loads), aim_M, rtol=0.1, atol=0)


def _aux_loss_balancing(balancing: str) -> tuple[float, float]:
    router, hidden, parents = _one_router({"balancing": balancing, "z_loss_coeff": None}, "uneven", 0.05)
    before = _worst_share(_loads(router, hidden), parents)
    for _ in range(100):
        router.weight.grad = None
        router.reset_global_aux_loss_tracker()
        probs, _ = router(hidden)
        torch.autograd.backward((probs * 0).sum())  # nothing but the balancing loss
        with torch.no_grad():
            router.weight -= 0.5 * router.weight.grad
    return before, _worst_share(_loads(router, hidden), parents)


@pytest.mark.parametrize("balancing", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_balancing_losses_even_out_families(balancing: str) -> None:
    [(before, after)] = run_distributed(_aux_loss_balancing, 1, balancing)
    assert before > 1.5 and after < 1.2


def _capacity(padded: bool) -> list[tuple[float, list[int], list[int]]]:
    mcore = {"moe_pad_expert_input_to_capacity": padded}
    changes = {"capacity_factor": 1.0, "mcore": mcore, **SOFTMAX}
    router, hidden, parents = _one_router(changes, "uneven", 0.05)
    found = []
    for fraction in (0.0, 0.5, 1.0):
        router.let_go(fraction)
        loads = _loads(router, hidden)
        found.append(
            (fraction, loads.tolist(), torch.zeros(EXPERTS, dtype=loads.dtype).index_add_(0, parents, loads).tolist())
        )
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_capacity_limits_families_first_and_experts_in_the_end(padded: bool) -> None:
    [found] = run_distributed(_capacity, 1, padded)
    slots, experts = 2 * 64 * 16, len(FAMILIES["uneven"])
    (_, at_switch, families), (_, half, _), (_, released, _) = found
    if padded:  # the dispatcher needs exactly this
        assert {*at_switch, *half, *released} == {slots // experts}
        return
    assert max(families) == slots // EXPERTS and max(at_switch) > slots // experts
    # Half-way: the mean of a single expert's two limits.
    assert max(half) == (slots // EXPERTS + slots // experts) // 2
    assert max(released) == slots // experts
