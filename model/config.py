"""Typed schema of the `model` group: what a user may say about the network, and what is impossible.

Values come from `configs/model/*.yaml` and the command line; `model/build.py` turns them into mcore's TransformerConfig.
"""

from dataclasses import dataclass, field
from typing import Any

from model.fp8 import FP8_FORMATS, FP8_RECIPES
from model.graphs import refuse_graph_fields
from model.mcore_fields import refuse_fields
from model.recompute import METHODS, RECOMPUTE, check_recompute
from parallel.errors import ConfigError

ATTENTION = ("gqa", "mla")
ACTIVATIONS = ("swiglu", "geglu", "gelu", "squared_relu")
BALANCING = ("loss_free", "aux_loss", "seq_aux_loss", "global_aux_loss", "none")
DISPATCHERS = ("auto", "alltoall", "allgather", "flex")
EXPERT_KINDS = ("auto", "grouped", "sequential", "te")
IMPLEMENTATIONS = ("auto", "transformer_engine", "local")
NORMS = ("RMSNorm", "LayerNorm")
SCORES = ("softmax", "sigmoid")
ROPE_SCALINGS = ("none", "llama3", "yarn")
HF_PREFIX = "hf:"
# More than any network has; a list of as many as a slip of the finger asks for would fill the memory.
_MAX_LAYERS = 10_000
# Keys that say how a network is begun, trained or computed, not what it is: a checkpoint and the run that continues it may
# differ in them, and a published model has none.
HOW_IT_RUNS = frozenset(
    ("init_from", "init_std", "dropout", "aux_loss_coeff", "z_loss_coeff", "bias_update_rate", "capacity_factor",
     "transformer_impl", "experts", "dispatcher", "recompute", "recompute_modules", "recompute_method", "recompute_layers",
     "fp8", "fp8_recipe", "mcore")
)  # fmt: skip


def one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value outside a fixed set, naming the set."""
    if value not in choices:
        raise ConfigError(f"{key}={value} is unknown: use one of {', '.join(choices)}")


def toggle(key: str, value: bool | str) -> None:
    """Refuse what is neither auto nor true nor false."""
    if not isinstance(value, bool) and value != "auto":
        raise ConfigError(f"{key}={value} is unknown: use one of auto, true, false")


def positive(key: str, value: int | float | None, *, zero: bool = False) -> None:
    """Refuse a size that is negative, or zero where zero has no meaning. None passes."""
    if value is None or value > 0 or (zero and value == 0):
        return
    raise ConfigError(f"{key}={value} must be {'zero or more' if zero else 'above zero'}")


def divides(key: str, value: int, by_key: str, by: int) -> None:
    """Refuse sizes that do not divide, naming both keys and the nearest value that would."""
    if by > 0 and value % by:
        lower = value // by * by
        near = f"{lower} or {lower + by}" if lower else f"{by}"
        raise ConfigError(f"{key}={value} is not divisible by {by_key}={by}: use {key}={near}, or another {by_key}")


@dataclass
class ModelConfig:
    """One GPT-MoE network. Sizes are counts or feature dims; `num_experts` is that of the first stage."""

    # `hf:DIR` begins with a published model in Hugging Face's format; its architecture replaces that of the preset
    # (docs/huggingface.md). null draws the weights.
    init_from: str | None = None
    # Rows of the embedding that stand for tokens; null means those of the data's tokenizer.
    vocab_size: int | None = None
    # Transformer layers in the decoder, dense ones included.
    layers: int = 4
    # Width of the residual stream.
    hidden_size: int = 256
    # Width of the dense feed-forward layers.
    ffn_hidden_size: int = 512
    # Query heads.
    attention_heads: int = 8
    # Key/value heads shared by groups of query heads; null means one per query head.
    kv_heads: int | None = None
    # Width of one head; null means hidden_size / attention_heads.
    head_dim: int | None = None
    # `gqa` (grouped-query; multi-head when kv_heads is null) or `mla` (multi-head latent attention).
    attention: str = "gqa"
    # MLA only: ranks of the compressed query and key/value, and the widths of the two parts of a head.
    mla_query_rank: int | None = None
    mla_kv_rank: int = 512
    mla_head_dim: int = 128
    mla_rope_head_dim: int = 64
    mla_value_head_dim: int = 128
    # Normalise queries and keys per head.
    qk_norm: bool = False
    # Normalise all heads of queries, and of keys, together (gqa only; needs parallel.tensor=1).
    qk_norm_all_heads: bool = False
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    activation: str = "swiglu"
    # Bias terms in linear layers; in the qkv projection alone.
    linear_bias: bool = False
    qkv_bias: bool = False
    rope_base: float = 10000.0
    rope_percent: float = 1.0
    # Stretched rotary frequencies: none, `llama3` (gqa only) or `yarn` (mla only).
    rope_scaling: str = "none"
    # How far they are stretched.
    rope_scaling_factor: float = 1.0
    # Sequence length they were first trained at.
    rope_original_length: int = 8192
    # yarn only: weight of the correction of magnitude in the rotated part of a head.
    rope_mscale: float = 1.0
    # yarn only: weight of the correction of magnitude in the whole head.
    rope_mscale_all_dim: float = 0.0
    # Use one matrix for the input embedding and the output layer.
    tie_embeddings: bool = False
    # Rows of the embedding are padded up to a multiple of this, which parallel.tensor must divide.
    vocab_multiple: int = 128
    init_std: float = 0.02
    dropout: float = 0.0

    # Experts per MoE layer at the first stage; 0 builds a dense model.
    num_experts: int = 8
    # Experts chosen per token (K); unchanged by an expansion.
    top_k: int = 2
    # Width of one expert's feed-forward.
    expert_ffn_hidden_size: int = 512
    # Total width of the experts every token passes; null means none.
    shared_expert_ffn_hidden_size: int | None = None
    # Weigh what the shared experts give by a gate of their own, a learned sigmoid per token.
    shared_expert_gate: bool = False
    # Leading and trailing layers that stay dense, and the period of MoE layers between them (2: every second one).
    dense_first: int = 0
    dense_last: int = 0
    moe_period: int = 1
    # Gate scores; softmax may be taken before top-K (over all experts) or after (over the chosen ones).
    router_score: str = "sigmoid"
    router_pre_softmax: bool = False
    # Group-limited routing: number of routing groups and how many a token may use; null means none.
    router_groups: int | None = None
    router_group_topk: int | None = None
    # Factor on the combined gates; null means none.
    router_scale: float | None = None
    # Load balancing: `loss_free` moves a selection bias after each step (needs sigmoid), the others add a loss.
    balancing: str = "loss_free"
    # Weight of the balancing loss; under loss_free of an additional loss per sequence, 0 for none.
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float | None = None
    # Change of the selection bias per step under loss_free.
    bias_update_rate: float = 1e-3
    # Tokens an expert takes at most, as a multiple of the even share; null never drops a token.
    capacity_factor: float | None = None

    # Whose layers, norms and attention: auto takes Transformer Engine's where it is installed with a GPU; local is mcore's
    # of torch, whose attention keeps its scores.
    transformer_impl: str = "auto"
    # Expert module: te (Transformer Engine's), grouped (ours), sequential (mcore's, one by one) or auto (docs/gpu.md).
    experts: str = "auto"
    # How tokens travel to their experts: auto (docs/gpu.md), alltoall, allgather or flex (DeepEP, HybridEP).
    dispatcher: str = "auto"
    # What is computed again in the backward pass instead of kept: none, selective (parts of every layer) or full (layers).
    recompute: str = "none"
    # selective only: core_attn, layernorm, mla_up_proj, mlp, moe, moe_act, shared_experts; empty means core_attn.
    recompute_modules: list[str] = field(default_factory=list)
    # full only: `uniform` cuts a rank's layers into units of recompute_layers and keeps the input of each; `block` does
    # so with single layers, for the first recompute_layers of a chunk, and keeps everything of the others.
    recompute_method: str = "uniform"
    # full only: layers per unit (uniform), or layers that are computed again in each chunk of the pipeline (block).
    recompute_layers: int = 1
    # 8-bit floats in matrix products, by Transformer Engine on a GPU: none, hybrid (e4m3; gradients e5m2) or e4m3.
    fp8: str = "none"
    # How 8-bit numbers are scaled: delayed, tensorwise, blockwise (Hopper) or mxfp8 (Blackwell).
    fp8_recipe: str = "delayed"
    # Further fields of mcore's TransformerConfig by their own names, for what has no key here; others are refused.
    mcore: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every value that can be checked without knowing the layout.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("layers", "hidden_size", "ffn_hidden_size", "attention_heads", "kv_heads", "head_dim", "top_k"):
            positive(f"model.{key}", getattr(self, key))
        if self.layers > _MAX_LAYERS:
            raise ConfigError(f"model.layers={self.layers} is more than any network has: use {_MAX_LAYERS} at most")
        for key in ("vocab_size", "rope_scaling_factor", "rope_original_length"):
            positive(f"model.{key}", getattr(self, key))
        for key in ("mla_query_rank", "mla_kv_rank", "mla_head_dim", "mla_rope_head_dim", "mla_value_head_dim"):
            positive(f"model.{key}", getattr(self, key))
        for key in ("expert_ffn_hidden_size", "shared_expert_ffn_hidden_size", "moe_period", "vocab_multiple"):
            positive(f"model.{key}", getattr(self, key))
        positive("model.recompute_layers", self.recompute_layers)
        for key in ("rope_base", "rope_percent", "norm_epsilon", "init_std", "capacity_factor", "router_scale"):
            positive(f"model.{key}", getattr(self, key))
        for key in ("num_experts", "dense_first", "dense_last", "dropout", "aux_loss_coeff", "bias_update_rate"):
            positive(f"model.{key}", getattr(self, key), zero=True)
        for key in ("z_loss_coeff", "rope_mscale", "rope_mscale_all_dim"):
            positive(f"model.{key}", getattr(self, key), zero=True)
        if self.dropout >= 1:
            raise ConfigError(f"model.dropout={self.dropout} must be below 1: a probability")
        if self.rope_percent > 1:
            raise ConfigError(f"model.rope_percent={self.rope_percent} must be 1 at most: a part of every head")
        one_of("model.attention", self.attention, ATTENTION)
        one_of("model.activation", self.activation, ACTIVATIONS)
        one_of("model.normalization", self.normalization, NORMS)
        one_of("model.router_score", self.router_score, SCORES)
        one_of("model.balancing", self.balancing, BALANCING)
        one_of("model.transformer_impl", self.transformer_impl, IMPLEMENTATIONS)
        one_of("model.experts", self.experts, EXPERT_KINDS)
        if self.experts == "te" and self.transformer_impl == "local":
            raise ConfigError(
                "model.experts=te are experts of Transformer Engine, which model.transformer_impl=local keeps out: use "
                "model.transformer_impl=auto, or model.experts=grouped"
            )
        one_of("model.dispatcher", self.dispatcher, DISPATCHERS)
        one_of("model.recompute", self.recompute, RECOMPUTE)
        one_of("model.recompute_method", self.recompute_method, METHODS)
        one_of("model.fp8", self.fp8, FP8_FORMATS)
        one_of("model.fp8_recipe", self.fp8_recipe, FP8_RECIPES)
        one_of("model.rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        self._check_published()
        if self.head_dim is None:
            divides("model.hidden_size", self.hidden_size, "model.attention_heads", self.attention_heads)
        if self.attention == "mla" and self.kv_heads is not None:
            raise ConfigError(
                f"model.kv_heads={self.kv_heads} has no meaning with model.attention=mla: use model.kv_heads=null"
            )
        if self.kv_heads is not None:
            divides("model.attention_heads", self.attention_heads, "model.kv_heads", self.kv_heads)
        if self.num_experts:
            self._check_routing()
        check_recompute(self)
        refuse_fields(self.mcore)
        refuse_graph_fields(self.mcore)

    def _check_published(self) -> None:
        """What published families have and not every combination here can express."""
        if self.init_from is not None and not self.init_from.removeprefix(HF_PREFIX):
            raise ConfigError(f"model.init_from={self.init_from} names no folder: use hf:DIR")
        if self.init_from is not None and not self.init_from.startswith(HF_PREFIX):
            raise ConfigError(f"model.init_from={self.init_from} is unknown: use hf:DIR, or null")
        if self.qk_norm_all_heads and (not self.qk_norm or self.attention == "mla"):
            raise ConfigError("model.qk_norm_all_heads=true needs model.qk_norm=true and model.attention=gqa")
        if self.rope_scaling != "none" and (self.rope_scaling == "yarn") != (self.attention == "mla"):
            other = "llama3" if self.attention == "gqa" else "yarn"
            raise ConfigError(
                f"model.rope_scaling={self.rope_scaling} does not go with model.attention={self.attention}: use {other} or "
                "none"
            )
        if self.rope_scaling == "llama3" and self.rope_original_length != 8192:
            raise ConfigError(
                f"model.rope_original_length={self.rope_original_length}: mcore knows llama3's frequencies for 8192 tokens "
                "only: use 8192"
            )
        if self.shared_expert_gate and not self.shared_expert_ffn_hidden_size:
            raise ConfigError("model.shared_expert_gate=true needs model.shared_expert_ffn_hidden_size")

    def _check_routing(self) -> None:
        if self.num_experts < 2:
            raise ConfigError(f"model.num_experts={self.num_experts}: use 0 for a dense model, or 2 and more experts")
        if self.top_k > self.num_experts:
            raise ConfigError(f"model.top_k={self.top_k} is above model.num_experts={self.num_experts}: lower top_k")
        if self.linear_bias and self.shared_expert_ffn_hidden_size:
            raise ConfigError(
                f"model.linear_bias=true cannot be combined with model.shared_expert_ffn_hidden_size="
                f"{self.shared_expert_ffn_hidden_size}: mcore's shared experts have no biases; use null, or no biases"
            )
        if not self.moe_layer_numbers():
            raise ConfigError(
                f"model.dense_first={self.dense_first}, model.dense_last={self.dense_last} and "
                f"model.moe_period={self.moe_period} leave no MoE layer among model.layers={self.layers}"
            )
        if self.balancing == "loss_free" and self.router_score != "sigmoid":
            raise ConfigError(
                f"model.balancing=loss_free needs model.router_score=sigmoid, not {self.router_score}: "
                "change the score, or use model.balancing=aux_loss"
            )
        if (self.router_groups is None) != (self.router_group_topk is None):
            raise ConfigError("model.router_groups and model.router_group_topk go together: set both or neither")
        if self.router_groups is not None and self.router_group_topk is not None:
            divides("model.num_experts", self.num_experts, "model.router_groups", self.router_groups)
            if not 0 < self.router_group_topk <= self.router_groups:
                raise ConfigError(
                    f"model.router_group_topk={self.router_group_topk} must lie between 1 and "
                    f"model.router_groups={self.router_groups}"
                )
            divides("model.top_k", self.top_k, "model.router_group_topk", self.router_group_topk)

    def moe_layer_numbers(self) -> tuple[int, ...]:
        """Numbers (from 1, as in mcore) of the layers that hold experts; empty for a dense model."""
        if not self.num_experts:
            return ()
        middle = range(self.dense_first, self.layers - self.dense_last)
        return tuple(i + 1 for n, i in enumerate(middle) if (n + 1) % self.moe_period == 0)

    def moe_layer_pattern(self) -> list[int]:
        """mcore's `moe_layer_freq`: 1 for an MoE layer, 0 for a dense one."""
        numbers = set(self.moe_layer_numbers())
        return [int(i + 1 in numbers) for i in range(self.layers)]


def padded_vocab_size(model: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding: those of `model.vocab_size`, or the tokenizer's, rounded up; the same in every layout.

    Raises:
        ConfigError: if the tokenizer has more tokens than `model.vocab_size`.
    """
    if model.vocab_size is not None and vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}, but the tokenizer of the data has {vocab_size} tokens: build the corpora "
            "with the tokenizer of the model"
        )
    rows = vocab_size if model.vocab_size is None else model.vocab_size
    return -(-rows // model.vocab_multiple) * model.vocab_multiple
