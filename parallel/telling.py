"""Ranks tell each other what they hold, each distinct part of it once.

A thousand ranks that send their descriptions to each other would move tens of megabytes to every one of them, and each
would take seconds to read them, while the whole job waits. But ranks hold much alike: the weights of all data ranks are
the same. So the parts of a description are told by their digests first, and each distinct part by one of its ranks.
"""

import hashlib
import pickle
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence

from parallel.layout import Layout
from parallel.reshard_plan import Holding, Holdings, Parts

# Digest -> bytes of the part.
_Sizes = Mapping[bytes, int]


def tell(sides: Sequence[Holdings], kind_of: Callable[[str], Hashable], layout: Layout) -> list[Parts]:
    """What every rank holds, on every rank; collective over the job.

    Args:
        sides: descriptions of this rank, as many on every rank.
        kind_of: key -> anything; keys of one kind are told together, so they should be those that ranks hold alike.
        layout: of the job; only its world matters.

    Returns:
        For each side its parts with their ranks, ascending, in an order that is the same on all ranks.
    """
    digests, packed = announce(sides, kind_of)
    told: list[tuple[list[list[bytes]], _Sizes]] = layout.gather_objects(
        (digests, {digest: len(blob) for digest, blob in packed.items()})
    )
    speakers = choose_speakers([sizes for _, sizes in told])
    spoken: dict[bytes, bytes] = {}
    for theirs in layout.gather_objects({d: b for d, b in packed.items() if speakers[d] == layout.rank}):
        spoken |= theirs
    return put_together([theirs for theirs, _ in told], spoken)


def announce(
    sides: Sequence[Holdings], kind_of: Callable[[str], Hashable]
) -> tuple[list[list[bytes]], dict[bytes, bytes]]:
    """The digests of the parts of each side, and digest -> packed part."""
    found = [{digest_of(part): part for part in split(side, kind_of)} for side in sides]
    return [list(parts) for parts in found], {digest: pack(part) for parts in found for digest, part in parts.items()}


def put_together(everyones: Sequence[Sequence[Sequence[bytes]]], spoken: Mapping[bytes, bytes]) -> list[Parts]:
    """For each side its parts with their ranks.

    Args:
        everyones: rank by rank, the digests of the parts of each side.
        spoken: digest -> packed part, of all of them.
    """
    parts = {digest: unpack(blob) for digest, blob in spoken.items()}
    found: list[Parts] = []
    for number in range(len(everyones[0])):
        ranks: dict[bytes, list[int]] = {}
        for rank, digests in enumerate(everyones):
            for digest in digests[number]:
                ranks.setdefault(digest, []).append(rank)
        found.append([(parts[digest], holders) for digest, holders in ranks.items()])
    return found


def split(holdings: Holdings, kind_of: Callable[[str], Hashable]) -> list[dict[str, Holding]]:
    """The keys of each kind; equal holdings are one object in all of them."""
    found: dict[Hashable, dict[str, Holding]] = {}
    same: dict[Holding, Holding] = {}
    for key in sorted(holdings):
        holding = holdings[key]
        found.setdefault(kind_of(key), {})[key] = same.setdefault(holding, holding)
    return list(found.values())


def digest_of(part: Holdings) -> bytes:
    """Equal for equal parts; what pickle writes depends on which of their numbers are one object."""
    texts = {id(holding): repr(holding) for holding in part.values()}
    return hashlib.sha256("\n".join(f"{key} {texts[id(held)]}" for key, held in part.items()).encode()).digest()


def pack(part: Holdings) -> bytes:
    """A part as bytes: equal holdings once, and the keys, which are much alike, compressed."""
    return zlib.compress(pickle.dumps(part, protocol=pickle.HIGHEST_PROTOCOL), 1)


def unpack(blob: bytes) -> Holdings:
    """What `pack` was given."""
    part: Holdings = pickle.loads(zlib.decompress(blob))
    return part


def choose_speakers(everyones: Sequence[_Sizes]) -> dict[bytes, int]:
    """Which rank tells each part: in messages of equal length, which is that of the longest, so the load is shared out.

    Args:
        everyones: rank by rank, the bytes of its parts.
    """
    holders: dict[bytes, list[int]] = {}
    sizes: dict[bytes, int] = {}
    for rank, theirs in enumerate(everyones):
        for digest, size in theirs.items():
            holders.setdefault(digest, []).append(rank)
            # Equal parts may differ in bytes, by what was one object where they were made.
            sizes[digest] = max(size, sizes.get(digest, 0))
    loads, chosen = [0] * len(everyones), {}
    for digest in sorted(holders, key=lambda d: (-sizes[d], d)):
        chosen[digest] = min(holders[digest], key=lambda rank: (loads[rank], rank))
        loads[chosen[digest]] += sizes[digest]
    return chosen
