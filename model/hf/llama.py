"""Llama 2 and 3: dense, grouped-query attention, `llama3` scaling of rotary frequencies."""

from model.hf.mapping import COMMON, DENSE, FIXED, GROUPED_QUERIES, NAMES, Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=COMMON | GROUPED_QUERIES,
    fixed=FIXED,
    required={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    suggested=DENSE,
    names=NAMES,
)
