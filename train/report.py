"""The report of a run: one HTML page that shows what happened, above all at the switch.

The page holds its figures inside, needs no network and no script, and depends on nothing but the run directory, so it
can be mailed and made again. What it shows and how each number is defined: docs/report.md.

Usage:

    python -m train.report RUN_DIR [--output PATH]
"""

import argparse
import os
import sys
from pathlib import Path

from parallel.errors import CoppiceError, DataError
from train.report_data import load_run
from train.report_figures import draw_all
from train.report_html import page
from train.report_text import summary_lines as record_lines
from train.run_files import RunFiles, make_directory


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page, and its figures as PNG into the folder named like the page.

    Args:
        run_dir: directory of a run, finished or not.
        output: where to write the page; RUN_DIR/report.html by default, with figures in RUN_DIR/report/.

    Returns:
        Path of the page.

    Raises:
        DataError: no such run, no step yet, a broken line in its files, or the page cannot be written.
    """
    record = load_run(Path(run_dir))
    target = Path(output) if output is not None else RunFiles(run_dir).report
    if not target.parent.is_dir():
        raise DataError(f"--output {target}: the folder {target.parent} does not exist: create it first")
    if target.is_dir():
        raise DataError(f"--output {target}: is a folder: name a file, such as {target / 'report.html'}")
    folder = target.with_suffix("") if target.suffix else target.with_name(f"{target.name}-figures")
    figures = draw_all(record)
    make_directory(folder)
    for figure in figures:
        _publish(folder / f"{figure.name}.png", figure.wide_png)
    _publish(target, page(record, figures).encode("utf-8"))
    return target


def summary_lines(run_dir: Path) -> list[str]:
    """The results of a run as one screen of plain text: losses around the switch, tokens per second, pause, paths.

    Raises:
        DataError: no such run, no step yet, or a broken line in its files.
    """
    return record_lines(load_run(Path(run_dir)))


def _publish(path: Path, data: bytes) -> None:
    """Write beside the target and rename: a reader never sees half a page."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}): choose another --output") from error


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the report and print the summary. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Write one self-contained HTML page about a run (finished or not) and print its results.",
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
    try:
        target = write_report(options.run_dir, options.output)
        print("\n".join(summary_lines(options.run_dir)))
    except CoppiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
