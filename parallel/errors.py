"""Typed errors of Coppice: one line that names the key, the value and the remedy.

Every error a user can cause is a `CoppiceError`. Entry points print `error: <message>` on rank 0, without a traceback,
and exit with `exit_code` on every rank. Anything else is a defect of ours and keeps its traceback.
"""

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

# Letters of a value that a message shows.
_LETTERS = 80


def nearest(word: str, known: Iterable[str] | Mapping[str, str], likeness: float = 0.5) -> str:
    """The end of a message about an unknown word: the known one that was meant, if any is close.

    Args:
        word: as given.
        known: words; a mapping says what each is called in the message.
        likeness: how much of two words has to agree, 1 being all.
    """
    names = known if isinstance(known, Mapping) else {name: name for name in known}
    (close,) = difflib.get_close_matches(word, names, n=1, cutoff=likeness) or [None]
    return "" if close is None else f"; did you mean {names[close]}?"


def shown(value: Any) -> str:
    """A value as a message shows it, on one line."""
    if value is None:
        return "null"
    text = " ".join((str(value).lower() if isinstance(value, bool) else str(value)).split())
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..."


class CoppiceError(Exception):
    """Base of all errors that tell a user what to change."""

    exit_code = 1
    # Whether this process prints the error; None leaves it to rank 0, which is right where every rank fails alike.
    speaks: bool | None = None

    def tell(self) -> int:
        """Print the error, if this process is the one to print it, and give the exit code."""
        if self.speaks or (self.speaks is None and os.environ.get("RANK", "0") == "0"):
            print(f"error: {self}", file=sys.stderr, flush=True)
        return self.exit_code


class ConfigError(CoppiceError):
    """A configuration value is unknown, of the wrong type, or impossible in combination with another."""

    exit_code = 2


class DataError(CoppiceError):
    """A corpus or an input file is missing, empty, unreadable or not what the run expects."""

    exit_code = 3


class CheckpointError(CoppiceError):
    """A checkpoint is missing, incomplete, of another model, or cannot be written."""

    exit_code = 4


class ExpansionError(CoppiceError):
    """An expansion could not be planned, carried out or verified; the old stage is on disk, intact."""

    exit_code = 5


class LaunchError(CoppiceError):
    """The processes could not find each other (a port in use, a missing rank), or one of them hangs or is gone."""

    exit_code = 6
