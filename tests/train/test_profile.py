"""Profiling: a trace holds exactly the steps asked for, on the ranks asked for, and changes nothing of the run."""

import gzip
import json
import timeit
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, train_in_turn
from train.named import named
from train.settings import load_settings


def _ranges(trace: Path) -> list[str]:
    """Names of the acts in a trace, in the order in which they began."""
    found = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    acts = [e for e in found if e.get("cat") == "user_annotation"]
    return [e["name"] for e in sorted(acts, key=lambda e: e["ts"])]


def test_a_trace_holds_its_steps_and_what_lies_between_and_changes_nothing(tmp_path: Path) -> None:
    common = [*SMALL, f"data.corpus={small_corpus(tmp_path)}", "parallel.expert=2"]
    plain, profiled, blocked = tmp_path / "plain", tmp_path / "profiled", tmp_path / "blocked"
    blocked.mkdir()
    # Where the folder of traces would go there is a file.
    (blocked / "profile").write_text("mine")
    part = "profile.steps=[2,5]"
    run_distributed(train_in_turn, 2, [
        [*common, f"run.dir={plain}"],
        [*common, f"run.dir={profiled}", "profile.steps=[3,4]", "profile.ranks=[1]", "evaluation.interval_steps=3"],
        [*common, f"run.dir={blocked}", part, "profile.ranks=[0,1]", "run.stop_at_step=2"],
        # Stopped in the middle, and gone on with: each part by itself.
        [*common, f"run.dir={tmp_path / 'stopped'}", part, "run.stop_at_step=4"],
        [*common, f"run.dir={tmp_path / 'stopped'}", part],
    ])  # fmt: skip
    told = {step: line["lm_loss"] for step, line in metrics(plain).items()}
    assert {step: line["lm_loss"] for step, line in metrics(profiled).items()} == told
    assert {step: line["grad_norm"] for step, line in metrics(blocked).items()} == {
        step: line["grad_norm"] for step, line in metrics(plain).items() if step <= 2
    }
    assert (blocked / "profile").read_text() == "mine"
    assert not (plain / "profile").exists()
    assert sorted(str(p.relative_to(profiled / "profile")) for p in (profiled / "profile").rglob("*.*")) == [
        "step-3-4/rank-1.trace.json.gz", "step-3-4/rank-1.txt"
    ]  # fmt: skip
    names = _ranges(profiled / "profile" / "step-3-4" / "rank-1.trace.json.gz")
    assert [name for name in names if name.startswith("step ")] == ["step 3", "step 4"]
    assert names.count("data") == names.count("forward_backward") == 2 and names.count("optimizer") == 4
    # Two layers, two exchanges in each, two micro-batches; in two steps and in two batches of scoring.
    assert names.count("all_to_all") == 32
    switch = names.index("the switch")
    assert names.index("step 3") < names.index("evaluation after step 3") < switch < names.index("step 4")
    inside = names[switch : names.index("step 4")]
    for part in ("plan", "describe", "rebuild", "move", "verify"):
        assert f"the switch ({part})" in inside
    assert "scoring for the switch" in inside and "saving after step 3" in inside
    table = (profiled / "profile" / "step-3-4" / "rank-1.txt").read_text()
    assert table.startswith("rank 1, steps 3-4") and "Self CPU" in table and "CPU Mem" in table
    (event,) = events(profiled, "profile")
    assert event["details"] == {"steps": [3, 4], "ranks": [1]}
    stopped = tmp_path / "stopped" / "profile"
    assert sorted(p.name for p in stopped.iterdir()) == ["step-2-4", "step-5-5"]
    assert [n for n in _ranges(stopped / "step-2-4" / "rank-0.trace.json.gz") if n.startswith("step ")] == [
        "step 2", "step 3", "step 4",
    ]  # fmt: skip


def test_a_name_costs_next_to_nothing_while_nobody_profiles() -> None:
    def act() -> None:
        with named("act"):
            pass

    # A busy machine included; a range that is recorded takes longer.
    assert min(timeit.repeat(act, number=1000, repeat=20)) / 1000 < 3e-6


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("profile.steps=[3]", r"profile.steps=\[3\] must be the first and the last step"),
        ("profile.steps=[0,3]", r"profile.steps=\[0, 3\] must be"),
        ("profile.steps=[5,4]", r"profile.steps=\[5, 4\] must be"),
        ("profile.steps=[5,7]", r"profile.steps=\[5, 7\] ends after run.steps=6"),
        ("profile.ranks=[]", r"profile.ranks=\[\] must name ranks"),
        ("profile.ranks=[0,2]", r"there is no rank 2 of 2 processes: use 0 to 1"),
    ],
)
def test_impossible_steps_and_ranks_are_refused(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_settings([*SMALL, "data.corpus=x", "profile.steps=[1,2]", given], world_size=2)
