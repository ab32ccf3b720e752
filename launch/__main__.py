"""`python -m launch COMMAND`: front ends that start a run, or say what one would do."""

import argparse
import importlib
import sys

from parallel.errors import CoppiceError

# Each is a module of this package with `add_arguments(parser)` and `run(arguments) -> int`, its exit code; a command is
# imported when it is asked for.
_COMMANDS = {
    "local": "processes on this machine, under torchrun",
    "plan": "memory, traffic, checkpoints and FLOPs of a run, without a GPU",
    "preflight": "checks of machine, settings and files before a run",
    "slurm": "a job of SLURM, submitted with sbatch",
    "sweep": "how the points of a sweep stand",
}


def main(words: list[str] | None = None) -> int:
    """Parse the command line and carry it out; errors are one line and an exit code."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start Coppice runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, told in _COMMANDS.items():
        command = commands.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.")
        if words[:1] == [name]:
            importlib.import_module(f"launch.{name}").add_arguments(command)
    # argparse takes a list of words in one piece only, and options may well stand between settings.
    arguments, later = parser.parse_known_args(words)
    if any(word.startswith("-") for word in later) or (later and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:
        arguments.overrides = [*arguments.overrides, *later]
    try:
        return int(importlib.import_module(f"launch.{arguments.command}").run(arguments))
    except CoppiceError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
