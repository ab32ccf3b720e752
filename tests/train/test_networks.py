"""Every kind of network a preset describes trains and grows, shrunk to a size a CPU likes; several expansions in a row."""

import json
from pathlib import Path

import pytest

from parallel.errors import CheckpointError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, reseal, small_corpus, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.report import write_report

_SHRUNK = [
    "model.layers=4", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.attention_heads=4",
    "model.expert_ffn_hidden_size=32", "model.num_experts=8", "model.top_k=2",
]  # fmt: skip
_GROW = "upcycle.stages=[{at_step: 2, factor: 2, selection: greedy, scoring_batches: 1}]"
_STAY = "upcycle.stages=[]"
_NETWORKS = {
    # Shared expert, leading dense layers, MLA, group-limited sigmoid routing.
    "deepseek_v3": [
        "model.mla_query_rank=16", "model.mla_kv_rank=16", "model.mla_head_dim=8", "model.mla_rope_head_dim=8",
        "model.mla_value_head_dim=8", "model.shared_expert_ffn_hidden_size=32", "model.router_groups=2",
        "model.router_group_topk=1", "model.dense_first=2", "model.kv_heads=null", _GROW,
    ],
    "qwen3_30b_a3b": ["model.kv_heads=2", "model.head_dim=16", _STAY],
    "mixtral_8x7b": ["model.kv_heads=2", _STAY],
    # Interleaved dense and MoE layers.
    "paper_7b": ["model.kv_heads=4", _GROW],
    "paper_154m": ["model.kv_heads=4", _GROW],
    "tiny": [
        "model.tie_embeddings=true", "model.qk_norm=true", "model.linear_bias=true", "model.normalization=LayerNorm",
        "model.activation=gelu", "model.dispatcher=allgather", "model.experts=sequential", _GROW,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


# Plain presets, whose parts the others have too.
_SLOW = ("mixtral_8x7b", "paper_154m")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in _NETWORKS])
def test_network_trains_grows_and_resumes(name: str, corpus: Path, tmp_path: Path) -> None:
    base = [*SMALL, f"model={name}", *_SHRUNK, *_NETWORKS[name], "run.steps=4", f"data.corpus={corpus}",
            "parallel.expert=2", f"run.dir={tmp_path}"]  # fmt: skip
    reasons = run_distributed(train_in_turn, 2, [[*base, "run.stop_at_step=3"], base])
    assert reasons[0] == ["stop_at_step", "finished"]
    found = metrics(tmp_path)
    assert list(found) == [1, 2, 3, 4]
    # A random network of this vocabulary starts near log(384) = 5.95 and moves in four steps.
    assert 5 < found[1]["lm_loss"] < 7 and found[4]["lm_loss"] < found[1]["lm_loss"]
    assert [m["num_experts"] for m in found.values()] == ([8, 8, 16, 16] if _GROW in _NETWORKS[name] else [8] * 4)


def test_several_expansions_with_any_factor(corpus: Path, tmp_path: Path) -> None:
    """8 -> 24 uniform, then 24 -> 28 by utility: families stay neighbours and provenance is in the checkpoint."""
    stages = (
        "[{at_step: 1, factor: 3}, {at_step: 3, num_experts: 28, selection: greedy, utility: weight_norm, "
        "max_extra_copies: 1}]"
    )
    overrides = [*SMALL, f"upcycle.stages={stages}", "run.steps=5", f"data.corpus={corpus}", f"run.dir={tmp_path}",
                 "parallel.expert=2", "run.load_interval_steps=1", "checkpoint.keep_last=1",
                 "upcycle.save_after=true"]  # fmt: skip
    run_distributed(train_in_turn, 2, [overrides])
    assert [m["num_experts"] for m in metrics(tmp_path).values()] == [8, 24, 24, 28, 28]
    # Runs of these tests draw none by themselves.
    assert write_report(tmp_path).stat().st_size > 100_000
    manifest = read_manifest(list_checkpoints(tmp_path)[-1])
    assert [plan["experts_after"] for plan in manifest.plans] == [24, 28]
    for layer in manifest.plans[1]["layers"]:
        assert sum(layer["copies"]) == 28 and sorted(set(layer["copies"])) == [1, 2]
        assert len(layer["scores"]) == 24 and min(layer["scores"]) > 0
    # The keys that mcore's specs for Transformer Engine use, so that checkpoints go from one kind to the other.
    assert "weight/decoder.layers.0.pre_mlp_layernorm.weight" in manifest.fingerprints
    assert "weight/decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in manifest.fingerprints
    # Pre- and post-switch checkpoints stay whatever keep_last says.
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == [
        "step-00000001", "step-00000001-stage1", "step-00000003", "step-00000003-stage2", "step-00000005",
    ]  # fmt: skip
    assert len(events(tmp_path, "expansion")) == 2
    assert sorted(p.name for p in (tmp_path / "plans").iterdir()) == ["step-00000001.json", "step-00000003.json"]


def test_a_dense_network_trains_under_tensor_parallelism(corpus: Path, tmp_path: Path) -> None:
    """Its last norm, too, has to be one that goes with sequence parallelism."""
    base = [*SMALL, _STAY, "model.num_experts=0", "run.precision=fp32", "run.steps=3", f"data.corpus={corpus}",
            f"run.dir={tmp_path}", "run.log_interval_steps=1"]  # fmt: skip
    run_distributed(train_in_turn, 2, [[*base, "run.stop_at_step=1"], [*base, "parallel.tensor=2"]])
    other = tmp_path / "other"
    run_distributed(train_in_turn, 2, [[*base, f"run.dir={other}"]])
    split, whole = metrics(tmp_path)[3], metrics(other)[3]
    same = ["lm_loss", *(key for key in whole if "_norm" in key)]
    # fp32 resolution is 1e-7; the order of sums differs over two updates.
    assert [split[key] for key in same] == pytest.approx([whole[key] for key in same], rel=1e-5)


def test_recomputed_activations_change_nothing(corpus: Path, tmp_path: Path) -> None:
    base = [*SMALL, f"data.corpus={corpus}", "run.steps=4", "parallel.expert=2"]
    kinds = {
        "none": [],
        "selective": ["model.recompute_modules=[core_attn, moe_act]"],
        "full": ["model.recompute_method=block"],
    }
    runs = [[*base, f"model.recompute={k}", *more, f"run.dir={tmp_path / k}"] for k, more in kinds.items()]
    run_distributed(train_in_turn, 2, runs)
    losses = {k: [(m["lm_loss"], m["grad_norm"]) for m in metrics(tmp_path / k).values()] for k in kinds}
    assert len(losses["none"]) == 4
    assert losses["full"] == losses["selective"] == losses["none"]


def test_every_replica_gets_tokens_within_a_few_steps(corpus: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "run.steps=12", f"data.corpus={corpus}", f"run.dir={tmp_path}", "parallel.expert=2",
                 "run.load_interval_steps=1"]  # fmt: skip
    run_distributed(train_in_turn, 2, [overrides])
    rows = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    used = {
        (layer, expert)
        for row in rows if row["stage"] == 1
        for layer, shares in zip(row["layers"], row["share_LE"], strict=True)
        for expert, share in enumerate(shares) if share > 0
    }  # fmt: skip
    assert used == {(layer, expert) for layer in (1, 2) for expert in range(16)}
    # And they are no longer equal: copies have begun to move apart.
    divergence = events(tmp_path, "evaluation")[-1]["details"]["sibling_divergence"]
    assert divergence["max"] > 0


def test_missing_optimizer_state_is_refused_and_the_flag_accepts_it(corpus: Path, tmp_path: Path) -> None:
    """A checkpoint of the model alone: refused by the first key, accepted with checkpoint.load=model_only."""
    base = [*SMALL, "upcycle.stages=[]", "run.steps=4", f"data.corpus={corpus}", f"run.dir={tmp_path}"]
    run_distributed(train_in_turn, 2, [[*base, "run.stop_at_step=2"]])
    (newest,) = list_checkpoints(tmp_path)
    run_distributed(_drop_optimizer_state, 1, str(newest / "tensors"))
    reseal(newest)
    with pytest.raises(CheckpointError, match=r"lacks \d+ keys .* first optimizer\.state\.exp_avg\..*model_only"):
        run_distributed(train_in_turn, 2, [base])
    assert list(metrics(tmp_path)) == [1, 2]
    run_distributed(train_in_turn, 2, [[*base, "checkpoint.load=model_only"]])
    assert list(metrics(tmp_path)) == [1, 2, 3, 4]


def _drop_optimizer_state(tensors: str) -> None:
    """Rewrite a checkpoint without its optimizer state."""
    import shutil

    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from parallel.sharded_load import checkpoint_tensors, load_sharded
    from parallel.sharded_save import save_sharded

    stored = {k: v for k, v in checkpoint_tensors(tensors).items() if not k.startswith("optimizer.")}
    wanted = {
        k: ShardedTensor.from_rank_offsets(k, torch.empty(shape, dtype=dtype)) for k, (shape, dtype) in stored.items()
    }
    loaded, _, _ = load_sharded(wanted, tensors)
    shutil.rmtree(tensors)
    save_sharded({k: ShardedTensor.from_rank_offsets(k, v) for k, v in loaded.items()}, tensors)
