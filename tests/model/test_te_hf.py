"""Published models of every family in Transformer Engine's modules: the same numbers in the same places, the same bytes out."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed
from tests.model import te
from tests.model.published import CASES, make

pytestmark = [
    pytest.mark.requires_te,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]
# 0.19 has no latent attention with uncompressed queries and normalised keys.
BUILDABLE = [
    name
    for name, (_, changes) in CASES.items()
    if changes.get("q_lora_rank", 0) is not None or version("megatron-core").startswith("0.16")
]
_EXPERT = re.compile(r"\.experts\.linear_(fc\d)\.(weight|bias)(\d+)$")
_FUSED = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    run_distributed(make, 1, str(folder), init=False, timeout=600)
    return folder


def _name_in_sequential(name: str) -> str:
    """What mcore's own layers call a parameter of Transformer Engine's."""
    name = _EXPERT.sub(lambda m: f".experts.local_experts.{m[3]}.linear_{m[1]}.{m[2]}", name)
    for fused, separate in _FUSED:
        name = name.replace(fused, separate)
    return name


@te.its_adam()
def _through(folder: str, root: str, dtype: str) -> dict[str, Any]:
    from model.hf.fill import fill
    from model.hf.read import PublishedReader
    from model.hf.registry import family_of
    from model.hf.source import PublishedModel
    from model.sharded_state import save_tensors
    from tests.train.trainer import reseal
    from train.hf.exporting import export_checkpoint
    from train.hf.importing import import_published

    source, layout = PublishedModel(Path(folder)), te.layout()
    model = family_of(source.config).model_config(source.config)
    imported, how = Path(root) / "imported", {"chunk_bytes": 3000, "say": print}
    import_published(Path(folder), imported, precision="bf16", vocab_multiple=128, **how)
    states, parameters = {}, {}
    for kind in te.KINDS:
        chunks = te.built_as(kind, model, layout, model.num_experts, model.vocab_size)
        assert any(type(m).__module__.startswith("transformer_engine") for m in chunks[0].modules()) == kind.startswith(
            "te"
        )
        optimizer = te.optimizer(chunks)
        fill(PublishedReader(source, model), chunks, optimizer, layout)
        states[kind] = te.state(chunks, optimizer, layout)
        if not kind.endswith("grouped"):
            parameters[kind] = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
        checkpoint = Path(root) / kind
        shutil.copytree(imported, checkpoint)
        shutil.rmtree(checkpoint / "tensors")
        save_tensors(checkpoint / "tensors", chunks, optimizer, layout)
        reseal(checkpoint)
        export_checkpoint(checkpoint, Path(root) / f"{kind}.export", like=None, dtype=dtype, shard_bytes=20_000, **how)
    assert all(states[kind] == states["te"] for kind in te.KINDS)
    ours, different = parameters.pop("sequential"), []
    for found in parameters.values():
        theirs = {_name_in_sequential(name): p for name, p in found.items()}
        assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
        different += [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return {"different": different, "count": len(ours)}


def _contents(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(key)
                found[key] = (tuple(tensor.shape), tensor.dtype, tensor.view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("name", BUILDABLE)
def test_its_modules_take_and_give_what_ours_do(name: str, published: Path, tmp_path: Path) -> None:
    whole = _contents(published / name)
    kinds = {dtype for _, dtype, _ in whole.values()}
    dtype = "bfloat16" if torch.bfloat16 in kinds else "float32"
    [found] = run_distributed(_through, 1, str(published / name), str(tmp_path), dtype)
    assert found["different"] == [] and found["count"] > 10
    for kind in te.KINDS:
        assert _contents(tmp_path / f"{kind}.export") == whole, kind
