"""`python -m launch COMMAND`: front ends that start a run."""

import argparse
import sys

from launch.local import run_local
from parallel.errors import CoppiceError


def main() -> int:
    """Parse the command line and start; errors are one line and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start Coppice runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser(
        "local",
        help="processes on this machine, under torchrun",
        description="Start `-m train` under torchrun on this machine, with a free port unless one is named.",
    )
    local.add_argument("--processes", type=int, required=True, help="processes to start (one per GPU where there are)")
    local.add_argument("--port", type=int, help="rendezvous port; a free one by default")
    local.add_argument("overrides", nargs="*", help="settings, as for `python -m train`")
    arguments = parser.parse_args()
    try:
        return run_local(arguments.processes, arguments.port, arguments.overrides)
    except CoppiceError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
