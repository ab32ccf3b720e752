"""What is told about the documents of a corpus: lengths, bytes per token, and what was left out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class LeftOut:
    """What of the input is not in the corpus."""

    empty: int
    """Documents with nothing but white space, or without a token."""
    bad: int
    """Documents that `--on-bad skip` left out."""
    over_limit: int
    """Documents left out by --limit-bytes."""
    repeated_files: int
    """Files reached through more than one INPUT or link, read once."""


def length_statistics(lengths: npt.NDArray[Any], text_bytes: int, appended: int) -> dict[str, Any]:
    """Statistics of one split.

    Args:
        lengths: tokens of every document, end-of-document tokens included [documents].
        text_bytes: UTF-8 bytes of all of them.
        appended: end-of-document tokens per document, 0 or 1.

    Returns:
        `tokens_per_document`: min, p5 to p99 (lengths that occur, by the inverted distribution), max and mean;
        `bytes_per_token`: text bytes over the tokens of text. Empty without documents.
    """
    if not len(lengths):
        return {}
    points = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    own = int(lengths.sum()) - appended * len(lengths)
    return {
        "tokens_per_document": {
            "min": int(lengths.min()),
            **{f"p{percent}": int(point) for percent, point in zip(PERCENTILES, points, strict=True)},
            "max": int(lengths.max()),
            "mean": round(float(lengths.mean()), 3),
        },
        "bytes_per_token": round(text_bytes / own, 4) if own else None,
    }
