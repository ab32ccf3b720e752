"""The seam to mcore versions: the same calls do the same with 0.16.1 and 0.19.2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.compat import (
    OPTIMIZER_METADATA,
    forget_models,
    layer_submodules,
    make_transformer_config,
    moe_submodules,
    use_experts,
    versions,
)
from parallel.errors import CheckpointError, ConfigError
from parallel.sharded_load import checkpoint_tensors, load_sharded
from parallel.sharded_save import save_sharded
from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed
from tests.parallel.tiny_gpt import (
    EXPERTS,
    HIDDEN,
    VOCABULARY,
    Layout,
    build,
    layer_spec,
    named_noise,
    prepare_training,
    sharded_state,
    train,
    train_step,
)

ROUTER = "decoder.layers.1.mlp.router.weight"


def _save(directory: str, layout: Layout, share: bool) -> None:
    from megatron.core import parallel_state

    state = sharded_state(build(layout)) | {"step": 3}
    save_sharded(state, directory, parallel_group=parallel_state.get_data_parallel_group() if share else None)
    parallel_state.destroy_model_parallel()


def _load(directory: str, layout: Layout) -> None:
    from megatron.core import parallel_state

    model = build(layout)
    for parameter in model.parameters():
        parameter.data.fill_(-1)
    state, missing, unexpected = load_sharded(sharded_state(model), directory)
    assert state["step"] == 3
    assert not missing
    assert not unexpected
    for tensor, expected in named_noise(model):
        assert torch.equal(tensor, expected)
    assert torch.equal(model.decoder.layers[0].input_layernorm.weight, torch.ones(HIDDEN))
    parallel_state.destroy_model_parallel()


def _save_and_load(folder: str) -> None:
    _save(f"{folder}/a", Layout(tensor=2, expert=2, expert_tensor=2), share=False)
    _load(f"{folder}/a", Layout(expert=4))
    _save(f"{folder}/b", Layout(expert=2), share=True)
    _load(f"{folder}/b", Layout(tensor=2, expert_tensor=1, pipeline=2))


def test_checkpoint_round_trip_between_layouts(tmp_path: Path) -> None:
    run_distributed(_save_and_load, 4, str(tmp_path))
    tensors = checkpoint_tensors(str(tmp_path / "b"))
    assert tensors["embedding.word_embeddings.weight"] == ((VOCABULARY, HIDDEN), torch.float32)
    assert tensors[ROUTER] == ((EXPERTS, HIDDEN), torch.float32)  # one key per layer
    assert checkpoint_tensors(str(tmp_path / "a")) == tensors


def _save_twice(directory: str) -> None:
    model = build(Layout(expert=2))
    for factor in (2.0, 1.0):
        for tensor, values in named_noise(model):
            tensor.copy_(values * factor)
        save_sharded(sharded_state(model) | {"step": 3}, directory)
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _load(directory, Layout())


def test_saving_again_overwrites(tmp_path: Path) -> None:
    run_distributed(_save_twice, 2, str(tmp_path / "checkpoint"))


def _load_what_does_not_fit(directory: str) -> list[str]:
    """Every error is raised on all ranks, even if one rank alone could know."""
    model = build(Layout(expert=2))
    save_sharded(sharded_state(model), directory)
    messages = []

    def fails(state: dict[str, Any], where: str = directory) -> None:
        with pytest.raises(CheckpointError) as caught:
            load_sharded(state, where)
        messages.append(str(caught.value).replace(directory, "DIR"))

    state = sharded_state(model)
    if torch.distributed.get_rank() == 1:
        state[ROUTER].key = "decoder.layers.1.gone"
    fails(state)
    state = sharded_state(model)
    if torch.distributed.get_rank() == 1:
        state[ROUTER].global_shape = (8, HIDDEN)
    fails(state)
    fails(sharded_state(model), directory + "/none")

    state = sharded_state(model)
    weight = model.decoder.layers[1].mlp.router.weight
    state["more"] = state.pop(ROUTER)
    state["more"].key = "more"
    loaded, missing, unexpected = load_sharded(state, directory, strict=False)
    assert "more" not in loaded
    assert weight.isfinite().all()
    messages.append(f"{sorted(missing)} {sorted(unexpected)}")

    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        os.truncate(f"{directory}/__1_0.distcp", 100)
    torch.distributed.barrier()
    fails(sharded_state(model))
    return messages


def test_a_checkpoint_that_does_not_fit_is_refused_on_all_ranks(tmp_path: Path) -> None:
    by_rank = run_distributed(_load_what_does_not_fit, 2, str(tmp_path / "checkpoint"))
    assert by_rank[0][:-1] == by_rank[1][:-1]
    absent, shape, nothing, loose, truncated = by_rank[0]
    assert "lacks 1 of" in absent
    assert "first decoder.layers.1.gone" in absent
    assert f"has {ROUTER} of shape (4, 32), this model (8, 32)" in shape
    assert "DIR/none holds no complete checkpoint" in nothing
    assert loose == f"['more'] ['{ROUTER}']"
    assert "DIR cannot be read" in truncated


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="cannot be read by torch"):
        checkpoint_tensors(str(tmp_path))


def _save_overlapping(directory: str) -> str:
    model = build(Layout(expert=2))
    state = sharded_state(model)
    state[ROUTER].replica_id = 0  # both ranks claim to be the one that writes it
    with pytest.raises(CheckpointError) as caught:
        save_sharded(state, directory)
    return str(caught.value)


def _save_where_it_cannot(folder: str) -> list[str]:
    model = build(Layout(expert=2))
    messages = []
    for directory in (f"{folder}/file/below", f"{folder}/taken"):
        with pytest.raises(CheckpointError) as caught:
            save_sharded(sharded_state(model), directory)
        messages.append(str(caught.value))
    return messages


def test_a_failed_write_is_raised_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "__1_0.distcp").mkdir(parents=True)  # where rank 1 alone will want to write a file
    for no_directory, no_file in run_distributed(_save_where_it_cannot, 2, str(tmp_path)):
        assert "file/below cannot be written" in no_directory
        assert "taken cannot be written" in no_file
        assert "__1_0.distcp" in no_file
    assert not (tmp_path / "taken" / "metadata.json").exists()


def test_shards_that_overlap_are_refused_on_all_ranks(tmp_path: Path) -> None:
    for message in run_distributed(_save_overlapping, 2, str(tmp_path / "checkpoint")):
        assert "cannot be written" in message
        assert ROUTER in message


def _save_optimizer(directory: str) -> None:
    from megatron.core import parallel_state

    model = build(Layout(expert=2))
    wrapped, optimizer = prepare_training(model)
    train_step(wrapped, optimizer)
    metadata = OPTIMIZER_METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": sharded_state(model)}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=metadata)
    save_sharded(state, directory, parallel_group=parallel_state.get_data_parallel_group())


def test_optimizer_state_is_written_per_layer_and_by_parameter_name(tmp_path: Path) -> None:
    run_distributed(_save_optimizer, 2, str(tmp_path / "checkpoint"))
    tensors = checkpoint_tensors(str(tmp_path / "checkpoint"))
    for state in ("exp_avg", "exp_avg_sq", "param"):
        assert tensors[f"optimizer.state.{state}.{ROUTER}"] == ((EXPERTS, HIDDEN), torch.float32)


def _grow_layers_with_aux_loss() -> None:
    changes = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    train(Layout(expert=2), 1, **changes)
    forget_models()
    train(Layout(), 1, num_layers=4, **changes)  # the metrics of the smaller model would not fit


def test_moe_metrics_are_forgotten() -> None:
    run_distributed(_grow_layers_with_aux_loss, 2)


def _build_with_own_experts() -> tuple[str, list[str]]:
    from megatron.core.transformer.moe.experts import SequentialMLP

    class Experts(SequentialMLP):
        """Built without submodules, as a class of ours would be."""

        def __init__(self, num_local_experts: int, config: Any, submodules: Any = None, **kwargs: Any) -> None:
            super().__init__(num_local_experts, config, submodules or linear, **kwargs)

    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    spec = layer_spec()
    use_experts(spec, Experts)
    assert moe_submodules(spec) is layer_submodules(layer_submodules(spec).mlp)
    model = build(Layout(), spec=spec)
    return type(model.decoder.layers[1].mlp.experts).__name__, sorted(vars(moe_submodules(spec)))


def test_a_spec_builds_our_experts() -> None:
    [(name, fields)] = run_distributed(_build_with_own_experts, 1)
    assert name == "Experts"
    assert fields == ["experts", "router", "shared_experts"]


def _make_configs() -> tuple[str, int]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    good = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    with pytest.raises(ConfigError) as refused:
        make_transformer_config(TransformerConfig, **good, tensor_model_parallel_size=3)
    return str(refused.value), make_transformer_config(TransformerConfig, **good).num_layers


def test_what_mcore_refuses_is_an_error_of_the_user() -> None:
    [(refused, layers)] = run_distributed(_make_configs, 1)
    assert refused.startswith("megatron-core refuses this model: ")
    assert layers == 2


def test_versions_name_the_stack() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "megatron-core", "numpy"} <= found.keys()
    assert ("transformer-engine" in found) == have_transformer_engine()
