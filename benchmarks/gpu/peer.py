"""One MoE block of ours beside torchtitan's, where that is installed: same shape, same tokens, same routing width."""

import contextlib
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.rows import CUTLASS, device, row, synchronize
from parallel.compat import prepare_megatron
from parallel.transformer_engine import have_transformer_engine

prepare_megatron()

from model.build import build_chunks, moe_parts  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from model.performance import PerformanceConfig  # noqa: E402
from parallel.config import ParallelConfig  # noqa: E402
from parallel.layout import Layout, join_job, leave_job  # noqa: E402

# The version whose interface this calls; later ones build their layers from configurations of whole models.
_VERSION = "0.2.2"
_HOW = (
    f"not importable here: `GPU_PYTHON -m pip install torchtitan=={_VERSION}` (it needs triton, which CUDA builds of torch "
    "bring), or put the wheels of `pip wheel` in gpu-bundle/ (docs/gpu-measured.md)"
)
# Name -> experts, top-k, hidden, expert ffn, tokens.
_LARGE = {"32 experts top-2, 2048 x 3072": (32, 2, 2048, 3072, 8192),
          "256 experts top-8, 1024 x 512": (256, 8, 1024, 512, 8192)}  # fmt: skip
_SMALL = {"8 experts top-2, 64 x 64": (8, 2, 64, 64, 128)}


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds of forward and backward of each block, and ours over the peer's, turn by turn in one process."""
    try:
        from torchtitan.models.moe import MoE, MoEArgs
    except ImportError as e:
        yield row("torchtitan's MoE block", f"{_HOW}; {e}")
        return
    yield row("version of torchtitan", importlib.metadata.version("torchtitan"))
    joined = join_job(600)
    layout = Layout.create(ParallelConfig(), seed=1)
    kinds = ["grouped", *(["te"] if torch.cuda.is_available() and have_transformer_engine() else [])]
    for name, (experts, top_k, hidden, ffn, tokens) in (_SMALL if small else _LARGE).items():
        inputs = torch.randn(tokens, 1, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn_like(inputs)
        options = MoEArgs(num_experts=experts, num_shared_experts=0, top_k=top_k, score_func="softmax",
                          score_before_experts=False, load_balance_coeff=None,
                          use_grouped_mm=torch.cuda.is_available())  # fmt: skip
        with torch.device(device()), torch.no_grad():
            peer = MoE(options, dim=hidden, hidden_dim=ffn)
            peer.init_weights(0.02, device())
        peer.to(torch.bfloat16)
        # With variables of the environment, which Transformer Engine looks at in every product.
        blocks: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, str]]] = {"torchtitan": (peer, {})}
        holders: list[torch.nn.Module] = [peer]
        for kind in kinds:
            model = ModelConfig(layers=1, hidden_size=hidden, attention_heads=8, kv_heads=8, ffn_hidden_size=ffn,
                                num_experts=experts, top_k=top_k, expert_ffn_hidden_size=ffn, experts=kind)  # fmt: skip
            # As a run decides it: Transformer Engine's kernels where it is installed.
            fused = PerformanceConfig(permute_fusion="te" in kinds, router_fusion="te" in kinds)
            chunks = build_chunks(
                model, experts, layout, vocab_size=256, sequence_length=tokens, precision="bf16", performance=fused
            )
            layer = moe_parts(chunks)[0].layer.to(device=device(), dtype=torch.bfloat16)
            blocks[kind] = (lambda x, layer=layer: layer(x)[0], {})
            if kind == "te":
                blocks["te by CUTLASS"] = (blocks[kind][0], CUTLASS)
            holders.append(layer)
        with _counting_on_cpu():
            seconds = _turns(blocks, holders, inputs, gradient, 3 if small else 15)
        for kind, times in seconds.items():
            yield row(f"{name}, {tokens} tokens, {kind}: forward and backward", statistics.median(times) * 1e3, "ms")
        for kind in [kind for kind in seconds if kind != "torchtitan"]:
            pairs = zip(seconds[kind], seconds["torchtitan"], strict=True)
            yield row(
                f"{name}, {tokens} tokens: time of {kind} over torchtitan's", statistics.median(a / b for a, b in pairs)
            )
    leave_job(joined)


def _counting_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """torchtitan counts tokens with a histogram of integers, which torch has on GPUs only; on CPU it goes by floats."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    histogram = torch.histc
    return mock.patch("torch.histc", lambda values, **options: histogram(values.float(), **options).long())


def _turns(
    blocks: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, str]]], holders: list[torch.nn.Module],
    inputs: torch.Tensor, gradient: torch.Tensor, rounds: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each block, round by round after two to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for number in range(rounds + 2):
        for name, (block, variables) in blocks.items():
            for holder in holders:
                holder.zero_grad(set_to_none=True)
            inputs.grad = None
            synchronize()
            began = time.perf_counter()
            with mock.patch.dict(os.environ, variables):
                block(inputs).backward(gradient)
                synchronize()
            if number > 1:
                seconds[name].append(time.perf_counter() - began)
    return seconds
