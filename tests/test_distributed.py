"""The harness: results in rank order, errors with their traceback, and no hang whatever a rank does."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from parallel.errors import ConfigError
from tests.distributed import RankError, run_distributed


def _gather(offset: int, factor: int = 1) -> tuple[list[int], torch.Tensor]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, torch.distributed.get_rank() * factor + offset)
    return values, torch.full((2,), torch.distributed.get_rank())


def test_results_come_in_rank_order() -> None:
    results = run_distributed(_gather, 3, 10, factor=2)
    assert [values for values, _ in results] == [[10, 12, 14]] * 3
    assert [tensor.tolist() for _, tensor in results] == [[0, 0], [1, 1], [2, 2]]


def _environment() -> tuple[str, ...]:
    assert not torch.distributed.is_initialized()
    return tuple(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "COPPICE_TEST"))


def test_without_init_only_the_environment_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPPICE_TEST", "seen")
    results = run_distributed(_environment, 2, init=False)
    assert results == [("0", "0", "2", "127.0.0.1", "seen"), ("1", "1", "2", "127.0.0.1", "seen")]


def _raise_on_last_rank() -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        print("about to fail")
        raise ConfigError("model layers=3 is wrong")
    torch.distributed.barrier()


def test_first_exception_is_raised_with_its_traceback_and_output() -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="model layers=3 is wrong") as caught:
        run_distributed(_raise_on_last_rank, 2)
    assert time.monotonic() - start < 30
    cause = str(caught.value.__cause__)
    assert "rank 1 of 2" in cause
    assert "in _raise_on_last_rank" in cause
    assert "about to fail" in cause


def _die_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    time.sleep(100)


def test_a_rank_that_dies_is_named_and_the_others_are_ended() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 with exit code 3"):
        run_distributed(_die_on_rank_1, 2)
    assert time.monotonic() - start < 30


def _wait_on_rank_0() -> int:
    if torch.distributed.get_rank() == 0:
        time.sleep(100)
    return os.getpid()


def test_a_hang_shows_the_stacks_of_the_ranks_that_hang() -> None:
    with pytest.raises(RankError, match=r"ranks \[0\] did not finish") as caught:
        run_distributed(_wait_on_rank_0, 2, timeout=3)
    assert "in _wait_on_rank_0" in str(caught.value)


class _Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("cannot travel")
        self.code = lambda: None


def _raise_unpicklable() -> None:
    raise _Unpicklable


def test_an_exception_that_cannot_be_sent_is_described() -> None:
    with pytest.raises(RankError, match="_Unpicklable: cannot travel"):
        run_distributed(_raise_unpicklable, 1, init=False)


def _start_a_process() -> int:
    import multiprocessing

    manager = multiprocessing.get_context("spawn").Manager()  # what mcore's asynchronous save does
    queue = manager.Queue()
    queue.put(5)
    return queue.get()


def test_children_may_start_processes() -> None:
    assert run_distributed(_start_a_process, 1, init=False) == [5]
