"""Imports a published model as a checkpoint of ours: one process, no process group, a piece of a tensor in memory at a time.

The checkpoint holds weights, at step 0 of no run. It says so (`Manifest.imported`): masters follow from the weights and
moments are fresh by design, while any other checkpoint without moments stays refused. A run starts from it with run.resume;
it can be planned for, expanded offline and exported like any other.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from model.fingerprint import Fingerprints, tensor_sums
from model.hf.logical import LogicalTensor, expert_keys_of
from model.hf.read import PublishedReader
from model.hf.registry import family_of
from model.hf.source import PublishedModel, carry_over
from parallel.compat import versions
from parallel.regions import first_element
from parallel.sharded_load import mark_complete
from parallel.stream_files import TensorWriter, pieces
from train.checkpoint.files import PUBLISHED as KEPT
from train.checkpoint.folder import Manifest, need_space
from train.config import RunSettings
from train.offline.files import seal_alone, staged
from train.schema.run import RunConfig
from train.settings import settings_to_dict
from train.start import model_identity

Say = Callable[[str], None]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def import_published(
    source: Path, output: Path, *, precision: str | None, vocab_multiple: int, chunk_bytes: int, say: Say
) -> Manifest:
    """Write a checkpoint with the weights of a published model.

    Args:
        source: its folder.
        output: folder of the checkpoint; it must not exist, or be empty.
        precision: `bf16` or `fp32`, that of the runs to come; None takes bf16 for a model in bf16, else fp32.
        vocab_multiple: rows of the embedding are padded to a multiple of this (`model.vocab_multiple`).
        chunk_bytes: memory for a piece of a tensor.
        say: told of progress.

    Returns:
        The manifest of the checkpoint.

    Raises:
        CoppiceError: naming what does not fit, or cannot be written; nothing is published then.
    """
    published = PublishedModel(source)
    family = family_of(published.config)
    model = family.model_config(published.config, vocab_multiple=vocab_multiple)
    reader = PublishedReader(published, model)
    if precision is None:
        precision = "bf16" if published.main_dtype() == torch.bfloat16 else "fp32"
    if reader.left_out:
        say(f"{source}: {len(reader.left_out)} tensors are left out, first {reader.left_out[0]}")
    settings = RunSettings(model=model, run=RunConfig(dir=str(output), precision=precision))
    with staged(output) as staging:
        need_space(staging, _bytes_of(reader, _DTYPES[precision]), "the checkpoint", output=output)
        found = _write_tensors(reader, staging / "tensors", _DTYPES[precision], chunk_bytes)
        (staging / "rng").mkdir()
        carry_over(source, staging / KEPT)
        assert model.vocab_size is not None
        manifest = Manifest(
            step=0,
            stage=0,
            num_experts=model.num_experts,
            optimizer_step=0,
            model=model_identity(settings, model.vocab_size),
            vocab_size=model.vocab_size,
            layout={"world": 1},
            fingerprints=found,
            experts=expert_keys_of(reader.tensors.values()),
            data={"samples": 0, "seed": settings.run.seed, "blends": [], "tokenizer": None, "sequence_length": None},
            scheduler={},
            config=settings_to_dict(settings),
            versions=versions(),
            imported={"source": str(source.absolute()), "family": family.model_type},
        )
        seal_alone(staging, manifest)
    return manifest


def _bytes_of(reader: PublishedReader, dtype: torch.dtype) -> int:
    """Of the tensors that are to be written, in their type there and not in that of the source."""
    tensors = reader.tensors.values()
    return sum(torch.Size(t.shape).numel() * (torch.float32 if t.fp32 else dtype).itemsize for t in tensors)


def _write_tensors(reader: PublishedReader, folder: Path, dtype: torch.dtype, chunk_bytes: int) -> Fingerprints:
    folder.mkdir()
    found: Fingerprints = {}
    with TensorWriter(folder) as writer:
        for key, tensor in reader.tensors.items():
            found[f"weight/{key}"] = _write_tensor(reader, tensor, writer, dtype, chunk_bytes)
        writer.finish()
    mark_complete(folder)
    return dict(sorted(found.items()))


def _write_tensor(
    reader: PublishedReader, tensor: LogicalTensor, writer: TensorWriter, dtype: torch.dtype, chunk_bytes: int
) -> list[int]:
    """Write one of our tensors; gives its fingerprint."""
    kind = torch.float32 if tensor.fp32 else dtype
    rows = tensor.shape[0] if tensor.kind else 1
    numel = torch.Size(tensor.shape).numel()
    sums = torch.zeros(rows, dtype=torch.int64)
    for box in pieces(tensor.shape, kind.itemsize, chunk_bytes):
        part = torch.empty(box.shape, dtype=kind)
        reader.read_into(tensor.key, box, part)
        sums += tensor_sums(part, first_element(tensor.shape, box), numel // rows, rows)
        writer.add(tensor.key, tensor.shape, box, part)
    return sums.tolist()
