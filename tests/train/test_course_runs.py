"""Whole runs that leave the configured path: triggers by tokens, requests, the guard, growing on load; on two processes."""

import getpass
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.fingerprint import Fingerprints
from parallel.errors import ConfigError, ExpansionError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.evaluation import Evaluation
from train.guard import RETURNED, Guard
from train.requests import RequestFolder, leave_request
from upcycle.config import GuardConfig

_GROW = "factor: 2, selection: greedy, scoring_batches: 2"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", *more]


def _final(run_dir: Path) -> Fingerprints:
    return read_manifest(list_checkpoints(run_dir)[-1]).fingerprints


def _losses(run_dir: Path, first: int = 1) -> dict[int, Any]:
    return {s: (m["lm_loss"], m["grad_norm"], m["num_experts"]) for s, m in metrics(run_dir).items() if s >= first}


@pytest.fixture(scope="module")
def expanded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 experts for three steps, 16 for three, as configured."""
    run_dir = tmp_path_factory.mktemp("expanded") / "run"
    run_distributed(train_in_turn, 2, [_run(corpus, run_dir)], timeout=300)
    return run_dir


def test_a_stage_by_tokens_begins_at_the_first_boundary_that_has_seen_them(
    corpus: Path, expanded: Path, tmp_path: Path
) -> None:
    tokens = 8 * 32 * 3
    by_tokens = _run(corpus, tmp_path / "run", f"upcycle.stages=[{{at_tokens: {tokens - 5}, {_GROW}}}]")
    run_distributed(train_in_turn, 2, [[*by_tokens, "run.stop_at_step=4"], by_tokens], timeout=300)
    assert _losses(tmp_path / "run") == _losses(expanded)
    assert _final(tmp_path / "run") == _final(expanded)


def test_growing_on_load_is_the_jobs_own_expansion(corpus: Path, expanded: Path, tmp_path: Path) -> None:
    """A checkpoint of 8 experts as a run of 16: the same state and losses; and the same command goes on later."""
    start = expanded / "checkpoints" / "step-00000003"
    larger = _run(corpus, tmp_path / "run", "model.num_experts=16", "upcycle.stages=[]", f"run.resume={start}",
                  "upcycle.on_load={selection: greedy, scoring_batches: 2}")  # fmt: skip
    run_distributed(train_in_turn, 2, [[*larger, "run.stop_at_step=5"], larger], timeout=300)
    assert _losses(tmp_path / "run") == _losses(expanded, first=4)
    assert _final(tmp_path / "run") == _final(expanded)
    manifest = read_manifest(list_checkpoints(tmp_path / "run")[-1])
    assert [entry["origin"] for entry in manifest.stages] == ["on_load"]
    assert manifest.started_from == str(start)
    auto = [x for x in larger if not x.startswith("run.resume=")]
    run_distributed(train_in_turn, 2, [auto])


def test_growing_on_load_needs_the_checkpoint_named(corpus: Path, expanded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(expanded, copy)
    with pytest.raises(
        ConfigError, match=r"num_experts was 8 there and is 32 here.*to grow it on load, name it: run\.re"
    ):
        run_distributed(train_in_turn, 2, [_run(corpus, copy, "model.num_experts=32", "upcycle.stages=[]")])


def test_a_request_is_taken_at_the_next_boundary_and_repeated_by_a_resume(corpus: Path, tmp_path: Path) -> None:
    whole, later = tmp_path / "whole", tmp_path / "later"
    base = ["upcycle.stages=[{at_step: 4, factor: 2}]", "checkpoint.interval_steps=1", "checkpoint.keep_last=9"]
    # Left while the run is not there; taken after the first step it makes.
    run_distributed(train_in_turn, 2, [_run(corpus, whole, *base, "run.stop_at_step=1")])
    folder, bad = leave_request(whole, {"num_experts": 12, "selection": "greedy", "utility": "weight_norm"})
    assert folder.waiting() == bad
    run_distributed(train_in_turn, 2, [_run(corpus, whole, *base)], timeout=300)
    answer = folder.answer(bad)
    assert answer is not None and (answer[0], answer[1]["step"]) == ("taken", 2)
    assert [m["num_experts"] for m in metrics(whole).values()] == [8, 8, 12, 12, 24, 24]
    assert [e["details"]["outcome"] for e in events(whole, "request")] == ["taken"]

    # The job dies before anything after the request was saved: the same request at the same step.
    shutil.copytree(whole, later)
    for path in list_checkpoints(later):
        if path.name not in ("step-00000001", "step-00000002"):
            shutil.rmtree(path)
    run_distributed(train_in_turn, 2, [_run(corpus, later, *base, "run.stop_at_step=3"), _run(corpus, later, *base)])
    assert _losses(later) == _losses(whole)
    assert _final(later) == _final(whole)
    origins = [entry["origin"] for entry in read_manifest(list_checkpoints(later)[-1]).stages]
    assert origins == ["requested", "configured"]


def test_a_request_that_cannot_be_is_refused_and_training_goes_on(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    base = _run(corpus, run_dir, "upcycle.stages=[]", "run.steps=3")
    run_distributed(train_in_turn, 2, [[*base, "run.stop_at_step=1"]])
    with pytest.raises(ConfigError, match=r"the request\.num_experts=9 is not divisible by parallel\.expert=2"):
        leave_request(run_dir, {"num_experts": 9, "selection": "greedy"})
    with pytest.raises(ConfigError, match=r"the request: unknown key fctor; did you mean factor\?"):
        leave_request(run_dir, {"fctor": 2})
    with pytest.raises(ConfigError, match="drop at_step and at_tokens"):
        leave_request(run_dir, {"factor": 2, "at_step": 2})
    folder = RequestFolder(run_dir)
    assert folder.waiting() is None
    path = folder.write({"num_experts": 9, "selection": "greedy"})
    damaged = folder.root / "request-0000.json"
    damaged.write_text("{")
    run_distributed(train_in_turn, 2, [base])
    assert [m["num_experts"] for m in metrics(run_dir).values()] == [8, 8, 8]
    mark, body = folder.answer(damaged) or ("", {})
    assert mark == "refused" and "is no request that this version reads" in body["reason"]
    # One decision per step; the run ends before this one's turn would have come.
    mark, body = folder.answer(path) or ("", {})
    assert mark == "refused" and body["reason"] == "the run has finished at step 3"
    with pytest.raises(ExpansionError, match="has finished at step 3: nothing will take a request"):
        leave_request(run_dir, {"factor": 2})


def test_a_user_without_a_name_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nobody)
    folder = RequestFolder(tmp_path)
    assert folder.read(folder.write({"factor": 2}))["by"].startswith(f"{os.getuid()}@")


_WATCH = ["run.steps=7", "evaluation.interval_steps=1", "upcycle.guard.evaluations=2", "upcycle.guard.max_increase=0.1"]


def _spoilt(runs: list[list[str]]) -> list[str]:
    """Runs whose larger model does badly: what it says of the held-out text is a nat too much, but not at the switch."""
    told = Evaluation._mean_loss

    def worse(self: Evaluation, opened: Any, stage: Any, *arguments: Any) -> float:
        fresh = stage.scheduler.num_steps == 3
        return told(self, opened, stage, *arguments) + (stage.num_experts > 8 and not fresh)

    Evaluation._mean_loss = worse  # type: ignore[method-assign]
    try:
        return train_in_turn(runs)
    finally:
        Evaluation._mean_loss = told  # type: ignore[method-assign]


def test_the_guard_stops_and_refuses_until_told_otherwise(corpus: Path, tmp_path: Path) -> None:
    base = _run(corpus, tmp_path / "run", *_WATCH)
    message = r"stopped by the guard: after the expansion at step 3 .* or go back with run\.resume=.*step-00000003 "
    with pytest.raises(ExpansionError, match=message):
        run_distributed(_spoilt, 2, [base])
    stopped = max(metrics(tmp_path / "run"))
    assert stopped == 5
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{stopped:08d}"
    with pytest.raises(ExpansionError, match=message):
        run_distributed(_spoilt, 2, [base])
    assert max(metrics(tmp_path / "run")) == stopped
    run_distributed(_spoilt, 2, [[*base, "upcycle.guard.action=off"]])
    assert max(metrics(tmp_path / "run")) == 7


def test_the_guard_returns_to_the_run_that_never_expanded(corpus: Path, tmp_path: Path) -> None:
    """Back in the same job, and from then on bit for bit the run of the small model; a resume does not try again."""
    returned, never = tmp_path / "returned", tmp_path / "never"
    base = _run(corpus, returned, *_WATCH, "upcycle.guard.action=return", "checkpoint.interval_steps=1")
    plain = _run(corpus, never, "upcycle.stages=[]", *_WATCH)
    run_distributed(_spoilt, 2, [base, plain], timeout=400)
    (back,) = events(returned, "return")
    assert back["details"]["num_experts"] == 8 and back["details"]["from_step"] == 5
    assert (returned / RETURNED).exists()
    assert _losses(returned) == _losses(never)
    assert _final(returned) == _final(never)
    # A kill right after the return: only the checkpoint before the expansion is left, and the stage stays out.
    for path in list_checkpoints(returned):
        if path.name > "step-00000003":
            shutil.rmtree(path)
    run_distributed(_spoilt, 2, [base])
    assert _losses(returned) == _losses(never) and _final(returned) == _final(never)


def test_a_second_return_leaves_out_what_the_first_did(tmp_path: Path) -> None:
    from train.guard import _record, held_from

    assert held_from(tmp_path) is None
    _record(tmp_path, 100, 120, "a configured stage")
    _record(tmp_path, 150, 170, "a request")
    assert held_from(tmp_path) == 100


def test_guard_counts_evaluations_in_a_row() -> None:
    guard, config = Guard(step=3, stage=1, reference=2.0, checkpoint=None), GuardConfig(max_increase=0.5, evaluations=2)
    for step, loss, tripped in (
        (3, 2.6, False),
        (3, 9.0, False),
        (4, 2.4, False),
        (5, 2.7, False),
        (6, float("nan"), True),
    ):
        guard.observe(step, loss)
        assert guard.tripped(config) is tripped, step
    assert not guard.tripped(GuardConfig(action="off", max_increase=0.5, evaluations=2))
    assert not guard.tripped(GuardConfig(max_increase=0.8, evaluations=3))
    assert Guard(**guard.to_dict()).tripped(config)
