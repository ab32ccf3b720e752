"""CUDA graphs: where they are refused, and their life through a run with a switch, with a helper that only writes down.

mcore's own helper, on Transformer Engine's modules and through whole runs: tests/model/test_te_graphs.py.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from launch.footprint import footprint
from launch.plan_inputs import settings_without_corpus
from model.choices import choose
from model.graphs import input_bytes
from parallel.errors import ConfigError, LaunchError
from parallel.graphs import LayerGraphs, prepare_environment
from tests.distributed import free_port, run_distributed
from tests.model.test_choices import _at, _h100
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_here, train_in_turn
from train import random_state
from train.graphs import capture_when_due, wants_graphs
from train.settings import load_settings

_ON = "performance.cuda_graphs=attention"
_BF16 = [_ON, "run.precision=bf16", "data.corpus=none"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.precision=fp32"], "captures inputs in bf16, and the run is fp32: use performance.cuda_graphs=none"),
        (["model.transformer_impl=local"], "model.transformer_impl=local keeps Transformer Engine"),
        (["data.document_attention=true"], "data.document_attention=true tells attention"),
        (["model.attention=mla", "model.kv_heads=null"], "model.attention=mla reads its rotation from a cache"),
        (["model.dropout=0.1"], r"model\.dropout=0\.1 would draw other numbers"),
        (["model.fp8=hybrid"], "model.fp8=hybrid updates scales outside of the graph"),
        (["model.recompute=full"], "model.recompute=full computes attention again: use model.recompute=selective"),
        (["model.recompute=selective"], "has core_attn, which is computed again inside attention: leave it out"),
        (["model.recompute=selective", "model.recompute_modules=[moe_act,layernorm]"], "has layernorm, which"),
        (["+model.mcore.qk_clip=true"], r"model\.mcore\.qk_clip=true does not go with it"),
        (
            ["+model.mcore.cuda_graph_impl=none"],
            r"model\.mcore\.cuda_graph_impl=none: CUDA graphs have a key of their own",
        ),
        (["performance.cuda_graphs=moe"], "performance.cuda_graphs=moe is unknown: use one of none, attention"),
    ],
)
def test_settings_that_no_graph_goes_with_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings([*SMALL, *_BF16, *changes])


def test_sequences_over_ranks_are_refused_in_whichever_stage() -> None:
    later = "upcycle.stages=[{at_step: 4, parallel: {context: 2}}]"
    for layout in (["parallel.context=2", "upcycle.stages=[]"], ["parallel.expert=2", later]):
        with pytest.raises(ConfigError, match="cuda_graphs=attention cannot be here: a context size of 2 sends keys"):
            load_settings([*SMALL, *_BF16, *layout], 2)


def test_what_can_be_is_not_refused_and_what_the_machine_lacks_is() -> None:
    settings = load_settings([*SMALL, *_BF16, "model.recompute=selective", "model.recompute_modules=[moe_act]"])
    # Before a process group or a device.
    with pytest.raises(ConfigError, match=r"cuda_graphs=attention cannot be here: it needs a GPU: use .*=none \(docs"):
        wants_graphs(settings)
    assert not wants_graphs(load_settings([*SMALL, "data.corpus=none"]))
    wish = {"performance": settings.performance}
    (chosen,) = [c for c in choose(_at(_h100(), **wish)) if c.key == "performance.cuda_graphs"]
    assert (chosen.value, chosen.automatic) == ("attention", False) and "after 3 steps" in chosen.why
    with pytest.raises(ConfigError, match="it needs Transformer Engine, whose attention is captured"):
        choose(_at(_h100(""), **wish))
    assert "performance.cuda_graphs" not in {c.key for c in choose(_at(_h100()))}


def test_a_plan_counts_the_inputs_of_graphs() -> None:
    plans = [settings_without_corpus([*SMALL, "run.precision=bf16", *more], 2) for more in ([_ON], [])]
    with_graphs, without = (footprint(settings, 0, 2, 256, flash=True).ranks[0].total for settings in plans)
    model, data = plans[0].model, plans[0].data
    each = input_bytes(model, plans[0].parallel, data.sequence_length, data.micro_batch_size)
    assert each == 2 * 32 * 32 * 2 + 2 * 32 * 32
    assert with_graphs - without == model.layers * each


def test_nccl_registers_nothing_where_segments_grow() -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment = {name: "backend:native,expandable_segments:True"}
        prepare_environment(environment)
        assert environment["NCCL_GRAPH_REGISTER"] == "0"
        with pytest.raises(ConfigError, match=rf"NCCL_GRAPH_REGISTER=1 and {name}=.*: leave NCCL_GRAPH_REGISTER out"):
            prepare_environment(environment | {"NCCL_GRAPH_REGISTER": "1"})
    fixed = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    prepare_environment(fixed)
    assert "NCCL_GRAPH_REGISTER" not in fixed


class _Helper:
    """Writes down what is asked of mcore's helper; `fails` is raised instead of a capture."""

    def __init__(self, layers: list[Any], said: list[str], fails: Exception | None = None) -> None:
        self.flattened_callables, self._said, self._fails = layers, said, fails

    def create_cudagraphs(self) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        if self._fails is not None:
            raise self._fails
        self._said.append(f"capture of {get_num_microbatches()}")
        for layer in self.flattened_callables:
            layer.cuda_graphs = ["one"]

    def cuda_graph_set_manual_hooks(self) -> None:
        self._said.append("manual hooks")

    def delete_cuda_graphs(self) -> None:
        self._said.append("delete")
        for layer in self.flattened_callables:
            layer.cuda_graphs = []


def _chunk(said: list[str], *, overlap: bool) -> Any:
    return SimpleNamespace(
        ddp_config=SimpleNamespace(overlap_param_gather=overlap),
        disable_forward_pre_hook=lambda param_sync: said.append(f"hooks off, sync {param_sync}"),
        enable_forward_pre_hook=lambda: said.append("hooks on"),
    )


def _graphs(said: list[str], *, overlap: bool = False, fails: Exception | None = None, steps: int = 2) -> LayerGraphs:
    helper = _Helper([SimpleNamespace(cuda_graphs=[]), SimpleNamespace(cuda_graphs=[])], said, fails)
    return LayerGraphs(
        helper, [_chunk(said, overlap=overlap)], micro_batches=4, device=torch.device("cpu"), warmup_steps=steps
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_one_capture_after_the_warm_up_with_the_hooks_of_gathering_out_of_the_way(overlap: bool) -> None:
    said: list[str] = []
    graphs = _graphs(said, overlap=overlap)
    assert [graphs.due() for _ in range(4)] == [False, False, True, False]
    assert graphs.drop() is None
    assert graphs.capture().graphs == 2 and graphs.captured
    around = ["hooks off, sync False", "capture of 4", "hooks on", "manual hooks"]
    assert said == (around if overlap else ["capture of 4"])
    assert graphs.drop() == 0 and graphs.drop() is None
    graphs.abandon()
    assert said[-1] == "delete" and said.count("delete") == 1 and not graphs.due()


def test_a_capture_that_fails_is_told_by_the_rank_that_knows() -> None:
    from train.watchdog import Watchdog

    def run(fails: Exception) -> Any:
        return SimpleNamespace(
            stage=SimpleNamespace(graphs=_graphs([], fails=fails, steps=0)),
            layout=SimpleNamespace(rank=3),
            watchdog=Watchdog(),
            persistence=SimpleNamespace(settle=lambda: None),
        )

    failing = run(RuntimeError("operation not permitted when stream is capturing\nmore"))
    with pytest.raises(
        LaunchError, match=r"rank 3 could not capture .* \(RuntimeError: operation not permitted when .* capturing\)"
    ) as e:
        capture_when_due(failing)
    assert e.value.speaks and "performance.cuda_graphs=none" in str(e.value)
    # What torch says when a capture that has failed is ended says nothing of why it did; nor need it be torch that fails.
    ended = RuntimeError("capture was invalidated")
    ended.__context__ = TypeError("make_graphed_callables() got an unexpected keyword argument")
    for error in (ended, TypeError("make_graphed_callables() got an unexpected keyword argument")):
        with pytest.raises(
            LaunchError, match=r"\(TypeError: make_graphed_callables\(\) got an .*=none; the run goes on"
        ):
            capture_when_due(run(error))
    # As in a step: whoever explains a full device finds what it was at.
    full = run(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        capture_when_due(full)
    assert full.watchdog.doing == "capturing CUDA graphs (performance.cuda_graphs=none needs none)"


# `python -c` it with a rank and overrides: a run whose capture fails on that rank, between the two barriers of mcore 0.16's.
_FAILING = """
import os, sys
from tests.train import test_graphs
sys.exit(test_graphs.main_with_a_capture_that_fails(int(sys.argv[1]), sys.argv[2:]))
"""


def main_with_a_capture_that_fails(rank: int, overrides: list[str]) -> int:
    """`python -m train` in one of two processes, with a helper that only meets the other rank."""
    import torch.distributed as dist

    from parallel import graphs
    from train.__main__ import main

    def helper(wrapped: list[Any], *arguments: Any) -> _Helper:
        made = _Helper([layer for chunk in wrapped for layer in chunk.module.module.decoder.layers], [])

        def capture() -> None:
            dist.barrier()
            if dist.get_rank() == rank:
                raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
            dist.barrier()

        made.create_cudagraphs = capture  # type: ignore[method-assign]
        return made

    sys.argv = ["train", *overrides]
    with (
        mock.patch.object(graphs, "_mcore_helper", helper),
        mock.patch("train.job.wants_graphs", return_value=False),
        mock.patch("model.graphs._obstacle", return_value=None),
    ):
        return main()


@pytest.mark.slow
def test_a_capture_that_fails_on_one_rank_ends_the_run_on_all_and_the_next_start_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*SMALL, "run.precision=bf16", "parallel.expert=2", "upcycle.stages=[]", "checkpoint.interval_steps=2",
                 "health.hang_seconds=10", f"data.corpus={small_corpus(tmp_path)}", f"run.dir={run_dir}"]  # fmt: skip
    job = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
           "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, "-c", _FAILING, "1", *overrides, _ON], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, env={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [6, 6], said
    why = "rank 1 could not capture CUDA graphs of attention (AcceleratorError: CUDA error: operation not permitted"
    # The one that knows says it; the other one, which waited, is ended with its words.
    assert all(f"{why} when stream is capturing): use performance.cuda_graphs=none" in words for words in said), said
    run_distributed(train_in_turn, 2, [overrides])
    assert [e["step"] for e in events(run_dir, "resume")] == [2] and max(metrics(run_dir)) == 6


def test_generators_of_graphs_keep_their_identity_when_states_come_back() -> None:
    generators = {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(("dense", "expert"))}
    tracker = SimpleNamespace(get_states=lambda: dict(generators), set_states=mock.Mock())
    with mock.patch("train.random_state.get_cuda_rng_tracker", return_value=tracker):
        state = random_state.capture()
        assert all(isinstance(value, torch.Tensor) for value in state["tracker"].values())
        first = [torch.rand(3, generator=g) for g in generators.values()]
        random_state.restore(state)
    assert not tracker.set_states.called
    assert all(torch.equal(a, torch.rand(3, generator=g)) for a, g in zip(first, generators.values(), strict=True))


def _whole_run(overrides: list[str]) -> list[str]:
    from parallel import graphs
    from train.stage import Stage

    said: list[str] = []

    def helper(wrapped: list[Any], config: Any, length: int, micro_batch: int, optimizers: list[Any]) -> _Helper:
        assert (config.cuda_graph_impl, config.cuda_graph_warmup_steps, length, micro_batch) == (
            "transformer_engine",
            3,
            32,
            2,
        )
        layers = [layer for chunk in wrapped for layer in chunk.module.module.decoder.layers]
        made = _Helper(layers, said)
        made.create_cudagraphs = lambda: _capture(layers, said)  # type: ignore[method-assign]
        return made

    def released(stage: Stage) -> None:
        said.append(f"release of stage {stage.number}")
        release(stage)

    release = Stage.release
    with (
        mock.patch.object(graphs, "_mcore_helper", helper),
        mock.patch.object(Stage, "release", released),
        mock.patch("train.job.wants_graphs", return_value=False),
        mock.patch("model.graphs._obstacle", return_value=None),
    ):
        train_here(overrides)
    return said


def _capture(layers: list[Any], said: list[str]) -> None:
    """Nothing of ours may listen inside what a replay passes over. Without graphs the layers compute as ever."""
    inside = [module for layer in layers for module in (layer, *layer.self_attention.modules())]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in inside)
    said.append("capture")


def test_graphs_go_before_the_stage_does_and_come_again_behind_a_switch(tmp_path: Path) -> None:
    stages = "upcycle.stages=[{at_step: 4, factor: 2}]"
    overrides = [*SMALL, _ON, "run.precision=bf16", "run.steps=8", stages, f"data.corpus={small_corpus(tmp_path)}"]
    [said] = run_distributed(_whole_run, 1, [*overrides, f"run.dir={tmp_path / 'run'}"])
    assert said == ["capture", "delete", "release of stage 0", "capture", "delete"]
    assert len(metrics(tmp_path / "run")) == 8
    captured, dropped = (events(tmp_path / "run", name) for name in ("graphs_captured", "graphs_dropped"))
    assert [(e["step"], e["details"]["stage"]) for e in captured] == [(3, 0), (7, 1)]
    assert [(e["step"], e["details"]["reason"]) for e in dropped] == [(4, "the switch"), (8, "the end of the run")]
