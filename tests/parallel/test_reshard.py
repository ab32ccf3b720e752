"""The planner and the executor of the live switch, many ranks in one process: random tensors, layouts and expansions.

Every case is checked against the whole logical tensors, and the bytes moved against the fewest possible.
"""

import random
import threading
from collections.abc import Mapping, Sequence

import pytest
import torch

from parallel import regions, reshard_plan
from parallel.cluster import LogicalTensor, describe_rank
from parallel.config import ParallelConfig
from parallel.errors import ExpansionError
from parallel.regions import Box, intersect
from parallel.reshard import Moved, execute
from parallel.reshard_plan import Holding, Holdings, Wave, least_bytes, plan_rank, traffic
from parallel.transport import ThreadHub, ThreadTransport

E = 4  # experts before


class BlockState:
    """The boxes a rank holds as tensors of their own, cut from whole tensors or empty; written elements are counted."""

    def __init__(self, held: Holdings, whole: Mapping[str, torch.Tensor] | None = None) -> None:
        self.blocks: dict[str, list[tuple[Box, torch.Tensor]]] = {}
        for key, holding in held.items():
            self.blocks[key] = [
                (box, whole[key][_slices(box)].clone() if whole else torch.zeros(box.shape, dtype=_dtype(holding)))
                for box in holding.boxes
            ]
        self.ended: list[Wave] = []
        self.old = whole is not None

    def view(self, key: str, box: Box) -> torch.Tensor:
        for mine, block in self.blocks[key]:
            if mine.holds(box):
                return block[tuple(slice(o - m, o - m + n) for o, n, m in zip(*box, mine.offset, strict=True))]
        raise KeyError(f"{key} {box} is not held here")

    def begin(self, wave: Wave) -> None:
        pass

    def end(self, wave: Wave) -> None:
        self.ended.append(wave)
        if self.old:
            for key in [k for k in self.blocks if _wave(k) == wave]:
                del self.blocks[key]


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(*box, strict=True))


def _dtype(holding: Holding) -> torch.dtype:
    return torch.bfloat16 if holding.itemsize == 2 else torch.float32


def _wave(key: str) -> Wave:
    return (0,) if key.startswith("weight/") else (1, int(key.rsplit(".", 1)[1]))


def _tensors(experts: int, layers: int = 2) -> list[LogicalTensor]:
    """A small network: odd sizes, gated and plain splits, a replicated vector, routers."""
    found = []
    for layer in range(layers):
        found += [
            LogicalTensor(f"norm.{layer}", (24,), 2),
            LogicalTensor(f"qkv.{layer}", (24, 20), 2, split=0),
            LogicalTensor(f"fc1.{layer}", (32, 12), 2, split=0, halves=2),
            LogicalTensor(f"proj.{layer}", (20, 24), 2, split=1),
            LogicalTensor(f"router.{layer}", (experts, 20), 4),
            LogicalTensor(f"experts_fc1.{layer}", (experts, 16, 12), 2, expert=True, split=1, halves=2),
            LogicalTensor(f"experts_fc2.{layer}", (experts, 12, 8), 2, expert=True, split=2),
        ]
    return found


def _whole(tensors: Sequence[LogicalTensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for t in tensors:
        for state in ("weight", "param", "exp_avg", "exp_avg_sq"):
            dtype = torch.bfloat16 if state == "weight" and t.itemsize == 2 else torch.float32
            found[f"{state}/{t.key}"] = torch.randn(t.shape, generator=generator).to(dtype)
    return found


def _run(world: int, plans: list, olds: list[BlockState], news: list[BlockState], message_bytes: int) -> list:
    """Execute all ranks in threads; a rank's result is what it moved, or its exception."""
    hub, results = ThreadHub(world), [None] * world

    def rank_main(rank: int) -> None:
        try:
            transport = ThreadTransport(hub, rank, timeout_seconds=20)
            results[rank] = execute(plans[rank], olds[rank], news[rank], transport, message_bytes=message_bytes)
        except Exception as e:
            results[rank] = e

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


_LAYOUTS = [
    (1, {}, {}),
    (4, {"expert": 2}, {"expert": 4}),
    (4, {"expert": 4}, {"expert": 4}),
    (4, {"tensor": 2, "expert": 2}, {"tensor": 1, "expert": 4}),
    (4, {"tensor": 2, "expert_tensor": 2, "expert": 2}, {"tensor": 4, "expert": 2}),
    (8, {"expert": 2}, {"expert": 8}),
    (8, {"context": 2, "tensor": 2, "expert": 4}, {"context": 2, "expert": 2, "expert_tensor": 2}),
    (8, {"expert": 4}, {"expert": 2}),
]


def _parents(kind: str, seed: int) -> list[int]:
    if kind == "same":
        return list(range(E))
    if kind in ("m2", "m3", "m4"):
        return [e for e in range(E) for _ in range(int(kind[1]))]
    draw = random.Random(seed)
    extra = [draw.randrange(E) for _ in range(E)]
    new = [*range(E), *extra]
    if kind == "sorted":
        return sorted(new)
    draw.shuffle(new)
    return new


_KINDS = ["same", "m2", "m4", "sorted", "shuffled"]


@pytest.mark.parametrize(
    ("case", "kind"),
    [(c, k) for c in range(len(_LAYOUTS)) for k in _KINDS if (k, _LAYOUTS[c][2].get("expert")) != ("same", 8)],
)
@pytest.mark.parametrize("distributed", [True, False], ids=["zero1", "plain"])
def test_every_element_arrives_once(case: int, kind: str, distributed: bool) -> None:
    world, before, after = _LAYOUTS[case]
    parents = _parents(kind, seed=case)
    small, large = _tensors(E), _tensors(len(parents))
    old_config, new_config = ParallelConfig(**before), ParallelConfig(**after)
    old = {r: describe_rank(r, world, old_config, small, distributed=distributed) for r in range(world)}
    new = {r: describe_rank(r, world, new_config, large, distributed=distributed) for r in range(world)}

    def rows(key: str) -> list[int] | None:
        return parents if "router" in key or "experts" in key else None

    whole = _whole(small)
    expected = {k: v[parents] if rows(k) else v for k, v in whole.items()}
    plans = [plan_rank(r, old, new, rows, _wave, ranks_per_node=4) for r in range(world)]
    olds = [BlockState(old[r], whole) for r in range(world)]
    news = [BlockState(new[r]) for r in range(world)]
    moved = _run(world, plans, olds, news, message_bytes=256)
    for result in moved:
        assert isinstance(result, Moved), result
    for rank in range(world):
        assert olds[rank].blocks == {}, "the old state was not let go wave by wave"
        for key, blocks in news[rank].blocks.items():
            for box, block in blocks:
                assert torch.equal(block, expected[key][_slices(box)]), (rank, key, box)

    # Bytes: what was sent is what the plan says, what the whole-cluster view says, and the least there can be.
    pairs = traffic(old, new, rows, ranks_per_node=4)
    assert sum(m.sent_bytes for m in moved) == sum(pairs.values()) == least_bytes(old, new, rows)
    for rank in range(world):
        assert moved[rank].sent_bytes == sum(n for (a, _), n in pairs.items() if a == rank) == plans[rank].sent_bytes()
        assert plans[rank].received_bytes() == {a: n for (a, b), n in pairs.items() if b == rank}
    if before == after and kind in ("same", "m2", "m4") and not distributed:
        assert sum(pairs.values()) == 0, "uniform growth beside the parent moves nothing between ranks"


def test_least_bytes_by_counting_elements() -> None:
    """The bound itself, element by element: what a rank needs and does not hold, once."""
    world, parents = 4, _parents("shuffled", 3)
    old = {r: describe_rank(r, world, ParallelConfig(expert=2), _tensors(E)) for r in range(world)}
    new = {r: describe_rank(r, world, ParallelConfig(expert=4), _tensors(2 * E)) for r in range(world)}

    def rows(key: str) -> list[int] | None:
        return parents if "router" in key or "experts" in key else None

    whole = _whole(_tensors(E))
    total = 0
    for rank in range(world):
        for key, holding in new[rank].items():
            numbers = torch.arange(whole[key].numel()).view(whole[key].shape)
            there = numbers[parents] if rows(key) else numbers
            need = {int(x) for box in holding.boxes for x in there[_slices(box)].flatten()}
            have = old[rank].get(key, Holding(0, ())).boxes
            total += holding.itemsize * len(need - {int(x) for box in have for x in numbers[_slices(box)].flatten()})
    assert least_bytes(old, new, rows) == total > 0


def _work(world: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Comparisons of boxes when one rank of a cluster plans the doubling of experts that are parameters of their own."""
    config = ParallelConfig(expert=8)
    sides = []
    for count in (experts, 2 * experts):
        tensors = [LogicalTensor("experts.0", (count, 16, 12), 2, expert=True, separate=True)]
        sides.append({r: describe_rank(r, world, config, tensors) for r in range(world)})
    parents = [e for e in range(experts) for _ in range(2)]
    random.Random(0).shuffle(parents)
    calls = 0

    def counted(a: Box, b: Box) -> Box | None:
        nonlocal calls
        calls += 1
        return intersect(a, b)

    with monkeypatch.context() as patch:
        # `subtract` compares by it as well.
        patch.setattr(reshard_plan, "intersect", counted)
        patch.setattr(regions, "intersect", counted)
        plan = plan_rank(0, *sides, lambda key: parents, _wave)
    # Of the weight and three states, all of which this rank holds a part of.
    assert plan.waves and calls > 4 * 2 * experts // 8
    return calls


def test_work_grows_with_what_a_rank_holds_not_with_the_square_nor_with_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole job waits while its ranks plan: it was minutes on 512 ranks."""
    base = _work(16, 64, monkeypatch)
    # The square would be sixteen times as much.
    assert _work(16, 256, monkeypatch) < 8 * base
    assert _work(64, 64, monkeypatch) < 1.5 * base


def test_a_failing_rank_does_not_leave_the_others_waiting() -> None:
    world, parents = 4, _parents("shuffled", 5)
    old = {r: describe_rank(r, world, ParallelConfig(expert=4), _tensors(E)) for r in range(world)}
    new = {r: describe_rank(r, world, ParallelConfig(expert=4), _tensors(2 * E)) for r in range(world)}
    whole = _whole(_tensors(E))

    def rows(key: str) -> list[int] | None:
        return parents if "router" in key or "experts" in key else None

    class Broken(BlockState):
        def begin(self, wave: Wave) -> None:
            if wave == (1, 0):
                raise MemoryError("no memory left")

    plans = [plan_rank(r, old, new, rows, _wave) for r in range(world)]
    olds = [BlockState(old[r], whole) for r in range(world)]
    news = [Broken(new[r]) if r == 2 else BlockState(new[r]) for r in range(world)]
    results = _run(world, plans, olds, news, message_bytes=1 << 20)
    assert isinstance(results[2], MemoryError)
    assert all(isinstance(results[r], Moved) for r in (0, 1, 3))
    # What it had not begun is still there.
    assert olds[2].ended == [(0,)]


def test_state_that_nobody_holds_is_named() -> None:
    tensors = _tensors(E)
    old = {0: describe_rank(0, 1, ParallelConfig(), tensors[1:])}
    new = {0: describe_rank(0, 1, ParallelConfig(), tensors)}
    with pytest.raises(ExpansionError, match=r"needs weight/norm\.0 at \(0,\) .* no rank holds it"):
        plan_rank(0, old, new, lambda key: None, _wave)
