"""The manifest of a corpus: what PREFIX.json says, checked against the files beside it.

What: `load_manifest(prefix)` reads the record that `python -m train.corpus` writes last, and refuses a corpus whose
files are missing or of the wrong size before a job spends minutes on starting up.
Why here: training, evaluation and preflight need it and should not load torch or mcore for it; nothing here does.
How: `manifest = load_manifest("data/stdlib")`; then `manifest.path("train")` and `manifest.tokenizer()` are what
mcore's GPTDatasetConfig takes.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from train.data.tokenizers import Tokenizer, build_tokenizer

FORMAT = 1
SPLITS = ("train", "valid")
# Head of an mcore .idx file: magic, version, dtype code, number of sequences, number of document marks.
_INDEX_HEAD = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_BYTES_PER_TOKEN = {8: 2, 4: 4}  # dtype codes of mcore: uint16 and int32
_BYTES_PER_SEQUENCE = 4 + 8  # length (int32) and byte offset (int64)
_BYTES_PER_MARK = 8


@dataclass(frozen=True)
class SplitSummary:
    """One split of a corpus."""

    documents: int
    """Number of documents; zero means that the split has no files."""
    tokens: int
    """Number of tokens, end-of-document tokens included."""
    bytes: int
    """UTF-8 bytes of the text (not of the .bin file): what bits per byte divide by."""


@dataclass(frozen=True)
class CorpusManifest:
    """What a corpus holds and how it was made; made by `load_manifest`."""

    prefix: Path
    """PREFIX: the files are PREFIX.json, PREFIX.train.bin and so on."""
    tokenizer_spec: str
    vocab_size: int
    eod: int
    tokenizer_digest: str
    """sha256 of what defines the token ids. Corpora may be mixed in one run only if this is the same; the spec does not
    tell (`bpe:4096` gives other ids for other text)."""
    tokenizer_file: Path | None
    """The tokenizer's file beside the PREFIX; None for `byte`."""
    splits: Mapping[str, SplitSummary]
    """`train` and `valid`."""
    validation_fraction: float
    seed: int
    fingerprint: str
    """sha256 over the token files and the tokenizer: equal fingerprints mean equal training data."""
    inputs: tuple[str, ...]
    append_eod: bool
    """Whether every document ends with the end-of-document token."""

    def path(self, split: str) -> Path:
        """What mcore calls the path prefix of a split: `.bin` and `.idx` come after it."""
        return Path(f"{self.prefix}.{split}")

    def tokens(self, split: str) -> int:
        """Tokens of `train` or `valid`; zero when the split is empty and has no files."""
        return self.splits[split].tokens

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was written with, ready for GPTDatasetConfig.tokenizer.

        Raises:
            DataError: its file changed since the corpus was written.
            ConfigError: it needs an optional package that is not installed.
        """
        kind = self.tokenizer_spec.partition(":")[0]
        if self.tokenizer_file is None:
            tokenizer = build_tokenizer(self.tokenizer_spec)
        else:
            kind = "huggingface" if kind == "bpe" else kind
            tokenizer = build_tokenizer(f"{kind}:{self.tokenizer_file.absolute()}", eod=self.eod)
        if tokenizer.digest != self.tokenizer_digest:
            raise DataError(
                f"corpus {self.prefix}: {self.tokenizer_file or kind} is not the tokenizer the corpus was written with "
                f"(digest {tokenizer.digest[:12]} instead of {self.tokenizer_digest[:12]}): copy the corpus again or "
                "rebuild it with `python -m train.corpus ... --overwrite`"
            )
        tokenizer.corpus_fingerprint = self.fingerprint
        return tokenizer


def load_manifest(prefix: str | Path, key: str = "data.corpus") -> CorpusManifest:
    """Reads PREFIX.json and checks that its files are there and have the sizes it promises.

    Args:
        prefix: the PREFIX given to `python -m train.corpus --output`.
        key: the configuration key that holds it, for error messages; `data.blend[1].prefix` in a blend.

    Raises:
        DataError: no corpus there, an unreadable manifest, or a missing or cut-off file.
    """
    prefix = Path(prefix)
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise DataError(
            f"{key}={prefix}: there is no corpus ({path} is missing): "
            f"build one with `python -m train.corpus INPUT... --output {prefix}`"
        )
    try:
        manifest = _parse(prefix, json.loads(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{key}={prefix}: cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{key}={prefix}: {path} is not the manifest of a corpus ({type(error).__name__}: {error}): "
            f"rebuild it with `python -m train.corpus INPUT... --output {prefix} --overwrite`"
        ) from error
    if manifest.tokenizer_file is not None and not manifest.tokenizer_file.is_file():
        raise _broken(prefix, key, f"{manifest.tokenizer_file} is missing")
    for split in SPLITS:
        if manifest.splits[split].documents:
            fault = _fault(prefix, split, manifest.splits[split])
            if fault:
                raise _broken(prefix, key, fault)
    return manifest


def _parse(prefix: Path, record: Any) -> CorpusManifest:
    """Makes the manifest of a parsed PREFIX.json; KeyError, TypeError or ValueError when it is something else."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"no object with format {FORMAT}")
    tokenizer = record["tokenizer"]
    file = tokenizer["file"]
    splits = {}
    for split in SPLITS:
        counts = record["splits"][split]
        splits[split] = SplitSummary(int(counts["documents"]), int(counts["tokens"]), int(counts["bytes"]))
    return CorpusManifest(
        prefix=prefix,
        tokenizer_spec=str(tokenizer["spec"]),
        vocab_size=int(tokenizer["vocab_size"]),
        eod=int(tokenizer["eod"]),
        tokenizer_digest=str(tokenizer["digest"]),
        tokenizer_file=None if file is None else prefix.parent / str(file),
        splits=splits,
        validation_fraction=float(record["validation_fraction"]),
        seed=int(record["seed"]),
        fingerprint=str(record["fingerprint"]),
        inputs=tuple(str(entry) for entry in record["inputs"]),
        append_eod=bool(record.get("append_eod", True)),  # corpora of before --no-eod have it
    )


def _fault(prefix: Path, split: str, summary: SplitSummary) -> str | None:
    """Compares the files of one split with the counts of the manifest, by the head of the .idx and the sizes."""
    index, data = Path(f"{prefix}.{split}.idx"), Path(f"{prefix}.{split}.bin")
    try:
        with index.open("rb") as stream:
            head = stream.read(_INDEX_HEAD.size)
        index_bytes, data_bytes = index.stat().st_size, data.stat().st_size
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    if len(head) < _INDEX_HEAD.size:
        return f"{index} is cut off at {len(head)} bytes"
    magic, version, dtype_code, sequences, marks = _INDEX_HEAD.unpack(head)
    if magic != _INDEX_MAGIC or version != 1 or dtype_code not in _BYTES_PER_TOKEN:
        return f"{index} is not an index file of token ids"
    if sequences != summary.documents:
        return f"{index} lists {sequences} documents, the manifest {summary.documents}"
    expected_index_bytes = _INDEX_HEAD.size + sequences * _BYTES_PER_SEQUENCE + marks * _BYTES_PER_MARK
    expected_data_bytes = summary.tokens * _BYTES_PER_TOKEN[dtype_code]
    if index_bytes != expected_index_bytes:
        return f"{index} has {index_bytes} bytes instead of {expected_index_bytes}"
    if data_bytes != expected_data_bytes:
        return f"{data} has {data_bytes} bytes instead of {expected_data_bytes}"
    return None


def _broken(prefix: Path, key: str, what: str) -> DataError:
    return DataError(
        f"{key}={prefix}: {what}: copy the corpus again or rebuild it with "
        f"`python -m train.corpus INPUT... --output {prefix} --overwrite`"
    )
