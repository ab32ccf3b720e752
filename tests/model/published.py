"""Random tiny models of every family, made and judged by transformers in processes of its own.

transformers takes seconds to import and must come before the CPU runtime of mcore, so whatever needs it is done for all
models in one child process: `make` builds and saves them with the logits they give, `judge` loads exports.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

_BASE: dict[str, Any] = dict(
    vocab_size=103, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
_QWEN = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16)
_LATENT = dict(
    num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=16, kv_lora_rank=12,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, first_k_dense_replace=1,
)  # fmt: skip
_YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=32, beta_slow=1
)
# Name -> (class of the configuration, what differs from _BASE).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "mixtral-wide-heads": (
        "MixtralConfig",
        dict(num_local_experts=6, num_experts_per_tok=3, head_dim=16, num_key_value_heads=1, tie_word_embeddings=True),
    ),
    "mixtral-300": ("MixtralConfig", dict(num_local_experts=4, vocab_size=300)),
    "qwen3_moe": ("Qwen3MoeConfig", _QWEN | dict(norm_topk_prob=True, head_dim=16, mlp_only_layers=[0])),
    "qwen3_moe-sparse": (
        "Qwen3MoeConfig",
        _QWEN | dict(norm_topk_prob=False, decoder_sparse_step=2, tie_word_embeddings=True, num_key_value_heads=4),
    ),
    "qwen2_moe": ("Qwen2MoeConfig", _QWEN | dict(shared_expert_intermediate_size=24)),
    "qwen2_moe-normed": (
        "Qwen2MoeConfig",
        _QWEN | dict(shared_expert_intermediate_size=16, norm_topk_prob=True, num_key_value_heads=1, vocab_size=128),
    ),
    "olmoe": ("OlmoeConfig", dict(num_experts=6, num_experts_per_tok=3)),
    "olmoe-normed": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2, num_key_value_heads=4, norm_topk_prob=True)),
    "deepseek_v3": ("DeepseekV3Config", _LATENT | dict(q_lora_rank=16, n_group=4, topk_group=2, num_hidden_layers=3)),
    "deepseek_v3-yarn": (
        "DeepseekV3Config",
        _LATENT | dict(q_lora_rank=None, n_group=1, topk_group=1, first_k_dense_replace=0, n_shared_experts=2,
                       rope_parameters=_YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    ),
    "deepseek_v2": ("DeepseekV2Config", _LATENT | dict(q_lora_rank=None, rope_parameters=_YARN | dict(mscale=0.707, mscale_all_dim=0.707))),
    "deepseek_v2-groups": (
        "DeepseekV2Config",
        _LATENT | dict(q_lora_rank=16, topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=2,
                       routed_scaling_factor=2.0),
    ),
    "llama": ("LlamaConfig", {}),
    "llama-3.1": (
        "LlamaConfig",
        dict(head_dim=16, tie_word_embeddings=True,
             rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                                  high_freq_factor=4.0, original_max_position_embeddings=8192), max_position_embeddings=65536),
    ),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen2-untied": ("Qwen2Config", dict(num_key_value_heads=4, num_hidden_layers=3)),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3-tied": ("Qwen3Config", dict(head_dim=8, tie_word_embeddings=True, num_key_value_heads=1)),
}  # fmt: skip


# Saved in bf16, selection biases in fp32, as the large ones are published.
BF16 = ("qwen3_moe-sparse", "deepseek_v3-yarn")


def token_ids(vocab: int) -> Any:
    """The tokens that all sides look at, [2, 32]."""
    import torch

    return torch.randint(0, vocab, (2, 32), generator=torch.Generator().manual_seed(7))


def make(root: str) -> dict[str, float]:
    """Save a random model of every case under `root` with its logits, in fp32 and, as far as its code lets it, in fp64.

    Args:
        root: folder; one below it per case.

    Returns:
        Case -> how far fp32 is from fp64 in any logit: what rounding alone does to this model.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found = {}
    for number, (name, (cls, changes)) in enumerate(CASES.items()):
        folder = Path(root) / name
        config = getattr(transformers, cls)(**(_BASE | changes))
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "inv_freq" in key:
                    continue
                # Nothing is at its initial value: each norm, bias and gate must be in its place.
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.2 * noise if "norm" in key else 0.1 * noise if tensor.dim() == 1 else 0.25 * noise)
                if name in BF16 and "correction_bias" not in key:
                    tensor.copy_(tensor.bfloat16())
            ids = token_ids(config.vocab_size)
            logits = model(ids).logits
            exact = copy.deepcopy(model).double()(ids).logits
        torch.save({"logits": logits, "exact": exact}, Path(root) / f"{name}.logits")
        if name in BF16:
            # Not the buffers: rotary frequencies would be rounded with them.
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        model.save_pretrained(folder)
        found[name] = (logits.double() - exact).abs().max().item()
        assert math.isfinite(found[name]) and logits.std() > 0.1, name
    return found


def judge(folders: list[str]) -> list[dict[str, Any]]:
    """What transformers makes of published models: logits in fp32, and what their loading had to say."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found = []
    for folder in folders:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
        )
        ids = token_ids(model.config.vocab_size)
        with torch.no_grad():
            logits = model.eval()(ids).logits
        wrong = {key: sorted(map(str, value)) for key, value in told.items() if value}
        found.append(
            {"logits": logits, "told": wrong, "config": json.loads((Path(folder) / "config.json").read_text())}
        )
    return found
