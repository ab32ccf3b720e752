"""What training and validation batches have in common: mcore's datasets, and a rank's slice of a global batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from parallel.layout import Layout
from train.config import DataConfig
from train.tokenizers import Tokenizer

Batch = dict[str, torch.Tensor]


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
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
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
        Per micro-batch tensors [micro_batch, sequence].
    """
    micro, batches = config.micro_batch_size, []
    for m in range(micro_batches(config, layout)):
        start = first + (m * layout.data_size + layout.data_rank) * micro
        samples = [sample(i) for i in range(start, start + micro)]
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        batches.append({k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in keys})
    return batches
