"""Qwen2 and Qwen3, dense and MoE.

Qwen2 has biases in its query, key and value projections, Qwen3 norms per head instead; Qwen2-MoE has a shared expert behind
a gate. Their routers take a softmax over all experts, and divide by the sum over the chosen where `norm_topk_prob` says so.
"""

from collections.abc import Mapping
from typing import Any

from model.hf.mapping import (
    COMMON,
    DENSE,
    EXPERTS,
    FIXED,
    GROUPED_QUERIES,
    LAYER,
    MOE_AUX,
    NAMES,
    QK_NORMS,
    Family,
    key,
    moe_layers,
)
from parallel.errors import ConfigError

# Of no effect with these values, and in some published files: `use_mrope` of Qwen2.5, the last three of Qwen3-Coder.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "use_mrope": (False, None),
}
_IGNORED = frozenset(("sliding_window", "max_window_layers", "layer_types"))
_WITH_BIAS = _REQUIRED | {"qkv_bias": (True,)}
_WITHOUT_BIAS = _REQUIRED | {"attention_bias": (False,), "qkv_bias": (False,), "use_qk_norm": (True,)}


def _full_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    for number, kind in enumerate(config.get("layer_types") or ()):
        if kind != "full_attention":
            raise ConfigError(f"config.json has layer_types[{number}]={kind}, which cannot be expressed here")
    return {}


def _routing(config: Mapping[str, Any]) -> dict[str, Any]:
    _full_attention(config)
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    if not step or step < 1:
        raise ConfigError(f"config.json has decoder_sparse_step={step}, which is no period of layers")
    layers = moe_layers(config["num_hidden_layers"], lambda i: i not in dense and (i + 1) % step == 0)
    return layers | {"router_score": "softmax", "router_pre_softmax": not config.get("norm_topk_prob", False)}


_MOE_FIELDS = {
    "expert_ffn_hidden_size": key("moe_intermediate_size"),
    "top_k": key("num_experts_per_tok"),
}
_MOE_IGNORED = _IGNORED | {"decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"}

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=COMMON | GROUPED_QUERIES,
    fixed=FIXED | {"qkv_bias": True},
    required=_WITH_BIAS,
    ignored=_IGNORED,
    derive=_full_attention,
    suggested=DENSE,
    names=NAMES,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=COMMON | GROUPED_QUERIES | {"head_dim": key("head_dim", default=128)},
    fixed=FIXED | {"qk_norm": True},
    required=_WITHOUT_BIAS,
    ignored=_IGNORED,
    derive=_full_attention,
    suggested=DENSE,
    names=NAMES | QK_NORMS,
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=COMMON
    | GROUPED_QUERIES
    | _MOE_FIELDS
    | {"shared_expert_ffn_hidden_size": key("shared_expert_intermediate_size")},
    fixed=FIXED | {"qkv_bias": True, "shared_expert_gate": True},
    required=_WITH_BIAS,
    ignored=_MOE_IGNORED,
    derive=_routing,
    suggested=MOE_AUX,
    experts=key("num_experts", "num_local_experts"),
    names=NAMES
    | EXPERTS
    | {
        "shared_gate": f"{LAYER}mlp.shared_expert.gate_proj.weight",
        "shared_up": f"{LAYER}mlp.shared_expert.up_proj.weight",
        "shared_down": f"{LAYER}mlp.shared_expert.down_proj.weight",
        "shared_weight": f"{LAYER}mlp.shared_expert_gate.weight",
    },
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=COMMON | GROUPED_QUERIES | _MOE_FIELDS,
    fixed=FIXED | {"qk_norm": True},
    required=_WITHOUT_BIAS | {"shared_expert_intermediate_size": (0, None)},
    ignored=_MOE_IGNORED,
    derive=_routing,
    suggested=MOE_AUX,
    experts=key("num_experts", "num_local_experts"),
    names=NAMES | QK_NORMS | EXPERTS,
)
