"""What Triton needs to compile kernels."""

from pathlib import Path

import pytest

from parallel import compiler


def test_what_keeps_triton_from_compiling_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = {"triton": True, "gcc": True}
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: object() if there["triton"] else None)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if there["gcc"] and name == "gcc" else None)
    monkeypatch.setattr(compiler.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    assert f"Python's headers are not installed ({tmp_path / 'Python.h'})" == compiler.compile_obstacle()
    (tmp_path / "Python.h").touch()
    assert compiler.compile_obstacle() is None
    there["gcc"] = False
    assert "no C compiler" in (compiler.compile_obstacle() or "")
    monkeypatch.setenv("CC", "icc")
    assert compiler.compile_obstacle() is None
    there["triton"] = False
    assert compiler.compile_obstacle() == "Triton is not installed"
