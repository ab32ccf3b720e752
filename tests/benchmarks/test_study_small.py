"""The statistics of the small study, on figures whose answer is known; and the whole of it once, tiny."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "study_small.py"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("study_small", _SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["study_small"] = module
    spec.loader.exec_module(module)
    return module


study = _load()


def test_gap_closure_is_the_papers_ratio() -> None:
    small, large = {1: 2.0, 2: 2.2, 3: 2.1}, {1: 1.9, 2: 2.09, 3: 2.0}
    assert study.gap_closure(small, small, large).pooled == 0.0
    assert study.gap_closure(small, large, large).pooled == pytest.approx(1.0)
    half = {seed: (small[seed] + large[seed]) / 2 for seed in small}
    assert study.gap_closure(small, half, large).pooled == pytest.approx(0.5)
    # Better than mE throughout, and worse than E throughout.
    assert study.gap_closure(small, {s: x - 0.1 for s, x in large.items()}, large).pooled > 1
    assert study.gap_closure(small, {s: x + 0.1 for s, x in small.items()}, large).pooled < 0


@pytest.mark.parametrize(
    ("large", "reason"),
    [
        ({1: 2.1, 2: 2.3, 3: 2.2}, "the larger fixed arm is worse, by 0.1000"),
        ({1: 1.8, 2: 2.39, 3: 2.0}, "may be none"),
    ],
)
def test_a_gap_that_is_none_closes_nothing(large: dict[int, float], reason: str) -> None:
    small = {1: 2.0, 2: 2.2, 3: 2.1}
    closure = study.gap_closure(small, small, large)
    assert closure.pooled is None and reason in closure.reason


def test_one_seed_tells_nothing_from_noise() -> None:
    closure = study.gap_closure({1: 2.0}, {1: 1.9}, {1: 1.8})
    assert closure.pooled is None and "one seed" in closure.reason
    assert study.differs({1: 2.0}, {1: 1.9}) == "+0.1000 (one seed)"
    assert study.differs({1: 2.0, 2: 2.0}, {1: 1.9, 2: 2.1}).endswith("within noise")
    assert "noise" not in study.differs({1: 2.0, 2: 2.01}, {1: 1.5, 2: 1.5})


def test_the_table_tells_what_did_not_recover() -> None:
    scale = study.Scale()
    results: dict[str, dict[int, dict[str, Any]]] = {
        arm.name: {
            seed: {"final": 2.0 - 0.1 * (arm.experts > 8) - 0.05 * (arm.stage is not None) + 0.01 * seed}
            | ({"jump": 0.1, "recovery_steps": 50 if seed == 1 else None} if arm.stage else {})
            for seed in (1, 2)
        }
        for arm in study.arms(scale)
    }
    text = "\n".join(study.table(results, scale))
    assert (
        "| plain uniform | 1.9650 +- 0.0071 | -0.0500 +- 0.0000 | +0.1000 +- 0.0000 | not within the run in 1 | 50% (50%, 50%) |"
        in text
    )
    assert "2 seeds" in text and text.count("within noise") == 6


@pytest.mark.slow
def test_the_whole_study_once(tmp_path: Path) -> None:
    command = [sys.executable, str(_SCRIPT), "--quick", "--seeds", "1", "--folder", str(tmp_path / "runs"),
               "--output", str(tmp_path / "out.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "9 of 9 runs" in done.stdout and "undefined" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["results"]) == 9 and abs(found["results"]["exact utility"]["1"]["jump"]) < 1e-4
    # A rerun trains nothing.
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and json.loads((tmp_path / "out.json").read_text())["results"] == found["results"]
