"""Whole runs on Transformer Engine's layers, with stand-ins for its kernels (`te_kernels.py`): what a run on GPUs decides by itself.

Of that its fused router, permutation and rotation are left out, whose kernels have no stand-in, and its Adam, which has tests
of its own.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed

pytestmark = [
    pytest.mark.requires_te,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]
_NO_STAND_IN = [
    f"performance.{name}=false" for name in ("permute_fusion", "router_fusion", "rope_fusion", "cross_entropy_fusion")
]
_OVERLAP = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _run(overrides: list[str], graphs: bool) -> list[tuple[int, bool]]:
    """How often each graph was replayed, and whether it was given up."""
    from model import build
    from parallel.machine import named_machine
    from tests.model.te_kernels import its_layers_run
    from tests.model.test_te_graphs import _on_cpu
    from tests.train.trainer import train_here

    build_chunks = build.build_chunks

    def on_a_gpu(*arguments: Any, **options: Any) -> Any:
        # Its constructors ask for one.
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            return build_chunks(*arguments, **options)

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(its_layers_run())
        enter(mock.patch.object(build, "uses_engine", return_value=True))
        enter(mock.patch("train.stage.build_chunks", on_a_gpu))
        # What this machine could build is not asked; what a Hopper card can is decided.
        enter(mock.patch("train.job.refuse_unbuildable"))
        enter(mock.patch("parallel.layout.this_machine", lambda *_: named_machine("h100", "transformer-engine", 2)))
        made = enter(_on_cpu()) if graphs else []
        train_here(overrides)
    return [(replay.calls, replay.over) for replay in made]


@pytest.mark.parametrize(
    ("ranks", "overrides", "stage"),
    [
        (2, [*_OVERLAP, "checkpoint.interval_steps=2"], ", parallel: {expert: 2}"),
        (1, ["model.experts=te", "model.recompute=full"], ""),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layers=4", "model.experts=te"], ""),
        (2, ["parallel.pipeline=2", "model.tie_embeddings=true", "upcycle.path=checkpoint"], ""),
        (2, ["parallel.tensor=2", "parallel.expert=2", "model.experts=te", "model.shared_expert_ffn_hidden_size=32",
             *_OVERLAP], ", mode: exact"),
        (1, ["optimizer.distributed=false", "model.recompute=selective", "model.recompute_modules=[moe_act]"], ""),
    ],
    ids=lambda value: value if isinstance(value, int) else None,
)  # fmt: skip
def test_a_run_grows_with_gradients_added_in_products_and_in_graphs(
    tmp_path: Path, ranks: int, overrides: list[str], stage: str
) -> None:
    from tests.train.trainer import SMALL, events, metrics, small_corpus

    stages = f"upcycle.stages=[{{at_step: 5, factor: 2, selection: greedy, scoring_batches: 2{stage}}}]"
    common = [*SMALL, "run.steps=9", "run.precision=bf16", "schedule.decay_steps=2", stages, *_NO_STAND_IN, *overrides,
              f"data.corpus={small_corpus(tmp_path)}"]  # fmt: skip
    apart = "performance.gradient_accumulation_fusion=false"
    ways = {"apart": [apart], "added": [], "graphs": ["performance.cuda_graphs=attention"]}
    if "model.recompute=full" in overrides:
        # It is refused beside graphs.
        del ways["graphs"]
    losses: dict[str, list[float]] = {}
    for way, more in ways.items():
        made = run_distributed(_run, ranks, [*common, *more, f"run.dir={tmp_path / way}"], way == "graphs")
        assert all(replays and over for of_rank in made for replays, over in of_rank)
        assert all(made) == (way == "graphs")
        losses[way] = [line["lm_loss"] for line in metrics(tmp_path / way).values()]
        [start] = events(tmp_path / way, "start")
        assert start["details"]["choices"][apart.split("=")[0]] == (way != "apart")
        assert start["details"]["choices"]["model.transformer_impl"] == "transformer_engine"
    # Gradients rounded to bf16 or not, over nine steps that take the loss from 5.96 to 5.65.
    assert losses["added"] == pytest.approx(losses["apart"], abs=2e-3) and len(losses["added"]) == 9
    assert losses.get("graphs", losses["added"]) == losses["added"]
