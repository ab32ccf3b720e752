"""Published models as ours, inside the ranks of `run_distributed`: filled directly, or loaded from a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig, padded_vocab_size
from parallel.config import ParallelConfig
from parallel.layout import Layout
from tests.model.published import token_ids
from train.config import RunSettings
from train.schema.data import DataConfig
from train.schema.run import RunConfig
from train.stage import Stage, build_stage


def stage_of(model: ModelConfig, layout: Layout, precision: str = "fp32") -> Stage:
    """A stage with an optimizer, its weights drawn."""
    settings = RunSettings(
        model=model, run=RunConfig(precision=precision), data=DataConfig(sequence_length=32), parallel=layout.config
    )
    assert model.vocab_size is not None
    return build_stage(settings, 0, layout, model.vocab_size)


def filled(folder: Path, layout: Layout, precision: str = "fp32", **training: Any) -> tuple[Stage, ModelConfig]:
    """A stage filled from a published model."""
    from model.hf.fill import fill
    from model.hf.read import PublishedReader
    from model.hf.registry import family_of
    from model.hf.source import PublishedModel

    source = PublishedModel(folder)
    model = family_of(source.config).model_config(source.config, **training)
    stage = stage_of(model, layout, precision)
    fill(PublishedReader(source, model), stage.chunks, stage.optimizer, layout)
    return stage, model


def loaded(checkpoint: Path, layout: Layout) -> tuple[Stage, ModelConfig]:
    """A stage with the weights of a checkpoint."""
    from model.sharded_state import load_tensors
    from train.checkpoint.folder import read_manifest
    from train.settings import settings_from_dict

    manifest = read_manifest(checkpoint)
    settings = settings_from_dict(manifest.config)
    model = replace(settings.model, num_experts=manifest.num_experts)
    if model.vocab_size is None:
        model = replace(model, vocab_size=manifest.vocab_size)
    stage = stage_of(model, layout, settings.run.precision)
    load_tensors(checkpoint / "tensors", stage.chunks, stage.optimizer, layout, step=0, with_optimizer=False)
    return stage, model


def logits_of(stage: Stage, model: ModelConfig, layout: Layout) -> torch.Tensor:
    """Logits of `token_ids`, [2, 32, V] fp32, without the padding of the vocabulary; no pipeline."""
    assert model.vocab_size is not None
    ids = token_ids(model.vocab_size)
    length = ids.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    (chunk,) = stage.chunks
    chunk.eval()
    with torch.no_grad():
        part = chunk(ids, torch.arange(length).expand(ids.shape), mask)
    parts = [torch.empty_like(part) for _ in range(layout.groups.tp.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=layout.groups.tp)
    whole = torch.cat(parts, dim=-1)
    assert whole.shape[-1] == padded_vocab_size(model, model.vocab_size)
    return whole[..., : model.vocab_size].float()


def layout_of(**sizes: int) -> Layout:
    """Process groups of a layout."""
    return Layout.create(ParallelConfig(**sizes), 1)
