"""Runs that are killed over and over and started again: nothing is lost but the steps since the last checkpoint.

A campaign starts a run, kills it, starts it again, until it is finished, and compares it with the run that nobody
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
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed import RankError, run_distributed
from tests.faults.fire import Shot, draw_shot, newest_step, train_under_fire
from tests.train.trainer import SMALL, metrics, small_corpus
from train.checkpoint import list_checkpoints, read_manifest
from train.status import read_status

_RANKS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path) -> list[str]:
    """Seven steps with dropout, a save after every second, a switch after the third, saved on both sides."""
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", "run.steps=7", "model.dropout=0.1",
            "checkpoint.interval_steps=2", "upcycle.save_after=true", "evaluation.interval_steps=3",
            "parallel.timeout_seconds=60"]  # fmt: skip


def _outcome(run_dir: Path) -> tuple[Any, Any]:
    steps = {s: (m["lm_loss"], m["grad_norm"], m["num_experts"]) for s, m in metrics(run_dir).items()}
    return steps, read_manifest(list_checkpoints(run_dir)[-1]).fingerprints


def _campaign(kills: int, seed: int, corpus: Path, folder: Path) -> str:
    """Kill runs `kills` times; every one that ends must be the undisturbed one, bit for bit.

    Returns:
        What happened, for people.
    """
    rng = random.Random(seed)
    whole = folder / "whole"
    began = time.monotonic()
    never = Shot(())
    ended = run_distributed(train_under_fire, _RANKS, _run(corpus, whole), str(whole), never, "", timeout=300)
    seconds, events = time.monotonic() - began, min(touched for _, touched in ended)
    expected = _outcome(whole)

    fell: Counter[str] = Counter()
    done = lost = runs = 0
    while done < kills:
        run_dir, told = folder / "run", folder / "told"
        shutil.rmtree(run_dir, ignore_errors=True)
        for _ in range(40):
            before = newest_step(run_dir)
            # The last word of a campaign is a run that nobody disturbs.
            shot = draw_shot(rng, _RANKS, events, seconds) if done < kills else never
            try:
                run_distributed(
                    train_under_fire, _RANKS, _run(corpus, run_dir), str(run_dir), shot, str(told), timeout=300
                )
            except RankError as error:
                assert "died without a report" in str(error), error
                done += 1
                lost += _last_step(run_dir) - newest_step(run_dir)
                assert newest_step(run_dir) >= before, "a kill cost a checkpoint"
            else:
                break
        assert _outcome(run_dir) == expected
        runs += 1
        if told.exists():
            fell.update(told.read_text().split("\n")[:-1])
            told.unlink()
    return (
        f"{done} kills over {runs} runs of 7 steps, {(time.monotonic() - began) / 60:.1f} min; they fell into "
        f"{dict(fell.most_common())}; lost were {lost} steps since a last checkpoint, and nothing else"
    )


def _last_step(run_dir: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return max((json.loads(x)["step"] for x in (run_dir / "metrics.jsonl").read_text().splitlines()), default=0)
    return newest_step(run_dir)


def test_a_run_survives_kills(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _campaign(8, 1, corpus, tmp_path)
    with capsys.disabled():
        print(f"\n{told}")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_a_run_survives_many_kills(seed: int, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _campaign(50, seed, corpus, tmp_path)
    with capsys.disabled():
        print(f"\n{told}")


@pytest.mark.parametrize("victim", ["launcher", "agent"])
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
