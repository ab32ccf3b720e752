"""Comparison of runs: equal cost, interpolation, compute, gap closure, what is not comparable, and one drawn page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import ConfigError, DataError
from tests.train.synthetic_run import TOKENS_PER_STEP, make_run
from train.compare.data import COMPUTE, TOKENS, Arm, Reading, compare_runs, training_at, validation_at
from train.compare.html import comparison_page
from train.report.__main__ import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fixed small run, a grown one, and a fixed large one that ends earlier. Nobody changes them."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "small", [(120, 4)], full=True)
    make_run(folder / "grown", [(60, 4), (60, 8)], full=True)
    make_run(folder / "large", [(110, 8)], full=True, level=1.9)
    return folder


def _trio(runs: Path) -> list[Path]:
    return [runs / name for name in ("small", "grown", "large")]


def _losses(arm: Arm) -> dict[int, float]:
    """Validation loss by step, as the events have it; of two at one step the last."""
    return {e.step: e.valid_loss for e in arm.record.evaluations if e.valid_loss is not None}


def test_losses_at_equal_tokens(runs: Path) -> None:
    comparison = compare_runs(_trio(runs))
    small, grown, large = comparison.arms
    tokens = 110 * TOKENS_PER_STEP
    assert comparison.common[TOKENS] == tokens and comparison.doubts == []
    # The shortest run was evaluated at its end; the others lie between their evaluations at 100 and 120 steps.
    assert validation_at(large, TOKENS, tokens) == Reading(_losses(large)[110])
    known = _losses(small)
    reading = validation_at(small, TOKENS, tokens)
    assert reading.loss == pytest.approx((known[100] + known[120]) / 2)
    assert reading.between == (100 * TOKENS_PER_STEP, 120 * TOKENS_PER_STEP)
    # Nothing is extrapolated, on either side.
    assert validation_at(large, TOKENS, tokens + 1) == Reading(None)
    assert validation_at(small, TOKENS, 49 * TOKENS_PER_STEP) == Reading(None)
    # Each side of the switch is held against its own neighbours; at the switch the new model counts.
    (expansion,) = grown.record.expansions
    before, after = expansion.loss_before, expansion.loss_after
    assert before is not None and after is not None
    assert validation_at(grown, TOKENS, 60 * TOKENS_PER_STEP).loss == after
    at_50, at_100 = _losses(grown)[50], _losses(grown)[100]
    assert validation_at(grown, TOKENS, 55 * TOKENS_PER_STEP).loss == pytest.approx((at_50 + before) / 2)
    assert validation_at(grown, TOKENS, 80 * TOKENS_PER_STEP).loss == pytest.approx((after + at_100) / 2)
    # Training: the steps of the last 2 % of the tokens, and none from before a switch.
    losses_S = small.record.columns["lm_loss"]
    assert training_at(small, TOKENS, 100 * TOKENS_PER_STEP) == pytest.approx(losses_S[98:100].mean())
    grown_S = grown.record.columns["lm_loss"]
    assert training_at(grown, TOKENS, 61 * TOKENS_PER_STEP) == pytest.approx(grown_S[60])
    assert training_at(grown, TOKENS, 1.0) is None


def test_compute_is_recorded_or_estimated_alike_for_all(tmp_path: Path, runs: Path) -> None:
    comparison = compare_runs(_trio(runs)[:2])
    assert "step_flops" in comparison.flops_source
    per_step = [6.0 * (1_400_000 + 64 * experts) * TOKENS_PER_STEP for experts in (4, 8)]
    assert comparison.arms[1].costs[COMPUTE][[59, 119]] == pytest.approx([60 * per_step[0], 60 * sum(per_step)])
    assert comparison.common[COMPUTE] == pytest.approx(120 * per_step[0])

    # One run without the metric: all are counted by their active parameters, which here is the same sum.
    make_run(tmp_path / "plain", [(60, 4), (60, 8)])
    estimated = compare_runs([runs / "small", tmp_path / "plain"])
    assert "6 x active parameters" in estimated.flops_source and "plain" in estimated.flops_source
    assert estimated.arms[1].costs[COMPUTE] == pytest.approx(comparison.arms[1].costs[COMPUTE])

    # A run that does not even know its size has no compute, and then nobody is compared by it.
    (tmp_path / "plain" / "events.jsonl").write_text("")
    unknown = compare_runs([runs / "small", tmp_path / "plain"])
    assert "not compared" in unknown.flops_source and COMPUTE not in unknown.common


def test_gap_closure(runs: Path) -> None:
    comparison = compare_runs(_trio(runs))
    (closure,) = comparison.closures
    small, grown, large = (validation_at(a, TOKENS, comparison.common[TOKENS]).loss for a in comparison.arms)
    assert small is not None and grown is not None and large is not None
    assert (closure.small, closure.grown, closure.large) == ("small", "grown", "large")
    assert closure.closed == pytest.approx((small - grown) / (small - large))
    assert 0 < (small - grown) / (small - large) < 1
    # Named in another order, by folder or by label: the larger fixed run is then behind, which closes nothing.
    roles = {"small": "c", "grown": str(runs / "grown"), "large": "a"}
    (swapped,) = compare_runs(_trio(runs), ["a", "b", "c"], roles).closures
    assert swapped.closed is None and "not ahead" in swapped.reason
    # Two fixed runs of one size leave a choice, and no one else makes it.
    assert compare_runs([runs / "grown", runs / "large"]).closures == []


def test_runs_on_other_data_are_told_apart(tmp_path: Path, runs: Path) -> None:
    make_run(tmp_path / "grown", [(60, 4), (50, 8)], corpus="runs/corpus/<b>other")
    comparison = compare_runs([runs / "small", tmp_path / "grown", runs / "large"])
    assert [doubt.split(",")[0] for doubt in comparison.doubts] == ["Corpora differ", "Validation differs"]
    assert "small, large: synthetic; grown: <b>other" in comparison.doubts[0]
    (closure,) = comparison.closures
    assert closure.closed is None and "not of the same tokens" in closure.reason
    text = comparison_page(comparison, [])
    assert 'class="warn"' in text and "<b>" not in text and "&lt;b&gt;other" in text


def test_tokenizers_are_read_from_the_corpora_of_the_runs(tmp_path: Path) -> None:
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        counts = {"documents": 0, "tokens": 0, "bytes": 0}
        manifest = {
            "format": 1,
            "tokenizer": {"spec": f"spec-{name}", "vocab_size": 9, "eod": 0, "digest": digest, "file": None},
            "splits": {"train": counts, "valid": counts},
            "validation_fraction": 0.1,
            "seed": 0,
            "fingerprint": digest,
            "inputs": [],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(manifest))
        make_run(tmp_path / f"run-{name}", [(3, 4)], corpus=str(tmp_path / name))
    doubts = compare_runs([tmp_path / "run-a", tmp_path / "run-b"]).doubts
    assert doubts[0].startswith("Tokenizers differ") and "run-a: spec-a, digest 11111111" in doubts[0]


def test_a_run_from_the_checkpoint_of_another(tmp_path: Path, runs: Path) -> None:
    """It has no steps of its first stage, which still counts for its cost and makes it a grown run."""
    files = make_run(tmp_path / "branch", [(60, 4), (60, 8)], full=True)
    lines = files.metrics.read_text().splitlines(keepends=True)
    files.metrics.write_text("".join(lines[60:]))
    comparison = compare_runs([runs / "small", files.run_dir, runs / "large"])
    branch = comparison.arms[1]
    assert branch.experts == (4, 8) and [closure.grown for closure in comparison.closures] == ["branch"]
    assert branch.costs[TOKENS][0] == 61 * TOKENS_PER_STEP
    assert branch.costs[COMPUTE][0] == pytest.approx(61 * branch.record.columns["step_flops"][0])
    assert branch.cost_at(TOKENS, 60.75) == 60 * TOKENS_PER_STEP
    assert any(doubt.startswith("branch begins at step 61") for doubt in comparison.doubts)


def test_the_page(tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    command = ["compare", *map(str, _trio(runs)), "--labels", "fixed <4>", "grown", "fixed 8", "--output", str(page)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.strip().endswith(f"written: {page}") and "gap closure (fixed <4> / grown / fixed 8" in printed
    text = page.read_text()
    figures = {png.stem for png in (tmp_path / "page").glob("*.png")}
    assert figures == {"loss_at_equal_tokens", "loss_at_equal_compute", "switches"}
    assert text.count("data:image/png;base64,") == 2 * len(figures)
    assert "<script" not in text and "://" not in re.sub(r"base64,[^\"]*", "", text) and "<4>" not in text
    for tag in ("table", "tr", "figure", "div", "dl", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    comparison = compare_runs(_trio(runs))
    reading = validation_at(comparison.arms[0], TOKENS, comparison.common[TOKENS])
    assert f"~{reading.loss:.4f}" in text and "fixed &lt;4&gt;" in text


WRONG = [
    (["small"], ConfigError, "1 runs: name 2 to 8"),
    (["small"] * 9, ConfigError, "9 runs: name 2 to 8"),
    (["small", "small"], ConfigError, "names two of the runs"),
    (["small", "grown", "--labels", "a"], ConfigError, "--labels has 1 names for 2 runs"),
    (["small", "grown", "--labels", "a", "a"], ConfigError, "'a' names two of the runs"),
    (["small", "grown", "--small", "small"], ConfigError, "add --grown"),
    (["small", "grown", "--small", "x", "--grown", "y", "--large", "z"], ConfigError, "--small x: not among the runs"),
    (["small", "grown", "--small", "small", "--grown", "grown", "--large", "grown"], ConfigError, "three different"),
    (["small", "none"], DataError, "no such directory"),
    (["small", "grown", "--output", "none/page.html"], DataError, "does not exist"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_arguments_are_one_typed_line(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    kind: type[ConfigError],
    message: str,
) -> None:
    monkeypatch.chdir(runs)
    assert main(["compare", *arguments]) == kind.exit_code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out and not Path("comparison.html").exists()


def test_steps_without_tokens_cannot_be_compared(tmp_path: Path, runs: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8}\n{"step": 2, "tokens": null}\n')
    with pytest.raises(DataError, match="rising token count"):
        compare_runs([runs / "small", tmp_path])
    assert np.isfinite(compare_runs(_trio(runs)).arms[0].costs[TOKENS]).all()
