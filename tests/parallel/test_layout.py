"""Layouts: groups that come and go without a trace, and generators that start where their seed says.

The train steps are those of a run, on mcore's real modules, so that whatever they cache would show.
"""

import gc
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.layout import Layout, leave_job
from tests.distributed import run_distributed
from tests.train.trainer import SMALL

_START = {"expert": 2}
_ROUND = ({"expert": 4}, {"tensor": 2, "expert": 2}, {"pipeline": 2, "expert": 2}, _START)


def _held() -> tuple[int, int]:
    """Open file descriptors and threads of this process; a gloo group closes its sockets in a thread of its own."""
    gc.collect()
    held, before = (0, 0), (-1, -1)
    while held != before:
        before = held
        time.sleep(0.1)
        held = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    return held


def _step(layout: Layout) -> float:
    """Build a model in a layout, train it for one step on random tokens, and drop it; the gradient norm."""
    from train.settings import load_settings
    from train.stage import build_stage
    from train.step import optimizer_step
    from train.step_clock import StepClock

    settings = load_settings([*SMALL, "data.corpus=none", "upcycle.stages=[]"], layout.world_size)
    stage = build_stage(settings, 0, layout, 256)
    generator = torch.Generator().manual_seed(layout.data_rank)
    tokens = torch.randint(256, (2, 33), generator=generator)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(2, 32),
        "position_ids": torch.arange(32).expand(2, -1).contiguous(),
    }
    _, norm, made = optimizer_step(stage, layout, [batch, batch], StepClock(layout.device))
    assert made
    stage.release()
    return norm


def _rounds(number: int) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int], list[float]]:
    before = _held()
    layout = Layout.create(ParallelConfig(**_START), 1)
    norms = [_step(layout)]
    held = []
    for _ in range(number):
        for sizes in _ROUND:
            layout = layout.change(ParallelConfig(**sizes), 1)
            norms.append(_step(layout))
        held.append(_held())
    leave_job(False)
    return held, before, _held(), norms


@pytest.mark.parametrize(("backend", "left"), [("nccl", [2]), ("gloo", [1, 2])])
def test_a_rank_that_fails_alone_waits_for_nothing_of_nccls(backend: str, left: list[int]) -> None:
    # NCCL's groups are destroyed once their last collective is done, to which another rank may never come.
    destroyed: list[int] = []
    with mock.patch.multiple(
        "parallel.layout.dist",
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        get_backend=lambda: backend,
        destroy_process_group=lambda: destroyed.append(len(acts)),
    ):
        acts = ["fails"]
        with pytest.raises(ZeroDivisionError):
            try:
                raise ZeroDivisionError
            finally:
                leave_job(True)
        acts.append("ends")
        leave_job(True)
    assert destroyed == left


def test_changing_the_layout_leaks_nothing() -> None:
    """Four changes a round: after each round as many descriptors and threads as after the first, mcore works throughout."""
    for held, before, after, norms in run_distributed(_rounds, 4, 2):
        for descriptors, threads in held[1:]:
            assert descriptors <= held[0][0] and threads <= held[0][1], held
        # The descriptors of the groups themselves go as well.
        assert before[0] < held[0][0] and after[0] < held[0][0], (before, held, after)
        assert all(norm > 0 for norm in norms)
        # The same layout, seed and data: the same step, whatever lay between.
        assert norms[4] == norms[8] == norms[0]


def _groups(configs: list[dict[str, int]]) -> list[tuple[int, ...]]:
    import torch.distributed as dist

    layout = Layout.create(ParallelConfig(**configs[0]), 1)
    found = []
    for sizes in [*configs[1:], configs[0]]:
        old, handle = layout, layout.groups.ep
        layout = layout.change(ParallelConfig(**sizes), 2)
        assert getattr(old.groups, "ep", None) is None
        assert handle not in dist.distributed_c10d._world.pg_map
        found.append((layout.groups.ep.size(), layout.groups.tp.size(), layout.data_size, layout.data_rank))
    # The default group is left alone.
    assert layout.sum_over_world(torch.ones(1)).item() == 4
    known = len(dist.distributed_c10d._world.pg_map)
    leave_job(False)
    assert len(dist.distributed_c10d._world.pg_map) == 1 < known
    assert layout.ranks_per_node == layout.world_size
    rank = torch.tensor([layout.rank, -layout.rank])
    assert layout.max_over_world(rank.clone()).tolist() == [3, 0]
    assert layout.min_over_world(rank.clone()).tolist() == [0, -3]
    return found


def test_a_changed_layout_has_the_groups_it_says() -> None:
    results = run_distributed(_groups, 4, [{"expert": 2}, {"expert": 4}, {"tensor": 2}])
    for rank, found in enumerate(results):
        assert found == [(4, 1, 4, rank), (1, 2, 2, rank // 2), (2, 1, 4, rank)]


def _streams() -> list[torch.Tensor]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

    def draw() -> torch.Tensor:
        plain = torch.rand(4)
        with get_cuda_rng_tracker().fork():
            dense = torch.rand(4)
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return torch.stack([plain, dense, torch.rand(4)])

    two, four = ParallelConfig(expert=2), ParallelConfig(expert=4)
    layout = Layout.create(two, 1)
    first = draw()
    changed = layout.change(four, 2)
    second = draw()
    changed.seed_streams(2)
    again = draw()
    same_seed = changed.change(two, 1)
    back = draw()
    assert same_seed.config is two
    leave_job(False)
    return [first, second, again, back]


def test_a_new_layout_starts_its_streams_from_its_own_seed() -> None:
    results = run_distributed(_streams, 4)
    for first, second, again, back in results:
        assert not (first == second).any()
        assert torch.equal(second, again)
        assert torch.equal(first, back)
    experts = [second[2] for _, second, _, _ in results]
    assert not any(torch.equal(experts[0], other) for other in experts[1:])


def test_the_flight_recorder_writes_where_the_run_does(tmp_path: Path) -> None:
    from parallel.flight_recorder import flight_recorder

    told = flight_recorder(tmp_path / "run")
    assert told["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    # Both names, because torch reads one or the other by its version.
    assert {told["TORCH_FR_DUMP_TEMP_FILE"], told["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]} == {
        f"{tmp_path}/run/nccl-trace-rank-"
    }
    assert "TORCH_FR_DUMP_TEMP_FILE" not in flight_recorder(None)
