"""Batches of a run: mcore's GPT datasets over the corpora, addressed by the number of samples consumed.

Which samples form step s is a function of s, the global batch size, the blends and the seed alone (`train/sample_order.py`),
so the data position is one number and survives any change of layout: rank r of D reads its slice of the same global batch.
Each corpus is read epoch by epoch; every epoch is one GPTDataset with a shuffle of its own, built when it is reached.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from parallel.errors import DataError
from parallel.layout import Layout
from train.batches import Batch, dataset_config, micro_batches, read_batch
from train.config import CorpusWeight, DataConfig
from train.manifest import CorpusManifest, load_manifest
from train.random_state import named_seed
from train.sample_order import Blend, SampleOrder, blend_of
from train.tokenizers import Tokenizer


def open_corpora(config: DataConfig) -> list[tuple[CorpusWeight, CorpusManifest]]:
    """Read the manifests of the corpora of a run and check that they belong together.

    Raises:
        DataError: if one is missing or empty, is shorter than a sample, or uses another tokenizer than the first.
    """
    keys = ["data.corpus"] if config.corpus else [f"data.blend[{i}].prefix" for i in range(len(config.blend))]
    corpora = [(part, load_manifest(part.prefix, key)) for part, key in zip(config.corpora(), keys, strict=True)]
    first = corpora[0][1]
    for part, manifest in corpora:
        if manifest.tokenizer_digest != first.tokenizer_digest:
            raise DataError(
                f"data.blend: corpus {part.prefix} uses tokenizer {manifest.tokenizer_spec}, {corpora[0][0].prefix} "
                f"uses {first.tokenizer_spec}: build both with one tokenizer"
            )
        tokens = manifest.tokens("train")
        if tokens <= config.sequence_length:
            raise DataError(
                f"data.corpus={part.prefix} holds {tokens} training tokens, fewer than one sample of "
                f"data.sequence_length={config.sequence_length}: use more text or a shorter sequence"
            )
    same: dict[str, str] = {}
    for key, (part, manifest) in zip(keys, corpora, strict=True):
        if manifest.fingerprint in same:
            raise DataError(
                f"{key}={part.prefix} holds the same text as {same[manifest.fingerprint]}: list it once, with the sum of "
                "their weights"
            )
        same[manifest.fingerprint] = key
    weights = {fingerprint: key.replace(".prefix", ".weight") for fingerprint, key in same.items()}
    shares_of(corpora, 0).refuse_tiny_shares(weights)
    return corpora


def shares_of(corpora: Sequence[tuple[CorpusWeight, CorpusManifest]], first_sample: int) -> Blend:
    """The blend of a run's corpora, from a sample of its training stream on."""
    return blend_of(first_sample, [(m.fingerprint, part.weight, part.prefix) for part, m in corpora])


class DataStream:
    """Training batches of one run on one rank.

    Args:
        config: the `data` group.
        corpora: what `open_corpora` returned.
        blends: what the training stream is made of; the last one, to be read now, of `corpora`.
        seed: of the shuffles.
        layout: data-parallel coordinates of this rank.
        cache: folder for mcore's index files, shared by all ranks.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: list[tuple[CorpusWeight, CorpusManifest]],
        blends: Sequence[Blend],
        seed: int,
        layout: Layout,
        cache: Path,
    ) -> None:
        self.config = config
        self.layout = layout
        self.seed = seed
        self.order = SampleOrder(blends)
        self.tokenizer: Tokenizer = corpora[0][1].tokenizer()
        self._cache = cache
        self._corpora = {manifest.fingerprint: manifest for _, manifest in corpora}
        # Epochs that are open, by fingerprint and number.
        self._epochs: dict[tuple[str, int], GPTDataset] = {}
        # Batches are read ahead by one step, off the training thread.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def samples_per_epoch(self, fingerprint: str) -> int:
        """Samples in one pass over a corpus; the tokens of each begin with the last of the one before."""
        return (self._corpora[fingerprint].tokens("train") - 1) // self.config.sequence_length

    def sources(self, first: int, stop: int) -> list[dict[str, Any]]:
        """What the training stream draws from, for the records.

        Args:
            first: where the run stands in it.
            stop: where it will end.

        Returns:
            Per corpus its name, its share of the samples, its training tokens, and how many passes over it will have
            been made by `first` and by `stop`.
        """
        before, after = self.order.drawn(first), self.order.drawn(stop)
        return [
            {
                "corpus": share.name,
                "share": share.weight,
                "tokens": self._corpora[share.fingerprint].tokens("train"),
                "epochs_before": before.get(share.fingerprint, 0) / self.samples_per_epoch(share.fingerprint),
                "epochs_after": after[share.fingerprint] / self.samples_per_epoch(share.fingerprint),
            }
            for share in self.order.blends[-1].shares
        ]

    def _build_epoch(self, fingerprint: str, number: int) -> GPTDataset:
        """One pass over a corpus, shuffled for itself; collective."""
        corpus = self._corpora[fingerprint]
        # mcore seeds numpy, which takes 32 bits.
        seed = named_seed(f"data/{self.seed}/{fingerprint}/{number}") % 2**32
        blends = [([str(corpus.path("train"))], None), None, None]
        config = dataset_config(self.config, self.tokenizer, seed, blends, fingerprint, self._cache)
        # Without a number of samples mcore makes one epoch.
        train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
        return train

    def _open(self, first: int, samples: int) -> None:
        """Have every epoch open that a stretch of the training stream reads, on all ranks alike; collective."""
        begin, end = self.order.drawn(first), self.order.drawn(first + samples)
        for fingerprint in sorted(self._corpora):
            per_epoch = self.samples_per_epoch(fingerprint)
            start, stop = begin.get(fingerprint, 0), end.get(fingerprint, 0)
            for number in range(start // per_epoch, -(-stop // per_epoch)):
                if (fingerprint, number) not in self._epochs:
                    self._epochs[fingerprint, number] = self._build_epoch(fingerprint, number)

    def _close_before(self, first: int) -> None:
        """Let go of the epochs that no sample from `first` on is in."""
        begin = self.order.drawn(first)
        for fingerprint, number in list(self._epochs):
            if number < begin[fingerprint] // self.samples_per_epoch(fingerprint):
                del self._epochs[fingerprint, number]

    @property
    def micro_batches(self) -> int:
        """Forward-backward passes per optimizer step on each data-parallel rank (gradient accumulation)."""
        return micro_batches(self.config, self.layout)

    def _sample(self, number: int) -> Batch:
        fingerprint, position = self.order.place(number)
        epoch, index = divmod(position, self.samples_per_epoch(fingerprint))
        return self._epochs[fingerprint, epoch][index]

    def _read(self, first: int) -> list[Batch]:
        """The micro-batches of the global batch that starts at sample `first`, as this rank sees them."""
        return read_batch(self._sample, first, self.config, self.layout)

    def train(self, first: int) -> list[Batch]:
        """Micro-batches of the global batch that starts at sample `first`, each tensor [micro_batch, sequence].

        The batch after it is read in the background meanwhile.

        Args:
            first: samples consumed so far.
        """
        if self._ahead is not None and self._ahead[0] == first:
            batches = self._ahead[1].result()
        else:
            self._forget_ahead()
            self._open(first, self.config.global_batch_size)
            batches = self._read(first)
        following = first + self.config.global_batch_size
        self._close_before(following)
        self._open(following, self.config.global_batch_size)
        self._ahead = (following, self._reader.submit(self._read, following))
        return batches

    def enter(self, layout: Layout) -> None:
        """Read for this rank's coordinates in another layout from now on; what was read ahead is dropped.

        The position is a number of samples, and the global batch stays: nothing is skipped or read twice.
        """
        self._forget_ahead()
        self.layout = layout

    def _forget_ahead(self) -> None:
        """Drop what was read ahead."""
        if self._ahead is not None:
            # Whether it could be read does not matter any more, but it asks for what is about to change until it ends.
            wait([self._ahead[1]])
            self._ahead = None

    def peek(self, first: int) -> list[Batch]:
        """Like `train`, for a look at batches that are not consumed: what was read ahead stays."""
        self._open(first, self.config.global_batch_size)
        return self._read(first)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)


def for_this_context_rank(batch: Batch, layout: Layout) -> Batch:
    """Cut a batch along the sequence for context parallelism and put it on the device.

    Each rank takes one chunk from the front and its mirror from the back, so that causal attention costs every rank the
    same; Transformer Engine's context-parallel attention expects this order.
    """
    size, rank = layout.groups.cp.size(), layout.groups.cp.rank()
    cut = {}
    for key, value in batch.items():
        if size > 1:
            chunks = value.chunk(2 * size, dim=1)
            value = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)
        cut[key] = value.to(layout.device, non_blocking=True)
    return cut
