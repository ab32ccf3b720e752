"""Weights & Biases: one run over resumes and returns, read back from the files that W&B itself writes offline."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.trainer import SMALL, metrics, small_corpus, train_in_turn
from train.checkpoint import list_checkpoints, read_manifest


def _entries(log: bytes) -> Iterator[bytes]:
    """The entries of a W&B file: LevelDB's log format, behind a header of 7 bytes in the first block of 32 KiB."""
    position, parts = 7, b""
    while position + 7 <= len(log):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        position += 7 + length
        parts += log[position - length : position]
        # 1 is a whole entry, 4 the last part of one.
        if kind in (1, 4):
            yield parts
            parts = b""


def _records(run_dir: Path) -> list[Any]:
    """Every record of every offline session, oldest first."""
    from wandb.proto import wandb_internal_pb2

    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert files and all(path.read_bytes().startswith(b":W&B") for path in files)
    return [wandb_internal_pb2.Record.FromString(entry) for path in files for entry in _entries(path.read_bytes())]


def _history(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({"_step": record.history.step.num, **row})
    return rows


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that grew after its third step, was stopped after its fifth, and went back to its fourth by hand."""
    folder = tmp_path_factory.mktemp("tracked")
    base = [*SMALL, f"data.corpus={small_corpus(folder)}", f"run.dir={folder / 'run'}", "tracking=wandb", "run.steps=7",
            "checkpoint.interval_steps=1", "checkpoint.keep_last=null", "evaluation.interval_steps=2"]  # fmt: skip
    back = f"run.resume={folder / 'run' / 'checkpoints' / 'step-00000004'}"
    run_distributed(train_in_turn, 2, [[*base, "run.stop_at_step=5"], [*base, back]], timeout=400)
    return folder / "run"


def test_one_run_over_resumes_and_returns(tracked: Path) -> None:
    records = _records(tracked)
    ids = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert ids == {read_manifest(list_checkpoints(tracked)[-1]).tracker_id}
    rows = _history(records)
    losses = [(row["_step"], row["step"], row["lm_loss"]) for row in rows if "lm_loss" in row]
    # Step 5 was trained twice; W&B's own step counts on, so that nothing is dropped.
    assert [step for _, step, _ in losses] == [1, 2, 3, 4, 5, 5, 6, 7]
    counted = [number for number, _, _ in losses]
    assert counted == sorted(set(counted))
    told = {step: line["lm_loss"] for step, line in metrics(tracked).items()}
    assert {step: loss for _, step, loss in losses} == told
    assert {row["step"] for row in rows if "valid_loss" in row} >= {2, 4, 6, 7}


def test_the_expansion_its_plan_and_the_configuration_are_there(tracked: Path) -> None:
    records = _records(tracked)
    (grown,) = [row for row in _history(records) if "expansion_experts" in row]
    assert grown["step"] == 3 and grown["expansion_experts"] == 16 and grown["expansion_pause_seconds"] > 0
    kinds = {r.request.log_artifact.artifact.type for r in records if r.WhichOneof("record_type") == "request"}
    kinds |= {r.artifact.type for r in records if r.WhichOneof("record_type") == "artifact"}
    assert {"config", "expansion-plan"} <= kinds
    # The run's step is the axis of everything.
    axes = {r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric" and r.metric.step_metric}
    assert axes == {"step"}


def test_a_tracker_that_cannot_start_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    import wandb

    from train.config import TrackingConfig
    from train.run_files import RunFiles
    from train.tracking import open_tracker

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    tracker = open_tracker(TrackingConfig(), RunFiles(tmp_path), None, {}, 0)
    for step in range(20):
        tracker.log(step, {"lm_loss": 1.0})
    tracker.close()
    assert "wandb is not available (OSError: no such host)" in capfd.readouterr().err
