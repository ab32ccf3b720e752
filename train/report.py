"""The report of a run: one HTML page that shows what happened, above all at the switch.

The page holds its figures inside, needs no network and no script, and depends on nothing but the run directory, so it
can be mailed and made again. What it shows and how each number is defined: docs/report.md.

Usage:

    python -m train.report RUN_DIR [--output PATH]
    python -m train.report compare RUN_DIR RUN_DIR... [--labels NAME...] [--output PATH]
"""

import argparse
import sys
from pathlib import Path

from parallel.errors import CoppiceError
from train.compare import run_command
from train.report_data import RunRecord, load_run
from train.report_figures import draw_all
from train.report_files import publish, refuse_bad_target
from train.report_html import page
from train.report_text import summary_lines as record_lines


def write_report(run: Path | RunRecord, output: Path | None = None) -> Path:
    """Write the page, and its figures as PNG into the folder named like the page.

    Args:
        run: directory of a run, finished or not; or what was read from it, which is half of the work for a long run.
        output: where to write the page; RUN_DIR/report.html by default, with figures in RUN_DIR/report/.

    Returns:
        Path of the page.

    Raises:
        DataError: no such run, no step yet, a broken line in its files, or the page cannot be written.
    """
    record = run if isinstance(run, RunRecord) else load_run(Path(run))
    target = Path(output) if output is not None else record.files.report
    refuse_bad_target(target)
    figures = draw_all(record)
    return publish(target, figures, page(record, figures))


def summary_lines(run_dir: Path) -> list[str]:
    """The results of a run as one screen of plain text: losses around the switch, tokens per second, pause, paths.

    Raises:
        DataError: no such run, no step yet, or a broken line in its files.
    """
    return record_lines(load_run(Path(run_dir)))


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
