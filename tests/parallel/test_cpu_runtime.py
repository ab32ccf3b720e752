"""The real mcore on CPU: a tiny MoE model trains, and layouts that gloo alone refuses give the same numbers."""

from __future__ import annotations

import dataclasses
import sys
import threading
import types
import zlib
from typing import Any

import pytest
import torch

from parallel import cpu_runtime
from parallel.compat import OPTIMIZER_METADATA, make_transformer_config, mark_expert_parameters, prepare_megatron
from parallel.cpu_runtime import cpu_runtime_in_thread, install_cpu_runtime
from parallel.errors import LaunchError
from tests.distributed import run_distributed

VOCABULARY, SEQUENCE, BATCH = 64, 16, 4
# Adam divides a gradient by its size: one that is zero but for rounding becomes a full step in a direction that depends
# on the order of sums, so on the layout. With a large epsilon the update is nearly proportional to the gradient.
ADAM_EPS = 1e-2


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline: int = 1


class Norm(torch.nn.Module):
    """RMS norm whose weight is marked for sequence parallelism, which mcore's own torch norm refuses."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def build(layout: Layout, **changes: Any) -> Any:
    """A tiny GPT-MoE for `layout`, its weights a function of their names only."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 48,
        "ffn_hidden_size": 48,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.tensor > 1,
        "pipeline_model_parallel_size": layout.pipeline,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }
    config = make_transformer_config(TransformerConfig, **(fields | changes))
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    layers = [spec] * (config.num_layers // layout.pipeline)
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    mark_expert_parameters(
        model, tensor=layout.tensor, expert=layout.expert, expert_tensor=layout.expert_tensor
    )
    fill_by_name(model)
    return model


def fill_by_name(model: Any) -> None:
    """Sets every parameter to noise drawn from the name of its global tensor, whatever slice this rank holds."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict(metadata={**OPTIMIZER_METADATA, "dp_cp_group": torch.distributed.group.WORLD})
    apply_factories(state)
    for tensor in state.values():
        if not isinstance(tensor, ShardedTensor) or "norm" in tensor.key:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(tensor.key.encode()))
        whole = torch.randn(tensor.global_shape, generator=generator) * 0.3
        tensor.data.data.copy_(whole[tensor.global_slice()].reshape(tensor.data.shape))


def train(layout: Layout, steps: int, **changes: Any) -> tuple[list[float], list[float]]:
    """Trains on the same batch on every data rank; returns losses and gradient norms."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    module = build(layout, **changes)
    config = module.config
    model = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, adam_eps=ADAM_EPS, use_distributed_optimizer=True, clip_grad=1.0), [model]
    )
    config.finalize_model_grads_func = finalize_model_grads
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]

    def forward_step(_: Any, model: Any) -> Any:
        losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
        return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})

    losses, norms = [], []
    for _ in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )
        updated, norm, _ = optimizer.step()
        assert updated
        losses.append(reports[0]["loss"].item() if parallel_state.is_pipeline_last_stage() else float("nan"))
        norms.append(float(norm))
    parallel_state.destroy_model_parallel()
    return losses, norms


def train_layouts(layouts: list[Layout], steps: int, **changes: Any) -> list[tuple[list[float], list[float]]]:
    return [train(layout, steps, **changes) for layout in layouts]


def assert_same_training(results: list[tuple[list[float], list[float]]]) -> None:
    """All layouts train alike: only the order of fp32 sums differs, over a few updates."""
    *others, (reference, reference_norms) = results
    for losses, norms in others:
        assert losses == pytest.approx(reference, rel=2e-6)
        assert norms == pytest.approx(reference_norms, rel=2e-6)


def test_moe_model_trains_on_two_ranks() -> None:
    for results in run_distributed(train_layouts, 2, [Layout(expert=2), Layout()], 4):
        losses, _ = results[0]
        assert losses[-1] < losses[0] - 1.0
        assert_same_training(results)


def test_expert_tensor_parallel_equals_plain_layout() -> None:
    """With the alltoall dispatcher expert tensor parallelism gathers unequal token counts, which gloo refuses."""
    layouts = [Layout(2, 2, 2), Layout(1, 2, 2), Layout()]
    for results in run_distributed(train_layouts, 4, layouts, 3):
        assert_same_training(results)


def test_expert_tensor_parallel_without_expert_parallel_equals_plain_layout() -> None:
    """mcore 0.16.1 gets these gradients wrong unless `mark_expert_parameters` is called."""
    for results in run_distributed(train_layouts, 4, [Layout(2, 1, 1), Layout(1, 1, 2), Layout()], 3):
        assert_same_training(results)


def test_pipeline_and_tensor_parallel_equal_plain_layout() -> None:
    by_rank = run_distributed(train_layouts, 4, [Layout(tensor=2, expert_tensor=2, pipeline=2), Layout()], 3)
    assert_same_training(by_rank[-1])  # the last rank holds the last pipeline stage
