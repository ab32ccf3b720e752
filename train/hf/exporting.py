"""Exports a checkpoint as a published model of its family, grown or not: one process, a piece of a tensor at a time.

What the model is called and how its tokenizer works comes from the folder it once came from, kept with the checkpoint or
its run (`train/hf/start.py`); the number of experts is that of the checkpoint. What the config.json then says is compared
with what was trained, key by key: an export computes what the checkpoint computes, or there is none.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.hf.logical import Block, LogicalTensor, logical_tensors, our_key, published_shapes
from model.hf.mapping import Family, moe_layers
from model.hf.registry import family_of
from model.hf.source import CONFIG, all_finite, carry_over, read_config
from model.hf.write import ShardWriter
from model.sharded_state import MASTER_PREFIX, OPTIMIZER_PREFIX
from parallel.errors import CheckpointError, ConfigError
from parallel.regions import pieces_of
from parallel.sharded_load import require_complete
from parallel.stream_files import StoredTensors
from train.checkpoint.files import PUBLISHED as KEPT
from train.checkpoint.files import wrong_files
from train.checkpoint.folder import Manifest, need_space, read_manifest
from train.offline.files import staged
from upcycle.course import Entry, require_released

Say = Callable[[str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# config.json has called it by either name.
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        family: its model_type.
        experts: per MoE layer.
        tensors: how many.
        size: in bytes.
        dtype: of the weights.
    """

    family: str
    experts: int
    tensors: int
    size: int
    dtype: str


def export_checkpoint(
    path: Path, output: Path, *, like: Path | None, dtype: str | None, shard_bytes: int, chunk_bytes: int, say: Say
) -> Exported:
    """Write a checkpoint as a published model.

    Args:
        path: of a complete checkpoint.
        output: folder of the model; it must not exist, or be empty.
        like: a folder of the family to take config.json and tokenizer files from; None takes those that were kept.
        dtype: one of `DTYPES`; None takes that of the kept config.json, else that of the weights.
        shard_bytes: size of one file.
        chunk_bytes: memory for a piece of a tensor.
        say: told what is worth knowing.

    Raises:
        CoppiceError: naming what cannot be published, or not be written; nothing is left then.
    """
    manifest = read_manifest(path)
    problem = wrong_files(path, manifest.files, "sizes")
    if problem is not None:
        raise CheckpointError(f"checkpoint {path}: {problem}: use an older checkpoint")
    entries = [Entry.from_dict(entry) for entry in manifest.stages]
    require_released(entries, manifest.step, str(path), "exporting it")
    folder = like or _kept(path)
    config = read_config(folder)
    family = family_of(config)
    model = _trained_model(family, config, manifest, path, folder)
    if manifest.config.get("model", {}).get("mcore"):
        say(f"model.mcore={manifest.config['model']['mcore']} is not part of config.json: see that it changes nothing")
    tensors = logical_tensors(model, manifest.num_experts, family.names)
    require_complete(path / "tensors")
    with StoredTensors(path / "tensors") as stored:
        keys = _stored_keys(stored, tensors, path)
        kind = _dtype(dtype, config, stored.tensors[keys[next(iter(tensors))]].dtype)
        with staged(output) as staging:
            writer = ShardWriter(staging, _plan(tensors, kind), shard_bytes)
            need_space(staging, writer.total_bytes, "the model", output=output)
            _write(stored, keys, tensors, kind, writer, chunk_bytes)
            carry_over(folder, staging)
            written = _config(config, family, manifest.num_experts, kind)
            (staging / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    name = next(name for name, of in DTYPES.items() if of == kind)
    return Exported(family.model_type, manifest.num_experts, len(writer.order), writer.total_bytes, name)


def _kept(path: Path) -> Path:
    for folder in (path / KEPT, path.absolute().parent.parent / KEPT):
        if (folder / CONFIG).is_file():
            return folder
    raise ConfigError(
        f"{path} has no {KEPT}/{CONFIG}, as its run did not begin with a published model or became one of experts: name a "
        "folder of its family, with config.json and tokenizer files, by --like DIR"
    )


def _trained_model(
    family: Family, config: Mapping[str, Any], manifest: Manifest, path: Path, folder: Path
) -> ModelConfig:
    """The network of a checkpoint, if config.json describes it but for the number of experts.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    if bool(manifest.num_experts) != (family.experts is not None):
        raise CheckpointError(
            f"{path} has {manifest.num_experts or 'no'} experts per layer, but {folder / CONFIG} is of {family.model_type}, "
            f"which has {'none' if manifest.num_experts else 'some'}: name a folder of another family by --like DIR"
        )
    architecture = family.architecture_values(config) | {"num_experts": manifest.num_experts}
    told = manifest.model
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    trained = {name: told.get(f"model.{name}", defaults[name]) for name in architecture}
    trained |= {"num_experts": manifest.num_experts, "vocab_size": trained["vocab_size"] or manifest.vocab_size}
    ours, theirs = _meaning(trained), _meaning(architecture)
    for name in architecture:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{path} was trained with model.{name}={trained[name]}, but {folder / CONFIG} makes it "
                f"{architecture[name]}: it cannot be published as this {family.model_type}"
            )
    training = {name: told[f"model.{name}"] for name in ("balancing", "vocab_multiple")}
    return ModelConfig(**{**training, **architecture})


def _meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an architecture in one form, without those that mean nothing beside the others."""
    found, idle = dict(values), set[str]()
    if found["attention"] == "mla":
        idle |= {"head_dim", "kv_heads"}
    else:
        idle |= {name for name in found if name.startswith("mla_")}
        found["head_dim"] = found["head_dim"] or found["hidden_size"] // found["attention_heads"]
        found["kv_heads"] = found["kv_heads"] or found["attention_heads"]
    if found["rope_scaling"] == "none":
        idle |= {"rope_scaling_factor", "rope_original_length"}
    if found["rope_scaling"] != "yarn":
        idle |= {"rope_mscale", "rope_mscale_all_dim"}
    if found["num_experts"]:
        found["router_scale"] = found["router_scale"] or 1.0
        pattern = {name: found[name] for name in ("layers", "dense_first", "dense_last", "moe_period")}
        numbers = ModelConfig(**pattern).moe_layer_numbers()
        found |= moe_layers(found["layers"], lambda i: i + 1 in numbers)
        if len(numbers) == found["layers"]:
            idle.add("ffn_hidden_size")
    else:
        idle |= {"top_k", "dense_first", "dense_last", "moe_period"}
        idle |= {name for name in found if name.startswith(("expert_", "shared_expert_", "router_"))}
    return {name: value for name, value in found.items() if name not in idle}


def _stored_keys(stored: StoredTensors, tensors: Mapping[str, LogicalTensor], path: Path) -> dict[str, str]:
    """Our key -> key in the checkpoint, which under Transformer Engine names some norms otherwise.

    Raises:
        CheckpointError: if the checkpoint has other weights than the family.
    """
    weights = [key for key in stored.tensors if not key.startswith(OPTIMIZER_PREFIX)]
    found = {our_key(key, tensors): key for key in weights}
    for key in [*tensors, *found]:
        if key not in found or key not in tensors:
            what = "lacks" if key in tensors else "has"
            raise CheckpointError(f"{path} {what} {key}: its model is not what its family publishes")
        if stored.tensors[found[key]].shape != tensors[key].shape:
            raise CheckpointError(
                f"{path} has {key} of shape {list(stored.tensors[found[key]].shape)}, its family {list(tensors[key].shape)}"
            )
    return found


def _dtype(named: str | None, config: Mapping[str, Any], stored: torch.dtype) -> torch.dtype:
    if named is not None:
        return DTYPES[named]
    told = next((config[key] for key in _DTYPE_KEYS if config.get(key)), None)
    return DTYPES.get(str(told), stored)


def _plan(tensors: Mapping[str, LogicalTensor], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    shapes = published_shapes(tensors.values())
    fp32 = {block.name for tensor in tensors.values() if tensor.fp32 for block in tensor.blocks}
    return {name: (shape, torch.float32 if name in fp32 else dtype) for name, shape in shapes.items()}


def _write(
    stored: StoredTensors,
    keys: Mapping[str, str],
    tensors: Mapping[str, LogicalTensor],
    dtype: torch.dtype,
    writer: ShardWriter,
    chunk_bytes: int,
) -> None:
    """Write every published tensor out of its blocks, which are runs of its rows."""
    parts: dict[str, list[tuple[LogicalTensor, Block]]] = {}
    for tensor in tensors.values():
        for block in tensor.blocks:
            if block.name is not None:
                parts.setdefault(block.name, []).append((tensor, block))
    for name in writer.order:
        writer.begin(name)
        for tensor, block in sorted(parts[name], key=lambda part: part[1].offset):
            kind = torch.float32 if tensor.fp32 else dtype
            key, weight = keys[tensor.key], stored.tensors[keys[tensor.key]].dtype
            master = f"{MASTER_PREFIX}{key}"
            # Masters know more than the weights they are rounded to.
            if kind.itemsize > weight.itemsize and master in stored.tensors:
                key = master
            for box in pieces_of(block.box, max(1, chunk_bytes // torch.float32.itemsize)):
                writer.append(_cast(stored.read(key, box), kind, tensor.key))
    writer.finish()


def _cast(piece: torch.Tensor, kind: torch.dtype, key: str) -> torch.Tensor:
    """A piece in the type of the export; one that would not be the same model is refused."""
    cast = piece.to(kind).contiguous()
    if not all_finite(cast):
        if all_finite(piece):
            raise ConfigError(f"{key} has numbers that float16 cannot hold: use --dtype bfloat16 or float32")
        raise CheckpointError(f"{key} has numbers that are infinite or NaN: use an older checkpoint")
    return cast


def _config(config: Mapping[str, Any], family: Family, experts: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the export."""
    # It names code in the folder it came from, which is neither run nor carried over.
    written = {key: value for key, value in config.items() if key != "auto_map"}
    if family.experts is not None:
        present = [key for key in family.experts.keys if key in written] or [family.experts.keys[0]]
        written |= dict.fromkeys(present, experts)
    written |= {key: value for key, value in family.on_export.items() if key in written}
    written["architectures"] = [family.architecture]
    named = next(name for name, of in DTYPES.items() if of == dtype)
    key = next((key for key in _DTYPE_KEYS if key in written), _DTYPE_KEYS[0])
    return written | {key: named}
