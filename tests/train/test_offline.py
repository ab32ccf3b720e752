"""`python -m upcycle`: plans and expansions outside of the job are those of the job; what cannot be is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.trainer import SMALL, metrics, small_corpus, tensor_digests, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.offline.upcycle_command import main
from upcycle.plan import ExpansionPlan

_RULES = (
    "selection: greedy, scoring_batches: 2, optimizer_rule: reset, replica_lr_multiplier: 0.5, lr_multiplier_steps: 4"
)
_FLAGS = ["--factor", "2", "--selection", "greedy", "--scoring-batches", "2", "--optimizer-rule", "reset",
          "--replica-lr-multiplier", "0.5", "--lr-multiplier-steps", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", *more]


@pytest.fixture(scope="module")
def job(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that expands after step 3 and saves both sides."""
    run_dir = tmp_path_factory.mktemp("job") / "run"
    stages = f"upcycle.stages=[{{at_step: 3, factor: 2, {_RULES}}}]"
    run_distributed(train_in_turn, 2, [_run(corpus, run_dir, stages, "upcycle.save_after=true")], timeout=300)
    return run_dir


def _json(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _plan_under_torchrun(words: list[str]) -> int:
    return main(words)


def test_the_plan_of_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "experiment=demo", "model=tiny", "--factor", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "expansion after step 1: 8 -> 24 experts" and lines[1] == "  layer 1: 8 x r=3"
    plan = ExpansionPlan.from_dict(_json(["plan", "experiment=demo", "model=tiny", "--factor", "3"], capsys))
    assert lines[-1] == f"digest {plan.digest}"
    # All stages of the configuration, on the processes that its layout needs.
    stages = "upcycle.stages=[{at_step: 2, factor: 3}, {at_tokens: 9000, factor: 2, parallel: {expert: 4}}]"
    first, second = _json(
        ["plan", "model=tiny", "parallel.expert=2", "model.num_experts=2", "data.micro_batch_size=2", stages], capsys
    )
    assert [first["experts_after"], second["experts_after"]] == [6, 12]
    assert second["placement"]["ep_ranks_after"] == 4

    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"1": [1, 5, 1, 1, 1, 1, 1, 1], "2": [0, 0, 0, 0, 0, 0, 0, 7]}))
    greedy = ["plan", "experiment=demo", "model=tiny", "--num-experts", "10", "--selection", "greedy"]
    plan = ExpansionPlan.from_dict(_json([*greedy, "--scores", str(scores)], capsys))
    assert [layer.copies.index(3) for layer in plan.layers] == [1, 7]
    assert main(greedy) == 5
    assert "name a checkpoint to plan from, give --scores FILE, or use --selection uniform" in capsys.readouterr().err


def test_the_plan_of_a_checkpoint_is_the_jobs(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_job = json.loads((job / "plans" / "step-00000003.json").read_text())
    start = str(job / "checkpoints" / "step-00000003")
    before = sorted(str(p) for p in job.rglob("*"))
    # The layout of the checkpoint: the same plan, bit for bit. Without rules, its own next stage.
    file = tmp_path / "plan.json"
    run_distributed(_plan_under_torchrun, 2, ["plan", start, "--output", str(file)], init=False)
    assert json.loads(file.read_text()) == in_job
    # One process: scores in another order of sums.
    here = _json(["plan", start, *_FLAGS], capsys)
    for layer, theirs in zip(here["layers"], in_job["layers"], strict=True):
        assert (layer["parents"], layer["copies"]) == (theirs["parents"], theirs["copies"])
        assert layer["scores"] == pytest.approx(theirs["scores"], rel=1e-2)
    assert here["placement"] == in_job["placement"]
    assert sorted(str(p) for p in job.rglob("*")) == before
    # A finished run, past its last stage, whose training stream has ended.
    assert main(["plan", str(job), "--num-experts", "20", "--selection", "sampling", "--utility", "saliency"]) == 0
    assert capsys.readouterr().out.startswith("expansion after step 6: 16 -> 20 experts")


def test_expanding_offline_is_the_jobs_expansion(job: Path, corpus: Path, tmp_path: Path) -> None:
    """Every tensor on disk, the manifest, and the training that follows, whichever way the configuration tells it."""
    start, theirs = (job / "checkpoints" / name for name in ("step-00000003", "step-00000003-stage1"))
    output = tmp_path / "grown"
    plan = str(job / "plans" / "step-00000003.json")
    done = subprocess.run(
        [sys.executable, "-m", "upcycle", "expand", str(start), "--output", str(output), "--plan", plan,
         "--replica-lr-multiplier", "0.5", "--lr-multiplier-steps", "4", "--chunk-mib", "1"],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 -> 16 experts" in done.stdout and f"run.resume={output}" in done.stdout
    assert tensor_digests(output) == tensor_digests(theirs)
    mine, other = read_manifest(output), read_manifest(theirs)
    for name in vars(mine):
        # Two ranks wrote the job's files, one process ours: the tensors in them are what is compared above.
        if name not in ("stages", "guard", "files"):
            assert getattr(mine, name) == getattr(other, name), name
    assert (mine.stages[0]["origin"], other.stages[0]["origin"]) == ("offline", "configured")

    listed = [f"upcycle.stages=[{{at_step: 3, factor: 2, {_RULES}}}]", f"run.resume={output}"]
    # The rates of replicas are in the state; only a stage that is still to come needs its rules told.
    larger = ["model.num_experts=16", "upcycle.stages=[]", f"run.resume={output}"]
    runs = [_run(corpus, tmp_path / name, *more) for name, more in (("listed", listed), ("larger", larger))]
    run_distributed(train_in_turn, 2, runs, timeout=300)
    whole, final = metrics(job), read_manifest(list_checkpoints(job)[-1]).fingerprints
    for name in ("listed", "larger"):
        here = metrics(tmp_path / name)
        assert {s: m["lm_loss"] for s, m in here.items()} == {s: whole[s]["lm_loss"] for s in (4, 5, 6)}
        assert read_manifest(list_checkpoints(tmp_path / name)[-1]).fingerprints == final


def test_rules_without_gradients_need_no_model(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-experts", "24", "--selection", "greedy", "--utility", "weight_norm"]
    assert main(["expand", str(job), *flags, "--output", str(tmp_path / "grown")]) == 0
    manifest = read_manifest(tmp_path / "grown")
    assert (manifest.step, manifest.stage, manifest.num_experts) == (6, 2, 24)
    capsys.readouterr()
    assert main(["lineage", str(tmp_path / "grown")]) == 0
    assert "layer 1" in capsys.readouterr().out
    table = _json(["lineage", str(tmp_path / "grown"), "--layer", "2"], capsys)
    assert table
    assert main(["lineage", str(tmp_path / "grown"), "--layer", "9"]) == 5


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--factor", "1"], 2, "the stage.factor=1 must be 2 or more"),
        (["--num-experts", "4"], 2, "the stage.num_experts=4 must be above the 16 experts before it"),
        (["--num-experts", "17", "--selection", "greedy"], 2, "the stage.num_experts=17 is not divisible by parallel.expert=2"),
        (["--factor", "4", "--selection", "greedy", "--max-extra-copies", "1"], 2, "max_extra_copies=1 is too small for 16 -> 64"),
        (["--factor", "2", "--optimizer-rule", "forget"], 2, "optimizer_rule=forget is unknown"),
        (["--factor", "two"], 2, "factor=two must be a whole number or null"),
        ([], 2, "has no stage to come in its configuration: say --factor or --num-experts"),
        (["--parallel", "{expert: 4}"], 2, "the stage.parallel.expert=4 x parallel.expert_tensor=1"),
        (["--factor", "2", "--output", "."], 4, "exists and is not empty: choose another folder"),
        (["--plan", "/nowhere.json"], 5, "--plan /nowhere.json cannot be read"),
        (["--factor", "2", "--chunk-mib", "0"], 2, "--chunk-mib=0 must be 1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    job: Path, tmp_path: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if "--output" in words else ["--output", str(tmp_path / "grown")]
    assert main(["expand", str(job), *output, *words]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_plan_of_another_checkpoint_is_refused(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(job / "plans" / "step-00000003.json")
    assert main(["expand", str(job), "--plan", plan, "--output", str(tmp_path / "grown")]) == 5
    assert "the plan is for step 3, stage 1, 8 experts, and" in capsys.readouterr().err
    assert main(["plan", "/nowhere", "--factor", "2"]) == 4
    assert "/nowhere is neither a complete checkpoint nor a run directory with one" in capsys.readouterr().err
    assert main(["request", str(job), "--factor", "2"]) == 5
    assert "has finished at step 6" in capsys.readouterr().err
    assert main(["request", str(tmp_path), "--factor", "2"]) == 3
    assert "is no run directory" in capsys.readouterr().err


def test_a_model_in_its_release_is_not_expanded(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = "upcycle.stages=[{at_step: 1, factor: 2, mode: exact, release_steps: 9}]"
    run_distributed(train_in_turn, 2, [_run(corpus, tmp_path / "run", stages, "run.steps=3")], timeout=300)
    capsys.readouterr()
    assert main(["expand", str(tmp_path / "run"), "--factor", "2", "--output", str(tmp_path / "grown")]) == 2
    assert "comes before routing over families has ended (step 10)" in capsys.readouterr().err
    assert not (tmp_path / "grown").exists()
