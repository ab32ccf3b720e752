"""What is told of a collective that has timed out, with records of gloo's collectives and of none."""

import os
import pickle
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from parallel.flight_recorder import (
    RecordWatch,
    flight_recorder,
    open_collective,
    record_path,
    timed_out,
    write_record,
)
from tests.distributed import run_distributed


def _wait_in_vain(folder: str) -> tuple[str | None, str]:
    import torch.distributed as dist

    os.environ |= flight_recorder(Path(folder))
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1), group_desc="EXPERTS")
    dist.all_reduce(torch.ones(3), group=group)
    rank, said = dist.get_rank(), ""
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(5, 2), group=group)
        except RuntimeError as e:
            said = "gloo gave up" if "imed out" in str(e) else str(e)
    else:
        time.sleep(2)
    write_record(rank)
    return open_collective(record_path(rank)), str(timed_out(rank, "step 7", said))


def test_the_error_names_the_collective_the_record_and_the_remedy(tmp_path: Path) -> None:
    (collective, error), _ = run_distributed(_wait_in_vain, 2, str(tmp_path))
    assert collective is not None and collective.startswith("gloo:all_reduce of 5x2 (number 2 of group ")
    assert f"rank 0 waited in vain in step 7 for {collective} (gloo gave up)" in error
    assert f"{tmp_path}/nccl-trace-rank-R" in error and f"fr_trace -p nccl-trace-rank- {tmp_path}" in error
    assert "start the job again" in error and "parallel.timeout_seconds" in error
    assert sorted(os.listdir(tmp_path)) == ["nccl-trace-rank-0", "nccl-trace-rank-1"]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in flight_recorder(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_without_a_record_none_is_named(records: Path) -> None:
    error = str(timed_out(3, "step 7"))
    assert error.startswith("rank 3 waited in vain in step 7: another rank") and "nccl-trace" not in error
    record_path(3).write_bytes(b"cut")
    assert open_collective(records / "nccl-trace-rank-3") is None


def test_the_rank_that_others_wait_for_is_told_apart(records: Path) -> None:
    # NCCL's recorder knows what was completed.
    done = {"state": "completed", "retired": True, "process_group": ("0", "default"), "collective_seq_id": 9,
            "profiling_name": "nccl:all_reduce", "input_sizes": [[]]}  # fmt: skip
    waiting = done | {"state": "started", "retired": False, "collective_seq_id": 10, "input_sizes": [[4], []]}
    for rank, entries in enumerate(([done, waiting, waiting | {"collective_seq_id": 11}], [done, done])):
        record_path(rank).write_bytes(pickle.dumps({"version": "2.10", "entries": entries}))
    assert "in vain in step 2 for nccl:all_reduce of 4 1 (number 10 of group default): another" in str(
        timed_out(0, "step 2")
    )
    assert str(timed_out(1, "step 2")).startswith(
        "rank 1 was in step 2 with no collective open, while others waited for it"
    )


def test_a_new_record_is_noticed_and_an_old_one_is_not(records: Path) -> None:
    record_path(0).write_bytes(b"of an earlier start")
    found: list[str] = []
    with RecordWatch(0, lambda: found.append("found"), poll_seconds=0.02):
        time.sleep(0.2)
        assert not found
        record_path(0).write_bytes(b"of this one")
        deadline = time.monotonic() + 10
        while not found and time.monotonic() < deadline:
            time.sleep(0.02)
    time.sleep(0.1)
    assert found == ["found"]


def test_a_record_of_our_own_is_no_news(records: Path) -> None:
    found: list[str] = []
    with RecordWatch(5, lambda: found.append("found"), poll_seconds=0.02) as watch:
        write_record(5)
        watch._thread.join(10)
    assert record_path(5).exists() and not watch._thread.is_alive() and not found
