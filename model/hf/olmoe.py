"""OLMoE: every layer MoE, norms of queries and keys over all heads together (`model.qk_norm_all_heads`)."""

from collections.abc import Mapping
from typing import Any

from model.hf.mapping import COMMON, EXPERTS, FIXED, GROUPED_QUERIES, MOE_AUX, NAMES, QK_NORMS, Family, key


def _routing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"router_score": "softmax", "router_pre_softmax": not config.get("norm_topk_prob", False)}


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    fields=COMMON
    | GROUPED_QUERIES
    | {
        "norm_epsilon": key("rms_norm_eps", default=1e-5),
        "expert_ffn_hidden_size": key("intermediate_size"),
        "top_k": key("num_experts_per_tok"),
    },
    fixed=FIXED | {"qk_norm": True, "qk_norm_all_heads": True},
    required={"hidden_act": ("silu",), "attention_bias": (False,), "clip_qkv": (None,)},
    ignored=frozenset(("norm_topk_prob",)),
    derive=_routing,
    suggested=MOE_AUX | {"aux_loss_coeff": key("router_aux_loss_coef", default=0.01)},
    experts=key("num_experts", "num_local_experts"),
    names=NAMES | QK_NORMS | EXPERTS,
)
