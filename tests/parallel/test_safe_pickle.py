"""Hostile checkpoints: each is refused by name before anything in it has run; honest ones load as before."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from parallel.compat import prepare_megatron
from parallel.errors import CheckpointError
from parallel.safe_pickle import load_plain, read_index
from parallel.sharded_load import checkpoint_tensors, load_sharded
from parallel.sharded_save import save_sharded
from parallel.stream_files import StoredTensors
from tests.distributed import run_distributed

_WANTED = r"it wants posix\.mkdir, which no checkpoint needs: it is damaged or malicious; do not load it"


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


def _state(**more: Any) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return {"w": ShardedTensor.from_rank_offsets("weight", torch.arange(6.0).reshape(2, 3)), **more}


def _object(data: Any) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("extra", data, (1,), (0,))


def _honest(folder: Path) -> None:
    save_sharded(_state(step=3, extra=_object([1, "two", torch.ones(2)])), str(folder))
    wanted = _state(extra=_object(None))
    wanted["w"].data = torch.zeros(2, 3)
    loaded, missing, unexpected = load_sharded(wanted, str(folder))
    assert not missing and not unexpected and loaded["step"] == 3
    assert torch.equal(loaded["w"], torch.arange(6.0).reshape(2, 3))
    assert loaded["extra"][:2] == [1, "two"] and torch.equal(loaded["extra"][2], torch.ones(2))


def _index(folder: Path, trap: _Trap) -> None:
    save_sharded(_state(), str(folder))
    (folder / ".metadata").write_bytes(pickle.dumps(trap))


def _inside_the_index(folder: Path, trap: _Trap) -> None:
    save_sharded(_state(), str(folder))
    index = read_index(folder)
    index.planner_data = trap
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _plain_value(folder: Path, trap: _Trap) -> None:
    """In common.pt with mcore 0.16, in a stored object with 0.19."""
    save_sharded(_state(step=trap), str(folder))


def _common(folder: Path, trap: _Trap) -> None:
    save_sharded(_state(), str(folder))
    torch.save({"step": trap}, folder / "common.pt")


def _bytes(folder: Path, trap: _Trap) -> None:
    save_sharded(_state(extra=_object(trap)), str(folder))


def _tensor(folder: Path, trap: _Trap) -> None:
    save_sharded(_state(), str(folder))
    index = read_index(folder)
    info = index.storage_data[MetadataIndex("weight", (0, 0))]
    path = folder / info.relative_path
    info.offset = path.stat().st_size
    with open(path, "ab") as file:
        torch.save(trap, file)
    info.length = path.stat().st_size - info.offset
    (folder / ".metadata").write_bytes(pickle.dumps(index))


_HOSTILE: dict[str, tuple[Callable[[Path, _Trap], None], str]] = {
    "index": (_index, r"index/\.metadata: "),
    "inside": (_inside_the_index, r"inside/\.metadata: "),
    "plain": (_plain_value, r"plain/(common\.pt|__0_0\.distcp \(common_state/shard_0_1\)): "),
    "common": (_common, r"common/common\.pt: "),
    "bytes": (_bytes, r"bytes cannot be read: extra/shard_0_1: "),
    "tensor": (_tensor, r"tensor cannot be read: .*tensor/__0_0\.distcp: "),
}


def _load_all(folder: Path) -> dict[str, str]:
    """What loading says of each hostile checkpoint."""
    prepare_megatron()
    _honest(folder / "honest")
    told = {}
    for name, (make, _) in _HOSTILE.items():
        make(folder / name, _Trap(folder / "sprung"))
        assert not (folder / "sprung").exists()
        wanted = _state(extra=_object(None)) if name == "bytes" else _state()
        with pytest.raises(CheckpointError) as caught:
            load_sharded(wanted, str(folder / name))
        told[name] = str(caught.value)
        assert not (folder / "sprung").exists(), name
    return told


def test_a_hostile_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    (told,) = run_distributed(_load_all, 1, tmp_path)
    for name, (_, where) in _HOSTILE.items():
        with pytest.raises(CheckpointError, match=where + _WANTED):
            raise CheckpointError(told[name])
    # The readers that need no process group.
    for name in ("index", "inside"):
        with pytest.raises(CheckpointError, match=_WANTED):
            checkpoint_tensors(str(tmp_path / name))
        with pytest.raises(CheckpointError, match=_WANTED):
            StoredTensors(tmp_path / name)
    with StoredTensors(tmp_path / "tensor") as stored, pytest.raises(CheckpointError, match="distcp: " + _WANTED):
        stored.read_into("weight", _box(), torch.empty(2, 3))
    assert not (tmp_path / "sprung").exists()
    # The trap is one.
    torch.load(tmp_path / "common" / "common.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()


def _box() -> Any:
    from parallel.regions import Box

    return Box((0, 0), (2, 3))


def test_a_hostile_generator_state_is_refused_by_name(tmp_path: Path) -> None:
    from train import random_state

    random_state.save(tmp_path, 0)
    before = torch.get_rng_state()
    torch.rand(3)
    random_state.load(tmp_path, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.save({"torch": _Trap(tmp_path / "sprung")}, tmp_path / "rank-00000.pt")
    with pytest.raises(CheckpointError, match=r"rank-00000\.pt: " + _WANTED):
        random_state.load(tmp_path, 0)
    (tmp_path / "rank-00000.pt").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"rank-00000\.pt cannot be read \(.*\): use another checkpoint"):
        random_state.load(tmp_path, 0)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.distributed.checkpoint.metadata.os"]
)
def test_only_what_is_listed_is_found(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
                                         + b"\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x93.")  # fmt: skip
    with pytest.raises(CheckpointError, match=f"it wants {name}, which no checkpoint needs"):
        read_index(tmp_path)


def test_an_index_names_no_file_elsewhere(tmp_path: Path) -> None:
    run_distributed(_escape, 1, tmp_path)
    with pytest.raises(CheckpointError, match=r"names the file '\.\./secret', which is not in its folder"):
        read_index(tmp_path)


def _escape(folder: Path) -> None:
    prepare_megatron()
    save_sharded(_state(), str(folder))
    index = read_index(folder)
    index.storage_data[MetadataIndex("weight", (0, 0))].relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_a_damaged_archive_is_not_called_hostile(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    assert torch.equal(load_plain(tmp_path / "a.pt")["a"], torch.ones(3))
    os.truncate(tmp_path / "a.pt", 50)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read \(.*\): use another checkpoint"):
        load_plain(tmp_path / "a.pt")
