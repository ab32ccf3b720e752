"""mcore's fields for the keys of a network and a layout, group by group: what a TransformerConfig is told.

`model/build.py` joins them. Fields of keys that have a file of their own come from there (`choices.py`, `recompute.py`,
`fp8.py`); `mcore_fields.py` lists which key each field belongs to.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu

from model.config import ModelConfig
from parallel.config import ParallelConfig

_ACTIVATIONS: dict[str, tuple[Any, bool]] = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "gelu": (F.gelu, False),
    "squared_relu": (squared_relu, False),
}
# Loss-free balancing may be helped by a small loss per sequence (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
_BALANCING = {"loss_free": "seq_aux_loss"}


def network_values(model: ModelConfig) -> dict[str, Any]:
    """Of the layers that every network has."""
    activation, gated = _ACTIVATIONS[model.activation]
    return dict(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        qk_layernorm=model.qk_norm,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        activation_func=activation,
        gated_linear_unit=gated,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        init_method_std=model.init_std,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        bias_activation_fusion=torch.cuda.is_available() and model.activation == "swiglu",
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )


def precision_values(precision: str) -> dict[str, Any]:
    """Of `run.precision`: `bf16` or `fp32`."""
    bf16 = precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return dict(bf16=bf16, params_dtype=dtype, pipeline_dtype=dtype)


def layout_values(parallel: ParallelConfig) -> dict[str, Any]:
    """Of the parallel sizes."""
    values: dict[str, Any] = dict(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleaved(),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # mcore requires it for MoE under tensor parallelism, and it never costs anything.
        sequence_parallel=parallel.tensor > 1,
    )
    if parallel.interleaved():
        # With two pipeline ranks both neighbours are the same rank, and one batch of sends and receives would mix up
        # activations and gradients: mcore then trains on garbage without an error.
        values |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
    return values


def unset_values() -> dict[str, Any]:
    """Of layers that draw no initial weights.

    Not by perform_initialization, which would leave out the tensor-parallel marks of the weights as well.
    """
    return dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), _leave_unset)


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    """An initialiser that draws nothing."""
    return weight


def latent_values(model: ModelConfig) -> dict[str, Any]:
    """Of latent attention; none for another kind."""
    if model.attention != "mla":
        return {}
    values: dict[str, Any] = dict(
        q_lora_rank=model.mla_query_rank,
        kv_lora_rank=model.mla_kv_rank,
        qk_head_dim=model.mla_head_dim,
        qk_pos_emb_head_dim=model.mla_rope_head_dim,
        v_head_dim=model.mla_value_head_dim,
        rope_type="rope",
        rotary_base=model.rope_base,
    )
    if model.rope_scaling == "yarn":
        values |= dict(
            rope_type="yarn",
            rotary_scaling_factor=model.rope_scaling_factor,
            original_max_position_embeddings=model.rope_original_length,
            mscale=model.rope_mscale,
            mscale_all_dim=model.rope_mscale_all_dim,
        )
    return values


def expert_values(model: ModelConfig, num_experts: int, te: bool) -> dict[str, Any]:
    """Of MoE layers and their router; none for a dense model.

    Args:
        model: the network.
        num_experts: experts per MoE layer in this stage.
        te: whether Transformer Engine computes them.
    """
    if not num_experts:
        return {}
    return dict(
        num_moe_experts=num_experts,
        moe_router_topk=model.top_k,
        moe_ffn_hidden_size=model.expert_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.shared_expert_ffn_hidden_size,
        moe_shared_expert_gate=model.shared_expert_gate,
        moe_layer_freq=model.moe_layer_pattern(),
        moe_router_score_function=model.router_score,
        moe_router_pre_softmax=model.router_pre_softmax,
        moe_router_num_groups=model.router_groups,
        moe_router_group_topk=model.router_group_topk,
        moe_router_topk_scaling_factor=model.router_scale,
        moe_router_load_balancing_type=_BALANCING.get(model.balancing, model.balancing),
        moe_aux_loss_coeff=0.0 if model.balancing == "none" else model.aux_loss_coeff,
        moe_z_loss_coeff=model.z_loss_coeff,
        moe_router_enable_expert_bias=model.balancing == "loss_free",
        moe_router_bias_update_rate=model.bias_update_rate,
        moe_router_dtype="fp32",
        moe_expert_capacity_factor=model.capacity_factor,
        moe_grouped_gemm=te,
    )
