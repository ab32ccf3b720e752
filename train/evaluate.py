"""`python -m train.evaluate CHECKPOINT | RUN_DIR [--data NAME=PREFIX ...] [KEY=VALUE ...]`: the loss on validation sets.

Alone or under torchrun, in any layout. Prints a table; writes nothing but what `--json` and `--cache` name.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError, CoppiceError, DataError
from train.checkpoint.files import refuse_inside
from train.schema.evaluation import EvaluationSet, check_set_name

if TYPE_CHECKING:
    from train.evaluation import Figures
    from train.offline.evaluation import Task

_ABOUT = """\
Evaluate a checkpoint, or the newest one of a run, on validation sets.

  python -m train.evaluate runs/demo                                      on the sets of the run
  python -m train.evaluate runs/demo --data code=data/code --data wiki=data/wiki --batches all
  torchrun --nproc-per-node 4 -m train.evaluate runs/demo/checkpoints/step-00000070 parallel.expert=4
"""
_COLUMNS = ("set", "tokens", "loss", "perplexity", "bits per byte", "tokens/s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT | RUN_DIR")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings on top of the checkpoint's, such as parallel.expert=2",
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=PREFIX", help="a set: its name and a corpus; repeatable"
    )
    parser.add_argument("--split", choices=("valid", "train"), help="part of the corpora of --data (default valid)")
    parser.add_argument(
        "--batches", metavar="N | all", help="global batches per set of --data (default evaluation.batches of the run)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures as JSON too")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep index files here; on several machines a folder that all of them see",
    )
    return parser


def _entries(arguments: argparse.Namespace) -> list[EvaluationSet]:
    """The sets of the command line.

    Raises:
        ConfigError: naming the option and the remedy.
    """
    entries: list[EvaluationSet] = []
    for word in arguments.data:
        name, _, prefix = word.partition("=")
        if not prefix:
            raise ConfigError(f"--data {word}: give a name and a corpus, NAME=PREFIX")
        check_set_name("--data NAME", name)
        if any(name == entry.name for entry in entries):
            raise ConfigError(f"--data {word}: there is a set {name} already: choose another name")
        entries.append(EvaluationSet(name=name, prefix=prefix, split=arguments.split or "valid"))
    if not entries and (arguments.split or arguments.batches):
        raise ConfigError(
            "--split and --batches go with --data NAME=PREFIX; for the sets of the run use evaluation.batches=N"
        )
    return entries


def _batches(text: str | None) -> int | None:
    """A number of batches; None for the run's, and for `all`."""
    if text is None or text == "all":
        return None
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--batches={text}: give a number above zero, or all")
    return int(text)


def _refuse_unwritable(arguments: argparse.Namespace) -> None:
    """Refuse an output that cannot be, before the work is done."""
    path, cache = arguments.json, arguments.cache
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise DataError(f"--json {path} cannot be written: name a file in a folder that exists")
    for option, place in (("--json", path), ("--cache", cache)):
        if place is not None:
            refuse_inside(option, place)
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"--cache {cache} cannot be made ({e.strerror}): name a folder that can be written") from None
    if cache is not None and not os.access(cache, os.W_OK):
        raise DataError(f"--cache {cache} cannot be written: name a folder that can be")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _row(name: str, figures: "Figures") -> list[str]:
    bits = "-" if figures.bits_per_byte is None else f"{figures.bits_per_byte:.4f}"
    speed = f"{figures.tokens / figures.seconds:,.0f}"
    return [name, f"{figures.tokens:,}", f"{figures.loss:.4f}", f"{figures.perplexity:,.2f}", bits, speed]


def _record(task: "Task", found: Mapping[str, "Figures"], layout: dict[str, int]) -> dict[str, Any]:
    """What `--json` writes."""
    manifest = task.source.manifest
    return {
        "checkpoint": str(task.source.path),
        "step": manifest.step,
        "stage": manifest.stage,
        "num_experts": manifest.num_experts,
        "layout": layout,
        "sets": {
            opened.name: {
                **found[opened.name].to_dict(),
                "tokens_per_second": found[opened.name].tokens / found[opened.name].seconds,
                "corpora": [str(part.prefix) for part, _ in opened.corpora],
                "split": opened.split,
                "batches": opened.batches,
            }
            for opened in task.sets
        },
    }


def _run(arguments: argparse.Namespace) -> None:
    for word in arguments.overrides:
        if "=" not in word:
            raise ConfigError(f"{word} is no KEY=VALUE: name one checkpoint or run, then settings")
    entries, batches = _entries(arguments), _batches(arguments.batches)
    _refuse_unwritable(arguments)
    # Before anything else of mcore is imported: it warns at import of what is not installed.
    from parallel.compat import prepare_megatron

    prepare_megatron()
    from train.offline.evaluation import evaluate_checkpoint, prepare
    from train.run_files import encode_line, write_json

    task = prepare(arguments.source, arguments.overrides, entries, batches, every=arguments.batches == "all")
    found, layout = evaluate_checkpoint(task, arguments.cache)
    if os.environ.get("RANK", "0") != "0":
        return
    manifest = task.source.manifest
    print(f"{task.source.path}: step {manifest.step}, stage {manifest.stage}, {manifest.num_experts} experts")
    for line in _table([list(_COLUMNS), *(_row(name, figures) for name, figures in found.items())]):
        print(line)
    if arguments.json:
        # A loss that is no number is null, as in events.
        write_json(arguments.json, json.loads(encode_line(_record(task, found, layout))))


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, and turn errors into one line and an exit code.

    Args:
        words: instead of the command line.
    """
    arguments = _parser().parse_intermixed_args(words)
    try:
        _run(arguments)
    except CoppiceError as e:
        return e.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
