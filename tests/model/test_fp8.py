"""FP8: what is refused before anything is built, and what mcore is told."""

from typing import Any
from unittest import mock

import pytest

from model.config import ModelConfig
from model.fp8 import check_device, mcore_fields
from parallel.errors import ConfigError
from tests.distributed import run_distributed
from train.settings import load_settings

_PADDING = "moe_router_padding_for_quantization"
_BASE = ["model=tiny", "data.corpus=x", "run.precision=bf16", "model.fp8=hybrid"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.precision=fp32"], r"model\.fp8=hybrid needs run\.precision=bf16, not fp32"),
        (["model.expert_ffn_hidden_size=40"], r"model\.expert_ffn_hidden_size=40 is not .* of 16.*expert_ffn_hidden_size=48"),
        (["model.fp8_recipe=mxfp8", "model.hidden_size=80", "model.attention_heads=4", "model.kv_heads=2"],
         r"model\.hidden_size=80 is not a multiple of 32.*model\.hidden_size=96"),
        (["model.expert_ffn_hidden_size=48", "parallel.expert_tensor=2"],
         r"expert_ffn_hidden_size=48 / parallel\.expert_tensor=2 is not a multiple of 16.*expert_ffn_hidden_size=64"),
        (["model.fp8=yes"], r"model\.fp8=.* is unknown: use one of none, hybrid, e4m3"),
        (["model.fp8_recipe=best"], r"model\.fp8_recipe=best is unknown"),
    ],
)  # fmt: skip
def test_what_products_cannot_be_made_of_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings([*_BASE, *overrides], 2)


def test_without_fp8_any_size_will_do() -> None:
    load_settings([*_BASE, "model.fp8=none", "model.expert_ffn_hidden_size=40", "run.precision=fp32"], 2)
    check_device("none", "mxfp8", (7, 0), "NVIDIA V100")
    assert mcore_fields(ModelConfig()) == {}
    # mcore cannot have the router pad under allgather; the experts do.
    assert _PADDING in mcore_fields(ModelConfig(fp8="hybrid", dispatcher="alltoall"))
    assert _PADDING not in mcore_fields(ModelConfig(fp8="hybrid", dispatcher="allgather"))


def test_a_device_that_cannot_is_told_what_it_can() -> None:
    check_device("hybrid", "delayed", (8, 9), "NVIDIA L4")
    check_device("e4m3", "blockwise", (9, 0), "NVIDIA H100")
    with pytest.raises(
        ConfigError, match=r"mxfp8 needs compute capability 10\.0, and NVIDIA H100 has 9\.0: use .*=delayed"
    ):
        check_device("hybrid", "mxfp8", (9, 0), "NVIDIA H100")
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has 8\.0: use model\.fp8=none"):
        check_device("hybrid", "delayed", (8, 0), "NVIDIA A100")


def _told() -> tuple[str, Any, Any, bool]:
    import torch
    from megatron.core.transformer import transformer_config as of_mcore

    from model import build
    from tests.model.grown_model import layout_of, model_config

    config, layout = model_config(fp8="hybrid", fp8_recipe="blockwise"), layout_of()
    with pytest.raises(ConfigError) as refused:
        build.transformer_config(config, 8, layout.config, "bf16", device=layout.device)
    # What a Hopper card with Transformer Engine would be told; mcore's own checks of the combination run.
    with (
        mock.patch.multiple(build, experts_kind=lambda model: "te", uses_engine=lambda model: True),
        mock.patch.object(of_mcore, "is_te_min_version", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA H200"),
    ):
        made = build.transformer_config(config, 8, layout.config, "bf16", device=layout.device)
    return str(refused.value), made.fp8, made.fp8_recipe, made.moe_router_padding_for_quantization


@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 1.5}])
def test_what_the_router_sends_more_leaves_gradients_as_they_are(changes: dict[str, Any]) -> None:
    [apart] = run_distributed(_padded, 1, changes)
    assert apart < 1e-6


def _padded(changes: dict[str, Any]) -> float:
    """How far mcore's padding for 8 bits takes the gradients of a network that computes in fp32."""
    import copy

    from model.build import moe_parts
    from tests.model import grown_model as grown

    chunks = grown.build(grown.model_config(**changes), grown.layout_of())
    expected = grown.gradients_of(chunks)
    told = mcore_fields(grown.model_config(**changes, fp8="hybrid", fp8_recipe="tensorwise"))
    for part in moe_parts(chunks):
        dispatcher = part.layer.token_dispatcher
        dispatcher.config = copy.copy(dispatcher.config)
        vars(dispatcher.config).update(told)
    found = grown.gradients_of(chunks)
    return max(grown.relative_error(found[name], value) for name, value in expected.items())


def test_mcore_is_told_and_refuses_without_transformer_engine() -> None:
    [(refused, fmt, recipe, padding)] = run_distributed(_told, 1)
    assert "model.fp8=hybrid needs Transformer Engine" in refused
    assert (fmt, recipe, padding) == ("hybrid", "blockwise", True)
