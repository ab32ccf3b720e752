"""CUDA graphs of attention as far as they go without a GPU: mcore's own helper on Transformer Engine's own modules.

It finds the layers, makes the inputs of their graphs, and takes whole runs with a switch through capture, replay and end.
In those runs attention is torch's, and in place of a graph stands a call of what a graph would have captured; all of
mcore's code around it is real. What is not shown here is that CUDA can capture it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
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
_GRAPHED = [name for name in te.NETWORKS if name != "mla"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _with_graphs() -> Any:
    from model.performance import PerformanceConfig

    return PerformanceConfig(cuda_graphs="attention")


class _Graph:
    """Stands for a captured graph."""

    def __init__(self) -> None:
        self.over = False

    def reset(self) -> None:
        self.over = True


def _found(network: dict[str, Any]) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from model import build
    from model.config import ModelConfig
    from model.graphs import input_bytes
    from parallel.config import ParallelConfig
    from parallel.graphs import LayerGraphs, _micro_batches
    from parallel.layout import Layout

    layout, model = Layout.create(ParallelConfig(), seed=3), ModelConfig(**(te.SIZES | network))
    with (
        mock.patch.object(build, "experts_kind", return_value="te"),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
    ):
        (chunk,) = build.build_chunks(
            model, 4, layout, vocab_size=64, sequence_length=32, precision="bf16", performance=_with_graphs()
        )
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp, Float16Module(chunk.config, chunk))]
    sizes: dict[str, Any] = dict(sequence_length=32, micro_batch_size=2, micro_batches=4, device=layout.device)
    graphs = LayerGraphs.of(wrapped, chunk.config, None, **sizes)
    helper, layers = graphs._helper, list(chunk.decoder.layers)
    # All layers and nothing else, in order; of each attention with the norm before it.
    assert helper.flattened_callables == layers and helper.num_layers_per_chunk == [2]
    for layer in layers:
        inside = {id(p) for part in layer._get_submodules_under_cudagraphs() for p in part.parameters()}
        assert inside >= {id(p) for p in layer.self_attention.parameters()}
        assert not inside & {id(p) for p in layer.mlp.parameters()}
    with _micro_batches(4):
        samples, options = helper._get_cuda_graph_input_data()
    assert len(samples) == 2 and options["num_warmup_iters"] == 1
    for arguments, named in zip(samples, options["sample_kwargs"], strict=True):
        own = [*arguments, named["attention_mask"]]
        assert sum(t.nbytes for t in own) == input_bytes(model, ParallelConfig(), 32, 2)
    # mcore's own way of running the hooks that wait for weights, and of ending.
    helper._graphs_created = graphs.captured = True
    made = [_Graph() for _ in layers]
    for layer, graph in zip(layers, made, strict=True):
        layer.cuda_graphs = [graph]
    helper.cuda_graph_set_manual_hooks()
    assert all(layer.cuda_graph_manual_hooks for layer in layers)
    assert graphs.drop() == 0
    assert all(graph.over for graph in made)
    assert not any(layer.cuda_graphs or layer.cuda_graph_manual_hooks for layer in layers)


@pytest.mark.parametrize("name", _GRAPHED)
def test_mcore_finds_the_attention_of_every_layer_and_nothing_else(name: str) -> None:
    run_distributed(_found, 1, te.NETWORKS[name])


def _accepted() -> int:
    from model import build
    from model.choices import Situation, choose, resolved
    from model.config import ModelConfig
    from model.performance import PerformanceConfig
    from parallel.config import ParallelConfig
    from parallel.layout import Layout
    from parallel.machine import named_machine

    tried = 0
    layout = Layout.create(ParallelConfig(expert=2), seed=3)
    for dispatcher in ("alltoall", "allgather", "flex"):
        for overlap in (True, False) if dispatcher == "alltoall" else (False,):
            for modules in ([], ["moe"], ["moe_act"], ["shared_experts"], ["mlp"]):
                if overlap and modules == ["shared_experts"]:
                    continue
                more: dict[str, Any] = dict(recompute="selective", recompute_modules=modules) if modules else {}
                at = Situation(
                    model=ModelConfig(**(te.SIZES | te.NETWORKS["gqa"] | more), dispatcher=dispatcher),
                    num_experts=4,
                    performance=PerformanceConfig(cuda_graphs="attention", shared_expert_overlap=overlap),
                    overlap_grad_reduce="auto",
                    overlap_param_gather="auto",
                    sharded=True,
                    parallel=ParallelConfig(expert=2),
                    world_size=2,
                    bf16=True,
                    families=False,
                    documents=False,
                    machine=named_machine("h100", "transformer-engine,deepep", 8),
                )
                model, performance = resolved(at, choose(at))
                with mock.patch.object(build, "uses_engine", return_value=True):
                    config = build.transformer_config(model, 4, layout.config, "bf16", performance=performance)
                scope = getattr(config, "cuda_graph_modules", None) or config.cuda_graph_scope
                assert config.cuda_graph_impl == "transformer_engine" and [part.name for part in scope] == ["attn"]
                assert config.cuda_graph_warmup_steps == 3 and config.moe_token_dispatcher_type == dispatcher
                tried += 1
    return tried


def test_mcore_takes_graphs_of_attention_beside_every_dispatcher_and_recomputation() -> None:
    assert run_distributed(_accepted, 2) == [19, 19]


def _streams() -> None:
    """On CPU there is no generator of a device to clone; any will do for what is asked here."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from transformer_engine.pytorch import distributed as engine

    from parallel.config import ParallelConfig
    from parallel.layout import Layout

    with mock.patch.object(engine, "_get_cuda_rng_state", lambda **options: torch.Generator()):
        layout = Layout.create(ParallelConfig(), seed=3, graphs=True)
        tracker = get_cuda_rng_tracker()
        assert isinstance(tracker, engine.CudaRNGStatesTracker)
        first = {name: state.get_state() for name, state in tracker.get_states().items()}
        layout.seed_streams(4)
        # Attention that is built by now asks the same one.
        assert get_cuda_rng_tracker() is tracker
        assert all(not torch.equal(state.get_state(), first[name]) for name, state in tracker.get_states().items())
        assert len(first) >= 3 and engine.get_all_rng_states().keys() == first.keys()


def test_generators_are_of_the_kind_that_is_replayed() -> None:
    run_distributed(_streams, 1)


def test_growing_segments_are_refused_in_mcores_words() -> None:
    with pytest.raises(Exception, match="NCCL_GRAPH_REGISTER=0"):
        run_distributed(_unprepared, 1)


def _unprepared() -> None:
    os.environ |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "1"}
    _found(te.NETWORKS["gqa"])


# ---- whole runs ------------------------------------------------------------------------------------------------------


class _Replay(_Graph):
    """What a graph would do, done again in Python."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def __call__(self, hidden: torch.Tensor, *, is_first_microbatch: bool, attention_mask: Any, **inputs: Any) -> Any:
        assert not self.over
        self.calls += 1
        for module in self.layer.modules():
            if hasattr(module, "is_first_microbatch"):
                # So it is captured, and so every replay is.
                module.is_first_microbatch = True
        # Transformer Engine's causal attention does not look at the mask; torch's would take it for the whole truth.
        return self.layer._te_cuda_graph_capture(hidden, attention_mask=None, **inputs)


def _replayable(layers: tuple[Any, ...], samples: Any, **options: Any) -> tuple[_Replay, ...]:
    """In place of `make_graphed_callables`: warms every layer up as that does, for every micro-batch, and captures nothing."""
    # Samples lie chunk by chunk, in each micro-batch by micro-batch.
    sizes, micro_batches = options["_num_layers_per_chunk"], len(samples) // len(layers)
    order, first = [], 0
    for size in sizes:
        order += [*range(first, first + size)] * micro_batches
        first += size
    made = []
    for index, arguments in enumerate(samples):
        layer = layers[order[index]]
        assert not layer._forward_hooks and not layer._forward_pre_hooks
        (output,) = layer(*arguments, **options["sample_kwargs"][index])
        weights = list(layer.self_attention.parameters())
        torch.autograd.grad([output], [arguments[0], *weights], [torch.ones_like(output)])
        made.append(_Replay(layer))
    return tuple(made)


@contextlib.contextmanager
def _on_cpu() -> Iterator[list[_Replay]]:
    """Whole runs with mcore's helper, inside; yields what stands for their graphs."""
    from megatron.core.transformer import cuda_graphs

    made: list[_Replay] = []

    def capture(*arguments: Any, **options: Any) -> tuple[_Replay, ...]:
        found = _replayable(*arguments, **options)
        made.extend(found)
        return found

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        # Its generators need a device.
        enter(mock.patch("train.job.wants_graphs", return_value=False))
        enter(mock.patch("model.graphs._obstacle", return_value=None))
        enter(mock.patch.object(cuda_graphs, "make_graphed_callables", capture))
        yield made


def _run(overrides: list[str]) -> list[tuple[int, bool]]:
    """How often each graph of a run was replayed, and whether it was given up."""
    from tests.train.trainer import train_here

    with _on_cpu() as made:
        train_here(overrides)
    return [(replay.calls, replay.over) for replay in made]


_OVERLAP = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]


@pytest.mark.parametrize(
    ("ranks", "layout", "stage", "graphs", "replays"),
    [
        # Two layers, two stages, four micro-batches in each of the two steps that are replayed.
        (1, [], "", 4, 8),
        # Weights on their way while the forward pass runs, and other groups behind the switch.
        (2, _OVERLAP, ", parallel: {expert: 2}", 4, 4),
        # A layer per rank, with a graph for each of four micro-batches.
        (2, ["parallel.pipeline=2"], "", 8, 2),
        # Two chunks of a layer per rank, which take turns.
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layers=4"], "", 16, 2),
        # Half of the sequence per rank.
        (2, ["parallel.tensor=2"], "", 4, 8),
    ],
)
def test_a_run_with_a_switch_is_the_same_bit_for_bit(
    tmp_path: Path, ranks: int, layout: list[str], stage: str, graphs: int, replays: int
) -> None:
    from tests.train.trainer import SMALL, events, metrics, small_corpus

    stages = f"upcycle.stages=[{{at_step: 5, factor: 2, selection: greedy, scoring_batches: 2{stage}}}]"
    common = [*SMALL, "run.steps=10", "run.precision=bf16", "schedule.decay_steps=2", stages, *layout,
              f"data.corpus={small_corpus(tmp_path)}"]  # fmt: skip
    made, losses = {}, {}
    for wish in ("none", "attention"):
        run = tmp_path / wish
        made[wish] = run_distributed(_run, ranks, [*common, f"run.dir={run}", f"performance.cuda_graphs={wish}"])
        losses[wish] = [(n, line["lm_loss"], line["grad_norm"]) for n, line in metrics(run).items()]
    assert made["none"] == [[]] * ranks
    assert made["attention"] == [[(replays, True)] * graphs] * ranks
    assert losses["attention"] == losses["none"] and len(losses["none"]) == 10
    captured = events(tmp_path / "attention", "graphs_captured")
    assert [(e["step"], e["details"]["stage"]) for e in captured] == [(3, 0), (8, 1)]
    assert [e["details"]["graphs"] for e in captured] == [ranks * graphs // 2] * 2


def _rows_of_gpu_check(folder: str) -> list[dict[str, Any]]:
    from benchmarks.gpu import graphs
    from benchmarks.gpu.rows import corpus

    small = graphs._SMALL
    with _on_cpu(), mock.patch("train.job._report"), mock.patch.object(graphs, "_LARGE", small):
        prefix = corpus(Path(folder))
        losses, seconds, events = graphs._run(Path(folder), "without", prefix, small)
        assert not any(events.values())
        return list(graphs._beside(losses, seconds, Path(folder), prefix))


def test_the_rows_of_gpu_check(tmp_path: Path) -> None:
    [rows] = run_distributed(_rows_of_gpu_check, 1, str(tmp_path))
    assert all(row["met"] for row in rows if row["check"])
    found = {row["name"]: row["value"] for row in rows}
    assert found["stages with graphs, and how many"] == "[(0, 2), (1, 2)]"
    assert found["losses with graphs behind a live switch, largest difference to those without"] == 0
    assert found["stage 1: captured in"] > 0


def _back(overrides: list[str]) -> list[bool]:
    from tests.train.test_health import _poisoned

    with _on_cpu() as made:
        _poisoned(overrides, [40, 48], float("nan"))
    return [replay.over for replay in made]


def test_a_run_that_goes_back_drops_its_graphs_and_captures_anew(tmp_path: Path) -> None:
    from tests.train.trainer import SMALL, events, metrics, small_corpus

    common = [*SMALL, "run.steps=10", "run.precision=bf16", "parallel.expert=2", "upcycle.stages=[]",
              "checkpoint.interval_steps=2", "checkpoint.keep_last=9", "health.bad_steps=2", "health.action=rollback",
              f"data.corpus={small_corpus(tmp_path)}"]  # fmt: skip
    losses = {}
    for wish in ("none", "attention"):
        run = tmp_path / wish
        made = run_distributed(_back, 2, [*common, f"run.dir={run}", f"performance.cuda_graphs={wish}"])
        losses[wish] = [(n, line["lm_loss"], line["grad_norm"]) for n, line in metrics(run).items()]
    assert made == [[True] * 4] * 2
    assert losses["attention"] == losses["none"] and len(losses["none"]) == 10
    # Steps 6 and 7 are bad; after the return to the checkpoint of step 4 three more warm up.
    captured, dropped = (events(tmp_path / "attention", name) for name in ("graphs_captured", "graphs_dropped"))
    assert [e["step"] for e in captured] == [3, 7]
    assert [(e["step"], e["details"]["reason"]) for e in dropped] == [(7, "going back"), (10, "the end of the run")]
