"""Requests to stop: wherever one arrives, the state is saved, and the run that goes on equals one that was not stopped."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_in_turn
from train import expansion, run, signals
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.signals import STOP_FILE
from train.status import read_status


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    # Three batches an evaluation, evaluated every second step and around the switch after step 3.
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", "evaluation.batches=3",
            "evaluation.interval_steps=2", *more]  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_distributed(train_in_turn, 2, [_run(corpus, run_dir)], timeout=300)
    return run_dir


def _stopped_at(nth_poll: int, overrides: list[str]) -> str:
    """A run that rank 1 is told to stop right before the n-th time it looks, wherever that is."""
    looked = 0
    wanted = signals.StopRequest.wanted

    def look(self: signals.StopRequest) -> bool:
        nonlocal looked
        looked += 1
        if looked == nth_poll and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        return wanted(self)

    signals.StopRequest.wanted = look  # type: ignore[method-assign]
    try:
        return train_in_turn([overrides])[0]
    finally:
        signals.StopRequest.wanted = wanted  # type: ignore[method-assign]


def _told(run_dir: Path) -> dict[int, Any]:
    """Every number that a step or an evaluation logged; an evaluation that was broken off and made later stands once."""
    steps: dict[Any, Any] = {s: (m["lm_loss"], m["grad_norm"]) for s, m in metrics(run_dir).items()}
    for event in events(run_dir, "evaluation"):
        steps.setdefault(("evaluation", event["step"]), set()).add(event["details"]["valid_loss"])
    return steps


# Polls: 1 at the start, 2 and 3 of steps 1 and 2, then the evaluation of step 2 (4 to 6), step 3 (7), the evaluation before
# the switch (8 to 10), two scoring batches (11, 12), before anything moves (13), the evaluation afterwards (14 to 16).
@pytest.mark.parametrize(
    ("poll", "step", "experts"),
    [
        (1, 0, 8), (5, 2, 8), (13, 3, 8), (15, 3, 16),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 2, 8), (7, 3, 8), (9, 3, 8), (12, 3, 8), (17, 4, 16))),
    ],
)  # fmt: skip
def test_a_stop_anywhere_saves_and_goes_on_alike(
    poll: int, step: int, experts: int, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    base = _run(corpus, tmp_path)
    assert run_distributed(_stopped_at, 2, poll, base) == ["requested", "requested"]
    status = read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["reason"], status["step"], status["exit_code"]) == ("stopped", "SIGUSR1", step, 0)
    if step:
        newest = list_checkpoints(tmp_path)[-1]
        manifest = read_manifest(newest)
        assert (manifest.step, manifest.num_experts, status["checkpoint"]) == (step, experts, newest.name)
    run_distributed(train_in_turn, 2, [base])
    assert _told(tmp_path) == _told(whole)
    mine, other = (read_manifest(list_checkpoints(path)[-1]) for path in (tmp_path, whole))
    assert mine.fingerprints == other.fingerprints
    status = read_status(tmp_path)
    assert status is not None and (status["state"], status["step"], status["steps"]) == ("finished", 6, 6)
    assert len(events(tmp_path, "expansion")) == 1


def test_a_file_in_the_run_directory_stops_once(corpus: Path, tmp_path: Path) -> None:
    base = _run(corpus, tmp_path)
    (tmp_path / STOP_FILE).touch()
    assert run_distributed(train_in_turn, 2, [base])[0] == ["requested"]
    assert not (tmp_path / STOP_FILE).exists()
    (stop,) = events(tmp_path, "stop")
    assert stop["details"]["request"] == f"file {tmp_path / STOP_FILE}"
    assert run_distributed(train_in_turn, 2, [base])[0] == ["finished"]


def _fail(overrides: list[str]) -> None:
    def broken(run: Any) -> None:
        raise ZeroDivisionError("made up")

    run.expand = broken
    try:
        train_in_turn([overrides])
    finally:
        run.expand = expansion.expand


def test_a_failure_is_in_the_status(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_distributed(_fail, 2, _run(corpus, tmp_path))
    status = read_status(tmp_path)
    assert status is not None and (status["state"], status["exit_code"], status["step"]) == ("failed", 1, 3)
    assert status["reason"] == "ZeroDivisionError: made up"
