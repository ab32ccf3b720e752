"""The live panel at the foot of a terminal: where the run stands, redrawn twice a second by a thread of its own.

The terminal's scrolling region ends above the panel. So whatever anybody writes (lines said by the run, warnings, errors of
other processes on the same terminal) scrolls by above it as without a panel: nothing is overwritten, swallowed or mixed up.
Each redrawing is one write that puts the cursor back. The step itself only leaves its figures here.

    panel = Panel(sys.stdout, lambda: "step 12", {"step": 11, "stage": 0, "num_experts": 8}, settings)
    panel.show({"step": 12, "lm_loss": 2.5}, settings)      # microseconds, draws nothing
    panel.close()                                           # the terminal is as before
"""

import atexit
import contextlib
import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from train.config import RunSettings
from train.console import duration

_REFRESH_SECONDS = 0.5
# Below this there is no panel: it needs room for itself, and lines need room above it.
LEAST_COLUMNS, LEAST_ROWS = 40, 16
# Steps over which the pace is taken.
_PACE_STEPS = 50
# Columns of a figure with its label, and the widest panel that is still read at a glance.
_CELL, _WIDEST = 19, 160
# Save the cursor, let the whole terminal scroll again, put the cursor back, clear what lies below it: the panel. It does
# not depend on where the panel was, so that a launcher can do it for a rank that was killed.
RESTORE = "\x1b7\x1b[r\x1b8\x1b[J"


def upcoming(settings: RunSettings, step: int, stage: int) -> list[tuple[int, str]]:
    """What will happen between two steps, nearest first: (after which step, what).

    Args:
        settings: of the run, on its course.
        step: made so far.
        stage: number of the current one.
    """
    end = min(settings.run.steps, settings.run.stop_at_step or settings.run.steps)
    found: list[tuple[int, str]] = []
    for every, what in (
        (settings.evaluation.interval_steps, "evaluation"),
        (settings.checkpoint.interval_steps, "save"),
    ):
        if every:
            found.append((step - step % every + every, what))
    for later in settings.upcycle.stages[stage : stage + 1]:
        if later.at_step is not None:
            found.append((later.at_step, "expansion" if later.grows() else "layout change"))
    found.append((end, "end" if end == settings.run.steps else "stop"))
    return sorted((event for event in found if step <= event[0] <= end), key=lambda event: event[0])


class Pace:
    """Wall-clock seconds per step over the last steps, saves and evaluations between them included."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=_PACE_STEPS)

    def mark(self, step: int, now: float) -> None:
        """Take note of a step that has just been made."""
        if self._marks and step <= self._marks[-1][0]:
            # The run has gone back.
            self._marks.clear()
        self._marks.append((step, now))

    def seconds(self) -> float | None:
        """Of one step; None before the second."""
        # A copy: the run marks on.
        marks = tuple(self._marks)
        if len(marks) < 2:
            return None
        (first, began), (last, ended) = marks[0], marks[-1]
        return (ended - began) / (last - first)


def panel_content(
    figures: Mapping[str, Any], settings: RunSettings, pace: float | None, doing: str, columns: int
) -> RenderableType:
    """What the panel shows.

    Args:
        figures: newest value of each key of metrics.jsonl, and `valid_loss`.
        settings: of the run.
        pace: seconds per step, if known.
        doing: what goes on.
        columns: that it may take.
    """
    step, steps = figures["step"], settings.run.steps
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(Text(f"step {step:,}/{steps:,}", style="bold"), ProgressBar(steps, step), Text(f"{step / steps:.0%}"))
    values = [
        ("loss", _number(figures.get("lm_loss"), ".4f")),
        ("validation", _number(figures.get("valid_loss"), ".4f")),
        ("grad norm", _number(figures.get("grad_norm"), ".3g")),
        ("lr", _number(figures.get("learning_rate"), ".2e")),
        ("tokens/s", _number(figures.get("tokens_per_second"), ",.0f")),
        ("left", "-" if pace is None else duration(pace * (steps - step))),
        ("experts", _number(figures["num_experts"], "d")),
        ("stage", _number(figures["stage"], "d")),
    ]
    ahead = ", ".join(f"{what} after {at:,}" for at, what in upcoming(settings, step, figures["stage"]))
    title = Rule(Text(settings.run.dir, overflow="ellipsis", no_wrap=True), style="dim")
    return Group(title, bar, _table(values, columns), _line("next", ahead), _line("now", doing))


def _table(values: list[tuple[str, str]], columns: int) -> Table:
    across = max(1, min(len(values), columns // _CELL))
    # Rows of equal length: 8 figures in 5 columns read worse than in 4.
    across = -(-len(values) // -(-len(values) // across))
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in range(across):
        table.add_column(ratio=1, no_wrap=True)
    cells = [Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in values]
    for row in range(0, len(cells), across):
        table.add_row(*cells[row : row + across])
    return table


def _line(label: str, text: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), text, no_wrap=True, overflow="ellipsis")


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


class Panel:
    """Draws at the foot of a terminal until it is closed.

    Args:
        out: the terminal; its encoding and rich's view of its colours (NO_COLOR, TERM) decide how the panel looks.
        doing: says what goes on; asked by the thread.
        figures: what is known so far; at least `step`, `stage` and `num_experts`.
        settings: of the run.
    """

    def __init__(
        self, out: TextIO, doing: Callable[[], str], figures: Mapping[str, Any], settings: RunSettings
    ) -> None:
        self._fd, self._encoding = out.fileno(), out.encoding or "ascii"
        self._doing, self._figures, self._settings = doing, dict(figures), settings
        self._pace = Pace()
        # What was going on at the last look, and since when.
        self._act: tuple[str, float] = ("", 0.0)
        # Columns and rows of the terminal and rows of the panel in it; None while there is none.
        self._place: tuple[int, int, int] | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        # Whether lines are wanted instead: the terminal has become too small, or is gone.
        self.hidden = False
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._loop, name="panel", daemon=True)
        self._thread.start()

    def show(self, figures: Mapping[str, Any], settings: RunSettings | None = None) -> None:
        """Leave figures to be shown; those of a step with the settings of the run."""
        if settings is not None:
            self._pace.mark(figures["step"], time.monotonic())
            self._settings = settings
        self._figures.update(figures)

    def close(self) -> None:
        """Give the terminal back; may be called again."""
        self._over.set()
        atexit.unregister(self.close)
        with self._lock:
            if self._place is not None:
                self._write(RESTORE)
                self._place = None

    def _loop(self) -> None:
        try:
            while not self._over.is_set():
                with self._lock:
                    if not self._over.is_set():
                        self._draw()
                self._over.wait(_REFRESH_SECONDS)
        finally:
            self.hidden = True

    def _draw(self) -> None:
        try:
            columns, rows = os.get_terminal_size(self._fd)
        except OSError:
            # Nobody looks any more.
            self.hidden, self._place = True, None
            self._over.set()
            return
        self.hidden = columns < LEAST_COLUMNS or rows < LEAST_ROWS
        if self.hidden:
            if self._place is not None:
                self._write(RESTORE)
                self._place = None
            return
        lines = self._render(columns)
        place = (columns, rows, len(lines))
        text = ""
        if place != self._place:
            # Room is made by scrolling, from wherever the cursor is; it stays in its column.
            text = RESTORE if self._place is not None else ""
            text += "\x1bD" * len(lines) + f"\x1b[{len(lines)}A\x1b7\x1b[1;{rows - len(lines)}r\x1b8"
        drawn = "".join(f"\x1b[{rows - len(lines) + 1 + i};1H{line}\x1b[0m\x1b[K" for i, line in enumerate(lines))
        if self._write(f"{text}\x1b7{drawn}\x1b8"):
            self._place = place

    def _render(self, columns: int) -> list[str]:
        """The lines of the panel for a terminal of so many columns; the last column stays free, or the line would wrap."""
        now, doing = time.monotonic(), self._doing()
        if doing != self._act[0]:
            self._act = (doing, now)
        lasted = now - self._act[1]
        told = f"{doing}, {lasted:.0f} s" if lasted >= 2 else doing
        width = min(columns - 1, _WIDEST)
        sheet = io.TextIOWrapper(io.BytesIO(), encoding=self._encoding)
        console = Console(file=sheet, force_terminal=True, width=width, legacy_windows=False)
        with console.capture() as capture:
            content = panel_content(dict(self._figures), self._settings, self._pace.seconds(), told, width)
            console.print(content, end="")
        return capture.get().splitlines()

    def _write(self, text: str) -> bool:
        """Write in one call of the system where it takes it, past Python's buffers; False if the terminal is gone."""
        data = text.encode(self._encoding, "replace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._fd, data) :]
        if data:
            self.hidden = True
            self._over.set()
        return not data
