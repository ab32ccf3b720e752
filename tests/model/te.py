"""Transformer Engine's own modules on CPU, for the tests that build them and never run them.

Its kernels need CUDA, its parameters, its Adam's state and mcore's descriptions of them do not. On CPU the runtime gives mcore
torch's Adam (`parallel/cpu_runtime.py`); `its_adam` puts back the one that a GPU would have.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

# Whose layers and whose experts, by the name of both: Transformer Engine's layers with its experts, mcore's of torch with ours
# and with mcore's; then Transformer Engine's layers with these two.
KINDS = ("te", "grouped", "sequential", "te+grouped", "te+sequential")
_EXPERTS = {"te": "TEGroupedMLP", "grouped": "GroupedExperts", "sequential": "SequentialMLP"}
SIZES: dict[str, Any] = dict(
    layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    attention_heads=4,
    num_experts=4,
    expert_ffn_hidden_size=48,
    moe_period=2,
)
_LATENT: dict[str, Any] = dict(
    attention="mla", mla_query_rank=16, mla_kv_rank=16, mla_head_dim=16, mla_rope_head_dim=8, mla_value_head_dim=16
)
NETWORKS: dict[str, dict[str, Any]] = {
    "gqa": dict(kv_heads=2, qk_norm=True, shared_expert_ffn_hidden_size=16, shared_expert_gate=True),
    "all heads": dict(qk_norm=True, qk_norm_all_heads=True, tie_embeddings=True),
    "biases": dict(linear_bias=True, qkv_bias=True, normalization="LayerNorm", activation="gelu"),
    "mla": dict(**_LATENT, qk_norm=True),
    "yarn": dict(**_LATENT, qk_norm=True, rope_scaling="yarn", rope_scaling_factor=4.0, rope_original_length=16),
}


def layout(**sizes: int) -> Any:
    from parallel.config import ParallelConfig
    from parallel.layout import Layout

    return Layout.create(ParallelConfig(**sizes), seed=3)


def built(kind: str, network: dict[str, Any], layout: Any, experts: int = 4, precision: str = "bf16") -> list[Any]:
    """Chunks of a small network with layers of a kind."""
    from model.config import ModelConfig

    chunks = built_as(kind, ModelConfig(**(SIZES | network)), layout, experts, precision=precision)
    name = _EXPERTS[kind.removeprefix("te+")]
    found = {type(part.layer.experts).__name__ for part in moe_layers(chunks)}
    assert found <= {name}, found
    return chunks


def moe_layers(chunks: list[Any]) -> list[Any]:
    from model.build import moe_parts

    return moe_parts(chunks)


def built_as(
    kind: str, model: Any, layout: Any, experts: int, vocab_size: int = 64, precision: str = "bf16"
) -> list[Any]:
    """Chunks of any network with layers of a kind."""
    from model import build
    from parallel.compat import forget_models

    forget_models()
    with (
        mock.patch.object(build, "experts_kind", return_value=kind.removeprefix("te+")),
        # All that Transformer Engine's constructors ask of the device.
        mock.patch.object(torch.cuda, "is_available", return_value=kind.startswith("te")),
    ):
        return build.build_chunks(
            model, experts, layout, vocab_size=vocab_size, sequence_length=32, precision=precision
        )


@contextlib.contextmanager
def its_adam() -> Iterator[None]:
    """mcore's choice of Adam as on a GPU; also a decorator. mcore asks for it again at every save and load."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    with (
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield


def optimizer(chunks: list[Any], *, distributed: bool = True) -> Any:
    """mcore's optimizer over mcore's DDP, with its Adam or torch's."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = chunks[0].config
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    inside = [Float16Module(config, c) if config.bf16 else c for c in chunks]
    wrapped = [DistributedDataParallel(config=config, ddp_config=ddp, module=module) for module in inside]
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=distributed,
    )
    return get_megatron_optimizer(options, wrapped)


def is_its_adam(optimizer: Any) -> bool:
    """Whether Transformer Engine's Adam is in an optimizer of mcore."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    return all(type(single.optimizer) is FusedAdam for single in optimizer.chained_optimizers)


def fill(chunks: list[Any], optimizer: Any, layout: Any) -> None:
    """Every tensor of the state a function of its key, so that layouts and kinds agree without anything being moved."""
    from model.holdings import describe_stage

    with torch.no_grad():
        state = describe_stage(chunks, optimizer, layout, moments=True)
        for key, holding in state.holdings().items():
            for box in holding.boxes:
                view = state.view(key, box)
                index = torch.zeros(box.shape, dtype=torch.float64)
                for axis, (offset, size) in enumerate(zip(box.offset, box.shape, strict=True)):
                    shape = [1] * len(box.shape)
                    shape[axis] = size
                    index = index * 131 + torch.arange(offset, offset + size, dtype=torch.float64).view(shape)
                view.copy_((torch.sin(index + zlib.crc32(key.encode()) % 977)).to(view.dtype))


def state(chunks: list[Any], optimizer: Any, layout: Any) -> dict[str, list[int]]:
    from model.fingerprint import take_fingerprints

    return take_fingerprints(chunks, optimizer, layout)


@contextlib.contextmanager
def steps_on_cpu() -> Iterator[None]:
    """Its Adam steps, with a stand-in for its kernel alone, which needs CUDA; the rest of its `step` is its own."""
    from transformer_engine.pytorch.optimizers import fused_adam

    with mock.patch.object(fused_adam, "multi_tensor_applier", _adam_kernel):
        yield


@torch.no_grad()
def _adam_kernel(
    op: Any,
    flag: torch.Tensor,
    lists: list[list[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    corrects: int,
    weight_decay: float,
) -> None:
    """`multi_tensor_adam` of Transformer Engine 2.11 for fp32 weights: its arguments, its order of sums, fp32 betas."""
    assert flag.item() == 0 and decoupled == 1 and corrects == 1
    one, two = (torch.tensor(beta, dtype=torch.float32) for beta in (beta1, beta2))
    correction1, correction2 = (1 - float(beta) ** step for beta in (one, two))
    for g, p, m, v in zip(*lists, strict=True):
        assert p.dtype == m.dtype == v.dtype == torch.float32
        m.copy_(one * m + (1 - one) * g)
        v.copy_(two * v + (1 - two) * g * g)
        p.sub_(lr * (m / correction1 / ((v / correction2).sqrt() + eps) + weight_decay * p))


def views(optimizer: Any) -> list[Any]:
    from parallel.optimizer_state import optimizer_views

    return list(optimizer_views(optimizer))


def wrapped_of(optimizer: Any) -> list[Any]:
    """The chunks of an optimizer of mcore in their DDP."""
    return list(optimizer.chained_optimizers[0].model_chunks)


def held_weights(chunks: list[Any], layout: Any) -> dict[str, torch.Tensor]:
    """Key -> what this rank holds of a weight, in one piece, fp32."""
    from model import holdings

    with mock.patch.object(holdings, "optimizer_views", lambda optimizer: ()):
        state = holdings.describe_stage(chunks, None, layout, moments=False)
    return {
        key: torch.cat([state.view(key, box).detach().float().reshape(-1) for box in holding.boxes])
        for key, holding in state.holdings().items()
    }
