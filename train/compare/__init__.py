"""Holds runs against each other in one HTML page: losses at equal tokens and at equal compute, gap closure.

What is compared, and how: docs/report.md. Reached as `python -m train.report compare`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from train.compare.data import MAX_RUNS, ROLES, compare_runs
from train.compare.figures import draw_comparison
from train.compare.html import comparison_lines, comparison_page
from train.report.files import publish, refuse_bad_target

DEFAULT_OUTPUT = Path("comparison.html")


def compare(
    run_dirs: Sequence[Path],
    output: Path = DEFAULT_OUTPUT,
    labels: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[str]:
    """Compare runs and write the page, with its figures as PNG in the folder named like it.

    Args:
        run_dirs: two runs or more, finished or not.
        output: where to write the page.
        labels: a name for each run; the names of their folders by default.
        roles: the label or folder of the `small`, `grown` and `large` run of the gap closure; found by expert counts if
            none is given.

    Returns:
        The results as lines of plain text, the path of the page last.

    Raises:
        ConfigError: labels, roles or the number of runs do not fit.
        DataError: a run cannot be read, or the page cannot be written.
    """
    refuse_bad_target(output)
    comparison = compare_runs(run_dirs, labels, roles)
    figures = draw_comparison(comparison)
    publish(output, figures, comparison_page(comparison, figures))
    return [*comparison_lines(comparison), f"written: {output}"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The arguments after `compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report compare",
        description="Write one self-contained HTML page that overlays runs at equal tokens and at equal compute.",
        epilog="Definitions: docs/report.md. Exit status: 0; 2 if the arguments do not fit; 3 if a run cannot be read.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help=f"2 to {MAX_RUNS} run directories")
    parser.add_argument("--labels", metavar="NAME", nargs="+", help="a name for each run, in their order")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        default=DEFAULT_OUTPUT,
        help=f"of the page, {DEFAULT_OUTPUT} by default; figures go to the folder of the same name",
    )
    for role, words in zip(ROLES, ("small fixed", "grown", "large fixed"), strict=True):
        text = f"label or directory of the {words} run, for the gap closure; by default found by expert counts"
        parser.add_argument(f"--{role}", metavar="RUN", help=text)
    return parser.parse_args(arguments)


def run_command(arguments: list[str]) -> list[str]:
    """`python -m train.report compare ARGUMENTS`: what to print.

    Raises:
        ConfigError: labels, roles or the number of runs do not fit.
        DataError: a run cannot be read, or the page cannot be written.
    """
    options = parse(arguments)
    roles = {role: value for role in ROLES if (value := getattr(options, role)) is not None}
    return compare(options.run_dirs, options.output, options.labels, roles)
