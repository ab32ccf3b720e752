"""What `model.mcore` cannot be used for: fields of mcore that have a key of their own, and parameters of unknown form.

Set past its key, a field would win without a word, and what a run checks, prints and writes of itself would be wrong.
"""

import importlib.util
from collections.abc import Callable, Collection, Mapping
from typing import Any

from parallel.errors import ConfigError, shown

_RECOMPUTE = "model.recompute, model.recompute_modules, model.recompute_method and model.recompute_layers"
_DENSE = "model.dense_first, model.dense_last and model.moe_period"
# Not here, because mcore has values of them that no key gives: the two dropouts by themselves, and the balancing of experts.
KEYS = {
    # The network.
    "num_layers": "model.layers",
    "hidden_size": "model.hidden_size",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "num_attention_heads": "model.attention_heads",
    "num_query_groups": "model.kv_heads",
    "kv_channels": "model.head_dim",
    "multi_latent_attention": "model.attention",
    "q_lora_rank": "model.mla_query_rank",
    "kv_lora_rank": "model.mla_kv_rank",
    "qk_head_dim": "model.mla_head_dim",
    "qk_pos_emb_head_dim": "model.mla_rope_head_dim",
    "v_head_dim": "model.mla_value_head_dim",
    "rope_type": "model.rope_scaling",
    "rotary_base": "model.rope_base",
    "rotary_percent": "model.rope_percent",
    "rotary_scaling_factor": "model.rope_scaling_factor",
    "original_max_position_embeddings": "model.rope_original_length",
    "mscale": "model.rope_mscale",
    "mscale_all_dim": "model.rope_mscale_all_dim",
    "qk_layernorm": "model.qk_norm",
    "normalization": "model.normalization",
    "layernorm_epsilon": "model.norm_epsilon",
    "activation_func": "model.activation",
    "gated_linear_unit": "model.activation",
    "add_bias_linear": "model.linear_bias",
    "add_qkv_bias": "model.qkv_bias",
    "init_method_std": "model.init_std",
    # Its experts and their router.
    "num_moe_experts": "model.num_experts",
    "moe_router_topk": "model.top_k",
    "moe_ffn_hidden_size": "model.expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "model.shared_expert_ffn_hidden_size",
    "moe_shared_expert_gate": "model.shared_expert_gate",
    "moe_layer_freq": _DENSE,
    "moe_router_score_function": "model.router_score",
    "moe_router_pre_softmax": "model.router_pre_softmax",
    "moe_router_num_groups": "model.router_groups",
    "moe_router_group_topk": "model.router_group_topk",
    "moe_router_topk_limited_devices": "model.router_groups and model.router_group_topk",
    "moe_router_topk_scaling_factor": "model.router_scale",
    "moe_router_enable_expert_bias": "model.balancing=loss_free",
    "moe_router_bias_update_rate": "model.bias_update_rate",
    "moe_aux_loss_coeff": "model.aux_loss_coeff",
    "moe_z_loss_coeff": "model.z_loss_coeff",
    "moe_expert_capacity_factor": "model.capacity_factor",
    # How it is computed.
    "moe_grouped_gemm": "model.experts",
    "moe_token_dispatcher_type": "model.dispatcher",
    "moe_enable_deepep": "model.dispatcher=flex",
    "moe_flex_dispatcher_backend": "performance.flex_backend",
    "moe_permute_fusion": "performance.permute_fusion",
    "moe_router_fusion": "performance.router_fusion",
    "apply_rope_fusion": "performance.rope_fusion",
    "cross_entropy_loss_fusion": "performance.cross_entropy_fusion",
    "gradient_accumulation_fusion": "performance.gradient_accumulation_fusion",
    "moe_shared_expert_overlap": "performance.shared_expert_overlap",
    "overlap_moe_expert_parallel_comm": "performance.expert_parallel_overlap",
    "recompute_granularity": _RECOMPUTE,
    "recompute_modules": _RECOMPUTE,
    "recompute_method": _RECOMPUTE,
    "recompute_num_layers": _RECOMPUTE,
    "moe_layer_recompute": _RECOMPUTE,
    "fp8": "model.fp8",
    "fp8_recipe": "model.fp8_recipe",
    "bf16": "run.precision",
    "fp16": "run.precision",
    "params_dtype": "run.precision",
    "pipeline_dtype": "run.precision",
    # The layout.
    "tensor_model_parallel_size": "parallel.tensor",
    "sequence_parallel": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
}
_ONE_TENSOR = "makes one parameter of all experts, in a form that checkpoints and the switch do not know"
_NOT_PRIMARY = "would keep weights in a form that no checkpoint, switch or fingerprint knows: they stay bf16"
_LATE = "makes weight gradients after those that wait for them have gone on"
# Field -> why no value but its neutral one can be had.
REFUSED = {
    "fp8_param": _NOT_PRIMARY,
    "fp4_param": _NOT_PRIMARY,
    "fp4": "computes in 4 bits, of which neither sizes nor devices are checked: use model.fp8",
    "delay_wgrad_compute": _LATE,
    "overlap_dispatch_backward_with_experts_wgrad": _LATE,
    "moe_single_grouped_weight": _ONE_TENSOR,
    "moe_single_grouped_bias": _ONE_TENSOR,
    "moe_mlp_glu_interleave_size": "mixes the rows of gate and up projections, as checkpoints and published models do not",
    "hierarchical_context_parallel_sizes": "needs groups on two levels, which no layout here has",
    "hybrid_context_parallel": "reads samples of mcore's own packing, which no corpus here gives",
    "mtp_num_layers": "adds layers that predict further tokens, which no checkpoint, switch or count here knows",
    "experimental_attention_variant": "builds an attention that no checkpoint, switch or count here knows",
    "heterogeneous_block_specs": "reads a config of another class, which nothing here makes",
    "use_kitchen": "builds layers of NVIDIA's Kitchen, which nothing here knows",
    "overlap_p2p_comm": "is switched on where parallel.virtual_pipeline has a use for it, and nowhere else",
    "batch_p2p_comm": "is switched off where parallel.virtual_pipeline would mix up activations and gradients by it",
    "use_ring_exchange_p2p": "needs a function that no published torch has",
    "num_microbatches_with_partial_activation_checkpoints": "goes by micro-batches, which no loop here tells",
    "config_logger_dir": "has mcore write the weights, and the logits of every forward pass, to files outside of run.dir",
    "cache_mla_latents": "is of inference, and stops training",
}
# Values of `moe_router_load_balancing_type` that family routing has no answer to.
WITHOUT_FAMILIES = ("sinkhorn", "quantile_balancing")
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", *WITHOUT_FAMILIES)
_IS_PROBABILITY: tuple[Callable[[float], bool], str] = (lambda value: 0 <= value < 1, "a probability below 1")
# Field -> the values it can have, where a layer or a step finds out what mcore's config lets through.
_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "attention_dropout": _IS_PROBABILITY,
    "hidden_dropout": _IS_PROBABILITY,
    "embedding_init_method_std": (lambda value: value >= 0, "zero or more"),
    "moe_input_jitter_eps": (lambda value: 0 < value < 1, "above zero and below 1"),
    "moe_latent_size": (lambda value: value > 0, "above zero"),
}
# Fields that only layers of Transformer Engine have an answer to, always or in bf16.
_OF_ENGINE = (
    "cpu_offloading",
    "fused_single_qkv_rope",
    "layernorm_zero_centered_gamma",
    "moe_latent_size",
    "use_grouped_gemm_for_shared_expert",
    "use_te_activation_func",
)
_OF_ENGINE_IN_BF16 = ("fp32_residual_connection",)
_SOFTMAX = "scaled_masked_softmax_cuda"


def refuse_fields(fields: Mapping[str, Any]) -> None:
    """Refuse fields that have a key of their own, and those whose networks nothing here can hold.

    Args:
        fields: `model.mcore`, passed to mcore's TransformerConfig.

    Raises:
        ConfigError: naming the field, its value, and the key or the reason.
    """
    for name, value in fields.items():
        if name in KEYS:
            raise ConfigError(f"model.mcore.{name}={shown(value)} has a key of its own: use {KEYS[name]}")
        if name in REFUSED and not (value is None or value is False or value == ""):
            raise ConfigError(f"model.mcore.{name}={shown(value)} {REFUSED[name]}; leave it out")


def refuse_values(model: Any, known: Collection[str]) -> None:
    """Refuse values that mcore's config lets through and a layer or a step would stumble over.

    Args:
        model: a `ModelConfig`, its `mcore` typed.
        known: fields of this mcore's config.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    for name, value in model.mcore.items():
        fits, words = _BOUNDS.get(name, (None, ""))
        if fits is not None and value is not None and not fits(value):
            raise ConfigError(f"model.mcore.{name}={shown(value)} must be {words}")
    if model.mcore.get("qk_l2_norm") and model.attention == "mla":
        raise ConfigError("model.mcore.qk_l2_norm=true does not go with model.attention=mla: leave it out")
    told = model.mcore.get("moe_router_load_balancing_type")
    key = f"model.mcore.moe_router_load_balancing_type={shown(told)}"
    kinds = [
        kind for kind in _BALANCING if kind != "quantile_balancing" or "moe_router_quantile_balancing_ema" in known
    ]
    if isinstance(told, str) and told not in kinds:
        # mcore would balance nothing, without a word.
        raise ConfigError(f"{key} is unknown: use one of {', '.join(kinds)}")
    if told == "sinkhorn" and model.aux_loss_coeff and model.balancing != "none":
        raise ConfigError(f"{key} goes without a loss: use model.aux_loss_coeff=0, not {model.aux_loss_coeff}")
    if model.mcore.get("moe_apply_probs_on_input") and model.top_k != 1:
        raise ConfigError(
            f"model.mcore.moe_apply_probs_on_input=true needs model.top_k=1, not {model.top_k}: leave it out"
        )


def refuse_without_engine(model: Any, bf16: bool) -> None:
    """Refuse fields that our own layers, and mcore's of torch, have no answer to.

    Args:
        model: a `ModelConfig` whose layers are not Transformer Engine's.
        bf16: precision of the run.

    Raises:
        ConfigError: naming the field and the remedy.
    """
    for name in (*_OF_ENGINE, *(_OF_ENGINE_IN_BF16 if bf16 else ())):
        if model.mcore.get(name):
            raise ConfigError(
                f"model.mcore.{name}={shown(model.mcore[name])} needs layers of Transformer Engine and a GPU: install both "
                "(docs/gpu.md), and use model.transformer_impl=auto, or leave it out"
            )
    if bf16 and model.mcore.get("masked_softmax_fusion") and importlib.util.find_spec(_SOFTMAX) is None:
        raise ConfigError(
            f"model.mcore.masked_softmax_fusion=true needs {_SOFTMAX}, a kernel of Megatron-LM's that is not installed: "
            "leave it out"
        )
