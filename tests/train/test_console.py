"""What a run shows: a panel on a terminal that disturbs no line, lines everywhere else. Every terminal here is a real one (pty)."""

import contextlib
import fcntl
import functools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import CoppiceError
from tests.distributed import run_distributed
from tests.train.screen import Screen
from tests.train.trainer import SMALL, small_corpus, train_here
from train.config import RunSettings
from train.console import Console
from train.panel import RESTORE, Pace, upcoming
from train.settings import load_settings

_ROOT = Path(__file__).resolve().parents[2]
_BEGIN = {"step": 29, "stage": 0, "num_experts": 8}
_RECORD = {"step": 30, "stage": 0, "num_experts": 8, "lm_loss": 2.4567, "grad_norm": 1.25, "learning_rate": 3e-4,
           "tokens_per_second": 23456.0}  # fmt: skip


class Terminal:
    """A pseudo-terminal that standard output leads to, and all that was written to it.

    A thread reads, as a terminal does: a writer would wait otherwise once some kilobytes are there.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.master, self.slave = pty.openpty()
        self.out = os.fdopen(os.dup(self.slave), "w", encoding="utf-8")
        self.written = b""
        self.screen = Screen(columns, rows)
        self.resize(columns, rows)
        self._over = False
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _drain(self) -> None:
        while not self._over:
            if select.select([self.master], [], [], 0.05)[0]:
                self.written += os.read(self.master, 1 << 16)

    def read(self, seconds: float = 0.2) -> str:
        """All that was written so far, once nothing came for so long."""
        known = -1
        while known < len(self.written):
            known = len(self.written)
            time.sleep(seconds)
        text = self.written.decode(errors="ignore")
        self.screen = Screen(self.screen.columns, self.screen.rows)
        self.screen.feed(text)
        return text

    def until(self, seen: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + 60
        while not seen(text := self.read(0.05)):
            assert time.monotonic() < deadline, f"not seen on the terminal: {text!r}"
        return text

    def hang_up(self) -> None:
        """Close it as its window."""
        if not self._over:
            self._over = True
            self._reader.join()
            os.close(self.master)

    def close(self) -> None:
        self.hang_up()
        with contextlib.suppress(OSError):
            self.out.close()
        os.close(self.slave)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Terminal]]:
    """Makes standard output a terminal of some size, in an environment where a person sits before it."""
    made: list[Terminal] = []
    for name in ("SLURM_JOB_ID", "CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def make(columns: int = 100, rows: int = 24) -> Terminal:
        made.append(Terminal(columns, rows))
        monkeypatch.setattr(sys, "stdout", made[-1].out)
        return made[-1]

    yield make
    monkeypatch.undo()
    for one in made:
        one.close()


@functools.cache
def _settings(*words: str) -> RunSettings:
    return load_settings(["experiment=demo", "model=tiny", "run.dir=runs/look", "run.steps=120", "schedule.decay_steps=5",
                          "evaluation.interval_steps=20", "checkpoint.interval_steps=50",
                          "upcycle.stages=[{at_step: 45, factor: 2}]", *words], 1)  # fmt: skip


def _drawn(text: str) -> bool:
    return "now" in text and "2.4567" in text


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_panel_disturbs_no_line(terminal: Any, columns: int) -> None:
    shown, settings = terminal(columns, 24), _settings()
    console = Console(0, settings.run)
    console.say("the opening")
    console.open_panel(lambda: "step 31", _BEGIN, settings)
    console.observe(_RECORD, settings)
    shown.until(_drawn)
    expected = ["the opening"]
    for number in range(12):
        expected += [f"said {number} {'x' * (3 * number + 1)}", f"foreign {number}"]
        console.say(expected[-2])
        # Another process on the same terminal, as other ranks and their errors are.
        subprocess.run(["sh", "-c", f"echo foreign {number} >&2"], stderr=shown.slave, check=True)
        if number == 6:
            console.observe({**_RECORD, "step": 31, "valid_loss": 2.3999}, settings)
            shown.until(lambda text: "2.3999" in text)
    shown.read()
    panel = next(i for i, line in enumerate(shown.screen.lines) if "runs/look" in line)
    # The region that scrolls ends right above the panel, which reaches to the last row.
    assert shown.screen.bottom == panel - 1
    inside = shown.screen.lines[panel:]
    text = "\n".join(inside)
    for value in ("31/120", "loss 2.4567", "validation 2.3999", "grad norm 1.25", "lr 3.00e-04", "tokens/s 23,456",
                  "left 0:", "experts 8", "stage 0", "next evaluation after 40", "now step 31"):  # fmt: skip
        assert value in text
    assert all(len(line.rstrip()) < columns for line in inside)
    if columns > 70:
        assert "next evaluation after 40, expansion after 45, save after 50, end after 120" in text
    console.close()
    console.say("the end")
    shown.read()
    # Nothing is lost, doubled or mixed up, and the panel has left nothing behind.
    assert "".join(shown.screen.text) == "".join([*expected, "the end"])
    assert (shown.screen.top, shown.screen.bottom) == (0, 23)


@pytest.mark.parametrize(
    ("choice", "environment", "panel"),
    [
        ("auto", {}, True),
        ("auto", {"SLURM_JOB_ID": "7"}, False),
        ("auto", {"CI": "true"}, False),
        ("auto", {"TERM": "dumb"}, False),
        ("plain", {}, False),
        ("panel", {"SLURM_JOB_ID": "7", "CI": "true"}, True),
        ("panel", {"TERM": "dumb"}, False),
    ],
)
def test_who_gets_a_panel(
    terminal: Any, monkeypatch: Any, choice: str, environment: dict[str, str], panel: bool
) -> None:
    shown, settings = terminal(), _settings(f"run.console={choice}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = Console(0, settings.run)
    console.open_panel(lambda: "step 31", _BEGIN, settings)
    console.observe(_RECORD, settings)
    if panel:
        shown.until(_drawn)
    console.progress(_RECORD, "end at 120")
    console.close()
    text = shown.read()
    assert ("\x1b" in text) == panel
    # A panel says it already.
    assert ("step     30/120  loss 2.4567" in text) != panel


def test_other_ranks_and_files_get_no_panel(terminal: Any, capfd: Any) -> None:
    shown, settings = terminal(), _settings()
    other = Console(1, settings.run)
    other.open_panel(lambda: "step 31", _BEGIN, settings)
    other.observe(_RECORD, settings)
    other.say("nobody hears this")
    other.close()
    assert shown.read() == ""
    sys.stdout = sys.__stdout__
    settings = _settings("run.console=panel")
    console = Console(0, settings.run)
    console.open_panel(lambda: "step 31", _BEGIN, settings)
    console.progress(_RECORD, "end at 120")
    assert "\x1b" not in capfd.readouterr().out


def test_colours_are_the_readers_choice(terminal: Any, monkeypatch: Any) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*\b(?:3[0-9]|38;[0-9;]+)m")
    for wanted in (True, False):
        if not wanted:
            monkeypatch.setenv("NO_COLOR", "1")
        shown, settings = terminal(), _settings()
        console = Console(0, settings.run)
        console.open_panel(lambda: "step 31", _BEGIN, settings)
        console.observe(_RECORD, settings)
        text = shown.until(_drawn)
        console.close()
        assert bool(coloured.search(text)) == wanted


def test_a_small_terminal_gets_lines_until_it_grows(terminal: Any) -> None:
    shown, settings = terminal(30, 24), _settings()
    console = Console(0, settings.run)
    console.open_panel(lambda: "step 31", _BEGIN, settings)
    deadline = time.monotonic() + 20
    while not console._panel.hidden:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    console.progress(_RECORD, "end at 120")
    assert "\x1b" not in shown.read() and "loss 2.4567" in shown.read()
    shown.resize(100, 24)
    console.observe(_RECORD, settings)
    shown.until(lambda text: "now" in text)
    console.close()


def test_a_terminal_that_goes_away_costs_nothing(terminal: Any) -> None:
    shown, settings = terminal(), _settings()
    console = Console(0, settings.run)
    console.open_panel(lambda: "step 31", _BEGIN, settings)
    console.observe(_RECORD, settings)
    shown.until(_drawn)
    shown.hang_up()
    panel = console._panel
    assert panel is not None
    panel._thread.join(20)
    assert panel.hidden and not panel._thread.is_alive()
    console.observe(_RECORD, settings)
    console.close()


def test_a_step_pays_microseconds(terminal: Any) -> None:
    shown, settings = terminal(), _settings()
    console = Console(0, settings.run)
    console.open_panel(lambda: "step 31", _BEGIN, settings)
    took = []
    for step in range(2000):
        began = time.perf_counter()
        console.observe({**_RECORD, "step": step}, settings)
        took.append(time.perf_counter() - began)
    shown.read()
    console.close()
    assert sorted(took)[len(took) // 2] < 0.2e-3


def test_what_comes_next() -> None:
    settings = _settings()
    assert upcoming(settings, 30, 0) == [(40, "evaluation"), (45, "expansion"), (50, "save"), (120, "end")]
    assert upcoming(settings, 45, 1) == [(50, "save"), (60, "evaluation"), (120, "end")]
    assert upcoming(_settings("run.stop_at_step=42"), 30, 0) == [(40, "evaluation"), (42, "stop")]


def test_the_pace_forgets_what_was_taken_back() -> None:
    pace = Pace()
    pace.mark(5, 0.0)
    assert pace.seconds() is None
    pace.mark(6, 1.0)
    pace.mark(9, 7.0)
    assert pace.seconds() == 7 / 4
    pace.mark(4, 100.0)
    pace.mark(5, 102.0)
    assert pace.seconds() == 2.0


def _train_on(device: str, words: list[str]) -> str:
    with open(device, "w") as out, contextlib.redirect_stdout(out):
        try:
            return train_here(words)
        except CoppiceError as e:
            print(f"error: {e}")
            return "failed"


def test_a_run_that_fails_gives_the_terminal_back_first(tmp_path: Path, terminal: Any) -> None:
    """An expansion, evaluations and a save are said above the panel; then a step is bad, which ends it."""
    shown = terminal(120, 40)
    words = [*SMALL, f"data.corpus={small_corpus(tmp_path)}", f"run.dir={tmp_path / 'run'}", "run.steps=60",
             "schedule.learning_rate=1e-9", "schedule.min_learning_rate=0", "health.bad_steps=1", "run.log_interval_steps=1",
             "health.spike_factor=1.0001", "health.spike_window_steps=4"]  # fmt: skip
    assert run_distributed(_train_on, 1, os.ttyname(shown.slave), words) == ["failed"]
    text = shown.read()
    assert text.count(RESTORE) == 1 and text.index(RESTORE) < text.index("error: 1 bad steps in a row"), text
    assert (shown.screen.top, shown.screen.bottom) == (0, 39)
    seen = "\n".join(shown.screen.text)
    assert "step 3: validation loss" in seen and "expanded 8 -> 16 experts" in seen and "is bad" in seen
    assert not re.search(r"^(now|next|loss) |left 0:", seen, re.MULTILINE) and "step      1/" not in seen


@pytest.mark.slow
def test_a_run_under_the_launcher_on_a_terminal(tmp_path: Path, terminal: Any) -> None:
    """The demo's command: torchrun and the ranks inherit the terminal, and rank 0 finds it. A request to stop closes it."""
    shown = terminal(120, 60)
    words = [*SMALL, f"data.corpus={small_corpus(tmp_path)}", f"run.dir={tmp_path / 'run'}", "upcycle.stages=[]",
             "run.steps=100000", "run.log_interval_steps=1"]  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "launch", "local", "--processes", "2", "--", *words]
    process = subprocess.Popen(command, cwd=_ROOT, stdin=shown.slave, stdout=shown.slave, stderr=shown.slave)
    deadline = time.monotonic() + 120
    try:
        while not re.search(r"step [1-9]\d*/100,000", shown.read()):
            assert process.poll() is None and time.monotonic() < deadline, shown.screen.text
        assert shown.screen.bottom < 59
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            assert time.monotonic() < deadline, shown.screen.text
            shown.read()
    finally:
        process.kill()
    text = shown.read()
    assert process.returncode == 0, shown.screen.text
    # By rank 0, between the last line of the run and the report.
    assert RESTORE in text and text.index("stopped after step") < text.index(RESTORE) < text.index("report drawn")
    assert (shown.screen.top, shown.screen.bottom) == (0, 59)
    seen = [line for line in shown.screen.text if line]
    assert seen[0].startswith("run ") and seen[-1].startswith("report drawn")
    assert "stopping after this step, with a checkpoint" in seen
    # The panel has taken the place of the lines, and left nothing.
    assert not [line for line in seen if line.startswith(("step 1 ", "now ", "next "))]
