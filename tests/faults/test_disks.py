"""Disks that are slow or read-only, and clocks that are wrong: no checkpoint is lost, and no run is another one for it."""

import contextlib
import itertools
import os
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.agent import run_under_agent
from tests.faults.disks import ReadOnly, WrongClock, at_step, slow_disk
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_here
from train.checkpoint.files import wrong_files
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.status import read_status


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    """Eight steps with dropout, a switch after the third, a checkpoint of every step."""
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", "run.steps=8", "model.dropout=0.1",
            "checkpoint.interval_steps=1", "checkpoint.keep_last=20", "parallel.timeout_seconds=60", *more]  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_under_agent(train_here, 2, _run(corpus, run_dir)).results == ["finished"] * 2
    return run_dir


def _outcome(run_dir: Path) -> tuple[Any, Any]:
    steps = {s: (m["lm_loss"], m["grad_norm"], m["num_experts"]) for s, m in metrics(run_dir).items()}
    return steps, read_manifest(list_checkpoints(run_dir)[-1]).fingerprints


def _names(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir)]


def _problems(run_dir: Path) -> dict[str, str | None]:
    """What is wrong with each published checkpoint: with its seal, or with any byte of its files."""
    return {p.name: wrong_files(p, read_manifest(p).files, "digests") for p in list_checkpoints(run_dir)}


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# ---- slow -------------------------------------------------------------------------------------------------------------


def _train_on_a_slow_disk(overrides: list[str]) -> list[tuple[str, int, int, float, float]]:
    """A run that notes of each save in the background: its name, the steps made when it began and ended, and when."""
    from train.checkpoint.save_task import SaveTask
    from train.run import Run

    step, run_task, made, due, saves = Run._one_step, SaveTask.run, [0], [0], []
    slow_disk(500e3, lambda: made[0] >= due[0])

    def counted(self: Run) -> bool:
        stopping = step(self)
        made[0] = self.step
        return stopping

    def noted(self: SaveTask) -> None:
        first, began = made[0], time.monotonic()
        # The switch after step 3 waits for the save on its way, and so do the next save and the end.
        due[0] = 3 if first == 2 else first + 2
        run_task(self)
        if self._thread is not None:
            saves.append((self.name, first, made[0], began, time.monotonic()))

    Run._one_step, SaveTask.run = counted, noted  # type: ignore[method-assign]
    assert train_here(overrides) == "finished"
    return saves


@pytest.mark.slow
@pytest.mark.faults
def test_a_disk_slower_than_the_saves(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """A save outlasts the interval: training goes on until the next one is due, which waits, and nothing else changes."""
    run_dir = tmp_path / "run"
    per_rank = run_under_agent(_train_on_a_slow_disk, 2, _run(corpus, run_dir, "checkpoint.interval_steps=2")).results
    names = ["step-00000002", "step-00000003", "step-00000004", "step-00000006", "step-00000008"]
    assert _names(run_dir) == names
    assert _problems(run_dir) == dict.fromkeys(names)
    assert not list((run_dir / "checkpoints").glob("*.partial"))
    saves = list(zip(*per_rank, strict=True))
    assert [save[0][0] for save in saves] == ["step-00000002", "step-00000004", "step-00000006"]
    # All steps were made while it was written that are made before somebody waits for it.
    assert [[end for _, _, end, _, _ in ranks] for ranks in saves] == [[3, 3], [6, 6], [8, 8]]
    for earlier, later in itertools.pairwise(saves):
        assert max(ended for *_, ended in earlier) < min(began for *_, began, _ in later), "saves overlap"
    assert _outcome(run_dir) == _outcome(whole)


# ---- wrong clocks -----------------------------------------------------------------------------------------------------


def _train_by_a_wrong_clock(overrides: list[str], hours: float, back_at: int | None, killed_at: int | None) -> str:
    """A run whose clock is off by some hours, or goes back by them after a step, and that may be killed after another."""
    from train.checkpoint.folder import CheckpointFolder

    clock, publish = WrongClock(0.0 if back_at else hours), CheckpointFolder.publish

    def stamped(self: CheckpointFolder, *args: Any) -> Path:
        path = publish(self, *args)
        if self.layout.rank == 0:
            clock.stamp(path)
        self.layout.barrier()
        return path

    CheckpointFolder.publish = stamped  # type: ignore[method-assign]
    if back_at:
        at_step(back_at, lambda: setattr(clock, "hours", hours))
    if killed_at:
        at_step(killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return train_here(overrides)


def test_a_clock_that_goes_back(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """What is newest, and what is removed, is a matter of steps: neither of times in files nor of times of files."""
    run_dir = tmp_path / "run"
    words = _run(corpus, run_dir, "checkpoint.keep_last=3", "checkpoint.asynchronous=false")
    assert run_under_agent(_train_by_a_wrong_clock, 2, words, -5.0, 2, 6).codes
    # Those around the switch are kept besides the last three.
    assert _names(run_dir) == [f"step-0000000{n}" for n in (2, 3, 4, 5)]
    changed = [path.stat().st_mtime for path in list_checkpoints(run_dir)]
    assert changed[0] < time.time() - 4 * 3600
    before = [event["time"] for event in events(run_dir, "checkpoint")]
    assert before != sorted(before)

    # As if the clock had gone back before every one of them, and further than it is now.
    for number, path in enumerate(reversed(list_checkpoints(run_dir))):
        for one in (path, *path.rglob("*")):
            os.utime(one, (time.time() + 3600 * number,) * 2)
    changed = [path.stat().st_mtime for path in list_checkpoints(run_dir)]
    assert changed == sorted(changed, reverse=True)
    assert run_under_agent(_train_by_a_wrong_clock, 2, words, -9.0, None, None).results == ["finished"] * 2
    (resumed,) = events(run_dir, "resume")
    assert resumed["details"]["checkpoint"].endswith("/step-00000005")
    assert resumed["time"] < before[-1]
    assert _names(run_dir) == [f"step-0000000{n}" for n in (3, 6, 7, 8)]
    assert _problems(run_dir) == dict.fromkeys(_names(run_dir))
    assert _outcome(run_dir) == _outcome(whole)


# ---- read-only --------------------------------------------------------------------------------------------------------


def _main(arguments: list[str], folder: Path) -> tuple[int, str]:
    """`python -m train` on this rank, with a folder that cannot be written: exit code and standard error."""
    from train.__main__ import main

    ReadOnly(folder).begin()
    sys.argv = ["train", *arguments]
    # faulthandler wants a file that the system knows.
    with tempfile.TemporaryFile("w+") as said, contextlib.redirect_stderr(said):
        code = main()
        said.seek(0)
        return code, said.read()


@pytest.mark.parametrize("case", ["empty", "missing", "used"])
def test_a_run_directory_that_cannot_be_written_is_refused_at_the_start(
    case: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = whole if case == "used" else tmp_path / "run"
    folder = {"empty": run_dir, "missing": tmp_path, "used": whole}[case]
    folder.mkdir(exist_ok=True)
    mode, before = stat.S_IMODE(folder.stat().st_mode), _contents(folder)
    try:
        ended = run_under_agent(_main, 2, _run(corpus, run_dir, "run.steps=9"), folder)
    finally:
        folder.chmod(mode)
    codes, said = zip(*ended.results, strict=True)
    assert all(code not in (0, 1) for code in codes), ended
    lines = [line for line in "".join(said).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in "".join(said), said
    assert str(ReadOnly(folder)) in lines[0] and "run.dir" in lines[0] and str(run_dir) in lines[0]
    assert _contents(folder) == before


def _train_while_read_only(overrides: list[str], folder: Path, first: int, last: int | None) -> str:
    """A run in which a folder cannot be written from after one step until after another."""
    lock = ReadOnly(folder)
    at_step(first, lock.begin)
    if last is not None:
        at_step(last, lock.end)
    return train_here(overrides)


def _message(overrides: list[str], folder: Path, first: int) -> str:
    from parallel.errors import CheckpointError

    with pytest.raises(CheckpointError) as refused:
        _train_while_read_only(overrides, folder, first, None)
    return str(refused.value)


def test_a_folder_that_becomes_read_only_stops_the_run(corpus: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    folder = run_dir / "checkpoints"
    told = run_under_agent(_message, 2, _run(corpus, run_dir), folder, 5).results
    assert all(str(run_dir) in text and str(ReadOnly(folder)) in text and "\n" not in text for text in told), told
    folder.chmod(0o700)
    names = [f"step-0000000{n}" for n in (1, 2, 3, 4)]
    # The save of step 4 may not have been published yet.
    assert _names(run_dir) in (names, names[:3])
    assert set(_problems(run_dir).values()) == {None}
    status = read_status(run_dir)
    assert status is not None and status["state"] == "failed" and status["exit_code"] == 4
    # Writable again, it goes on as if nothing had been.
    assert run_under_agent(train_here, 2, _run(corpus, run_dir)).results == ["finished"] * 2
    assert _outcome(run_dir) == _outcome(whole)


@pytest.mark.parametrize(
    "how", ["asynchronous", pytest.param("synchronous", marks=[pytest.mark.slow, pytest.mark.faults])]
)
def test_a_folder_that_becomes_read_only_costs_only_its_checkpoints(
    how: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = _run(corpus, run_dir, "checkpoint.on_failure=continue", f"checkpoint.asynchronous={how == 'asynchronous'}")
    job = (words, run_dir / "checkpoints", 4, 6)
    assert run_under_agent(_train_while_read_only, 2, *job).results == ["finished"] * 2
    assert _names(run_dir) == [f"step-0000000{n}" for n in (1, 2, 3, 6, 7, 8)]
    failed = events(run_dir, "checkpoint_failed")
    assert [event["step"] for event in failed] == [4, 5]
    assert all(str(ReadOnly(run_dir)) in event["details"]["error"] for event in failed)
    assert set(_problems(run_dir).values()) == {None}
    assert _outcome(run_dir) == _outcome(whole)


def test_an_old_checkpoint_that_cannot_be_removed(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """It stays; the new ones are what counts."""
    run_dir = tmp_path / "run"
    words = _run(corpus, run_dir, "checkpoint.keep_last=2")
    old = run_dir / "checkpoints" / "step-00000001"
    assert run_under_agent(_train_while_read_only, 2, words, old, 3, None).results == ["finished"] * 2
    old.chmod(0o700)
    assert _names(run_dir) == [f"step-0000000{n}" for n in (1, 3, 7, 8)]
    assert _outcome(run_dir) == _outcome(whole)
