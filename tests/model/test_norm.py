"""Our norms are torch's norms, and train under sequence parallelism, which mcore's wrapper of them refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.errors import ConfigError
from tests.distributed import run_distributed


def _config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, **changes)


def _like_torch(name: str, dtype: torch.dtype) -> None:
    from model.norm import CoppiceNorm

    norm = CoppiceNorm(
        config=_config(normalization=name, params_dtype=dtype), hidden_size=64, eps=1e-3, has_residual=True
    )
    reference = getattr(torch.nn, name)(64, eps=1e-3, dtype=dtype)
    assert type(norm).__name__ == name
    assert norm.state_dict().keys() == reference.state_dict().keys()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    reference.load_state_dict(norm.state_dict())
    rows = (torch.randn(10, 64) * 100).to(dtype)
    results = []
    for module in (norm, reference):
        leaf = rows.clone().requires_grad_()
        output = module(leaf)
        output.backward(torch.ones_like(output))
        results.append([output, leaf.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_same_numbers_as_torch(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run_distributed(_like_torch, 1, name, dtype)


def _refusals() -> None:
    from model.norm import CoppiceNorm

    with pytest.raises(ConfigError, match="normalization='L2Norm'"):
        CoppiceNorm(_config(normalization="L2Norm"), 64)
    with pytest.raises(ConfigError, match="layernorm_zero_centered_gamma=True"):
        CoppiceNorm(_config(layernorm_zero_centered_gamma=True), 64)


def test_refuses_what_torch_does_not_compute() -> None:
    run_distributed(_refusals, 1)


def _curve(tensor: int, normalization: str) -> tuple[list[tuple[float, float]], list[bool]]:
    """Loss and gradient norm of three steps, and the marks on norm parameters."""
    from model.norm import CoppiceNorm
    from tests.parallel.tiny_gpt import Layout, build, layer_spec, prepare_training, train_step

    spec = layer_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = CoppiceNorm
    model = build(Layout(tensor=tensor, expert_tensor=tensor), spec, normalization=normalization)
    marks = [p.sequence_parallel for name, p in model.named_parameters() if "layernorm" in name]
    wrapped, optimizer = prepare_training(model)
    return [train_step(wrapped, optimizer) for _ in range(3)], marks


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_trains_the_same_under_sequence_parallelism(normalization: str) -> None:
    whole, marks = run_distributed(_curve, 1, 1, normalization)[0]
    assert not any(marks)
    for split, marks in run_distributed(_curve, 2, 2, normalization):
        assert all(marks)
        # Without the mark the curves differ by 1 to 3 %.
        torch.testing.assert_close(torch.tensor(split), torch.tensor(whole), rtol=2e-5, atol=0)
