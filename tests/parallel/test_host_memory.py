"""Host memory for a stage that leaves the device during a switch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from parallel.errors import ExpansionError
from parallel.host_memory import HostCopy, available_bytes, refuse_too_little
from tests.distributed import run_distributed


def test_a_copy_has_the_bytes_and_gives_its_memory_back() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16)
    copy = HostCopy(tensor.untyped_storage())
    assert copy.bytes.view(torch.bfloat16).tolist() == tensor.tolist()
    assert copy.bytes.data_ptr() != tensor.data_ptr()
    copy.free()
    assert copy.bytes.untyped_storage().nbytes() == 0


def test_a_limit_of_the_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available_bytes(tmp_path) == 1000
    (tmp_path / "memory.current").write_text("500\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 1000
    (tmp_path / "memory.max").write_text("700\n")
    assert available_bytes(tmp_path) == 200
    (tmp_path / "memory.max").write_text("400\n")
    assert available_bytes(tmp_path) == 0


def _too_much() -> str:
    from parallel.config import ParallelConfig
    from parallel.layout import Layout

    layout: Any = Layout.create(ParallelConfig(), seed=1)
    refuse_too_little(1 << 20, "here", layout)
    # Each alone would fit; they share the machine.
    share = int(psutil.virtual_memory().available * 0.7)
    with pytest.raises(ExpansionError) as refused:
        refuse_too_little(share, "node-a", layout)
    refuse_too_little(share, f"node-{layout.rank}", layout)
    return str(refused.value)


def test_ranks_of_a_node_share_its_memory_and_all_refuse() -> None:
    first, second = run_distributed(_too_much, 2)
    assert first.startswith("upcycle.offload=true needs ") and " on node-a, where " in first
    assert "nothing was moved" in first and "nothing was moved" in second


def test_a_stage_leaves_its_memory_and_is_read_from_the_host() -> None:
    """Two tensors in one flat buffer, as mcore lays weights out: copied once, freed once."""
    from model.holdings import Piece, StageState, _Memory, wave_of
    from parallel.regions import Box

    flat = torch.arange(8.0)
    state, key = StageState(), "weight/decoder.layers.0.{}"
    state.add(key.format("a"), Piece(Box((0,), (4,)), (1,), 0), _Memory(flat[:4]), 4)
    state.add(key.format("b"), Piece(Box((0, 0), (2, 2)), (2, 1), 0), _Memory(flat[4:].view(2, 2)), 4)
    assert state.host_bytes() == 32
    state.move_to_host()
    assert flat.untyped_storage().nbytes() == 0
    assert state.view(key.format("a"), Box((1,), (2,))).tolist() == [1, 2]
    row = state.view(key.format("b"), Box((1, 0), (1, 2)))
    assert row.tolist() == [[6, 7]]
    state.free_as_it_goes()
    state.end(wave_of(key.format("a")))
    assert row.untyped_storage().nbytes() == 0
