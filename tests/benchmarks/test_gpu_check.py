"""`make gpu-check` on CPU with tiny shapes: every section's code runs, its checks hold, failures are told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


def _check(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments, "--output", str(output)], capture_output=True, text=True, timeout=500
    )
    return done, json.loads(output.read_text()) if output.exists() else {}


def test_the_quick_sections_run_and_are_written_down(tmp_path: Path) -> None:
    done, result = _check(tmp_path, "--small", "--only", "machine,experts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(result["sections"]) == {"machine", "experts"} and "command" in result and "date" in result
    rows = {row["name"]: row for section in result["sections"].values() for row in section["rows"]}
    assert rows["ceiling of a bf16 product"]["value"] > 0
    assert rows["grouped product against fp32, relative error"]["met"] is True


@pytest.mark.slow
def test_all_sections_run(tmp_path: Path) -> None:
    done, result = _check(tmp_path, "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for section in result["sections"].values() for row in section["rows"]]
    assert len(rows) > 25 and all(row["met"] for row in rows if row["check"])


def test_no_gpu_and_unknown_sections_are_refused(tmp_path: Path) -> None:
    done, result = _check(tmp_path)
    assert done.returncode == 2 and "--small" in done.stderr and not result
    done, result = _check(tmp_path, "--small", "--only", "nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr and not result
