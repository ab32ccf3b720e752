"""Steps that go wrong: what is not finite updates nothing, and a run that goes back leaves the samples out for good."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import CoppiceError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_in_turn
from tests.upcycle import plans as _profile  # noqa: F401 - lifts hypothesis' deadline
from train import step
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.data.stream import DataStream
from train.health import SKIPPED, Health, beyond, left_out
from train.schema.health import HealthConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", "run.steps=8",
            "checkpoint.interval_steps=2", "checkpoint.keep_last=9", *more]  # fmt: skip


def _poisoned(overrides: list[str], bad: list[int], factor: float) -> str:
    """A run in which the loss of rank 1 is multiplied, on batches that begin with certain samples."""
    reading, peeking, loss, now = DataStream.train, DataStream.peek, step._loss, [-1]

    def train(self: DataStream, first: int) -> Any:
        now[0] = first
        return reading(self, first)

    def peek(self: DataStream, first: int) -> Any:
        now[0] = -1
        return peeking(self, first)

    def poison(*arguments: Any) -> Any:
        value, told = loss(*arguments)
        if now[0] in bad and torch.is_grad_enabled() and os.environ["RANK"] == "1":
            return value * factor, {"loss": told["loss"] * factor}
        return value, told

    DataStream.train, DataStream.peek, step._loss = train, peek, poison  # type: ignore[method-assign, assignment]
    try:
        return train_in_turn([overrides])[0]
    finally:
        DataStream.train, DataStream.peek, step._loss = reading, peeking, loss  # type: ignore[method-assign]


def _losses(run_dir: Path) -> dict[int, Any]:
    return {s: (m["lm_loss"], m["grad_norm"], m["num_experts"], m["tokens"]) for s, m in metrics(run_dir).items()}


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_updates_nothing(factor: float, corpus: Path, tmp_path: Path) -> None:
    """The batch of step 3, right before the expansion, on one rank of two."""
    base = _run(corpus, tmp_path, "checkpoint.interval_steps=1", "run.steps=5")
    assert run_distributed(_poisoned, 2, base, [16], factor) == ["finished", "finished"]
    (bad,) = events(tmp_path, "bad_step")
    assert (bad["step"], bad["details"]["first_sample"], bad["details"]["samples"]) == (3, 16, 8)
    told = metrics(tmp_path)
    assert told[3]["grad_norm"] is None and told[3]["lm_loss"] is None
    assert told[4]["learning_rate"] == told[3]["learning_rate"]
    before, after = (read_manifest(tmp_path / "checkpoints" / f"step-0000000{n}") for n in (2, 3))
    assert (before.optimizer_step, after.optimizer_step) == (2, 2)
    changed = {name for name in before.fingerprints if before.fingerprints[name] != after.fingerprints[name]}
    # The count of tokens is no gradient: balancing goes on.
    assert all(name.endswith("expert_bias") for name in changed)
    assert after.data["samples"] == 24 and read_manifest(list_checkpoints(tmp_path)[-1]).optimizer_step == 4


def test_too_many_in_a_row_stop_the_run_and_are_named(corpus: Path, tmp_path: Path) -> None:
    base = _run(corpus, tmp_path, "health.bad_steps=3")
    message = r"3 bad steps in a row from step 4 on, with the samples 24 to 31, 32 to 39, 40 to 47; the last: .*health\.action=r"
    with pytest.raises(CoppiceError, match=message):
        run_distributed(_poisoned, 2, base, [8, 24, 32, 40], float("nan"))
    assert [e["details"]["in_a_row"] for e in events(tmp_path, "bad_step")] == [1, 1, 2, 3]


def test_going_back_is_the_run_that_never_saw_them(corpus: Path, tmp_path: Path) -> None:
    """Across the expansion after step 3; a fresh run that leaves the same samples out is the same, bit for bit."""
    back, never = tmp_path / "back", tmp_path / "never"
    options = ["health.bad_steps=2", "health.action=rollback"]
    run_distributed(_poisoned, 2, _run(corpus, back, *options), [24, 32], float("nan"))
    (event,) = events(back, "return")
    # Bad are steps 4 and 5; the newest checkpoint before them is that of step 3, before the switch.
    assert event["details"]["from_step"] == 5 and event["details"]["checkpoint"].endswith("step-00000003")
    assert json.loads((back / SKIPPED).read_text())["stretches"] == [[24, 8], [32, 8]]
    never.mkdir()
    shutil.copy(back / SKIPPED, never / SKIPPED)
    # Stopped and resumed on the way: the samples stay left out.
    run_distributed(train_in_turn, 2, [_run(corpus, never, "run.stop_at_step=5"), _run(corpus, never)])
    assert _losses(back) == _losses(never)
    assert [m["tokens"] for m in metrics(back).values()] == [8 * 32 * s for s in range(1, 9)]
    newest = [read_manifest(list_checkpoints(path)[-1]) for path in (back, never)]
    assert newest[0].fingerprints == newest[1].fingerprints
    assert newest[0].data["samples"] == newest[1].data["samples"] == 8 * 10


def test_a_step_that_is_trained_again_is_evaluated_again(corpus: Path, tmp_path: Path) -> None:
    """Bad are steps 5 and 6; the run goes back to step 4, and step 5 comes out of other samples."""
    options = ["health.bad_steps=2", "health.action=rollback", "upcycle.stages=[]", "evaluation.interval_steps=5"]
    run_distributed(_poisoned, 2, _run(corpus, tmp_path, *options), [32, 40], float("nan"))
    first, again, end = events(tmp_path, "evaluation")
    assert (first["step"], again["step"], end["step"]) == (5, 5, 8)
    assert first["details"]["valid_loss"] != again["details"]["valid_loss"]


def test_a_run_does_not_go_back_for_ever(corpus: Path, tmp_path: Path) -> None:
    base = _run(corpus, tmp_path, "health.bad_steps=1", "health.action=rollback", "health.max_rollbacks=2")
    with pytest.raises(CoppiceError, match=r"has gone back 2 times already \(health\.max_rollbacks\)"):
        run_distributed(_poisoned, 2, base, list(range(24, 80, 8)), float("nan"))
    early = _run(corpus, tmp_path / "early", "health.bad_steps=1", "health.action=rollback")
    with pytest.raises(CoppiceError, match="no checkpoint of this run is from before them"):
        run_distributed(_poisoned, 2, early, [0], float("nan"))


def test_a_spike_is_a_bad_step_by_its_loss(corpus: Path, tmp_path: Path) -> None:
    base = _run(corpus, tmp_path, "health.bad_steps=1", "health.spike_factor=3", "health.spike_window_steps=3")
    with pytest.raises(
        CoppiceError, match=r"1 bad steps in a row from step 5 on, with the samples 32 to 39; .* times the mean"
    ):
        run_distributed(_poisoned, 2, base, [32], 9.0)


def test_the_window_holds_good_steps_only() -> None:
    config, health = HealthConfig(spike_factor=2.0, spike_window_steps=2, bad_steps=9), Health()
    for number, (loss, bad) in enumerate(
        [(5.0, False), (9.0, False), (14.5, True), (14.1, True), (8.0, False), (17.1, True)]
    ):
        assert (health.judge(config, number, loss, True, (8 * number, 8)) is not None) is bad, number
    assert health.losses == [9.0, 8.0] and (health.bad, health.first_step) == (1, 5)
    assert health.judge(config, 6, float("nan"), False, (48, 8)) is not None
    assert health.stretches == [[40, 8], [48, 8]]
    assert Health(**json.loads(json.dumps(health.to_dict()))) == health


@given(st.integers(0, 60), st.integers(1, 9), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=5))
def test_a_batch_touches_nothing_that_is_left_out(sample: int, batch: int, skipped: list[tuple[int, int]]) -> None:
    first = beyond(sample, batch, skipped)
    assert first >= sample
    taken = set(range(first, first + batch))
    assert not any(taken & set(range(a, a + n)) for a, n in skipped)
    if not skipped:
        assert first == sample and left_out(first, skipped) == 0
