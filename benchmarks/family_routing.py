"""What family routing costs per training step over mcore's plain top-K, with the same weights in one process.

Three kinds of routing take turns on one model of M experts that are copies of E: plain (release 1), families (0) and half
released. Timed are the routers alone, forward and backward on the same hidden states, and whole steps (forward, backward,
optimizer). The cost told is the difference of router times, over all layers, relative to a plain step: whole steps also
differ by which experts the tokens go to, and scatter more than the difference. The medians of all rounds are told.

    OMP_NUM_THREADS=1 python benchmarks/family_routing.py [--rounds 15]

Writes benchmarks/results/family_routing.json. The aim (issue 4) is at most 2 % of a step.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

_RESULT = Path(__file__).parent / "results" / "family_routing.json"
RELEASES = {"plain": 1.0, "families": 0.0, "half released": 0.5}


@dataclass(frozen=True)
class Scale:
    """A model and a micro-batch."""

    name: str
    experts_before: int
    experts: int
    top_k: int
    layers: int
    hidden: int
    ffn: int
    sequence: int
    batch: int
    # Four copies of as many experts as it takes, one of the others; else the same for all.
    greedy: bool

    def parents(self) -> list[int]:
        """Parent of each expert, [M]."""
        even = self.experts // self.experts_before
        copies = [even] * self.experts_before
        if self.greedy:
            grown, rest = divmod(self.experts - self.experts_before, 3)
            copies = [4] * grown + [1 + rest] + [1] * (self.experts_before - grown - 1)
        return [expert for expert, count in enumerate(copies) for _ in range(count)]


SCALES = (
    Scale("demo, twice each", 8, 16, 2, 4, 256, 512, 256, 2, False),
    Scale("demo, greedy", 8, 16, 2, 4, 256, 512, 256, 2, True),
    Scale("fine, twice each", 64, 128, 8, 2, 512, 256, 1024, 2, False),
    Scale("fine, greedy", 64, 128, 8, 2, 512, 256, 1024, 2, True),
)


def make(scale: Scale) -> tuple[list[Any], Callable[[], None]]:
    """The bare model, families installed, and a function that makes one training step of it in bf16."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    from model.build import build_chunks, moe_parts
    from model.config import ModelConfig
    from model.family_routing import install_family_routing
    from parallel.config import ParallelConfig
    from parallel.layout import Layout
    from parallel.optimizer_state import use_fused_update

    model = ModelConfig(
        layers=scale.layers, hidden_size=scale.hidden, attention_heads=8, kv_heads=4, ffn_hidden_size=512,
        num_experts=scale.experts_before, top_k=scale.top_k, expert_ffn_hidden_size=scale.ffn, aux_loss_coeff=0.01,
        experts="grouped",
    )  # fmt: skip
    layout, vocabulary = Layout.create(ParallelConfig(), seed=1), 8192
    chunks = build_chunks(
        model, scale.experts, layout, vocab_size=vocabulary, sequence_length=scale.sequence, precision="bf16"
    )
    firsts = [scale.parents().index(parent) for parent in scale.parents()]
    with torch.no_grad():
        for part in moe_parts(chunks):
            for p in part.layer.experts.parameters():
                p.copy_(p[firsts].clone())
            rows = part.layer.router.weight
            # Siblings have grown apart a little, as after some steps.
            rows.copy_((rows + 0.1 * torch.randn_like(rows) * rows.std())[firsts] + 0.01 * torch.randn_like(rows))
    install_family_routing(chunks, {part.number: scale.parents() for part in moe_parts(chunks)})
    config = chunks[0].config
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(config, options, Float16Module(config, chunks[0]))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-5, bf16=True, params_dtype=torch.bfloat16,
                        use_distributed_optimizer=True), [wrapped],
    )  # fmt: skip
    use_fused_update(optimizer)
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    tokens = torch.randint(vocabulary, (scale.batch, scale.sequence), device=layout.device)
    positions = torch.arange(scale.sequence, device=layout.device).expand(scale.batch, -1)

    def forward(_: Any, wrapped: Any) -> Any:
        return wrapped(tokens, positions, None, labels=tokens.roll(-1, 1)), lambda out: (out.mean(), {})

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward, data_iterator=None, model=[wrapped], num_microbatches=1,
            seq_length=scale.sequence, micro_batch_size=scale.batch,
        )  # fmt: skip
        optimizer.step()

    return chunks, step


def measure(scale: Scale, rounds: int) -> dict[str, Any]:
    """Seconds of one router and of one step under each kind of routing, median of `rounds` after one to warm up."""
    import torch

    from model.family_routing import family_routers, set_release

    chunks, step = make(scale)
    step()  # mcore's schedule sets the scale of auxiliary losses, which the router alone would set in another shape
    router = family_routers(chunks)[0]
    device = router.weight.device
    hidden = torch.randn(scale.sequence, scale.batch, scale.hidden, device=device).bfloat16().requires_grad_()
    gradient = torch.randn(scale.sequence * scale.batch, scale.experts, device=device)

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def route() -> None:
        probs, _ = router(hidden)
        torch.autograd.backward(probs, gradient)

    seconds: dict[str, dict[str, list[float]]] = {name: {"router": [], "step": []} for name in RELEASES}
    names = list(RELEASES)
    for number in range(rounds + 1):
        for name in names[number % 3 :] + names[: number % 3]:
            set_release(chunks, RELEASES[name])
            for what, act, times in (("router", route, 10), ("step", step, 1)):
                act()  # caches are warm for this kind of routing
                settle()
                began = time.perf_counter()
                for _ in range(times):
                    act()
                settle()
                if number:
                    seconds[name][what].append((time.perf_counter() - began) / times)
    medians = {name: {what: statistics.median(s) for what, s in both.items()} for name, both in seconds.items()}
    plain = medians["plain"]
    found: dict[str, Any] = {
        "scale": scale.name,
        "tokens": scale.sequence * scale.batch,
        "seconds": medians,
        "all": seconds,
    }
    for name in names[1:]:
        added = [a - b for a, b in zip(seconds[name]["router"], seconds["plain"]["router"], strict=True)]
        ratios = [a / b for a, b in zip(seconds[name]["step"], seconds["plain"]["step"], strict=True)]
        found[name] = {
            "added_share_of_step": scale.layers * statistics.median(added) / plain["step"],
            "added_share_quartiles": [scale.layers * q / plain["step"] for q in statistics.quantiles(added, n=4)[::2]],
            "step_ratio": statistics.median(ratios),
            "step_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return found


def main() -> None:
    """Measure every scale, print a table, write the result with the machine named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    from parallel.compat import forget_models, prepare_megatron, versions

    prepare_megatron()
    import torch

    from parallel.layout import join_job, leave_job

    torch.set_num_threads(1)
    joined = join_job(600)
    results = []
    print("| scale | router ms: plain, families, half | step ms, plain | added: families | added: half released | "
          "step ratio: families, half |\n|---|---|---|---|---|---|")  # fmt: skip
    for scale in SCALES:
        forget_models()
        found = measure(scale, arguments.rounds)
        results.append(found)
        routers = ", ".join(f"{found['seconds'][name]['router'] * 1e3:.2f}" for name in RELEASES)
        added = [found[name]["added_share_of_step"] for name in RELEASES if name != "plain"]
        ratios = [found[name]["step_ratio"] for name in RELEASES if name != "plain"]
        print(f"| {scale.name} | {routers} | {found['seconds']['plain']['step'] * 1e3:.0f} | {added[0]:+.2%} | "
              f"{added[1]:+.2%} | {ratios[0]:.3f}, {ratios[1]:.3f} |", flush=True)  # fmt: skip
    leave_job(joined)
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    machine = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    _RESULT.parent.mkdir(exist_ok=True)
    _RESULT.write_text(
        json.dumps({"machine": machine, "date": time.strftime("%Y-%m-%d"), "rounds": arguments.rounds,
                    "command": "python " + " ".join(sys.argv), "versions": versions(), "results": results}, indent=1)
        + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
