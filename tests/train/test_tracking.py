"""Trackers: one run over resumes and returns, read back from the files that W&B and TensorBoard themselves write."""

import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import ConfigError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, metrics, small_corpus, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.run_files import RunFiles
from train.schema.tracking import TrackingConfig
from train.tracking import open_tracker, refuse_missing
from train.tracking.names import tracked_figures, tracked_name
from train.tracking.queue import MAX_NAMES, QueuedTracker, Tracker


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
    """A run that grew after its third step, was stopped after its fifth, and went back to its fourth by hand.

    Tracked by W&B; its neighbour, by TensorBoard.
    """
    folder = tmp_path_factory.mktemp("tracked")
    base = [*SMALL, f"data.corpus={small_corpus(folder)}", f"run.dir={folder / 'run'}", "tracking=wandb", "run.steps=7",
            "checkpoint.interval_steps=1", "checkpoint.keep_last=null", "evaluation.interval_steps=2"]  # fmt: skip
    back = f"run.resume={folder / 'run' / 'checkpoints' / 'step-00000004'}"
    runs = [[*base, "run.stop_at_step=5"], [*base, back]]
    other = [
        [*(word.replace(f"{folder}/run", f"{folder}/other") for word in words), "tracking=tensorboard"]
        for words in runs
    ]
    run_distributed(train_in_turn, 2, [*runs, *other], timeout=400)
    return folder / "run"


def test_one_run_over_resumes_and_returns(tracked: Path) -> None:
    records = _records(tracked)
    ids = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert ids == {read_manifest(list_checkpoints(tracked)[-1]).tracker_id}
    rows = _history(records)
    losses = [(row["_step"], row["step"], row["train/lm_loss"]) for row in rows if "train/lm_loss" in row]
    # Step 5 was trained twice; W&B's own step counts on, so that nothing is dropped.
    assert [step for _, step, _ in losses] == [1, 2, 3, 4, 5, 5, 6, 7]
    counted = [number for number, _, _ in losses]
    assert counted == sorted(set(counted))
    told = {step: line["lm_loss"] for step, line in metrics(tracked).items()}
    assert {step: loss for _, step, loss in losses} == told
    assert {row["step"] for row in rows if "valid/loss" in row} >= {2, 4, 6, 7}


def test_the_expansion_its_plan_and_the_configuration_are_there(tracked: Path) -> None:
    records = _records(tracked)
    (grown,) = [row for row in _history(records) if "expansion/marker" in row]
    assert grown["step"] == 3 and grown["expansion/marker"] == 1 and grown["expansion/pause_seconds"] > 0
    assert (grown["expansion/from_experts"], grown["expansion/to_experts"]) == (8, 16)
    summary = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
               for r in records if r.WhichOneof("record_type") == "summary" for item in r.summary.update}  # fmt: skip
    assert summary["expansion/stage_1/step"] == 3 and summary["expansion/stage_1/to_experts"] == 16
    kinds = {r.request.log_artifact.artifact.type for r in records if r.WhichOneof("record_type") == "request"}
    kinds |= {r.artifact.type for r in records if r.WhichOneof("record_type") == "artifact"}
    assert {"config", "expansion-plan"} <= kinds
    # The run's step is the axis of everything.
    axes = {r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric" and r.metric.step_metric}
    assert axes == {"step"}


def test_the_map_of_load_is_sent_and_drawn_off_the_training_thread(tracked: Path) -> None:
    maps = [row for row in _history(_records(tracked)) if any(key.startswith("load/map") for key in row)]
    # The expansion and both ends; those of evaluations are too soon after one another.
    assert {3, 5, 7} <= {row["step"] for row in maps}
    drawn = list(tracked.glob("wandb/offline-run-*/files/media/images/load/map_*.png"))
    assert len(drawn) == len(maps) and all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_names_are_grouped_and_few(tracked: Path) -> None:
    names = {key for row in _history(_records(tracked)) for key in row} - {"_step", "step", "_timestamp", "_runtime"}
    groups = {name.split("/")[0] for name in names}
    assert groups == {"train", "norm", "load", "time", "throughput", "valid", "expansion"}
    # Every figure of metrics.jsonl is there under its own key.
    figures = {key for line in metrics(tracked).values() for key, value in line.items() if value is not None} - {"step"}
    assert {tracked_name(key) for key in figures} <= names and len(names) < len(figures) + 20


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lm_loss", "train/lm_loss"),
        ("learning_rate", "train/learning_rate"),
        ("grad_norm", "norm/grad_norm"),
        ("grad_norm_experts", "norm/grad_norm_experts"),
        ("param_norm_router", "norm/param_norm_router"),
        ("step_seconds", "time/step_seconds"),
        ("all_to_all_seconds", "time/all_to_all_seconds"),
        ("tokens_per_second", "throughput/tokens_per_second"),
        ("memory_bytes", "throughput/memory_bytes"),
        ("tflops_per_device", "throughput/tflops_per_device"),
        ("mfu", "throughput/mfu"),
        ("step_flops", "throughput/step_flops"),
        ("router_entropy", "load/router_entropy"),
        ("expert_load_p90", "load/expert_load_p90"),
        ("bias_min", "load/bias_min"),
        ("dead_experts", "load/dead_experts"),
        ("valid_loss", "valid/loss"),
        ("valid/books/bits_per_byte", "valid/books/bits_per_byte"),
        ("something new", "train/something new"),
        ("two\nlines", "train/'two\\nlines'"),
    ],
)
def test_every_key_has_a_group(key: str, name: str) -> None:
    assert tracked_name(key) == name


def test_only_numbers_are_sent() -> None:
    values = {"step": 3, "a": 1, "b": None, "c": "text", "d": [1], "e": {"f": 1}, "g": True, "h": np.float32(2.0)}
    assert tracked_figures(values) == {"train/a": 1.0, "train/g": 1.0, "train/h": 2.0}


def _curves(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_shows_one_history(tracked: Path) -> None:
    other = tracked.parent / "other"
    assert len(list((other / "tensorboard").glob("events.out.tfevents.*"))) == 2
    curves = _curves(other / "tensorboard")
    losses = curves.Scalars("train/lm_loss")
    # Step 5 was trained twice, and is shown once: as it was trained last.
    assert [(event.step, pytest.approx(event.value)) for event in losses] == [
        (step, line["lm_loss"]) for step, line in metrics(other).items()
    ]
    assert [(event.step, event.value) for event in curves.Scalars("expansion/to_experts")] == [(3, 16)]
    maps = curves.Images("load/map")
    assert {3, 7} <= {event.step for event in maps} and all(event.width > event.height > 100 for event in maps)
    texts = {name: curves.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in curves.Tags()["tensors"]}
    assert "global_batch_size: 8" in texts["config/text_summary"]
    assert "| to_experts | 16 |" in texts["expansion/stage_1/text_summary"]
    assert json.loads(texts["expansion-plan/text_summary"].strip("`\n"))["experts_after"] == 16
    # The id of a W&B run is handed on by whatever tracks in between.
    assert read_manifest(list_checkpoints(other)[-1]).tracker_id is None


def _track(folder: Path, backend: str = "tensorboard", run_id: str | None = None, step: int = 0) -> Tracker:
    files = RunFiles(folder)
    files.prepare()
    files.config.write_text("run: {}\n")
    return open_tracker(TrackingConfig(backend=backend), files, run_id, {}, 0, step)


def test_tensorboard_forgets_what_a_run_took_back(tmp_path: Path) -> None:
    tracker = _track(tmp_path)
    for step in range(1, 6):
        tracker.log(step, {"lm_loss": float(step)})
    tracker.go_back(3, 2)
    tracker.log(4, {"lm_loss": 40.0})
    tracker.close()
    shown = [(event.step, event.value) for event in _curves(tmp_path / "tensorboard").Scalars("train/lm_loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    # A start that had no checkpoint yet is forgotten as a whole.
    again = _track(tmp_path)
    again.log(1, {"lm_loss": 10.0})
    again.close()
    shown = [(event.step, event.value) for event in _curves(tmp_path / "tensorboard").Scalars("train/lm_loss")]
    assert shown == [(1, 10.0)]


def test_the_id_at_wandb_outlives_other_trackers(tmp_path: Path) -> None:
    for backend in ("none", "tensorboard"):
        tracker = _track(tmp_path, backend, "abc12345")
        assert tracker.run_id == "abc12345"
        tracker.close()


def test_names_are_bounded(tmp_path: Path, capfd: Any) -> None:
    tracker = _track(tmp_path)
    tracker.log(1, {f"figure_{i}": 1.0 for i in range(MAX_NAMES + 5)})
    tracker.log(2, {f"figure_{i}": 2.0 for i in range(MAX_NAMES + 5)})
    tracker.close()
    tags = _curves(tmp_path / "tensorboard").Tags()["scalars"]
    assert len(tags) == MAX_NAMES
    assert capfd.readouterr().err.count(f"no more than {MAX_NAMES} names") == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.backend=tensorboard: .* pip install 'coppice\[tensorboard\]'"):
        refuse_missing(TrackingConfig(backend="tensorboard"))
    refuse_missing(TrackingConfig(backend="none"))


class _Stuck:
    """A sink whose first write waits."""

    def __init__(self) -> None:
        self.free, self.figures = threading.Event(), 0

    def numbers(self, at: Any, values: Any) -> None:
        assert self.free.wait(60)
        self.figures += 1

    def close(self) -> None:
        pass


def test_a_slow_tracker_drops_with_a_line_and_never_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("train.tracking.queue._QUEUE", 100)
    sink = _Stuck()
    tracker = QueuedTracker("slow", RunFiles(tmp_path), None, 0, lambda: sink)  # type: ignore[arg-type,return-value]
    began = time.perf_counter()
    for step in range(1000):
        tracker.log(step, {"lm_loss": 1.0})
    assert time.perf_counter() - began < 1
    sink.free.set()
    tracker.close()
    assert 100 <= sink.figures <= 101
    told = capfd.readouterr().err
    assert told.count("slow is 100 entries behind, new ones are dropped; every figure is in") == 1


def test_a_tracker_that_breaks_costs_a_line(tmp_path: Path, capfd: Any) -> None:
    class Broken(_Stuck):
        def numbers(self, at: Any, values: Any) -> None:
            raise OSError("no space left")

    tracker = QueuedTracker("broken", RunFiles(tmp_path), None, 0, Broken)  # type: ignore[arg-type]
    for step in range(20):
        tracker.log(step, {"lm_loss": 1.0})
    tracker.close()
    assert capfd.readouterr().err.count("broken has stopped (OSError: no space left); every figure is in") == 1


def test_a_tracker_that_cannot_start_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    import wandb

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    tracker = open_tracker(TrackingConfig(), RunFiles(tmp_path), None, {}, 0)
    for step in range(20):
        tracker.log(step, {"lm_loss": 1.0})
    tracker.close()
    assert "wandb is not available (OSError: no such host)" in capfd.readouterr().err
