"""The samples of a training stream: mcore's GPT datasets over the corpora, one per epoch, opened where they are needed.

Each corpus is read epoch by epoch; every epoch is one GPTDataset with a shuffle of its own. Nothing here knows of ranks
or batches: sample n of the stream is the same for everybody (`train/data/sample_order.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from train.data.batches import dataset_config
from train.data.index_files import built
from train.data.manifest import CorpusManifest
from train.data.sample_order import SampleOrder
from train.data.tokenizers import Tokenizer
from train.random_state import named_seed
from train.schema.data import DataConfig


def samples_per_epoch(manifest: CorpusManifest, sequence_length: int) -> int:
    """Samples in one pass over a corpus; the tokens of each begin with the last of the one before."""
    return (manifest.tokens("train") - 1) // sequence_length


class TrainingSamples:
    """Sample n of the training stream, for every n.

    Args:
        config: the `data` group.
        corpora: manifests of all corpora that the stream draws from ahead of where it is read.
        order: of the stream.
        seed: of the shuffles.
        cache: folder for mcore's index files.
        records: whether this process is the one that writes there (`train/data/index_files.py`).
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: Sequence[CorpusManifest],
        order: SampleOrder,
        seed: int,
        cache: Path,
        *,
        records: bool = True,
    ) -> None:
        self.config = config
        self.order = order
        self.seed = seed
        self.tokenizer: Tokenizer = corpora[0].tokenizer()
        self._cache = cache
        self._records = records
        self._corpora = {manifest.fingerprint: manifest for manifest in corpora}
        # Epochs that are open, by fingerprint and number.
        self._epochs: dict[tuple[str, int], GPTDataset] = {}

    def samples_per_epoch(self, fingerprint: str) -> int:
        """Samples in one pass over a corpus."""
        return samples_per_epoch(self._corpora[fingerprint], self.config.sequence_length)

    def _build_epoch(self, fingerprint: str, number: int) -> GPTDataset:
        """One pass over a corpus, shuffled for itself; collective in a job."""
        corpus = self._corpora[fingerprint]
        # mcore seeds numpy, which takes 32 bits.
        seed = named_seed(f"data/{self.seed}/{fingerprint}/{number}") % 2**32
        blends = [([str(corpus.path("train"))], None), None, None]
        config = dataset_config(self.config, self.tokenizer, seed, blends, fingerprint, self._cache)
        # Without a number of samples mcore makes one epoch.
        with built(self._cache, records=self._records):
            train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
        return train

    def open(self, first: int, samples: int) -> None:
        """Have every epoch open that a stretch of the training stream reads, on all ranks alike; collective in a job."""
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
            if number < begin.get(fingerprint, 0) // self.samples_per_epoch(fingerprint):
                del self._epochs[fingerprint, number]

    def epoch_of(self, number: int) -> GPTDataset:
        """The pass over a corpus that sample `number` is in; `open` has been asked for it."""
        fingerprint, position = self.order.place(number)
        return self._epochs[fingerprint, position // self.samples_per_epoch(fingerprint)]

    def sample(self, number: int) -> dict[str, Any]:
        """Sample `number` of the stream as mcore gives it; `open` has been asked for it."""
        fingerprint, position = self.order.place(number)
        found: dict[str, Any] = self.epoch_of(number)[position % self.samples_per_epoch(fingerprint)]
        return found
