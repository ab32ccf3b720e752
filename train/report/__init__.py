"""The report of a run: one HTML page that shows what happened, above all at the switch.

The page holds its figures inside, needs no network and no script, and depends on nothing but the run directory, so it
can be mailed and made again. What it shows and how each number is defined: docs/report.md.

Usage:

    python -m train.report RUN_DIR [--output PATH]
    python -m train.report compare RUN_DIR RUN_DIR... [--labels NAME...] [--output PATH]
"""

from pathlib import Path

from train.report.data import RunRecord, load_run
from train.report.figures import draw_all
from train.report.files import publish, refuse_bad_target
from train.report.html import page
from train.report.text import summary_lines as record_lines


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
