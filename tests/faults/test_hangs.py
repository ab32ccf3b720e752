"""Ranks that hang or die: the others end soon, with an error that names the rank and its place, and the next start goes on."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import ConfigError, LaunchError
from parallel.flight_recorder import open_collective
from parallel.heartbeat import lost_connection
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.schema.health import HealthConfig
from train.signs import Blame, Sign, describe, find_culprits, look_at
from train.status import read_status

_LIMIT = 3
# For a verdict after the limit, on a machine that is busy with other tests.
_SLACK = 8.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs and nobody watches."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_distributed(train_in_turn, 2, [_run(corpus, run_dir, "health.hang_seconds=null")])
    return run_dir


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    """Five steps with a save after every second and a switch after the third, after which is evaluated."""
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", "run.steps=5", "model.dropout=0.1",
            "checkpoint.interval_steps=2", "checkpoint.asynchronous=false", "evaluation.batches=3",
            "upcycle.stages=[{at_step: 3, factor: 2, selection: uniform}]", f"health.hang_seconds={_LIMIT}", *more]  # fmt: skip


@dataclass
class _Ended:
    """How a faulty job ended: what was said, and seconds from the fault to it, and to the end of each process."""

    errors: list[str] = field(default_factory=list)
    output: str = ""
    spoke: float = float("nan")
    seconds: dict[int, float] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    victim: int = 0


def _faulty(fault: str, rank: int, folder: Path, overrides: list[str], *, torchrun: bool) -> _Ended:
    """Run a job of two processes, one of which fails, to its end; a rank that is stopped is killed then."""
    told = folder / f"told-{fault}"
    words = ["-m", "tests.faults.hang", fault, str(rank), str(told), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    if torchrun:
        commands = [(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words], environment)]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        job = environment | there
        commands = [(words, {**job, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    ended, spoke = _Ended(), [0.0]
    processes = [
        subprocess.Popen([sys.executable, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         start_new_session=True)
        for words, env in commands
    ]  # fmt: skip

    def listen(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            ended.output += line
            if line.startswith("error: "):
                spoke[0] = spoke[0] or time.time()
                ended.errors.append(line.strip())

    listeners = [threading.Thread(target=listen, args=(process,)) for process in processes]
    for listener in listeners:
        listener.start()
    done: dict[int, float] = {}
    try:
        deadline = time.monotonic() + 90
        while len(done) < len(processes) and time.monotonic() < deadline:
            for number, process in enumerate(processes):
                if number not in done and process.poll() is not None:
                    done[number] = time.time()
                    ended.codes[number] = process.returncode
            # Nobody ends these two, and nobody has to.
            if fault in ("stop", "late") and spoke[0] and len(done) == len(processes) - 1:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for listener in listeners:
            listener.join()
    if told.exists():
        began, pid = told.read_text().split()
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        ended.spoke, ended.victim = spoke[0] - float(began), int(pid)
        ended.seconds = {number: at - float(began) for number, at in done.items()}
    print(f"{fault} of rank {rank}: {ended}")
    return ended


def _outcome(run_dir: Path) -> tuple[Any, Any]:
    steps = {s: (m["lm_loss"], m["grad_norm"], m["num_experts"]) for s, m in metrics(run_dir).items()}
    return steps, read_manifest(list_checkpoints(run_dir)[-1]).fingerprints


def _assert_told(ended: _Ended, run_dir: Path, *words: str) -> None:
    """One line that says all of it, which is in the records too."""
    (line,) = ended.errors
    for word in (*words, f"pid {ended.victim} on {socket.gethostname()}", "start the job again"):
        assert re.search(word, line), (word, line)
    status = read_status(run_dir)
    assert status is not None
    assert (status["state"], status["exit_code"]) == ("failed", LaunchError.exit_code)
    assert f"error: {status['reason']}" == line
    assert [e["details"] for e in events(run_dir, "stop")] == [{"reason": "failed", "error": status["reason"]}]


def test_a_rank_that_hangs_in_a_step_is_named(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = _faulty("step", 1, tmp_path, _run(corpus, run_dir), torchrun=True)
    assert ended.codes[0] != 0 and _LIMIT <= ended.spoke < _LIMIT + _SLACK and ended.seconds[0] < _LIMIT + _SLACK
    _assert_told(ended, run_dir, "step 2 has not got on for", r"rank 1 .* is in step 2 at train/data/stream.py:\d+ \(train\)",
                 r"rank 0 waits at train/step.py", "raise health.hang_seconds", f"{run_dir}/nccl-trace-rank-R")  # fmt: skip
    assert (run_dir / "nccl-trace-rank-0").exists()


@pytest.mark.slow
def test_a_collective_that_times_out_is_named_with_its_record(corpus: Path, tmp_path: Path) -> None:
    """Nobody watches for ranks that hang; gloo tells the rank that waits, and no one the rank that is late."""
    run_dir = tmp_path / "run"
    run = _run(corpus, run_dir, "health.hang_seconds=null", "parallel.timeout_seconds=4")
    ended = _faulty("late", 1, tmp_path, run, torchrun=False)
    (line,) = ended.errors
    for words in (r"error: rank 0 waited in vain in step 2 at train/step.py:\d+ ", r" for gloo:all_\w+ of \d", "[Tt]imed out",
                  "start the job again", "raise parallel.timeout_seconds", f"{run_dir}/nccl-trace-rank-R"):  # fmt: skip
        assert re.search(words, line), (words, line)
    assert ended.codes == {0: LaunchError.exit_code} and 4 <= ended.spoke < 4 + _SLACK
    assert open_collective(run_dir / "nccl-trace-rank-0") in line
    status = read_status(run_dir)
    assert status is not None and f"error: {status['reason']}" == line


_HANGS = [
    ("evaluation", 0, ["evaluation after step 3 has not got on", r"in evaluation after step 3 at train/evaluation.py:\d+ \(_mean_loss\)"]),
    ("save", 1, ["saving after step 2 has not got on", r"in saving after step 2 at train/checkpoint/save_task.py:\d+ \(run\)"]),
    ("switch", 1, [r"the switch \(move\) has not got on", r"in the switch \(move\) at train/switch.py:\d+ \(through_memory\)"]),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("fault", "rank", "words"), _HANGS, ids=[fault for fault, _, _ in _HANGS])
def test_a_rank_that_hangs_elsewhere_is_named_and_the_next_start_goes_on(
    fault: str, rank: int, words: list[str], corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = _faulty(fault, rank, tmp_path, _run(corpus, run_dir), torchrun=True)
    assert ended.codes[0] != 0 and _LIMIT <= ended.spoke < _LIMIT + _SLACK and ended.seconds[0] < _LIMIT + _SLACK
    _assert_told(ended, run_dir, f"rank {rank} ", *words, f"rank {1 - rank} waits at")
    run_distributed(train_in_turn, 2, [_run(corpus, run_dir)])
    assert _outcome(run_dir) == _outcome(whole)


def _stopped(rank: int, corpus: Path, folder: Path) -> None:
    run_dir = folder / "run"
    ended = _faulty("stop", rank, folder, _run(corpus, run_dir), torchrun=False)
    assert ended.codes == {1 - rank: LaunchError.exit_code}
    assert ended.seconds[1 - rank] < _LIMIT + _SLACK
    told = "gives no sign of life" if rank == 0 else "its process is stopped"
    _assert_told(ended, run_dir, "step 2 has not got on", f"rank {rank} .*{told}")


@pytest.mark.slow
@pytest.mark.faults
def test_a_process_that_is_stopped_is_named(corpus: Path, tmp_path: Path) -> None:
    _stopped(1, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.faults
def test_rank_0_that_is_stopped_is_named(corpus: Path, tmp_path: Path) -> None:
    """Without a launcher it is what the ranks see each other through."""
    _stopped(0, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("rank", "torchrun"), [(1, False), (0, False), (1, True), (0, True)])
def test_a_rank_that_is_killed_is_named(rank: int, torchrun: bool, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # No limit would be reached in time.
    overrides = _run(corpus, run_dir, "health.hang_seconds=100")
    ended = _faulty("kill", rank, tmp_path, overrides, torchrun=torchrun)
    assert "Traceback" not in ended.output or torchrun
    assert ended.spoke < _SLACK
    if not torchrun:
        assert ended.codes == {rank: -signal.SIGKILL, 1 - rank: LaunchError.exit_code}
    _assert_told(ended, run_dir, "step 2 cannot go on", rf"rank {rank} ", "is gone|gives no sign of life")


@pytest.mark.slow
@pytest.mark.faults
def test_a_rank_that_fails_alone_is_named_with_its_error(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = _faulty("raise", 1, tmp_path, _run(corpus, run_dir, "health.hang_seconds=100"), torchrun=False)
    assert ended.spoke < _SLACK and ended.codes == {0: LaunchError.exit_code, 1: 1}
    _assert_told(ended, run_dir, r"rank 1 .* failed in step 2 at train/.*ZeroDivisionError: made up")


@pytest.mark.slow
@pytest.mark.faults
def test_what_is_slow_but_gets_on_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    """An evaluation of nearly twice the limit, on one rank."""
    run_dir = tmp_path / "run"
    overrides = _run(corpus, run_dir, "evaluation.batches=5", "run.steps=3", "upcycle.stages=[]")
    ended = _faulty("slow", 1, tmp_path, overrides, torchrun=True)
    assert ended.codes == {0: 0} and not ended.errors
    status = read_status(run_dir)
    assert status is not None and status["state"] == "finished"


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"health\.hang_seconds"):
        HealthConfig(hang_seconds=0)


# ---- the pure part --------------------------------------------------------------------------------------------------


def _signs(*waits: bool, **changes: Any) -> list[Sign]:
    return [Sign(r, "here", 100 + r, ticks=7, doing="step 7", place="a.py:1 (f)", waits=w, **changes) for r, w in enumerate(waits)]  # fmt: skip


def test_who_is_to_blame() -> None:
    def ranked(signs: list[Sign], **changes: dict[int, Any]) -> list[Sign]:
        return [Sign(**{**vars(s), **{k: v[s.rank] for k, v in changes.items() if s.rank in v}}) for s in signs]

    assert find_culprits(_signs(True, True, False), []) == Blame("away", (2,))
    # Silent ones first: they may stand where the others wait.
    assert find_culprits(_signs(True, True, False), [1]) == Blame("silent", (1,))
    assert find_culprits(ranked(_signs(True, True, False), ended={0: "failed"}), [1]) == Blame("failed", (0,))
    # Whoever has ended well, or because of another, is not to blame; it does not beat any more either.
    over = ranked(_signs(True, False, False), ended={1: "left", 2: "finished"})
    assert find_culprits(over, [1, 2]) == Blame("all", (0,))
    assert find_culprits(ranked(_signs(True, True, True), ticks={1: 6}), []) == Blame("behind", (1,))
    assert find_culprits(ranked(_signs(False, False), ticks={1: 6}), []) == Blame("behind", (1,))
    assert find_culprits(_signs(True, True), []) == Blame("all", (0, 1))
    assert find_culprits(ranked(_signs(True, True), ended={0: "finished", 1: "finished"}), []) is None


def test_what_is_said_of_them() -> None:
    signs = _signs(*[True] * 8)
    assert describe(Blame("away", (1,)), signs[:2], {}) == (
        "rank 1 (pid 101 on here) is in step 7 at a.py:1 (f); rank 0 waits at a.py:1 (f)"
    )
    told = describe(Blame("silent", tuple(range(1, 7))), signs, {2: "is gone"})
    assert "rank 1 (pid 101 on here) gives no sign of life" in told and "rank 2 (pid 102 on here) is gone;" in told
    assert "rank 5" not in told and told.endswith("and so for 2 more, to rank 6")
    assert Sign.from_json(signs[3].to_json()) == signs[3]


def test_a_rank_in_a_collective_is_seen_to_wait() -> None:
    assert run_distributed(_looked_at, 2) == [("waits", True), ("sleeps", False)]


def _looked_at() -> tuple[str, bool]:
    import torch

    me, found = threading.get_ident(), []
    rank = torch.distributed.get_rank()
    timer = threading.Timer(0.5, lambda: found.append(look_at(sys._current_frames()[me])[1]))
    timer.start()
    if rank == 1:
        time.sleep(1)
    torch.distributed.all_reduce(torch.ones(1))
    timer.join()
    return ("sleeps" if rank else "waits"), found[0]


def test_which_errors_may_be_due_to_another_rank() -> None:
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    wrapped = ValueError("cannot be written")
    wrapped.__cause__ = gloo
    assert lost_connection(gloo) and lost_connection(wrapped)
    assert not lost_connection(RuntimeError("shapes do not match")) and not lost_connection(ValueError("gloo"))
