"""Batches of a run: mcore's GPT datasets over the corpora, addressed by the number of samples consumed.

Which samples form step s is a function of s, the global batch size, the blends and the seed alone
(`train/data/sample_order.py`), so the data position is one number and survives any change of layout: rank r of D reads
its slice of the same global batch.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from parallel.errors import ConfigError, DataError
from parallel.layout import Layout
from train.config import RunSettings
from train.data.batches import Batch, micro_batches, read_batch
from train.data.blends import TRIGGERS, Phase, Position, refuse_used_up, resolved_table, stream_blends
from train.data.manifest import CorpusManifest, load_manifest
from train.data.sample_order import Blend, SampleOrder, Share, normalised
from train.data.samples import TrainingSamples, samples_per_epoch
from train.schema.data import CorpusWeight, DataConfig

# Keys of a batch whose second axis is not the sequence.
_NOT_SEQUENCES = ("counted", "packed")


def open_corpora(config: DataConfig) -> list[tuple[CorpusWeight, CorpusManifest]]:
    """Read the manifests of all corpora that a run reads at any time and check that they belong together.

    Returns:
        Each corpus once, as it is listed first, with its manifest; those that the run begins with come first.

    Raises:
        DataError: if one is missing or empty, is shorter than a sample, or uses another tokenizer than the first.
    """
    corpora: dict[str, tuple[CorpusWeight, CorpusManifest]] = {}
    # Fingerprint -> where it is listed first.
    same: dict[str, tuple[str, CorpusWeight]] = {}
    for parts in config.blends():
        in_this: set[str] = set()
        for key, part in parts:
            if part.prefix not in corpora:
                corpora[part.prefix] = part, load_manifest(part.prefix, key)
                _check_corpus(config, key, corpora[part.prefix][1], next(iter(corpora.values()))[1])
            fingerprint = corpora[part.prefix][1].fingerprint
            other, listed = same.setdefault(fingerprint, (key, part))
            if listed.prefix != part.prefix or fingerprint in in_this:
                raise DataError(
                    f"{key}={part.prefix} holds the same text as {other}: list it once in a blend, with the sum of the "
                    "weights, and under one prefix in all of them"
                )
            in_this.add(fingerprint)
    found = list(corpora.values())
    for parts, phase in zip(config.blends(), phases_of(config, found), strict=True):
        keys = {corpora[part.prefix][1].fingerprint: key.replace(".prefix", ".weight") for key, part in parts}
        Blend(0, phase.shares).refuse_tiny_shares(keys)
    return found


def _check_corpus(config: DataConfig, key: str, manifest: CorpusManifest, first: CorpusManifest) -> None:
    if manifest.tokenizer_digest != first.tokenizer_digest:
        raise DataError(
            f"data.blend: corpus {manifest.prefix} uses tokenizer {manifest.tokenizer_spec}, {first.prefix} "
            f"uses {first.tokenizer_spec}: build both with one tokenizer"
        )
    refuse_without_ends(config, key, manifest)
    tokens = manifest.tokens("train")
    if tokens <= config.sequence_length:
        raise DataError(
            f"{key}={manifest.prefix} holds {tokens} training tokens, fewer than one sample of "
            f"data.sequence_length={config.sequence_length}: use more text or a shorter sequence"
        )


def refuse_without_ends(config: DataConfig, key: str, manifest: CorpusManifest) -> None:
    """Refuse a corpus in which nothing marks the end of a document, where the options of the run need it.

    Raises:
        DataError: naming the option and the key of the corpus.
    """
    option = next((name for name in ("document_attention", "mask_boundary_loss") if getattr(config, name)), None)
    if option and not manifest.append_eod:
        raise DataError(
            f"data.{option}=true needs documents that end with the end-of-document token, but {key}={manifest.prefix} "
            "was built without it: build it again with it, or leave the option out"
        )


def phases_of(config: DataConfig, corpora: Sequence[tuple[CorpusWeight, CorpusManifest]]) -> list[Phase]:
    """The blends of a run's configuration and when they begin.

    Args:
        config: the `data` group.
        corpora: what `open_corpora` returned.

    Raises:
        ConfigError: if a bound on epochs is less than one sample.
    """
    manifests = {part.prefix: manifest for part, manifest in corpora}
    triggers = [{}, *({name: getattr(phase, name) for name in TRIGGERS} for phase in config.schedule)]
    return [
        Phase(normalised(_share(config, key, part, manifests[part.prefix]) for key, part in parts), **trigger)
        for parts, trigger in zip(config.blends(), triggers, strict=True)
    ]


def _share(config: DataConfig, key: str, part: CorpusWeight, manifest: CorpusManifest) -> Share:
    most = None
    if part.max_epochs is not None:
        most = int(part.max_epochs * samples_per_epoch(manifest, config.sequence_length))
        if not most:
            where = key.replace(".prefix", ".max_epochs")
            raise ConfigError(f"{where}={part.max_epochs} is less than one sample: raise it, or leave it out")
    return Share(manifest.fingerprint, part.weight, part.prefix, most, part.replay)


def planned_table(settings: RunSettings) -> list[dict[str, Any]]:
    """What a run that begins now reads to its end (`train.data.blends.resolved_table`).

    Args:
        settings: of the run, every stage with its step.

    Raises:
        DataError: if a corpus cannot be opened, or all of them are used up before the end.
    """
    data = settings.data
    corpora = open_corpora(data)
    here = Position(0, 0, 0, data.global_batch_size, settings.tokens_per_step())
    stages = [stage.at_step for stage in settings.upcycle.stages]
    order = SampleOrder(stream_blends(phases_of(data, corpora), [], here, stages))
    refuse_used_up(order, here, settings.run.steps)
    return resolved_table(order, here, settings.run.steps, _sizes([manifest for _, manifest in corpora], data))


def _sizes(manifests: Iterable[CorpusManifest], data: DataConfig) -> dict[str, tuple[int, int]]:
    """Training tokens of each corpus and samples of one pass over it, by fingerprint."""
    return {m.fingerprint: (m.tokens("train"), samples_per_epoch(m, data.sequence_length)) for m in manifests}


class DataStream(TrainingSamples):
    """Training batches of one run on one rank.

    Args:
        config: the `data` group.
        corpora: what `open_corpora` returned.
        blends: what the training stream is made of (`train.data.blends.stream_blends`).
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
        manifests = [manifest for _, manifest in corpora]
        super().__init__(config, manifests, SampleOrder(blends), seed, cache, records=layout.rank == 0)
        self.layout = layout
        # Batches are read ahead by one step, off the training thread.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def table(self, here: Position, steps: int) -> list[dict[str, Any]]:
        """What the training stream draws from until the end of the run (`train.data.blends.resolved_table`)."""
        return resolved_table(self.order, here, steps, _sizes(self._corpora.values(), self.config))

    @property
    def micro_batches(self) -> int:
        """Forward-backward passes per optimizer step on each data-parallel rank (gradient accumulation)."""
        return micro_batches(self.config, self.layout)

    def _read(self, first: int) -> list[Batch]:
        """The micro-batches of the global batch that starts at sample `first`, as this rank sees them."""
        return read_batch(self.sample, first, self.config, self.layout)

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
            self.open(first, self.config.global_batch_size)
            batches = self._read(first)
        following = first + self.config.global_batch_size
        self._close_before(following)
        self.open(following, self.config.global_batch_size)
        self._ahead = (following, self._reader.submit(self._read, following))
        return batches

    def enter(self, layout: Layout) -> None:
        """Read for this rank's coordinates in another layout from now on; what was read ahead is dropped.

        The position is a number of samples, and the global batch stays: nothing is skipped or read twice.
        """
        self._forget_ahead()
        self.layout = layout

    def follow(self, order: SampleOrder) -> None:
        """Read what another order has ahead; up to where the run stands it must be the same."""
        self._forget_ahead()
        self.order = order

    def _forget_ahead(self) -> None:
        """Drop what was read ahead."""
        if self._ahead is not None:
            # Whether it could be read does not matter any more, but it asks for what is about to change until it ends.
            wait([self._ahead[1]])
            self._ahead = None

    def peek(self, first: int) -> list[Batch]:
        """Like `train`, for a look at batches that are not consumed: what was read ahead stays."""
        self.open(first, self.config.global_batch_size)
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
        if key in _NOT_SEQUENCES:
            continue
        if size > 1:
            chunks = value.chunk(2 * size, dim=1)
            value = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)
        cut[key] = value.to(layout.device, non_blocking=True)
    return cut
