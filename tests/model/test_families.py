"""Who stands for a family, how ties split, and the schedule of the release: pure functions, without a model."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.families import TIE, Families, sequence_positions
from model.release import SHAPES, ReleaseSchedule
from parallel.errors import ConfigError, ExpansionError


@st.composite
def _parents(draw: st.DrawFn) -> list[int]:
    """Parents of all experts, in any order, every parent at least once."""
    count = draw(st.integers(1, 9))
    extra = draw(st.lists(st.integers(0, count - 1), max_size=12))
    return draw(st.permutations([*range(count), *extra]))


def _families(parents: list[int], layer: int = 1) -> Families:
    return Families(parents, layer, torch.device("cpu"))


@settings(max_examples=150, deadline=None)
@given(_parents(), st.integers(1, 7), st.integers(1, 3), st.integers(0, 10**6))
def test_representative_is_the_best_member(parents: list[int], length: int, batch: int, seed: int) -> None:
    selection = torch.rand(length, batch, len(parents), generator=torch.Generator().manual_seed(seed))
    families = _families(parents)
    chosen_TE = families.representatives(selection)
    assert chosen_TE.shape == (length * batch, max(parents) + 1)
    for token, row in enumerate(chosen_TE.tolist()):
        scores = selection.view(-1, len(parents))[token].tolist()
        for parent, expert in enumerate(row):
            assert parents[expert] == parent
            assert scores[expert] >= max(s for s, p in zip(scores, parents, strict=True) if p == parent) - TIE


@settings(max_examples=100, deadline=None)
@given(_parents(), st.integers(1, 60), st.integers(0, 50), st.integers(0, 10**6))
def test_ties_go_by_position_and_not_by_rounding(parents: list[int], length: int, layer: int, seed: int) -> None:
    families = _families(parents, layer)
    level_SBE = torch.rand(length, 2, families.count, generator=torch.Generator().manual_seed(seed)) * 20 - 10
    tied = level_SBE[..., torch.tensor(parents)]
    chosen = families.representatives(tied).view(length, 2, -1)
    assert torch.equal(chosen[:, 0], chosen[:, 1])  # the position counts, not the values, nor the sequence
    noise = torch.rand(tied.shape, generator=torch.Generator().manual_seed(seed + 1)) * 4 - 2
    rounded = tied + noise * 2.0**-20  # one unit in the last place of 8 to 16 is 2**-20
    assert torch.equal(families.representatives(rounded).view_as(chosen), chosen)


@pytest.mark.parametrize("members", [2, 3, 4, 7])
def test_ties_split_evenly_over_runs_and_patterns(members: int) -> None:
    families = _families([0] * members + [1])
    chosen_S = families.representatives(torch.zeros(32 * 4096, 1, members + 1))[:, 0]
    for start, tokens in itertools.product(range(0, 8000, 37), (7, 64, 200, 1000)):
        loads = torch.bincount(chosen_S[start : start + tokens], minlength=members)
        assert (loads - tokens / members).abs().max() <= 2, (start, tokens, loads)
    # Counting positions modulo the members would give one member everything at half of these periods.
    for period in range(1, 33):
        loads = torch.bincount(chosen_S[::period][:4096], minlength=members)
        assert (loads / 4096 - 1 / members).abs().max() <= 0.01, (period, loads)


def test_neighbours_in_family_and_layer_do_not_split_alike() -> None:
    splits = [_families([0, 0, 1, 1], layer).representatives(torch.zeros(256, 1, 4)) % 2 for layer in (1, 2)]
    for one, other in itertools.combinations([splits[0][:, 0], splits[0][:, 1], splits[1][:, 0]], 2):
        assert 0.1 < (one == other).float().mean() < 0.9


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (4, 1), (1, 2), (2, 2), (2, 4)])
def test_positions_of_all_ranks_are_those_of_the_sequence(tensor: int, context: int) -> None:
    length = 64 // (tensor * context)
    for c in range(context):
        mine = [sequence_positions(length, tensor=(t, tensor), context=(c, context)) for t in range(tensor)]
        together = torch.cat(mine)
        if context > 1:  # the first half ascends from c chunks in, the second mirrors it
            chunk = 64 // (2 * context)
            assert torch.equal(together[:chunk], torch.arange(chunk) + c * chunk)
            assert torch.equal(together[chunk:], torch.arange(chunk) + (2 * context - 1 - c) * chunk)
        else:
            assert torch.equal(together, torch.arange(64))


@settings(max_examples=50, deadline=None)
@given(_parents(), st.integers(0, 10**6))
def test_spread_keeps_the_total_of_a_family(parents: list[int], seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    families = _families(parents)
    values_TE = torch.rand(5, families.count, generator=noise)
    spread_TM = families.spread(values_TE, torch.rand(5, len(parents), generator=noise) + 0.01)
    torch.testing.assert_close(families.total(spread_TM), values_TE)
    even_TM = families.spread(values_TE, torch.ones(5, len(parents)))
    sizes = torch.tensor(families.sizes)
    torch.testing.assert_close(even_TM, (values_TE / sizes)[:, torch.tensor(parents)])


def test_refuses_a_parent_without_a_copy() -> None:
    with pytest.raises(ExpansionError, match="layer 3: parent 1 has no copy"):
        Families([0, 0, 2], 3, torch.device("cpu"))


@given(st.integers(1, 500), st.sampled_from(SHAPES), st.integers(0, 100))
def test_release_rises_from_zero_to_one(steps: int, shape: str, hold: int) -> None:
    schedule = ReleaseSchedule(steps, shape, hold)
    path = [schedule.fraction(step) for step in range(hold + steps + 3)]
    assert path[: hold + 1] == [0.0] * (hold + 1)
    assert path[hold + steps :] == [1.0] * 3
    assert all(0 < b < 1 and a < b for a, b in itertools.pairwise(path[hold : hold + steps]))
    assert [schedule.finished(step) for step in range(len(path))] == [part == 1.0 for part in path]
    # Half-way is half released in both shapes.
    assert schedule.fraction(hold + steps // 2) == pytest.approx(0.5) or steps % 2


def test_release_shapes_differ_where_they_should() -> None:
    linear, cosine = ReleaseSchedule(100), ReleaseSchedule(100, "cosine")
    assert linear.fraction(10) == 0.1 and cosine.fraction(10) == pytest.approx(0.0244717, rel=1e-5)
    assert linear.fraction(90) == 0.9 and cosine.fraction(90) == pytest.approx(0.9755283, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "release.steps=0 must be 1 or more"),
        ({"steps": 5, "hold_steps": -1}, "release.hold_steps=-1"),
        ({"steps": 5, "shape": "step"}, "release.shape=step is unknown: use one of linear, cosine"),
    ],
)
def test_release_refuses_bad_values(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReleaseSchedule(**values)
