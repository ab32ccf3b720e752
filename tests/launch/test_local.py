"""`python -m launch local`: what it refuses, what it passes on, and how a run is stopped through it."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import relay, run_local, torchrun_command
from parallel.errors import ConfigError, LaunchError
from tests.train.trainer import SMALL, events, metrics, small_corpus

_AGENT = """W1122 08:08:09.846000 32096 torch/distributed/run.py:874] Setting OMP_NUM_THREADS
E1125 00:18:34.143000 5514 .venv/lib/python3.11/site-packages/torch/distributed/elastic/multiprocessing/api.py:1002] failed
error: data.corpus=x: there is no corpus
E1122 08:08:25.041000 32096 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 3)
Traceback (most recent call last):
  File "/venv/lib/torch/distributed/run.py", line 1028, in main
    run(args)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
  exitcode  : -15 (pid: 28007)
  exitcode  : 3 (pid: 28006)
============================================================
"""


def test_the_ranks_word_is_passed_on_and_the_agents_is_not() -> None:
    out = io.StringIO()
    assert relay(_AGENT.splitlines(keepends=True), out) == 3
    assert out.getvalue() == "error: data.corpus=x: there is no corpus\n"


def test_a_killed_rank_is_told_by_its_signal() -> None:
    killed = _AGENT.replace("exitcode  : 3 ", "exitcode  : -9 ").replace(
        "error: data.corpus=x: there is no corpus\n", ""
    )
    assert relay(killed.splitlines(keepends=True), io.StringIO()) == 128 + signal.SIGKILL


def test_a_ranks_own_traceback_is_passed_on_whole() -> None:
    crash = "Traceback (most recent call last):\n  File \"/work/train/run.py\", line 1, in f\n    g()\nKeyError: 'x'\nmore\n"
    out = io.StringIO()
    assert relay(crash.splitlines(keepends=True), out) == 0
    assert out.getvalue() == crash


def test_nothing_starts_with_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="--processes=0"):
        run_local(0, None, [])
    with pytest.raises(ConfigError, match=r"unknown key run\.stps"):
        run_local(2, None, ["experiment=demo", "run.stps=1"])
    with pytest.raises(LaunchError, match="--port=70000 is no port"):
        run_local(2, 70000, ["experiment=demo", "parallel.expert=2"])
    assert "--standalone" in torchrun_command(2, None, [])
    assert "--standalone" not in torchrun_command(2, 29511, [])


def test_a_stop_signal_saves_and_ends_well_and_the_run_resumes(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    overrides = [*SMALL, f"data.corpus={corpus}", f"run.dir={tmp_path / 'run'}", "upcycle.stages=[]",
                 "run.steps=100000", "schedule.decay_steps=1", "parallel.expert=2"]  # fmt: skip
    command = [sys.executable, "-m", "launch", "local", "--processes", "2", "--", *overrides]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        if (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) >= 3:
            break
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "Traceback" not in err and "stopping after this step" in err
    done = metrics(tmp_path / "run")
    (stop,) = events(tmp_path / "run", "stop")
    assert stop["details"]["reason"] == "requested" and stop["step"] == max(done)
    assert f"step-{max(done):08d}" in out
    assert "report drawn in" in out and (tmp_path / "run" / "report.html").exists()
