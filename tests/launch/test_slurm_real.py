"""`python -m launch slurm` under a real SLURM: its daemons on this machine, two nodes on loopback. `make test-slurm`.

What a stub cannot show: that sbatch takes the script, which signals reach whom, and that a job that SLURM or the script
puts back into the queue finishes with the numbers of one that was never interrupted.
"""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from tests.train.trainer import SMALL, events, metrics, small_corpus, tensor_digests

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

_PATH = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
# Else a requeued job waits two minutes.
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
# Two nodes of four cores each on whatever there is.
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=15
MinJobAge=600
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP GraceTime=60 PriorityTier=1
PartitionName=first Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
"""
_STEPS = 120
# What a step's line says of the clock and of who looked: no part of the numbers.
_CLOCK = re.compile(r"second|time|memory|mfu|tflop")


def _call(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def _until(what: str, found: Callable[[], Any], seconds: float = 240, every: float = 0.1) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = found()
        if answer:
            return answer
        time.sleep(every)
    raise AssertionError(f"{what} did not come about in {seconds} s")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A controller and two nodes, for as long as the tests of this file run."""
    if not all(shutil.which(name, path=_PATH) for name in ("slurmctld", "slurmd", "sbatch")):
        pytest.skip("SLURM is not installed: `make test-slurm` tries to")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    user = pwd.getpwuid(os.getuid()).pw_name
    (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=host, user=user, ports=_free_ports(3)))
    (folder / "state").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", _PATH)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        for name in [name for name in os.environ if name.startswith(("SLURM_JOB", "SBATCH_", "SRUN_"))]:
            patch.delenv(name)
        try:
            _call("slurmctld")
            for node in ("n1", "n2"):
                (folder / f"spool-{node}").mkdir()
                _call("slurmd", "-N", node)
            _until(
                "two idle nodes",
                lambda: _call("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D").strip() == "2",
                60,
            )
            yield folder
        finally:
            subprocess.run(["scancel", "--user", user], timeout=60)
            for file in folder.glob("*.pid"):
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.kill(int(file.read_text()), signal.SIGTERM)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _submit(
    capsys: pytest.CaptureFixture[str], run_dir: Path, corpus: Path, *more: str, options: tuple[str, ...] = ()
) -> list[str]:
    words = ["slurm", "--nodes", "2", "--gpus-per-node", "0", "--processes-per-node", "1", "--network-interface", "lo",
             "--time", "30", *options, "--", *SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={_quoted(run_dir)}",
             f"run.steps={_STEPS}", "checkpoint.interval_steps=5",
             "upcycle.stages=[{at_step: 40, factor: 2, selection: greedy, scoring_batches: 2}]", *more]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    return re.findall(r"\d+", capsys.readouterr().out.split("(")[0])


def _quoted(path: Path) -> str:
    """As Hydra wants it."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _job(number: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in _call("scontrol", "-o", "show", "job", number).split() if "=" in word)


def _ended(number: str, run_dir: Path) -> dict[str, str]:
    """The job once it is over and will not come back."""

    def over() -> dict[str, str] | None:
        job = _job(number)
        return job if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else None

    try:
        return _until(f"the end of job {number}", over, 400, 0.5)
    except AssertionError as e:
        raise AssertionError(f"{e}: {_job(number)}\n{_log(run_dir)}") from None


def _log(run_dir: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(run_dir.glob("slurm-*.log")))


def _reaches(run_dir: Path, step: int) -> None:
    """Wait until the run has made a step."""

    def made() -> bool:
        try:
            return (run_dir / "metrics.jsonl").read_text().count("\n") >= step
        except FileNotFoundError:
            return False

    try:
        _until(f"step {step}", made, every=0.03)
    except AssertionError as e:
        raise AssertionError(f"{e}\n{_log(run_dir)}") from None


def _restarts(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "restarts.json").read_text())


def _status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def _numbers(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {s: {k: v for k, v in line.items() if not _CLOCK.search(k)} for s, line in metrics(run_dir).items()}


def test_interrupted_in_every_way_it_ends_as_if_it_had_not_been(
    cluster: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken run"
    (number,) = _submit(capsys, whole, corpus)
    assert _ended(number, whole)["JobState"] == "COMPLETED", _log(whole)
    assert _status(whole)["state"] == "finished"

    (number,) = _submit(capsys, broken, corpus)
    # As before a time limit: to the script alone, which leaves a file for the ranks.
    _reaches(broken, 10)
    _call("scancel", "--batch", "--signal=USR1", number)
    _until("the first restart", lambda: _job(number)["Restarts"] == "1")
    # By hand, or by an administrator.
    _reaches(broken, 50)
    _call("scontrol", "requeue", number)
    _until("the second restart", lambda: _job(number)["Restarts"] == "2")
    # A node is lost; which one does not matter, both are needed.
    _reaches(broken, 75)
    _call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    _until("the third restart", lambda: _job(number)["Restarts"] == "3")
    _call("scontrol", "update", "nodename=n2", "state=resume")
    job = _ended(number, broken)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), _log(broken)

    assert _status(broken)["state"] == "finished" and not (broken / "stop").exists()
    known = _restarts(broken)
    assert (len(known["starts"]), known["ended"], known["without_progress"]) == (4, 0, 0)
    assert "before the time limit" in known["starts"][0]["why"] and known["starts"][0]["again"]
    assert len(events(broken, "resume")) == 3
    assert _numbers(broken) == _numbers(whole)
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    assert tensor_digests(broken / "checkpoints" / last) == tensor_digests(whole / "checkpoints" / last)


def test_a_preempted_run_comes_back_and_a_users_stop_does_not(
    cluster: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (number,) = _submit(capsys, run, corpus, "run.steps=100000")
    _reaches(run, 10)
    # A job of a partition that goes first: the ranks get SIGTERM, and a minute.
    _call("sbatch", "--parsable", "-p", "first", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    _until("the restart", lambda: _job(number)["Restarts"] == "1")
    assert "for a job that goes first" in _restarts(run)["starts"][0]["why"]
    _reaches(run, int(_status(run)["step"]) + 5)
    (run / "stop").touch()
    job = _ended(number, run)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), _log(run)
    assert "by request" in _restarts(run)["starts"][-1]["why"]
    # scancel ends it as well, with a checkpoint.
    (number,) = _submit(capsys, run, corpus, "run.steps=100000")
    _reaches(run, int(_status(run)["step"]) + 5)
    _call("scancel", number)
    assert _ended(number, run)["JobState"] == "CANCELLED"
    _until("the decision", lambda: not _restarts(run)["running"])
    assert "SLURM ends this job" in _restarts(run)["starts"][-1]["why"] and _status(run)["state"] == "stopped"


def test_before_its_time_limit_it_saves_and_comes_back(
    cluster: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    limit = ("--time", "2", "--grace", "60")
    (number,) = _submit(capsys, run, corpus, "run.steps=100000", options=limit)
    _until("the restart", lambda: _job(number)["Restarts"] == "1")
    (start,) = _restarts(run)["starts"]
    assert start["again"] and "before the time limit" in start["why"] and _status(run)["state"] == "stopped"
    _reaches(run, int(_status(run)["step"]) + 5)
    (run / "stop").touch()
    assert _ended(number, run)["JobState"] == "COMPLETED"


def test_a_chain_a_failure_and_a_refusal(
    cluster: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "it's a #1 run, 100%"
    jobs = _submit(capsys, run, corpus, options=("--chain", "3", "--job-name", 'a "b" #c', "--env", "X=$HOME 'y'"))
    assert _job(jobs[2])["Dependency"].startswith(f"afterany:{jobs[1]}")
    _reaches(run, 10)
    _call("scancel", "--batch", "--signal=USR1", jobs[0])
    ends = [_ended(number, run) for number in jobs]
    assert [(e["JobState"], e["Restarts"]) for e in ends] == [("COMPLETED", "0")] * 3, _log(run)
    assert [start["job"] for start in _restarts(run)["starts"]] == jobs[:2] and _status(run)["state"] == "finished"
    assert "nothing to do" in (run / f"slurm-{jobs[2]}.log").read_text()

    # The corpus was there when the settings were checked, and is not where the job runs: no restart mends that.
    failed = tmp_path / "failed"
    (number,) = _submit(capsys, failed, tmp_path / "no-corpus")
    job = _ended(number, failed)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0") and job["ExitCode"] != "0:0"
    assert "the run never began" in _log(failed)

    words = ["slurm", "--gpus-per-node", "0", "--processes-per-node", "1", "--partition", "none", "--",
             "experiment=demo", f"run.dir={tmp_path / 'refused'}"]  # fmt: skip
    assert main(words) == 6
    assert capsys.readouterr().err.startswith("error: sbatch refuses: invalid partition specified: none")
