"""What the first forward pass of Transformer Engine's layers would be asked: recomputation and documents, without running it."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed
from tests.model import te

pytestmark = [
    pytest.mark.requires_te,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]
# Part -> where Transformer Engine's spec looks whether to compute it again, from a layer of experts or a dense one.
PARTS = {
    "core_attn": "self_attention.checkpoint_core_attention",
    "layernorm": "recompute_pre_mlp_layernorm",
    "mla_up_proj": "self_attention.recompute_up_proj",
    "mlp": "recompute_mlp",
    "moe": "mlp.moe_layer_recompute",
    "moe_act": "mlp.experts.activation_recompute",
    "shared_experts": "mlp.shared_experts_recompute",
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _recomputed(part: str, fp8: dict[str, str]) -> list[bool]:
    network = te.NETWORKS["mla"] | {"shared_expert_ffn_hidden_size": 16}
    how = {"recompute": "selective", "recompute_modules": [part], **fp8}
    card = dict(get_device_capability=lambda *a: (9, 0), get_device_name=lambda *a: "NVIDIA H100")
    with mock.patch.multiple(torch.cuda, **card):
        chunks = te.built("te", network | how, te.layout())
    found = []
    for layer in chunks[0].decoder.layers:
        value: Any = layer
        for name in PARTS[part].split("."):
            value = getattr(value, name, None)
        found.append(bool(value))
    return found


@pytest.mark.parametrize("recipe", [None, "tensorwise", "blockwise", "delayed"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_computed_again_by_its_layers(part: str, recipe: str | None) -> None:
    if recipe == "delayed" and part in ("layernorm", "moe_act"):
        pytest.skip("refused (tests/model/test_recompute.py)")
    fp8 = {} if recipe is None else {"fp8": "hybrid", "fp8_recipe": recipe}
    [(dense, experts)] = run_distributed(_recomputed, 1, part, fp8)
    of_experts = part in ("moe", "moe_act", "shared_experts")
    of_dense = part == "mlp"
    assert experts == (not of_dense)
    # Its dense feed-forward has the norm inside; with latent attention it stands alone.
    assert dense == (not of_experts) or part == "layernorm"


def _padded(dispatcher: str, fp8: dict[str, str]) -> tuple[bool, bool]:
    """Whether the router, or the experts of a layer, make numbers of tokens that 8-bit products take."""
    card = dict(get_device_capability=lambda *a: (9, 0), get_device_name=lambda *a: "NVIDIA H100")
    with mock.patch.multiple(torch.cuda, **card):
        (chunk,) = te.built("te", te.NETWORKS["gqa"] | {"dispatcher": dispatcher} | fp8, te.layout())
    experts = chunk.decoder.layers[1].mlp.experts
    return bool(chunk.config.moe_router_padding_for_quantization), hasattr(experts, "quantization_padding")


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_numbers_of_tokens_fit_8_bit_products_under_each_dispatcher(dispatcher: str) -> None:
    [(by_router, by_experts)] = run_distributed(_padded, 1, dispatcher, {"fp8": "hybrid", "fp8_recipe": "blockwise"})
    assert by_router == (dispatcher == "alltoall")
    assert by_router or by_experts


def _asked(network: str) -> list[dict[str, Any]]:
    """What the core attention of each layer hands to Transformer Engine for documents end to end."""
    from transformer_engine.pytorch import DotProductAttention

    from model.document_attention import end_to_end, wants_packed

    (chunk,) = te.built("te", te.NETWORKS[network], te.layout())
    assert wants_packed(chunk)
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 16])
    packed = end_to_end({"documents": documents})["packed"]
    asked: list[dict[str, Any]] = []
    signature = inspect.signature(DotProductAttention.forward)

    def take(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(dict(signature.bind(*arguments, **options).arguments))
        return torch.zeros(32, 32)

    with mock.patch.object(DotProductAttention, "forward", take):
        for layer in chunk.decoder.layers:
            attention = layer.self_attention
            heads = torch.zeros(32, 4, 8)
            attention.core_attention(
                heads, heads, heads, None, attn_mask_type=attention.attn_mask_type, packed_seq_params=packed
            )
    return [{key: value for key, value in call.items() if key != "self"} for call in asked]


@pytest.mark.parametrize("network", ["gqa", "mla"])
def test_documents_reach_its_attention_as_it_wants_them(network: str) -> None:
    [calls] = run_distributed(_asked, 1, network)
    assert len(calls) == 2
    for call in calls:
        assert call["qkv_format"] == "thd" and call["attn_mask_type"] == "padding_causal"
        assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_kv"].tolist() == [0, 5, 16, 32]
        assert call["max_seqlen_q"] == call["max_seqlen_kv"] == 16
        assert call["attention_mask"] is None


def _rotated(network: str) -> tuple[float, float]:
    """How far queries and keys of packed documents are from those of each document alone, over their size; and if packed as
    one document, so without beginning anew.
    """
    from model.document_attention import end_to_end

    (chunk,) = te.built("te", te.NETWORKS[network] | {"attention_heads": 4}, te.layout())
    attention = chunk.decoder.layers[0].self_attention
    seen: list[list[torch.Tensor]] = []

    def linear(self: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
        weight = self.weight.float()
        return x.float() @ weight.T, None

    def norm(self: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return x.float()

    def take(self: Any, query: torch.Tensor, key: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append([query, key])
        raise StopIteration

    def run(documents: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        packed = end_to_end({"documents": documents})["packed"]
        rotary = None
        if network == "gqa":
            length = chunk.rotary_pos_emb.get_rotary_seq_len(None, chunk.decoder, hidden, chunk.config, packed)
            rotary = chunk.rotary_pos_emb(length, packed_seq=True)
        with pytest.raises(StopIteration):
            attention(hidden, None, rotary_pos_emb=rotary, packed_seq_params=packed)
        return seen.pop()

    patches = [mock.patch.object(type(attention.core_attention), "forward", take)]
    for module in attention.modules():
        kind = type(module).__name__
        if "Linear" in kind:
            patches.append(mock.patch.object(type(module), "forward", linear))
        elif "Norm" in kind and kind != "IdentityOp":
            patches.append(mock.patch.object(type(module), "forward", norm))
    lengths, hidden = [5, 11, 16], torch.randn(32, 1, 32, generator=torch.Generator().manual_seed(1))
    worst = 0.0
    for patch in patches:
        patch.start()
    try:
        together = run(torch.tensor([[0] * 5 + [1] * 11 + [2] * 16]), hidden)
        whole = run(torch.zeros(1, 32, dtype=torch.int64), hidden)
        first, apart = 0, 0.0
        for length in lengths:
            part = slice(first, first + length)
            alone = run(torch.zeros(1, length, dtype=torch.int64), hidden[part])
            for one, other, through in zip(together, alone, whole, strict=True):
                apart = max(apart, ((through[part] - other).abs().max() / other.abs().max()).item())
                worst = max(worst, ((one[part] - other).abs().max() / other.abs().max()).item())
            first += length
    finally:
        for patch in reversed(patches):
            patch.stop()
    return worst, apart


@pytest.mark.parametrize("network", ["gqa", "mla", "yarn"])
def test_positions_begin_anew_in_each_document(network: str) -> None:
    [(off, away)] = run_distributed(_rotated, 1, network)
    assert off < 1e-5 and away > 1e-2
