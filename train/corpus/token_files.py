"""Writing token files: through mcore's builder into a staging folder, then all at once to their names.

What: `SplitWriter` writes the .bin and .idx of one split, `publish` moves finished files to PREFIX.*, `fingerprint`
names their content.
Why: a job that opens a half-written corpus trains on it without a complaint; the manifest PREFIX.json is therefore
the one mark of a whole corpus, removed first and written last.
How: train/corpus/build.py is the only user.
"""

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import ConfigError
from train.data.manifest import SPLITS
from train.data.tokenizers import Tokenizer

TOKEN_FILES = tuple(f".{split}{end}" for split in SPLITS for end in (".bin", ".idx"))


def token_type(vocab_size: int) -> type[np.number[Any]]:
    """The type of a token by mcore's rule: uint16 for vocabularies below 65,500, else int32."""
    from parallel.compat import quiet_megatron  # here and not above: torch and mcore take seconds to load

    quiet_megatron()
    from megatron.core.datasets.indexed_dataset import DType

    chosen: type[np.number[Any]] = DType.optimal_dtype(vocab_size)
    return chosen


def with_suffix(prefix: str, suffix: str) -> Path:
    """PREFIX followed by a suffix such as `.train.bin` (a PREFIX may have dots of its own)."""
    return Path(f"{prefix}{suffix}")


class SplitWriter:
    """Writes one split through mcore's IndexedDatasetBuilder and counts what went in."""

    def __init__(self, prefix: Path, dtype: type[np.number[Any]]) -> None:
        """Opens the .bin file.

        Args:
            prefix: path without `.bin` and `.idx`.
            dtype: type of a token, by `token_type`.
        """
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self._lengths = array("q")
        self.bytes = 0

    def add(self, tokens: npt.NDArray[Any], size_bytes: int) -> None:
        """Appends one document.

        Args:
            tokens: its token ids, with the end-of-document token if it is to have one.
            size_bytes: length of its text in UTF-8.
        """
        self._builder.add_document(tokens, [len(tokens)])
        self._lengths.append(len(tokens))
        self.bytes += size_bytes

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Tokens of every document (int64)."""
        return np.array(self._lengths, dtype=np.int64)

    def finish(self) -> None:
        """Writes the .idx file and brings both files to the disk."""
        self._builder.finalize(f"{self._prefix}.idx")
        for end in (".bin", ".idx"):
            flush(with_suffix(str(self._prefix), end))

    def abandon(self) -> None:
        """Closes the file of a build that failed; flushing what is left may fail again, and no longer matters."""
        with contextlib.suppress(OSError):
            self._builder.data_file.close()


def flush(path: Path) -> None:
    """Forces a file to the disk: on a full or remote disk, this is where a lost write is reported."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def refuse_existing(prefix: str, suffixes: Iterable[str]) -> None:
    """Stops before a file that is there already would be replaced.

    Args:
        prefix: PREFIX.
        suffixes: what will be written besides the manifest and the token files.

    Raises:
        ConfigError: naming the first such file.
    """
    for suffix in (".json", *TOKEN_FILES, *suffixes):
        if with_suffix(prefix, suffix).exists():
            raise ConfigError(
                f"--output={prefix}: {with_suffix(prefix, suffix)} exists already: "
                "choose another PREFIX or add --overwrite"
            )


def publish(prefix: str, staged: Mapping[str, Path], manifest: Path) -> None:
    """Moves finished files to their names: the old manifest goes first, the new one comes last.

    Args:
        prefix: PREFIX; what an older corpus of that name had and this one has not is removed.
        staged: suffix -> finished file on the same file system.
        manifest: the finished manifest.
    """
    stale = [with_suffix(prefix, suffix) for suffix in TOKEN_FILES if suffix not in staged]
    old_tokenizer = _recorded_tokenizer(prefix)
    if old_tokenizer is not None:
        stale.append(old_tokenizer)
    with_suffix(prefix, ".json").unlink(missing_ok=True)
    try:
        for path in stale:
            path.unlink(missing_ok=True)
        for suffix, path in staged.items():
            os.replace(path, with_suffix(prefix, suffix))
        os.replace(manifest, with_suffix(prefix, ".json"))
    except BaseException:  # without a manifest, neither the old nor the new files are of use to anybody
        for suffix in staged:
            with contextlib.suppress(OSError):
                with_suffix(prefix, suffix).unlink(missing_ok=True)
        raise


def _recorded_tokenizer(prefix: str) -> Path | None:
    """The tokenizer file of the corpus about to be overwritten, if its manifest names one that is surely ours."""
    try:
        name = json.loads(with_suffix(prefix, ".json").read_bytes())["tokenizer"]["file"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # no manifest, or not one of ours: then no file beside it is ours to remove
    ours = isinstance(name, str) and name.startswith(f"{Path(prefix).name}.tokenizer") and "/" not in name
    return Path(prefix).parent / name if ours else None


def fingerprint(staged: Mapping[str, Path], tokenizer: Tokenizer) -> str:
    """sha256 (hex) over the token files, each with its suffix, and over what defines the tokenizer.

    Args:
        staged: suffix -> file; suffixes other than those of token files are not looked at.
        tokenizer: the tokenizer the files were written with.
    """
    total = hashlib.sha256(f"tokenizer {tokenizer.digest}\n".encode())
    for suffix in TOKEN_FILES:
        if suffix in staged:
            with staged[suffix].open("rb") as stream:
                total.update(f"{suffix} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
