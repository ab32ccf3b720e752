"""Bytes that every rank of a run would hold, by arithmetic alone: weights, gradients, masters, moments, activations.

Follows mcore: a chunk's parameters lie in reverse order in buffers, experts apart where they are reduced over other ranks
than the rest; under the distributed optimizer each parameter is padded to 64 elements and each bucket to a multiple of 128
and of the ranks that share it, which then own one equal range each (mcore 0.16.1,
`distributed/param_and_grad_buffer.py`). Weights, gradients, masters and moments are exact for our own expert module;
activations are an estimate (`activation_bytes`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from model.config import ModelConfig, padded_vocab_size
from model.expert_overlap import nothing_to_hide
from model.graphs import input_bytes
from model.network import Chunk, gated, head_widths, network_chunks
from model.recompute import modules_of
from parallel.cluster import STATE_BYTES, Coordinates, LogicalTensor, coordinates, round_up
from parallel.config import ParallelConfig
from train.config import RunSettings

GRADIENT_BYTES = 4
# Bytes of a weight -> of each score of torch's attention in the layer that is at work, two elements that stay included. In
# bf16 scores, their fp32 copy, masked, after the softmax, in bf16 again, and a gradient: an H200 held 17.7 and 18.6.
_SCORE_BYTES = {2: 18, 4: 16}
# docs/live-switch.md: the most that a switch may take, as a share of the larger stage's steady state.
SWITCH_BOUND = 1.10


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind, while it trains."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Buffer:
    """One of mcore's gradient buffers.

    Attributes:
        numel: elements, padding included.
        owned: elements of parameters in the range of each data rank; under a plain optimizer every rank owns them all.
    """

    numel: int
    owned: tuple[int, ...]


def buffer_of(
    sizes: Sequence[int], ranks: int, distributed: bool, bucket_size: int | None = None, alone: Sequence[int] = ()
) -> Buffer:
    """Lay parameters out as mcore does.

    Args:
        sizes: elements of each parameter on this rank, in module order.
        ranks: data ranks that share the buffer.
        distributed: whether the optimizer's state is divided over them.
        bucket_size: elements at which a bucket is closed; None for one bucket.
        alone: parameters with a bucket of their own (tied embeddings under pipeline parallelism).
    """
    if not distributed:
        return Buffer(sum(sizes), (sum(sizes),) * ranks)
    owned, edge, position = [0] * ranks, 0, 0
    bucket: list[tuple[int, int]] = []

    def close(end: int) -> int:
        """Pad and deal out the bucket that ends here; where the next begins."""
        stop = round_up(end, math.lcm(ranks, 128))
        share = (stop - edge) // ranks
        for first, last in bucket:
            for rank in range((first - edge) // share, (last - 1 - edge) // share + 1):
                low = edge + rank * share
                owned[rank] += min(last, low + share) - max(first, low)
        bucket.clear()
        return stop

    for index in reversed(range(len(sizes))):
        start = round_up(position, 64)
        if index in alone and bucket:
            start = edge = close(start)
        position = start + sizes[index]
        if sizes[index]:
            bucket.append((start, position))
        if index in alone or (bucket_size is not None and position - edge >= bucket_size):
            position = edge = close(position)
    if bucket:
        edge = close(position)
    return Buffer(edge, tuple(owned))


def local_elements(tensor: LogicalTensor, parallel: ParallelConfig) -> int:
    """Elements of a parameter on each rank that holds some of it."""
    split = 1 if tensor.split is None else parallel.expert_tensor if tensor.expert else parallel.tensor
    return math.prod(tensor.shape) // split // (parallel.expert if tensor.expert else 1)


@dataclass(frozen=True)
class Footprint:
    """One stage of a run on all ranks.

    Attributes:
        chunks: the network.
        ranks: memory of every rank (or of those asked for, in that order).
        places: their coordinates.
    """

    chunks: tuple[Chunk, ...]
    ranks: tuple[Memory, ...]
    places: tuple[Coordinates, ...]

    @property
    def largest(self) -> int:
        """The rank with the most; the first of several."""
        return max(range(len(self.ranks)), key=lambda rank: (self.ranks[rank].total, -rank))

    @property
    def smallest(self) -> int:
        """The rank with the least."""
        return min(range(len(self.ranks)), key=lambda rank: (self.ranks[rank].total, rank))


@dataclass(frozen=True)
class _Share:
    """State of one pipeline rank: what all its ranks hold, and what they own by data rank and by expert-data rank."""

    elements: int
    buffer_bytes: int
    dense: tuple[int, ...]
    experts: tuple[int, ...]


def footprint(
    settings: RunSettings,
    stage: int,
    world_size: int,
    vocab_size: int,
    *,
    flash: bool,
    only: Sequence[int] | None = None,
) -> Footprint:
    """Memory of the ranks in one stage of a run.

    Args:
        settings: of the run, every stage with its step.
        stage: its number, from 0.
        world_size: processes.
        vocab_size: tokens of the tokenizer.
        flash: attention keeps no scores (Transformer Engine's).
        only: ranks to look at; all by default.
    """
    parallel = settings.parallel_of(stage)
    experts = settings.experts_of(stage)
    bf16 = settings.run.precision == "bf16"
    weight = 2 if bf16 else 4
    chunks = network_chunks(settings.model, experts, parallel, vocab_size, weight)
    shares = [_share(settings, parallel, world_size, chunks, p) for p in range(parallel.pipeline)]
    held = [
        activation_bytes(settings, parallel, experts, chunks, p, world_size, vocab_size, flash)
        for p in range(parallel.pipeline)
    ]
    numbers = range(world_size) if only is None else only
    places = tuple(coordinates(rank, parallel, world_size) for rank in numbers)
    ranks = []
    for at in places:
        share = shares[at.pipeline]
        owned = share.dense[at.data * parallel.context + at.context] + share.experts[at.expert_data]
        ranks.append(
            Memory(
                weights=share.elements * weight + share.buffer_bytes,
                gradients=share.elements * GRADIENT_BYTES,
                # A weight in fp32 is its own master.
                masters=owned * STATE_BYTES if bf16 else 0,
                moments=owned * STATE_BYTES * 2,
                activations=held[at.pipeline],
            )
        )
    return Footprint(tuple(chunks), tuple(ranks), places)


def _share(
    settings: RunSettings, parallel: ParallelConfig, world_size: int, chunks: Sequence[Chunk], stage: int
) -> _Share:
    options = settings.optimizer
    data, experts = parallel.data(world_size) * parallel.context, parallel.expert_data(world_size)
    # Where experts are reduced over the same ranks as the rest, they share its buffer (`model/build.py`).
    apart = parallel.expert > 1 or data != experts
    dense_owned, expert_owned, elements, buffers = [0] * data, [0] * experts, 0, 0
    tied = settings.model.tie_embeddings and parallel.pipeline > 1
    for chunk in (c for c in chunks if c.stage == stage):
        buffers += chunk.buffer_elements
        # mcore: buckets on the first pipeline rank and its first chunk alone.
        bucket = max(40_000_000, 1_000_000 * data) if options.overlap_grad_reduce is True else None
        if chunk.index or stage:
            bucket = None
        for kind, ranks, owned in ((False, data, dense_owned), (True, experts, expert_owned)):
            mine = [t for t in chunk.tensors if (t.expert and apart) == kind]
            if not mine:
                continue
            alone = [i for i, t in enumerate(mine) if tied and t.key.startswith(("embedding.", "output_layer."))]
            buffer = buffer_of([local_elements(t, parallel) for t in mine], ranks, options.distributed, bucket, alone)
            elements += buffer.numel
            for rank, count in enumerate(buffer.owned):
                owned[rank] += count
    return _Share(elements, buffers * 4, tuple(dense_owned), tuple(expert_owned))


def activation_bytes(
    settings: RunSettings,
    parallel: ParallelConfig,
    num_experts: int,
    chunks: Sequence[Chunk],
    stage: int,
    world_size: int,
    vocab_size: int,
    flash: bool,
) -> int:
    """Estimate of what one pipeline rank keeps for its backward passes, at the fullest point of a step.

    Per token, in elements of the weights' type: what arXiv 2205.05198 (sections 4.1 and 4.2) counts for a layer without
    dropout, widened to grouped queries, gates and experts, and divided by the tensor size t (sequence parallelism):

        attention      2 H + q + k + v + q                      + 2 heads x sequence scores without flash attention
        feed-forward   2 H + (2 or 1) F + F
        MoE            2 H + 3 E (fp32: twice) + K (H + 3 F) + shared 3 F, tokens even over experts

    Full recomputation keeps H per unit of layers, selective drops what its modules compute (`_dropped_elements`); what is
    computed again is there once more for one unit, or one layer; torch's attention has its scores in several types at once
    (`_SCORE_BYTES`) in the layer that is at work. In flight: mcore's 1F1B warm-up, min(pipeline - rank,
    accumulation) micro-batches, or its interleaved count; woven together (performance.expert_parallel_overlap) also a layer
    of the next micro-batch, or one chunk more in the interleaved count. CUDA graphs keep inputs of their own for each of
    these. Buffers of kernels, of communication and of the allocator are not in it.
    """
    model, data = settings.model, settings.data
    weight, tensor = (2 if settings.run.precision == "bf16" else 4), parallel.tensor
    tokens = data.micro_batch_size * data.sequence_length // parallel.context
    accumulation = data.global_batch_size // (data.micro_batch_size * parallel.data(world_size))
    moe = set(model.moe_layer_numbers()) if num_experts else set()
    pipeline, number = parallel.pipeline, parallel.chunks()
    kept_by_chunk, again, largest = [], 0.0, 0.0
    for chunk in (c for c in chunks if c.stage == stage):
        experts = [num_experts if layer + 1 in moe else 0 for layer in chunk.layers]
        whole = [_layer_elements(model, count, parallel, data.sequence_length, flash) for count in experts]
        largest = max([largest, *whole])
        unit = model.recompute_layers
        if model.recompute == "full" and model.recompute_method == "block":
            kept = len(whole[:unit]) * model.hidden_size / tensor + sum(whole[unit:])
            again = max([again, *whole[:unit]])
        elif model.recompute == "full":
            units = [sum(whole[first : first + unit]) for first in range(0, len(whole), unit)]
            kept = len(units) * model.hidden_size / tensor
            again = max([again, *units])
        else:
            dropped = [_dropped_elements(model, count, parallel, data.sequence_length, flash) for count in experts]
            kept = sum(whole) - sum(dropped)
            again = max([again, *dropped])
        kept_by_chunk.append(kept)
    apart = nothing_to_hide(num_experts, parallel) is not None or accumulation == 1
    woven = settings.performance.expert_parallel_overlap and not apart
    if number == 1:
        in_flight = [min(pipeline - stage, accumulation)]
    else:
        warm = min((pipeline - stage - 1) * 2 + (number - 1) * pipeline + 1 + woven, number * accumulation)
        in_flight = [warm // number + (index < warm % number) for index in range(number)]
    elements = sum(n * kept for n, kept in zip(in_flight, kept_by_chunk, strict=True))
    elements += again
    if woven and number == 1:
        elements += largest
    if stage == 0:
        elements += in_flight[0] * model.hidden_size / tensor
    total = elements * weight
    if not flash:
        scores = model.attention_heads * data.sequence_length / (tensor * parallel.context)
        total += (_SCORE_BYTES[weight] - 2 * weight) * scores
    if stage == pipeline - 1:
        rows = padded_vocab_size(model, vocab_size)
        total += 2 * model.hidden_size / tensor * weight + rows / tensor * (weight + 4)
    graphs = 0
    if settings.performance.cuda_graphs != "none":
        layers = [len(chunk.layers) for chunk in chunks if chunk.stage == stage]
        each = input_bytes(model, parallel, data.sequence_length, data.micro_batch_size)
        graphs = each * sum(n * count for n, count in zip(in_flight, layers, strict=True))
    return round(total * tokens) + graphs


def _layer_elements(
    model: ModelConfig, num_experts: int, parallel: ParallelConfig, sequence: int, flash: bool
) -> float:
    """Elements that one token leaves behind in one layer on each of its tensor ranks."""
    hidden, heads = model.hidden_size, model.attention_heads
    width, value = head_widths(model)
    kv = model.kv_heads or heads
    found = 2 * hidden + heads * width + kv * (width + value) + heads * value
    if model.attention == "mla":
        found += (model.mla_query_rank or 0) + model.mla_kv_rank + model.mla_rope_head_dim
    if not flash:
        found += 2 * heads * sequence // parallel.context
    wide = 3 if gated(model) else 2
    found += 2 * hidden
    if not num_experts:
        return (found + wide * model.ffn_hidden_size) / parallel.tensor
    found += 6 * num_experts + wide * (model.shared_expert_ffn_hidden_size or 0)
    # Every expert-tensor rank sees the tokens of all of them, each a slice of the expert.
    routed = model.top_k * (hidden * parallel.expert_tensor + wide * model.expert_ffn_hidden_size)
    return (found + routed) / parallel.tensor


def _dropped_elements(
    model: ModelConfig, num_experts: int, parallel: ParallelConfig, sequence: int, flash: bool
) -> float:
    """Elements of `_layer_elements` that selective recomputation does without; none under another kind.

    Transformer Engine's layers (flash) have the norm before attention, and before a dense feed-forward, inside the linear
    layer that follows: only norms of their own can be left out.
    """
    hidden, heads = model.hidden_size, model.attention_heads
    width, value = head_widths(model)
    gate = gated(model)
    whole, inner = (3, 1) if gate else (2, 1)
    shared = whole * (model.shared_expert_ffn_hidden_size or 0)
    routed = model.top_k * (hidden * parallel.expert_tensor + whole * model.expert_ffn_hidden_size)
    norms = int(not flash or model.attention == "mla") + int(not flash or bool(num_experts))
    sizes = {
        "core_attn": 0 if flash else 2 * heads * sequence // parallel.context,
        "layernorm": norms * hidden,
        "mla_up_proj": heads * width + (model.kv_heads or heads) * (width + value),
        "mlp": 0 if num_experts else whole * model.ffn_hidden_size,
        "moe": 6 * num_experts + shared + routed if num_experts else 0,
        "moe_act": model.top_k * inner * model.expert_ffn_hidden_size if num_experts else 0,
        "shared_experts": shared if num_experts else 0,
    }
    return sum(sizes[name] for name in modules_of(model)) / parallel.tensor


@dataclass(frozen=True)
class SwitchMemory:
    """Memory at a switch on the rank that needs most.

    Attributes:
        rank: that rank.
        peak: bytes at its fullest point.
        steady: of the larger of the two stages on the rank that holds most.
    """

    rank: int
    peak: int
    steady: int


def switch_memory(
    before: Footprint, after: Footprint, path: str, staging_bytes: int, *, offload: bool = False
) -> SwitchMemory:
    """Peak of a switch on the live path, after the order of docs/live-switch.md; activations are gone by then.

    The old gradients go first, and the new stage begins with weights and masters. So the fullest points are: all of the old
    state beside those, when the weights move; and the end, with the new moments in place. Through a checkpoint the old
    stage is gone before the new one is built; with offload it is in host memory by then.

    Args:
        before: the old stage.
        after: the new one, on the same ranks.
        path: live or checkpoint.
        staging_bytes: of messages on their way, both directions together.
        offload: as `upcycle.offload`.
    """
    peaks = []
    for old, new in zip(before.ranks, after.ranks, strict=True):
        if path == "live":
            start = old.weights + old.masters + old.moments + (0 if offload else new.weights + new.masters)
            end = new.weights + new.masters + new.moments
            peaks.append(max(start, end) + staging_bytes)
        else:
            gone = replace(old, activations=0)
            peaks.append(max(gone.total, replace(new, activations=0).total))
    rank = max(range(len(peaks)), key=lambda r: (peaks[r], -r))
    steady = max(f.ranks[f.largest].total for f in (before, after))
    return SwitchMemory(rank, peaks[rank], steady)


def checkpoint_bytes(parameters: int, precision: str) -> int:
    """One checkpoint: weights, masters (an fp32 run stores its weights as such again) and two moments."""
    return parameters * ((2 if precision == "bf16" else 4) + 3 * STATE_BYTES)
