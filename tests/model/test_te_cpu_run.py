"""A run on a machine that has Transformer Engine and no GPU: mcore would take its Adam, which cannot step there."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_here

pytestmark = [
    pytest.mark.requires_te,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


_MLA = ["model.attention=mla", "model.kv_heads=null", "model.mla_query_rank=16", "model.mla_kv_rank=16",
        "model.mla_head_dim=8", "model.mla_rope_head_dim=8", "model.mla_value_head_dim=8"]  # fmt: skip
# What asks Transformer Engine for something on the way through a step.
RUNS = {
    "as it is": [],
    "on every rank": ["optimizer.distributed=false"],
    "parts again": ["model.recompute=selective", "model.recompute_modules=[layernorm,core_attn,moe_act]"],
    "layers again, sequential": ["model.recompute=full", "model.experts=sequential"],
    "mla": [*_MLA, "model.recompute=selective", "model.recompute_modules=[mla_up_proj]"],
    "fp32": ["run.precision=fp32", "optimizer.distributed=false", "model.aux_loss_coeff=0.01"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_a_gpu_trains_and_grows_with_torchs_adam(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here = [*SMALL, *RUNS[name], f"data.corpus={small_corpus(tmp_path)}", f"run.dir={tmp_path / 'run'}"]
    run_distributed(train_here, 1, here, init=False)
    [start] = events(tmp_path / "run", "start")
    assert start["details"]["optimizer"] == "AdamW of torch, fused"
    assert "optimizer: AdamW of torch, fused" in capfd.readouterr().out
    steps = metrics(tmp_path / "run")
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert all(step["grad_norm"] > 0 for step in steps.values())
    assert steps[6]["lm_loss"] < steps[1]["lm_loss"]
