"""The corpus command: text in, token files that mcore's GPTDataset reads out.

What: reads text files, JSONL files and folders, holds out whole documents for validation, tokenizes them and writes
PREFIX.{train,valid}.{bin,idx}, a copy of the tokenizer and, last, the manifest PREFIX.json (train/manifest.py).
Why: a corpus is read for weeks; it has to be the same when made again, complete or absent, and must never lose or
change a document without a word. So bad input is refused (with file and place) in a first pass that writes nothing,
and the files appear under their names only when all of them are whole.
How: `python -m train.corpus stdlib --output data/stdlib`, then `data.corpus=data/stdlib`; docs/data.md.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy.typing as npt

from parallel.errors import ConfigError, CoppiceError, DataError
from train.documents import (
    DEFAULT_INCLUDE,
    LEFT_OUT,
    TRAIN,
    VALID,
    Document,
    assign_splits,
    find_sources,
    read_documents,
    reread_documents,
    scan,
)
from train.manifest import FORMAT, CorpusManifest, load_manifest
from train.token_files import SplitWriter, fingerprint, flush, publish, refuse_existing, staging_folder
from train.tokenizers import KINDS, Tokenizer, build_tokenizer, parse_spec, train_bpe

BATCH_BYTES = 4 << 20  # text handed to the tokenizer at once
REPORT_SECONDS = 5.0
SPLIT_NAMES = {TRAIN: "train", VALID: "valid"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class CorpusRequest:
    """The options of one build, checked."""

    inputs: tuple[str, ...]
    """Files, folders, or the word `stdlib`."""
    output: str
    """PREFIX of the files to write."""
    tokenizer: str = "byte"
    validation_fraction: float = 0.05
    """Expected share of documents (not of tokens) held out; 0 writes no validation split."""
    seed: int = 0
    """Draws the held-out documents and the --limit-bytes sample."""
    include: tuple[str, ...] = DEFAULT_INCLUDE
    """Names to take from folders: globs on the file name, or on the path inside the folder if they have a slash."""
    text_key: str = "text"
    limit_bytes: int | None = None
    """Take a sample of documents of at most this much text; None takes all."""
    workers: int = 1
    """Threads of the tokenizer; changes no byte of the result."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the option, the value and the remedy.
        """
        if not self.inputs:
            raise ConfigError("no INPUT: name files, folders, or the word stdlib")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"--validation-fraction={self.validation_fraction}: must be at least 0 and below 1")
        if self.workers < 1:
            raise ConfigError(f"--workers={self.workers}: must be at least 1")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise ConfigError(f"--limit-bytes={self.limit_bytes}: must be at least 1")
        if self.output.endswith("/") or not Path(self.output).name:
            raise ConfigError(f"--output={self.output}: names a folder: add a file prefix, such as corpus")
        parse_spec(self.tokenizer)


@dataclass(frozen=True)
class BuildResult:
    """What a build did, for the closing summary."""

    manifest: CorpusManifest
    empty: int
    """Documents skipped because they held nothing but white space."""
    repeated: int
    """Files reached through more than one INPUT or link, read once."""
    over_limit: int
    """Documents left out by --limit-bytes."""
    seconds: float


class _Progress:
    """Plain lines, one every few seconds."""

    def __init__(self, say: Say, documents: int, total_bytes: int) -> None:
        say(f"tokenizing {documents:,} documents, {total_bytes / 1e6:,.1f} MB")
        self._say, self._total_bytes = say, total_bytes
        self._start = self._last = time.monotonic()
        self._done_bytes = self._documents = 0

    def add(self, documents: int, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._documents += documents
        now = time.monotonic()
        if now - self._last >= REPORT_SECONDS:
            self._last = now
            rate = self._done_bytes / (now - self._start)
            self._say(
                f"tokenized {self._done_bytes / 1e6:,.1f} of {self._total_bytes / 1e6:,.1f} MB "
                f"({self._documents:,} documents, {rate / 1e6:.1f} MB/s)"
            )


def build_corpus(request: CorpusRequest, say: Say = lambda line: None) -> BuildResult:
    """Builds a corpus, all of it or nothing.

    Args:
        request: the options.
        say: takes the lines of progress.

    Raises:
        ConfigError: options that cannot be met, or files of that PREFIX exist and `overwrite` is off.
        DataError: bad input, or the output cannot be written.
    """
    start = time.monotonic()
    tokenizer = None if request.tokenizer.startswith("bpe:") else build_tokenizer(request.tokenizer)
    suffix = ".tokenizer.json" if tokenizer is None else tokenizer.file_suffix
    if not request.overwrite:
        refuse_existing(request.output, [suffix] if suffix else [])
    with staging_folder(request.output) as staging:
        sources, repeated = find_sources(request.inputs, request.include)
        say(f"reading {len(sources):,} files")
        sizes, draws = scan(read_documents(sources, request.text_key), request.seed)
        codes = assign_splits(sizes, draws, request.validation_fraction, request.limit_bytes)
        _refuse_nothing(request, sizes, codes)

        def chosen() -> Iterator[tuple[int, Document]]:
            return reread_documents(sources, request.text_key, sizes, codes)

        tokenizer = _stage_tokenizer(request, tokenizer, chosen(), staging / f"tokenizer{suffix}", say)
        prefixes = {code: staging / name for code, name in SPLIT_NAMES.items() if (codes == code).any()}
        writers = {code: SplitWriter(path, tokenizer.eod, tokenizer.vocab_size) for code, path in prefixes.items()}
        progress = _Progress(say, int((codes != LEFT_OUT).sum()), int(sizes[codes != LEFT_OUT].sum()))
        _write_splits(chosen(), tokenizer, writers, request.workers, progress)
        staged = {f".{path.name}{end}": Path(f"{path}{end}") for path in prefixes.values() for end in (".bin", ".idx")}
        manifest = staging / "manifest.json"
        mark = fingerprint(staged, tokenizer)
        manifest.write_text(json.dumps(_record(request, tokenizer, suffix, writers, mark), indent=2) + "\n")
        flush(manifest)
        if suffix:
            staged[suffix] = staging / f"tokenizer{suffix}"
        if not request.overwrite:  # again: somebody else may have built the same PREFIX meanwhile
            refuse_existing(request.output, [suffix] if suffix else [])
        publish(request.output, staged, manifest)
    return BuildResult(
        manifest=load_manifest(request.output, "--output"),
        empty=int((sizes == 0).sum()),
        repeated=repeated,
        over_limit=int(((sizes > 0) & (codes == LEFT_OUT)).sum()),
        seconds=time.monotonic() - start,
    )


def _refuse_nothing(request: CorpusRequest, sizes: npt.NDArray[Any], codes: npt.NDArray[Any]) -> None:
    """Stops when no document is left to train on."""
    inputs = " ".join(request.inputs)
    if not sizes.any():
        what = "no line with text" if not len(sizes) else f"no text ({len(sizes):,} empty documents)"
        raise DataError(f"INPUT {inputs}: {what}: name a file or folder with text in it")
    if not codes.any():
        smallest = int(sizes[sizes > 0].min())
        raise ConfigError(
            f"--limit-bytes={request.limit_bytes}: no document fits, the smallest has {smallest} bytes: raise the limit"
        )


def _stage_tokenizer(
    request: CorpusRequest,
    tokenizer: Tokenizer | None,
    documents: Iterator[tuple[int, Document]],
    path: Path,
    say: Say,
) -> Tokenizer:
    """Trains the tokenizer on the training documents if there is none yet (`bpe:`), else copies its file to `path`."""
    if tokenizer is None:
        size = int(parse_spec(request.tokenizer)[1])
        say(f"training byte-level BPE with a vocabulary of {size:,}")
        train_bpe((document.text for code, document in documents if code == TRAIN), size, path)
        tokenizer = build_tokenizer(f"huggingface:{path.absolute()}")
        if tokenizer.vocab_size < size:
            say(f"the training documents gave {tokenizer.vocab_size:,} of {size:,} tokens: no pair is left twice")
    elif tokenizer.file is not None:
        shutil.copyfile(tokenizer.file, path)
    if path.exists():
        flush(path)
    return tokenizer


def _write_splits(
    documents: Iterator[tuple[int, Document]],
    tokenizer: Tokenizer,
    writers: dict[int, SplitWriter],
    workers: int,
    progress: _Progress,
) -> None:
    """The second pass: tokenizes batch by batch and gives every document to the writer of its split."""

    def write(batch: list[tuple[int, Document]]) -> None:
        encoded = tokenizer.encode_batch([document.text for _, document in batch], workers)
        for (code, document), ids in zip(batch, encoded, strict=True):
            writers[code].add(ids, document.bytes)
        progress.add(len(batch), sum(document.bytes for _, document in batch))

    try:
        batch: list[tuple[int, Document]] = []
        batch_bytes = 0
        for code, document in documents:
            batch.append((code, document))
            batch_bytes += document.bytes
            if batch_bytes >= BATCH_BYTES:
                write(batch)
                batch, batch_bytes = [], 0
        write(batch)
        for writer in writers.values():
            writer.finish()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def _record(
    request: CorpusRequest, tokenizer: Tokenizer, suffix: str, writers: dict[int, SplitWriter], mark: str
) -> dict[str, Any]:
    """The manifest's content."""
    counts = {
        name: {key: getattr(writers[code], key) if code in writers else 0 for key in ("documents", "tokens", "bytes")}
        for code, name in SPLIT_NAMES.items()
    }
    return {
        "format": FORMAT,
        "tokenizer": {
            "spec": request.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "digest": tokenizer.digest,
            "file": f"{Path(request.output).name}{suffix}" if suffix else None,
        },
        "splits": counts,
        "validation_fraction": request.validation_fraction,
        "seed": request.seed,
        "fingerprint": mark,
        "inputs": list(request.inputs),
        "include": list(request.include),
        "text_key": request.text_key,
        "limit_bytes": request.limit_bytes,
    }


def summary(request: CorpusRequest, result: BuildResult) -> str:
    """The closing lines of the command."""
    manifest = result.manifest
    lines = [
        f"corpus       {request.output}  ({result.seconds:.1f} s)",
        f"tokenizer    {manifest.tokenizer_spec}: vocabulary {manifest.vocab_size:,}, end of document {manifest.eod}",
    ]
    for name, split in manifest.splits.items():
        if split.documents:
            text = f"{split.documents:,} documents, {split.tokens:,} tokens, {split.bytes / 1e6:,.3f} MB of text"
        elif request.validation_fraction == 0:
            text = "empty, as asked for by --validation-fraction 0: no files, and no validation loss in a run"
        else:
            text = "empty, there is only one document: no files; split the text into more files or JSONL lines"
        lines.append(f"{name:<13}{text}")
    skipped = [
        f"{count:,} {what}"
        for count, what in (
            (result.empty, "empty documents"),
            (result.repeated, "files met twice"),
            (result.over_limit, "documents over --limit-bytes"),
        )
        if count
    ]
    lines += [f"left out     {', '.join(skipped)}"] if skipped else []
    lines += [f"fingerprint  {manifest.fingerprint}", f"use it with  data.corpus={request.output}"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.corpus",
        description="Tokenize text for training: PREFIX.{train,valid}.{bin,idx} and the manifest PREFIX.json.",
        epilog="Example: python -m train.corpus stdlib --output data/stdlib; then train with data.corpus=data/stdlib.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="text file, .jsonl file (one object per line), folder (walked), or the word stdlib: the Python sources of "
        "this Python's standard library (a folder of that name is ./stdlib)",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path and start of name of the files written")
    parser.add_argument("--tokenizer", default="byte", metavar="SPEC", help=f"{', '.join(KINDS.values())} (byte)")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of documents held out (0.05); 0: none",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the held-out documents and the sample (0)")
    parser.add_argument(
        "--include",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help=f"files to take from folders ({' '.join(DEFAULT_INCLUDE)})",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in JSONL objects (text)")
    parser.add_argument("--limit-bytes", type=int, metavar="N", help="take a random sample of at most N bytes of text")
    parser.add_argument("--workers", type=int, metavar="N", help="threads of the tokenizer (all cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of the same PREFIX")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; gives the exit code (0, or that of the error)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["show"]:
        # Here and not above: a build needs neither the settings of a run nor its checkpoints.
        from parallel.compat import quiet_megatron

        quiet_megatron()
        from train.corpus_show import main as show

        return show(words[1:])
    options = _parser().parse_args(words)
    workers = options.workers if options.workers is not None else len(os.sched_getaffinity(0))
    # The `tokenizers` package sizes its thread pool from this when it is first used.
    os.environ["RAYON_NUM_THREADS"] = str(max(workers, 1))

    def terminate(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)  # unwinds, so that the staging folder goes away

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        request = CorpusRequest(
            inputs=tuple(options.inputs),
            output=options.output,
            tokenizer=options.tokenizer,
            validation_fraction=options.validation_fraction,
            seed=options.seed,
            include=tuple(options.include or DEFAULT_INCLUDE),
            text_key=options.text_key,
            limit_bytes=options.limit_bytes,
            workers=workers,
            overwrite=options.overwrite,
        )
        result = build_corpus(request, lambda line: print(line, file=sys.stderr, flush=True))
    except CoppiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(summary(request, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
