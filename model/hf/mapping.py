"""What a family of published models is: which fields of config.json mean which of our keys, and what tensors are called.

A family is data (`llama.py` and the like); the code that reads a config.json by it is here. Every key of a config.json is
accounted for: it sets one of ours, must have a value that we compute the same way, or is known to change nothing. Any other
key is refused by name, so that nothing that matters is passed over in silence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from model.config import HOW_IT_RUNS, ModelConfig
from parallel.errors import ConfigError

# Keys that do not change what the network computes.
_IGNORED = frozenset(
    ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "auto_map",
     "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "output_router_logits",
     "attention_dropout", "pretraining_tp", "rope_theta", "rope_scaling", "rope_parameters", "initializer_range",
     "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type",
     "is_encoder_decoder", "chunk_size_feed_forward", "tokenizer_class", "quantization_config", "tie_word_embeddings",
     "partial_rotary_factor")
)  # fmt: skip
_ABSENT = object()
# Our keys that say how a network is trained or computed, not what it is.
_NOT_ARCHITECTURE = HOW_IT_RUNS | {"vocab_multiple", "balancing"}

# Forms of keys that set none of ours alone; null is allowed.
_FORMS: dict[str, tuple[type, ...]] = {
    "architectures": (list,), "layer_types": (list,), "mlp_only_layers": (list,), "quantization_config": (dict,),
    "rope_parameters": (dict,), "rope_scaling": (dict,), "decoder_sparse_step": (int,), "first_k_dense_replace": (int,),
    "n_group": (int,), "topk_group": (int,), "n_shared_experts": (int,),
}  # fmt: skip


def _require_form(name: str, value: Any, forms: tuple[type, ...]) -> None:
    """Refuse a value that is not of one of the forms; a truth value is no number."""
    forms = (*forms, int) if float in forms else forms
    if not isinstance(value, forms) or (isinstance(value, bool) and bool not in forms):
        told = " or ".join("null" if form is type(None) else form.__name__ for form in forms)
        raise ConfigError(
            f"config.json has {name}={value!r}, which is not {told}: it is damaged, or of another version"
        )


@dataclass(frozen=True)
class Field:
    """A key of config.json that sets one of ours.

    Attributes:
        keys: its names, the one that is written first.
        default: what it means where the file does not have it; without one it must be there.
    """

    keys: tuple[str, ...]
    default: Any = _ABSENT

    def of(self, config: Mapping[str, Any]) -> Any:
        """Its value.

        Raises:
            ConfigError: if it must be there and is not.
        """
        for key in self.keys:
            if key in config:
                return config[key]
        if self.default is _ABSENT:
            raise ConfigError(f"config.json has no {' or '.join(self.keys)}: it is not complete")
        return self.default


def key(*names: str, default: Any = _ABSENT) -> Field:
    """A field by its names."""
    return Field(names, default)


@dataclass(frozen=True)
class Family:
    """One family of published models.

    Attributes:
        model_type: as in config.json.
        architecture: the class that config.json names.
        fields: our key -> what sets it.
        fixed: our keys that are the same for the whole family.
        required: key of config.json -> the values that we compute alike; the first is what an absent key means.
        ignored: further keys that change nothing.
        names: what its tensors are called (`logical.py`).
        derive: our keys that take more than one field.
        suggested: our key -> what sets it unless the user does, because it is about training.
        experts: the field with the number of routed experts; None for a dense family.
        left_out: whether a tensor of the folder is no part of what is trained here, such as a prediction head.
        on_export: fields of config.json that an export changes, because what they speak of is left out.
        rope_base: what a config.json without `rope_theta` means.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Field]
    fixed: Mapping[str, Any]
    names: Mapping[str, str]
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    suggested: Mapping[str, Field | str | float] = field(default_factory=dict)
    experts: Field | None = None
    left_out: Callable[[Mapping[str, Any], str], bool] = lambda config, name: False
    on_export: Mapping[str, Any] = field(default_factory=dict)
    rope_base: float = 10000.0

    def architecture_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our keys, as config.json sets them: the network, and nothing about how it is trained.

        Raises:
            ConfigError: naming a key and its value that we cannot express.
        """
        self._refuse(config)
        values: dict[str, Any] = {f.name: f.default for f in fields(ModelConfig) if f.name not in _NOT_ARCHITECTURE}
        hints = get_type_hints(ModelConfig) | {"vocab_size": int}
        experts = {} if self.experts is None else {"num_experts": self.experts}
        for name, f in {**self.fields, **experts}.items():
            values[name] = f.of(config)
            _require_form(f.keys[0], values[name], get_args(hints[name]) or (hints[name],))
        values |= {"num_experts": 0 if self.experts is None else values["num_experts"]} | dict(self.fixed)
        values |= rope_values(config, latent=values.get("attention") == "mla", base=self.rope_base)
        values |= self.derive(config)
        if (
            values["num_experts"]
            and values["top_k"] == 1
            and (values["router_score"], values["router_pre_softmax"])
            == (
                "softmax",
                False,
            )
        ):
            raise ConfigError(
                "config.json has num_experts_per_tok=1 and gates divided by their sum, which then are 1 whatever the router "
                "says: mcore does not build it, as its router could not learn"
            )
        return values

    def training_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our keys that are about training, as the family is trained, where the user says nothing else."""
        for f in self.suggested.values():
            if isinstance(f, Field):
                _require_form(f.keys[0], f.of(config), (float,))
        return {k: f.of(config) if isinstance(f, Field) else f for k, f in self.suggested.items()}

    def _refuse(self, config: Mapping[str, Any]) -> None:
        for name, forms in _FORMS.items():
            if config.get(name) is not None:
                _require_form(name, config[name], forms)
        if config.get("quantization_config"):
            method = dict(config["quantization_config"]).get("quant_method", "unknown")
            raise ConfigError(
                f"config.json has quantization_config (quant_method={method}): quantised weights cannot be trained; "
                "take the bf16 version of the model, or dequantise it first"
            )
        for name, allowed in self.required.items():
            value = config.get(name, allowed[0])
            if value not in allowed:
                shown = " or ".join(repr(v) for v in dict.fromkeys(allowed))
                raise ConfigError(
                    f"config.json has {name}={value!r}, which cannot be expressed here for {self.model_type} (only "
                    f"{shown})"
                )
        known = {n for f in (*self.fields.values(), *self.suggested.values()) if isinstance(f, Field) for n in f.keys}
        known |= {*self.required, *self.ignored, *_IGNORED, *(self.experts.keys if self.experts else ())}
        for name, value in config.items():
            if name not in known and not name.startswith("_"):
                raise ConfigError(
                    f"config.json has {name}={value!r}, which is not known for {self.model_type}: remove the key from it if "
                    "it does not change what the model computes"
                )

    def model_config(self, config: Mapping[str, Any], **training: Any) -> ModelConfig:
        """The network of a config.json, with training keys as the family suggests them, or as given."""
        return ModelConfig(**{**self.training_values(config), **training, **self.architecture_values(config)})


def rope_values(config: Mapping[str, Any], *, latent: bool, base: float = 10000.0) -> dict[str, Any]:
    """Our keys of rotary embeddings, from either form: `rope_parameters`, or `rope_theta` with `rope_scaling`.

    Args:
        config: of the model.
        latent: whether attention is multi-head latent.
        base: where the file has no `rope_theta`.

    Raises:
        ConfigError: for a kind of scaling that mcore does not compute, naming it.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = scaling.pop("rope_theta", config.get("rope_theta", base))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ConfigError(f"config.json has partial_rotary_factor={partial}, which cannot be expressed here (only 1.0)")
    _require_form("rope_theta", base, (float,))
    values: dict[str, Any] = {"rope_base": float(base), "rope_scaling": "none"}
    if kind == "default":
        return values
    if kind == ("yarn" if latent else "llama3"):
        try:
            values |= (_yarn if latent else _llama3)(scaling)
        except KeyError as e:
            raise ConfigError(f"config.json has no {e.args[0]} in its rope parameters: it is not complete") from None
        except (TypeError, ValueError) as e:
            raise ConfigError(f"config.json has rope parameters that are no numbers: {e}") from None
        return values
    raise ConfigError(
        f"config.json has rope_type={kind}, which mcore does not compute for this attention: only default and "
        f"{'yarn' if latent else 'llama3'}"
    )


def _take(scaling: dict[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    value = scaling.pop(name, allowed[0])
    if value not in allowed:
        raise ConfigError(
            f"config.json has {name}={value!r} in its rope parameters; mcore computes {allowed[0]!r} only"
        )


def _llama3(scaling: dict[str, Any]) -> dict[str, Any]:
    for name, fixed in (
        ("original_max_position_embeddings", 8192),
        ("low_freq_factor", 1.0),
        ("high_freq_factor", 4.0),
    ):
        _take(scaling, name, (fixed,))
    factor = float(scaling.pop("factor"))
    _refuse_rest(scaling)
    return {"rope_scaling": "llama3", "rope_scaling_factor": factor, "rope_original_length": 8192}


def _yarn(scaling: dict[str, Any]) -> dict[str, Any]:
    for name, fixed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        _take(scaling, name, (fixed,))
    _take(scaling, "attention_factor", (None,))
    mscale, all_dim = scaling.pop("mscale", None) or 0.0, scaling.pop("mscale_all_dim", None) or 0.0
    if not mscale and all_dim:
        raise ConfigError(f"config.json has mscale_all_dim={all_dim} without mscale in its rope parameters")
    values = {
        "rope_scaling": "yarn",
        "rope_scaling_factor": float(scaling.pop("factor")),
        "rope_original_length": int(scaling.pop("original_max_position_embeddings")),
        # Where only one of the two is given, transformers takes 1 and none for the magnitude of the rotated part.
        "rope_mscale": float(mscale) if all_dim else 1.0,
        "rope_mscale_all_dim": float(all_dim),
    }
    _refuse_rest(scaling)
    return values


def _refuse_rest(scaling: Mapping[str, Any]) -> None:
    if scaling:
        name = min(scaling)
        raise ConfigError(f"config.json has {name}={scaling[name]!r} in its rope parameters, which is not known")


def moe_layers(layers: int, is_moe: Callable[[int], bool]) -> dict[str, int]:
    """Our `dense_first`, `dense_last` and `moe_period` for a pattern of layers.

    Args:
        layers: how many.
        is_moe: whether a layer, from 0, has experts.

    Raises:
        ConfigError: if the three keys cannot say it, with the pattern.
    """
    wanted = [is_moe(i) for i in range(layers)]
    for period in range(1, layers + 1):
        for first in range(layers):
            for last in range(layers - first):
                middle = range(first, layers - last)
                found = {i for n, i in enumerate(middle) if (n + 1) % period == 0}
                if [i in found for i in range(layers)] == wanted:
                    return {"dense_first": first, "dense_last": last, "moe_period": period}
    shown = "".join("M" if moe else "d" for moe in wanted)
    raise ConfigError(
        f"config.json has MoE (M) and dense (d) layers {shown}: they are not dense ends and a period between them"
    )


# What nearly all families have in common.
COMMON: dict[str, Field] = {
    "vocab_size": key("vocab_size"),
    "layers": key("num_hidden_layers"),
    "hidden_size": key("hidden_size"),
    "ffn_hidden_size": key("intermediate_size"),
    "attention_heads": key("num_attention_heads"),
    "norm_epsilon": key("rms_norm_eps", default=1e-6),
    "tie_embeddings": key("tie_word_embeddings", default=False),
}
GROUPED_QUERIES: dict[str, Field] = {
    "kv_heads": key("num_key_value_heads", default=None),
    "head_dim": key("head_dim", default=None),
}
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "linear_bias": False,
    "rope_percent": 1.0,
    "attention": "gqa",
}
MOE_AUX: dict[str, Any] = {
    "balancing": "aux_loss",
    "aux_loss_coeff": key("router_aux_loss_coef", default=0.001),
    "init_std": key("initializer_range", default=0.02),
}
DENSE: dict[str, Any] = {"balancing": "none", "init_std": key("initializer_range", default=0.02)}
LAYER = "model.layers.{layer}."
NAMES: dict[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "output": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "attention_norm": f"{LAYER}input_layernorm.weight",
    "mlp_norm": f"{LAYER}post_attention_layernorm.weight",
    "query": f"{LAYER}self_attn.q_proj.weight",
    "key": f"{LAYER}self_attn.k_proj.weight",
    "value": f"{LAYER}self_attn.v_proj.weight",
    "attention_output": f"{LAYER}self_attn.o_proj.weight",
    "dense_gate": f"{LAYER}mlp.gate_proj.weight",
    "dense_up": f"{LAYER}mlp.up_proj.weight",
    "dense_down": f"{LAYER}mlp.down_proj.weight",
}
QK_NORMS: dict[str, str] = {
    "query_norm": f"{LAYER}self_attn.q_norm.weight",
    "key_norm": f"{LAYER}self_attn.k_norm.weight",
}
EXPERTS: dict[str, str] = {
    "router": f"{LAYER}mlp.gate.weight",
    "expert_gate": LAYER + "mlp.experts.{expert}.gate_proj.weight",
    "expert_up": LAYER + "mlp.experts.{expert}.up_proj.weight",
    "expert_down": LAYER + "mlp.experts.{expert}.down_proj.weight",
}
