"""Weight gradients that Transformer Engine's layers add in their products are the sums that mcore's DDP makes of them.

Its own autograd functions run, with stand-ins for its kernels (`te_kernels.py`).
"""

from __future__ import annotations

import contextlib
import copy
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
_MICRO_BATCHES = 4


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _wrapped(kind: str, network: dict[str, Any], *, fused: bool) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from model import build
    from model.config import ModelConfig
    from model.performance import PerformanceConfig
    from parallel.compat import forget_models

    forget_models()
    model, layout = ModelConfig(**(te.SIZES | network), experts=kind), te.layout()
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        (chunk,) = build.build_chunks(
            model, 4, layout, vocab_size=64, sequence_length=32, precision="bf16",
            performance=PerformanceConfig(gradient_accumulation_fusion=fused),
        )  # fmt: skip
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in chunk.parameters():
            p.copy_(torch.randn(p.shape, generator=drawn) * 0.2 + (p.dim() == 1))
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True
    )
    return DistributedDataParallel(chunk.config, ddp, Float16Module(chunk.config, chunk))


def _gradients(wrapped: Any, *, captured: bool = False, first: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """What DDP's buffers hold after some micro-batches.

    Args:
        wrapped: a chunk in DDP.
        captured: each runs as one whose graph was captured.
        first: micro-batches of which mcore's schedule tells layers in 8 bits that they are the first.
    """
    from tests.model.te_kernels import its_layers_run

    drawn = torch.Generator().manual_seed(6)
    wrapped.zero_grad_buffer()
    with its_layers_run(), wrapped.no_sync():
        for number in range(_MICRO_BATCHES):
            if number in first:
                wrapped.set_is_first_microbatch()
            for layer in wrapped.modules() if captured else ():
                if hasattr(layer, "is_first_microbatch"):
                    # So leaves `make_graphed_callables` every module before it captures.
                    layer.is_first_microbatch = True
            tokens = torch.randint(0, 64, (2, 32), generator=drawn)
            wrapped(tokens, torch.arange(32).expand(2, 32), None, labels=tokens).float().mean().backward()
    return {name: p.main_grad.clone() for name, p in wrapped.named_parameters()}


def _farthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest distance of two gradients over the length of the second; infinite for one that is not finite."""
    apart = [((found[name] - value).norm() / value.norm()).item() for name, value in expected.items() if value.any()]
    assert len(apart) > 8
    return max(distance if distance == distance else float("inf") for distance in apart)


def _compared(kind: str, network: dict[str, Any]) -> tuple[int, list[float]]:
    expected = _gradients(_wrapped(kind, network, fused=False))
    found = []
    for captured in (False, True):
        wrapped = _wrapped(kind, network, fused=True)
        found.append(_farthest(_gradients(wrapped, captured=captured), expected))
    return sum(p.grad_added_to_main_grad for p in wrapped.parameters()), found


@pytest.mark.parametrize(
    "recompute", [{}, dict(recompute="full"), dict(recompute="selective", recompute_modules=["mlp", "moe"])]
)
@pytest.mark.parametrize(
    ("kind", "name"), [("grouped", "gqa"), ("te", "gqa"), ("grouped", "mla"), ("grouped", "all heads")]
)
def test_they_are_the_sums_over_all_micro_batches(kind: str, name: str, recompute: dict[str, Any]) -> None:
    network = {key: value for key, value in te.NETWORKS[name].items() if key != "qk_norm_all_heads"}
    [(added, apart)] = run_distributed(_compared, 1, kind, network | recompute)
    assert added >= 8
    # One side adds up what was rounded to bf16, by at most 2^-9 of an element.
    assert max(apart) <= 2**-8


def _scored(counted: bool) -> float:
    """Two calls of mcore's schedule in 8 bits, whose weights are as they were; layers compute in bf16."""
    from parallel.transformer_engine import counted_as_one_step

    expected, wrapped = _gradients(_wrapped("grouped", {}, fused=False)), _wrapped("grouped", {}, fused=True)
    for layer in wrapped.modules():
        if hasattr(layer, "disable_parameter_transpose_cache"):
            layer.disable_parameter_transpose_cache = False
    wrapped.config = copy.copy(wrapped.config)
    wrapped.config.fp8 = "hybrid"
    with counted_as_one_step([wrapped]) if counted else contextlib.nullcontext():
        return _farthest(_gradients(wrapped, first=(0, 2)), expected)


def test_scoring_in_8_bits_adds_up_over_several_calls() -> None:
    assert run_distributed(_scored, 1, True)[0] <= 2**-8
    assert run_distributed(_scored, 1, False)[0] > 0.5
