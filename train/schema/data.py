"""The `data` group of a run's configuration: its corpora, how they are blended, and the shape of a step."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from model.config import positive
from parallel.errors import ConfigError
from train.data.blends import TRIGGERS


@dataclass
class CorpusWeight:
    """One corpus of a blend."""

    # What `python -m train.corpus ... --output PREFIX` was given.
    prefix: str = ""
    # Share of the training samples, relative to the other corpora.
    weight: float = 1.0
    # Passes over it since the run began, after which its share goes to the others by their weights; null: no bound.
    max_epochs: float | None = None
    # General text that keeps what the model knew: marked in what a run prints and records.
    replay: bool = False


@dataclass
class BlendPhase:
    """One later blend. Of those whose time has come the last in the list is read."""

    # Begins after this optimizer step. Give one of `at_step`, `at_tokens` and `at_stage`.
    at_step: int | None = None
    # Begins after the step in which the run reaches this many training tokens.
    at_tokens: int | None = None
    # Begins with this stage, the first being 0, wherever the stage comes from.
    at_stage: int | None = None
    # Its corpora, as in `data.blend`.
    blend: list[CorpusWeight] = field(default_factory=list)

    def check(self, key: str, steps: int) -> None:
        """Check the trigger.

        Args:
            key: of this element, for messages.
            steps: of the run.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        given = [name for name in TRIGGERS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"{key}: give one of {', '.join(TRIGGERS)} (got {', '.join(given) or 'none'})")
        positive(f"{key}.{given[0]}", getattr(self, given[0]))
        if self.at_step is not None and self.at_step >= steps:
            raise ConfigError(
                f"{key}.at_step={self.at_step} is past the end of the run: use a step below run.steps={steps}"
            )
        if not self.blend:
            raise ConfigError(f"{key}.blend is empty: name its corpora")


def _numbered(key: str, parts: list[CorpusWeight]) -> Iterator[tuple[str, CorpusWeight]]:
    return ((f"{key}[{i}].prefix", part) for i, part in enumerate(parts))


@dataclass
class DataConfig:
    """Tokens in: corpora, and the shape of a step."""

    # Prefix of one corpus; or several in `blend`.
    corpus: str | None = None
    blend: list[CorpusWeight] = field(default_factory=list)
    # Blends that follow `corpus` or `blend`, each from a step, a number of tokens or a stage on.
    schedule: list[BlendPhase] = field(default_factory=list)
    # Tokens per sample.
    sequence_length: int = 256
    # Samples per forward-backward on one data-parallel rank.
    micro_batch_size: int = 4
    # Samples per optimizer step over all ranks; gradient accumulation is derived.
    global_batch_size: int = 8
    # Go on with other corpora, weights or schedule than the checkpoint's, from its position on.
    allow_change: bool = False
    # Tokens attend to their own document only.
    document_attention: bool = False
    # Leave the first token of a document, which nothing foretells, out of the loss.
    mask_boundary_loss: bool = False

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in ("sequence_length", "micro_batch_size", "global_batch_size"):
            positive(f"data.{key}", getattr(self, key))
        for key, parts in self._listed():
            for i, part in enumerate(parts):
                positive(f"{key}[{i}].weight", part.weight)
                positive(f"{key}[{i}].max_epochs", part.max_epochs)
                if not part.prefix:
                    raise ConfigError(f"{key}[{i}].prefix is empty: name a corpus")

    def _listed(self) -> list[tuple[str, list[CorpusWeight]]]:
        later = [(f"data.schedule[{i}].blend", phase.blend) for i, phase in enumerate(self.schedule)]
        return [("data.blend", self.blend), *later]

    def blends(self) -> list[list[tuple[str, CorpusWeight]]]:
        """Every blend of the run, that of the beginning first: its corpora, each with the key of its prefix.

        Raises:
            ConfigError: as `corpora`.
        """
        first, found = self.corpora(), [[*_numbered(*parts)] for parts in self._listed()]
        return [[("data.corpus", first[0])], *found[1:]] if self.corpus else found

    def corpora(self) -> list[CorpusWeight]:
        """The corpora that the run begins with, and their weights.

        Raises:
            ConfigError: if none or both forms are given.
        """
        if self.corpus and self.blend:
            raise ConfigError(f"data.corpus={self.corpus} and data.blend are both set: use one of them")
        if self.corpus:
            return [CorpusWeight(prefix=self.corpus)]
        if not self.blend:
            raise ConfigError(
                "data.corpus is not set: build one with `python -m train.corpus INPUT --output PREFIX` and give "
                "data.corpus=PREFIX"
            )
        return self.blend
