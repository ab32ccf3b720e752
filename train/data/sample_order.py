"""Which sample of which corpus is the n-th of the training stream: a function of n and the blends alone.

    stream      n = 0, 1, 2, ...   without an end; a run that is made longer reads on where it would have ended
    blend       from one sample of the stream on, the corpora and the share of each
    position    samples of one corpus drawn before; position // (samples per epoch) is the epoch, the rest its place there

A blend that follows another goes on at each corpus' position, so no sample comes twice within an epoch, whatever was
blended before. Which corpus is next follows mcore's rule for blends (the one furthest behind its share), in a pattern
that repeats after 2^20 samples: any place can be looked up, whatever the length of the run.

A corpus may have a bound (`Share.most`). From the sample on at which it has given that many its share goes to the others
of the blend by their weights. The counts tell where that is, so the stream falls into pieces that are known in advance.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
        most: samples that the stream may have drawn of it since its beginning; None for no bound.
        replay: whether it is there to keep what the model knew; for the records.
    """

    fingerprint: str
    weight: float
    name: str = field(default="", compare=False)
    most: int | None = None
    replay: bool = field(default=False, compare=False)


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

    def length_of(self, fingerprint: str, count: int) -> int:
        """How many of the blend's first samples it takes to draw `count` of a corpus."""
        corpus = next(i for i, share in enumerate(self.shares) if share.fingerprint == fingerprint)
        patterns = count // int(self._per_pattern[corpus])
        return bisect_left(range((patterns + 1) * PATTERN), count, key=lambda n: self.counts(n)[fingerprint])

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
        return difference(self.shares, other.shares)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"first_sample": self.first_sample, "shares": [asdict(share) for share in self.shares]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Blend":
        """What `to_dict` gave."""
        return cls(values["first_sample"], tuple(Share(**share) for share in values["shares"]))


def difference(before: Sequence[Share], after: Sequence[Share]) -> str | None:
    """What the shares of one blend change about those of another, in words; None if they draw the same."""
    mine, theirs = ({share.fingerprint: share for share in shares} for shares in (before, after))
    for key in sorted(mine.keys() - theirs.keys()):
        return f"corpus {mine[key].name} (fingerprint {key[:12]}) is not in it any more"
    for key in sorted(theirs.keys() - mine.keys()):
        return f"corpus {theirs[key].name} (fingerprint {key[:12]}) is new"
    for key, share in sorted(mine.items()):
        other = theirs[key]
        if share.weight != other.weight:
            return f"the share of corpus {other.name} was {share.weight:.4g} and is {other.weight:.4g}"
        if share.most != other.most:
            bounds = ["without a bound" if s.most is None else f"at most {s.most} samples" for s in (share, other)]
            return f"max_epochs of corpus {other.name} meant {bounds[0]} and means {bounds[1]}"
    return None


def normalised(shares: Iterable[Share]) -> tuple[Share, ...]:
    """Shares that sum to 1, in an order that does not depend on the one they were listed in."""
    listed = sorted(shares, key=lambda share: share.fingerprint)
    total = sum(share.weight for share in listed)
    return tuple(replace(share, weight=share.weight / total) for share in listed)


def blend_of(first_sample: int, parts: Iterable[tuple[str, float, str]]) -> Blend:
    """A blend of (fingerprint, relative weight, name); their order does not matter."""
    return Blend(first_sample, normalised(Share(*part) for part in parts))


def continued(known: Sequence[Blend], wanted: Blend) -> list[Blend]:
    """The blends of a stream that goes on with `wanted`, which begins where the stream stands."""
    past = [blend for blend in known if blend.first_sample < wanted.first_sample]
    return past if past and past[-1].difference(wanted) is None else [*past, wanted]


class SampleOrder:
    """The whole training stream.

    Args:
        blends: in the order of their first samples; the first begins at 0.

    Attributes:
        blends: as given.
        pieces: what they come to: a blend without the corpora that have given all they may by then, for each of them.
        piece_of: for each piece the number of its blend.
        used_up_at: the first sample of the stream for which no corpus is left; None if there is none. From there on the
            bounds of that blend are passed over, so that whoever reads ahead can; whoever trains must not.
    """

    def __init__(self, blends: Sequence[Blend]) -> None:
        self.blends = list(blends)
        self.pieces: list[Blend] = []
        self.piece_of: list[int] = []
        self.used_up_at: int | None = None
        # Samples of each corpus drawn before each piece.
        self._before: list[dict[str, int]] = []
        ends = [blend.first_sample for blend in self.blends[1:]]
        before: dict[str, int] = {}
        for number, (blend, end) in enumerate(zip(self.blends, [*ends, None], strict=True)):
            before = self._cut(number, blend, end, before)
        self._firsts = [piece.first_sample for piece in self.pieces]

    def _cut(self, number: int, blend: Blend, end: int | None, before: dict[str, int]) -> dict[str, int]:
        """Cut one blend into pieces; what was drawn before it goes in, and what was drawn before `end` comes out."""
        first = blend.first_sample
        while True:
            left = [s for s in blend.shares if s.most is None or before.get(s.fingerprint, 0) < s.most]
            piece, bounds = blend, [s for s in left if s.most is not None]
            if not left:
                self.used_up_at = first if self.used_up_at is None else self.used_up_at
                piece = Blend(first, blend.shares)
            elif len(left) < len(blend.shares):
                piece = Blend(first, normalised(left))
            self.pieces.append(piece)
            self.piece_of.append(number)
            self._before.append(before)
            cuts = [piece.length_of(s.fingerprint, (s.most or 0) - before.get(s.fingerprint, 0)) for s in bounds]
            cut = first + min(cuts) if cuts else None
            if cut is None or (end is not None and cut >= end):
                return before if end is None else self._add(before, piece, end)
            before, first = self._add(before, piece, cut), cut

    @staticmethod
    def _add(before: Mapping[str, int], blend: Blend, sample: int) -> dict[str, int]:
        drawn = blend.counts(sample - blend.first_sample)
        return {key: before.get(key, 0) + drawn.get(key, 0) for key in before.keys() | drawn.keys()}

    def piece_at(self, sample: int) -> int:
        """Number of the piece that a sample of the stream is in."""
        return bisect_right(self._firsts, sample) - 1

    def place(self, sample: int) -> tuple[str, int]:
        """Fingerprint of the corpus of a sample of the stream, and its position in that corpus."""
        number = self.piece_at(sample)
        piece = self.pieces[number]
        share, drawn = piece.place(sample - piece.first_sample)
        return share.fingerprint, self._before[number].get(share.fingerprint, 0) + drawn

    def drawn(self, sample: int) -> dict[str, int]:
        """Samples of each corpus before sample `sample` of the stream."""
        number = self.piece_at(max(0, sample - 1))
        return self._add(self._before[number], self.pieces[number], sample)
