"""What a user can get wrong about a whole run: one line, a non-zero exit on every rank, nothing lost, no hang.

Settings that cannot work are in test_settings.py; here are the mistakes that only show with files, ports and disks.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import CheckpointError, ConfigError, CoppiceError, DataError, LaunchError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, metrics, rewrite_manifest, small_corpus, train_in_turn
from train.checkpoint.files import MANIFEST, MARKER
from train.checkpoint.folder import FORMAT, list_checkpoints, resolve

_SHORT = ["run.steps=2", "upcycle.stages=[]", "schedule.decay_steps=1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run of one process."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run_distributed(train_in_turn, 1, [[*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={run_dir}"]])
    return run_dir


def _torchrun(processes: int, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "local", "--processes", str(processes), "--", *SMALL, *overrides]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def _error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_missing_corpus_is_one_line_from_all_ranks(tmp_path: Path) -> None:
    done = _torchrun(2, "data.corpus=/nowhere/corpus", f"run.dir={tmp_path / 'run'}", "parallel.expert=2")
    (line,) = _error_lines(done)
    assert "data.corpus=/nowhere/corpus" in line and "python -m train.corpus" in line
    assert done.returncode == DataError.exit_code
    assert not (tmp_path / "run").exists()


def test_a_stage_layout_that_cannot_be_is_one_line_from_all_ranks(corpus: Path, tmp_path: Path) -> None:
    """Refused before any process group exists, not by the switch."""
    stages = "upcycle.stages=[{at_step: 3, num_experts: 24, parallel: {expert: 3}}]"
    done = _torchrun(4, f"data.corpus={corpus}", f"run.dir={tmp_path / 'run'}", "parallel.expert=2", stages)
    (line,) = _error_lines(done)
    assert "upcycle.stages[0].parallel.expert=3" in line and "does not divide the 4 processes: start a multiple" in line
    assert done.returncode == ConfigError.exit_code
    assert not (tmp_path / "run").exists()


def test_single_process_needs_no_launcher(finished: Path, corpus: Path) -> None:
    """A finished run that is started again says so and ends well; nothing is trained twice."""
    before = metrics(finished)
    done = subprocess.run(
        [sys.executable, "-m", "train", *SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={finished}"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "state verified" in done.stdout
    assert metrics(finished) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=64", r"is of another model: model\.hidden_size was 32 there and is 64 here"),
        ("run.precision=fp32", r"is of another model: run\.precision was bf16 there and is fp32 here"),
        ("model.num_experts=4", r"is of another model: model\.num_experts was 8 there and is 4 here"),
        ("data.sequence_length=16", r"data\.sequence_length=16, but checkpoint .* samples of 32 tokens"),
        ("run.steps=1", r"run\.steps=1 ends before checkpoint step-00000002"),
        ("run.resume=never", r"run\.resume=never, but run\.dir=.* holds a run up to step-00000002"),
        ("run.resume=/nowhere", r"run\.resume=/nowhere is neither auto, never"),
    ],
)
def test_a_run_directory_that_does_not_fit_is_refused(
    override: str, message: str, finished: Path, corpus: Path
) -> None:
    before = sorted(p.name for p in finished.rglob("*"))
    config = (finished / "config.yaml").read_text()
    overrides = [*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={finished}", "schedule.warmup_steps=0", override]
    with pytest.raises(CoppiceError, match=message) as refused:
        run_distributed(train_in_turn, 2, [overrides])
    assert "\n" not in str(refused.value)
    assert sorted(p.name for p in finished.rglob("*")) == before
    assert (finished / "config.yaml").read_text() == config


def test_another_corpus_is_refused(finished: Path, tmp_path: Path) -> None:
    from train.corpus.build import CorpusRequest, build_corpus

    source = tmp_path / "text"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.txt").write_text(f"other text {number} " * 100)
    build_corpus(CorpusRequest(inputs=(str(source),), output=str(tmp_path / "other")), say=lambda line: None)
    overrides = [*SMALL, *_SHORT, f"data.corpus={tmp_path / 'other'}", f"run.dir={finished}"]
    with pytest.raises(CheckpointError, match="was trained on other data"):
        run_distributed(train_in_turn, 1, [overrides])


def test_a_checkpoint_without_its_marker_is_not_one(finished: Path, corpus: Path, tmp_path: Path) -> None:
    """The marker is written last: what a kill leaves behind is never taken for complete, nor for nothing."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (newest,) = list_checkpoints(copy)
    (newest / MARKER).unlink()
    assert list_checkpoints(copy) == []
    assert resolve(copy, "auto") is None
    with pytest.raises(
        CheckpointError, match=r"step-00000002: it is not a complete checkpoint: it has no complete\.json"
    ):
        run_distributed(train_in_turn, 1, [[*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={copy}"]])
    with pytest.raises(CheckpointError, match="neither auto, never"):
        resolve(copy, str(newest))


def test_changed_tensors_are_refused_by_name(finished: Path, corpus: Path, tmp_path: Path) -> None:
    """A checkpoint whose moments are not those that were saved does not load, whatever the files say."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (newest,) = list_checkpoints(copy)
    manifest = json.loads((newest / MANIFEST).read_text())
    name = next(n for n in sorted(manifest["fingerprints"]) if n.startswith("exp_avg_sq/"))
    manifest["fingerprints"][name][0] += 1
    rewrite_manifest(newest, fingerprints=manifest["fingerprints"])
    overrides = [*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={copy}"]
    with pytest.raises(CheckpointError, match=f"{name} is not what was saved".replace(".", r"\.")):
        run_distributed(train_in_turn, 2, [overrides])
    assert list_checkpoints(copy) == [newest]


def test_a_checkpoint_of_an_older_format_is_refused_with_what_to_do(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (newest,) = list_checkpoints(copy)
    manifest = json.loads((newest / MANIFEST).read_text())
    assert manifest["format"] == FORMAT
    rewrite_manifest(newest, format=1, versions={"coppice": "0.0.1"})
    # Before there was a marker.
    (newest / MARKER).unlink()
    overrides = [*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={copy}"]
    message = (
        rf"has format 1, written by coppice 0\.0\.1; this version reads format {FORMAT}: go on with .*another run\.dir"
    )
    with pytest.raises(CheckpointError, match=message) as refused:
        run_distributed(train_in_turn, 1, [overrides])
    assert "\n" not in str(refused.value)


@contextlib.contextmanager
def _small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_too_small_is_refused_before_training(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with _small_disk(disk, 1):
        overrides = [*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={disk / 'run'}"]
        with pytest.raises(CheckpointError, match=r"one checkpoint needs [\d.]+ MiB and [\d.]+ MiB are free"):
            run_distributed(train_in_turn, 2, [overrides])


def test_a_disk_that_fills_up_costs_no_older_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """Room for the checkpoints of the small stage but not for the expanded one."""
    disk = tmp_path / "disk"
    with _small_disk(disk, 5):
        overrides = [*SMALL, f"data.corpus={corpus}", f"run.dir={disk / 'run'}", "checkpoint.interval_steps=2"]
        with pytest.raises(CheckpointError, match=r"checkpoint step-0000000\S+ needs|could not be written|No space"):
            run_distributed(train_in_turn, 2, [[*overrides, "checkpoint.keep_last=10"]])
        kept = list_checkpoints(disk / "run")
        assert kept and kept[0].name == "step-00000002"


def test_a_port_in_use_is_named(corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        overrides = [*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={tmp_path / 'run'}"]
        direct = subprocess.run(
            [sys.executable, "-m", "train", *overrides], capture_output=True, text=True, timeout=180,
            env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )  # fmt: skip
        assert direct.returncode == 6
        (line,) = _error_lines(direct)
        assert f"MASTER_PORT={port}" in line and "choose a free port" in line
        launched = subprocess.run(
            [sys.executable, "-m", "launch", "local", "--processes", "2", "--port", str(port), "--", *overrides],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert launched.returncode == 6
        assert f"--port={port} cannot be used" in _error_lines(launched)[0]


def _full_at_step_two(overrides: list[str]) -> None:
    """A run whose rank 1 has no memory left in its second step."""
    from unittest import mock

    import torch

    from train import run as run_module
    from train.step import optimizer_step

    steps = []

    def step(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 2 and int(os.environ["RANK"]) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return optimizer_step(*arguments)

    with mock.patch.object(run_module, "optimizer_step", step), pytest.raises(LaunchError) as told:
        train_in_turn([overrides])
    if os.environ["RANK"] == "1":
        assert "rank 1 ran out of memory in step 2 (CUDA out of memory" in str(told.value)
    else:
        assert "rank 1" in str(told.value)


def test_a_rank_without_memory_says_where_and_what_to_change(corpus: Path, tmp_path: Path) -> None:
    """On all ranks, within the limit of a hang; status.json says it too."""
    overrides = [*SMALL, *_SHORT, f"data.corpus={corpus}", f"run.dir={tmp_path}", "health.hang_seconds=3"]
    run_distributed(_full_at_step_two, 2, [*overrides, "parallel.expert=2"], timeout=120)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and status["exit_code"] == LaunchError.exit_code
    assert "ran out of memory in step 2" in status["reason"]
