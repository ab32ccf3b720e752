"""Moments that are missing or were started anew are refused; accepted knowingly, once, with the schedule as told."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import CheckpointError, ConfigError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, metrics, small_corpus, tensor_digests, train_in_turn
from train.checkpoint.folder import Manifest, list_checkpoints, read_manifest
from train.settings import load_settings
from train.start import check_moments


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an expansion after which every replica has fresh moments, saved at every step."""
    folder = tmp_path_factory.mktemp("run")
    stage = "{at_step: 3, factor: 2, selection: greedy, scoring_batches: 1, optimizer_rule: reset}"
    base = [*SMALL, f"data.corpus={small_corpus(folder)}", f"run.dir={folder / 'run'}", "run.steps=5",
            "checkpoint.interval_steps=1", "checkpoint.keep_last=null", f"upcycle.stages=[{stage}]",
            "parallel.expert=2", "upcycle.save_after=true"]  # fmt: skip
    run_distributed(train_in_turn, 2, [base])
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Settings of a small run with a falling learning rate, and the checkpoint of its fourth step."""
    folder = tmp_path_factory.mktemp("plain")
    base = [*SMALL, f"data.corpus={small_corpus(folder)}", "upcycle.stages=[]", "run.steps=8", "schedule.style=linear",
            "schedule.warmup_steps=2", "schedule.decay_steps=null"]  # fmt: skip
    run_distributed(train_in_turn, 2, [[*base, f"run.dir={folder / 'run'}", "run.stop_at_step=4"]])
    return base, folder / "run" / "checkpoints" / "step-00000004"


def test_honest_checkpoints_pass(run: Path) -> None:
    """Those right after an expansion too, where moments that began anew are zero."""
    found = [read_manifest(path) for path in list_checkpoints(run)]
    assert [(m.step, m.stage) for m in found] == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1), (5, 1)]
    for manifest in found:
        check_moments(run, manifest)
    assert any(not any(rows) for name, rows in found[3].fingerprints.items() if name.startswith("exp_avg")) or any(
        0 in rows for name, rows in found[3].fingerprints.items() if name.startswith("exp_avg_sq")
    )


def _changed(manifest: Manifest, name: str, rows: list[int] | None) -> Manifest:
    kept = {key: value for key, value in manifest.fingerprints.items() if key != name}
    return dataclasses.replace(manifest, fingerprints=kept if rows is None else kept | {name: rows})


def _all_moments(manifest: Manifest) -> list[str]:
    return [name for name in manifest.fingerprints if name.startswith("exp_avg")]


def test_every_moment_that_lacks_or_is_zero_is_named(run: Path) -> None:
    """Each one of them, before and after the expansion."""
    paths = list_checkpoints(run)
    for path in (paths[1], paths[-1]):
        manifest = read_manifest(path)
        parameters = {name.split("/", 1)[1] for name in _all_moments(manifest)}
        assert len(_all_moments(manifest)) == 2 * len(parameters) > 20
        for name in _all_moments(manifest):
            with pytest.raises(CheckpointError, match=f"has no {name}: .*checkpoint.load=model_only"):
                check_moments(path, _changed(manifest, name, None))
            zero = [0] * len(manifest.fingerprints[name])
            with pytest.raises(
                CheckpointError, match=f"optimizer steps, but {name} is zero: .*checkpoint.load=model_only"
            ):
                check_moments(path, _changed(manifest, name, zero))


def test_a_single_expert_without_moments_is_no_fault(run: Path) -> None:
    manifest = read_manifest(list_checkpoints(run)[-1])
    name = next(name for name, rows in manifest.fingerprints.items() if name.startswith("exp_avg_sq") and len(rows) > 1)
    check_moments(run, _changed(manifest, name, [0, *manifest.fingerprints[name][1:]]))


def _rates(run_dir: Path) -> list[float]:
    found = metrics(run_dir)
    return [found[step]["learning_rate"] for step in sorted(found)]


def test_the_schedule_goes_on_unless_told_to_begin_anew(plain: tuple[list[str], Path], tmp_path: Path) -> None:
    base, source = plain
    start = [*base, f"run.resume={source}", "checkpoint.load=model_only"]
    anew = [*start, f"run.dir={tmp_path / 'anew'}", "checkpoint.reset_schedule=true"]
    runs = [
        [*start, f"run.dir={tmp_path / 'on'}"],
        # The same command again after an interruption, which must not begin anew once more.
        [*anew, "run.stop_at_step=6"],
        anew,
        [*start, f"run.dir={tmp_path / 'whole'}", "checkpoint.reset_schedule=true"],
    ]
    run_distributed(train_in_turn, 2, runs)
    whole = _rates(source.parents[1])
    on, anew_rates = _rates(tmp_path / "on"), _rates(tmp_path / "anew")
    # A warm-up of two steps, then linearly down to the end: of all 8 steps, or of the 4 that are left.
    assert whole == on[:0] + whole and len(on) == len(anew_rates) == 4
    peak = load_settings([*base, "run.dir=x"]).schedule.learning_rate
    assert anew_rates[0] == 0.0 and anew_rates[1] == pytest.approx(peak / 2) and anew_rates[2] == pytest.approx(peak)
    assert on[0] < peak and on == sorted(on, reverse=True)
    ends = [list_checkpoints(tmp_path / name)[-1] for name in ("anew", "whole")]
    assert tensor_digests(ends[0]) == tensor_digests(ends[1])
    first, last = (read_manifest(list_checkpoints(tmp_path / "anew")[i]) for i in (0, -1))
    assert (first.optimizer_step, last.optimizer_step) == (2, 4)
    assert last.model_only == str(source) and last.schedule_begins == 4


def _refused(overrides: list[Any]) -> None:
    run_distributed(train_in_turn, 1, [overrides])


def test_a_schedule_that_does_not_fit_the_rest_is_refused(plain: tuple[list[str], Path], tmp_path: Path) -> None:
    base, source = plain
    anew = [*base, f"run.dir={tmp_path / 'run'}", f"run.resume={source}", "checkpoint.reset_schedule=true"]
    with pytest.raises(ConfigError, match=r"warmup_steps=5 must be below run\.steps=8 - 4"):
        _refused([*anew, "checkpoint.load=model_only", "schedule.warmup_steps=5"])
    with pytest.raises(ConfigError, match=r"checkpoint\.reset_schedule=true needs checkpoint\.load=model_only"):
        _refused(anew)
