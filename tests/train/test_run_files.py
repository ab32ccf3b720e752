"""The run directory: whole lines, valid JSON, torn tails moved, history kept on resume, private folders."""

import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import CheckpointError, DataError, LaunchError
from train.checkpoint.folder import _deny_others
from train.run_files import RunFiles, make_directory, raw_lines, refuse_open_folder
from train.run_lock import lock_run

REPOSITORY = Path(__file__).resolve().parents[2]


def _metrics(files: RunFiles, steps: range) -> None:
    for step in steps:
        files.append_metrics({"step": step, "lm_loss": 1.0 / step})


def _steps(files: RunFiles) -> list[int]:
    return [record["step"] for record in files.read_metrics()]


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run")
    _metrics(files, range(1, 4))
    files.append_expert_load({"step": 2, "stage": 0, "layers": [1], "share_LE": [[0.25, 0.75]]})
    files.append_event("checkpoint", step=2, path=Path("checkpoints/step-00000002"), bytes=np.int64(7))

    assert files.read_metrics() == [{"step": step, "lm_loss": 1.0 / step} for step in (1, 2, 3)]
    assert files.read_expert_load()[0]["share_LE"] == [[0.25, 0.75]]
    event = files.read_events()[0]
    assert event["details"] == {"path": "checkpoints/step-00000002", "bytes": 7}
    assert event["time"].endswith("Z") and event["time"][10] == "T"


def test_reading_an_empty_run_creates_nothing(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "none")
    assert files.read_metrics() == files.read_events() == files.read_expert_load() == []
    assert files.read_plans() == {}
    assert not files.run_dir.exists()


def test_non_finite_numbers_become_null_in_valid_json(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.append_metrics({"step": 1, "a": math.nan, "b": [math.inf, np.float32("nan"), 1.5], "c": {"d": -math.inf}})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    record = json.loads(files.metrics.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "a": None, "b": [None, None, 1.5], "c": {"d": None}}


def test_text_with_line_breaks_stays_on_one_line(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.append_event("stop", step=1, reason="failed", error="first\nsecond \N{LINE SEPARATOR} café")
    assert files.events.read_bytes().count(b"\n") == 1
    assert files.read_events()[0]["details"]["error"] == "first\nsecond \N{LINE SEPARATOR} café"


def test_each_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.write

    def counted(descriptor: int, data: bytes) -> int:
        sizes.append(len(data))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    files = RunFiles(tmp_path)
    files.append_expert_load({"step": 1, "share_LE": [[0.001] * 1000] * 50})
    assert sizes == [files.expert_load.stat().st_size]


@pytest.mark.parametrize("tail", ['{"step": 4, "lm_lo', '{"step": 4', "\x00\x00\x00", '{"step": 4, "a": "\xc3'])
def test_a_torn_last_line_is_forgiven_then_moved(tmp_path: Path, tail: str) -> None:
    files = RunFiles(tmp_path)
    _metrics(files, range(1, 4))
    with files.metrics.open("a", encoding="latin-1") as file:
        file.write(tail)
    assert _steps(files) == [1, 2, 3]

    # A new process goes on appending: the torn text must not end up in the middle of the file.
    again = RunFiles(tmp_path)
    again.append_metrics({"step": 4, "lm_loss": 0.5})
    assert _steps(again) == [1, 2, 3, 4]
    moved = json.loads((tmp_path / "metrics.superseded.jsonl").read_text())
    assert moved == {"torn_line": tail.encode("latin-1").decode("utf-8", errors="replace")}


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.metrics.write_text('{"step": 1}\n{"step": 2}')
    assert _steps(files) == [1, 2]
    files.append_metrics({"step": 3})
    assert _steps(files) == [1, 2, 3]
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


def test_torn_events_are_repaired_before_the_next_event(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.append_event("start", step=0)
    with files.events.open("a") as file:
        file.write('{"time": "2026-')
    again = RunFiles(tmp_path)
    again.append_event("resume", step=0)
    assert [event["event"] for event in again.read_events()] == ["start", "resume"]


def test_a_torn_line_elsewhere_names_file_and_line(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.metrics.write_text('{"step": 1}\n{"step": 2, "lm\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: torn"):
        files.read_metrics()
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: torn"):
        files.truncate_after(1)
    # A refused truncation leaves the file as it was.
    assert files.metrics.read_text().count("\n") == 3


def test_truncation_keeps_and_moves(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    _metrics(files, range(1, 11))
    for step in (5, 10):
        files.append_expert_load({"step": step, "share_LE": [[1.0]]})
    with files.metrics.open("a") as file:
        file.write('{"step": 11, "lm')
    before = files.metrics.read_bytes().splitlines(keepends=True)

    assert files.truncate_after(6) == 5
    assert files.metrics.read_bytes().splitlines(keepends=True) == before[:6]
    assert [record["step"] for record in files.read_expert_load()] == [5]
    moved = (tmp_path / "metrics.superseded.jsonl").read_bytes().splitlines(keepends=True)
    assert moved[1:] == before[6:10]
    assert json.loads(moved[0]) == {"torn_line": '{"step": 11, "lm'}
    assert json.loads((tmp_path / "expert_load.superseded.jsonl").read_text())["step"] == 10
    assert not list(tmp_path.glob("*.tmp"))

    # The same object goes on in the new file, and a second resume adds to what was moved.
    _metrics(files, range(7, 9))
    assert _steps(files) == list(range(1, 9))
    assert files.truncate_after(7) == 1
    assert len((tmp_path / "metrics.superseded.jsonl").read_text().splitlines()) == 6


def test_truncating_nothing_touches_nothing(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    assert files.truncate_after(5) == 0
    _metrics(files, range(1, 4))
    inode = files.metrics.stat().st_ino
    assert files.truncate_after(3) == 0
    assert files.metrics.stat().st_ino == inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_truncation_to_nothing(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    _metrics(files, range(1, 4))
    assert files.truncate_after(0) == 3
    assert files.read_metrics() == []


def test_a_killed_writer_leaves_a_readable_file(tmp_path: Path) -> None:
    code = (
        "from train.run_files import RunFiles\n"
        f"files = RunFiles({str(tmp_path)!r})\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    files.append_metrics({'step': step, 'row': [0.1] * 500})\n"
        "    if step == 50: print('going', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"going\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    files = RunFiles(tmp_path)
    steps = _steps(files)
    assert len(steps) >= 50 and steps == list(range(1, len(steps) + 1))


def test_folders_are_private_and_files_not_writable_by_others(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "a" / "run")
    old = os.umask(0)
    try:
        files.prepare()
        _metrics(files, range(1, 4))
        files.truncate_after(2)
    finally:
        os.umask(old)
    for folder in (files.run_dir.parent, files.run_dir, files.plans, files.checkpoints):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for path in files.run_dir.glob("*.jsonl"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path


def test_a_folder_open_to_everybody_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(0o777)
    for begin in (RunFiles(run_dir).prepare, lambda: lock_run(run_dir)):
        with pytest.raises(
            DataError, match=rf"everybody may write to {run_dir}.*: chmod o-w {run_dir}, or choose another"
        ):
            begin()
    assert not list(run_dir.iterdir())
    # As in /tmp: nobody can replace what is there.
    run_dir.chmod(0o1777)
    umask = os.umask(0o022)
    try:
        RunFiles(run_dir).prepare()
        (run_dir / "checkpoints").chmod(0o1777)
        with pytest.raises(DataError, match=r"chmod o-w .*/run/checkpoints"):
            RunFiles(run_dir).prepare()
    finally:
        os.umask(umask)
    # Its group may, where that is how the users work together.
    (run_dir / "checkpoints").chmod(0o770)
    run_dir.chmod(0o775)
    refuse_open_folder(run_dir)


def test_nothing_is_writable_by_everybody_whatever_the_umask(tmp_path: Path) -> None:
    for umask, expected in ((0, 0o664), (0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            RunFiles(tmp_path / "run").prepare()
            (tmp_path / f"{umask}").write_text("")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask}").stat().st_mode) == expected


def test_a_checkpoint_is_published_writable_by_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors" / "__0_0.distcp").write_text("")
    (tmp_path / "tensors" / "__0_0.distcp").chmod(0o666)
    (tmp_path / "tensors").chmod(0o777)
    _deny_others(tmp_path)
    assert stat.S_IMODE((tmp_path / "tensors").stat().st_mode) == 0o775
    assert stat.S_IMODE((tmp_path / "tensors" / "__0_0.distcp").stat().st_mode) == 0o664


def test_nothing_is_begun_inside_a_checkpoint(tmp_path: Path) -> None:
    """It would go when the checkpoint is retired."""
    from train.offline.files import staged

    (tmp_path / "complete.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    here = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"run.dir=.*run lies in the checkpoint .*outside it"):
        RunFiles(tmp_path / "link" / "a" / "run").prepare()
    with pytest.raises(CheckpointError, match=r"--output=.*lies in"), staged(tmp_path / "export"):
        pass
    assert sorted(tmp_path.iterdir()) == here


def test_one_command_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    """The second is refused and leaves the first alone; what a kill leaves behind keeps nobody off."""
    from train.offline.files import staged

    output = tmp_path / "deep" / "export"
    with staged(output) as staging:
        (staging / "part").write_text("of the first")
        with (
            pytest.raises(LaunchError, match=rf"--output {output} is being written by process {os.getpid()} on .*wait"),
            staged(output),
        ):
            pass
        with staged(tmp_path / "deep" / "other"):
            pass
    assert (output / "part").read_text() == "of the first"
    assert sorted(p.name for p in output.parent.iterdir()) == ["export", "other"]
    (tmp_path / ".new.lock").write_text('{"pid": 1, "host": "gone", "since": "long ago"}')
    (tmp_path / "new.partial").mkdir()
    with staged(tmp_path / "new"):
        pass
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space"), staged(tmp_path / "new"):
        # Full, or gone: whoever comes next is not kept off.
        raise OSError(28, "No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "new"]


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(DataError, match="run: cannot create this folder"):
        RunFiles(tmp_path / "run").prepare()
    with pytest.raises(DataError, match="cannot create this folder"):
        make_directory(tmp_path / "run" / "inner")
    # What is read before holds nothing, and is no damaged record.
    from train.guard import held_from
    from train.health import read_skipped

    assert held_from(tmp_path / "run") is None and read_skipped(tmp_path / "run" / "inner") == []


def test_a_full_disk_is_a_data_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which only Linux has")
    files = RunFiles("/dev")
    files.events = Path("/dev/full")
    with pytest.raises(DataError, match="No space left"):
        files.append_event("start", step=0)


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="integer step"):
        RunFiles(tmp_path).append_metrics({"lm_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text('{"lm_loss": 1.0}\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: step=None"):
        RunFiles(tmp_path).truncate_after(1)


def test_plans_by_step(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.prepare()
    for step in (30, 4):
        (files.plans / f"step-{step:08d}.json").write_text(json.dumps({"format": 1, "step": step, "layers": []}))
    assert list(files.read_plans()) == [4, 30]
    (files.plans / "step-00000050.json").write_text('{"step": 50')
    with pytest.raises(DataError, match=r"step-00000050\.json: not an expansion plan"):
        files.read_plans()


def test_blank_lines_do_not_shift_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n\n')
    assert [number for number, _ in raw_lines(path)] == [1, 3]


def test_no_torch_is_imported() -> None:
    code = "import sys, train.run_files, train.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0
