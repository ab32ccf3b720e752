"""Bounds on epochs and a schedule of blends, without any data: every place follows from counts alone."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import DataError
from train.data.blends import (
    Phase,
    Position,
    changed,
    refuse_used_up,
    resolved_table,
    stream_blends,
    table_lines,
)
from train.data.sample_order import Blend, SampleOrder, Share, normalised
from train.health import beyond


def _shares(**parts: tuple[float, int | None]) -> tuple[Share, ...]:
    return normalised(Share(key, weight, key.upper(), most) for key, (weight, most) in parts.items())


def _at(step: int, sample: int | None = None, batch: int = 10, skipped: tuple[tuple[int, int], ...] = ()) -> Position:
    sample = step * batch if sample is None else sample
    return Position(step, sample, sample * 32, batch, batch * 32, skipped)


_bounds = st.one_of(st.none(), st.integers(1, 200))
_blend = st.lists(st.tuples(st.floats(0.1, 10), _bounds), min_size=1, max_size=4).map(
    lambda parts: _shares(**dict(zip("abcd", parts, strict=False)))
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 150), _blend), min_size=1, max_size=3))
def test_bounds_are_kept_and_nothing_is_left_out(course: list[tuple[int, tuple[Share, ...]]]) -> None:
    blends, here, ends = [], 0, []
    for length, shares in course:
        blends.append(Blend(here, shares))
        here += length
        ends.append(here)
    order = SampleOrder(blends)
    stop = here if order.used_up_at is None else min(here, order.used_up_at)
    drawn: Counter[str] = Counter()
    for sample in range(stop):
        blend = max(i for i, b in enumerate(blends) if b.first_sample <= sample)
        corpus, position = order.place(sample)
        share = next(s for s in blends[blend].shares if s.fingerprint == corpus)
        assert position == drawn[corpus] and (share.most is None or position < share.most)
        drawn[corpus] += 1
    assert {key: n for key, n in order.drawn(stop).items() if n} == dict(drawn)
    if stop < here:
        # It says so only where it is so.
        blend = max(i for i, b in enumerate(blends) if b.first_sample <= stop)
        assert all(s.most is not None and drawn[s.fingerprint] >= s.most for s in blends[blend].shares)


def test_the_share_of_what_is_used_up_goes_to_the_others_by_their_weights() -> None:
    order = SampleOrder([Blend(0, _shares(a=(2, 50), b=(1, None), c=(1, None)))])
    assert len(order.pieces) == 2
    end = order.pieces[1].first_sample
    # Its share was a half; mcore's rule leaves nothing further off than the number of corpora.
    assert abs(end - 100) <= 3
    assert order.drawn(end)["a"] == 50 and order.place(end - 1)[0] == "a"
    later = order.drawn(end + 1000)
    assert later["a"] == 50 and later["b"] - order.drawn(end)["b"] == later["c"] - order.drawn(end)["c"] == 500
    assert order.used_up_at is None


def test_a_run_that_would_outlast_its_corpora_is_refused_with_the_step() -> None:
    order = SampleOrder([Blend(0, _shares(a=(1, 30), b=(1, 25)))])
    assert order.used_up_at == 55
    refuse_used_up(order, _at(0), 5)
    with pytest.raises(
        DataError, match=r"\(A, B\) has made its max_epochs at step 6, before run\.steps=6: raise max_epochs"
    ):
        refuse_used_up(order, _at(0), 6)
    # What is left out is passed over: the run gets there sooner.
    with pytest.raises(DataError, match="at step 4, before"):
        refuse_used_up(order, _at(0, skipped=((12, 20),)), 5)
    # Who reads ahead can.
    assert order.place(60)[0] in "ab"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 120), st.integers(1, 30)), max_size=3),
    st.integers(0, 15),
)
def test_a_position_counts_as_the_loop_does(sample: int, batch: int, skipped: list, steps: int) -> None:
    here = Position(7, sample, 0, batch, batch * 32, tuple(skipped))
    at = sample
    for step in range(steps):
        assert here.sample_at(7 + step) == at
        at = beyond(at, batch, skipped) + batch
    assert here.sample_at(7 + steps) == at


A, B, C = _shares(a=(1, None)), _shares(a=(1, None), b=(1, 40)), _shares(b=(1, None), c=(1, None))
PHASES = [Phase(A), Phase(B, at_step=4), Phase(C, at_stage=1), Phase(A, at_tokens=3200 * 2)]


def test_phases_begin_where_they_say() -> None:
    blends = stream_blends(PHASES, [], _at(0), [9])
    assert [(b.first_sample, b.shares) for b in blends] == [(0, A), (40, B), (90, C), (200, A)]
    # A stage that comes late does not take over what is listed after it, one that nobody knows of never begins.
    assert [b.first_sample for b in stream_blends(PHASES, [], _at(0), [25])] == [0, 40, 200]
    assert [b.first_sample for b in stream_blends(PHASES, [], _at(0), [])] == [0, 40, 200]
    # An expansion on request begins its stage where the run stands.
    assert [b.first_sample for b in stream_blends(PHASES, blends, _at(7), [7])] == [0, 40, 70, 200]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=3), st.integers(1, 30))
def test_a_stream_is_the_same_wherever_it_was_resumed(stops: list[int], stage_step: int) -> None:
    whole = stream_blends(PHASES, [], _at(0), [stage_step])
    known: list[Blend] = []
    for step in [0, *sorted(stops)]:
        # A stage that was entered keeps its step.
        known = [Blend.from_dict(b.to_dict()) for b in stream_blends(PHASES, known, _at(step), [stage_step])]
    assert stream_blends(PHASES, known, _at(30), [stage_step]) == whole
    places = SampleOrder(whole).place, SampleOrder(known).place
    assert [places[0](n) for n in range(300)] == [places[1](n) for n in range(300)]


def test_steps_keep_their_meaning_with_another_batch() -> None:
    known = stream_blends(PHASES, [], _at(0), [9])
    later = stream_blends(PHASES, known, _at(2, 20, batch=5), [9])
    assert [b.first_sample for b in later] == [0, 30, 55, 200]


def test_changes_are_named() -> None:
    assert changed(PHASES, [Phase.from_dict(p.to_dict()) for p in PHASES]) is None
    moved = [PHASES[0], Phase(B, at_step=5), *PHASES[2:]]
    assert changed(PHASES, moved) == "a blend of data.schedule began at at_step=4 and begins at at_step=5"
    assert changed(PHASES, PHASES[:3]) == "the blend at at_tokens=6400 is not in data.schedule any more"
    assert changed(PHASES[:3], PHASES) == "the blend at at_tokens=6400 is new in data.schedule"
    bound = [PHASES[0], Phase(_shares(a=(1, None), b=(1, 50)), at_step=4), *PHASES[2:]]
    assert changed(PHASES, bound) == (
        "in the blend of data.schedule at at_step=4 max_epochs of corpus B meant at most 40 samples and means at most 50 samples"
    )


def test_the_table_adds_up() -> None:
    blends = stream_blends(
        [Phase(normalised([Share("a", 1, "A", 30), Share("b", 3, "B", None, True)]))], [], _at(0), []
    )
    order = SampleOrder([*blends, Blend(300, C)])
    rows = resolved_table(order, _at(2), 40, {"a": (6401, 20), "b": (3201, 100), "c": (6401, 200)})
    assert sum(row["tokens"] for row in rows) == 380 * 32
    assert [(row["first_step"], row["last_step"]) for row in rows] == [(3, 11), (12, 30), (31, 40)]
    assert all(sum(s["tokens_drawn"] for s in row["sources"]) == row["tokens"] for row in rows)
    (a, b), (used_up, rest) = rows[0]["sources"], rows[1]["sources"]
    assert (a["epochs_before"], a["epochs_after"]) == (0.25, 1.5) and not a["used_up"]
    assert used_up["used_up"] and used_up["share"] == 0 and rest["share"] == 1 and b["replay"]
    lines = table_lines(rows)
    # The 30th of a corpus with a quarter of the samples is number 117, in the middle of step 12.
    assert lines[0] == f"data, steps 3 to 11: {(117 - 20) * 32:,} tokens, replay 75.0%"
    assert lines[2].endswith("replay") and lines[4].endswith("max_epochs reached")
