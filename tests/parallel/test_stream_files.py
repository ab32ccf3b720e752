"""Boxes of stored tensors, read and written one by one; shards cut in any way, and stored out of order."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader

from parallel import stored_items
from parallel.compat import prepare_megatron
from parallel.errors import CheckpointError
from parallel.regions import Box, first_element
from parallel.sharded_load import checkpoint_tensors, load_sharded, mark_complete
from parallel.stream_files import StoredTensors, TensorWriter, pieces, read_index
from tests.distributed import run_distributed
from tests.train.trainer import _tensor_digests
from tests.upcycle import plans  # noqa: F401  (lifts hypothesis' deadline)

_SHAPE = (4, 6, 5)


def _write(folder: Path, tensor: torch.Tensor, boxes: list[Box], *, swapped: bool = False) -> None:
    """Store a tensor under the key `t` in the given boxes; `swapped` ones have their last axes exchanged in memory."""
    folder.mkdir()
    with TensorWriter(folder, file_bytes=4000) as writer:
        for box in boxes:
            part = tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].clone()
            if swapped:
                part = part.transpose(-1, -2).contiguous().transpose(-1, -2)
            writer.add("t", tuple(tensor.shape), box, part)
        writer.finish()
    mark_complete(folder)


@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=4),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    chunk_bytes=st.integers(1, 300),
)
def test_pieces_follow_one_another(shape: list[int], itemsize: int, chunk_bytes: int) -> None:
    position = 0
    for box in pieces(shape, itemsize, chunk_bytes):
        assert first_element(shape, box) == position
        assert box.numel * itemsize <= max(chunk_bytes, itemsize)
        position += box.numel
    assert position == math.prod(shape)
    # Rows stay whole where one fits.
    if shape and math.prod(shape[1:]) * itemsize <= chunk_bytes:
        assert all(box.shape[1:] == tuple(shape[1:]) for box in pieces(shape, itemsize, chunk_bytes))


@pytest.mark.parametrize("swapped", [False, True], ids=["in-order", "out-of-order"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("shortest", [1, 1 << 16], ids=["stretch-by-stretch", "out-of-the-whole"])
def test_any_box_of_shards_cut_in_any_way(
    dtype: torch.dtype, swapped: bool, shortest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel.stored_items._SHORTEST_READ_BYTES", shortest)
    tensor = torch.arange(math.prod(_SHAPE)).view(_SHAPE).to(dtype)
    grid = [Box((a, 0, c), (2, 6, n)) for a in (0, 2) for c, n in ((0, 2), (2, 3))]
    _write(tmp_path / "grid", tensor, grid, swapped=swapped)
    wanted = [Box((0, 0, 0), _SHAPE), Box((1, 2, 1), (2, 3, 3)), Box((3, 5, 4), (1, 1, 1)), Box((0, 1, 0), (4, 2, 5))]
    with StoredTensors(tmp_path / "grid") as stored:
        assert stored.tensors["t"].shape == _SHAPE and stored.tensors["t"].nbytes == tensor.nbytes
        for box in [*wanted, *pieces(_SHAPE, dtype.itemsize, 40)]:
            expected = tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]
            assert torch.equal(stored.read("t", box), expected)
            # Into memory of another order and type.
            other = torch.empty(box.shape[::-1], dtype=torch.float64).permute(2, 1, 0)
            stored.read_into("t", box, other)
            assert torch.equal(other, expected.double())


def test_mcore_and_torch_read_what_was_written(tmp_path: Path) -> None:
    tensor = torch.randn(_SHAPE)
    _write(tmp_path / "cut", tensor, list(pieces(_SHAPE, 4, 24)))
    _write(tmp_path / "whole", tensor, [Box((0, 0, 0), _SHAPE)])
    assert len(list((tmp_path / "cut").glob("*.distcp"))) > 2
    assert checkpoint_tensors(str(tmp_path / "cut")) == {"t": (_SHAPE, torch.float32)}
    cut, whole = (run_distributed(_tensor_digests, 1, str(tmp_path / name))[0] for name in ("cut", "whole"))
    assert cut == whole
    theirs, mine = FileSystemReader(tmp_path / "cut").read_metadata(), read_index(tmp_path / "cut")
    assert theirs.state_dict_metadata == mine.state_dict_metadata and theirs.storage_data == mine.storage_data


def _load_in_parts(folder: Path, tensor: torch.Tensor) -> dict[str, float]:
    """Load a tensor row by row, and in halves of every row; bytes read over its own, for each."""
    prepare_megatron()
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    cuts = {
        "rows": [(tensor[i : i + 1], (0, i, len(tensor))) for i in range(len(tensor))],
        "halves": [(half, (1, i, 2)) for i, half in enumerate(tensor.chunk(2, dim=1))],
        "transposed": [(tensor, (0, 0, 1))],
    }
    found = {}
    for name, parts in cuts.items():
        order = (0, 2, 1) if name == "transposed" else (0, 1, 2)
        into = [torch.zeros_like(part.permute(order)).contiguous().permute(order) for part, _ in parts]
        asked = {str(i): ShardedTensor.from_rank_offsets("t", into[i], at) for i, (_, at) in enumerate(parts)}
        before = _bytes_read()
        loaded, missing, _ = load_sharded(asked, str(folder))
        found[name] = (_bytes_read() - before) / tensor.nbytes
        assert not missing and all(torch.equal(loaded[str(i)], part) for i, (part, _) in enumerate(parts))
    return found


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_what_is_loaded_in_parts_is_read_once(tmp_path: Path) -> None:
    # Large enough that what it takes to find the elements does not count.
    tensor = torch.randn(16, 128, 256)
    _write(tmp_path / "whole", tensor, [Box((0, 0, 0), (16, 128, 256))])
    (found,) = run_distributed(_load_in_parts, 1, tmp_path / "whole", tensor)
    assert all(1.0 <= times < 1.2 for times in found.values()), found


class _AtMost(io.FileIO):
    """Gives less at a time than is asked for, as the kernel does beyond 2 GiB."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer).cast("B")[:1000])


def test_a_tensor_of_more_bytes_than_one_read_gives_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(16, 128, 256)
    _write(tmp_path / "large", tensor, [Box((0, 0, 0), (16, 128, 256))])
    monkeypatch.setattr(stored_items, "open", lambda path, *_, **__: _AtMost(path), raising=False)
    with StoredTensors(tmp_path / "large") as stored:
        # In short stretches, so that all of it is read, and in one.
        for box in (Box((0, 0, 3), (16, 128, 2)), Box((2, 0, 0), (3, 128, 256))):
            expected = tensor[tuple(slice(first, first + count) for first, count in zip(*box, strict=True))]
            assert torch.equal(stored.read("t", box), expected)


def test_a_part_of_a_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was given only a part of t"):
        _write(tmp_path / "part", torch.zeros(_SHAPE), [Box((0, 0, 0), (2, 6, 5))])
    assert not (tmp_path / "part" / ".metadata").exists()
