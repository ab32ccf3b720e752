"""The `evaluation` group: how often, how much, and on which validation sets."""

import re
from dataclasses import dataclass, field

from model.config import one_of, positive
from parallel.errors import ConfigError

# Name of the set that is the held-out part of the training blend.
BLEND_SET = "valid"
_MAX_SETS = 16


def check_set_name(key: str, name: str) -> None:
    """Check the name of a validation set.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if not re.fullmatch("[a-z0-9_-]+", name):
        raise ConfigError(f"{key}={name!r}: use lower-case letters, digits, - and _")


@dataclass
class EvaluationSet:
    """One named validation set."""

    # Name of the set in events, trackers and the report: lower-case letters, digits, - and _.
    name: str = ""
    # What `python -m train.corpus ... --output PREFIX` was given.
    prefix: str = ""
    # Part of the corpus that is evaluated: valid (held out by the corpus command) or train.
    split: str = "valid"
    # Global batches per evaluation; null takes `evaluation.batches`.
    batches: int | None = None


@dataclass
class EvaluationConfig:
    """Validation loss on the held-out part of the training corpora, and on sets of your own."""

    # Evaluate every so many steps; null evaluates only around expansions and at the end.
    interval_steps: int | None = 100
    # Global batches per evaluation and set.
    batches: int = 8
    # Validation sets beside the held-out part of the training corpora (docs/evaluation.md).
    sets: list[EvaluationSet] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        positive("evaluation.interval_steps", self.interval_steps)
        positive("evaluation.batches", self.batches)
        if len(self.sets) > _MAX_SETS:
            raise ConfigError(f"evaluation.sets holds {len(self.sets)} sets: use {_MAX_SETS} at most")
        seen = {BLEND_SET: "the held-out part of the training corpora"}
        for i, entry in enumerate(self.sets):
            key = f"evaluation.sets[{i}]"
            check_set_name(f"{key}.name", entry.name)
            if entry.name in seen:
                raise ConfigError(f"{key}.name={entry.name} is the name of {seen[entry.name]}: choose another")
            seen[entry.name] = key
            if not entry.prefix:
                raise ConfigError(f"{key}.prefix is empty: name a corpus")
            one_of(f"{key}.split", entry.split, ("valid", "train"))
            positive(f"{key}.batches", entry.batches)
