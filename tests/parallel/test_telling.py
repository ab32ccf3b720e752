"""Ranks tell each other what they hold: each distinct part once, and every rank the same of all."""

import pickle
from typing import Any

from parallel.cluster import LogicalTensor, describe_rank
from parallel.config import ParallelConfig
from parallel.reshard_plan import Holding
from parallel.telling import choose_speakers, digest_of, pack, split, tell, unpack
from tests.distributed import run_distributed

_WORLD = 4
_TENSORS = [
    *(LogicalTensor(f"dense.{layer}", (24, 20), 2) for layer in range(32)),
    *(LogicalTensor(f"experts.{layer}", (8, 16, 12), 2, expert=True, separate=True) for layer in range(32)),
]


def _kind(key: str) -> tuple[str, bool]:
    return key.split("/")[0], "experts" in key


def _sides(rank: int) -> list[dict[str, Holding]]:
    return [describe_rank(rank, _WORLD, ParallelConfig(expert=size), _TENSORS) for size in (2, 4)]


def _told() -> tuple[Any, int]:
    from parallel.layout import Layout

    layout = Layout.create(ParallelConfig(), 1)
    gathered: list[int] = []
    original = layout.gather_objects

    def gather(value: Any) -> list[Any]:
        gathered.append(len(pickle.dumps(value)))
        return original(value)

    layout.gather_objects = gather  # type: ignore[method-assign]
    found = tell(_sides(layout.rank), _kind, layout)
    return found, sum(gathered)


def test_every_rank_learns_what_all_hold() -> None:
    results = run_distributed(_told, _WORLD)
    for side in range(2):
        for parts, _ in results:
            assert parts[side] == results[0][0][side], "ranks would plan differently"
            held: list[dict[str, Holding]] = [{} for _ in range(_WORLD)]
            for part, ranks in parts[side]:
                assert list(ranks) == sorted(ranks)
                for rank in ranks:
                    assert not held[rank].keys() & part.keys()
                    held[rank] |= part
            assert held == [_sides(rank)[side] for rank in range(_WORLD)]
        # Dense weights are alike on all ranks, expert weights on those of the same place.
        holders = [ranks for part, ranks in results[0][0][side] if next(iter(part)).startswith("weight/")]
        assert sorted(map(len, holders)) == ([2, 2, 4] if side == 0 else [1, 1, 1, 1, 4])
    whole = sum(len(pickle.dumps(_sides(rank))) for rank in range(_WORLD))
    assert sum(said for _, said in results) < whole / 2


def test_equal_parts_have_one_digest_whatever_was_one_object() -> None:
    (weights, *_), _ = [split(side, _kind) for side in _sides(0)]
    copied = {key: pickle.loads(pickle.dumps(holding)) for key, holding in weights.items()}
    assert copied == weights and digest_of(copied) == digest_of(weights)
    assert unpack(pack(weights)) == weights
    key = min(weights)
    assert digest_of({**weights, key: weights[key]._replace(itemsize=8)}) != digest_of(weights)
    assert digest_of({k: v for k, v in weights.items() if k != key}) != digest_of(weights)


def test_the_telling_is_shared_out() -> None:
    alike = {bytes([i]): 10 for i in range(8)}
    own = b"own"
    chosen = choose_speakers([alike, alike, alike, {**alike, own: 20}])
    assert chosen[own] == 3
    # Each message is as long as the longest.
    loads = [sum(20 if part == own else 10 for part, speaker in chosen.items() if speaker == rank) for rank in range(4)]
    assert sum(loads) == 100 and max(loads) == 30
