"""Transformer Engine's own modules, built on CPU and never run: their checkpoints, the live switch, fingerprints, norms.

Its kernels need CUDA, its parameters and mcore's descriptions of them do not. The processes see no GPU, so that the same
tests run on a machine that has some.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed
from tests.model import te

pytestmark = [
    pytest.mark.requires_te,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@te.its_adam()
def _interchange(folder: str, network: dict[str, Any], sizes: dict[str, int]) -> None:
    from model.sharded_state import load_tensors, load_weights, save_tensors

    layout = te.layout(**sizes)
    found = {}
    for kind in te.KINDS:
        chunks = te.built(kind, network, layout)
        optimizer = te.optimizer(chunks)
        assert te.is_its_adam(optimizer)
        te.fill(chunks, optimizer, layout)
        found[kind] = te.state(chunks, optimizer, layout)
        save_tensors(Path(folder) / kind, chunks, optimizer, layout)
    assert all(found[kind] == found["te"] for kind in te.KINDS)
    assert any(name.startswith("exp_avg_sq/") for name in found["te"])
    for kind in te.KINDS:
        for written in te.KINDS:
            chunks = te.built(kind, network, layout)
            optimizer = te.optimizer(chunks)
            with te.steps_on_cpu():
                load_tensors(Path(folder) / written, chunks, optimizer, layout, step=7)
            assert te.state(chunks, optimizer, layout) == found["te"], (written, kind)
            bare = te.built(kind, network, layout)
            load_weights(Path(folder) / written, bare, layout)
            weights = {name: sums for name, sums in found["te"].items() if name.startswith("weight/")}
            assert te.state(bare, None, layout) == weights, (written, kind)


@pytest.mark.parametrize("network", te.NETWORKS)
def test_checkpoints_interchange_among_expert_modules(network: str, tmp_path: Path) -> None:
    run_distributed(_interchange, 1, str(tmp_path), te.NETWORKS[network], {})


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        ("gqa", dict(expert=2)),
        ("gqa", dict(tensor=2, expert=2)),
        ("gqa", dict(tensor=2, expert_tensor=2)),
        ("biases", dict(tensor=2, expert=2)),
        # mcore 0.16 marks weights that every tensor rank holds whole as parts, and the fingerprints counted them twice.
        ("mla", dict(tensor=2, expert_tensor=2)),
    ],
    ids=str,
)
def test_checkpoints_interchange_in_layouts(network: str, sizes: dict[str, int], tmp_path: Path) -> None:
    run_distributed(_interchange, 2, str(tmp_path), te.NETWORKS[network], sizes)


@te.its_adam()
def _over_context(folder: str, network: dict[str, Any]) -> None:
    from model.sharded_state import load_tensors, save_tensors

    found = {}
    for name, sizes in (("context", dict(context=2)), ("data", {})):
        layout = te.layout(**sizes)
        chunks = te.built("te", network, layout)
        optimizer = te.optimizer(chunks)
        te.fill(chunks, optimizer, layout)
        found[name] = te.state(chunks, optimizer, layout)
        save_tensors(Path(folder) / name, chunks, optimizer, layout)
    assert found["context"] == found["data"]
    for name, written in (("context", "data"), ("data", "context")):
        layout = te.layout(**(dict(context=2) if name == "context" else {}))
        chunks = te.built("te", network, layout)
        optimizer = te.optimizer(chunks)
        load_tensors(Path(folder) / written, chunks, optimizer, layout, step=7)
        assert te.state(chunks, optimizer, layout) == found[name]


@pytest.mark.parametrize("network", ["gqa", "mla"])
def test_sequences_over_ranks_change_nothing_of_what_is_held(network: str, tmp_path: Path) -> None:
    run_distributed(_over_context, 2, str(tmp_path), te.NETWORKS[network])


@te.its_adam()
def _switch(sizes: dict[str, int]) -> None:
    from model.config import ModelConfig
    from model.holdings import describe_stage
    from model.sharded_state import expert_keys
    from parallel.optimizer_state import get_step, set_step
    from upcycle.live import move_state
    from upcycle.plan import plan_expansion
    from upcycle.stage_config import StageConfig

    layout, found = te.layout(**sizes), {}
    plan = plan_expansion(
        StageConfig(at_step=5, factor=2), ModelConfig(**te.SIZES), stage=1, experts_before=4, scores=None, seed=0,
        ep_ranks=sizes["expert"],
    )  # fmt: skip
    for kind in ("te", "grouped"):
        small = te.built(kind, te.NETWORKS["gqa"], layout)
        optimizer = te.optimizer(small)
        te.fill(small, optimizer, layout)
        before, experts = te.state(small, optimizer, layout), expert_keys(small, layout)
        large = te.built(kind, te.NETWORKS["gqa"], layout, experts=8)
        grown = te.optimizer(large)
        old = describe_stage(small, optimizer, layout, moments=True)
        new = describe_stage(large, grown, layout, moments=True)
        old.free_as_it_goes()
        move_state(old, new, plan, experts, layout, chunk_bytes=1 << 20)
        set_step(grown, 5)
        assert get_step(grown) == 5
        found[kind] = te.state(large, grown, layout)
        parents = plan.layers[0].parents
        for key in experts:
            for state in ("weight", "param", "exp_avg", "exp_avg_sq"):
                name = f"{state}/{key}"
                if name in before:
                    assert found[kind][name] == [before[name][parent] for parent in parents], (kind, name)
    assert found["te"] == found["grouped"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_live_switch_of_its_modules_equals_that_of_ours(processes: int) -> None:
    run_distributed(_switch, processes, dict(expert=processes))


def _norm_groups() -> list[str]:
    from model.norms import group_of

    (chunk,) = te.built("te", te.NETWORKS["gqa"], te.layout())
    return [name for name, p in chunk.named_parameters() if p.dim() == 1 and group_of(name) not in ("norms", "router")]


def test_norms_inside_its_linear_layers_are_norms() -> None:
    assert run_distributed(_norm_groups, 1) == [[]]


def _extra_state_left_out() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel import random
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch import utils as te_utils
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as Kept

    from model.sharded_state import model_state, sharded_leaves

    layout = te.layout()
    chunks = te.built("te", te.NETWORKS["gqa"], layout)
    modules = [
        m for m in chunks[0].modules() if isinstance(m, base.TransformerEngineBaseModule) and hasattr(m, "weight_names")
    ]
    modules += [m for m in chunks[0].modules() if type(m).__name__.endswith("GroupedLinear")]
    assert modules
    for module in modules:
        recipe = DelayedScaling(amax_history_len=4)
        module.fp8_meta.update(recipe=recipe, fp8_checkpoint=True, num_gemms=getattr(module, "num_gemms", 1))
        with mock.patch.object(te_utils, "_get_device_compute_capability", return_value=(9, 0)):
            module.init_fp8_meta_tensors(recipe)
        module.fp8_meta["scaling_fwd"].scale.fill_(3.0)
        assert module.get_extra_state().numel() > 0
        module.fp8_meta["fp8_group"] = None
        Kept.add_fp8_tensors_to_global_buffer(module.fp8_meta)
    assert Kept.global_amax_buffer
    leaves = [leaf for part in model_state(chunks, layout).values() for _, leaf in sharded_leaves(part)]
    assert leaves and not any(isinstance(leaf, ShardedObject) or "_extra_state" in leaf.key for leaf in leaves)
    # As it is bound on a GPU.
    with mock.patch.object(random, "FP8GlobalStateManager", Kept):
        larger = te.built("te", te.NETWORKS["gqa"], layout, experts=8)
    assert not Kept.global_amax_buffer
    for module in larger[0].modules():
        if isinstance(module, base.TransformerEngineBaseModule):
            assert "scaling_fwd" not in module.fp8_meta and not module._fp8_workspaces


def test_scales_and_histories_of_fp8_are_neither_written_nor_carried_over() -> None:
    run_distributed(_extra_state_left_out, 1)


def _with_choices(network: dict[str, Any]) -> dict[str, Any]:
    """What is decided for a Hopper card, put to mcore's own checks with this Transformer Engine."""
    from model import build
    from model.choices import Situation, choose, resolved
    from model.config import ModelConfig
    from model.performance import PerformanceConfig
    from parallel.config import ParallelConfig
    from parallel.machine import named_machine

    overlap = network.get("shared_expert_ffn_hidden_size") is not None
    at = Situation(
        model=ModelConfig(**(te.SIZES | network)),
        num_experts=4,
        performance=PerformanceConfig(shared_expert_overlap=overlap),
        overlap_grad_reduce="auto",
        overlap_param_gather="auto",
        sharded=True,
        parallel=ParallelConfig(),
        world_size=1,
        bf16=True,
        families=False,
        documents=False,
        machine=named_machine("h100", "transformer-engine", 1),
    )
    model, performance = resolved(at, choose(at))
    layout = te.layout()
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        (chunk,) = build.build_chunks(
            model, 4, layout, vocab_size=64, sequence_length=32, precision="bf16", performance=performance
        )
    assert {type(part.layer.experts).__name__ for part in te.moe_layers([chunk])} == {"GroupedExperts"}
    # Every linear layer that is Transformer Engine's; the output layer is mcore's, which needs Apex for it.
    fused = [m.fuse_wgrad_accumulation for m in chunk.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    assert len(fused) >= 6 and all(fused) and not chunk.output_layer.gradient_accumulation_fusion
    assert _told_of_first_micro_batch(chunk) == {None}
    names = ("moe_permute_fusion", "moe_router_fusion", "apply_rope_fusion", "cross_entropy_loss_fusion")
    return {name: getattr(chunk.config, name) for name in (*names, "moe_shared_expert_overlap")}


def _told_of_first_micro_batch(chunk: torch.nn.Module) -> set[bool | None]:
    """What mcore tells fused layers behind the warm-up of a capture; one that hears True writes over the gradient."""
    import transformer_engine.pytorch as engine

    told: set[bool | None] = set()

    def forward(layer: Any, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        told.add(is_first_microbatch)
        return x

    with (
        mock.patch.object(engine.Linear, "forward", forward),
        mock.patch.object(engine.LayerNormLinear, "forward", forward),
    ):
        for layer in [m for m in chunk.modules() if hasattr(m, "fuse_wgrad_accumulation")]:
            # As `make_graphed_callables` leaves every module, so that a capture is one of a first micro-batch.
            layer.is_first_microbatch = True  # type: ignore[assignment]
            layer(torch.zeros(1))
    return told


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_mcore_takes_what_is_decided_for_a_gpu(name: str) -> None:
    [found] = run_distributed(_with_choices, 1, te.NETWORKS[name])
    assert found == {
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "apply_rope_fusion": name == "gqa",
        "cross_entropy_loss_fusion": True,
        "moe_shared_expert_overlap": name == "gqa",
    }
