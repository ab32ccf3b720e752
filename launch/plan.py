"""Says what a run would need before it is started: parameters, memory per rank, traffic at switches, checkpoints, FLOPs.

`python -m launch plan --processes 1024 --gpu-memory-gib 80 model=deepseek_v3 ...` takes the settings of a run and needs
neither GPU nor cluster nor corpus. All of it is arithmetic (`model/network.py`, `launch/footprint.py`) and the planner of
the live switch (`launch/moves.py`); formulas and sources are in docs/planning.md. What it prints is laid out in
`plan_tables.py`.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

from launch.footprint import SWITCH_BOUND, Footprint, checkpoint_bytes, footprint, switch_memory
from launch.moves import Links, Traffic, switch_traffic
from launch.plan_hints import first_of_pipeline, hints
from launch.plan_inputs import attention_is_flash, data_table, settings_without_corpus, vocabulary
from launch.plan_tables import as_text, spans
from model.choices import Choice
from model.config import padded_vocab_size
from model.network import count, flops_per_token
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from parallel.machine import GPU_KINDS, LIBRARIES, Machine, named_machine
from train.acceleration import accelerated, routes_in_families
from train.config import RunSettings

GIB = 2**30
_LOW_ACTIVATION = (
    "activation falls from {before:.1%} to {after:.1%} of the experts: reasoning can stand still or get worse at low "
    "activation while the loss still falls (arXiv 2508.18672): evaluate reasoning tasks, not only the loss"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m launch plan`."""
    # No abbreviations: --gpu-memory would pass for --gpu-memory-gib, whatever unit was meant.
    parser.allow_abbrev = False
    parser.add_argument("--processes", type=int, required=True, help="processes of the run (one per GPU)")
    parser.add_argument("--gpu-memory-gib", help="memory of a GPU in GiB: what does not fit is named, with what would")
    parser.add_argument(
        "--gpu", help=f"kind of GPU ({', '.join(GPU_KINDS)}): says what makes a step fast there and why, and its memory"
    )
    parser.add_argument(
        "--installed",
        default="transformer-engine",
        help=f"with --gpu: what is installed there, of {', '.join(LIBRARIES)} (transformer-engine)",
    )
    parser.add_argument("--vocab-size", type=int, help="tokens of the tokenizer; by default the corpus says")
    parser.add_argument("--link-gb-per-s", default="40", help="GB/s per rank and direction between nodes (40)")
    parser.add_argument("--node-gb-per-s", default="300", help="GB/s per rank and direction inside a node (300)")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="processes per node (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("overrides", nargs="*", help="settings, as for `python -m train`")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `python -m launch plan`."""
    links = Links(
        network=_number("--link-gb-per-s", arguments.link_gb_per_s),
        node=_number("--node-gb-per-s", arguments.node_gb_per_s),
        ranks_per_node=arguments.ranks_per_node,
    )
    memory = None
    if arguments.gpu_memory_gib is not None:
        memory = _number("--gpu-memory-gib", arguments.gpu_memory_gib)
    for name in ("processes", "ranks_per_node", "vocab_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be 1 or more")
    machine = None
    if arguments.gpu is not None:
        machine = named_machine(arguments.gpu, arguments.installed, arguments.ranks_per_node)
        memory = memory or float(GPU_KINDS[arguments.gpu.upper()][1])
    settings = settings_without_corpus(arguments.overrides, arguments.processes)
    document = make_plan(settings, arguments.processes, arguments.vocab_size, memory, links, machine)
    print(json.dumps(document, indent=1) if arguments.json else "\n".join(as_text(document)))
    return 0


def _number(option: str, text: str) -> float:
    """A number above zero.

    Raises:
        ConfigError: naming the option and the value.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{option}={text} must be a number above zero")
    return value


def make_plan(
    settings: RunSettings,
    processes: int,
    vocab_size: int | None,
    gpu_memory_gib: float | None,
    links: Links,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Everything that the command prints, as one JSON-able document.

    Args:
        settings: of the run, every stage with its step.
        processes: of the run.
        vocab_size: tokens of the tokenizer; None asks the corpus.
        gpu_memory_gib: memory of a GPU; None if it is not to be judged.
        links: bandwidths for the predicted pause.
        machine: what the run is made for; None leaves open what makes a step fast.

    Raises:
        CoppiceError: naming the key, the value and the remedy.
    """
    vocab, says = vocabulary(settings, vocab_size)
    engine = machine.has("transformer-engine") if machine else gpu_memory_gib is not None
    flash = attention_is_flash(settings, engine)
    number = len(settings.upcycle.stages) + 1
    # What is decided for a machine lays memory out (buckets of gradients), a little.
    at = [_decided(settings, i, machine, processes) for i in range(number)]
    prints = [footprint(at[i][0], i, processes, vocab, flash=flash) for i in range(number)]
    stages = [
        _stage(settings, i, processes, prints[i]) | {"choices": [asdict(choice) for choice in at[i][1]]}
        for i in range(number)
    ]
    switches = [
        _switch(at[i][0], i, processes, vocab, prints[i - 1], prints[i], links, stages[i - 1], stages[i])
        for i in range(1, number)
    ]
    needed = max([s["memory"]["largest"]["total"] for s in stages] + [s["peak_bytes"] for s in switches])
    tokens = settings.tokens_per_step()
    document: dict[str, Any] = {
        "processes": processes,
        "vocabulary": {"size": vocab, "padded": padded_vocab_size(settings.model, vocab), "from": says},
        "tokens_per_step": tokens,
        "steps": settings.run.steps,
        "data": data_table(settings, needed=vocab_size is None),
        "tokens": tokens * settings.run.steps,
        "flops": sum(s["flops"] for s in stages),
        "gpu": machine.gpu if machine else None,
        "installed": sorted(machine.libraries) if machine else None,
        "stages": stages,
        "switches": switches,
        "links": asdict(links),
        "assumptions": _assumptions(settings, flash),
        "warnings": [s["warning"] for s in switches if s["warning"]],
        "needed_bytes": needed,
        "gpu_memory_bytes": None if gpu_memory_gib is None else round(gpu_memory_gib * GIB),
        "fits": None,
        "hints": [],
    }
    if gpu_memory_gib is not None:
        limit = round(gpu_memory_gib * GIB)
        document["fits"] = needed <= limit
        if needed > limit:
            staging = max((s["staging_bytes"] for s in switches), default=0)
            document["hints"] = list(hints(settings, processes, vocab, flash, limit, staging))
    return document


def _decided(
    settings: RunSettings, number: int, machine: Machine | None, processes: int
) -> tuple[RunSettings, tuple[Choice, ...]]:
    """The settings of a stage with what is decided for a machine; as they are where none is named."""
    if machine is None:
        return settings, ()
    families = routes_in_families(settings, number)
    experts = settings.experts_of(number)
    return accelerated(settings, experts, settings.parallel_of(number), machine, processes, families=families)


def _assumptions(settings: RunSettings, flash: bool) -> list[str]:
    kind = "no scores are kept (Transformer Engine)" if flash else "scores are kept (mcore's plain attention)"
    found = [
        f"activations are an estimate (docs/planning.md), tokens even over experts; attention: {kind}",
        "not counted: the CUDA context, NCCL's and kernels' buffers, gaps of the allocator",
        "the run starts anew and takes the configured stages; no operator's request, no return by the guard",
    ]
    if settings.model.mcore:
        found.append(f"not looked at: model.mcore={settings.model.mcore}")
    return found


def _stage(settings: RunSettings, number: int, processes: int, prints: Footprint) -> dict[str, Any]:
    model, upcycle = settings.model, settings.upcycle
    experts = upcycle.expert_counts(model.num_experts)[number]
    parallel = settings.parallel_of(number)
    counts = count(model, experts, prints.chunks)
    begins = upcycle.stages[number - 1].at_step if number else 0
    ends = upcycle.stages[number].at_step if number < len(upcycle.stages) else settings.run.steps
    tokens = (ends - begins) * settings.tokens_per_step()
    per_token = flops_per_token(model, experts, prints.chunks, settings.data.sequence_length)
    data = settings.data
    return {
        "number": number,
        "first_step": begins + 1,
        "last_step": ends,
        "layout": parallel.describe(processes),
        "accumulation": data.global_batch_size // (data.micro_batch_size * parallel.data(processes)),
        "experts": experts,
        "top_k": model.top_k if experts else None,
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "parameters_experts": counts.experts,
        "active_share": counts.active / counts.total,
        "experts_active_share": model.top_k / experts if experts else None,
        "tokens": tokens,
        "tokens_per_parameter": tokens / counts.total,
        "flops_per_token": per_token,
        "flops": per_token * tokens,
        "checkpoint_bytes": checkpoint_bytes(counts.total, settings.run.precision),
        "memory": {
            "largest_rank": prints.largest,
            "largest": _memory(prints, prints.largest),
            "smallest_rank": prints.smallest,
            "smallest": _memory(prints, prints.smallest),
            "by_pipeline_rank": [_memory(prints, rank) for rank in first_of_pipeline(parallel, processes)],
            "totals": [m.total for m in prints.ranks],
        },
        "experts_by_rank": _expert_table(prints, parallel, experts),
    }


def _memory(prints: Footprint, rank: int) -> dict[str, int]:
    memory = prints.ranks[rank]
    return {**asdict(memory), "total": memory.total}


def _expert_table(prints: Footprint, parallel: ParallelConfig, experts: int) -> list[dict[str, Any]]:
    """Per expert-parallel rank: the ids it holds of every MoE layer on its pipeline rank, and the ranks that stand there."""
    if not experts:
        return []
    share = experts // parallel.expert
    ranks: list[list[int]] = [[] for _ in range(parallel.expert)]
    for rank, at in enumerate(prints.places):
        ranks[at.expert].append(rank)
    return [
        {"expert_rank": i, "first": i * share, "last": (i + 1) * share - 1, "ranks": spans(held)}
        for i, held in enumerate(ranks)
    ]


def _switch(
    settings: RunSettings,
    number: int,
    processes: int,
    vocab: int,
    before: Footprint,
    after: Footprint,
    links: Links,
    old: dict[str, Any],
    new: dict[str, Any],
) -> dict[str, Any]:
    options = settings.upcycle
    moves = switch_traffic(settings, number, processes, vocab, links.ranks_per_node)
    # Messages in flight stay within the chunk, and there is no more of them than there is to move.
    staging = sum(min(options.transfer_chunk_mib * 2**20, n) for n in moves.largest_by_rank())
    memory = switch_memory(before, after, options.path, staging, offload=options.offload)
    shares = (old["experts_active_share"], new["experts_active_share"])
    falls = shares[0] is not None and shares[1] < shares[0]
    return {
        "after_step": options.stages[number - 1].at_step,
        "path": options.path,
        "experts": [old["experts"], new["experts"]],
        "warning": _LOW_ACTIVATION.format(before=shares[0], after=shares[1]) if falls else None,
        "peak_rank": memory.rank,
        "peak_bytes": memory.peak,
        "staging_bytes": staging,
        "host_bytes": max(m.weights + m.masters + m.moments for m in before.ranks) if options.offload else 0,
        "peak_bound_bytes": round(SWITCH_BOUND * memory.steady),
        "saves": [old["checkpoint_bytes"]] * (options.save_before or options.path == "checkpoint")
        + [new["checkpoint_bytes"]] * (options.save_after or options.path == "checkpoint"),
        **_traffic(moves, links),
    }


def _traffic(moves: Traffic, links: Links) -> dict[str, Any]:
    sent, received = moves.largest_by_rank()
    return {
        "moved_bytes": moves.moved,
        "moved_between_nodes_bytes": moves.between_nodes(links.ranks_per_node),
        "largest_sent_bytes": sent,
        "largest_received_bytes": received,
        "pairs": len(moves.pairs),
        "busiest": [{"from": a, "to": b, "bytes": n} for (a, b), n in moves.busiest(8)],
        "predicted_seconds": moves.seconds(links),
        "notes": moves.note,
    }
