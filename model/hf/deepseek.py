"""DeepSeek-V2 and V3: multi-head latent attention, shared experts, leading dense layers.

V3 chooses by sigmoid scores with a selection bias inside groups of experts; what mcore computes is its rule exactly where
top-K / groups is 2, because V3 scores a group by its best two and mcore by its best top-K / groups. V2 takes a softmax over
all experts and scores a group by its best one. Norms of the compressed queries and keys have an epsilon of 1e-6 in the
published code whatever `rms_norm_eps` says, so only that value can be expressed. Heads of multi-token prediction are left
out, in an import with a line of its own, and an export says that there are none.
"""

import re
from collections.abc import Mapping
from typing import Any

from model.hf.mapping import COMMON, EXPERTS, FIXED, LAYER, NAMES, Family, Field, key, moe_layers
from parallel.errors import ConfigError

_FIELDS: dict[str, Field] = COMMON | {
    "mla_query_rank": key("q_lora_rank", default=None),
    "mla_kv_rank": key("kv_lora_rank"),
    "mla_head_dim": key("qk_nope_head_dim"),
    "mla_rope_head_dim": key("qk_rope_head_dim"),
    "mla_value_head_dim": key("v_head_dim"),
    "expert_ffn_hidden_size": key("moe_intermediate_size"),
    "top_k": key("num_experts_per_tok"),
    "router_scale": key("routed_scaling_factor", default=1.0),
}
_FIXED = FIXED | {"attention": "mla", "qk_norm": True, "kv_heads": None}
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "rms_norm_eps": (1e-6,),
    "moe_layer_freq": (1,),
}
_IGNORED = frozenset(
    ("num_key_value_heads", "head_dim", "qk_head_dim", "first_k_dense_replace", "n_group", "topk_group", "n_shared_experts",
     "topk_method", "scoring_func", "norm_topk_prob", "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers")
)  # fmt: skip
_NAMES = (
    NAMES
    | EXPERTS
    | {
        "query_down": f"{LAYER}self_attn.q_a_proj.weight",
        "query_down_norm": f"{LAYER}self_attn.q_a_layernorm.weight",
        "query_up": f"{LAYER}self_attn.q_b_proj.weight",
        "kv_down": f"{LAYER}self_attn.kv_a_proj_with_mqa.weight",
        "kv_down_norm": f"{LAYER}self_attn.kv_a_layernorm.weight",
        "kv_up": f"{LAYER}self_attn.kv_b_proj.weight",
        "shared_gate": f"{LAYER}mlp.shared_experts.gate_proj.weight",
        "shared_up": f"{LAYER}mlp.shared_experts.up_proj.weight",
        "shared_down": f"{LAYER}mlp.shared_experts.down_proj.weight",
    }
)
_LAYER_NUMBER = re.compile(r"model\.layers\.(\d+)\.")


def _layers(config: Mapping[str, Any]) -> dict[str, Any]:
    dense = config.get("first_k_dense_replace") or 0
    shared = config.get("n_shared_experts")
    if not shared:
        raise ConfigError(f"config.json has n_shared_experts={shared}: transformers builds one or more for this family")
    return moe_layers(config["num_hidden_layers"], lambda i: i >= dense) | {
        "shared_expert_ffn_hidden_size": config["moe_intermediate_size"] * shared
    }


def _groups(config: Mapping[str, Any], best: int) -> dict[str, Any]:
    """Group-limited routing, where groups are scored by the sum of their `best` highest experts."""
    groups, chosen, top_k = config.get("n_group"), config.get("topk_group"), config["num_experts_per_tok"]
    if groups in (None, 1) or groups == chosen:
        return {"router_groups": None, "router_group_topk": None}
    if not chosen or top_k != best * chosen:
        raise ConfigError(
            f"config.json has topk_group={chosen} with num_experts_per_tok={top_k}: mcore scores a group by its best "
            f"num_experts_per_tok / topk_group experts, this family by its best {best}, so the quotient has to be {best}"
        )
    return {"router_groups": groups, "router_group_topk": chosen}


def _v3(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("norm_topk_prob") is False or config["num_experts_per_tok"] == 1:
        raise ConfigError(
            f"config.json has norm_topk_prob={config.get('norm_topk_prob')} and "
            f"num_experts_per_tok={config['num_experts_per_tok']}: mcore divides sigmoid gates by their sum where there are "
            "two or more, and only there"
        )
    # What the published code takes where the file does not say.
    return _layers(config) | _groups({"n_group": 8, "topk_group": 4, **config}, best=2)


def _v2(config: Mapping[str, Any]) -> dict[str, Any]:
    method = config.get("topk_method", "greedy")
    none = {"router_groups": None, "router_group_topk": None}
    return _layers(config) | (none if method == "greedy" else _groups(config, best=1))


def _prediction_head(config: Mapping[str, Any], name: str) -> bool:
    number, layers = _LAYER_NUMBER.match(name), config["num_hidden_layers"]
    heads = config.get("num_nextn_predict_layers") or 0
    return number is not None and layers <= int(number[1]) < layers + heads


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fields=_FIELDS | {"router_scale": key("routed_scaling_factor", default=2.5)},
    fixed=_FIXED | {"router_score": "sigmoid", "balancing": "loss_free"},
    required=_REQUIRED | {"rope_interleave": (True,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ignored=_IGNORED,
    derive=_v3,
    suggested={"init_std": key("initializer_range", default=0.02)},
    experts=key("n_routed_experts", "num_local_experts"),
    names=_NAMES | {"selection_bias": f"{LAYER}mlp.gate.e_score_correction_bias"},
    left_out=_prediction_head,
    on_export={"num_nextn_predict_layers": 0},
)

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    fields=_FIELDS,
    fixed=_FIXED | {"router_score": "softmax", "router_pre_softmax": True},
    required=_REQUIRED
    | {
        "mlp_bias": (False,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, None),
    },
    ignored=_IGNORED,
    derive=_v2,
    suggested={
        "init_std": key("initializer_range", default=0.02),
        "balancing": "seq_aux_loss",
        "aux_loss_coeff": key("aux_loss_alpha", default=0.001),
    },
    experts=key("n_routed_experts", "num_experts"),
    names=_NAMES,
)
