"""Sweeps: what a command line expands to, what is refused before anything starts, and what becomes of the points."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.sweep import Ended, Point, expand, plan_sweep, point_name, run_sweep
from parallel.errors import ConfigError, DataError, LaunchError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, small_corpus, train_here
from train.settings import write_yaml
from train.status import write_status

_RATES = "schedule.learning_rate=1e-3,3e-3"
_CPU = ["--gpus-per-node", "0", "--processes-per-node", "2"]


def test_values_are_expanded_as_hydra_does_and_the_rest_is_left_as_it_was_given() -> None:
    common, swept = expand([
        "experiment=demo", "run.seed=range(1,3)", "schedule=glob(*s*)",
        "upcycle.stages=[{at_step: 3, factor: 2}],[]", "tracking.name='a,b'",
    ])  # fmt: skip
    assert common == ["experiment=demo", "tracking.name='a,b'"]
    stages = ["upcycle.stages=[{at_step:3,factor:2}]", "upcycle.stages=[]"]
    presets = [f"schedule={name}" for name in ("constant", "cosine", "wsd")]
    assert swept == [[f"run.seed={seed}", preset, s] for seed in (1, 2) for preset in presets for s in stages]


def test_names_tell_points_apart_without_letters_that_shells_mind() -> None:
    assert (
        point_name(7, ["schedule.learning_rate=0.0001", "+model.mcore.x=a b/c:d"])
        == "007-learning_rate=0.0001__x=a-b-c-d"
    )
    assert point_name(12, ["model.dropout=0.1", "other.dropout=0"]) == "012-model.dropout=0.1__other.dropout=0"
    assert len(point_name(1, ["upcycle.stages=[" + "{at_step:3}," * 50 + "]"])) <= 100


def test_points_keep_their_numbers_when_a_sweep_is_widened(tmp_path: Path) -> None:
    common = ["experiment=demo", f"run.dir='{tmp_path}/my, sweep'"]
    first = plan_sweep([*common, _RATES], world_size=1)
    assert [p.run_dir for p in first.points] == [
        tmp_path / "my, sweep" / f"{n}-learning_rate={rate}" for n, rate in (("001", 0.001), ("002", 0.003))
    ]  # fmt: skip
    assert not (tmp_path / "my, sweep").exists()
    first.write()
    wider = plan_sweep([*common, "schedule.learning_rate=2e-3,3e-3"], world_size=1)
    assert [p.name for p in wider.points] == ["003-learning_rate=0.002", "002-learning_rate=0.003"]
    wider.write()
    written = json.loads((tmp_path / "my, sweep" / "sweep.json").read_text())
    assert [p["overrides"] for p in written["points"]] == [
        ["schedule.learning_rate=0.001"], ["schedule.learning_rate=0.003"], ["schedule.learning_rate=0.002"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["schedule.learning_rate=1e-4"], "nothing to sweep over"),
        (["schedule.learning_rate=interval(1,2)"], "does not support sweep type"),
        (["run.dir=a,b"], "run.dir is the folder of the whole sweep"),
        (["schedule=glob(nothing*)"], "stands for no value at all"),
        (["run.stps=1,2"], "point 001-stps=1: unknown key run.stps; did you mean run.steps?"),
        (["run.steps=200,-1"], "point 002-steps=-1: run.steps=-1"),
        (["run.steps=200,10"], "point 002-steps=10: schedule.warmup_steps=20 must be below"),
        (["model=tiny,nosuch"], "point 002-model=nosuch: model=nosuch is unknown"),
        (["schedule.learning_rate=[1,2"], "[1,2"),
    ],
)
def test_a_sweep_of_which_a_point_cannot_run_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: str
) -> None:
    words = ["experiment=demo", f"run.dir={tmp_path / 'sweep'}", *overrides]
    for command in (["local", "--processes", "1"], ["slurm", *_CPU]):
        assert main([*command, "-m", "--", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert told in err
    assert not list(tmp_path.iterdir())


def test_data_that_a_later_point_lacks_is_told_before_the_first_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = small_corpus(tmp_path)
    words = [*SMALL, f"run.dir={tmp_path / 'lr'}", f"data.corpus={corpus},{tmp_path / 'none'}"]
    assert main(["local", "--processes", "1", "-m", "--", *words]) == DataError.exit_code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: point 002-corpus=") and "/none" in err and err.count("\n") == 1
    assert not (tmp_path / "lr").exists()
    # The nodes of a job may have it.
    assert main(["slurm", "--dry-run", *_CPU, "-m", "--", *words]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: 1 of 2 points do not find here what they read, first point 002-corpus=")
    assert "# 2 points; " in out


def test_the_folder_of_a_run_is_none_for_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is the folder of a run: choose another for the sweep"):
        plan_sweep(["experiment=demo", f"run.dir={tmp_path}", _RATES], world_size=1)


def test_a_failed_point_holds_up_no_other_and_a_request_to_stop_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=demo", f"run.dir={tmp_path}", "schedule.learning_rate=1e-3,2e-3,3e-3,4e-3"]
    sweep = plan_sweep(words, world_size=1)
    started: list[int] = []

    def start(point: Point) -> Ended:
        started.append(point.number)
        if point.number == 1:
            raise LaunchError("--port=7 cannot be used")
        point.run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(point.settings, point.run_dir / "config.yaml", 0)
        steps = point.settings.run.steps
        # The third is stopped.
        made = steps if point.number != 3 else 7
        write_status(point.run_dir, "finished" if made == steps else "stopped", made, steps)
        return Ended(0, asked=made < steps)

    assert run_sweep(sweep, start) == LaunchError.exit_code
    assert started == [1, 2, 3]
    out, err = capsys.readouterr()
    assert err == "error: --port=7 cannot be used\n"
    assert "point 3 of 4, 003-learning_rate=0.003: stopped on request" in out
    rows = [line.split("  ")[0:2] for line in out.splitlines() if line.startswith("00")]
    assert [row[1].strip() for row in rows] == [
        "failed (exit code 6)", "finished", "stopped", "not started",
    ]  # fmt: skip
    # Again: only what has not finished; and all of it where the points are other runs now.
    started.clear()
    assert run_sweep(sweep, start) == LaunchError.exit_code
    assert started == [1, 3]
    started.clear()
    run_sweep(plan_sweep([*words, "optimizer.beta2=0.9"], world_size=1), start)
    assert started == [1, 2, 3]


def test_a_job_for_every_point_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", *_CPU, "-m", "--", "experiment=demo", "parallel.expert=2", f"run.dir={tmp_path / 'lr'}", _RATES]
    assert main([words[0], "--dry-run", *words[1:]]) == 0
    out = capsys.readouterr().out
    assert "# 2 points; " in out and out.count("#!/bin/bash") == 1 and out.count("# sbatch --parsable") == 2
    assert not list(tmp_path.iterdir())
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\nn=$(wc -l < {tmp_path}/calls)\n'
        '[ "$n" != 4 ] && echo "$((40 + n))" && exit\necho "sbatch: error: no more" >&2; exit 1\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(words) == 0
    scripts = [tmp_path / "lr" / f"00{n}-learning_rate=0.00{v}" / "launch.sbatch" for n, v in ((1, 1), (2, 3))]
    assert (tmp_path / "calls").read_text().splitlines() == [f"--parsable {script}" for script in scripts]
    assert "end them all with scancel 41 42" in capsys.readouterr().out
    for script in scripts:
        text = script.read_text()
        assert f"#SBATCH --job-name={script.parent.name}" in text and f"run_dir={script.parent}" in text
        # Quoted for Hydra, and that for the shell.
        assert f"'run.dir='\"'\"'{script.parent}'\"'\"''" in text
    assert f"schedule.learning_rate={0.003}" in scripts[1].read_text()
    assert main(words) == LaunchError.exit_code
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "error: sbatch refuses: no more; submitted before it: 43 (scancel ends them)"


def _tiny(tmp_path: Path) -> list[str]:
    return [*SMALL, f"data.corpus={small_corpus(tmp_path)}", "upcycle.stages=[]", f"run.dir={tmp_path / 'lr'}",
            "run.steps=2", "schedule.decay_steps=1", "schedule.warmup_steps=0", _RATES]  # fmt: skip


def _two_trained(folder: Path, told: str) -> None:
    """Both points have trained, once, each with its own rate, and the table says so."""
    losses = {}
    for name in ("001-learning_rate=0.001", "002-learning_rate=0.003"):
        (evaluation,), _ = events(folder / name, "evaluation"), events(folder / name, "start")[0]
        losses[name] = evaluation["details"]["valid_loss"]
        assert f"{name}  finished  2/2   {losses[name]:.4f}" in told
    assert len(set(losses.values())) == 2
    assert f"lowest of those that have finished: {min(losses, key=lambda name: losses[name])}" in told


def test_points_train_and_finished_ones_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = plan_sweep(_tiny(tmp_path), world_size=2)

    def start(point: Point) -> Ended:
        run_distributed(train_here, 2, list(point.overrides), init=False)
        return Ended(0, asked=False)

    assert run_sweep(sweep, start) == 0
    _two_trained(tmp_path / "lr", capsys.readouterr().out)
    assert run_sweep(sweep, start) == 0
    out = capsys.readouterr().out
    assert out.count("has finished, passed over") == 2
    _two_trained(tmp_path / "lr", out)
    assert main(["sweep", str(tmp_path / "lr")]) == 0
    _two_trained(tmp_path / "lr", capsys.readouterr().out)


@pytest.mark.slow
def test_the_launcher_trains_one_point_after_another(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["local", "--processes", "2", "-m", "--", *_tiny(tmp_path)]
    assert main(words) == 0
    _two_trained(tmp_path / "lr", capfd.readouterr().out)
    assert main(words) == 0
    out = capfd.readouterr().out
    assert out.count("has finished, passed over") == 2
    _two_trained(tmp_path / "lr", out)


def test_a_sweep_inside_a_job_is_refused_with_the_remedy() -> None:
    command = [sys.executable, "-m", "train", "-m", "model=tiny", _RATES]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == ConfigError.exit_code and ended.stderr.count("\n") == 1
    assert "python -m launch local --processes N -m -- OVERRIDES" in ended.stderr
