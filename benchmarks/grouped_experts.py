"""Times our grouped experts against Megatron's `SequentialMLP`, side by side in one process.

Why: the claim "faster than running experts one after the other" has to be re-measurable on any machine.

How to use (CPU; one thread, as each rank of a CPU run has; a minute):

    python benchmarks/grouped_experts.py                  # all shapes, bf16
    python benchmarks/grouped_experts.py --shapes fine --dtype bf16 fp32 --pairs 41

Each row is forward plus backward. `experts` is the expert module alone; `layer` is the whole MoE layer (router,
dispatcher, experts) inside mcore's DDP, which also adds the gradients to its fp32 buffers. The two modules take turns,
so that a change in the machine's load hits both, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from parallel.compat import make_transformer_config, moe_submodules, prepare_megatron, use_experts, versions
from parallel.config import ParallelConfig
from parallel.errors import ConfigError, CoppiceError

if TYPE_CHECKING:
    from parallel.layout import Layout

RESULTS = Path(__file__).parent / "results" / "grouped_experts.json"
_WARM_UP = 3
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes of one expert layer on one rank."""

    experts: int
    tokens: int  # rows that reach the experts: tokens times top-k
    hidden: int
    ffn: int


SHAPES = {
    "demo16": Shape(experts=16, tokens=1024, hidden=256, ffn=512),
    "demo8": Shape(experts=8, tokens=1024, hidden=256, ffn=512),
    "fine": Shape(experts=64, tokens=512, hidden=128, ffn=256),
}
# Loads of the experts: equal, or drawn from a router whose logits have this spread over experts. Shown with the largest
# load over the mean.
LOADS = {"even": 0.0, "uneven": 0.3}


def _config(shape: Shape, dtype: torch.dtype) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return make_transformer_config(
        TransformerConfig,
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=4,
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=shape.ffn,
        ffn_hidden_size=shape.ffn,
        moe_router_topk=2,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )


def _moe_parts(grouped: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from model.experts import GroupedExperts

    spec = get_gpt_layer_local_spec(num_experts=2, moe_grouped_gemm=False, normalization="RMSNorm")
    if grouped:
        use_experts(spec, GroupedExperts)
    return moe_submodules(spec)


def _moe_layer(shape: Shape, dtype: torch.dtype, layout: Layout, grouped: bool) -> Any:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    torch.manual_seed(1)
    return MoELayer(_config(shape, dtype), _moe_parts(grouped), layer_number=1, pg_collection=layout.groups).to(dtype)


def _counts(shape: Shape, spread: float) -> torch.Tensor:
    if not spread:
        return torch.full((shape.experts,), shape.tokens // shape.experts)
    noise = torch.Generator().manual_seed(0)
    shares = torch.softmax(torch.randn(shape.experts, generator=noise) * spread, 0)
    return torch.bincount(
        torch.multinomial(shares, shape.tokens, replacement=True, generator=noise), minlength=shape.experts
    )


def _experts_step(experts: Any, shape: Shape, dtype: torch.dtype, counts: torch.Tensor) -> Callable[[], None]:
    noise = torch.Generator().manual_seed(2)
    rows = torch.randn(shape.tokens, shape.hidden, generator=noise).to(dtype).requires_grad_()
    probs = torch.rand(shape.tokens, generator=noise).requires_grad_()
    gradient = torch.randn(shape.tokens, shape.hidden, generator=noise).to(dtype)

    def step() -> None:
        for tensor in (rows, probs, *experts.parameters()):
            tensor.grad = None
        experts(rows, counts, probs)[0].backward(gradient)

    return step


def _layer_step(layer: Any, shape: Shape, dtype: torch.dtype) -> Callable[[], None]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(layer.config, options, layer)
    noise = torch.Generator().manual_seed(2)
    sequence = shape.tokens // layer.config.moe_router_topk
    rows = torch.randn(sequence, 1, shape.hidden, generator=noise).to(dtype).requires_grad_()
    gradient = torch.randn(sequence, 1, shape.hidden, generator=noise).to(dtype)

    def step() -> None:
        wrapped.zero_grad_buffer()
        rows.grad = None
        wrapped(rows)[0].backward(gradient)

    return step


def compare(theirs: Callable[[], None], ours: Callable[[], None], pairs: int) -> dict[str, float]:
    """Times two functions in turn, first one and then the other leading.

    Returns:
        Medians in ms and the median and quartiles of theirs / ours, pair by pair.
    """
    seconds: dict[Callable[[], None], list[float]] = {theirs: [], ours: []}
    for pair in range(-_WARM_UP, pairs):
        for step in (theirs, ours) if pair % 2 else (ours, theirs):
            begin = time.perf_counter()
            step()
            if pair >= 0:
                seconds[step].append(time.perf_counter() - begin)
    ratios = [their / our for their, our in zip(seconds[theirs], seconds[ours], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "sequential_ms": 1e3 * statistics.median(seconds[theirs]),
        "grouped_ms": 1e3 * statistics.median(seconds[ours]),
        "ratio": middle,
        "ratio_low_quartile": low,
        "ratio_high_quartile": high,
    }


def measure(names: list[str], dtypes: list[str], pairs: int, layout: Layout) -> list[dict[str, Any]]:
    """Runs all comparisons and prints a line for each."""
    print(f"{'shape':8} {'experts':>7} {'tokens':>6} {'hidden':>6} {'ffn':>5} dtype what    load         ", end="")
    print("sequential ms  grouped ms  ratio (quartiles)")
    rows = []
    for name in names:
        shape = SHAPES[name]
        for dtype_name in dtypes:
            dtype = _DTYPES[dtype_name]
            layers = [_moe_layer(shape, dtype, layout, grouped) for grouped in (False, True)]
            for load, spread in LOADS.items():
                counts = _counts(shape, spread)
                peak = counts.max().item() / counts.float().mean().item()
                theirs, ours = (_experts_step(layer.experts, shape, dtype, counts) for layer in layers)
                rows.append(_row(name, dtype_name, "experts", f"{load} {peak:.2f}", compare(theirs, ours, pairs)))
            theirs, ours = (_layer_step(layer, shape, dtype) for layer in layers)
            rows.append(_row(name, dtype_name, "layer", "router's", compare(theirs, ours, pairs)))
    return rows


def _row(name: str, dtype: str, what: str, load: str, timing: dict[str, float]) -> dict[str, Any]:
    shape = SHAPES[name]
    sizes = f"{name:8} {shape.experts:7d} {shape.tokens:6d} {shape.hidden:6d} {shape.ffn:5d} {dtype:5}"
    print(
        f"{sizes} {what:7} {load:12} {timing['sequential_ms']:13.2f} {timing['grouped_ms']:11.2f} "
        f"{timing['ratio']:6.2f} ({timing['ratio_low_quartile']:.2f} to {timing['ratio_high_quartile']:.2f})",
        flush=True,
    )
    return {"shape": name, **asdict(shape), "dtype": dtype, "what": what, "load": load, **timing}


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "bf16 instructions": " ".join(flag for flag in ("amx_bf16", "avx512_bf16") if flag in info) or "none",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        **versions(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(_DTYPES), default=["bf16"], help="default: bf16")
    parser.add_argument("--pairs", type=int, default=21, help="timed pairs per row (default 21)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default {RESULTS})")
    options = parser.parse_args()
    if options.pairs < 2:
        raise ConfigError(f"--pairs {options.pairs}: quartiles need 2 or more")
    prepare_megatron()  # before the first import of mcore, which the layout makes
    from parallel.layout import Layout, join_job, leave_job

    torch.set_num_threads(options.threads)
    joined = join_job(60)
    layout = Layout.create(ParallelConfig(), seed=1)
    machine = _machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = measure(options.shapes, options.dtype, options.pairs, layout)
    leave_job(joined)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "command": "python " + " ".join(sys.argv),
              "pairs": options.pairs, "rows": rows}  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    try:
        main()
    except CoppiceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
