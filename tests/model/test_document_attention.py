"""Attention inside documents: a sample of several equals each of them alone, and none sees another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from model.document_attention import document_mask, end_to_end
from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed

# Lengths of documents in two samples of 32 tokens; one has a single token, one sample is a single document.
SAMPLES = [[7, 1, 15, 9], [32]]
ATTENTION: dict[str, dict[str, Any]] = {
    "gqa": dict(kv_heads=2),
    "mla": dict(attention="mla", mla_query_rank=16, mla_kv_rank=16, mla_head_dim=8, mla_rope_head_dim=8, mla_value_head_dim=8),
    "recompute": dict(recompute="full"),
    "selective": dict(recompute="selective"),
}  # fmt: skip


def _documents() -> torch.Tensor:
    return torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in SAMPLES])


def _model(options: dict[str, Any], precision: str = "fp32") -> Any:
    from model.build import build_chunks
    from model.config import ModelConfig
    from parallel.config import ParallelConfig
    from parallel.layout import Layout

    layout = Layout.create(ParallelConfig(), seed=3)
    sizes = dict(
        layers=2, hidden_size=32, ffn_hidden_size=32, attention_heads=4, expert_ffn_hidden_size=16, num_experts=4, top_k=2,
        aux_loss_coeff=0.0, init_std=0.2,
    )  # fmt: skip
    model = ModelConfig(**{**sizes, **options})
    (chunk,) = build_chunks(model, 4, layout, vocab_size=64, sequence_length=32, precision=precision)
    return chunk


def _compare(options: dict[str, Any]) -> tuple[float, float, float]:
    chunk = _model(options)
    tokens, documents = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1)), _documents()
    positions = torch.arange(32).expand(2, 32)
    apart = chunk(tokens, positions, document_mask(documents))
    together = chunk(tokens, positions, None)
    off = away = 0.0
    for row, lengths in enumerate(SAMPLES):
        first = 0
        for length in lengths:
            part = slice(first, first + length)
            alone = chunk(tokens[row : row + 1, part], torch.arange(length)[None], None)[0]
            scale = alone.abs().max()
            off = max(off, ((apart[row, part] - alone).abs().max() / scale).item())
            if first:
                away = max(away, ((together[row, part] - alone).abs().max() / scale).item())
            first += length
    return off, away, _leak(chunk, tokens, positions, documents)


def _leak(chunk: Any, tokens: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor) -> float:
    """The largest gradient of one document's logits in respect of the embedding of another's tokens, over all pairs."""
    found = []
    chunk.embedding.register_forward_hook(lambda module, args, out: found.append(out) or out.retain_grad())
    leak = 0.0
    for number in range(len(SAMPLES[0])):
        found.clear()
        logits = chunk(tokens, positions, document_mask(documents))
        logits[0][documents[0] == number].square().sum().backward()
        # [s, b, h]
        gradient = found[-1].grad
        own = documents[0] == number
        assert gradient[own, 0].abs().max() > 0
        leak = max(leak, gradient[~own, 0].abs().max().item(), gradient[:, 1].abs().max().item())
    return leak


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_packed_sample_equals_its_documents_alone(kind: str) -> None:
    ((off, away, leak),) = run_distributed(_compare, 1, ATTENTION[kind])
    # fp32 keeps 2^-24 of each term of sums over at most 32 keys; rotary angles of other positions are rounded anew.
    assert off < 2e-5
    # Without the mask they do see each other; that the test can fail.
    assert away > 100 * 2e-5
    assert leak == 0.0


def test_the_mask_is_causal_and_inside_documents() -> None:
    documents = torch.tensor([[0, 0, 1, 1]])
    seen = ~document_mask(documents)[0, 0]
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_documents_end_to_end() -> None:
    """A sample begins a document whatever the one before it ended with."""
    batch = {"tokens": torch.arange(64).view(2, 32), "documents": _documents()}
    flat = end_to_end(batch)
    assert flat["tokens"].tolist() == [list(range(64))] and "documents" not in flat
    packed = flat["packed"]
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 7, 8, 23, 32, 64]
    assert packed.cu_seqlens_q.dtype == torch.int32 and packed.max_seqlen_q == packed.max_seqlen_kv == 32
    assert packed.qkv_format == "thd"


def _packed_on_gpu() -> float:
    from model.document_attention import to_device, wants_packed

    chunk = _model(dict(hidden_size=256), "bf16").bfloat16()
    assert wants_packed(chunk)
    device = torch.device("cuda")
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    batch = end_to_end({"tokens": tokens, "documents": _documents()})
    packed = chunk(batch["tokens"].to(device), None, None, packed_seq_params=to_device(batch["packed"], device))[0]
    off, offsets = 0.0, batch["packed"].cu_seqlens_q.tolist()
    for first, end in pairwise(offsets):
        one = end_to_end({"tokens": batch["tokens"][:, first:end], "documents": torch.zeros(1, end - first)})
        alone = chunk(one["tokens"].to(device), None, None, packed_seq_params=to_device(one["packed"], device))[0]
        off = max(off, ((packed[first:end] - alone).abs().max() / alone.abs().max()).item())
    return off


@pytest.mark.requires_gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and have_transformer_engine()), reason="needs a CUDA device and Transformer Engine"
)
def test_packed_documents_equal_each_alone_under_transformer_engine() -> None:
    # bf16 keeps 8 bits.
    assert run_distributed(_packed_on_gpu, 1)[0] < 2**-5
