"""What a run measures of its steps: norms, arithmetic, times, memory, routing; on real runs, several processes, layouts."""

import math
from typing import Any

import pytest
import torch

from model.network import flops_per_token, network_chunks
from model.norms import GROUPS, clip_factor, group_of, norm_figures
from parallel.config import ParallelConfig
from parallel.devices import peak_tflops
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_here, train_in_turn
from train.settings import load_settings

_EVERY_STEP = {"data_seconds", "forward_backward_seconds", "all_to_all_seconds", "optimizer_seconds", "step_flops",
               "tflops_per_device", "mfu", "perplexity", "expert_load_p10", "expert_load_top"}  # fmt: skip
_NOW_AND_THEN = {"memory_bytes", "router_entropy", "bias_min", "bias_max", "grad_norm_experts", "param_norm_norms"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, dict[str, Any]]]:
    """The same run, with a clipping that bites and an expansion after step 3, in three layouts: name -> step -> metrics."""
    folder = tmp_path_factory.mktemp("observed")
    common = [*SMALL, f"data.corpus={small_corpus(folder)}", "run.log_interval_steps=2", "optimizer.clip_grad=0.5",
              "model.shared_expert_ffn_hidden_size=16", "model.dense_first=1", "model.layers=3"]  # fmt: skip
    layouts = {"expert": ["parallel.expert=2"], "tensor": ["parallel.tensor=2", "optimizer.distributed=false"]}
    two = [[*common, *layout, f"run.dir={folder}/{name}"] for name, layout in layouts.items()]
    run_distributed(train_in_turn, 2, two)
    run_distributed(train_here, 1, [*common, f"run.dir={folder}/alone"])
    found = {name: metrics(folder / name) for name in (*layouts, "alone")}
    found["evaluations"] = {i: e["details"] for i, e in enumerate(events(folder / "expert", "evaluation"))}
    return found


def test_every_step_has_the_cheap_figures_and_some_have_all(runs: dict[str, Any]) -> None:
    for name in ("expert", "tensor", "alone"):
        for step, figures in runs[name].items():
            assert set(figures) >= _EVERY_STEP, (name, step)
            measured = _NOW_AND_THEN & set(figures)
            assert measured == (_NOW_AND_THEN if step in (1, 2, 4, 6) else set()), (name, step)
            assert figures["perplexity"] == pytest.approx(math.exp(figures["lm_loss"]))


def test_parts_of_a_step_fit_into_it(runs: dict[str, Any]) -> None:
    for name in ("expert", "alone"):
        for figures in runs[name].values():
            parts = [figures[f"{part}_seconds"] for part in ("data", "forward_backward", "optimizer")]
            assert all(part > 0 for part in parts) and sum(parts) <= figures["step_seconds"]
            assert 0 < figures["all_to_all_seconds"] < figures["forward_backward_seconds"]
            # What is not accounted for is reductions of a few numbers and bookkeeping, even where they wait for a rank.
            assert sum(parts) > 0.5 * figures["step_seconds"]


def test_squares_of_the_groups_add_up_and_do_not_depend_on_the_layout(runs: dict[str, Any]) -> None:
    for name in ("expert", "tensor", "alone"):
        for step, figures in runs[name].items():
            norms = [v for k, v in figures.items() if k.startswith("grad_norm_")]
            if norms:
                # mcore sums fp32 norms, and the clipping factor is divided out again.
                assert figures["grad_norm"] > 0.5, "the clipping does not bite"
                assert math.hypot(*norms) == pytest.approx(figures["grad_norm"], rel=1e-5), (name, step)
    keys = [k for k in runs["alone"][1] if k.startswith("param_norm_")]
    assert {k.removeprefix("param_norm_") for k in keys} == set(GROUPS)
    for name in ("expert", "tensor"):
        for key in keys:
            # Ranks draw what they share out from generators of their own; a tensor counted twice would be 40 % off.
            tolerance = 1e-6 if name == "expert" and key != "param_norm_experts" else 0.1
            assert runs[name][1][key] == pytest.approx(runs["alone"][1][key], rel=tolerance), (name, key)
            # Replicas double the experts and the router rows; the rest stays.
            grown = math.sqrt(2) if key in ("param_norm_experts", "param_norm_router") else 1
            assert runs[name][4][key] / runs[name][2][key] == pytest.approx(grown, rel=0.1), (name, key)


def test_flops_are_those_of_the_plan(runs: dict[str, Any]) -> None:
    settings = load_settings(
        [*SMALL, "data.corpus=x", "model.shared_expert_ffn_hidden_size=16", "model.dense_first=1", "model.layers=3"]
    )
    for experts, step in ((8, 1), (16, 6)):
        network = network_chunks(settings.model, experts, ParallelConfig(), 257, 2)
        per_token = flops_per_token(settings.model, experts, network, 32)
        for name, world in (("expert", 2), ("alone", 1)):
            figures = runs[name][step]
            assert figures["step_flops"] == per_token * 8 * 32
            assert figures["tflops_per_device"] == pytest.approx(
                per_token * 8 * 32 / figures["step_seconds"] / world / 1e12, rel=1e-6
            )
            assert figures["mfu"] is None, "the peak of a CPU is not known"


def test_routing_and_memory(runs: dict[str, Any]) -> None:
    for name in ("expert", "tensor", "alone"):
        for step in (1, 2, 4, 6):
            figures = runs[name][step]
            # An untrained router of small weights is almost undecided.
            assert 0.95 < figures["router_entropy"] <= 1
            # Steps of exactly 0.05 in fp32, bf16 weights or not; after the expansion with noise on top.
            for key in ("bias_min", "bias_max"):
                noise = 1e-3 if step > 3 else 0
                assert abs(figures[key] / 0.05 - round(figures[key] / 0.05)) * 0.05 <= noise + 1e-6, (name, step, key)
            # Some have gone up at the first step and some down; later on that depends on the text.
            assert -0.31 < figures["bias_min"] <= figures["bias_max"] < 0.31
            assert step > 1 or figures["bias_min"] == -figures["bias_max"] == pytest.approx(-0.05)
            assert figures["memory_bytes"] > 100 << 20
            ordered = [figures[f"expert_load_{k}"] for k in ("min", "p10", "p50", "p90", "max")]
            assert ordered == sorted(ordered)
            assert figures["expert_load_min"] <= figures["expert_load_bottom"] <= figures["expert_load_top"]
    # The same extremes in every layout, until rounding decides whether an expert is above the mean.
    assert runs["expert"][1]["bias_max"] == runs["alone"][1]["bias_max"]


def test_siblings_part_in_weights_moments_and_routing(runs: dict[str, Any]) -> None:
    before, after, end = runs["evaluations"].values()
    keys = ("sibling_divergence", "sibling_moment_divergence", "routing_agreement")
    assert all(before[key] is None for key in keys)
    assert after["sibling_divergence"]["max"] < 1e-6 < end["sibling_divergence"]["min"]
    assert after["sibling_moment_divergence"]["max"] < 1e-6 < end["sibling_moment_divergence"]["min"]
    # Not all of them: whose rows of the router have hardly moved in three steps depends on the text.
    assert after["routing_agreement"]["min"] > 1 - 1e-6 > end["routing_agreement"]["min"] > 0.9


def test_entropy_of_a_router_that_has_decided() -> None:
    found = run_distributed(_entropies, 1)[0]
    # Logits of zero, and logits of which one is far above the rest.
    assert found["even"] == pytest.approx([1.0, 1.0]) and found["sure"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found["off"] == [0.0, 0.0]


def _entropies() -> dict[str, list[float]]:
    from model.build import moe_parts
    from model.load import ExpertLoad
    from tests.model.grown_model import SOFTMAX, build, layout_of, model_config

    layout = layout_of()
    chunks = build(model_config(**SOFTMAX), layout)
    parts = moe_parts(chunks)
    load = ExpertLoad(parts, (1, 2), 8, layout.device)
    found = {}
    for name, scale in (("off", 1.0), ("even", 0.0), ("sure", 1.0)):
        load.watch_router(name != "off")
        for part in parts:
            router = part.layer.router
            with torch.no_grad():
                router.weight.zero_()
                router.weight[3] = 1000 * scale
            part.layer.router(torch.ones(6, 1, router.weight.shape[1]))
        total, tokens = load.router_entropy()
        found[name] = (total / tokens.clamp(min=1)).tolist()
    return found


def test_every_parameter_has_a_group() -> None:
    assert group_of("module.decoder.layers.0.self_attention.q_layernorm.weight") == "norms"
    assert group_of("decoder.layers.1.mlp.shared_experts.linear_fc1.weight") == "shared_experts"
    with pytest.raises(ValueError, match="strange"):
        group_of("strange.weight")
    assert clip_factor(math.nan, 1.0) is None
    assert norm_figures(torch.ones(2, len(GROUPS)), None) == {
        f"{kind}_norm_{group}": value for group in GROUPS for kind, value in (("grad", None), ("param", 1.0))
    }
    assert clip_factor(2.0, 1.0) == pytest.approx(0.5, rel=1e-6) and clip_factor(2.0, 0.0) == clip_factor(0.5, 1.0) == 1


def test_peaks_are_told_apart() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4 and peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312 and peak_tflops("NVIDIA L4") == 121
    assert peak_tflops("Abacus 3000") is None
