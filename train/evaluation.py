"""Validation: named sets of samples that stay the same for the whole run, the loss on each, and what is recorded of it.

The first set is the held-out part of the training blend, named `valid`, where there is any; then come `evaluation.sets` in
their order. The loss of the first one is the run's validation loss: what the guard and exact mode go by. Several sets show
what a single number hides: a model that gets better at its new domain while it forgets what it knew.

    sets = open_sets(settings.evaluation, settings.data, corpora)       # before any process group: refuses by name
    evaluation = Evaluation(sets, settings.data, tokenizer, seed, cache, records=layout.rank == 0)
    evaluate(run)                                                       # between two steps; recorded

Which samples a set has follows from its corpus, the seed of the run's data and the number of batches: not from the layout,
so `python -m train.evaluate` finds the same ones later.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from model.divergence import Siblings
from parallel.errors import DataError
from parallel.layout import Layout
from train.data.batches import Batch, dataset_config, micro_batches, read_batch
from train.data.index_files import built
from train.data.manifest import CorpusManifest, load_manifest
from train.data.stream import refuse_without_ends
from train.data.tokenizers import Tokenizer
from train.schema.data import CorpusWeight, DataConfig
from train.schema.evaluation import BLEND_SET, EvaluationConfig, EvaluationSet
from train.stage import Network
from train.step import run_micro_batches

if TYPE_CHECKING:
    from train.run import Run

# Where e to this many nats per token would leave the range of a float.
_MAX_NATS = 700.0


@dataclass(frozen=True)
class ValidationSet:
    """One set, opened; made by `open_sets` and `open_set`.

    Attributes:
        name: of the set.
        corpora: its corpora, with the share of each.
        split: of the corpora, valid or train.
        batches: global batches per evaluation.
    """

    name: str
    corpora: tuple[tuple[CorpusWeight, CorpusManifest], ...]
    split: str
    batches: int

    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token of the split, by the share of each corpus; None if a manifest has none on record.

        Of the split, not of the samples: one that begins or ends inside a character has no length in bytes.
        """
        rates = [m.splits[self.split].bytes / m.tokens(self.split) for _, m in self.corpora]
        if not all(rates):
            return None
        total = sum(part.weight for part, _ in self.corpora)
        return sum(part.weight / total * rate for (part, _), rate in zip(self.corpora, rates, strict=True))


def open_sets(
    config: EvaluationConfig, data: DataConfig, corpora: Sequence[tuple[CorpusWeight, CorpusManifest]]
) -> list[ValidationSet]:
    """The validation sets of a run, the one that the guard goes by first.

    Args:
        config: the `evaluation` group.
        data: the `data` group.
        corpora: what `train.data.stream.open_corpora` returned.

    Raises:
        DataError: if the corpus of a set is missing, too short, or of another tokenizer than the run's.
    """
    held_out = tuple((part, m) for part, m in corpora if m.tokens("valid") > data.sequence_length)
    sets = [ValidationSet(BLEND_SET, held_out, "valid", config.batches)] if held_out else []
    first, manifest = corpora[0]
    for i, entry in enumerate(config.sets):
        opened = open_set(entry, f"evaluation.sets[{i}] ({entry.name}): prefix", data, config.batches)
        refuse_other_tokenizer(opened, manifest.tokenizer_digest, f"{first.prefix} {manifest.tokenizer_spec}")
        sets.append(opened)
    return sets


def open_set(entry: EvaluationSet, key: str, data: DataConfig, batches: int | None) -> ValidationSet:
    """Open the corpus of one set.

    Args:
        entry: as configured.
        key: what messages call its prefix.
        data: the `data` group.
        batches: where the set does not say; None for as many as the split fills.

    Raises:
        DataError: if the corpus is missing or too short.
    """
    manifest = load_manifest(entry.prefix, key)
    tokens, batches = manifest.tokens(entry.split), entry.batches or batches
    if tokens <= data.sequence_length:
        raise DataError(
            f"{key}={entry.prefix} holds {tokens} tokens in its {entry.split} split, fewer than one sample of "
            f"data.sequence_length={data.sequence_length}: use more text, another split, or build it with a larger "
            "--validation-fraction"
        )
    refuse_without_ends(replace(data, mask_boundary_loss=False), key, manifest)
    if batches is None:
        samples = (tokens - 1) // data.sequence_length
        batches = samples // data.global_batch_size
        if not batches:
            raise DataError(
                f"{key}={entry.prefix} holds {samples} samples in its {entry.split} split, fewer than one batch of "
                f"data.global_batch_size={data.global_batch_size}: lower data.global_batch_size, or give a number of batches"
            )
    return ValidationSet(entry.name, ((CorpusWeight(prefix=entry.prefix), manifest),), entry.split, batches)


def refuse_other_tokenizer(opened: ValidationSet, digest: str, whose: str) -> None:
    """Refuse a set whose token ids mean something else.

    Args:
        opened: the set.
        digest: of the tokenizer that it must have.
        whose: what has that tokenizer, for the message.

    Raises:
        DataError: naming the set and both.
    """
    for part, manifest in opened.corpora:
        if manifest.tokenizer_digest != digest:
            raise DataError(
                f"validation set {opened.name}: corpus {part.prefix} uses tokenizer {manifest.tokenizer_spec} (digest "
                f"{manifest.tokenizer_digest[:12]}), another than {whose} (digest {digest[:12]}): build it with that "
                "tokenizer"
            )


@dataclass(frozen=True)
class Figures:
    """What one evaluation of a set found, the same on all ranks.

    Attributes:
        loss: mean cross-entropy of the next token, in nats per token.
        bits_per_byte: the same per UTF-8 byte of the text; None where the bytes are not on record.
        tokens: tokens predicted.
        seconds: it took, on this rank.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.inf if self.loss > _MAX_NATS else math.exp(self.loss)

    def to_dict(self) -> dict[str, float | int | None]:
        """What events say of the set."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


class Evaluation:
    """Validation sets and their samples; making one is collective.

    Args:
        sets: what to evaluate on.
        data: the `data` group.
        tokenizer: of all of them.
        seed: of the shuffles, that of the run's data.
        cache: folder for mcore's index files, shared by all ranks.
        records: whether this rank is the one that writes there.
    """

    def __init__(
        self,
        sets: Sequence[ValidationSet],
        data: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        cache: Path,
        *,
        records: bool,
    ) -> None:
        self.sets = sets
        # Every token counts here: a run that leaves some out of its loss compares with one that does not.
        self._data = replace(data, mask_boundary_loss=False)
        self._samples = {opened.name: _build(opened, self._data, tokenizer, seed, cache, records) for opened in sets}

    def batch(self, name: str, number: int, layout: Layout) -> list[Batch]:
        """This rank's micro-batches of a global batch of a set; the same ones at every evaluation."""
        first = number * self._data.global_batch_size
        return read_batch(self._samples[name].__getitem__, first, self._data, layout)

    def measure(self, network: Network, layout: Layout, poll: Callable[[], None]) -> dict[str, Figures]:
        """Evaluate a model on every set; collective.

        Args:
            network: the model; it is in training mode afterwards.
            layout: its process groups.
            poll: called before each batch on all ranks; what it raises ends the evaluation.

        Returns:
            Figures by the name of the set, in the order of the sets.
        """
        for chunk in network.wrapped:
            chunk.eval()
        try:
            return {opened.name: self._figures(opened, network, layout, poll) for opened in self.sets}
        finally:
            for chunk in network.wrapped:
                chunk.train()

    def _figures(self, opened: ValidationSet, network: Network, layout: Layout, poll: Callable[[], None]) -> Figures:
        began = time.perf_counter()
        loss = self._mean_loss(opened, network, layout, poll)
        rate = opened.bytes_per_token()
        tokens = opened.batches * self._data.global_batch_size * self._data.sequence_length
        return Figures(loss, loss / math.log(2) / rate if rate else None, tokens, time.perf_counter() - began)

    def _mean_loss(self, opened: ValidationSet, network: Network, layout: Layout, poll: Callable[[], None]) -> float:
        """Loss in nats per token over the batches of a set, equal on all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=layout.device)
        with torch.no_grad():
            for number in range(opened.batches):
                poll()
                batch = self.batch(opened.name, number, layout)
                total += run_micro_batches(network, layout, batch, forward_only=True)
        # One number at a time: the sum of a set has the same bits whatever other sets there are.
        layout.sum_over_world(total)
        return (total / (opened.batches * micro_batches(self._data, layout) * layout.data_size)).item()


def _build(opened: ValidationSet, data: DataConfig, tokenizer: Tokenizer, seed: int, cache: Path, records: bool) -> Any:
    """The samples of a set, drawn once; collective."""
    paths = [str(m.path(opened.split)) for _, m in opened.corpora]
    weights = [part.weight for part, _ in opened.corpora] if len(paths) > 1 else None
    fingerprint = "+".join(m.fingerprint for _, m in opened.corpora)
    # In mcore's slot for validation, whichever split of the corpus it is.
    config = dataset_config(data, tokenizer, seed, [None, (paths, weights), None], fingerprint, cache)
    samples = [0, opened.batches * data.global_batch_size, 0]
    with built(cache, records=records):
        return BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()[1]


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run.

    Attributes:
        step: after which.
        stage: in which.
        sets: figures by name.
    """

    step: int
    stage: int
    sets: Mapping[str, Figures]

    @property
    def loss(self) -> float:
        """The validation loss of the run, in nats per token: that of the first set."""
        return next(iter(self.sets.values())).loss


def open_evaluation(run: "Run") -> Evaluation:
    """The validation sets of a run, whose data are open; collective.

    Raises:
        DataError: as `open_sets`.
    """
    data = run.settings.data
    with run.layout.together("opening the validation sets"):
        sets = open_sets(run.settings.evaluation, data, run.corpora)
    cache, records = run.files.run_dir / "cache", run.layout.rank == 0
    return Evaluation(sets, data, run.data.tokenizer, run.data.seed, cache, records=records)


def evaluate(run: "Run") -> Evaluated | None:
    """What the validation sets say where a run stands, found and recorded once; None without any; collective.

    Raises:
        Stopping: on all ranks, if any was asked to stop; a run that resumes here evaluates first.
    """
    if not run.evaluation.sets:
        return None
    last = run.evaluated
    if last is not None and (last.step, last.stage) == (run.step, run.stage.number):
        return last
    run.let_go()
    run.owes_evaluation = True

    def poll() -> None:
        run.watchdog.tick()
        run.stop.raise_if_agreed(run.layout)

    with run.watchdog.act(f"evaluation after step {run.step}"):
        sets = run.evaluation.measure(run.stage, run.layout, poll)
    run.owes_evaluation = False
    run.evaluated = evaluated = Evaluated(run.step, run.stage.number, sets)
    _record(run, evaluated)
    if run.guard is not None:
        run.guard.observe(run.step, evaluated.loss)
    return evaluated


def _record(run: "Run", evaluated: Evaluated) -> None:
    """Tell of an evaluation, with the divergence of siblings; collective."""
    parents = dict(zip(run.stage.load.layer_numbers, run.parents() or (), strict=False))
    sets = {name: figures.to_dict() for name, figures in evaluated.sets.items()}
    run.event(
        "evaluation",
        valid_loss=evaluated.loss,
        tokens=next(iter(evaluated.sets.values())).tokens,
        sets=sets,
        **Siblings(run.stage.chunks, run.layout, parents).figures(run.stage.optimizer),
    )
    tracked = {f"valid/{name}/{key}": v for name, told in sets.items() for key, v in told.items() if key != "tokens"}
    run.tracker.log(run.step, {"valid_loss": evaluated.loss, **{k: v for k, v in tracked.items() if v is not None}})
    run.console.observe({"valid_loss": evaluated.loss})
    named = [f"{name} {figures.loss:.4f}" for name, figures in evaluated.sets.items()]
    run.console.say(
        f"step {run.step}: validation loss {', '.join(named) if len(named) > 1 else f'{evaluated.loss:.4f}'}"
    )
