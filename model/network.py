"""The parameters of a network as mcore would hold them, by arithmetic: names, shapes, order and pipeline stage.

Nothing is allocated and neither torch nor mcore is imported, so a network of any size is described in milliseconds. The
order is that of the modules, because gradient buffers and ZeRO-1 ranges follow it. A test holds all of it against models
that were built. Sizes: H hidden, F feed-forward, E experts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.config import ModelConfig, padded_vocab_size
from parallel.cluster import LogicalTensor
from parallel.config import ParallelConfig

# Of these, a token passes only top_k / E (`model.build.count_parameters`).
_EXPERTS = ".mlp.experts."
TIED_COPY = "output_layer.tied"


@dataclass(frozen=True)
class Chunk:
    """What one pipeline rank holds of the network in one piece (several under the interleaved schedule).

    Attributes:
        stage: pipeline rank.
        index: position among the chunks of that rank.
        layers: numbers of its layers, from 0.
        tensors: its parameters in module order.
        buffer_elements: fp32 elements of persistent buffers and of those that count tokens.
    """

    stage: int
    index: int
    layers: range
    tensors: tuple[LogicalTensor, ...]
    buffer_elements: int


@dataclass(frozen=True)
class Counts:
    """Parameters of the whole network, as `model.build.count_parameters` counts them."""

    total: int
    active: int
    experts: int


def head_widths(model: ModelConfig) -> tuple[int, int]:
    """Width of one head's query and key, and of its value."""
    if model.attention == "mla":
        return model.mla_head_dim + model.mla_rope_head_dim, model.mla_value_head_dim
    width = model.head_dim or model.hidden_size // model.attention_heads
    return width, width


def gated(model: ModelConfig) -> bool:
    """Whether the feed-forward has a gate beside its up projection."""
    return model.activation in ("swiglu", "geglu")


def network_chunks(
    model: ModelConfig, num_experts: int, parallel: ParallelConfig, vocab_size: int, itemsize: int
) -> list[Chunk]:
    """The chunks of all pipeline ranks, in order of the layers.

    Args:
        model: the network.
        num_experts: experts per MoE layer in this stage of the run; 0 for a dense model.
        parallel: sizes; pipeline and virtual pipeline matter here.
        vocab_size: tokens of the tokenizer.
        itemsize: bytes per element of the weights.
    """
    pipeline, chunks = parallel.pipeline, parallel.chunks()
    share = model.layers // (pipeline * chunks)
    rows, moe = padded_vocab_size(model, vocab_size), set(model.moe_layer_numbers()) if num_experts else set()
    found = []
    for position in range(pipeline * chunks):
        index, stage = divmod(position, pipeline)
        layers = range(position * share, (position + 1) * share)
        maker = _Maker(model, stage, itemsize)
        if position == 0:
            maker.add("embedding.word_embeddings.weight", (rows, model.hidden_size), split=0)
        for layer in layers:
            maker.layer(layer, num_experts if layer + 1 in moe else 0)
        if position == pipeline * chunks - 1:
            maker.norm("decoder.final_layernorm", model.hidden_size)
            if not model.tie_embeddings:
                maker.add("output_layer.weight", (rows, model.hidden_size), split=0)
            elif pipeline > 1:
                maker.add(TIED_COPY, (rows, model.hidden_size), split=0)
        # A loss-free router keeps its bias and the tokens of each expert.
        buffers = 2 * num_experts * sum(layer + 1 in moe for layer in layers) if model.balancing == "loss_free" else 0
        found.append(Chunk(stage, index, layers, tuple(maker.tensors), buffers))
    return found


class _Maker:
    """Collects the parameters of one chunk."""

    def __init__(self, model: ModelConfig, stage: int, itemsize: int) -> None:
        self._model, self._stage, self._itemsize = model, stage, itemsize
        self.tensors: list[LogicalTensor] = []

    def add(
        self, key: str, shape: tuple[int, ...], split: int | None = None, halves: int = 1, expert: bool = False
    ) -> None:
        self.tensors.append(LogicalTensor(key, shape, self._itemsize, self._stage, expert, split, halves))

    def linear(self, name: str, shape: tuple[int, int], split: int, bias: bool, halves: int = 1) -> None:
        """A linear layer; the bias of a column-parallel one (split 0) is split as well."""
        self.add(f"{name}.weight", shape, split, halves)
        if bias:
            self.add(f"{name}.bias", shape[:1], 0 if split == 0 else None, halves)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", (width,))
        if self._model.normalization == "LayerNorm":
            self.add(f"{name}.bias", (width,))

    def layer(self, layer: int, num_experts: int) -> None:
        model, name = self._model, f"decoder.layers.{layer}"
        self.norm(f"{name}.input_layernorm", model.hidden_size)
        self._attention(f"{name}.self_attention")
        self.norm(f"{name}.pre_mlp_layernorm", model.hidden_size)
        if not num_experts:
            self._feed_forward(f"{name}.mlp", model.ffn_hidden_size, model.linear_bias)
            return
        self.add(f"{name}.mlp.router.weight", (num_experts, model.hidden_size))
        if model.linear_bias:
            self.add(f"{name}.mlp.router.bias", (num_experts,))
        self._experts(f"{name}{_EXPERTS}experts", num_experts)
        if model.shared_expert_ffn_hidden_size:
            self._feed_forward(f"{name}.mlp.shared_experts", model.shared_expert_ffn_hidden_size, bias=False)
            if model.shared_expert_gate:
                self.add(f"{name}.mlp.shared_experts.gate_weight", (1, model.hidden_size))

    def _attention(self, name: str) -> None:
        model, hidden = self._model, self._model.hidden_size
        width, value = head_widths(model)
        heads = model.attention_heads
        self.linear(f"{name}.linear_proj", (hidden, heads * value), 1, model.linear_bias)
        if model.attention == "gqa":
            kv = model.kv_heads or heads
            bias = model.linear_bias or model.qkv_bias
            self.linear(f"{name}.linear_qkv", ((heads + 2 * kv) * width, hidden), 0, bias)
            if model.qk_norm:
                together = model.qk_norm_all_heads
                self.norm(f"{name}.q_layernorm", heads * width if together else width)
                self.norm(f"{name}.k_layernorm", kv * width if together else width)
            return
        query, latent, rope = model.mla_query_rank, model.mla_kv_rank, model.mla_rope_head_dim
        if query:
            self.linear(f"{name}.linear_q_down_proj", (query, hidden), 0, bias=False)
            self.linear(f"{name}.linear_q_up_proj", (heads * width, query), 0, bias=False)
        else:
            self.linear(f"{name}.linear_q_proj", (heads * width, hidden), 0, bias=False)
        self.linear(f"{name}.linear_kv_down_proj", (latent + rope, hidden), 0, bias=False)
        self.linear(f"{name}.linear_kv_up_proj", (heads * (model.mla_head_dim + value), latent), 0, bias=False)
        if model.qk_norm:
            if query:
                self.norm(f"{name}.q_layernorm", query)
            self.norm(f"{name}.kv_layernorm", latent)

    def _feed_forward(self, name: str, width: int, bias: bool) -> None:
        halves = 2 if gated(self._model) else 1
        self.linear(f"{name}.linear_fc1", (halves * width, self._model.hidden_size), 0, bias, halves)
        self.linear(f"{name}.linear_fc2", (self._model.hidden_size, width), 1, bias)

    def _experts(self, name: str, experts: int) -> None:
        model, width = self._model, self._model.expert_ffn_hidden_size
        halves = 2 if gated(model) else 1
        self.add(f"{name}.linear_fc1.weight", (experts, halves * width, model.hidden_size), 1, halves, expert=True)
        self.add(f"{name}.linear_fc2.weight", (experts, model.hidden_size, width), 2, expert=True)
        if model.linear_bias:
            self.add(f"{name}.linear_fc1.bias", (experts, halves * width), 1, halves, expert=True)
            self.add(f"{name}.linear_fc2.bias", (experts, model.hidden_size), expert=True)


def whole_network(chunks: Sequence[Chunk]) -> Iterator[LogicalTensor]:
    """Every parameter once: the copy of a tied embedding on the last pipeline rank is left out."""
    for chunk in chunks:
        yield from (tensor for tensor in chunk.tensors if tensor.key != TIED_COPY)


def count(model: ModelConfig, num_experts: int, chunks: Sequence[Chunk]) -> Counts:
    """Parameters in all, those that one token passes (embeddings included), those of routed experts."""
    experts = sum(math.prod(t.shape) for t in whole_network(chunks) if t.expert)
    dense = sum(math.prod(t.shape) for t in whole_network(chunks) if not t.expert)
    return Counts(experts + dense, dense + experts * model.top_k // (num_experts or 1), experts)


def matmul_parameters(model: ModelConfig, num_experts: int, chunks: Sequence[Chunk]) -> int:
    """Parameters that one token is multiplied with: no lookup in the embedding, no norms, no biases, top_k experts."""
    total = 0
    for tensor in whole_network(chunks):
        size = math.prod(tensor.shape)
        if tensor.key.endswith(".bias") or "layernorm" in tensor.key:
            continue
        if tensor.key.startswith("embedding.") and not model.tie_embeddings:
            continue
        total += size * model.top_k // num_experts if tensor.expert else size
    return total


def flops_per_token(model: ModelConfig, num_experts: int, chunks: Sequence[Chunk], sequence_length: int) -> int:
    """Floating-point operations of training on one token, forward and backward, without recomputation.

    6 per parameter in a product (PaLM, arXiv 2204.02311, appendix B, which counts 12 L H Q T for attention over all
    positions; a causal mask needs half), so 6 N + 3 L heads (width of query + width of value) sequence_length.
    """
    width, value = head_widths(model)
    attention = 3 * model.layers * model.attention_heads * (width + value) * sequence_length
    return 6 * matmul_parameters(model, num_experts, chunks) + attention
