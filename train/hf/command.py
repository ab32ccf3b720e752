"""The commands of `python -m model.hf`: import and export of published models (docs/huggingface.md)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import ConfigError, CoppiceError

_ABOUT = """\
Between the folders of Hugging Face (config.json, safetensors) and checkpoints of Coppice, in bounded memory.

  python -m model.hf import Mixtral-8x7B-v0.1 --output imported
  torchrun ... -m train run.resume=imported data.corpus=... 'upcycle.stages=[{at_step: 100, factor: 2}]'
  python -m model.hf export runs/grown --output Mixtral-16x7B
"""
_DTYPES = ("float32", "bfloat16", "float16")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.hf", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="write a checkpoint with the weights of a published model")
    into.add_argument("source", type=Path, metavar="SOURCE", help="folder with config.json and safetensors")
    into.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="run.precision of the runs to come (default: by the weights' type)",
    )
    into.add_argument("--vocab-multiple", type=int, default=128, metavar="N", help="model.vocab_multiple (default 128)")
    out = commands.add_parser("export", help="write a checkpoint as a published model")
    out.add_argument("source", type=Path, metavar="CHECKPOINT | RUN_DIR")
    out.add_argument(
        "--like", type=Path, metavar="DIR", help="folder of the family, for a run that did not begin with one"
    )
    out.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: that of the model it began with)")
    out.add_argument("--shard-mib", type=int, default=5120, metavar="MIB", help="size of one file (default 5120)")
    for command in (into, out):
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
        command.add_argument(
            "--chunk-mib", type=int, default=16, metavar="MIB", help="memory for a piece of a tensor (default 16)"
        )
    return parser


def _positive(arguments: argparse.Namespace) -> None:
    for name in ("chunk_mib", "shard_mib", "vocab_multiple"):
        value = getattr(arguments, name, 1)
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be 1 or more")


def _import(arguments: argparse.Namespace) -> None:
    from train.hf.importing import import_published

    manifest = import_published(
        arguments.source,
        arguments.output,
        precision=arguments.precision,
        vocab_multiple=arguments.vocab_multiple,
        chunk_bytes=arguments.chunk_mib << 20,
        say=_say,
    )
    assert manifest.imported is not None
    print(
        f"{arguments.output}: {manifest.imported['family']}, {manifest.num_experts} experts, weights only "
        f"({manifest.config['run']['precision']}); begin with it by run.resume={arguments.output}"
    )


def _export(arguments: argparse.Namespace) -> None:
    from train.hf.exporting import export_checkpoint
    from train.offline.expand import find_checkpoint

    done = export_checkpoint(
        find_checkpoint(arguments.source),
        arguments.output,
        like=arguments.like,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_mib << 20,
        chunk_bytes=arguments.chunk_mib << 20,
        say=_say,
    )
    experts = f"{done.experts} experts, " if done.experts else ""
    print(
        f"{arguments.output}: {done.family}, {experts}{done.tensors} tensors, {done.size / 2**20:,.1f} MiB in {done.dtype}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line and act; errors are one line and an exit code.

    Args:
        words: instead of the command line.
    """
    arguments = _parser().parse_args(words)
    try:
        # Before anything else of mcore is imported: it warns at import of what is not installed.
        from parallel.compat import prepare_megatron

        prepare_megatron()
        _positive(arguments)
        {"import": _import, "export": _export}[arguments.command](arguments)
    except CoppiceError as e:
        _say(f"error: {e}")
        return e.exit_code
    return 0
