"""The training stream: shares, epochs and changed blends, without any data."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from train.data.sample_order import PATTERN, Blend, SampleOrder, blend_of, continued

_NAMES = "abcde"
_parts = st.lists(st.floats(0.05, 20), min_size=1, max_size=5).map(
    lambda weights: [(name, weight, name.upper()) for name, weight in zip(_NAMES, weights, strict=False)]
)
# Lengths of blends, and what each is made of.
_courses = st.lists(st.tuples(st.integers(1, 400), _parts), min_size=1, max_size=4)


def _order(course: list[tuple[int, list[tuple[str, float, str]]]]) -> tuple[SampleOrder, int]:
    blends: list[Blend] = []
    here = 0
    for length, parts in course:
        blends = continued(blends, blend_of(here, parts))
        here += length
    return SampleOrder(blends), here


@settings(max_examples=40, deadline=None)
@given(_courses)
def test_each_corpus_is_read_in_order_without_gaps_through_every_change(course: list) -> None:
    order, end = _order(course)
    drawn: Counter[str] = Counter()
    for sample in range(end):
        corpus, position = order.place(sample)
        # The next one of its corpus: none twice, none left out.
        assert position == drawn[corpus]
        drawn[corpus] += 1
    assert {key: n for key, n in order.drawn(end).items() if n} == dict(drawn)


@settings(max_examples=20, deadline=None)
@given(_parts, st.integers(1, 2000))
def test_shares_are_kept_at_every_length(parts: list, length: int) -> None:
    blend = blend_of(0, parts)
    counts = SampleOrder([blend]).drawn(length)
    for share in blend.shares:
        # mcore's rule leaves no corpus further behind than the number of corpora.
        assert abs(counts[share.fingerprint] - share.weight * length) <= len(parts)


@pytest.mark.parametrize("sample", [PATTERN - 1, PATTERN, PATTERN + 12345, 7 * PATTERN + 3])
def test_far_places_follow_from_the_pattern(sample: int) -> None:
    order = SampleOrder([blend_of(0, [("a", 0.7, ""), ("b", 0.2, ""), ("c", 0.1, "")])])
    corpus, position = order.place(sample)
    assert position == order.drawn(sample)[corpus]
    assert order.drawn(sample + 1)[corpus] == position + 1
    assert sum(order.drawn(sample).values()) == sample


def test_the_order_of_the_list_does_not_matter() -> None:
    one, other = (blend_of(0, parts) for parts in ([("a", 1, ""), ("b", 3, "")], [("b", 6, ""), ("a", 2, "")]))
    assert one == other and one.difference(other) is None


def test_a_blend_that_stays_is_no_change() -> None:
    known = [blend_of(0, [("a", 1, "")])]
    assert continued(known, blend_of(80, [("a", 5, "moved")])) == known
    changed = continued(known, blend_of(80, [("a", 1, ""), ("b", 1, "")]))
    assert [blend.first_sample for blend in changed] == [0, 80]
    # Changed again before a sample was drawn: the one in between never was.
    assert [b.first_sample for b in continued(changed, blend_of(80, [("b", 1, "")]))] == [0, 80]


def test_differences_are_named() -> None:
    known = blend_of(0, [("aaaa", 1, "A"), ("bbbb", 1, "B")])
    assert "corpus B (fingerprint bbbb) is not in it" in str(known.difference(blend_of(0, [("aaaa", 1, "A")])))
    assert "corpus C" in str(known.difference(blend_of(0, [("aaaa", 1, "A"), ("bbbb", 1, "B"), ("cccc", 1, "C")])))
    assert "was 0.5 and is 0.25" in str(known.difference(blend_of(0, [("aaaa", 1, "A"), ("bbbb", 3, "B")])))


def test_a_share_below_one_sample_of_the_pattern_is_refused() -> None:
    blend = blend_of(0, [("a", 1e9, "A"), ("b", 1, "B")])
    with pytest.raises(ConfigError, match=r"data\.blend\[1\]\.weight is a share of 1\.0e-09"):
        blend.refuse_tiny_shares({"a": "data.blend[0].weight", "b": "data.blend[1].weight"})


def test_a_blend_survives_json() -> None:
    blend = blend_of(16, [("a", 1, "A"), ("b", 2, "B")])
    assert Blend.from_dict(blend.to_dict()) == blend
