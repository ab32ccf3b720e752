"""`make gpu-check` on CPU with tiny shapes: every section's code runs, its checks hold, failures are told."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu_check
from benchmarks.gpu import DEADLINE, SECTIONS, WHOLE
from tests.simulated_gpu.launch import environment
from tests.simulated_gpu.library import can_compile

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = _ROOT / "benchmarks" / "gpu_check.py"


def _check(
    tmp_path: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments, "--output", str(output)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done, json.loads(output.read_text()) if output.exists() else {}


def _rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for section in result["sections"].values() for row in section["rows"]}


def test_the_quick_sections_run_and_are_written_down(tmp_path: Path) -> None:
    done, result = _check(tmp_path, "--small", "--sections", "machine,experts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(result["sections"]) == {"machine", "experts"}
    assert all(result[key] for key in ("card", "cards", "versions"))
    told = result["sections"]["machine"]
    assert all(told[key] for key in ("commit", "date", "command", "seconds"))
    rows = _rows(result)
    assert rows["ceiling of a bf16 product"]["value"] > 0
    assert rows["grouped product against fp32, relative error"]["met"] is True
    table = gpu_check.as_table(result)
    assert "| machine: ceiling of a bf16 product |" in table and told["commit"] in table and told["date"] in table


def test_sections_measured_alone_leave_the_others_as_they_were(tmp_path: Path) -> None:
    one = {"rows": [], "seconds": 1.0}
    output, here = tmp_path / "result.json", {"card": "H", "cards": 1, "versions": {"torch": "2"}, "small": False}
    assert gpu_check.earlier(output, here) == {}
    output.write_text(json.dumps(here | {"sections": {"machine": one, "of another version": one}}))
    assert gpu_check.earlier(output, here) == {"machine": one}
    with pytest.raises(ValueError, match=r"result\.json is of card H, and this is A: name another --output"):
        gpu_check.earlier(output, here | {"card": "A"})


@pytest.mark.slow
def test_all_sections_run(tmp_path: Path) -> None:
    done, result = _check(tmp_path, "--small", "--commit", "abc123")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {section["commit"] for section in result["sections"].values()} == {"abc123"}
    rows = [row for section in result["sections"].values() for row in section["rows"]]
    assert len(rows) > 25 and all(row["met"] for row in rows if row["check"])
    assert set(SECTIONS) - set(result["sections"]) == {"several"}


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="needs g++ and a torch without CUDA")
def test_all_sections_but_faults_run_on_simulated_gpus(tmp_path: Path) -> None:
    # What `faults` fills is the memory of a whole card.
    names = ",".join(name for name in SECTIONS if name != "faults")
    done, result = _check(tmp_path, "--small", "--sections", names, **environment(gpus=2))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(result)
    assert result["card"].startswith("NVIDIA") and rows["cards"]["value"] == 2
    assert rows["state after the live switch and after the checkpoint path, EP 1 to 2"]["value"] == "equal"
    assert rows["largest that fits: peak memory at the switch"]["value"] > 0


@pytest.mark.slow
def test_two_processes_grow_ep_bit_for_bit(tmp_path: Path) -> None:
    done, result = _check(tmp_path, "--small", "--sections", "several", "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(result)
    assert rows["state after the live switch and after the checkpoint path, EP 1 to 2"]["value"] == "equal"
    assert rows["beside the checkpoint path, EP 1 to 2: moved between GPUs"]["value"] > 0
    assert rows["EP 2, alltoall, overlap: step"]["value"] > 0


def test_no_gpu_and_unknown_sections_are_refused(tmp_path: Path) -> None:
    done, result = _check(tmp_path)
    assert done.returncode == 2 and "--small" in done.stderr and not result
    done, result = _check(tmp_path, "--small", "--sections", "nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr and not result


def test_a_section_that_hangs_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "hangs.py"
    # Without torch, which takes as long to import as the section has.
    script.write_text(
        f"import os, time\nleft = float(os.environ['{DEADLINE}']) - time.monotonic()\n"
        "print('ROW ' + '{\"name\": \"a\", \"value\": %f}' % left, flush=True)\nprint('at work', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    seen: list[int] = []
    found = gpu_check.run_section("machine", True, 1.5, 1, lambda found: seen.append(len(found["rows"])))
    assert seen == [1] and 0 < found["rows"][0]["value"] < 1.5
    assert found["error"] == "stopped after 2 s" and "at work" in found["output"] and found["seconds"] < 20


def test_what_a_section_leaves_behind_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As torchrun's ranks: in a session of its own, with the pipe of the section, which would be listened to until it ends.
    script = tmp_path / "leaves.py"
    script.write_text(
        "import subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        'print(\'ROW \' + \'{"name": "pid", "value": %d}\' % left.pid, flush=True)\n'
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    found = gpu_check.run_section("machine", True, 50, 1, lambda found: None)
    assert found["seconds"] < 20 and "error" not in found
    # Gone, or ended though nobody has asked yet how.
    with contextlib.suppress(psutil.Error):
        assert not psutil.Process(found["rows"][0]["value"]).environ()


def test_a_section_has_what_those_before_it_left_over() -> None:
    names = [name for name, section in SECTIONS.items() if not section.many]
    # Nothing is left over at the beginning; what a quick first one left, the second has.
    spare = WHOLE - sum(SECTIONS[name].seconds for name in names)
    assert gpu_check.seconds_for("machine", names, 1, WHOLE) == SECTIONS["machine"].seconds + spare
    saved = SECTIONS["machine"].seconds - 10
    assert gpu_check.seconds_for("switch", names, 1, WHOLE - 10) == SECTIONS["switch"].seconds + spare + saved
    assert gpu_check.seconds_for("train", ["train"], 1, WHOLE) == WHOLE
    # Where sections on several GPUs do not fit beside all others, each has its own until nothing is left.
    assert gpu_check.seconds_for("machine", list(SECTIONS), 8, WHOLE) == SECTIONS["machine"].seconds
    assert gpu_check.seconds_for("faults", list(SECTIONS), 8, 12.0) == 12.0


def test_every_section_can_be_imported() -> None:
    # Those of a GPU too, which no other fast test runs.
    assert all(callable(section.load()) for section in SECTIONS.values())


def test_sections_of_one_gpu_fit_into_eight_minutes() -> None:
    assert sum(section.seconds for section in SECTIONS.values() if not section.many) <= WHOLE < 480


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # A Python whose torch is there and nothing else: the standard library and an empty package.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PYTHONPATH" exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    copy = tmp_path / "benchmarks" / "gpu_setup.sh"
    copy.parent.mkdir()
    copy.write_text((_ROOT / "benchmarks" / "gpu_setup.sh").read_text())
    done = subprocess.run(["sh", str(copy), str(python)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "hydra-core" in done.stderr and "gpu-bundle" in done.stderr


@pytest.mark.slow
def test_a_transformer_engine_that_does_not_run_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "gpu_setup.sh"
    script.write_text((_ROOT / "benchmarks" / "gpu_setup.sh").read_text())
    package, bundle = tmp_path / "transformer_engine", tmp_path / "gpu-bundle"
    package.mkdir()
    bundle.mkdir()
    (package / "__init__.py").write_text("raise OSError('built for another CUDA')\n")
    with tarfile.open(bundle / "te_all.tar.xz", "w:xz") as archive:
        archive.add(package, "transformer_engine")
    # Every run would be refused with it; and it is not tried again here.
    for said in ("does not run here (OSError: built for another CUDA): put aside", ""):
        done = subprocess.run(["sh", str(script), sys.executable], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and said in done.stderr and bool(done.stderr) == bool(said), done.stderr
        assert not (bundle / "site" / "transformer_engine").exists()
    assert len(list(bundle.glob("unusable-*/transformer_engine"))) == 1
