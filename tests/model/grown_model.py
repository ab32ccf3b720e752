"""Small models of E experts, and of M experts that are copies of them, for tests of what happens at the switch.

Weights are functions of their checkpoint keys, so both models, in any layout, agree without anything being moved.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

VOCABULARY, SEQUENCE, BATCH, EXPERTS = 64, 48, 3, 8
MOE_LAYERS = (1, 2)
FAMILIES: dict[str, list[int]] = {
    "twice": [e for e in range(8) for _ in range(2)],
    "thrice": [e for e in range(8) for _ in range(3)],
    "uneven": [0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7, 7, 7],
    "scattered": [0, 1, 2, 3, 4, 5, 6, 7, 6, 2, 0, 0],
    # Two routing groups of four parents; every group grows by itself.
    "in groups": [0, 1, 1, 0, 2, 3, 3, 3, 4, 5, 5, 5, 6, 7, 7, 6],
}
SOFTMAX: dict[str, Any] = {"router_score": "softmax"}
LOSS_FREE: dict[str, Any] = {"balancing": "loss_free"}
GROUPS: dict[str, Any] = {"router_groups": 2, "router_group_topk": 1}


def model_config(**changes: Any) -> Any:
    from model.config import ModelConfig

    sizes: dict[str, Any] = {"layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "attention_heads": 4}
    rest: dict[str, Any] = {"num_experts": EXPERTS, "expert_ffn_hidden_size": 48, "balancing": "none"}
    losses = {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.05}
    return ModelConfig(**(sizes | rest | losses | changes))


def layout_of(**sizes: int) -> Any:
    from parallel.config import ParallelConfig
    from parallel.layout import Layout

    return Layout.create(ParallelConfig(**sizes), seed=3)


def build(config: Any, layout: Any, parents: Sequence[int] | None = None, *, precision: str = "fp32") -> list[Any]:
    """A model of the parents, or of their copies by `parents`; plain routing."""
    from model.build import build_chunks
    from model.sharded_state import expert_keys, model_state
    from parallel.compat import forget_models

    forget_models()
    chunks = build_chunks(
        config,
        len(parents) if parents else EXPERTS,
        layout,
        vocab_size=VOCABULARY,
        sequence_length=SEQUENCE,
        precision=precision,
    )
    copied = expert_keys(chunks, layout)
    for leaf in _sharded_tensors(model_state(chunks, layout)):
        if "norm" in leaf.key:
            continue
        noise = torch.Generator().manual_seed(zlib.crc32(leaf.key.encode()))
        shape = (EXPERTS, *leaf.global_shape[1:]) if leaf.key in copied else leaf.global_shape
        # The bias is of the size that balancing gives it, so that it decides in many tokens.
        scale = {"expert_bias": 0.1, "weight": 0.3}[leaf.key.split(".")[-1]] if ".router." in leaf.key else 0.15
        whole = torch.randn(shape, generator=noise) * scale
        if leaf.key in copied and parents:
            whole = whole[list(parents)]
        leaf.data.detach().copy_(whole[leaf.global_slice()].reshape(leaf.data.shape))
    return chunks


def _sharded_tensors(tree: Any) -> list[Any]:
    """Descriptions of this rank's tensors, those of gated matrices in their halves."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(tree, ShardedTensorFactory):
        tree = tree.build()
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for part in tree for leaf in _sharded_tensors(part)] if isinstance(tree, list) else [tree]


def build_grown(config: Any, layout: Any, parents: Sequence[int], **how: str) -> list[Any]:
    from model.family_routing import install_family_routing

    chunks = build(config, layout, parents, **how)
    install_family_routing(chunks, dict.fromkeys(MOE_LAYERS, parents))
    return chunks


def forward(chunks: list[Any], *, loss: bool = False, rows: slice = slice(None)) -> torch.Tensor:
    """Logits, or the loss, of the sequences `rows` of one fixed batch."""
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))[rows]
    positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
    output = chunks[0](tokens, positions, None, labels=tokens.roll(-1, 1) if loss else None)
    return output.mean() if loss else output


def gradients_of(chunks: list[Any], parents: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """Gradients of the loss by parameter; those of experts summed over the copies of each parent."""
    for p in chunks[0].parameters():
        p.grad = None
    from megatron.core.pipeline_parallel.schedules import custom_backward

    # torch's own backward suspends the CPU runtime, which recomputation needs.
    custom_backward(forward(chunks, loss=True), None)
    found = {}
    for name, p in chunks[0].named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        if parents and gradient.shape[0] == len(parents) and ".mlp." in name and "shared" not in name:
            gradient = torch.zeros(EXPERTS, *p.shape[1:]).index_add_(0, torch.tensor(parents), gradient)
        found[name] = gradient
    return found


def routers(chunks: list[Any]) -> list[Any]:
    from model.build import moe_parts

    return [part.layer.router for part in moe_parts(chunks)]


def routing_maps(chunks: list[Any], rows: slice = slice(None)) -> list[torch.Tensor]:
    """Which experts each token went to in one pass without gradients, [T, M] bool per layer."""
    maps: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda m, i, output: maps.append(output[1])) for r in routers(chunks)]
    with torch.no_grad():
        forward(chunks, rows=rows)
    for hook in hooks:
        hook.remove()
    return maps


def diverge(chunks: list[Any], rows: float = 0.1, bias: float = 0.02) -> None:
    """Move router rows and biases apart, as training does."""
    noise = torch.Generator().manual_seed(9)
    for router in routers(chunks):
        router.weight.data += rows * torch.randn(router.weight.shape, generator=noise)
        if router.expert_bias is not None:
            router.expert_bias += bias * torch.randn(router.expert_bias.shape, generator=noise)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    scale = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / scale if scale else ours.abs().max().item()
