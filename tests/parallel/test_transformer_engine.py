"""Which Transformer Engine a run on GPUs accepts."""

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel import transformer_engine
from parallel.errors import LaunchError
from parallel.transformer_engine import counted_as_one_step, refuse_unusable, supported_versions, version_problem

_NEWEST = "<2.12" if importlib.metadata.version("megatron-core").startswith("0.16") else ""


@pytest.mark.parametrize("version", ["2.9.0", "2.9.0+c188b53", "2.11.0", "2.11.0.dev0+abc"])
def test_versions_of_the_range_are_accepted(version: str) -> None:
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["1.13.0", "2.8.0", *(["2.12.0", "2.20.2"] if _NEWEST else [])])
def test_others_are_refused_with_the_range(version: str) -> None:
    problem = version_problem(version)
    assert problem is not None and f"Transformer Engine {version} is installed" in problem
    assert f"works with >=2.9{',<2.12.0' if _NEWEST else ''}: install one of these, or uninstall it" in problem


def test_the_range_is_that_of_mcore() -> None:
    assert supported_versions().contains("2.20.2") == (not _NEWEST)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `transformer_engine` of version 2.10.0 on the path, whose PyTorch part the test writes."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    info = tmp_path / "transformer_engine-2.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.10.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_a_build_for_another_torch_is_refused(installed: Path) -> None:
    (installed / "pytorch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    with pytest.raises(LaunchError, match=r"cannot be used \(ImportError: undefined symbol: _ZN3c10\): build it for"):
        refuse_unusable()


def test_one_that_imports_is_accepted(installed: Path) -> None:
    (installed / "pytorch.py").touch()
    refuse_unusable()


def test_a_wrong_version_is_refused_before_it_is_imported(installed: Path) -> None:
    (installed / "pytorch.py").write_text("raise SystemExit('imported')\n")
    info = installed.parent / "transformer_engine-2.10.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.3.0\n")
    with pytest.raises(LaunchError, match=r"Transformer Engine 2\.3\.0 is installed, and megatron-core"):
        refuse_unusable()


def test_its_absence_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: None)
    refuse_unusable()


def test_a_run_on_gpus_asks_before_mcore_is_imported(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.compat import prepare_megatron

    (installed / "pytorch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(LaunchError, match=r"cannot be used \(OSError: libcudart\.so\.12"):
        prepare_megatron()


def test_micro_batches_of_several_calls_count_as_those_of_one_step() -> None:
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.fp8 = "hybrid"
    chunk, layer = MegatronModule(config), torch.nn.Linear(2, 2)
    chunk.layer = layer
    # What mcore's wrappers of Transformer Engine's layers keep, and forget in their forward pass.
    layer.is_first_microbatch = False
    with pytest.raises(ZeroDivisionError), counted_as_one_step([chunk]):
        assert layer.is_first_microbatch
        layer.is_first_microbatch = False
        chunk.set_is_first_microbatch()
        assert not layer.is_first_microbatch
        raise ZeroDivisionError
    chunk.set_is_first_microbatch()
    assert layer.is_first_microbatch
