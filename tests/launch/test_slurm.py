"""`python -m launch slurm`: the script it writes, what it refuses, and when a job goes back into the queue.

No SLURM needed: scripts run against stand-ins for its commands. A real one: `test_slurm_real.py`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import train.signals
from launch.__main__ import main
from launch.requeue import STOP_FILE, Decision, Outcome, Restarts, begin, decide, end
from launch.slurm import add_arguments, plan_job, time_limit_seconds
from launch.slurm_script import render
from parallel.errors import CoppiceError, LaunchError
from train.status import write_status

_RUN = ["experiment=demo", "parallel.expert=2"]
_CPU = ["--gpus-per-node", "0", "--processes-per-node", "2"]
_NASTY = [
    "upcycle.stages=[{at_step: 3, factor: 2, selection: greedy}]",
    "tracking.name='it\\'s $HOME `id` \"x\" \\\\ #1;&|*?'",
]


def _script(tmp_path: Path, *words: str) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return render(plan_job(parser.parse_args(list(words)), tmp_path))


def _accepted(script: str) -> None:
    """Bash can read it; shellcheck, where there is one, finds nothing to warn of."""
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "-S", "warning", "-"], input=script, text=True, capture_output=True)
        assert found.stdout == ""


def test_a_script_for_gpus_reads_like_one_written_by_hand(tmp_path: Path) -> None:
    script = _script(
        tmp_path, "--nodes", "2", "--gpus-per-node", "8", "--time", "1-12", "--partition", "batch", "--account", "me",
        "--qos", "high", "--mem", "500G", "--network-interface", "ib0", "--env", "NCCL_DEBUG=INFO", "--grace", "120",
        "--sbatch-option", "constraint=h100", "--sbatch-option=--exclusive", "--",
        "model=paper_1b", "data=long", "data.corpus=data/mine", "parallel.expert=8", "run.dir=runs/grow", _NASTY[0],
    )  # fmt: skip
    _accepted(script)
    for line in (
        "#SBATCH --job-name=grow", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=32", "#SBATCH --time=1-12", "#SBATCH --partition=batch", "#SBATCH --account=me",
        "#SBATCH --qos=high", "#SBATCH --mem=500G", "#SBATCH --constraint=h100", "#SBATCH --exclusive", "#SBATCH --requeue",
        "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120", f"#SBATCH --chdir={tmp_path}",
        f"#SBATCH --output={tmp_path}/runs/grow/slurm-%j.log", "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0", "export NCCL_DEBUG=INFO",
        'export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"', f"run_dir={tmp_path}/runs/grow",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"    {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=8 \\",
        "    data.corpus=data/mine \\", f"    '{_NASTY[0]}' &",
    ):  # fmt: skip
        assert line in script.splitlines(), line
    assert "container" not in script


def test_scripts_for_cpu_containers_and_chains(tmp_path: Path) -> None:
    script = _script(tmp_path, *_CPU, "--port", "29500", "--rendezvous-host", "10.0.0.1", "--", *_RUN)
    _accepted(script)
    assert "--gpus-per-node" not in script and "--cpus-per-task=2" in script and "endpoint=10.0.0.1:29500" in script
    script = _script(tmp_path, *_CPU, "--container", "nvcr.io#nvidia/pytorch:25.09-py3", "--container-mount", "/data:/data",
                     "--chain", "3", "--", *_RUN, "run.dir=/scratch/my run")  # fmt: skip
    _accepted(script)
    root = Path(__file__).resolve().parents[2]
    assert f"'--container-mounts=/data:/data,{'PLACE'}'".replace("PLACE", ",".join(
        f"{p}:{p}" for p in sorted((tmp_path, root, Path("/scratch/my run"))))) in script  # fmt: skip
    assert "'--container-image=nvcr.io#nvidia/pytorch:25.09-py3'" in script
    assert '--wait=300 "${container[@]}" \\\n    python -m torch.distributed.run' in script
    assert "#SBATCH --no-requeue" in script and "scontrol requeue" not in script
    assert '#SBATCH "--output=/scratch/my run/slurm-%j.log"' in script


def test_overrides_reach_the_run_as_they_were_given(tmp_path: Path) -> None:
    cluster = _Cluster(tmp_path, [*_RUN, *_NASTY], "--env", "GIVEN=a 'b' $HOME", "--job-name", 'a "b" #c')
    cluster.run("finished 0")
    words = json.loads((tmp_path / "words.json").read_text())
    assert words[words.index("train") + 1 :] == [*_RUN, *_NASTY, f"run.dir={cluster.run_dir}"]
    assert json.loads((tmp_path / "environment.json").read_text())["GIVEN"] == "a 'b' $HOME"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "0", *_CPU], "--nodes=0 must be 1 or more"),
        ([], "--gpus-per-node is not given"),
        (["--gpus-per-node", "0"], "give --processes-per-node"),
        (["--gpus-per-node", "2", "--processes-per-node", "4"], "is more than --gpus-per-node=2"),
        ([*_CPU, "--time", "soon"], "--time=soon is no time limit"),
        ([*_CPU, "--time", "5", "--grace", "300"], "--grace=300 seconds leave nothing of --time=5"),
        ([*_CPU, "--container", "x", "--venv", ".venv"], "exclude each other"),
        ([*_CPU, "--container-mount", "/a:/b"], "needs --container"),
        ([*_CPU, "--container", "x", "--container-mount", "/a"], "must be SOURCE:TARGET"),
        ([*_CPU, "--venv", "/nowhere"], "/nowhere/bin/python does not exist"),
        ([*_CPU, "--env", "NCCL_DEBUG"], "--env=NCCL_DEBUG must be KEY=VALUE"),
        ([*_CPU, "--env", "A B=1"], "must be KEY=VALUE"),
        ([*_CPU, "--port", "80"], "--port=80 must be 1024 or more"),
        ([*_CPU, "--chain", "0"], "--chain=0 must be 1 or more"),
        ([*_CPU, "--job-name", "a\nb"], "holds a control character"),
        ([*_CPU, "--sbatch-option", "signal=USR2@60"], "is set by --grace"),
        ([*_CPU, "--sbatch-option", "two words"], "must be NAME or NAME=VALUE"),
        ([*_CPU, "--", "run.stps=1"], "unknown key run.stps; did you mean run.steps?"),
        ([*_CPU, "--nodes", "3", "--", "parallel.expert=4"], "parallel.expert=4"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = words if "--" in words else [*words, "--"]
    code = main(["slurm", *words, "experiment=demo", "run.dir=run"])
    out, err = capsys.readouterr()
    assert code in (2, 6) and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert told in err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing_and_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["slurm", *_CPU, "--chain", "2", "--dry-run", "--", *_RUN, "run.dir=run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n") and "--dependency=afterany:PREVIOUS" in out
    assert main(["slurm", *_CPU, "--", *_RUN, "run.dir=run"]) == 6
    assert capsys.readouterr().err.startswith("error: sbatch is not on the PATH")
    assert not list(tmp_path.iterdir())


def test_a_chain_is_submitted_and_a_refusal_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\nn=$(wc -l < {tmp_path}/calls)\n'
        '[ "$n" -le 3 ] && echo "$((40 + n));cluster" && exit\n'
        'echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["slurm", *_CPU, "--chain", "2", "--", *_RUN, f"run.dir={tmp_path / 'run'}"]
    script = tmp_path / "run" / "launch.sbatch"
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("submitted 41 42 (1 node x 2 = 2 ranks); script ")
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {script}", f"--parsable --dependency=afterany:41 {script} 41",
    ]  # fmt: skip
    _accepted(script.read_text())
    assert main(words) == 6
    assert capsys.readouterr().err == (
        "error: sbatch refuses: Batch job submission failed: Job violates accounting/QOS policy; submitted before it: 43 "
        "(scancel ends them)\n"
    )


def test_time_limits_are_read_as_slurm_does() -> None:
    seconds = {"90": 5400, "90:30": 5430, "24:00:00": 86400, "1-12": 129600, "1-0:30": 88200, "2-1:1:1": 176461}
    assert {text: time_limit_seconds(text) for text in seconds} == seconds
    assert time_limit_seconds("UNLIMITED") is None
    for text in ("", "0", "1h", "1:2:3:4", "-5", "1-", "1.5"):
        with pytest.raises(LaunchError, match="--time="):
            time_limit_seconds(text)


def _said(state: str, **more: Any) -> dict[str, Any]:
    return {"state": state, "step": 7, "steps": 9, **more}


_STOPPED = _said("stopped", reason="file /run/stop", exit_code=0)
_LOST = _said("failed", reason="rank 1 is lost", exit_code=6)


@pytest.mark.parametrize(
    ("outcome", "without_progress", "again", "code", "final"),
    [
        (Outcome(_said("finished"), 0), 0, False, 0, True),
        # torchrun's agent fails after a signal, although the run has finished.
        (Outcome(_said("finished"), 1, "USR1"), 0, False, 0, True),
        (Outcome(_STOPPED, 0, "USR1"), 0, True, 0, None),
        (Outcome(_STOPPED, 0, "USR1"), 3, False, 6, True),
        (Outcome(_STOPPED, 0), 0, False, 0, True),
        (Outcome(_said("stopped", reason="stop_at_step"), 0, "USR1"), 0, False, 0, True),
        (Outcome(_said("stopped", reason="SIGTERM"), 143), 0, False, 0, True),
        (Outcome(_said("stopped", reason="SIGTERM"), 143, preempted=True), 0, True, 0, None),
        # SLURM ends the job, whatever the run says; a chain goes on.
        (Outcome(_said("stopped", reason="SIGTERM"), 143, "TERM"), 0, False, 0, False),
        (Outcome(_LOST, 1, "TERM"), 0, False, 6, False),
        (Outcome(_said("running"), 143, "TERM"), 0, False, 143, False),
        (Outcome(_LOST, 1), 2, True, 6, None),
        (Outcome(_LOST, 1), 3, False, 6, True),
        (Outcome(_said("failed", reason="no space", exit_code=4), 1), 0, False, 4, True),
        (Outcome(_said("failed", reason="KeyError", exit_code=1), 1), 0, False, 1, True),
        (Outcome(_said("running"), 137), 1, True, 137, None),
        (Outcome(_said("running"), 137), 3, False, 137, True),
        # Not a word from this start.
        (Outcome(None, 1), 1, False, 1, True),
        (Outcome(None, 137), 1, True, 137, None),
        (Outcome(None, 1, ran_before=True), 1, True, 1, None),
        (Outcome(None, 0), 1, False, 1, True),
    ],
)  # fmt: skip
def test_when_a_run_is_started_again(
    outcome: Outcome, without_progress: int, again: bool, code: int, final: bool | None
) -> None:
    decision = decide(outcome, without_progress, bound=2)
    assert (decision.again, decision.exit_code) == (again, code), decision.why
    assert again or decision.final == final


def _checkpoint(run_dir: Path, name: str) -> None:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "complete.json").touch()


def _start(run_dir: Path, chain: str = "1") -> int | None:
    return begin(run_dir, "1", chain, steps=9, bound=2)


def _end(run_dir: Path, *, code: int = 1, asked: str = "", chain: str = "1") -> Decision:
    return end(run_dir, chain, Outcome(None, code, asked), bound=2)


def test_restarts_without_a_new_checkpoint_are_bounded(tmp_path: Path) -> None:
    for i in range(3):
        assert _start(tmp_path) is None
        write_status(tmp_path, "running", 5 + i, 9)
        assert _end(tmp_path, code=137).again == (i < 2)
    # Given up: the rest of a chain need not try, a new submission may.
    assert _start(tmp_path) == 137
    assert _start(tmp_path, "2") is None
    _checkpoint(tmp_path, "step-00000004")
    write_status(tmp_path, "running", 5, 9)
    assert _end(tmp_path, code=137, chain="2").again
    assert Restarts.read(tmp_path, "2").without_progress == 0
    # Of one step the expanded one is further; one that is not complete counts for nothing.
    for name, expected in (("step-00000004-stage1", 0), ("step-00000009.partial", 1)):
        _start(tmp_path, "2")
        _checkpoint(tmp_path, name)
        write_status(tmp_path, "running", 6, 9, name=name)
        _end(tmp_path, code=137, chain="2")
        assert Restarts.read(tmp_path, "2").without_progress == expected
    assert len(json.loads((tmp_path / "restarts.json").read_text())["starts"]) == 6


def test_starts_that_slurm_ended_count_as_well(tmp_path: Path) -> None:
    # A node that the run takes down with it leaves nobody to decide.
    for _ in range(3):
        assert _start(tmp_path) is None
    assert _start(tmp_path) == LaunchError.exit_code


def test_an_old_word_is_not_taken_for_this_starts(tmp_path: Path) -> None:
    write_status(tmp_path, "stopped", 5, 9, reason="file", exit_code=0)
    _start(tmp_path)
    decision = _end(tmp_path)
    assert decision.again and "before the run went on" in decision.why
    write_status(tmp_path, "finished", 9, 9)
    assert _start(tmp_path) == 0
    # A longer run of the same folder goes on.
    assert begin(tmp_path, "2", "2", steps=20, bound=2) is None


def test_the_question_is_answered_at_once(tmp_path: Path) -> None:
    # A slow file system takes most of a minute to import torch.
    code = "import sys, launch.requeue; sys.exit(bool({'torch', 'hydra'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_our_own_stop_file_is_removed(tmp_path: Path) -> None:
    assert STOP_FILE == train.signals.STOP_FILE
    (tmp_path / "stop").write_text("slurm job 1: USR1\n")
    _start(tmp_path)
    assert not (tmp_path / "stop").exists()
    (tmp_path / "stop").touch()
    _start(tmp_path)
    assert (tmp_path / "stop").exists()
    (tmp_path / "restarts.json").write_text("{")
    with pytest.raises(CoppiceError, match=r"restarts\.json is damaged"):
        _start(tmp_path)


class _Cluster:
    """Runs a script with stand-ins for SLURM's commands; srun is a small run that says what it is told to."""

    _SRUN = """\
import json, os, signal, sys, time
from pathlib import Path
from train.status import write_status
run_dir, here, (state, code) = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["PLAY"].split()
(here / "words.json").write_text(json.dumps(sys.argv[3:]))
(here / "environment.json").write_text(json.dumps(dict(os.environ)))
if state == "waits":
    (here / "ready").touch()
    while not (run_dir / "stop").exists():
        time.sleep(0.02)
    reason = f"file {run_dir / 'stop'}"
    write_status(run_dir, "stopped", 5, 9, reason=reason, exit_code=0)
    (run_dir / "stop").unlink()
elif state != "silent":
    write_status(run_dir, state, 5, 9, reason="as told", exit_code=int(code))
sys.exit(int(code))
"""

    def __init__(self, folder: Path, overrides: list[str], *options: str) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        root = Path(__file__).resolve().parents[2]
        (folder / "play.py").write_text(self._SRUN)
        self._command("srun", f'exec {sys.executable} {folder}/play.py {self.run_dir} {folder} "$@"')
        self._command("scontrol", f'[ "$1" = requeue ] && echo "$2" >> {folder}/requeued; case "$*" in *node*) '
                                  'echo "NodeName=n1 NodeAddr=10.0.0.1 x";; *hostnames*) echo n1;; esac; exit 0')  # fmt: skip
        self._script = _script(folder, *_CPU, *options, "--", *overrides, f"run.dir={self.run_dir}")
        _accepted(self._script)
        self._environment = os.environ | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]",
            "PYTHONPATH": str(root),
        }  # fmt: skip

    def _command(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def start(self, play: str, *words: str) -> "subprocess.Popen[str]":
        (self.folder / "script").write_text(self._script)
        return subprocess.Popen(
            ["bash", str(self.folder / "script"), *words], env=self._environment | {"PLAY": play}, cwd=self.folder,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, play: str, *words: str) -> tuple[int, str]:
        job = self.start(play, *words)
        err = job.communicate(timeout=60)[1]
        return job.returncode, err

    def requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().split()) if path.exists() else 0


def test_the_script_asks_the_run_to_stop_and_requeues_it(tmp_path: Path) -> None:
    cluster = _Cluster(tmp_path, _RUN)
    for number, requeued, told in (
        (signal.SIGUSR1, 1, "before the time limit; starts again"),
        (signal.SIGTERM, 1, "SLURM ends this job"),
        (None, 1, "by request (file"),
    ):
        (tmp_path / "ready").unlink(missing_ok=True)
        job = cluster.start("waits 0")
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if number is None:
            (cluster.run_dir / "stop").touch()
        else:
            job.send_signal(number)
        err = job.communicate(timeout=60)[1]
        assert (job.returncode, cluster.requeued()) == (0, requeued), err
        assert told in err
    words = json.loads((tmp_path / "words.json").read_text())
    assert "--rdzv-endpoint=10.0.0.1:20017" in words and "--rdzv-id=17.0" in words


def test_the_script_ends_with_what_the_run_says(tmp_path: Path) -> None:
    cluster = _Cluster(tmp_path, _RUN)
    code, err = cluster.run("silent 1")
    assert (code, cluster.requeued()) == (1, 0) and "the run never began" in err
    assert cluster.run("failed 6", "18")[0] == 0 and cluster.requeued() == 1
    code, err = cluster.run("failed 4", "18")
    assert (code, cluster.requeued()) == (4, 1) and "failed after step 5: as told" in err
    code, err = cluster.run("failed 6", "18")
    assert code == 4 and "an earlier job ended this chain" in err
