"""`python -m launch preflight`: what it finds on one machine, between ranks, and when a rank is missing."""

import contextlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import checks, preflight
from launch.__main__ import main
from launch.checks import Check, Gpus, RankFacts
from launch.preflight import exit_code
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, small_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _words(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.corpus={corpus}", f"run.dir={run_dir}", *more]


def _found(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, dict[str, Check]]:
    code = main(["preflight", "--json", *words])
    return code, {c["name"]: Check(**c) for c in json.loads(capsys.readouterr().out)["checks"]}


def test_a_machine_that_is_ready(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _words(corpus, tmp_path / "run", "parallel.expert=2")
    assert main(["preflight", "--processes", "2", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("0 problems")
    assert all(line.split()[0] in checks.STATES for line in lines[:-1])
    assert any("settings: valid for 2 processes" in line for line in lines)
    # It leaves nothing behind.
    assert list(tmp_path.iterdir()) == []


def test_problems_of_files_and_settings_are_told_together(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = _found(capsys, _words(tmp_path / "nowhere", tmp_path / "run"))
    assert code == 1 and "there is no corpus" in found["corpus"].text and "space" not in found
    code, found = _found(capsys, _words(corpus, tmp_path, "parallel.expert=3"))
    assert code == 1 and found["settings"].state == "problem" and "parallel.expert=3" in found["settings"].text
    tmp_path.chmod(tmp_path.stat().st_mode | stat.S_IWOTH)
    code, found = _found(capsys, _words(corpus, tmp_path))
    assert code == 1 and "everybody may write" in found["run.dir"].text
    tmp_path.chmod(0o700)

    def full(path: str | Path) -> Any:
        return shutil._ntuple_diskusage(100, 100, 0)

    def readonly(source: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shutil, "disk_usage", full)
    monkeypatch.setattr(Path, "replace", readonly)
    code, found = _found(capsys, _words(corpus, tmp_path))
    assert code == 1 and "Read-only file system" in found["run.dir"].text
    assert found["space"].state == "problem" and "0 B free" in found["space"].text
    assert list(tmp_path.iterdir()) == []


def test_gpus_and_packages_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = checks.check_gpus(Gpus(("H100", "H100"), (80 << 30, 80 << 30), "570"), 2)
    assert one.state == "ok" and "2 x H100, 80.00 GiB" in one.text and "driver 570" in one.text
    (mixed, many) = checks.check_gpus(Gpus(("H100", "A100"), (80 << 30, 40 << 30)), 8)
    assert mixed.state == "warning" and many.state == "problem" and "8 processes on this node and 2 GPUs" in many.text
    (unused,) = checks.check_gpus(Gpus(driver="570", unused=True), None)
    assert unused.state == "problem"
    (missing, *_) = checks.check_versions({"python": "3.11"}, has_gpu=False)
    assert missing.state == "problem" and "torch and megatron-core" in missing.text
    assert any(
        c.state == "warning" for c in checks.check_versions({"torch": "2", "megatron-core": "0", "python": "3"}, True)
    )
    monkeypatch.setattr(checks, "compile_obstacle", lambda: "there is no C compiler")
    (triton,) = [c for c in checks.check_versions({"torch": "2"}, True) if c.name == "triton"]
    assert triton.state == "warning" and "there is no C compiler" in triton.text
    assert not any(c.name == "triton" for c in checks.check_versions({"torch": "2"}, False))
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "not NVIDIA's" in checks._apex().text


def test_a_clock_of_another_century_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [c.state for c in checks.check_clock()] == ["ok"]
    monkeypatch.setattr(time, "gmtime", lambda *a: time.struct_time((1970, 1, 1, 0, 0, 0, 3, 1, 0)))
    assert [c.state for c in checks.check_clock()] == ["problem"]


def test_ranks_that_differ_are_named() -> None:
    fact = RankFacts("a", {"torch": "2.13.0"}, ("H100",), 100.0, (Check("corpus", "ok", "1"),))
    other = replace(fact, host="b", versions={"torch": "2.12.0"}, gpus=("A100",), seconds=105.0,
                    checks=(Check("corpus", "problem", "gone"),))  # fmt: skip
    found = {c.name: c for c in checks.compare_ranks([fact, fact, other])}
    assert "rank 2 (b) has torch 2.12.0, rank 0 2.13.0" in found["same versions"].text
    assert found["same gpus"].state == "warning"
    assert found["same time"].state == "warning" and "5.00 s apart (a behind b)" in found["same time"].text
    merged = checks.merge_local([fact, fact, other])
    assert [c.state for c in merged] == ["ok", "problem"] and merged[1].text == "rank 2 (b): gone"
    assert exit_code(merged) == 1 and exit_code(merged[:1]) == 0


@contextlib.contextmanager
def _faults(fault: str) -> Iterator[None]:
    """What goes wrong on rank 1 of this process's job."""
    installed, text = preflight.installed, Path.read_text
    if os.environ["RANK"] == "1" and fault == "version":
        preflight.installed = lambda packages: {**installed(packages), "torch": "2.0.0"}
    if os.environ["RANK"] == "1" and fault == "files":
        checks._VISIBLE_SECONDS = 0.3

        def blind(path: Path, *a: Any, **k: Any) -> str:
            if path.name.startswith(".preflight"):
                raise FileNotFoundError(2, "not there", str(path))
            return text(path, *a, **k)

        Path.read_text = blind  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        preflight.installed, Path.read_text = installed, text  # type: ignore[method-assign]


def _together(words: list[str], faults: list[str]) -> list[tuple[int, str]]:
    """Preflight on this rank, once per fault, with a rendezvous of its own each time."""
    results = []
    for number, fault in enumerate(faults):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + bool(number))
        out = io.StringIO()
        with contextlib.redirect_stdout(out), _faults(fault):
            results.append((main(["preflight", "--timeout-seconds", "60", *words]), out.getvalue()))
    return results


def test_two_ranks_agree_or_say_what_differs(corpus: Path, tmp_path: Path) -> None:
    words = _words(corpus, tmp_path, "parallel.expert=2")
    first, second = run_distributed(_together, 2, words, ["none", "version", "files"], init=False)
    assert [text for _, text in second] == ["", "", ""], "only rank 0 speaks"
    assert [code for code, _ in first] == [code for code, _ in second] == [0, 1, 1]
    fine, version, files = (text for _, text in first)
    assert "ranks: all 2 answered, on 1 node" in fine and "gloo groups formed" in fine and "shared files: every" in fine
    assert "problem  same versions: rank 1" in version and "has torch 2.0.0" in version
    assert "problem  shared files: rank 1" in files and "does not see what rank 0 writes" in files
    assert list(tmp_path.iterdir()) == []


def test_a_missing_rank_ends_it_with_one_line(corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
    command = [sys.executable, "-m", "launch", "preflight", "--timeout-seconds", "3", *_words(corpus, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert done.returncode == 6, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "rank 0" in told[0] and "2" in told[0], done.stderr
    assert "Traceback" not in done.stderr


def test_processes_and_the_launcher_must_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["preflight", "--processes", "2"]) == 2
    assert "--processes=2 and WORLD_SIZE=4 differ" in capsys.readouterr().err
