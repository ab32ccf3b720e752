"""Memory of a live switch and of a load, allocation by allocation, against what `launch plan` says of the stages.

torch's profiler sees every allocation and every free of its CPU allocator, those inside of mcore too: the requests that a
GPU's allocator would get, except for what kernels of a GPU want for themselves. Nothing here was seen on a GPU.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from torch.autograd.profiler import profile

from launch.footprint import Memory, footprint, switch_memory
from launch.plan_inputs import settings_without_corpus
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, small_corpus, train_here

_NETWORK = [
    "model.hidden_size=64",
    "model.expert_ffn_hidden_size=128",
    "model.num_experts=8",
    "data.micro_batch_size=1",
]
# Logged numbers, states of generators, and what else comes and goes.
_SMALL_THINGS = 128 << 10
# One layer's experts of the smaller stage in one kind of fp32 state: what a wave moves; and more than what mcore copies of one
# parameter.
_WAVE = 4 * 8 * 3 * 128 * 64
# `model/fingerprint.py`
_FINGERPRINT_ROOM = 1 << 20
_CHUNK = 1 << 20


class _Levels:
    """Bytes allocated over time."""

    def __init__(self, changes: list[tuple[int, int]]) -> None:
        self._levels: list[tuple[int, int]] = []
        total = 0
        for when, count in sorted(changes):
            total += count
            self._levels.append((when, total))

    def at(self, moment: int) -> int:
        return max((level for level in self._levels if level[0] < moment), default=(0, 0))[1]

    def highest(self, begin: int, end: int) -> int:
        return max([total for when, total in self._levels if begin <= when <= end] + [self.at(begin)])


class _Act(NamedTuple):
    """A function whose calls are timed: where it is looked up."""

    owner: Any
    name: str


@contextmanager
def _timed(acts: dict[str, _Act], spans: dict[str, list[tuple[int, int]]]) -> Iterator[None]:
    def timed(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.time_ns()
            try:
                return original(*args, **kwargs)
            finally:
                spans.setdefault(what, []).append((began, time.time_ns()))

        return call

    patches = [mock.patch.object(a.owner, a.name, timed(what, getattr(a.owner, a.name))) for what, a in acts.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _peaks(overrides: list[str]) -> dict[str, list[tuple[int, int]]]:
    """Train on this rank; bytes allocated before each call of an act, and the most during it."""
    from train import expansion, switch
    from train.checkpoint.persistence import Persistence
    from train.run import Run

    acts = {
        "switch": _Act(expansion, "through_memory"),
        "build": _Act(switch, "build_stage"),
        "move": _Act(switch, "move_state"),
        "load": _Act(Persistence, "load_stage"),
        "step": _Act(Run, "_one_step"),
    }
    spans: dict[str, list[tuple[int, int]]] = {}
    recorded = profile(use_cpu=True, profile_memory=True, use_kineto=True)
    with recorded, _timed(acts, spans):
        train_here(overrides)
    changes = [(e.start_ns(), e.nbytes()) for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    levels = _Levels(changes)
    return {what: [(levels.at(a), levels.highest(a, b)) for a, b in calls] for what, calls in spans.items()}


def _switched_and_resumed(overrides: list[str]) -> list[dict[str, list[tuple[int, int]]]]:
    return [_peaks([*overrides, "run.stop_at_step=2"]), _peaks(overrides)]


def _idle(memory: Memory) -> int:
    """Bytes of a stage without gradients and activations."""
    return memory.weights + memory.masters + memory.moments


@pytest.mark.parametrize(
    ("processes", "layout", "grow"),
    [
        (1, [], "factor: 2"),
        # Two data ranks share the optimizer state before, none after: new weights and gradients weigh more than what it was.
        pytest.param(4, ["parallel.expert=2"], "factor: 2, parallel: {expert: 4}", marks=pytest.mark.slow),
        pytest.param(4, ["parallel.expert=1"], "factor: 2", marks=pytest.mark.slow),
    ],
)
def test_a_switch_and_a_load_stay_below_the_larger_stage(
    processes: int, layout: list[str], grow: str, tmp_path: Path
) -> None:
    """No state lies in memory twice, and no gradients before their time."""
    common = [*SMALL, *_NETWORK, *layout, f"upcycle.stages=[{{at_step: 1, {grow}}}]", "run.steps=3",
              "data.global_batch_size=4", "upcycle.transfer_chunk_mib=1"]  # fmt: skip
    corpus = small_corpus(tmp_path)
    found = run_distributed(
        _switched_and_resumed, processes, [*common, f"data.corpus={corpus}", f"run.dir={tmp_path}/run"]
    )
    settings = settings_without_corpus(common, processes)
    before, after = (footprint(settings, i, processes, 256, flash=False) for i in range(2))
    said = switch_memory(before, after, "live", 2 * _CHUNK)
    for rank, (switched, resumed) in enumerate(found):
        old, new = before.ranks[rank], after.ranks[rank]
        slack = _SMALL_THINGS + _WAVE
        (began, switch), (_, build), (_, move) = (switched[act][0] for act in ("switch", "build", "move"))
        # What lies beside the stage: corpora, and memory that gloo's threads have freed, which the profiler does not see.
        beside = began - _idle(old) - old.gradients
        assert build - beside <= _idle(old) + new.weights + new.masters + slack
        assert move - beside <= said.peak + slack
        # It ends with the new stage, ready to train.
        ready = _idle(new) + new.gradients
        assert switch - beside <= max(said.peak, _idle(new) + _FINGERPRINT_ROOM, ready) + slack
        assert switch <= 1.10 * switched["step"][-1][1]
        (opened, load) = resumed["load"][0]
        beside = opened - new.weights - new.gradients - new.masters
        assert load - beside <= ready + slack
