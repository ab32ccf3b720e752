"""Writing token files: through mcore's builder into a staging folder, then all at once to their names.

What: `SplitWriter` writes the .bin and .idx of one split, `staging_folder` gives a place that vanishes with a failed
build, `publish` moves finished files to PREFIX.*, `fingerprint` names their content.
Why: a job that opens a half-written corpus trains on it without a complaint; the manifest PREFIX.json is therefore
the one mark of a whole corpus, removed first and written last.
How: train/corpus.py is the only user.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import ConfigError, DataError
from train.manifest import SPLITS
from train.tokenizers import Tokenizer

TOKEN_FILES = tuple(f".{split}{end}" for split in SPLITS for end in (".bin", ".idx"))


def with_suffix(prefix: str, suffix: str) -> Path:
    """PREFIX followed by a suffix such as `.train.bin` (a PREFIX may have dots of its own)."""
    return Path(f"{prefix}{suffix}")


class SplitWriter:
    """Writes one split through mcore's IndexedDatasetBuilder and counts what went in."""

    def __init__(self, prefix: Path, eod: int, vocab_size: int) -> None:
        """Opens the .bin file.

        Args:
            prefix: path without `.bin` and `.idx`.
            eod: id appended to every document.
            vocab_size: decides the width of a token by mcore's rule (uint16 below 65,500, else int32).
        """
        from parallel.compat import quiet_megatron  # here and not above: torch and mcore take seconds to load

        quiet_megatron()
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._prefix, self._eod = prefix, eod
        self._dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._dtype)
        self.documents = self.tokens = self.bytes = 0

    def add(self, ids: npt.NDArray[Any], size_bytes: int) -> None:
        """Appends one document.

        Args:
            ids: its token ids, without the end-of-document token.
            size_bytes: length of its text in UTF-8.
        """
        tokens = np.empty(len(ids) + 1, dtype=self._dtype)
        tokens[:-1] = ids
        tokens[-1] = self._eod
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)
        self.bytes += size_bytes

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


@contextlib.contextmanager
def staging_folder(prefix: str) -> Iterator[Path]:
    """Gives a hidden folder beside PREFIX, removed at the end; on failure, folders made for it go too.

    Raises:
        DataError: in place of an OSError from anything done with the folder.
    """
    parent = Path(prefix).parent
    made: list[Path] = []
    staging = None
    try:
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(folder)
        staging = Path(tempfile.mkdtemp(prefix=f".{Path(prefix).name}.partial-", dir=parent))
        yield staging
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # not empty any more: somebody else uses it
                folder.rmdir()
        if isinstance(error, OSError):
            # strerror is "No space left on device", "Permission denied" and so on
            remedy = "make room or choose another folder" if _is_full(error) else "choose a folder you can write to"
            raise DataError(
                f"--output={prefix}: cannot write the corpus: {error.strerror or error} "
                f"(nothing was left behind): {remedy}"
            ) from error
        raise
    shutil.rmtree(staging)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
