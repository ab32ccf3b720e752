"""What is computed again in the backward pass: the same gradients by every kind, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.errors import ConfigError
from tests.distributed import run_distributed
from tests.model.grown_model import (
    FAMILIES,
    LOSS_FREE,
    build,
    build_grown,
    gradients_of,
    layout_of,
    model_config,
    relative_error,
)

GQA: dict[str, Any] = {"layers": 3, "dense_first": 1, "shared_expert_ffn_hidden_size": 32, **LOSS_FREE}
MLA: dict[str, Any] = {"attention": "mla", "mla_query_rank": 16, "mla_kv_rank": 16, "mla_head_dim": 8,
                       "mla_rope_head_dim": 8, "mla_value_head_dim": 8}  # fmt: skip
# Norms are leaves whose gradient comes by one way instead of two when their output is computed again: sums of fp32 in
# another order (1e-7 per term). Everything else has the same bits.
ROUNDING = 1e-5
KINDS: list[tuple[dict[str, Any], dict[str, Any], float]] = [
    *((GQA, {"recompute_modules": [name]}, 0.0) for name in ("core_attn", "mlp", "moe", "moe_act", "shared_experts")),
    (GQA, {"recompute_modules": ["layernorm", "mlp", "moe"]}, ROUNDING),
    (GQA | {"activation": "gelu"}, {"recompute_modules": ["moe_act", "shared_experts"]}, 0.0),
    (MLA, {"recompute_modules": ["mla_up_proj"]}, 0.0),
    (MLA, {"recompute_modules": ["core_attn", "layernorm", "mla_up_proj", "moe_act"]}, ROUNDING),
    (GQA, {"recompute": "full", "recompute_layers": 3}, 0.0),
    (GQA, {"recompute": "full", "recompute_method": "block", "recompute_layers": 2}, 0.0),
]


def _gradients(sizes: dict[str, Any], how: dict[str, Any], precision: str, grown: bool) -> dict[str, torch.Tensor]:
    config = model_config(**(sizes | how))
    if grown:
        return gradients_of(build_grown(config, layout_of(), FAMILIES["uneven"], precision=precision))
    return gradients_of(build(config, layout_of(), precision=precision))


def _apart(cases: list[tuple[dict[str, Any], dict[str, Any], float]]) -> list[float]:
    """Largest relative difference between gradients with and without recomputation, per case."""
    found, plain = [], {}
    for sizes, how, _ in cases:
        if str(sizes) not in plain:
            plain[str(sizes)] = _gradients(sizes, {}, "fp32", False)
        kept = plain[str(sizes)]
        again = _gradients(sizes, {"recompute": "selective"} | how, "fp32", False)
        assert all(gradient.abs().sum() > 0 for name, gradient in kept.items() if "weight" in name)
        found.append(max(relative_error(again[name], kept[name]) for name in kept))
    return found


def test_every_kind_gives_the_same_gradients() -> None:
    for (_, how, allowed), apart in zip(KINDS, run_distributed(_apart, 1, KINDS)[0], strict=True):
        assert apart <= allowed, how


def _saved(experts: Any, rows: torch.Tensor, probs: torch.Tensor) -> list[int]:
    """Elements of every tensor that a pass with two rows per expert keeps."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        experts(rows, torch.full((8,), 2), probs)
    return saved


def _special() -> tuple[float, float, list[int], list[int]]:
    """bf16 (the padded layout of grouped experts) and family routing; and elements that one layer keeps of moe_act."""
    bits = []
    for precision, grown in (("bf16", False), ("fp32", True)):
        sizes = LOSS_FREE
        kept = _gradients(sizes, {}, precision, grown)
        again = _gradients(sizes, {"recompute": "selective", "recompute_modules": ["moe_act"]}, precision, grown)
        bits.append(max(relative_error(again[name].float(), kept[name].float()) for name in kept))
    widths = []
    for modules in ([], ["moe_act"]):
        (chunk,) = build(
            model_config(recompute="selective" if modules else "none", recompute_modules=modules), layout_of()
        )
        experts = chunk.decoder.layers[0].mlp.experts
        rows, probs = torch.randn(16, 32, requires_grad=True), torch.rand(16)
        widths.append(_saved(experts, rows, probs))
    return bits[0], bits[1], *widths


def test_grouped_experts_keep_less_in_both_layouts_and_under_families() -> None:
    bf16, families, kept, again = run_distributed(_special, 1)[0]
    assert bf16 == families == 0.0
    activated = 16 * 48
    assert kept.count(activated) == 3 and not again.count(activated)  # silu, silu x up, and the input of fc2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recompute_modules": ["moe"]}, "goes with model.recompute=selective, not none"),
        ({"recompute": "full", "recompute_modules": ["moe"]}, "goes with model.recompute=selective, not full"),
        ({"recompute": "selective", "recompute_layers": 2}, "go with model.recompute=full, not selective"),
        ({"recompute": "selective", "recompute_modules": ["attention"]}, "has attention, which is unknown: use some of"),
        ({"recompute": "selective", "recompute_modules": ["moe", "moe"]}, "names one of them twice"),
        ({"recompute": "selective", "recompute_modules": ["moe", "moe_act"]}, "has moe, which computes moe_act again"),
        ({"recompute": "selective", "recompute_modules": ["mlp"]}, "has mlp, but every layer holds experts"),
        ({"recompute": "selective", "recompute_modules": ["mla_up_proj"]}, "model.attention=gqa has no such projection"),
        ({"recompute": "selective", "recompute_modules": ["shared_experts"]}, "shared_expert_ffn_hidden_size gives it none"),
        ({"recompute": "full", "recompute_method": "some"}, "use one of uniform, block"),
        ({"recompute": "full", "recompute_layers": 0}, "must be above zero"),
        (
            {"recompute": "selective", "recompute_modules": ["moe_act"], "experts": "sequential"},
            "cannot compute again alone: use model.experts=grouped",
        ),
        (
            {"recompute": "selective", "recompute_modules": ["moe_act"], "fp8": "hybrid"},
            "has moe_act, which cannot be computed again under model.fp8_recipe=delayed: use model.fp8_recipe=tensorwise",
        ),
        ({"mcore": {"recompute_granularity": "full"}}, "mcore.recompute_granularity=full has a key of its own: use model.recompute,"),
        ({"mcore": {"cuda_graph_impl": "local"}}, "cuda_graph_impl=local: CUDA graphs have a key of their own"),
        ({"mcore": {"enable_cuda_graph": True}}, "leave model.mcore.enable_cuda_graph out"),
    ],
)  # fmt: skip
def test_refuses_what_has_no_meaning_or_no_effect(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(**changes)


def test_refuses_what_the_pipeline_or_the_modules_cannot_do() -> None:
    from model.recompute import check_layers, check_modules
    from parallel.config import ParallelConfig

    halves = ParallelConfig(pipeline=2)
    uniform = model_config(layers=8, recompute="full", recompute_layers=3)
    with pytest.raises(
        ConfigError, match=r"recompute_layers=3 does not divide the 4 layers .* use model.recompute_layers=2"
    ):
        check_layers(uniform, halves, "parallel.pipeline")
    block = model_config(layers=8, recompute="full", recompute_method="block", recompute_layers=5)
    with pytest.raises(
        ConfigError, match=r"recompute_layers=5 is more than the 4 layers .* use model.recompute_layers=4"
    ):
        check_layers(block, halves, "parallel.pipeline")
    check_layers(uniform, ParallelConfig(pipeline=16), "parallel.pipeline")  # another check refuses that
    activation = model_config(recompute="selective", recompute_modules=["layernorm", "moe_act"])
    with pytest.raises(ConfigError, match=r"has layernorm, .* install ninja"):
        check_modules(activation, "grouped", False)
