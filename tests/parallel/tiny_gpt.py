"""A tiny GPT-MoE of mcore's own parts, for tests of `parallel/` that need a real model in a real layout."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch

from parallel.compat import OPTIMIZER_METADATA, make_transformer_config

VOCABULARY, SEQUENCE, BATCH, HIDDEN, EXPERTS = 64, 16, 4, 32, 4
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


def layer_spec() -> Any:
    """The spec of one MoE transformer layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    return spec


def build(layout: Layout, spec: Any = None, **changes: Any) -> Any:
    """Forms the groups of `layout` and builds the model in it, its weights a function of their names only.

    Args:
        layout: group sizes; they must divide the world.
        spec: of every layer; `layer_spec()` if absent.
        **changes: fields of the `TransformerConfig` that differ from the defaults here.
    """
    from megatron.core import parallel_state, tensor_parallel
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
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
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
    layers = [spec or layer_spec()] * (config.num_layers // layout.pipeline)
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
    for layer in model.decoder.layers:
        for parameter in layer.mlp.experts.parameters():
            # mcore 0.16.1 forgets the last case, and then reduces gradients over the wrong ranks without an error.
            parameter.allreduce = layout.expert == 1 and layout.expert_tensor == layout.tensor
    for tensor, values in named_noise(model):
        tensor.copy_(values)
    return model


def sharded_state(model: Any) -> dict[str, Any]:
    """The model's sharded state dict, as Coppice writes it."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={**OPTIMIZER_METADATA, "dp_cp_group": group})


def named_noise(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every parameter (detached) with this rank's slice of noise drawn from the name of the global tensor."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    pairs = []
    for sharded in sharded_state(model).values():
        if isinstance(sharded, ShardedTensor) and "norm" not in sharded.key:
            generator = torch.Generator().manual_seed(zlib.crc32(sharded.key.encode()))
            whole = torch.randn(sharded.global_shape, generator=generator) * 0.3
            data = sharded.data.detach()
            pairs.append((data, whole[sharded.global_slice()].reshape(data.shape)))
    return pairs


def prepare_training(model: Any) -> tuple[Any, Any]:
    """Wraps the model in mcore's DDP and makes its distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    options = OptimizerConfig(
        optimizer="adam", lr=1e-2, adam_eps=ADAM_EPS, use_distributed_optimizer=True, clip_grad=1.0
    )
    return wrapped, get_megatron_optimizer(options, [wrapped])


def train_step(wrapped: Any, optimizer: Any) -> tuple[float, float]:
    """One update on a batch that is the same on every data rank; returns loss (nan before the last stage) and norm."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]

    def forward_step(_: Any, model: Any) -> Any:
        losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
        return losses, lambda output: (output.mean(), {"loss": output.mean().item()})

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[wrapped],
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
    )
    updated, norm, _ = optimizer.step()
    assert updated
    return (reports[0]["loss"] if reports else float("nan")), float(norm)


def train(layout: Layout, steps: int, **changes: Any) -> tuple[list[float], list[float]]:
    """Builds, trains and takes down the groups again; returns losses and gradient norms."""
    from megatron.core import parallel_state

    wrapped, optimizer = prepare_training(build(layout, **changes))
    curve = [train_step(wrapped, optimizer) for _ in range(steps)]
    parallel_state.destroy_model_parallel()
    return [loss for loss, _ in curve], [norm for _, norm in curve]
