"""Whole runs on simulated GPUs: devices, waits and memory of the code that no machine without a GPU runs otherwise."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.simulated_gpu.launch import RankOnGpu, run_on_gpus
from tests.simulated_gpu.library import can_compile
from tests.train.trainer import SMALL, metrics, small_corpus, train_in_turn

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs g++ and a torch without CUDA")

# Large enough that weights and not activations fill the device.
_WIDE = ["model.hidden_size=256", "model.expert_ffn_hidden_size=512", "model.ffn_hidden_size=512"]
# The host waits at these places of a step and no others, whatever the model: twice after it, once per dispatch of tokens.
_WAITS = {
    "item: train/step.py optimizer_step < train/run.py _one_step",
    "item: megatron/core/optimizer/clip_grads.py get_grad_norm_fp32 < megatron/core/optimizer/optimizer.py get_grad_norm",
}


def _run(folder: Path, *overrides: str, processes: int = 1, limit: int = 0) -> list[RankOnGpu]:
    settings = [*SMALL, f"data.corpus={small_corpus(folder)}", f"run.dir={folder / 'run'}", *overrides]
    return run_on_gpus(settings, folder, processes, limit=limit)


def _losses(run_dir: Path) -> list[float]:
    return [line["lm_loss"] for line in metrics(run_dir).values()]


def test_a_run_grows_waits_where_it_must_and_holds_nothing_twice(tmp_path: Path) -> None:
    [rank] = _run(tmp_path, *_WIDE)
    assert rank.reason == "finished"
    own = {place for place in rank.waits_in_steps if "token_dispatcher.py" not in place and "moe_utils.py" not in place}
    assert own == _WAITS
    assert all(rank.waits_in_steps[place] == 6 for place in own)
    # The goal of the live switch is at most a tenth above this; it has no activations, and gradients when all else is done.
    assert rank.switch_peaks[0] <= max(rank.step_peaks[3:])
    # Stages leave nothing behind.
    assert len(set(rank.held[:3])) == len(set(rank.held[3:])) == 1
    here = [*SMALL, *_WIDE, f"data.corpus={small_corpus(tmp_path)}", f"run.dir={tmp_path / 'cpu'}"]
    assert run_distributed(train_in_turn, 1, [here]) == [["finished"]]
    assert _losses(tmp_path / "run") == pytest.approx(_losses(tmp_path / "cpu"), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ["run.precision=fp32", "model.experts=sequential"]),
        (1, ["model.recompute=selective", "model.recompute_modules=[moe_act,layernorm]"]),
        (1, ["model.recompute=full"]),
        (1, ["model.attention=mla", "model.kv_heads=null", "model.head_dim=null", "model.mla_kv_rank=16",
             "model.mla_head_dim=16", "model.mla_rope_head_dim=8", "model.mla_value_head_dim=16"]),
        (1, ["upcycle.stages=[{at_step: 3, factor: 2, mode: exact}]", "model.shared_expert_ffn_hidden_size=32", "model.shared_expert_gate=true"]),
        (1, ["data.document_attention=true", "model.balancing=aux_loss",
             "upcycle.stages=[{at_step: 3, factor: 2, mode: exact}]"]),
        (2, ["parallel.expert=2", "upcycle.offload=true"]),
        (2, ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]),
        (2, ["parallel.tensor=2", "optimizer.distributed=false"]),
        (2, ["parallel.pipeline=2", "model.tie_embeddings=true"]),
    ],
    ids=lambda value: value if isinstance(value, int) else value[0],
)  # fmt: skip
def test_every_layout_and_kind_of_network(processes: int, overrides: list[str], tmp_path: Path) -> None:
    ranks = _run(tmp_path, *overrides, processes=processes)
    assert [rank.reason for rank in ranks] == ["finished"] * processes
    for rank in ranks:
        assert not any(place.split(": ")[1].startswith("model/") for place in rank.waits_in_steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, []),
        (2, ["model.experts=sequential", "data.document_attention=true"]),
        (2, ["model.layers=3", "model.dense_first=1", "model.balancing=aux_loss", "model.shared_expert_ffn_hidden_size=32",
             "upcycle.stages=[{at_step: 3, factor: 2, mode: exact}]"]),
        (2, ["model.recompute=selective", "model.recompute_modules=[moe_act,layernorm,shared_experts,core_attn]",
             "model.shared_expert_ffn_hidden_size=32"]),
        (2, ["parallel.tensor=2", "parallel.expert_tensor=1"]),
        (2, ["parallel.expert=1", "upcycle.stages=[{at_step: 3, factor: 2, parallel: {expert: 2}}]"]),
        (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layers=4", "data.global_batch_size=16"]),
    ],
    ids=lambda value: value if isinstance(value, int) else (value or ["plain"])[0],
)  # fmt: skip
def test_micro_batches_woven_together_change_nothing_that_is_trained(
    processes: int, overrides: list[str], tmp_path: Path
) -> None:
    told, peaks = [], []
    for woven in ("false", "true"):
        (folder := tmp_path / woven).mkdir()
        settings = ["parallel.expert=2", *overrides, f"performance.expert_parallel_overlap={woven}"]
        ranks = _run(folder, *settings, processes=processes)
        assert [rank.reason for rank in ranks] == ["finished"] * processes
        told.append([(line["lm_loss"], line["grad_norm"]) for line in metrics(folder / "run").values()])
        peaks.append(ranks[0].step_peaks[-1])
    # With shared experts a gradient of three parts is summed in another order.
    shared = any("shared" in override for override in overrides)
    assert told[0] == ([pytest.approx(line, rel=2e-3) for line in told[1]] if shared else told[1])
    # More of two micro-batches is there at once: it was not left out.
    assert peaks[1] > peaks[0]


@pytest.mark.slow
def test_the_live_switch_is_the_checkpoint_path(tmp_path: Path) -> None:
    losses = []
    for number, way in enumerate(([], ["upcycle.offload=true"], ["upcycle.path=checkpoint"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        ranks = _run(folder, "parallel.expert=2", *way, processes=2)
        assert [rank.reason for rank in ranks] == ["finished"] * 2
        losses.append(_losses(folder / "run"))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mebibytes", "act"), [(165, "building the next stage ran out of memory"), (200, "in the switch (verify)")]
)
def test_a_device_too_small_for_the_larger_stage_is_explained_and_nothing_is_lost(
    mebibytes: int, act: str, tmp_path: Path
) -> None:
    [rank] = _run(tmp_path, *_WIDE, limit=mebibytes << 20)
    assert act in rank.reason and "ran out of memory" in rank.reason and "parallel.expert" in rank.reason
    assert len(_losses(tmp_path / "run")) == 3
    [again] = _run(tmp_path, *_WIDE)
    assert again.reason == "finished"
    assert len(_losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_a_device_too_small_for_a_step_is_explained(tmp_path: Path) -> None:
    [rank] = _run(tmp_path, *_WIDE, limit=120 << 20)
    assert "ran out of memory in step 2" in rank.reason and "data.micro_batch_size" in rank.reason
