"""Saves in the background: the same files, nothing waits but for the copy, and a failure costs no older checkpoint."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import sharded_save
from parallel.errors import CheckpointError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, tensor_digests, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", "run.steps=6", "model.dropout=0.1",
            "checkpoint.interval_steps=1", "checkpoint.keep_last=9", *more]  # fmt: skip


def _slow(overrides: list[str], steps: int) -> str:
    """A run whose background saves end only after some more steps of training."""
    from train.run import Run

    write, step, waiting = sharded_save.SaveInProgress.write, Run._one_step, threading.Condition()
    made = [0]

    def late(self: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            goal = made[0] + steps
            with waiting:
                # The last saves of a run have no steps to wait for.
                waiting.wait_for(lambda: made[0] >= goal, timeout=1.5)
        write(self)

    def counted(self: Run) -> bool:
        stopping = step(self)
        made[0] += 1
        with waiting:
            waiting.notify_all()
        return stopping

    sharded_save.SaveInProgress.write, Run._one_step = late, counted  # type: ignore[method-assign]
    try:
        return train_in_turn([overrides])[0]
    finally:
        sharded_save.SaveInProgress.write, Run._one_step = write, step  # type: ignore[method-assign]


def test_what_is_written_later_is_what_was_there(corpus: Path, tmp_path: Path) -> None:
    """Every checkpoint equals the one that was saved while the run stood still, though weights have moved on since."""
    runs = {name: tmp_path / name for name in ("still", "late")}
    run_distributed(train_in_turn, 2, [_run(corpus, runs["still"], "checkpoint.asynchronous=false")], timeout=300)
    run_distributed(_slow, 2, _run(corpus, runs["late"], "checkpoint.interval_steps=2"), 1, timeout=300)
    names = {name: {path.name: path for path in list_checkpoints(run)} for name, run in runs.items()}
    assert set(names["late"]) == {"step-00000002", "step-00000003", "step-00000004", "step-00000006"}
    for name, path in names["late"].items():
        other = names["still"][name]
        assert tensor_digests(path) == tensor_digests(other)
        mine, theirs = vars(read_manifest(path)), vars(read_manifest(other))
        for key in mine.keys() - {"config", "files", "tracker_id"}:
            assert mine[key] == theirs[key], (name, key)
        # Byte for byte; torch's index has a number of its own.
        files, others = (
            {n: told for n, told in its["files"].items() if n.endswith((".distcp", ".pt"))} for its in (mine, theirs)
        )
        assert files == others and len(files) >= 5
        # Generator states too: dropout is on.
        for rank in ("rank-00000.pt", "rank-00001.pt"):
            a, b = (torch.load(folder / "rng" / rank, weights_only=True) for folder in (path, other))
            assert torch.equal(a["torch"], b["torch"])
    told = {e["details"]["of_step"]: e["step"] for e in events(runs["late"], "checkpoint")}
    # Published after the step that it was late by; the save before the switch waits for the one on its way.
    assert told[2] == 3 and told[3] == 3 and told[4] > 4
    assert {s: m["lm_loss"] for s, m in metrics(runs["late"]).items()} == {
        s: m["lm_loss"] for s, m in metrics(runs["still"]).items()
    }


def _failing(overrides: list[str], number: int, *, background: bool = True) -> str:
    """A run in which rank 1 cannot write its part of the n-th save, of those in the background or of the others."""
    write, seen = sharded_save.SaveInProgress.write, [0]

    def fail(self: Any) -> None:
        if (threading.current_thread() is not threading.main_thread()) is background:
            seen[0] += 1
            if seen[0] == number and torch.distributed.get_rank() == 1:
                self._request = self._request._replace(async_fn=_full)
        write(self)

    sharded_save.SaveInProgress.write = fail  # type: ignore[method-assign]
    try:
        return train_in_turn([overrides])[0]
    finally:
        sharded_save.SaveInProgress.write = write  # type: ignore[method-assign]


def _full() -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_is_agreed_on_and_costs_no_older_checkpoint(corpus: Path, tmp_path: Path) -> None:
    base = _run(corpus, tmp_path / "stop", "upcycle.stages=[]")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        run_distributed(_failing, 2, base, 3)
    assert [path.name for path in list_checkpoints(tmp_path / "stop")] == ["step-00000001", "step-00000002"]
    run_distributed(train_in_turn, 2, [base])
    assert max(metrics(tmp_path / "stop")) == 6

    on = _run(corpus, tmp_path / "on", "upcycle.stages=[]", "checkpoint.on_failure=continue")
    assert run_distributed(_failing, 2, on, 3) == ["finished", "finished"]
    names = [path.name for path in list_checkpoints(tmp_path / "on")]
    assert names == [f"step-0000000{n}" for n in (1, 2, 4, 5, 6)]
    (failed,) = events(tmp_path / "on", "checkpoint_failed")
    assert "No space left on device" in failed["details"]["error"]


def test_a_final_save_that_fails_is_an_error_whatever_the_setting(corpus: Path, tmp_path: Path) -> None:
    base = _run(corpus, tmp_path, "upcycle.stages=[]", "checkpoint=ends", "checkpoint.interval_steps=null",
                "checkpoint.on_failure=continue")  # fmt: skip
    with pytest.raises(CheckpointError, match="No space left on device"):
        run_distributed(_failing, 2, base, 1, background=False)
    assert list_checkpoints(tmp_path) == []
