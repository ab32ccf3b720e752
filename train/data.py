"""Batches of a run: mcore's blended GPT datasets over the corpora, addressed by the number of samples consumed.

Which samples form step s is a function of s, the global batch size and the seed alone, so the data position is one number
and survives any change of layout: rank r of D reads its slice of the same global batch.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from parallel.errors import DataError
from parallel.layout import Layout
from train.config import CorpusWeight, DataConfig
from train.manifest import CorpusManifest, load_manifest
from train.tokenizers import Tokenizer

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """A stretch of the training stream with its own shuffle.

    mcore shuffles over all samples it is asked for, so asking for more would change the order of those already seen. A
    run that is continued past its first length therefore gets another segment instead of a longer first one.
    """

    samples: int
    seed: int


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
    return corpora


def plan_segments(known: Sequence[Segment], samples: int, seed: int) -> list[Segment]:
    """Extend the segments of a run so that they cover `samples` training samples."""
    segments = list(known)
    covered = sum(s.samples for s in segments)
    if covered < samples:
        segments.append(Segment(samples=samples - covered, seed=seed + len(segments)))
    return segments


class DataStream:
    """Training and validation batches of one run on one rank.

    Args:
        config: the `data` group.
        corpora: what `open_corpora` returned.
        segments: shuffles of the training stream, in order.
        layout: data-parallel coordinates of this rank.
        cache: folder for mcore's index files, shared by all ranks.
        validation_samples: samples drawn for one evaluation.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: list[tuple[CorpusWeight, CorpusManifest]],
        segments: list[Segment],
        layout: Layout,
        cache: Path,
        validation_samples: int,
    ) -> None:
        self.config = config
        self.segments = segments
        self.layout = layout
        self.tokenizer: Tokenizer = corpora[0][1].tokenizer()
        self.fingerprints = [manifest.fingerprint for _, manifest in corpora]
        # mcore names its cached indices after this; a blend is all of its corpora.
        self.tokenizer.corpus_fingerprint = "+".join(self.fingerprints)
        self._train: list[GPTDataset] = []
        self._valid: GPTDataset | None = None
        for i, segment in enumerate(segments):
            train, valid = self._build(corpora, segment, cache, validation_samples if i == 0 else 0)
            self._train.append(train)
            self._valid = self._valid if i else valid
        # Built after the segments: batches are read ahead by one step, off the training thread.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def _build(
        self, corpora: list[tuple[CorpusWeight, CorpusManifest]], segment: Segment, cache: Path, valid_samples: int
    ) -> tuple[GPTDataset, GPTDataset | None]:
        weights = [part.weight for part, _ in corpora] if len(corpora) > 1 else None
        held_out = [(part, m) for part, m in corpora if m.tokens("valid") > self.config.sequence_length]
        valid_blend = (
            (
                [str(m.path("valid")) for _, m in held_out],
                [p.weight for p, _ in held_out] if len(held_out) > 1 else None,
            )
            if held_out and valid_samples
            else None
        )
        config = GPTDatasetConfig(
            random_seed=segment.seed,
            sequence_length=self.config.sequence_length,
            blend_per_split=[([str(m.path("train")) for _, m in corpora], weights), valid_blend, None],
            path_to_cache=str(cache),
            tokenizer=self.tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [segment.samples, valid_samples if valid_blend else 0, 0]
        train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        return train, valid

    @property
    def micro_batches(self) -> int:
        """Forward-backward passes per optimizer step on each data-parallel rank (gradient accumulation)."""
        return self.config.global_batch_size // (self.config.micro_batch_size * self.layout.data_size)

    @property
    def has_validation(self) -> bool:
        """Whether any corpus holds out enough text for one sample."""
        return self._valid is not None

    def _sample(self, index: int) -> Batch:
        for segment, dataset in zip(self.segments, self._train, strict=True):
            if index < segment.samples:
                return dataset[index]
            index -= segment.samples
        raise IndexError("training samples are exhausted; plan_segments covers run.steps")

    def _read(self, first: int, source: str) -> list[Batch]:
        """The micro-batches of the global batch that starts at sample `first`, as this rank sees them."""
        micro, ranks = self.config.micro_batch_size, self.layout.data_size
        batches = []
        for m in range(self.micro_batches):
            start = first + (m * ranks + self.layout.data_rank) * micro
            if source == "train":
                samples = [self._sample(i) for i in range(start, start + micro)]
            else:
                assert self._valid is not None
                samples = [self._valid[i] for i in range(start, start + micro)]
            keys = ("tokens", "labels", "loss_mask", "position_ids")
            batches.append({k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in keys})
        return batches

    def train(self, first: int) -> list[Batch]:
        """Micro-batches of the global batch that starts at sample `first`, each tensor [micro_batch, sequence].

        The batch after it is read in the background meanwhile.

        Args:
            first: samples consumed so far.
        """
        if self._ahead is not None and self._ahead[0] == first:
            batches = self._ahead[1].result()
        else:
            batches = self._read(first, "train")
        self._ahead = None
        following = first + self.config.global_batch_size
        if following + self.config.global_batch_size <= sum(s.samples for s in self.segments):
            self._ahead = (following, self._reader.submit(self._read, following, "train"))
        return batches

    def enter(self, layout: Layout) -> None:
        """Read for this rank's coordinates in another layout from now on; what was read ahead is dropped.

        The position is a number of samples, and the global batch stays: nothing is skipped or read twice.
        """
        if self._ahead is not None:
            # Whether it could be read does not matter any more, but it asks for the old coordinates until it ends.
            wait([self._ahead[1]])
            self._ahead = None
        self.layout = layout

    def peek(self, first: int) -> list[Batch]:
        """Like `train`, for a look at batches that are not consumed: what was read ahead stays."""
        return self._read(first, "train")

    def validation(self, number: int) -> list[Batch]:
        """Micro-batches of global validation batch `number`; the same ones at every evaluation."""
        return self._read(number * self.config.global_batch_size, "valid")

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
