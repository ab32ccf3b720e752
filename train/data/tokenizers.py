"""Tokenizers: text to token ids and back, for the corpus command, training and evaluation.

What: one small interface, `Tokenizer`, with what Coppice needs and what mcore's GPTDatasetConfig reads from its
`tokenizer` (`vocab_size`, `eod`, `unique_identifiers`), and `build_tokenizer`, which makes one from a SPEC:

    byte                   UTF-8 bytes 0-255, end of document 256, vocabulary 257; no file
    bpe:VOCAB_SIZE         byte-level BPE that `python -m train.corpus` trains on the training documents
    huggingface:PATH       a tokenizer.json, or a folder with one (the `tokenizers` package; no transformers)
    sentencepiece:PATH     a SentencePiece model file                             (pip install coppice[sentencepiece])
    tiktoken:PATH          a tiktoken rank file, or mcore's JSON vocabulary        (pip install coppice[tiktoken])

Why not mcore's own tokenizer classes: their byte-level one strips white space at the end when it decodes and takes
byte 0 or 1 as a special token; their tiktoken one (0.16.1) decodes token by token, which breaks characters that span
two tokens, and both versions turn the text of a special token inside a document into that token; the ids for building
them differ between 0.16.1 and 0.19.2; and importing them loads all of mcore, seconds that a report need not spend.

How: `tokenizer = build_tokenizer("byte")`; a corpus gives the one it was written with: `CorpusManifest.tokenizer()`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import ConfigError, DataError
from train.extras import optional_package

KINDS = {
    "byte": "byte",
    "bpe": "bpe:VOCAB_SIZE",
    "huggingface": "huggingface:PATH",
    "sentencepiece": "sentencepiece:PATH",
    "tiktoken": "tiktoken:PATH",
}
BPE_END_OF_DOCUMENT = "<|endoftext|>"
BPE_MINIMUM_VOCABULARY = 257  # 256 byte symbols and the end-of-document token
BPE_MAXIMUM_VOCABULARY = 1 << 20  # the trainer takes memory for all of them at once, and the process dies of too many
# What a tokenizer.json calls its end-of-document token when no tokenizer_config.json beside it says so.
USUAL_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
# A rank file holds no split pattern. This is the one of the GPT-4 vocabulary (cl100k_base), from tiktoken's own table.
RANK_FILE_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


class Tokenizer(ABC):
    """Text to ids and back; an instance can be GPTDatasetConfig.tokenizer as it is.

    It has no `pad` attribute on purpose: mcore then pads with -1, an id that no document can hold.
    """

    def __init__(self, spec: str, vocab_size: int, eod: int, digest: str, file: Path | None = None) -> None:
        """Sets what every tokenizer has.

        Args:
            spec: the SPEC it was built from.
            vocab_size: one above the largest id; the model's embedding needs at least this many rows.
            eod: id of the end-of-document token, appended to every document by the corpus command.
            digest: sha256 hex of what defines the ids (the file's content).
            file: the file it was read from; None when there is none.
        """
        self.spec = spec
        self.vocab_size = vocab_size
        self.eod = eod
        self.digest = digest
        self.file = file
        self.corpus_fingerprint: str | None = None

    @property
    def file_suffix(self) -> str:
        """How the copy of `file` beside a corpus ends, for example `.tokenizer.json`."""
        return f".tokenizer{self.file.suffix}" if self.file is not None else ""

    @property
    def unique_identifiers(self) -> "OrderedDict[str, Any]":
        """What mcore hashes into the name of its cached document, sample and shuffle indices.

        The corpus fingerprint is part of it: a corpus rebuilt under the same PREFIX must not meet the indices of the
        old one, which mcore would otherwise reuse without a look at the data.
        """
        return OrderedDict(
            {
                "class": type(self).__qualname__,
                "vocab_size": self.vocab_size,
                "eod": self.eod,
                "digest": self.digest,
                "corpus": self.corpus_fingerprint,
            }
        )

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-document token; special tokens spelled out in it stay plain text."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids; end-of-document tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[npt.NDArray[Any]]:
        """The ids of many texts as integer arrays, on up to `threads` threads where the library can."""
        return [np.asarray(self.tokenize(text), dtype=np.int64) for text in texts]


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: ids 0-255, end of document 256, vocabulary 257."""

    def __init__(self) -> None:
        super().__init__("byte", 257, 256, hashlib.sha256(b"byte 257 256").hexdigest())

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i != self.eod).decode("utf-8", errors="replace")

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[npt.NDArray[Any]]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json run by the `tokenizers` package; also serves the BPE that the corpus command trains."""

    def __init__(self, spec: str, path: Path, eod: int | None = None) -> None:
        from tokenizers import Tokenizer as Library

        file = _existing_file(path / "tokenizer.json" if path.is_dir() else path, spec)
        content = file.read_bytes()
        try:
            self._library = Library.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for every fault in the file
            raise DataError(f"--tokenizer={spec}: {file} is not a tokenizer.json ({error})") from error
        # A file may ask for truncation (often at 512 tokens) or padding: both would silently change documents.
        self._library.no_truncation()
        self._library.no_padding()
        # Otherwise a document that *writes about* <|endoftext|> would hold real end-of-document tokens.
        self._library.encode_special_tokens = True
        if eod is None:
            eod = _end_of_document(self._library, file, spec)
        vocab_size = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(spec, vocab_size, eod, tokens_digest(content, eod), file)

    def tokenize(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._library.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=False))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[npt.NDArray[Any]]:
        # Threads here are the library's own pool, sized once per process by RAYON_NUM_THREADS (set by the command).
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; the model's own normalisation applies, so white space may not survive a round trip."""

    def __init__(self, spec: str, path: Path, eod: int | None = None) -> None:
        file = _existing_file(path, spec)
        library = optional_package("sentencepiece", f"--tokenizer={spec}")
        content = file.read_bytes()
        try:
            self._library = library.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"--tokenizer={spec}: {file} is not a SentencePiece model ({error})") from error
        eod = int(self._library.eos_id()) if eod is None else eod
        if eod < 0:
            raise DataError(f"--tokenizer={spec}: the model has no end-of-sentence token: train it with eos_id >= 0")
        super().__init__(spec, int(self._library.get_piece_size()), eod, tokens_digest(content, eod), file)

    def tokenize(self, text: str) -> list[int]:
        return list(self._library.encode(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._library.decode([int(i) for i in ids if i != self.eod]))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[npt.NDArray[Any]]:
        return [np.asarray(ids, dtype=np.int64) for ids in self._library.encode(list(texts), num_threads=threads)]


class TiktokenTokenizer(Tokenizer):
    """A tiktoken vocabulary: a rank file (lines `base64 rank`) or mcore's JSON form (name ending in .json).

    A rank file gets the GPT-4 split pattern and one more id, next to its last rank, for the end of a document. The
    JSON form is read by mcore's class, which brings its own pattern and its 1,000 special ids in front.
    """

    def __init__(self, spec: str, path: Path, eod: int | None = None) -> None:
        file = _existing_file(path, spec)
        library = optional_package("tiktoken", f"--tokenizer={spec}")
        content = file.read_bytes()
        if file.suffix == ".json":
            self._library, own_eod = _read_mcore_vocabulary(file, content, spec)
        else:
            ranks = _read_ranks(content, file, spec)
            own_eod = max(ranks.values()) + 1
            self._library = library.Encoding(
                file.name,
                pat_str=RANK_FILE_PATTERN,
                mergeable_ranks=ranks,
                special_tokens={BPE_END_OF_DOCUMENT: own_eod},
            )
        eod = own_eod if eod is None else eod
        super().__init__(spec, int(self._library.max_token_value) + 1, eod, tokens_digest(content, eod), file)

    def tokenize(self, text: str) -> list[int]:
        return list(self._library.encode_ordinary(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._library.decode([int(i) for i in ids if i != self.eod], errors="replace"))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[npt.NDArray[Any]]:
        batch = self._library.encode_ordinary_batch(list(texts), num_threads=threads)
        return [np.asarray(ids, dtype=np.int64) for ids in batch]


def parse_spec(spec: str) -> tuple[str, str]:
    """Splits a SPEC into kind and argument (empty for `byte`), checked as far as that goes without a file.

    Raises:
        ConfigError: unknown kind, or an argument missing, superfluous or not a vocabulary size.
    """
    kind, _, argument = spec.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"--tokenizer={spec}: unknown kind {kind!r}: use {', '.join(KINDS.values())}")
    if (kind == "byte") != (argument == ""):
        raise ConfigError(f"--tokenizer={spec}: write it as {KINDS[kind]}")
    # A number of more digits is one that Python may refuse to read.
    size = int(argument) if argument.isdecimal() and len(argument) < 10 else None
    if kind == "bpe" and (size is None or not BPE_MINIMUM_VOCABULARY <= size <= BPE_MAXIMUM_VOCABULARY):
        raise ConfigError(
            f"--tokenizer={spec}: VOCAB_SIZE must be a number of at least {BPE_MINIMUM_VOCABULARY} "
            f"(256 bytes and the end-of-document token) and at most {BPE_MAXIMUM_VOCABULARY}"
        )
    return kind, argument


def build_tokenizer(spec: str, base: Path | None = None, *, eod: int | None = None) -> Tokenizer:
    """Builds the tokenizer of a SPEC that needs no training.

    Args:
        spec: `byte`, `huggingface:PATH`, `sentencepiece:PATH` or `tiktoken:PATH`.
        base: folder that a relative PATH starts from; None for the current folder.
        eod: end-of-document id to use instead of the one the file declares (a corpus manifest knows it).

    Raises:
        ConfigError: a wrong SPEC, `bpe:` (which has to be trained first), or a missing optional package.
        DataError: the file is missing, unreadable, or declares no end-of-document token.
    """
    kind, argument = parse_spec(spec)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        raise ConfigError(
            f"--tokenizer={spec}: has to be trained by `python -m train.corpus --tokenizer {spec}`; "
            "a trained one is huggingface:PREFIX.tokenizer.json"
        )
    path = (base or Path()) / Path(argument).expanduser()
    if kind == "huggingface":
        return HuggingFaceTokenizer(spec, path, eod)
    if kind == "sentencepiece":
        return SentencePieceTokenizer(spec, path, eod)
    return TiktokenTokenizer(spec, path, eod)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains byte-level BPE and writes it to `path` as a tokenizer.json; the same texts give the same file.

    Args:
        texts: the training documents.
        vocab_size: wanted number of ids, end-of-document (id 0) and the 256 bytes included; a small corpus may run
            out of pairs that occur twice and give fewer.
        path: file to write.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BPE_END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    path.write_text(library.to_str(), encoding="utf-8")


def _existing_file(path: Path, spec: str) -> Path:
    if not path.is_file():
        raise DataError(f"--tokenizer={spec}: there is no file {path}")
    return path


def tokens_digest(content: bytes, eod: int) -> str:
    """Digest of what defines token ids: a tokenizer's file, and its end-of-document token."""
    return hashlib.sha256(content + f"\neod {eod}".encode()).hexdigest()


def _end_of_document(library: Any, file: Path, spec: str) -> int:
    """The id of eos_token in the tokenizer_config.json beside the file, else of the only special token usual for it."""
    config = file.parent / "tokenizer_config.json"
    if config.is_file():
        try:
            declared = json.loads(config.read_bytes()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"--tokenizer={spec}: {config} is not a JSON object ({error})") from error
        token = declared.get("content") if isinstance(declared, dict) else declared
        if isinstance(token, str):
            if library.token_to_id(token) is None:
                raise DataError(f"--tokenizer={spec}: eos_token {token!r} of {config} is not in {file}")
            return int(library.token_to_id(token))
    special = {token.content: number for number, token in library.get_added_tokens_decoder().items() if token.special}
    found = [token for token in USUAL_END_TOKENS if token in special]
    if len(found) != 1:
        raise DataError(
            f"--tokenizer={spec}: cannot tell the end-of-document token of {file} "
            f"({' or '.join(found) if found else 'no special token has a usual name for it'}): "
            f'put {{"eos_token": "..."}} into {config}'
        )
    return int(special[found[0]])


def _read_ranks(content: bytes, file: Path, spec: str) -> dict[bytes, int]:
    """Reads a rank file. tiktoken's own reader caches by path in the temporary folder: stale after a change."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise DataError(f"--tokenizer={spec}: {file}:{number} is not `base64 rank` ({error})") from error
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"--tokenizer={spec}: {file} does not hold a rank for each of the 256 bytes")
    return ranks


def _read_mcore_vocabulary(file: Path, content: bytes, spec: str) -> tuple[Any, int]:
    """Reads mcore's JSON vocabulary with mcore's class; gives the tiktoken.Encoding inside and its </s> id."""
    from parallel.compat import quiet_megatron

    quiet_megatron()
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import (
        DEFAULT_TIKTOKEN_MAX_VOCAB,
        TikTokenTokenizer,
    )

    try:
        size = len(json.loads(content)) + 1000  # mcore puts 1,000 special tokens first
        library = TikTokenTokenizer(str(file), vocab_size=min(size, DEFAULT_TIKTOKEN_MAX_VOCAB))
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
        raise DataError(
            f"--tokenizer={spec}: {file} is not an mcore tiktoken vocabulary ({type(error).__name__} {error})"
        ) from error
    return library.tokenizer, int(library.eos_id)
