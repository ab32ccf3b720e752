"""Attention inside documents: several of them share a sample, and no token sees one of another.

Which document a token is of becomes what the attention at hand takes:

    mcore's torch attention     a mask, [b, 1, s, s]
    Transformer Engine's        no mask at all: the samples of a micro-batch end to end, with the offset of every document
                                (mcore's packed format, `thd`); attention then costs the squares of documents, not of samples

Rotary positions need no care. mcore counts them from the start of the sample where there is a mask and from that of the
document where they are packed; scores depend on differences of positions alone. Shapes: b samples, s tokens of each.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention


def wants_packed(chunk: GPTModel) -> bool:
    """Whether the attention of a model takes documents end to end instead of a mask."""
    return not isinstance(chunk.decoder.layers[0].self_attention.core_attention, DotProductAttention)


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """What no token may attend to: later ones, and those of other documents.

    Args:
        documents: [b, s] number of the document that each token is of.

    Returns:
        [b, 1, s, s] (from, to), True where attention is cut off.
    """
    later = torch.ones(documents.shape[1], documents.shape[1], dtype=torch.bool, device=documents.device).triu(1)
    return (documents[:, None, :, None] != documents[:, None, None, :]) | later


def end_to_end(batch: dict[str, Any]) -> dict[str, Any]:
    """The samples of a micro-batch as one of b x s tokens.

    Args:
        batch: tensors [b, s], `documents` among them.

    Returns:
        The same [1, b x s], and in place of `documents` as `packed` where each of them begins and ends.
    """
    documents = batch["documents"]
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.reshape(-1).nonzero()[:, 0]
    offsets = torch.cat([starts, starts.new_tensor([documents.numel()])]).to(torch.int32)
    longest = int(offsets.diff().max())
    flat = {key: value.reshape(1, -1) for key, value in batch.items() if key != "documents"}
    flat["packed"] = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return flat


def to_device(packed: PackedSeqParams, device: torch.device) -> PackedSeqParams:
    """The same on another device."""
    offsets = packed.cu_seqlens_q.to(device, non_blocking=True)
    return replace(packed, cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
