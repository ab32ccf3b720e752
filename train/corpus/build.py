"""Building a corpus: from the options to PREFIX.{train,valid}.{bin,idx}, the tokenizer's copy and the manifest.

What: `build_corpus` cuts the input into parts, reads them through once to check them and to choose the held-out
documents, tokenizes them part by part, joins the parts in order, and publishes the files.
Why: a corpus is read for weeks; it has to be the same when made again, complete or absent, whatever the number of
processes and however often the build was stopped. So bad input is refused in a first pass that writes nothing, every
finished part stays for the next try, and the files appear under their names only when all of them are whole.
How: train/corpus/__main__.py is the command; `build_corpus(CorpusRequest(("stdlib",), "data/stdlib"))` does the same.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import ConfigError, DataError
from train.corpus.documents import BAD_BYTES, read_part
from train.corpus.encoding import EncodeTask, TokenizerTask, encode_part, finished_part, read_encoded
from train.corpus.parts import VERSION as PARTS_VERSION
from train.corpus.parts import Part, plan_parts
from train.corpus.progress import Progress
from train.corpus.sources import DEFAULT_INCLUDE, Source, find_sources
from train.corpus.splits import LEFT_OUT, TRAIN, VALID, Scan, assign_splits, joined, scan_part
from train.corpus.staging import staging_folder
from train.corpus.statistics import LeftOut, length_statistics
from train.corpus.token_files import SplitWriter, fingerprint, flush, publish, refuse_existing, token_type
from train.corpus.workers import Workers
from train.data.manifest import FORMAT, CorpusManifest, load_manifest
from train.data.tokenizers import Tokenizer, build_tokenizer, parse_spec, train_bpe

SPLIT_NAMES = {TRAIN: "train", VALID: "valid"}
REFUSE, SKIP = "refuse", "skip"

Say = Callable[[str], None]


@dataclass(frozen=True)
class CorpusRequest:
    """The options of one build, checked."""

    inputs: tuple[str, ...]
    """Files, globs, folders, or the word `stdlib`."""
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
    """Key of the text in JSONL objects, column of the text in Parquet files."""
    limit_bytes: int | None = None
    """Take a sample of documents of at most this much text; None takes all."""
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token."""
    on_bad: str = REFUSE
    """What a document that cannot be read does: `refuse` stops the build, `skip` leaves it out and counts it."""
    workers: int = 1
    """Processes that read and tokenize; changes no byte of the result."""
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
        if self.on_bad not in (REFUSE, SKIP):
            raise ConfigError(f"--on-bad={self.on_bad}: must be {REFUSE} or {SKIP}")
        if self.output.endswith("/") or not Path(self.output).name:
            raise ConfigError(f"--output={self.output}: names a folder: add a file prefix, such as corpus")
        parse_spec(self.tokenizer)


@dataclass(frozen=True)
class BuildResult:
    """What a build did, for the closing summary."""

    manifest: CorpusManifest
    statistics: dict[str, dict[str, Any]]
    """Per split, as `length_statistics` gives them."""
    left_out: LeftOut
    faults: tuple[str, ...]
    """The first documents that --on-bad skip left out."""
    seconds: float


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
    with staging_folder(request.output, say) as staging, Workers(request.workers) as workers:
        sources, repeated = find_sources(request.inputs, request.include)
        say(f"reading {len(sources):,} files")
        parts = plan_parts(sources, request.text_key, workers.map)
        scans = _scan(request, parts, workers, say)
        scan = joined(scans)
        codes = assign_splits(scan.sizes, scan.draws, request.validation_fraction, request.limit_bytes)
        _refuse_nothing(request, scan.sizes, codes)
        staging.begin(_key(request, sources, tokenizer))
        tokenizer = _stage_tokenizer(request, tokenizer, parts, codes, staging.folder / f"tokenizer{suffix}", say)
        tasks = _tasks(request, parts, scans, codes, tokenizer, staging.folder, suffix)
        _encode(tasks, workers, say)
        writers, without_tokens = _join(tasks, codes, tokenizer.vocab_size, staging.folder)
        if SPLIT_NAMES[TRAIN] not in writers:
            raise DataError(f"--tokenizer={request.tokenizer}: makes no token of any training document: use another")
        left_out = LeftOut(
            empty=int((scan.sizes == 0).sum()) + without_tokens,
            bad=int((scan.sizes == BAD_BYTES).sum()),
            over_limit=int(((scan.sizes > 0) & (codes == LEFT_OUT)).sum()),
            repeated_files=repeated,
        )
        appended = int(request.append_eod)
        statistics = {name: length_statistics(each.lengths, each.bytes, appended) for name, each in writers.items()}
        _publish(request, staging.folder, tokenizer, suffix, writers, statistics, left_out, scan.faults)
    return BuildResult(
        manifest=load_manifest(request.output, "--output"),
        statistics=statistics,
        left_out=left_out,
        faults=scan.faults,
        seconds=time.monotonic() - start,
    )


def _scan(request: CorpusRequest, parts: Sequence[Part], workers: Workers, say: Say) -> list[Scan]:
    """The first pass over all parts."""
    weights = [sum(piece.weight_bytes for piece in part) for part in parts]
    progress = Progress(say, "checked about", sum(weights))
    scans = []
    work = partial(scan_part, request.text_key, request.seed, request.on_bad == SKIP)
    for weight, scan in zip(weights, workers.map(work, parts), strict=True):
        scans.append(scan)
        progress.add(weight)
    return scans


def _refuse_nothing(request: CorpusRequest, sizes: npt.NDArray[Any], codes: npt.NDArray[Any]) -> None:
    """Stops when no document is left to train on."""
    inputs = " ".join(request.inputs)
    if not (sizes > 0).any():
        what = "no line with text" if not len(sizes) else f"no text ({len(sizes):,} empty or bad documents)"
        raise DataError(f"INPUT {inputs}: {what}: name a file or folder with text in it")
    if not codes.any():
        smallest = int(sizes[sizes > 0].min())
        raise ConfigError(
            f"--limit-bytes={request.limit_bytes}: no document fits, the smallest has {smallest} bytes: raise the limit"
        )


def _key(request: CorpusRequest, sources: Sequence[Source], tokenizer: Tokenizer | None) -> str:
    """Names what the parts of a build hang on; a stopped build goes on only if all of it is the same."""
    options = {k: v for k, v in asdict(request).items() if k not in ("output", "workers", "overwrite")}
    digest = tokenizer.digest if tokenizer is not None else None
    files = [(each.name, str(each.path.resolve()), each.size_bytes, each.mtime_ns) for each in sources]
    return hashlib.sha256(json.dumps([PARTS_VERSION, options, digest, files]).encode()).hexdigest()


def _stage_tokenizer(
    request: CorpusRequest,
    tokenizer: Tokenizer | None,
    parts: Sequence[Part],
    codes: npt.NDArray[Any],
    path: Path,
    say: Say,
) -> Tokenizer:
    """Trains the tokenizer on the training documents if there is none yet (`bpe:`), else copies its file to `path`."""
    if tokenizer is not None:
        if tokenizer.file is not None:
            shutil.copyfile(tokenizer.file, path)
            flush(path)
        return tokenizer
    size = int(parse_spec(request.tokenizer)[1])
    if not path.exists():  # else a build that was stopped had trained it
        say(f"training byte-level BPE with a vocabulary of {size:,}")
        unfinished = path.with_name(f"{path.name}.unfinished")
        train_bpe(_training_texts(request, parts, codes), size, unfinished)
        flush(unfinished)
        unfinished.rename(path)
    tokenizer = build_tokenizer(f"huggingface:{path.absolute()}")
    if tokenizer.vocab_size < size:
        say(f"the training documents gave {tokenizer.vocab_size:,} of {size:,} tokens: no pair is left twice")
    return tokenizer


def _training_texts(request: CorpusRequest, parts: Sequence[Part], codes: npt.NDArray[Any]) -> Iterator[str]:
    documents = (document for part in parts for document in read_part(part, request.text_key))
    for code, document in zip(codes, documents, strict=True):
        if code == TRAIN:
            yield document.text


def _tasks(
    request: CorpusRequest,
    parts: Sequence[Part],
    scans: Sequence[Scan],
    codes: npt.NDArray[Any],
    tokenizer: Tokenizer,
    folder: Path,
    suffix: str,
) -> list[EncodeTask]:
    """What there is to tokenize, part by part."""
    spec = request.tokenizer
    if suffix:
        kind = spec.partition(":")[0]
        spec = f"{'huggingface' if kind == 'bpe' else kind}:{(folder / f'tokenizer{suffix}').absolute()}"
    wanted = TokenizerTask(spec, tokenizer.eod, tokenizer.digest)
    dtype = np.dtype(token_type(tokenizer.vocab_size)).name
    ends = np.cumsum([len(scan.sizes) for scan in scans])
    chosen = np.split(codes != LEFT_OUT, ends[:-1])
    return [
        EncodeTask(number, part, request.text_key, scan.sizes, take, wanted, request.append_eod, dtype, folder)
        for number, (part, scan, take) in enumerate(zip(parts, scans, chosen, strict=True))
        if take.any()
    ]


def _encode(tasks: Sequence[EncodeTask], workers: Workers, say: Say) -> None:
    """The second pass: tokenizes what no earlier command has."""
    left = [task for task in tasks if finished_part(task) is None]
    documents = sum(int(task.chosen.sum()) for task in left)
    total_bytes = sum(int(task.sizes[task.chosen].sum()) for task in left)
    say(f"tokenizing {documents:,} documents, {total_bytes / 1e6:,.1f} MB")
    progress = Progress(say, "tokenized", total_bytes)
    for encoded in workers.map(encode_part, left, ordered=False):
        progress.add(encoded.text_bytes, encoded.tokens)


def _join(
    tasks: Sequence[EncodeTask], codes: npt.NDArray[Any], vocab_size: int, folder: Path
) -> tuple[dict[str, SplitWriter], int]:
    """Gives every document to the writer of its split, in order; also counts those without a token."""
    dtype = token_type(vocab_size)
    writers: dict[int, SplitWriter] = {}
    without_tokens = 0
    chosen = iter(codes[codes != LEFT_OUT].tolist())
    try:
        for task in tasks:
            for tokens, size in zip(read_encoded(task), task.sizes[task.chosen].tolist(), strict=True):
                code = next(chosen)
                if not len(tokens):
                    without_tokens += 1
                    continue
                if code not in writers:
                    writers[code] = SplitWriter(folder / SPLIT_NAMES[code], dtype)
                writers[code].add(tokens, size)
        for writer in writers.values():
            writer.finish()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    return {SPLIT_NAMES[code]: writers[code] for code in sorted(writers)}, without_tokens


def _publish(
    request: CorpusRequest,
    folder: Path,
    tokenizer: Tokenizer,
    suffix: str,
    writers: dict[str, SplitWriter],
    statistics: dict[str, dict[str, Any]],
    left_out: LeftOut,
    faults: Sequence[str],
) -> None:
    """Writes the manifest and moves all files to their names."""
    staged = {f".{name}{end}": folder / f"{name}{end}" for name in writers for end in (".bin", ".idx")}
    mark = fingerprint(staged, tokenizer)
    record = _record(request, tokenizer, suffix, writers, mark)
    record |= {"statistics": statistics, "left_out": asdict(left_out), "bad_examples": list(faults)}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(record, indent=2) + "\n")
    flush(manifest)
    if suffix:
        # A copy of the file: until the manifest is there, a new try needs the one in the folder.
        staged[suffix] = folder / f"published{suffix}"
        shutil.copyfile(folder / f"tokenizer{suffix}", staged[suffix])
        flush(staged[suffix])
    if not request.overwrite:  # again: somebody else may have built the same PREFIX meanwhile
        refuse_existing(request.output, [suffix] if suffix else [])
    publish(request.output, staged, manifest)


def _record(
    request: CorpusRequest, tokenizer: Tokenizer, suffix: str, writers: dict[str, SplitWriter], mark: str
) -> dict[str, Any]:
    """The manifest's content, but for the statistics."""
    splits = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLIT_NAMES.values()}
    for name, writer in writers.items():
        tokens = int(writer.lengths.sum())
        splits[name] = {"documents": len(writer.lengths), "tokens": tokens, "bytes": writer.bytes}
    return {
        "format": FORMAT,
        "tokenizer": {
            "spec": request.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "digest": tokenizer.digest,
            "file": f"{Path(request.output).name}{suffix}" if suffix else None,
        },
        "splits": splits,
        "text_bytes": {name: counts["bytes"] for name, counts in splits.items()},
        "append_eod": request.append_eod,
        "validation_fraction": request.validation_fraction,
        "seed": request.seed,
        "fingerprint": mark,
        "inputs": list(request.inputs),
        "include": None if request.include == DEFAULT_INCLUDE else list(request.include),
        "text_key": request.text_key,
        "limit_bytes": request.limit_bytes,
        "on_bad": request.on_bad,
    }
