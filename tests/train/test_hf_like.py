"""Exports of models that did not begin as one of their family: `--like` a folder with a config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError, ConfigError
from tests.distributed import run_distributed
from tests.model.published import judge
from tests.train.trainer import metrics, small_corpus, train_here

_RUN = [
    "data.sequence_length=32", "data.micro_batch_size=2", "data.global_batch_size=4", "run.steps=2", "checkpoint=ends",
    "schedule.style=constant", "schedule.warmup_steps=1", "evaluation.batches=1", "evaluation.interval_steps=null", "tracking=none", "run.precision=fp32",
    "model.layers=2", "model.hidden_size=32", "model.attention_heads=4", "model.ffn_hidden_size=48", "model.vocab_size=259",
    "model.expert_ffn_hidden_size=16", "model.top_k=2",
]  # fmt: skip
_SHAPE = dict(
    vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, rope_theta=10000.0,
    rms_norm_eps=1e-6, hidden_act="silu",
)  # fmt: skip
# Preset -> what it takes to be small, and a config.json as a user has it: short, with other numbers of experts, and in
# other words than the preset's (`head_dim` said, `kv_heads` not).
_PRESETS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "tiny": (
        ["model.num_experts=0", "model.kv_heads=2"],
        dict(model_type="llama", head_dim=8, num_key_value_heads=2, rms_norm_eps=1e-5),
    ),
    "deepseek_v3": (
        ["model.num_experts=4", "model.dense_first=1", "model.router_groups=2", "model.router_group_topk=1",
         "model.shared_expert_ffn_hidden_size=16", "model.mla_query_rank=8", "model.mla_kv_rank=8", "model.mla_head_dim=8",
         "model.mla_rope_head_dim=8", "model.mla_value_head_dim=8", "model.rope_scaling=none"],
        dict(model_type="deepseek_v3", n_routed_experts=16, num_experts_per_tok=2, n_group=2, topk_group=1,
             n_shared_experts=1, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4),
    ),
}  # fmt: skip
_GROUPS = [
    "--num-experts",
    "4",
    "--top-k",
    "2",
    "--method",
    "virtual_group",
    "--granularity",
    "2",
    "--router-score",
    "softmax",
]


def _stories(root: str, corpus: str) -> dict[str, Any]:
    from tests.model.ours import layout_of, loaded, logits_of
    from train.checkpoint.folder import list_checkpoints
    from train.hf import command as hf_command
    from train.offline import upcycle_command

    folder, found = Path(root), {}

    def export(name: str, source: Path, config: dict[str, Any]) -> int:
        like = folder / f"{name}.like"
        like.mkdir(exist_ok=True)
        (like / "config.json").write_text(json.dumps(config))
        words = ["export", str(source), "--like", str(like), "--output", str(folder / f"{name}.export")]
        return hf_command.main(words)

    sources = {}
    for preset, (words, config) in _PRESETS.items():
        train_here([*_RUN, f"data.corpus={corpus}", f"model={preset}", f"run.dir={folder / preset}", *words])
        sources[preset] = list_checkpoints(folder / preset)[-1]
        assert export(preset, folder / preset, _SHAPE | config) == 0
    # Llama, without a tokenizer or anything else beside its config.json.
    assert hf_command.main(["import", str(folder / "llama"), "--output", str(folder / "imported")]) == 0
    words = [
        "from-dense",
        str(folder / "imported"),
        *_GROUPS,
        "--balancing",
        "aux_loss",
        "--output",
        str(folder / "groups"),
    ]
    assert upcycle_command.main(words) == 0
    assert not (folder / "groups" / "huggingface").exists()
    continued = [w for w in _RUN if not w.startswith("model.") and "precision" not in w]
    shape = ["model.vocab_size=300", "model.layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48",
             "model.attention_heads=4", "model.kv_heads=2", "model.head_dim=8", "model.norm_epsilon=1e-6",
             "model.num_experts=4", "model.expert_ffn_hidden_size=24", "model.router_score=softmax",
             "model.balancing=aux_loss", "run.precision=fp32"]  # fmt: skip
    train_here(
        [
            *continued,
            *shape,
            f"data.corpus={corpus}",
            f"run.resume={folder / 'groups'}",
            f"run.dir={folder / 'went-on'}",
        ]
    )
    sources["groups"] = list_checkpoints(folder / "went-on")[-1]
    llama = json.loads((folder / "llama" / "config.json").read_text())
    mixtral = {
        k: v for k, v in llama.items() if k not in ("attention_bias", "mlp_bias", "pretraining_tp", "architectures")
    }
    mixtral |= {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
    found["unnamed"] = hf_command.main(["export", str(folder / "went-on"), "--output", str(folder / "none")])
    found["of a dense family"] = export("dense", folder / "went-on", llama)
    found["of another width"] = export("wide", folder / "went-on", mixtral | {"intermediate_size": 48})
    assert export("groups", folder / "went-on", mixtral) == 0
    layout = layout_of()
    return found | {name: logits_of(*loaded(path, layout), layout) for name, path in sources.items()}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("like")
    run_distributed(_llama, 1, str(folder / "llama"), init=False)
    for extra in (folder / "llama").iterdir():
        if extra.name not in ("config.json", "model.safetensors"):
            extra.unlink()
    found = run_distributed(_stories, 1, str(folder), str(small_corpus(folder)))[0]
    return found | {"folder": folder}


def _llama(folder: str) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_transformers_computes_what_was_trained(stories: dict[str, Any]) -> None:
    names = [*_PRESETS, "groups"]
    folders = [str(stories["folder"] / f"{name}.export") for name in names]
    for name, found in zip(names, run_distributed(judge, 1, folders, init=False)[0], strict=True):
        assert found["told"] == {}, name
        torch.testing.assert_close(
            found["logits"], stories[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        experts = [v for k, v in found["config"].items() if k in ("num_local_experts", "n_routed_experts")]
        assert experts == ([] if name == "tiny" else [4])


def test_a_folder_that_computes_something_else_is_refused(stories: dict[str, Any]) -> None:
    assert stories["unnamed"] == ConfigError.exit_code
    assert stories["of a dense family"] == stories["of another width"] == CheckpointError.exit_code
    assert not any((stories["folder"] / name).exists() for name in ("none", "dense.export", "wide.export"))


def test_a_dense_model_on_tensor_ranks_has_the_loss_of_one(stories: dict[str, Any], tmp_path: Path) -> None:
    run = [w for w in _RUN if not w.startswith("model.")]
    run += [f"data.corpus={stories['folder'] / 'corpus'}", f"model.init_from=hf:{stories['folder'] / 'llama'}"]
    losses = []
    for ranks in (1, 2):
        words = [*run, f"run.dir={tmp_path / str(ranks)}", f"parallel.tensor={ranks}"]
        run_distributed(train_here, ranks, words)
        losses.append([line["lm_loss"] for line in metrics(tmp_path / str(ranks)).values()])
    # fp32 keeps 24 bits; sums in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
