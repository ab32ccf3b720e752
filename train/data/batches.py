"""What training and validation batches have in common: mcore's datasets, and a rank's slice of a global batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from parallel.layout import Layout
from train.data.tokenizers import Tokenizer
from train.schema.data import DataConfig

# Tensors by name; `train/step.py` may put in where documents lie.
Batch = dict[str, Any]
# What is taken of mcore's samples; each is [sequence].
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def dataset_config(
    config: DataConfig, tokenizer: Tokenizer, seed: int, blends: list[Any], fingerprint: str, cache: Path
) -> GPTDatasetConfig:
    """What mcore's builder is told.

    Args:
        config: the `data` group.
        tokenizer: of the corpora.
        seed: of the shuffle.
        blends: for each of mcore's three splits its path prefixes and their weights, or None.
        fingerprint: of the text; mcore names its cached indices after it.
        cache: folder for these, shared by all ranks.
    """
    tokenizer = copy.copy(tokenizer)
    tokenizer.corpus_fingerprint = fingerprint
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=config.sequence_length,
        blend_per_split=blends,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=config.document_attention,
        # Masks are made from the positions where the model runs: they are large, and not every kernel takes one.
        reset_attention_mask=False,
        create_attention_mask=False,
        eod_mask_loss=config.mask_boundary_loss,
    )


def micro_batches(config: DataConfig, layout: Layout) -> int:
    """Micro-batches of a global batch on each data-parallel rank."""
    return config.global_batch_size // (config.micro_batch_size * layout.data_size)


def read_batch(sample: Callable[[int], Any], first: int, config: DataConfig, layout: Layout) -> list[Batch]:
    """The micro-batches of the global batch that starts at sample `first`, as this rank sees them.

    Args:
        sample: gives a sample by its number, as mcore's GPTDataset does.
        first: number of the batch's first sample.
        config: the `data` group.
        layout: data-parallel coordinates of this rank.

    Returns:
        Per micro-batch tensors [micro_batch, sequence]. With `data.document_attention` one of them is `documents`: the
        number of the document in the sample that each token is of. With `data.mask_boundary_loss` there is `counted`
        [micro_batch, 1]: tokens of the sample in the loss.
    """
    micro, batches = config.micro_batch_size, []
    for m in range(micro_batches(config, layout)):
        start = first + (m * layout.data_size + layout.data_rank) * micro
        samples = [sample(i) for i in range(start, start + micro)]
        batch = {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in _KEYS}
        if config.document_attention:
            # Positions begin anew with each document, and at 0 in the sample itself.
            batch["documents"] = torch.cumsum(batch["position_ids"] == 0, dim=1, dtype=torch.int32) - 1
        if config.mask_boundary_loss:
            batch["counted"] = batch["loss_mask"].sum(dim=1, keepdim=True, dtype=torch.float64)
        batches.append(batch)
    return batches
