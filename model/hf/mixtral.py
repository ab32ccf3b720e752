"""Mixtral: every layer MoE, softmax over the chosen experts, an auxiliary loss."""

from model.hf.mapping import COMMON, FIXED, GROUPED_QUERIES, LAYER, MOE_AUX, NAMES, Family, key

_MOE = f"{LAYER}block_sparse_moe."

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=COMMON
    | GROUPED_QUERIES
    | {
        "norm_epsilon": key("rms_norm_eps", default=1e-5),
        "expert_ffn_hidden_size": key("intermediate_size"),
        "top_k": key("num_experts_per_tok"),
    },
    # Softmax over all experts and then division by the sum over the chosen is softmax over the chosen.
    fixed=FIXED | {"router_score": "softmax", "router_pre_softmax": False},
    required={"hidden_act": ("silu",), "sliding_window": (None,), "router_jitter_noise": (0.0,)},
    suggested=MOE_AUX,
    rope_base=1e6,
    experts=key("num_local_experts"),
    names=NAMES
    | {
        "router": f"{_MOE}gate.weight",
        "expert_gate": _MOE + "experts.{expert}.w1.weight",
        "expert_up": _MOE + "experts.{expert}.w3.weight",
        "expert_down": _MOE + "experts.{expert}.w2.weight",
    },
)
