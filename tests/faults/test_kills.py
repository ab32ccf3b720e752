"""Runs that are killed over and over and started again: nothing is lost but the steps since the last checkpoint.

Killed are ranks, torchrun's agent, or all of them at once. A campaign starts a run, kills it, starts it again, until it is finished, and compares it with the run that nobody
disturbed; then it begins anew, until there were enough kills. `make test-faults` makes 200 of them.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.agent import run_under_agent
from tests.faults.fire import VICTIMS, Shot, draw_shots, newest_step, train_under_fire
from tests.train.trainer import SMALL, metrics, small_corpus, train_here
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.status import read_status

_RANKS, _STEPS, _INTERVAL = 2, 7, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path) -> list[str]:
    """Seven steps with dropout, a save after every second, a switch after the third, saved on both sides."""
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", f"run.steps={_STEPS}", "model.dropout=0.1",
            f"checkpoint.interval_steps={_INTERVAL}", "upcycle.save_after=true", "evaluation.interval_steps=3",
            "parallel.timeout_seconds=60"]  # fmt: skip


def _outcome(run_dir: Path) -> tuple[Any, Any]:
    steps = {s: (m["lm_loss"], m["grad_norm"], m["num_experts"]) for s, m in metrics(run_dir).items()}
    return steps, read_manifest(list_checkpoints(run_dir)[-1]).fingerprints


@dataclass
class _Campaign:
    """What the kills of a campaign did."""

    victims: Counter[str] = field(default_factory=Counter)
    # Who died, and what was going on then.
    fell: Counter[str] = field(default_factory=Counter)
    # Steps that had to be made again after each kill.
    lost: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    runs: int = 0
    minutes: float = 0.0

    @property
    def kills(self) -> int:
        return sum(self.victims.values())

    def take(self, line: str, lost: int) -> None:
        """Count a kill, told by whoever fired."""
        victim, phase = json.loads(line)
        self.victims[victim] += 1
        self.fell[phase] += 1
        self.lost[victim].append(lost)

    def __str__(self) -> str:
        lost = ", ".join(f"{sum(steps)} by {name} (at most {max(steps)})" for name, steps in self.lost.items())
        return (
            f"{self.kills} kills over {self.runs} runs of {_STEPS} steps, {self.minutes:.1f} min: "
            f"{dict(self.victims.most_common())}; they fell into {dict(self.fell.most_common())}; lost were steps since a "
            f"last complete checkpoint, {lost}, and nothing else"
        )


def _campaign(kills: int, seed: int, corpus: Path, folder: Path, *, report: bool) -> _Campaign:
    """Kill runs `kills` times, reports being drawn or not; every one that ends must be the undisturbed one, bit for bit."""
    whole = folder / "whole"
    never = Shot()
    began = time.monotonic()
    ended = run_under_agent(train_under_fire, _RANKS, _run(corpus, whole), str(whole), never, "", report).results
    shots = draw_shots(random.Random(seed), _RANKS, min(end.events for end in ended), min(end.seconds for end in ended))
    expected = _outcome(whole)

    campaign = _Campaign()
    missed: Shot | None = None
    while campaign.kills < kills:
        run_dir, told = folder / "run", folder / "told"
        shutil.rmtree(run_dir, ignore_errors=True)
        for _ in range(40):
            before = newest_step(run_dir)
            # The last word of a campaign is a run that nobody disturbs.
            shot = (missed or next(shots)) if campaign.kills < kills else never
            job = (_run(corpus, run_dir), str(run_dir), shot, str(told), report)
            end = run_under_agent(train_under_fire, _RANKS, *job)
            lines = told.read_text().splitlines() if told.exists() else []
            told.unlink(missing_ok=True)
            missed = None
            if not lines:
                # The run was over first: whoever was to die dies in the next, sooner.
                missed = None if shot is never else shot.sooner()
                assert [survived.reason for survived in end.results] == ["finished"] * _RANKS, end
                break
            (line,) = lines
            assert end.agent_died is (shot.victim in ("the agent", "the machine")), (shot, end)
            assert newest_step(run_dir) >= before, f"{shot} cost a checkpoint"
            campaign.take(line, _last_step(run_dir) - newest_step(run_dir))
        assert _outcome(run_dir) == expected
        campaign.runs += 1
    campaign.minutes = (time.monotonic() - began) / 60
    # A save every second step, which may be on its way when the next one is due: nothing older was lost.
    assert max(max(steps) for steps in campaign.lost.values()) <= 2 * _INTERVAL
    return campaign


def _last_step(run_dir: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return max((json.loads(x)["step"] for x in (run_dir / "metrics.jsonl").read_text().splitlines()), default=0)
    return newest_step(run_dir)


def test_a_run_survives_kills(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = _campaign(4, 1, corpus, tmp_path, report=False)
    assert set(campaign.victims) == set(VICTIMS)
    with capsys.disabled():
        print(f"\n{campaign}")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_a_run_survives_many_kills(seed: int, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = _campaign(50, seed, corpus, tmp_path, report=seed == 11)
    assert set(campaign.victims) == set(VICTIMS) and {"save", "step", "switch"} <= set(campaign.fell)
    with capsys.disabled():
        print(f"\n{campaign}")


# The campaigns kill the agent too.
@pytest.mark.parametrize("victim", ["launcher", pytest.param("agent", marks=[pytest.mark.slow, pytest.mark.faults])])
def test_ranks_whose_agent_dies_save_and_leave(victim: str, corpus: Path, tmp_path: Path) -> None:
    """Nobody is left to stop them, or to tell them of a rank that died: they take it as a request to stop."""
    run_dir = tmp_path / "run"
    words = [*_run(corpus, run_dir), "run.steps=100000", "upcycle.stages=[]", "checkpoint.interval_steps=100000"]
    agent = subprocess.Popen(
        [sys.executable, "-m", "launch", "local", "--processes", "2", "--", *words],
        stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert agent.stdout is not None
        for line in agent.stdout:
            if line.startswith("step "):
                break
        (torchrun,) = psutil.Process(agent.pid).children()
        os.kill(agent.pid if victim == "launcher" else torchrun.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (status := read_status(run_dir) or {}).get("state") == "running" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
        assert list_checkpoints(run_dir)[-1].name == f"step-{status['step']:08d}"
    finally:
        for process in [agent.pid, torchrun.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(process), signal.SIGKILL)
        agent.wait()


def _train_without_an_agent(overrides: list[str]) -> str:
    """A run whose agent, which keeps the ranks' store, is killed right before the ranks meet at the watchdog's board."""
    from train.watchdog import Watchdog

    start, agent = Watchdog.start, os.getppid()

    def late(self: Watchdog, run: Any) -> None:
        if run.layout.rank == 0:
            os.kill(agent, signal.SIGKILL)
        while os.getppid() == agent:
            time.sleep(0.01)
        start(self, run)

    Watchdog.start = late  # type: ignore[method-assign]
    return train_here(overrides)


@pytest.mark.slow
@pytest.mark.faults
def test_an_agent_that_dies_before_the_first_step_holds_nobody_up(corpus: Path, tmp_path: Path) -> None:
    """Connecting to a store that is gone takes as long as one is patient."""
    words = [*_run(corpus, tmp_path / "run"), "health.hang_seconds=20"]
    assert run_under_agent(_train_without_an_agent, _RANKS, words, timeout=60).agent_died
    status = read_status(tmp_path / "run")
    assert status is not None and (status["state"], status["step"]) == ("stopped", 0)
    assert run_under_agent(train_here, _RANKS, words).results == ["finished"] * _RANKS
