"""Our tensors, by the key and global shape under which checkpoints store them, as blocks of a published model's tensors.

A published model and ours hold the same numbers in other arrangements: mcore interleaves queries, keys and values by query
group, puts gate and up projections into one matrix and stacks experts. Each of our tensors is therefore a list of `Block`s,
each of which is a block of a published tensor, unchanged. Reading and writing, at any layout, is then copying intersections
of boxes (`read.py`, `train/hf/exporting.py`), and an import followed by an export gives the same bytes back.

What there is follows from `ModelConfig`; what it is called in a family follows from the family's names:

    embedding output final_norm attention_norm mlp_norm
    query key value attention_output query_norm key_norm
    query_down query_down_norm query_up kv_down kv_down_norm kv_up         (multi-head latent attention)
    dense_gate dense_up dense_down
    router selection_bias expert_gate expert_up expert_down
    shared_gate shared_up shared_down shared_weight

with `{layer}` and `{expert}` in them, from 0. A bias is called as its weight, with `.bias` in place of `.weight`.
Shapes: `E` experts, `H` hidden, `F` a feed-forward width, `V` vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from model.config import ModelConfig, padded_vocab_size
from parallel.errors import ConfigError
from parallel.regions import Box

# A run of rows of a published tensor: its name, first row, how many. Without a name: rows of zeros.
Rows = tuple[str | None, int, int]


class Block(NamedTuple):
    """A block of one of our tensors that is, as it stands, a block of a published one.

    Attributes:
        box: in our tensor.
        name: of the published tensor; None for zeros that pad ours.
        offset: of the block in the published tensor. It has the trailing axes of the box; leading ones, of which ours has
            more (experts), have extent 1.
    """

    box: Box
    name: str | None
    offset: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent in the published tensor."""
        return self.box.shape[len(self.box.shape) - len(self.offset) :]


@dataclass(frozen=True)
class LogicalTensor:
    """One of our tensors.

    Attributes:
        key: as in checkpoints.
        shape: of the whole.
        blocks: disjoint, in order of the first axis, and together the whole.
        kind: expert, router or selection_bias where its first axis runs over experts; else None.
        layer: number of its layer, from 1; 0 outside of layers.
    """

    key: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    kind: str | None = None
    layer: int = 0

    @property
    def fp32(self) -> bool:
        """Whether it is kept in fp32 whatever the precision of the model."""
        return self.kind == "selection_bias"


def _rows(rows: Iterable[Rows], rest: tuple[int, ...], expert: int | None = None) -> Iterator[Block]:
    """Runs of rows one below the other, of one expert of a stack if it is named."""
    first = 0
    for name, start, count in rows:
        offset, shape = (first, *(0 for _ in rest)), (count, *rest)
        box = Box(offset, shape) if expert is None else Box((expert, *offset), (1, *shape))
        if count:
            yield Block(box, name, (start, *(0 for _ in rest)))
        first += count


class _Names:
    """The names of one layer."""

    def __init__(self, names: Mapping[str, str], layer: int | None = None) -> None:
        self._names, self._layer = names, layer

    def __call__(self, part: str, expert: int | None = None) -> str:
        if part not in self._names:
            raise ConfigError(f"this family has no {part}: the model has a part that cannot be published in it")
        return self._names[part].format(layer=self._layer, expert=expert)


def logical_tensors(model: ModelConfig, num_experts: int, names: Mapping[str, str]) -> dict[str, LogicalTensor]:
    """Every tensor of a model.

    Args:
        model: the network; `vocab_size` must be set.
        num_experts: experts per MoE layer of the stage; 0 for a dense model.
        names: what the family calls its tensors.

    Returns:
        Key -> tensor, in the order of the network.
    """
    assert model.vocab_size is not None
    moe = set(model.moe_layer_numbers()) if num_experts else set()
    hidden, vocab = model.hidden_size, model.vocab_size
    padded = padded_vocab_size(model, vocab)
    found: list[LogicalTensor] = []

    def vocabulary(key: str, name: str) -> None:
        rows: list[Rows] = [(name, 0, vocab), (None, 0, padded - vocab)]
        found.append(LogicalTensor(key, (padded, hidden), tuple(_rows(rows, (hidden,)))))

    whole = _Names(names)
    vocabulary("embedding.word_embeddings.weight", whole("embedding"))
    for layer in range(1, model.layers + 1):
        found += _layer(model, layer, num_experts if layer in moe else 0, _Names(names, layer - 1))
    found.append(_same("decoder.final_layernorm.weight", (hidden,), whole("final_norm")))
    if not model.tie_embeddings:
        vocabulary("output_layer.weight", whole("output"))
    return {tensor.key: tensor for tensor in found}


def _same(key: str, shape: tuple[int, ...], name: str, kind: str | None = None, layer: int = 0) -> LogicalTensor:
    """A tensor that both sides hold alike."""
    zeros = (0,) * len(shape)
    return LogicalTensor(key, shape, (Block(Box(zeros, shape), name, zeros),), kind, layer)


def _layer(model: ModelConfig, number: int, experts: int, names: _Names) -> Iterator[LogicalTensor]:
    prefix, hidden = f"decoder.layers.{number - 1}.", model.hidden_size
    latent = model.attention == "mla"
    norm = "input_layernorm.weight" if latent else "self_attention.linear_qkv.layer_norm_weight"
    yield _same(f"{prefix}{norm}", (hidden,), names("attention_norm"))
    yield from (_latent_attention if latent else _attention)(model, f"{prefix}self_attention.", names)
    fused = not experts and not latent
    norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    yield _same(f"{prefix}{norm}", (hidden,), names("mlp_norm"))
    if not experts:
        yield from _feed_forward(f"{prefix}mlp.", model.ffn_hidden_size, hidden, names, "dense")
        return
    yield from _experts(model, f"{prefix}mlp.", number, experts, names)


def _attention(model: ModelConfig, prefix: str, names: _Names) -> Iterator[LogicalTensor]:
    """Grouped-query attention: mcore stores, per group, its query heads, its key head and its value head."""
    hidden, heads = model.hidden_size, model.attention_heads
    groups = model.kv_heads or heads
    width = model.head_dim or hidden // heads
    queries = heads // groups * width

    def interleaved(bias: bool) -> list[Rows]:
        end = ".bias" if bias else ".weight"
        query, key, value = (names(part).removesuffix(".weight") + end for part in ("query", "key", "value"))
        return [
            rows
            for g in range(groups)
            for rows in ((query, g * queries, queries), (key, g * width, width), (value, g * width, width))
        ]

    total = (heads + 2 * groups) * width
    yield LogicalTensor(f"{prefix}linear_qkv.weight", (total, hidden), tuple(_rows(interleaved(False), (hidden,))))
    if model.qkv_bias:
        yield LogicalTensor(f"{prefix}linear_qkv.bias", (total,), tuple(_rows(interleaved(True), ())))
    yield _same(f"{prefix}linear_proj.weight", (hidden, heads * width), names("attention_output"))
    if model.qk_norm:
        for side, count in (("query", heads), ("key", groups)):
            size = count * width if model.qk_norm_all_heads else width
            yield _same(f"{prefix}{side[0]}_layernorm.weight", (size,), names(f"{side}_norm"))


def _latent_attention(model: ModelConfig, prefix: str, names: _Names) -> Iterator[LogicalTensor]:
    """Multi-head latent attention, in which the two sides differ in names only."""
    hidden, heads, rank = model.hidden_size, model.attention_heads, model.mla_kv_rank
    nope, rope, value = model.mla_head_dim, model.mla_rope_head_dim, model.mla_value_head_dim
    queries = heads * (nope + rope)
    if model.mla_query_rank is None:
        yield _same(f"{prefix}linear_q_proj.weight", (queries, hidden), names("query"))
    else:
        yield _same(f"{prefix}linear_q_down_proj.weight", (model.mla_query_rank, hidden), names("query_down"))
        yield _same(f"{prefix}q_layernorm.weight", (model.mla_query_rank,), names("query_down_norm"))
        yield _same(f"{prefix}linear_q_up_proj.weight", (queries, model.mla_query_rank), names("query_up"))
    yield _same(f"{prefix}linear_kv_down_proj.weight", (rank + rope, hidden), names("kv_down"))
    yield _same(f"{prefix}kv_layernorm.weight", (rank,), names("kv_down_norm"))
    yield _same(f"{prefix}linear_kv_up_proj.weight", (heads * (nope + value), rank), names("kv_up"))
    yield _same(f"{prefix}linear_proj.weight", (hidden, heads * value), names("attention_output"))


def _feed_forward(prefix: str, ffn: int, hidden: int, names: _Names, part: str) -> Iterator[LogicalTensor]:
    """A gated feed-forward layer: gate rows above up rows."""
    rows: list[Rows] = [(names(f"{part}_gate"), 0, ffn), (names(f"{part}_up"), 0, ffn)]
    yield LogicalTensor(f"{prefix}linear_fc1.weight", (2 * ffn, hidden), tuple(_rows(rows, (hidden,))))
    yield _same(f"{prefix}linear_fc2.weight", (hidden, ffn), names(f"{part}_down"))


def _experts(model: ModelConfig, prefix: str, layer: int, experts: int, names: _Names) -> Iterator[LogicalTensor]:
    """Router, routed experts and shared experts of a layer."""
    hidden, ffn = model.hidden_size, model.expert_ffn_hidden_size
    yield _same(f"{prefix}router.weight", (experts, hidden), names("router"), "router", layer)
    if model.balancing == "loss_free":
        yield _same(f"{prefix}router.expert_bias", (experts,), names("selection_bias"), "selection_bias", layer)
    key = f"{prefix}experts.experts.linear_"
    up = [
        block
        for e in range(experts)
        for block in _rows([(names("expert_gate", e), 0, ffn), (names("expert_up", e), 0, ffn)], (hidden,), e)
    ]
    down = [block for e in range(experts) for block in _rows([(names("expert_down", e), 0, hidden)], (ffn,), e)]
    yield LogicalTensor(f"{key}fc1.weight", (experts, 2 * ffn, hidden), tuple(up), "expert", layer)
    yield LogicalTensor(f"{key}fc2.weight", (experts, hidden, ffn), tuple(down), "expert", layer)
    shared = model.shared_expert_ffn_hidden_size
    if shared:
        yield from _feed_forward(f"{prefix}shared_experts.", shared, hidden, names, "shared")
        if model.shared_expert_gate:
            yield _same(f"{prefix}shared_experts.gate_weight", (1, hidden), names("shared_weight"))


def published_shapes(tensors: Iterable[LogicalTensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every published tensor that ours are made of."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        for block in tensor.blocks:
            if block.name is not None:
                ends = tuple(o + n for o, n in zip(block.offset, block.shape, strict=True))
                known = shapes.get(block.name, ends)
                shapes[block.name] = tuple(max(a, b) for a, b in zip(known, ends, strict=True))
    return shapes


# Transformer Engine's layers hold some norms themselves: (as its checkpoints call them, as ours do).
_FUSED_NORMS = (
    ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)


def our_key(key: str, tensors: Mapping[str, LogicalTensor]) -> str:
    """What a key of a model or a checkpoint is called among `tensors`; itself if it is called nothing there."""
    if key not in tensors:
        for fused, ours in _FUSED_NORMS:
            if key.endswith(fused) and key.removesuffix(fused) + ours in tensors:
                return key.removesuffix(fused) + ours
    return key


def expert_keys_of(tensors: Iterable[LogicalTensor]) -> dict[str, dict[str, int | str]]:
    """Keys that run over experts, as `model.sharded_state.expert_keys` gives them for a built model."""
    return {t.key: {"layer": t.layer, "kind": t.kind} for t in sorted(tensors, key=lambda t: t.key) if t.kind}
