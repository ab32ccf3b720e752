"""`GroupedExperts` computes, initialises and checkpoints what mcore's `SequentialMLP` does, on real layers and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parallel.errors import CheckpointError, ConfigError
from tests.distributed import run_distributed

HIDDEN, FFN, LOCAL = 32, 48, 4
COUNTS = {
    "uneven": [7, 3, 12, 2],
    "empty experts": [0, 9, 0, 4],
    "one expert has all": [0, 0, 11, 0],
    "no tokens": [0, 0, 0, 0],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "geglu": {"activation_func": F.gelu},
    "clamped": {"activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0},
    "ungated": {"gated_linear_unit": False, "activation_func": F.gelu},
    # mcore's experts with biases fail at EP = 1 ("a view is being modified inplace"), so the config claims EP = 2.
    "biases": {"add_bias_linear": True, "expert_model_parallel_size": 2, "num_moe_experts": 2 * LOCAL},
    "probs on input": {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
    "latent": {"moe_latent_size": 16},
}


def _config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": LOCAL,
        "moe_ffn_hidden_size": FFN,
        "moe_router_topk": 2,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
    }
    return TransformerConfig(**(fields | changes))


def _groups(**sizes: int) -> Any:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def _sequential(config: Any, groups: Any, local: int = LOCAL) -> Any:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return SequentialMLP(local, config, parts, pg_collection=groups)


def _stacks(sequential: Any, attribute: str = "data") -> dict[str, torch.Tensor]:
    """SequentialMLP's parameters (or their gradients) under the names and in the shapes of GroupedExperts."""
    names = {"linear_fc1.weight": "weight1", "linear_fc2.weight": "weight2"}
    names |= {"linear_fc1.bias": "bias1.bias", "linear_fc2.bias": "bias2.bias"}
    stacks: dict[str, list[torch.Tensor]] = {}
    for expert in sequential.local_experts:
        for name, parameter in expert.named_parameters():
            stacks.setdefault(names[name], []).append(getattr(parameter, attribute))
    return {name: torch.stack(tensors) for name, tensors in stacks.items()}


def _pair(**changes: Any) -> tuple[Any, Any]:
    from model.experts import GroupedExperts

    config, groups = _config(**changes), _groups()
    sequential, grouped = _sequential(config, groups), GroupedExperts(LOCAL, config, pg_collection=groups)
    with torch.no_grad():
        for parameter in sequential.parameters():
            parameter.normal_(std=0.5)
        for name, stack in _stacks(sequential).items():
            grouped.get_parameter(name).copy_(stack)
    return sequential, grouped


def _run(experts: Any, counts: list[int], probs_dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of the inputs, for inputs and an output gradient that are the same in every call."""
    dtype = next(experts.parameters()).dtype
    width = experts.config.moe_latent_size or HIDDEN
    noise = torch.Generator().manual_seed(3)
    rows = torch.randn(sum(counts), width, generator=noise).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=noise).to(probs_dtype).requires_grad_()
    output, bias = experts(rows, torch.tensor(counts), probs)
    assert bias is None
    output.backward(torch.randn(output.shape, generator=noise).to(dtype))
    return [output.detach(), rows.grad, probs.grad]


def _compare(counts: list[int], probs_dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    sequential, grouped = _pair(**changes)
    theirs = _run(sequential, counts, probs_dtype)
    ours = _run(grouped, counts, probs_dtype)
    for parameter in sequential.parameters():  # None where an expert had no tokens; ours must be zeros
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = _stacks(sequential, "grad")
    assert gradients.keys() == dict(grouped.named_parameters()).keys()
    for name, parameter in grouped.named_parameters():
        assert parameter.grad is not None, name
        ours.append(parameter.grad)
        theirs.append(gradients[name])
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        scale = their.abs().max().item() if their.numel() else 0
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * scale)


def _compare_all(probs_dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    for counts in COUNTS.values():
        _compare(counts, probs_dtype, tolerance, changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward_match_sequential(variant: str) -> None:
    # fp32 sums of at most 96 products in another order: errors of a few 1e-7 of the largest term.
    run_distributed(_compare_all, 1, torch.float32, 3e-6, VARIANTS[variant])


@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16])
def test_bf16_matches_sequential(probs_dtype: torch.dtype) -> None:
    # Same roundings to bf16 (8 bits) in both; a sum in another order can tip one of them, worth 2**-8 of its value,
    # and what follows carries it on.
    bf16 = {"params_dtype": torch.bfloat16, "bf16": True}
    run_distributed(_compare_all, 1, probs_dtype, 2**-7, bf16)
