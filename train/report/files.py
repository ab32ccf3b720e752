"""Writes a page and its figures, each as a whole: a reader never sees half of one."""

import os
from pathlib import Path

from parallel.errors import DataError
from train.report.plot import ReportFigure
from train.run_files import make_directory


def publish(target: Path, figures: list[ReportFigure], page: str) -> Path:
    """Write the figures as PNG into the folder named like the page, then the page.

    Args:
        target: of the page; its figures go to `target` without its suffix.
        figures: of the page.
        page: HTML.

    Returns:
        Path of the page.

    Raises:
        DataError: the disk refuses.
    """
    folder = target.with_suffix("") if target.suffix else target.with_name(f"{target.name}-figures")
    make_directory(folder)
    for figure in figures:
        _replace(folder / f"{figure.name}.png", figure.wide_png)
    _replace(target, page.encode("utf-8"))
    return target


def refuse_bad_target(target: Path) -> None:
    """Refuse a place where no page can be written, before anything is drawn.

    Raises:
        DataError: its folder does not exist, or it is one.
    """
    if not target.parent.is_dir():
        raise DataError(f"--output {target}: the folder {target.parent} does not exist: create it first")
    if target.is_dir():
        raise DataError(f"--output {target}: is a folder: name a file, such as {target / 'report.html'}")


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}): choose another --output") from error
