"""What becomes of every document: trained on, held out, or left out.

What: `scan_part` reads a part through and checks it, `assign_splits` decides.
Why: the choice has to be the same on every machine and in every order of work, so it hangs on a document's own name
and the seed; and a bad byte in the last file has to stop a build before it wrote the first token.
How: train/corpus/build.py scans all parts, joins what they found, and assigns the splits.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import DataError
from train.corpus.documents import Document, read_part
from train.corpus.parts import Part

LEFT_OUT, TRAIN, VALID = 0, 1, 2  # what becomes of a document
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Scan:
    """What the first pass found."""

    sizes: npt.NDArray[Any]
    """Bytes of text per document; 0 if there is none, BAD_BYTES if the document is bad (int64)."""
    draws: npt.NDArray[Any]
    """Two random numbers per document, drawn from the seed and its name (uint64) [documents, 2]."""
    faults: tuple[str, ...] = ()
    """What is wrong with the first bad documents, SHOWN_FAULTS at most."""


def scan(documents: Iterable[Document], seed: int, skip_bad: bool = False) -> Scan:
    """Reads documents through, so that bad input is found before anything is written.

    Raises:
        DataError: a bad document, unless `skip_bad`.
    """
    sizes, draws = array("q"), array("Q")
    faults: list[str] = []
    for document in documents:
        if document.fault is not None:
            if not skip_bad:
                raise DataError(f"{document.fault} (or leave such documents out with --on-bad skip)")
            if len(faults) < SHOWN_FAULTS:
                faults.append(document.fault)
        # The bytes that a file's name has on the disk, which need not be UTF-8, nor what the locale makes of them.
        digest = hashlib.blake2b(f"{seed}\0".encode() + os.fsencode(document.name), digest_size=16).digest()
        sizes.append(document.bytes)
        draws.append(int.from_bytes(digest[:8], "little"))
        draws.append(int.from_bytes(digest[8:], "little"))
    numbers = np.frombuffer(draws, dtype=np.uint64).reshape(-1, 2)
    return Scan(np.frombuffer(sizes, dtype=np.int64), numbers, tuple(faults))


def scan_part(text_key: str, seed: int, skip_bad: bool, part: Part) -> Scan:
    """`scan` of one part; runs in any process."""
    return scan(read_part(part, text_key), seed, skip_bad)


def joined(scans: Sequence[Scan]) -> Scan:
    """The scan of all parts."""
    return Scan(
        np.concatenate([scan.sizes for scan in scans]),
        np.concatenate([scan.draws for scan in scans]),
        tuple(fault for scan in scans for fault in scan.faults)[:SHOWN_FAULTS],
    )


def assign_splits(
    sizes: npt.NDArray[Any], draws: npt.NDArray[Any], fraction: float, limit_bytes: int | None
) -> npt.NDArray[Any]:
    """Decides for every document whether it is left out, trained on or held out.

    A document is held out when its own draw is below `fraction`, so adding documents moves none of the others; the
    exception is that two or more documents always leave at least one on each side.

    Args:
        sizes: bytes per document, 0 for empty ones, BAD_BYTES for bad ones.
        draws: two uniform 64-bit numbers per document: for the split, and for the order of the sample.
        fraction: expected share of held-out documents; 0 for none.
        limit_bytes: cap on the text taken: documents are taken in the order of their draw while they fit.

    Returns:
        LEFT_OUT, TRAIN or VALID per document (uint8).
    """
    codes = np.zeros(len(sizes), dtype=np.uint8)
    taken = np.flatnonzero(sizes > 0)
    if limit_bytes is not None:
        room, chosen = limit_bytes, []
        for index in taken[np.argsort(draws[taken, 1], kind="stable")].tolist():
            if sizes[index] <= room:
                room -= int(sizes[index])
                chosen.append(index)
        taken = np.array(sorted(chosen), dtype=np.int64)
    codes[taken] = TRAIN
    if fraction > 0 and len(taken) >= 2:
        draw = draws[taken, 0]
        held_out = draw < np.uint64(int(fraction * 2**64))
        if not held_out.any():
            held_out[np.argmin(draw)] = True
        if held_out.all():
            held_out[np.argmax(draw)] = False
        codes[taken[held_out]] = VALID
    return codes
