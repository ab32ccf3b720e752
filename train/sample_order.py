"""Which sample of which corpus is the n-th of the training stream: a function of n and the blends alone.

    stream      n = 0, 1, 2, ...   without an end; a run that is made longer reads on where it would have ended
    blend       from one sample of the stream on, the corpora and the share of each
    position    samples of one corpus drawn before; position // (samples per epoch) is the epoch, the rest its place there

A blend that follows another goes on at each corpus' position, so no sample comes twice within an epoch, whatever was
blended before. Which corpus is next follows mcore's rule for blends (the one furthest behind its share), in a pattern
that repeats after 2^20 samples: any place can be looked up, whatever the length of the run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import ConfigError

PATTERN = 1 << 20
_MARK = 1 << 12


@dataclass(frozen=True)
class Share:
    """One corpus of a blend.

    Attributes:
        fingerprint: of its content; the same corpus under another name is the same.
        weight: share of the samples; those of a blend sum to 1.
        name: for messages.
    """

    fingerprint: str
    weight: float
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class Blend:
    """What the training stream is made of from `first_sample` on; made by `blend_of`."""

    first_sample: int
    shares: tuple[Share, ...]

    @cached_property
    def _pattern(self) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Of each sample of the pattern, its corpus and its number among those of that corpus, [PATTERN] each."""
        from megatron.core.datasets import helpers

        which, ordinal = np.zeros(PATTERN, np.int16), np.zeros(PATTERN, np.int64)
        weights = np.array([share.weight for share in self.shares])
        helpers.build_blending_indices(which, ordinal, weights, len(weights), PATTERN, False)
        return which, ordinal

    @cached_property
    def _marks(self) -> npt.NDArray[np.int64]:
        """How many samples of each corpus lie before every `_MARK`-th sample of the pattern, and in all of it.

        Every step asks for counts: from the nearest mark there is little left to count.
        """
        each = [(self._pattern[0].reshape(-1, _MARK) == corpus).sum(axis=1) for corpus in range(len(self.shares))]
        return np.vstack([np.zeros(len(self.shares), np.int64), np.cumsum(np.stack(each, axis=1), axis=0)])

    @property
    def _per_pattern(self) -> npt.NDArray[np.int64]:
        return self._marks[-1]

    def place(self, number: int) -> tuple[Share, int]:
        """The corpus of the blend's sample `number`, from 0, and how many of that corpus come before it in the blend."""
        patterns, rest = divmod(number, PATTERN)
        which, ordinal = self._pattern
        corpus = int(which[rest])
        return self.shares[corpus], patterns * int(self._per_pattern[corpus]) + int(ordinal[rest])

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the blend's first `samples` are of each corpus, by fingerprint."""
        patterns, rest = divmod(samples, PATTERN)
        mark = rest // _MARK
        begun = np.bincount(self._pattern[0][mark * _MARK : rest], minlength=len(self.shares))
        begun += self._marks[mark] + patterns * self._per_pattern
        return {share.fingerprint: int(n) for share, n in zip(self.shares, begun, strict=True)}

    def refuse_tiny_shares(self, keys: Mapping[str, str]) -> None:
        """Refuse a corpus whose share the pattern cannot keep.

        Args:
            keys: fingerprint -> the key that sets its weight.

        Raises:
            ConfigError: naming the key.
        """
        for share in self.shares:
            if share.weight * PATTERN < 1:
                raise ConfigError(
                    f"{keys[share.fingerprint]} is a share of {share.weight:.1e}, less than one sample in {PATTERN:,}: "
                    "raise it, or leave the corpus out"
                )

    def difference(self, other: "Blend") -> str | None:
        """What `other` changes, in words; None if it draws the same."""
        mine, theirs = ({s.fingerprint: s for s in blend.shares} for blend in (self, other))
        for key in sorted(mine.keys() - theirs.keys()):
            return f"corpus {mine[key].name} (fingerprint {key[:12]}) is not in it any more"
        for key in sorted(theirs.keys() - mine.keys()):
            return f"corpus {theirs[key].name} (fingerprint {key[:12]}) is new"
        for key in sorted(mine):
            if mine[key].weight != theirs[key].weight:
                return (
                    f"the share of corpus {theirs[key].name} was {mine[key].weight:.4g} and is {theirs[key].weight:.4g}"
                )
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"first_sample": self.first_sample, "shares": [asdict(share) for share in self.shares]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Blend":
        """What `to_dict` gave."""
        return cls(values["first_sample"], tuple(Share(**share) for share in values["shares"]))


def blend_of(first_sample: int, parts: Iterable[tuple[str, float, str]]) -> Blend:
    """A blend of (fingerprint, relative weight, name); their order does not matter."""
    listed = sorted(parts)
    total = sum(weight for _, weight, _ in listed)
    return Blend(first_sample, tuple(Share(key, weight / total, name) for key, weight, name in listed))


def continued(known: Sequence[Blend], wanted: Blend) -> list[Blend]:
    """The blends of a stream that goes on with `wanted`, which begins where the stream stands."""
    if known and known[-1].difference(wanted) is None:
        return list(known)
    return [*(blend for blend in known if blend.first_sample < wanted.first_sample), wanted]


class SampleOrder:
    """The whole training stream.

    Args:
        blends: in the order of their first samples; the first begins at 0.
    """

    def __init__(self, blends: Sequence[Blend]) -> None:
        self.blends = list(blends)
        # Samples of each corpus drawn before each blend.
        self._before: list[dict[str, int]] = [{}]
        for blend, following in zip(self.blends, self.blends[1:], strict=False):
            self._before.append(self._add(self._before[-1], blend, following.first_sample))

    @staticmethod
    def _add(before: Mapping[str, int], blend: Blend, sample: int) -> dict[str, int]:
        drawn = blend.counts(sample - blend.first_sample)
        return {key: before.get(key, 0) + drawn.get(key, 0) for key in before.keys() | drawn.keys()}

    def _blend(self, sample: int) -> int:
        return max(i for i, blend in enumerate(self.blends) if blend.first_sample <= sample)

    def place(self, sample: int) -> tuple[str, int]:
        """Fingerprint of the corpus of a sample of the stream, and its position in that corpus."""
        number = self._blend(sample)
        blend = self.blends[number]
        share, drawn = blend.place(sample - blend.first_sample)
        return share.fingerprint, self._before[number].get(share.fingerprint, 0) + drawn

    def drawn(self, sample: int) -> dict[str, int]:
        """Samples of each corpus before sample `sample` of the stream."""
        number = self._blend(max(0, sample - 1))
        return self._add(self._before[number], self.blends[number], sample)
