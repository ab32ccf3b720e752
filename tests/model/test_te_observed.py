"""What is measured of a network, and what a switch makes of it, whichever modules it is built of; several pipeline ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed
from tests.model import te

pytestmark = [
    pytest.mark.requires_te,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]
SIZES: dict[str, Any] = dict(layers=4, moe_period=1, dense_first=1, balancing="loss_free", router_score="sigmoid")
NETWORKS: dict[str, dict[str, Any]] = {
    "gqa": SIZES | te.NETWORKS["gqa"] | dict(tie_embeddings=True),
    "mla": SIZES | te.NETWORKS["mla"] | dict(shared_expert_ffn_hidden_size=16),
}
# Name -> (processes, sizes).
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "pipeline": (2, dict(pipeline=2)),
    "interleaved": (2, dict(pipeline=2, virtual_pipeline=2)),
    "pipeline and experts": (4, dict(pipeline=2, expert=2)),
    "pipeline and tensor": (4, dict(pipeline=2, tensor=2, expert_tensor=2)),
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _grown(
    kind: str, network: dict[str, Any], layout: Any, plan: Any, folder: Path
) -> tuple[list[Any], Any, dict[str, list[int]]]:
    """A stage of twice the experts by the live switch, and its state; the checkpoint before it lies in the folder."""
    from model.holdings import describe_stage
    from model.sharded_state import expert_keys, save_tensors
    from parallel.optimizer_state import set_step
    from upcycle.live import add_bias_noise, move_state
    from upcycle.optimizer_rules import apply_rule

    small = te.built(kind, network, layout)
    optimizer = te.optimizer(small)
    te.fill(small, optimizer, layout)
    save_tensors(folder, small, optimizer, layout)
    experts = expert_keys(small, layout)
    old = describe_stage(small, optimizer, layout, moments=True)
    large = te.built(kind, network, layout, experts=8)
    grown = te.optimizer(large)
    new = describe_stage(large, grown, layout, moments=True)
    old.free_as_it_goes()
    move_state(old, new, plan, experts, layout, chunk_bytes=1 << 12)
    add_bias_noise(large, plan)
    set_step(grown, 5)
    apply_rule(plan, plan.rule, large, grown, layout)
    return large, grown, te.state(large, grown, layout)


@te.its_adam()
def _both_ways(folder: str, network: dict[str, Any], sizes: dict[str, int]) -> None:
    from model.config import ModelConfig
    from model.sharded_state import expert_keys, load_tensors
    from upcycle.plan import plan_expansion
    from upcycle.stage_config import StageConfig
    from upcycle.transform import expand_checkpoint

    layout, found = te.layout(**sizes), {}
    stage = StageConfig(at_step=5, factor=2, optimizer_rule="scale")
    plan = plan_expansion(
        stage, ModelConfig(**(te.SIZES | network)), stage=1, experts_before=4, scores=None, seed=0,
        ep_ranks=sizes.get("expert", 1),
    )  # fmt: skip
    for kind in ("te", "grouped"):
        before, after = Path(folder) / kind, Path(folder) / f"{kind}.grown"
        large, _, found[kind] = _grown(kind, network, layout, plan, before)
        keys = [key for key in found[kind] if key.startswith("weight/")]
        assert any("expert_bias" in key for key in keys) and any("shared_experts" in key for key in keys)
        experts = expert_keys(te.built(kind, network, layout), layout)
        expand_checkpoint(before, after, plan, experts, layout)
        again = te.built(kind, network, layout, experts=8)
        loaded = te.optimizer(again)
        with te.steps_on_cpu():
            load_tensors(after, again, loaded, layout, step=5)
        assert te.state(again, loaded, layout) == found[kind], kind
        assert not any(
            key.startswith("scaling_") for chunk in large for m in chunk.modules() for key in getattr(m, "fp8_meta", ())
        )
    assert found["te"] == found["grouped"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_switch_is_one_way_or_the_other_and_in_any_modules_the_same(
    network: str, layout: str, tmp_path: Path
) -> None:
    ranks, sizes = LAYOUTS[layout]
    run_distributed(_both_ways, ranks, str(tmp_path), NETWORKS[network], sizes)


@te.its_adam()
def _observed(folder: str, kind: str, network: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    from model.build import count_parameters
    from model.config import ModelConfig
    from model.divergence import Siblings
    from model.load import ExpertLoad
    from model.network import count, network_chunks
    from model.norms import GROUPS, NormMeter
    from parallel.config import ParallelConfig
    from upcycle.plan import plan_expansion
    from upcycle.stage_config import StageConfig
    from upcycle.utility import gradient_scores, weight_scores

    layout, model = te.layout(**sizes), ModelConfig(**(te.SIZES | network))
    plan = plan_expansion(
        StageConfig(at_step=5, factor=2), model, stage=1, experts_before=4, scores=None, seed=0,
        ep_ranks=sizes.get("expert", 1),
    )  # fmt: skip
    chunks, optimizer, _ = _grown(kind, network, layout, plan, Path(folder) / kind)
    # What training would do to the copies, the same for every kind.
    te.fill(chunks, optimizer, layout)
    parts = te.moe_layers(chunks)
    for name, p in [named for chunk in chunks for named in chunk.named_parameters()]:
        assert p.main_grad is not None, name
        p.main_grad.copy_(p.detach())
    for view in te.views(optimizer):
        view.key.grad = view.tensors["exp_avg"]
    numbers = [n for n in model.moe_layer_numbers()]
    load = ExpertLoad(parts, tuple(numbers), 8, layout.device)

    def accumulate() -> None:
        for chunk in chunks:
            for p in chunk.parameters():
                p.main_grad.copy_(p.detach() / layout.groups.expt_dp.size())

    wrapped = te.wrapped_of(optimizer)
    scores = gradient_scores(chunks, wrapped, layout, 8, accumulate, batches=1)
    return {
        "counts": count_parameters(model, chunks, layout),
        "planned": vars(count(model, 8, network_chunks(model, 8, ParallelConfig(), 64, itemsize=2))),
        "norms": dict(
            zip(GROUPS, layout.sum_over_world(NormMeter(chunks, layout).squares(optimizer)).T.tolist(), strict=True)
        ),
        "siblings": Siblings(chunks, layout, {layer.layer: layer.parents for layer in plan.layers}).figures(optimizer),
        "weights": weight_scores(chunks, layout, 8),
        "scores": scores,
        "load": (len(load._hooks), [part.number for part in parts], [part.prefix for part in parts]),
    }


def _close(one: Any, other: Any, where: str = "") -> None:
    """Equal but for the order of sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _close(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            _close(a, b, where)
    else:
        assert one == pytest.approx(other, rel=1e-5, abs=1e-9), where


@pytest.mark.parametrize("layout", ["one", "interleaved", "pipeline and tensor"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_is_seen_of_a_network_in_any_modules(network: str, layout: str, tmp_path: Path) -> None:
    ranks, sizes = LAYOUTS[layout]
    seen = {kind: run_distributed(_observed, ranks, str(tmp_path), kind, NETWORKS[network], sizes) for kind in te.KINDS}
    for theirs, *others in zip(*(seen[kind] for kind in te.KINDS), strict=True):
        groups = {name for name, squares in theirs["norms"].items() if squares[0] > 0}
        assert groups >= {"embedding", "attention", "router", "experts", "shared_experts", "dense_mlp", "norms"}
        assert theirs["siblings"]["sibling_divergence"] is not None
        load = theirs.pop("load")
        for other in others:
            assert other.pop("load") == load
            siblings, of_others = theirs["siblings"], other.pop("siblings")
            assert {k: v is None for k, v in siblings.items()} == {k: v is None for k, v in of_others.items()}
            _close({k: v for k, v in theirs.items() if k != "siblings"}, other)
        assert theirs["counts"]["parameters_total"] == theirs["planned"]["total"]


def _drawn(network: dict[str, Any], sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Fingerprints of weights as they are drawn, with mean and deviation of what this rank holds of them, per kind."""
    found: dict[str, dict[str, Any]] = {}
    layout = te.layout(**sizes)
    for kind in ("te", "sequential"):
        chunks = te.built(kind, network, layout)
        # Refuses replicas that were drawn apart.
        sums = te.state(chunks, None, layout)
        found[kind] = {
            key: {
                "sums": sums[key],
                "numel": held.numel(),
                "mean": held.mean().item(),
                "std": held.std().item(),
                "held": held,
            }
            for key, held in te.held_weights(chunks, layout).items()
        }
    return found


@pytest.mark.parametrize("sizes", [{}, dict(tensor=2, expert=2), dict(tensor=2, expert_tensor=2)], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_drawn_as_in_mcores_own_layers(network: str, sizes: dict[str, int]) -> None:
    ranks = run_distributed(_drawn, 2 if sizes else 1, NETWORKS[network], sizes)
    for found in ranks:
        assert found["te"].keys() == found["sequential"].keys()
        for key, drawn in found["te"].items():
            other = found["sequential"][key]
            assert drawn["numel"] == other["numel"] or "down_proj" in key, key
            if "layer_norm" in key or "layernorm" in key:
                assert drawn["sums"] == other["sums"], key
            elif drawn["numel"] > 256:
                # Both are drawn from one distribution: 5 standard errors of mean and deviation.
                error = 5 * other["std"] / drawn["numel"] ** 0.5
                assert abs(drawn["mean"] - other["mean"]) < 2 * error and abs(drawn["std"] - other["std"]) < error, key
            if ".experts." in key:
                assert len(set(drawn["sums"])) == 4, f"{key}: experts were drawn alike"
    cut = (
        "linear_qkv",
        "linear_q_up",
        "linear_proj",
        "word_embeddings",
        *((".experts.",) if sizes.get("expert_tensor") else ()),
    )
    if sizes:
        for key, drawn in ranks[0]["te"].items():
            if any(name in key for name in cut) and "norm" not in key:
                assert not torch.equal(drawn["held"], ranks[1]["te"][key]["held"]), f"{key}: its parts were drawn alike"
