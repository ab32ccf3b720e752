"""The plan of a save: used again for the same tensors, made anew for others, refused where it leaves a gap."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.compat import prepare_megatron
from parallel.errors import CheckpointError
from parallel.safe_pickle import read_index
from parallel.sharded_load import load_sharded
from parallel.sharded_save import KnownPlan, begin_save, save_sharded
from tests.distributed import run_distributed
from train.checkpoint.files import written_by


def _box(key: str, rows: int, first: int, data: torch.Tensor, replica: int = 0) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    shape = tuple(data.shape)
    return ShardedTensor(key, data, data.dtype, shape, (rows, 2), (first, 0), None, (0, 0, replica))


def _state(rank: int, factor: float, cut: int, rows: int = 5) -> dict[str, Any]:
    """A matrix cut unevenly between two ranks, and one that both hold."""
    mine = torch.arange(2.0 * rows).reshape(rows, 2)[slice(0, cut) if rank == 0 else slice(cut, rows)] * factor
    return {"cut": _box("cut", rows, 0 if rank == 0 else cut, mine),
            "both": _box("both", 3, 0, torch.ones(3, 2) * factor, rank)}  # fmt: skip


def _load(folder: Path, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    wanted = {
        "cut": ShardedTensor.from_rank_offsets("cut", torch.zeros(rows, 2), replica_id=torch.distributed.get_rank()),
        "both": ShardedTensor.from_rank_offsets("both", torch.zeros(3, 2), replica_id=torch.distributed.get_rank()),
    }
    loaded, _, _ = load_sharded(wanted, str(folder))
    return loaded["cut"], loaded["both"]


def _save_in_turn(folder: Path) -> list[bool]:
    prepare_megatron()
    rank, known, reused = torch.distributed.get_rank(), KnownPlan(), []
    for number, (factor, cut, rows) in enumerate([(1, 2, 5), (2, 2, 5), (3, 4, 5), (4, 4, 6), (5, 4, 6)]):
        state, before = _state(rank, factor, cut, rows), known.plan
        save = begin_save(state, str(folder / str(number)), parallel_group=torch.distributed.group.WORLD,
                          copy=True, known=known)  # fmt: skip
        reused.append(known.plan is before)
        # What is written is what was there.
        for leaf in state.values():
            leaf.data.fill_(-1)
        save.write()
        save.finish()
        cut_RC, both = _load(folder / str(number), rows)
        assert torch.equal(cut_RC, torch.arange(2.0 * rows).reshape(rows, 2) * factor)
        assert torch.equal(both, torch.ones(3, 2) * factor)
    return reused


def test_a_plan_is_used_again_for_the_same_tensors_only(tmp_path: Path) -> None:
    expected = [False, True, False, False, True]
    assert run_distributed(_save_in_turn, 2, tmp_path) == [expected, expected]
    # With or without a plan of before, the same files.
    first, again = (read_index(tmp_path / name) for name in "01")
    assert first.state_dict_metadata == again.state_dict_metadata
    assert {k: vars(v) for k, v in first.storage_data.items()} == {k: vars(v) for k, v in again.storage_data.items()}


def _save_in_several_files(folder: Path) -> str:
    prepare_megatron()
    with mock.patch("parallel.sharded_save._FILE_BYTES", 8):
        save_sharded(_state(torch.distributed.get_rank(), 3.0, 3), str(folder / "several"))
        with pytest.raises(CheckpointError) as caught:
            save_sharded(_state(torch.distributed.get_rank(), 3.0, 3), str(folder / "taken"))
    cut_RC, both = _load(folder / "several")
    assert torch.equal(cut_RC, torch.arange(10.0).reshape(5, 2) * 3)
    assert torch.equal(both, torch.ones(3, 2) * 3)
    return str(caught.value)


def test_one_of_the_files_that_a_rank_writes_at_once_fails(tmp_path: Path) -> None:
    (tmp_path / "taken" / "__0_1_0.distcp").mkdir(parents=True)  # where a file of rank 0 is wanted
    for message in run_distributed(_save_in_several_files, 2, tmp_path):
        assert "taken cannot be written: " in message and "__0_1_0.distcp" in message
    assert not (tmp_path / "taken" / "metadata.json").exists()
    names = [path.name for path in (tmp_path / "several").glob("*.distcp")]
    mine, theirs = (sorted(written_by(names, rank)) for rank in (0, 1))
    assert mine[:2] == ["__0_0_0.distcp", "__0_1_0.distcp"] and theirs and all(n.startswith("__1_") for n in theirs)
    assert len(mine) + len(theirs) == len(names)
    # No CRC either, whichever thread has written: the local header of the first record of an archive has zero for it.
    for name in mine:
        assert (tmp_path / "several" / name).read_bytes()[14:18] == bytes(4)


def _write_beside_a_gpu(folder: Path) -> None:
    from torch.distributed.checkpoint import filesystem

    prepare_megatron()
    state = {"cut": _box("cut", 5, 0, torch.ones(5, 2))}
    save = begin_save(state, str(folder), copy=True)
    # What torch asks before it copies ahead from a GPU, on the stream of the first one. It has none here to wait for.
    with (
        mock.patch.object(filesystem.torch.cuda, "is_available", return_value=True),
        mock.patch.object(filesystem, "_OverlappingCpuLoader", side_effect=AssertionError("asked for a stream")),
    ):
        save.write()
    save.finish()


def test_what_is_written_from_host_memory_asks_nothing_of_a_gpu(tmp_path: Path) -> None:
    run_distributed(_write_beside_a_gpu, 1, tmp_path)


def _save_with_a_gap(folder: Path) -> str:
    prepare_megatron()
    rank = torch.distributed.get_rank()
    state = {"cut": _box("cut", 5, 3 * rank, torch.ones(2, 2))}
    with pytest.raises(CheckpointError) as caught:
        save_sharded(state, str(folder))
    return str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gap_is_refused_on_all_ranks(tmp_path: Path, ranks: int) -> None:
    for message in run_distributed(_save_with_a_gap, ranks, tmp_path):
        assert "cannot be written: " in message
