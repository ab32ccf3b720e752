"""The corpus command: text in, token files that mcore's GPTDataset reads out.

What: reads text, JSONL and Parquet files, packed or not, holds out whole documents for validation, tokenizes them in
several processes and writes PREFIX.{train,valid}.{bin,idx}, a copy of the tokenizer and, last, the manifest
PREFIX.json (train/data/manifest.py). This file is the command line; train/corpus/build.py does the work.
How: `python -m train.corpus stdlib --output data/stdlib`, then `data.corpus=data/stdlib`; docs/data.md.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from parallel.errors import CoppiceError
from train.corpus.build import REFUSE, SKIP, BuildResult, CorpusRequest, build_corpus
from train.corpus.progress import duration
from train.corpus.sources import DEFAULT_INCLUDE
from train.data.tokenizers import KINDS

__all__ = ["CorpusRequest", "build_corpus", "main", "summary"]


def summary(request: CorpusRequest, result: BuildResult) -> str:
    """The closing lines of the command."""
    manifest = result.manifest
    eod = f"end of document {manifest.eod}{'' if request.append_eod else ' (not appended: --no-eod)'}"
    lines = [
        f"corpus       {request.output}  ({duration(result.seconds)})",
        f"tokenizer    {manifest.tokenizer_spec}: vocabulary {manifest.vocab_size:,}, {eod}",
    ]
    for name, split in manifest.splits.items():
        if split.documents:
            text = f"{split.documents:,} documents, {split.tokens:,} tokens, {split.bytes / 1e6:,.3f} MB of text"
        elif request.validation_fraction == 0:
            text = "empty, as asked for by --validation-fraction 0: no files, and no validation loss in a run"
        else:
            text = "empty, there is only one document: no files; split the text into more files or JSONL lines"
        lines.append(f"{name:<13}{text}")
        if statistics := result.statistics.get(name):
            lengths = statistics["tokens_per_document"]
            spread = ", ".join(f"{key} {lengths[key]:,}" for key in ("min", "p5", "p50", "p95", "max"))
            lines.append(f"{'':<13}tokens per document: {spread}; bytes per token: {statistics['bytes_per_token']}")
    left_out = result.left_out
    skipped = [
        f"{count:,} {what}"
        for count, what in (
            (left_out.empty, "empty documents"),
            (left_out.bad, "bad documents"),
            (left_out.repeated_files, "files met twice"),
            (left_out.over_limit, "documents over --limit-bytes"),
        )
        if count
    ]
    lines += [f"left out     {', '.join(skipped)}"] if skipped else []
    lines += [f"{'':<13}{fault}" for fault in result.faults]
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
        help="text file, .jsonl file (one object per line), .parquet file, each text or JSONL file also packed (.gz "
        ".bz2 .xz .zst), quoted glob such as 'data/**/*.jsonl.gz', folder (walked), or the word stdlib: the Python "
        "sources of this Python's standard library (a folder of that name is ./stdlib)",
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
        help="files to take from folders (*.txt *.md *.rst *.py *.jsonl, also packed, and *.parquet)",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSONL key or Parquet column (text)")
    parser.add_argument("--limit-bytes", type=int, metavar="N", help="take a random sample of at most N bytes of text")
    parser.add_argument(
        "--eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's end-of-document token",
    )
    parser.add_argument(
        "--on-bad",
        choices=(REFUSE, SKIP),
        default=REFUSE,
        help="a document that is not UTF-8, not JSON or has no text: stop (refuse), or leave it out and count it (skip)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read and tokenize (all cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of the same PREFIX")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; gives the exit code (0, or that of the error)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["show"]:
        # Here and not above: a build needs neither the settings of a run nor its checkpoints.
        from parallel.compat import quiet_megatron

        quiet_megatron()
        from train.corpus.show import main as show

        return show(words[1:])
    options = _parser().parse_args(words)
    workers = options.workers if options.workers is not None else len(os.sched_getaffinity(0))
    # The `tokenizers` package sizes its thread pool from this when it is first used.
    os.environ["RAYON_NUM_THREADS"] = str(max(workers, 1))

    def terminate(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)  # unwinds: the workers leave, finished parts stay

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
            append_eod=options.eod,
            on_bad=options.on_bad,
            workers=workers,
            overwrite=options.overwrite,
        )
        result = build_corpus(request, lambda line: print(line, file=sys.stderr, flush=True))
    except CoppiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted: no corpus was written", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(summary(request, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
