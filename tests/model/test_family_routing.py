"""Exact mode on real models: the function at the switch and its gradients, ties, the release, layouts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.errors import ConfigError, ExpansionError
from tests.distributed import run_distributed
from tests.model.grown_model import (
    BATCH,
    EXPERTS,
    FAMILIES,
    GROUPS,
    LOSS_FREE,
    MOE_LAYERS,
    SEQUENCE,
    SOFTMAX,
    build,
    build_grown,
    diverge,
    forward,
    gradients_of,
    layout_of,
    model_config,
    relative_error,
    routers,
    routing_maps,
)

VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "softmax after top-k": (SOFTMAX, "uneven"),
    "softmax before top-k": (SOFTMAX | {"router_pre_softmax": True}, "uneven"),
    "softmax before top-k, top 1": (SOFTMAX | {"router_pre_softmax": True, "top_k": 1}, "twice"),
    "softmax, groups": (SOFTMAX | GROUPS | {"router_pre_softmax": True}, "in groups"),
    "softmax, scaled, aux loss": (SOFTMAX | {"router_scale": 2.5, "balancing": "aux_loss"}, "thrice"),
    "softmax, global aux loss": (SOFTMAX | {"balancing": "global_aux_loss"}, "scattered"),
    "sigmoid": ({}, "scattered"),
    "sigmoid, top 3": ({"top_k": 3}, "thrice"),
    "loss-free": (LOSS_FREE, "uneven"),
    "loss-free, scaled, no losses": (LOSS_FREE | {"router_scale": 1.8} | {"aux_loss_coeff": 0.0}, "scattered"),
    "loss-free, groups, shared": (LOSS_FREE | GROUPS | {"shared_expert_ffn_hidden_size": 32}, "in groups"),
    "capacity that drops": (SOFTMAX | {"capacity_factor": 1.0}, "uneven"),
    "capacity, loss-free": (LOSS_FREE | {"capacity_factor": 0.8}, "twice"),
    "recomputed": (LOSS_FREE | {"recompute": "full"}, "uneven"),
    "sequential experts": (SOFTMAX | {"experts": "sequential", "dispatcher": "allgather"}, "uneven"),
}


def _function_is_unchanged(changes: dict[str, Any], families: str) -> dict[str, float]:
    from model.family_routing import set_release

    config, layout, parents = model_config(**changes), layout_of(), FAMILIES[families]
    small, large = build(config, layout), build_grown(config, layout, parents)
    errors = {"gradients": 0.0}
    if config.experts != "sequential":  # has its experts' gradients in many parameters
        before, after = gradients_of(small), gradients_of(large, parents)
        errors["gradients"] = max(relative_error(after[name], before[name]) for name in before)
    with torch.no_grad():
        errors["logits"] = relative_error(forward(large), forward(small))
        set_release(large, 1.0)
        errors["released"] = relative_error(forward(large), forward(small))
    return errors


@pytest.mark.parametrize("variant", VARIANTS)
def test_function_is_unchanged_at_the_switch(variant: str) -> None:
    [errors] = run_distributed(_function_is_unchanged, 1, *VARIANTS[variant])
    assert errors["logits"] <= 1e-6
    # The gradient of a parent is the sum of its replicas', through all losses. fp32 sums of a few hundred terms, in other
    # groups: 1e-6 was seen.
    assert errors["gradients"] <= 1e-5
    # Plain top-K on the same weights is another function, so the bounds above say something.
    assert errors["released"] > 0.1


def _in_bf16() -> tuple[float, list[float]]:
    from megatron.core.transformer.module import Float16Module

    from model.build import moe_parts
    from model.load import count_exactly

    config, layout = model_config(**LOSS_FREE), layout_of()
    small = build(config, layout, precision="bf16")
    large = build_grown(config, layout, FAMILIES["twice"], precision="bf16")
    logits = [Float16Module(chunks[0].config, chunks[0]) for chunks in (small, large)]
    count_exactly(moe_parts(large))
    with torch.no_grad():
        distance = relative_error(forward([logits[1]]), forward([logits[0]]))
    for _ in range(40):
        forward([logits[1]], loss=True)
    return distance, [router.local_tokens_per_expert.sum().item() for router in routers(large)]


def test_bf16_keeps_the_function_and_counts_exactly() -> None:
    [(distance, counted)] = run_distributed(_in_bf16, 1)
    # A sum of two experts' outputs in another order may be rounded to the neighbouring bf16 number.
    assert distance <= 2**-7
    assert counted == [40.0 * 2 * BATCH * SEQUENCE] * len(MOE_LAYERS)


def _ties() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    layout, parents = layout_of(), FAMILIES["uneven"]
    chunks = build_grown(model_config(**LOSS_FREE), layout, parents)
    return routing_maps(build(model_config(**LOSS_FREE), layout)), routing_maps(chunks), routing_maps(chunks)


def test_ties_split_evenly_and_always_alike() -> None:
    parents = torch.tensor(FAMILIES["uneven"])
    [(small, large, again)] = run_distributed(_ties, 1)
    for small_TE, large_TM, again_TM in zip(small, large, again, strict=True):
        assert torch.equal(large_TM, again_TM)
        assert torch.equal(torch.zeros(small_TE.shape).index_add_(1, parents, large_TM.float()), small_TE.float())
        for parent in range(EXPERTS):
            loads = large_TM[:, parents == parent].sum(0).tolist()
            total, members = sum(loads), len(loads)
            # Not worse than chance: four standard deviations of a binomial. One member taking all is far outside.
            allowed = 4 * (total / members * (1 - 1 / members)) ** 0.5
            assert all(abs(load - total / members) <= allowed for load in loads), (parent, loads)
            assert members == 1 or max(loads) < total


def _plain_again(changes: dict[str, Any]) -> None:
    from model.family_routing import family_routers, remove_family_routing, set_release
    from model.sharded_state import model_state

    config, layout, parents = model_config(**changes), layout_of(), FAMILIES["in groups"]
    plain, ours = build(config, layout, parents), build_grown(config, layout, parents)
    counted: list[int] = []
    routers(ours)[0].register_forward_hook(lambda *_: counted.append(1))
    assert list(ours[0].state_dict()) == list(plain[0].state_dict())
    assert list(model_state(ours, layout)["model0"]) == list(model_state(plain, layout)["model0"])
    for name, p in plain[0].named_parameters():
        assert vars(ours[0].get_parameter(name)) == vars(p)  # sequence_parallel, allreduce, ...
    for chunks in (plain, ours):
        diverge(chunks)
    for step, let_go in enumerate((lambda: set_release(ours, 1.0), lambda: remove_family_routing(ours))):
        let_go()
        assert len(family_routers(ours)) == (len(MOE_LAYERS) if step == 0 else 0)
        with torch.no_grad():
            assert torch.equal(forward(ours), forward(plain))
        theirs, before = gradients_of(plain), len(counted)
        for name, gradient in gradients_of(ours).items():
            assert torch.equal(gradient, theirs[name]), name
        assert len(counted) == before + 1
        for our, their in zip(routers(ours), routers(plain), strict=True):
            for name, buffer in their.named_buffers():
                assert torch.equal(our.get_buffer(name), buffer), name
    assert [type(router) for router in routers(ours)] == [type(router) for router in routers(plain)]


@pytest.mark.parametrize("variant", ["softmax, groups", "loss-free, groups, shared", "capacity, loss-free"])
def test_released_is_plain_bit_for_bit(variant: str) -> None:
    run_distributed(_plain_again, 1, VARIANTS[variant][0])


def _release_path(changes: dict[str, Any]) -> None:
    from model.family_routing import set_release

    parents = FAMILIES["scattered"]
    chunks = build_grown(model_config(**changes), layout_of(), parents)
    diverge(chunks, bias=0.2)
    doubles, outputs, maps = [], [], []
    fractions = [0.0, 1e-30, 0.02, 0.1, 0.3, 0.6, 0.8, 0.95, 1 - 1e-9, 1.0]
    for fraction in fractions:
        set_release(chunks, fraction)
        maps.append(routing_maps(chunks)[0])
        with torch.no_grad():
            outputs.append(forward(chunks))
        families_TE = torch.zeros(len(maps[-1]), EXPERTS).index_add_(1, torch.tensor(parents), maps[-1].float())
        assert (families_TE.sum(1) == 2).all()
        doubles.append(int((families_TE > 1).sum()))
    # The ends are reached without a jump, whatever the biases.
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[-2], maps[-1])
    assert max(relative_error(outputs[1], outputs[0]), relative_error(outputs[-2], outputs[-1])) <= 1e-6
    assert doubles[0] == 0 and doubles == sorted(doubles)
    # It happens all along the way and not at one point of it.
    assert len(set(doubles)) >= 6 and doubles[-1] > 10, doubles


@pytest.mark.parametrize(
    "changes", [SOFTMAX, SOFTMAX | {"router_pre_softmax": True}, {}, LOSS_FREE], ids=["post", "pre", "sigmoid", "bias"]
)
def test_release_leads_from_families_to_plain(changes: dict[str, Any]) -> None:
    run_distributed(_release_path, 1, changes)


def _gradients_of_replicas() -> None:
    chunks = build_grown(model_config(aux_loss_coeff=0.0, z_loss_coeff=None), layout_of(), FAMILIES["uneven"])
    diverge(chunks)
    used = [routing.any(0) for routing in routing_maps(chunks)]
    gradients = gradients_of(chunks)
    for layer, used_M in enumerate(used):
        assert used_M.sum() > EXPERTS  # siblings are in use, each for other tokens
        router = gradients[f"decoder.layers.{layer}.mlp.router.weight"].abs().sum(1)
        experts = gradients[f"decoder.layers.{layer}.mlp.experts.weight1"].abs().sum((1, 2))
        assert torch.equal(router > 0, used_M) and torch.equal(experts > 0, used_M)


def test_gradients_reach_the_chosen_replicas_and_no_others() -> None:
    run_distributed(_gradients_of_replicas, 1)


def _in_layout(sizes: dict[str, int]) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """Distance to the smaller model in the same layout; routing maps [S, B, M], of the batch and of its sequences alone."""
    config, layout = model_config(**LOSS_FREE), layout_of(**sizes)
    small, large = build(config, layout), build_grown(config, layout, FAMILIES["uneven"])
    with torch.no_grad():
        distance = relative_error(forward(large), forward(small))
    experts = len(FAMILIES["uneven"])

    def whole(maps: list[torch.Tensor], batch: int) -> list[torch.Tensor]:
        group, joined = layout.groups.tp, []
        for piece in (m.view(-1, batch, experts) for m in maps):  # under sequence parallelism a piece of each sequence
            pieces = [torch.empty_like(piece) for _ in range(group.size())]
            torch.distributed.all_gather(pieces, piece, group=group)
            joined.append(torch.cat(pieces))
        return joined

    alone = [whole(routing_maps(large, slice(row, row + 1)), 1) for row in range(BATCH)]
    together = whole(routing_maps(large), BATCH)
    return distance, together, [torch.cat(sequences, 1) for sequences in zip(*alone, strict=True)]


LAYOUTS = [{"expert": 2}, {"tensor": 2}, {"tensor": 2, "expert": 2}]


@pytest.fixture(scope="module")
def single() -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    [found] = run_distributed(_in_layout, 1, {})
    return found


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_function_and_ties_are_alike_in_every_layout(sizes: dict[str, int], single: Any) -> None:
    for distance, together, alone in run_distributed(_in_layout, 2, sizes):
        assert distance <= 1e-6
        for expected, maps, sequences in zip(single[1], together, alone, strict=True):
            assert torch.equal(maps, expected)
            assert torch.equal(sequences, expected)  # other sequences in the batch make no difference


def _counted(recompute: str) -> list[torch.Tensor]:
    chunks = build_grown(model_config(recompute=recompute, **LOSS_FREE), layout_of(), FAMILIES["scattered"])
    gradients_of(chunks)
    return [router.local_tokens_per_expert for router in routers(chunks)]


def test_recomputation_counts_tokens_once_and_chooses_again_alike() -> None:
    [plain], [recomputed] = (run_distributed(_counted, 1, recompute) for recompute in ("none", "full"))
    for once, again in zip(plain, recomputed, strict=True):
        assert torch.equal(once, again) and once.sum().item() == pytest.approx(2 * BATCH * SEQUENCE)


def _refusals() -> None:
    from model.family_routing import install_family_routing, set_release

    def refuse(match: str, error: type[Exception], parents: Any, **changes: Any) -> None:
        chunks = build(model_config(**changes), layout_of(), FAMILIES["in groups"])
        before = [type(router) for router in routers(chunks)]
        with pytest.raises(error, match=match):
            install_family_routing(chunks, parents)
        assert [type(router) for router in routers(chunks)] == before  # not half of them

    good = FAMILIES["in groups"]
    refuse("layer 2 has no families", ExpansionError, {1: good})
    refuse("24 parents for 16 experts", ExpansionError, {1: good, 2: FAMILIES["thrice"]})
    refuse("parent 3 has no copy", ExpansionError, {1: good, 2: [p + (p == 3) for p in good]})
    refuse(
        "expert 4 is in another of the 2 routing groups",
        ExpansionError,
        {1: good, 2: [0, 1, 2, 3, 7, *good[5:]]},
        **GROUPS,
    )
    refuse(
        "sinkhorn has no families",
        ConfigError,
        {1: good, 2: good},
        aux_loss_coeff=0.0,
        mcore={"moe_router_load_balancing_type": "sinkhorn"},
    )
    refuse("moe_enable_routing_replay=True", ConfigError, {1: good, 2: good}, mcore={"moe_enable_routing_replay": True})
    chunks = build_grown(model_config(), layout_of(), good)
    with pytest.raises(ExpansionError, match="layer 1 has a FamilyRouter"):
        install_family_routing(chunks, {1: good, 2: good})
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            set_release(chunks, fraction)


def test_refuses_what_is_no_family() -> None:
    run_distributed(_refusals, 1)
