"""What config.json means, without weights: forms, refusals, patterns of layers, and blocks that cover every tensor."""

import contextlib
import dataclasses
import itertools
import math
from typing import Any

import pytest

from model.config import ModelConfig
from model.hf.logical import logical_tensors, published_shapes
from model.hf.mapping import moe_layers, rope_values
from model.hf.registry import FAMILIES, family_of
from parallel.errors import ConfigError
from parallel.regions import intersect

# As the repositories of the models have them.
_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_MOE_ONLY = (
    "attention_bias", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts",
    "num_experts_per_tok", "router_aux_loss_coef",
)  # fmt: skip
_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "preset"),
    [(_MIXTRAL, "mixtral_8x7b"), (_QWEN3, "qwen3_30b_a3b"), (_V3, "deepseek_v3")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_presets_are_what_the_published_config_says(config: dict[str, Any], preset: str) -> None:
    from train.settings import load_settings

    settings = load_settings([f"model={preset}", "data.corpus=unused"], world_size=1).model
    published = family_of(config).model_config(config)
    # A preset speaks of the shape; the vocabulary is the tokenizer's, and positions are short in pretraining.
    free = {
        "vocab_size",
        "init_from",
        "rope_scaling",
        "rope_scaling_factor",
        "rope_original_length",
        "rope_mscale_all_dim",
    }
    free |= {"kv_heads", "head_dim"} if preset == "deepseek_v3" else {"head_dim"} if preset == "mixtral_8x7b" else set()
    for field in dataclasses.fields(ModelConfig):
        if field.name not in free:
            assert getattr(published, field.name) == getattr(settings, field.name), field.name


@pytest.mark.parametrize("config", [_MIXTRAL, _QWEN3, _V3], ids=lambda c: str(c["model_type"]))
def test_blocks_cover_every_tensor_once(config: dict[str, Any]) -> None:
    """On both sides: each element of ours, and of each published tensor, lies in exactly one block."""
    small = config | {"num_hidden_layers": 4, "vocab_size": 1001}
    small |= {k: 8 for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config}
    family = family_of(small)
    tensors = logical_tensors(family.model_config(small), 8, family.names)
    filled: dict[str, int] = {}
    for tensor in tensors.values():
        assert sum(block.box.numel for block in tensor.blocks) == math.prod(tensor.shape)
        by_rows = sorted(tensor.blocks, key=lambda block: block.box.offset)
        assert not any(intersect(a.box, b.box) for a, b in itertools.pairwise(by_rows)), tensor.key
        for block in tensor.blocks:
            if block.name is not None:
                filled[block.name] = filled.get(block.name, 0) + block.box.numel
    shapes = published_shapes(tensors.values())
    assert filled == {name: math.prod(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        (_MIXTRAL, {"sliding_window": 4096}, "sliding_window=4096"),
        (_MIXTRAL, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (_MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (_MIXTRAL, {"new_switch": True}, "new_switch=True, which is not known for mixtral"),
        (_MIXTRAL, {"model_type": "mamba"}, "model_type=mamba"),
        (_MIXTRAL, {"model_type": "gpt_oss"}, "MXFP4"),
        (_MIXTRAL, {"architectures": ["MixtralForSequenceClassification"]}, "MixtralForSequenceClassification"),
        (_MIXTRAL, {"quantization_config": {"quant_method": "fp8"}}, "quant_method=fp8"),
        (_MIXTRAL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
        (_MIXTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (_MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 and gates divided by their sum"),
        (_QWEN3, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 and gates divided by their sum"),
        (_QWEN3, {"use_sliding_window": True}, "use_sliding_window=True"),
        (_QWEN3, {"use_qk_norm": False}, "use_qk_norm=False"),
        (_QWEN3, {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size=512"),
        (_QWEN3, {"attention_bias": True}, "attention_bias=True"),
        (_QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types[1]=sliding_attention"),
        (_QWEN3, {"mlp_only_layers": [3, 7]}, "dense (d) layers MMMdMMMdM"),
        (_V3, {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        (_V3, {"topk_group": 2}, "topk_group=2 with num_experts_per_tok=8"),
        (_V3, {"norm_topk_prob": False}, "norm_topk_prob=False"),
        (_V3, {"rope_scaling": _V3["rope_scaling"] | {"beta_fast": 16}}, "beta_fast=16"),
        (_V3, {"rope_scaling": _V3["rope_scaling"] | {"attention_factor": 2.0}}, "attention_factor=2.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and len(value) < 3 else "",
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused(config: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        family_of(config | change).model_config(config | change)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({k: v for k, v in _MIXTRAL.items() if k != "num_local_experts"}, "num_local_experts"),
        (_V3 | {"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings in its rope"),
        (_V3 | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}}, "factor in its rope"),
    ],
    ids=("experts", "length", "factor"),
)
def test_a_missing_field_is_named(config: dict[str, Any], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"has no {missing}"):
        family_of(config).model_config(config)


def test_keys_of_no_effect_in_published_files_are_taken() -> None:
    # Qwen3-Coder-30B-A3B, and the base models of Qwen2.5.
    coder = _QWEN3 | {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
    assert family_of(coder).model_config(coder) == family_of(_QWEN3).model_config(_QWEN3)
    dense = {k: v for k, v in _QWEN3.items() if k not in _MOE_ONLY}
    dense |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    assert family_of(dense).model_config(dense | {"use_mrope": False}) == family_of(dense).model_config(dense)
    with pytest.raises(ConfigError, match="use_mrope=True"):
        family_of(dense).model_config(dense | {"use_mrope": True})


@pytest.mark.parametrize(
    ("config", "absent", "ours", "value"),
    [
        (_MIXTRAL, ("rope_theta",), "rope_base", 1e6),
        (_QWEN3, ("rope_theta",), "rope_base", 1e4),
        (_V3, ("n_group", "topk_group"), "router_groups", 8),
    ],
    ids=("mixtral", "qwen3", "deepseek"),
)
def test_an_absent_key_means_what_it_means_to_transformers(
    config: dict[str, Any], absent: tuple[str, ...], ours: str, value: float
) -> None:
    """Of keys that no tensor's name or shape depends on, so that nothing else would tell."""
    left = {k: v for k, v in config.items() if k not in absent}
    assert getattr(family_of(left).model_config(left), ours) == value


@pytest.mark.parametrize("config", [_MIXTRAL, _QWEN3, _V3], ids=lambda c: str(c["model_type"]))
def test_a_value_of_any_form_is_taken_or_refused(config: dict[str, Any]) -> None:
    """Whatever stands in a config.json, nothing but a ConfigError comes of it."""
    for key in config:
        for other in (None, "x", -1, 0, [], {}, 1.5, True, 1e30):
            changed = config | {key: other}
            with contextlib.suppress(ConfigError):
                family = family_of(changed)
                family.model_config(changed)
                # Nothing that has passed breaks what is built on it, which must not be large here.
                logical_tensors(family.model_config(changed | {"num_hidden_layers": 4}), 4, family.names)
    for key in ("hidden_size", "num_hidden_layers", "num_experts_per_tok", "vocab_size", "rms_norm_eps", "rope_theta"):
        with pytest.raises(ConfigError, match=f"{key}='x'"):
            family_of(config).model_config(config | {key: "x"})


def test_llama3_needs_the_lengths_that_mcore_has() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = {"rope_theta": 500000.0, "rope_scaling": scaling | {"rope_type": "llama3"}}
    new = {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 500000.0}}
    assert rope_values(old, latent=False) == rope_values(new, latent=False)
    assert rope_values(old, latent=False)["rope_scaling_factor"] == 8.0
    old["rope_scaling"] = scaling | {"rope_type": "llama3", "original_max_position_embeddings": 4096}
    with pytest.raises(ConfigError, match="original_max_position_embeddings=4096"):
        rope_values(old, latent=False)


@pytest.mark.parametrize("layers", [1, 4, 9])
def test_every_pattern_that_we_can_build_is_found(layers: int) -> None:
    for period in range(1, layers + 1):
        for first in range(layers):
            for last in range(layers - first):
                model = {"layers": layers, "dense_first": first, "dense_last": last, "moe_period": period}
                if period > layers - first - last:
                    continue
                numbers = ModelConfig(**model).moe_layer_numbers()  # type: ignore[arg-type]
                found = moe_layers(layers, lambda i, numbers=numbers: i + 1 in numbers)  # type: ignore[misc]
                assert ModelConfig(layers=layers, **found).moe_layer_numbers() == numbers


def test_families_say_what_their_keys_are() -> None:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for family in FAMILIES.values():
        assert {*family.fields, *family.fixed, *family.suggested} <= known
