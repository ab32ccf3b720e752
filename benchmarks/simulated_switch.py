"""Plans the live switch of a cluster that is not there: how long planning takes, what it must know, what crosses which link.

    python benchmarks/simulated_switch.py                      # 1,024 ranks, 61 layers, 256 -> 512 experts, EP 64 -> 128
    python benchmarks/simulated_switch.py --ranks 512 --pipeline 1 --expert-after 64 --separate
    python benchmarks/simulated_switch.py --ranks 64 --pipeline 1 --layers 12 --experts 64 --expert 32 --expert-after 64

Nothing is moved. Every rank's holdings come from arithmetic (`parallel/cluster.py`), the plan from the planner of the
running job (`parallel/reshard_plan.py`). The predicted pause divides each rank's bytes by the bandwidths given here, which
are assumptions, not measurements: see docs/live-switch.md.
"""

import argparse
import collections
import json
import math
import pickle
import platform
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.holdings import wave_of
from parallel.cluster import LogicalTensor, describe_rank
from parallel.config import ParallelConfig
from parallel.redistribute import told_together
from parallel.reshard_plan import Holdings, plan_rank, traffic
from parallel.telling import announce, choose_speakers, put_together
from train.expansion import homes
from upcycle.placement import place

RESULTS = Path(__file__).parent / "results" / "simulated_switch.json"


def deepseek_like(layers: int, experts: int, pipeline: int, separate: bool) -> list[LogicalTensor]:
    """Parameters of a network of DeepSeek-V3's shape (arXiv 2412.19437, section 4.2), in module order; bf16 weights.

    Args:
        layers: of the network; the first three are dense.
        experts: per layer.
        pipeline: stages, over which layers are spread.
        separate: whether every expert is a parameter of its own.
    """
    hidden, ffn, expert_ffn, dense_first = 7168, 18432, 2048, 3
    found = [LogicalTensor("embedding.word_embeddings.weight", (129280, hidden), 2)]
    for layer in range(layers):
        stage, name = layer * pipeline // layers, f"decoder.layers.{layer}."
        dense = [
            ("input_layernorm.weight", (hidden,)),
            ("self_attention.linear_q_down_proj.weight", (1536, hidden)),
            ("self_attention.linear_q_up_proj.weight", (128 * 192, 1536)),
            ("self_attention.linear_kv_down_proj.weight", (576, hidden)),
            ("self_attention.linear_kv_up_proj.weight", (128 * 256, 512)),
            ("self_attention.linear_proj.weight", (hidden, 128 * 128)),
            ("pre_mlp_layernorm.weight", (hidden,)),
        ]
        if layer < dense_first:
            dense += [("mlp.linear_fc1.weight", (2 * ffn, hidden)), ("mlp.linear_fc2.weight", (hidden, ffn))]
        else:
            dense += [
                ("mlp.router.weight", (experts, hidden)),
                ("mlp.shared_experts.linear_fc1.weight", (2 * expert_ffn, hidden)),
                ("mlp.shared_experts.linear_fc2.weight", (hidden, expert_ffn)),
            ]
        found += [LogicalTensor(name + key, shape, 2, stage) for key, shape in dense]
        if layer >= dense_first:
            found += [
                LogicalTensor(
                    f"{name}mlp.experts.experts.{linear}.weight", shape, 2, stage, expert=True, separate=separate
                )
                for linear, shape in (
                    ("linear_fc1", (experts, 2 * expert_ffn, hidden)),
                    ("linear_fc2", (experts, hidden, expert_ffn)),
                )
            ]
    found.append(LogicalTensor("output_layer.weight", (129280, hidden), 2, pipeline - 1))
    return found


def skewed_copies(experts: int, after: int, rng: random.Random) -> list[int]:
    """Copies per expert under greedy selection with a cap of 3 extra copies, for random scores."""
    copies, left = [1] * experts, after - experts
    for expert in rng.sample(range(experts), experts):
        extra = min(3, left)
        copies[expert] += extra
        left -= extra
    return copies


def _seconds_of_links(
    pairs: dict[tuple[int, int], int], per_node: int, nvlink_gbps: float, network_gbps: float
) -> dict[str, float]:
    """Longest time any rank needs for what it sends or receives, each link class at its bandwidth, one after the other."""
    spent: dict[tuple[int, str], list[float]] = {}
    for (sender, receiver), count in pairs.items():
        inside = sender // per_node == receiver // per_node
        for rank, direction in ((sender, "out"), (receiver, "in")):
            links = spent.setdefault((rank, direction), [0.0, 0.0])
            links[0 if inside else 1] += count / ((nvlink_gbps if inside else network_gbps) * 1e9)
    return {
        "nvlink": max((a for a, _ in spent.values()), default=0.0),
        "network": max((b for _, b in spent.values()), default=0.0),
        "longest": max((a + b for a, b in spent.values()), default=0.0),
    }


def simulate(options: argparse.Namespace, rule: str, placement: str) -> dict[str, Any]:
    """Plan one expansion for the whole cluster."""
    world, small, large = options.ranks, options.experts, options.experts * options.factor
    before = ParallelConfig(pipeline=options.pipeline, expert=options.expert)
    after = ParallelConfig(pipeline=options.pipeline, expert=options.expert_after)
    old_tensors = deepseek_like(options.layers, small, options.pipeline, options.separate)
    new_tensors = deepseek_like(options.layers, large, options.pipeline, options.separate)
    old: dict[int, Holdings] = {r: describe_rank(r, world, before, old_tensors) for r in range(world)}
    new: dict[int, Holdings] = {r: describe_rank(r, world, after, new_tensors) for r in range(world)}
    rng = random.Random(0)
    parents: dict[str, Sequence[int]] = {}
    held = homes(small, before, after, world)
    began = time.perf_counter()
    for layer in range(options.layers):
        copies = [options.factor] * small if rule == "uniform" else skewed_copies(small, large, rng)
        order = place(copies, rule=placement, ep_ranks=after.expert, loads_E=None, homes=held, groups=1, bound=1.25)
        parents[f"layers.{layer}."] = order.parents
    placing = time.perf_counter() - began

    def rows(key: str) -> Sequence[int] | None:
        if ".mlp.experts." not in key and ".mlp.router." not in key:
            return None
        return parents[key[key.index("layers.") : key.index("mlp.")]]

    kinds = told_together(rows, wave_of)
    told = [announce((old[r], new[r]), kinds) for r in range(world)]
    packed = {digest: blob for _, theirs in told for digest, blob in theirs.items()}
    sizes = [{digest: len(blob) for digest, blob in theirs.items()} for _, theirs in told]
    speakers = choose_speakers(sizes)
    loads: collections.Counter[int] = collections.Counter()
    for digest, rank in speakers.items():
        loads[rank] += len(packed[digest])
    # Messages of a collective of objects are as long as the longest of them.
    first = max(len(pickle.dumps(([*digests], s))) for (digests, _), s in zip(told, sizes, strict=True))
    metadata = world * (first + max(loads.values()))
    sample = sorted({0, 1, world // 3, world // 2, world - 1})
    seconds = []
    for rank in sample:
        began = time.perf_counter()
        before_all, after_all = put_together([digests for digests, _ in told], packed)
        plan_rank(rank, before_all, after_all, rows, wave_of, options.ranks_per_node)
        seconds.append(time.perf_counter() - began)
    pairs = traffic(old, new, rows, options.ranks_per_node)
    crossing = sum(n for (a, b), n in pairs.items() if a // options.ranks_per_node != b // options.ranks_per_node)
    state = sum(h.itemsize * box.numel for held in new.values() for h in held.values() for box in h.boxes)
    links = _seconds_of_links(pairs, options.ranks_per_node, options.nvlink_gbps, options.network_gbps)
    parameters = sum(math.prod(t.shape) for t in new_tensors)
    return {
        "rule": rule,
        "placement": placement,
        "place_seconds": placing,
        "parameters_after": parameters,
        "plan_seconds_slowest": max(seconds),
        "metadata_bytes_per_rank": metadata,
        "moved_bytes": sum(pairs.values()),
        "moved_between_nodes": crossing,
        "state_bytes_after": state,
        "pairs": len(pairs),
        "predicted_seconds": links,
    }


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['rule']:8} {result['placement']:5} {result['parameters_after'] / 1e9:,.0f} B parameters after, planning "
        f"{result['plan_seconds_slowest']:.2f} s per rank, metadata {result['metadata_bytes_per_rank'] / 2**20:.1f} MiB, "
        f"moved {result['moved_bytes'] / 2**40:.2f} TiB of {result['state_bytes_after'] / 2**40:.2f} TiB "
        f"({result['moved_between_nodes'] / 2**40:.2f} between nodes), predicted "
        f"{result['predicted_seconds']['longest']:.2f} s"
    )


def main() -> None:
    """Simulate, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--pipeline", type=int, default=8)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--expert", type=int, default=64, help="expert-parallel size before")
    parser.add_argument("--expert-after", type=int, default=128, help="expert-parallel size after")
    parser.add_argument("--separate", action="store_true", help="experts one by one, as Transformer Engine has them")
    parser.add_argument("--nvlink-gbps", type=float, default=300.0, help="GB/s per GPU and direction inside a node")
    parser.add_argument("--network-gbps", type=float, default=40.0, help="GB/s per GPU and direction between nodes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = [simulate(options, rule, placement) for rule in ("uniform", "greedy") for placement in ("near", "auto")]
    for result in results:
        print(_line(result))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process {peak:.2f} GiB (all ranks' descriptions at once)")
    document = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "results": results,
    }
    options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
