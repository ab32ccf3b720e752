"""`python -m train.report RUN_DIR`, `python -m train.report compare RUN_DIR RUN_DIR...`: write a page, print its results."""

import argparse
import sys
from pathlib import Path

from parallel.errors import CoppiceError
from train.compare import run_command
from train.report import write_report
from train.report.data import load_run
from train.report.text import summary_lines as record_lines


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the report, or a comparison, and print its results. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        lines = run_command(given[1:]) if given[:1] == ["compare"] else _report(given)
    except CoppiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    return 0


def _report(arguments: list[str]) -> list[str]:
    """Write the report of one run; what to print."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Write one self-contained HTML page about a run (finished or not) and print its results. "
        "`python -m train.report compare RUN_DIR RUN_DIR...` holds several runs against each other.",
        epilog="Definitions of all figures: docs/report.md. Exit status: 0, or 3 if the run cannot be read.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run, with metrics.jsonl in it")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help="write the page here instead of RUN_DIR/report.html; figures go to the folder of the same name",
    )
    options = parser.parse_args(arguments)
    record = load_run(options.run_dir)
    target = write_report(record, options.output)
    return [*record_lines(record), f"written: {target}"]


if __name__ == "__main__":
    sys.exit(main())
