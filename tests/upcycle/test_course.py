"""The course of a run: what a past, a configuration and requests make together, and what is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError, ExpansionError
from tests.upcycle import plans as _profile  # noqa: F401 - lifts hypothesis' deadline
from upcycle.course import Course, Entry, Past, plan_course, require_released
from upcycle.stage_config import StageConfig, StageParallel


def _configured(stage: StageConfig, number: int = 0) -> Entry:
    return Entry(stage, "configured", f"upcycle.stages[{number}]")


def _past(first: int, entries: list[Entry], *, step: int) -> Past:
    experts = [first]
    for entry in entries:
        experts.append(entry.rules.target(experts[-1]))
    steps = tuple(entry.rules.at_step for entry in entries)
    return Past("runs/a/checkpoints/x", step, tuple(experts), tuple(entries), steps)


def test_a_fresh_run_follows_its_configuration() -> None:
    stages = [StageConfig(at_step=3, factor=2), StageConfig(at_step=9, parallel=StageParallel(expert=2))]
    course = plan_course(stages, 8)
    assert course.stages == stages and course.begun == 0 and course.first_experts == 8
    assert course.keys == ["upcycle.stages[0]", "upcycle.stages[1]"]


def test_entries_survive_json() -> None:
    entry = _configured(StageConfig(at_step=3, num_experts=12, selection="greedy", parallel=StageParallel(expert=4)))
    assert Entry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry


def test_requests_stand_between_configured_stages() -> None:
    first, last = StageConfig(at_step=3, factor=2), StageConfig(at_step=20, factor=2)
    request = Entry(StageConfig(at_step=7, factor=3), "requested", "request-1")
    past = _past(8, [_configured(first), request], step=10)
    course = plan_course([first, last], 8, past)
    assert [e.origin for e in course.entries] == ["configured", "requested", "configured"]
    assert course.begun == 2 and course.stages == [first, request.rules, last]
    # Gone back to before the request: it is repeated where it was.
    again = plan_course([first, last], 8, _past(8, [_configured(first)], step=5), requests=[request])
    assert again.stages == course.stages and again.begun == 1


def test_what_the_guard_returned_from_is_left_out() -> None:
    stages = [StageConfig(at_step=3, factor=2), StageConfig(at_step=20, factor=2)]
    past = _past(8, [_configured(stages[0])], step=10)
    assert plan_course(stages, 8, past, held_from=20).stages == stages[:1]
    assert plan_course(stages, 8, past, held_from=20).held == (_configured(stages[1], 1),)
    # Growing on load is held back as well, and its checkpoint goes on as it is.
    small = _past(8, [], step=10)
    course = plan_course([], 16, small, on_load=StageConfig(), held_from=10)
    assert course.stages == [] and course.first_experts == 8
    # A request that came after the return holds.
    request = Entry(StageConfig(at_step=30, factor=3), "requested", "request-1")
    assert plan_course(stages, 8, past, held_from=20, requests=[request]).stages == [stages[0], request.rules]


def test_a_checkpoint_of_fewer_experts_grows_on_load() -> None:
    rules = StageConfig(selection="greedy")
    past = _past(8, [_configured(StageConfig(at_step=3, factor=2, parallel=StageParallel(expert=2)))], step=10)
    coming = [StageConfig(at_step=15, factor=2)]
    course = plan_course(coming, 48, past, on_load=rules, expert_ranks=32)
    assert course.first_experts == 8 and course.begun == 1
    # The checkpoint's own stage: no layout of its own, on as many ranks as divide its experts.
    assert course.stages[0].parallel == StageParallel() and course.expert_ranks == 16
    grown = course.entries[1]
    assert (grown.origin, grown.rules.at_step, grown.rules.num_experts) == ("on_load", 10, 48)
    assert grown.rules.selection == "greedy" and grown.rules.parallel == StageParallel(expert=32)
    assert course.stages[2] == coming[0]
    # Later the same configuration begins its story after it.
    later = _past(8, [course.entries[0], grown], step=12)
    assert later.experts == (8, 16, 48)
    again = plan_course(coming, 48, later, on_load=rules, expert_ranks=32)
    assert again.begun == 2 and again.stages[2] == coming[0] and again.expert_ranks is None
    assert again.stages[1].parallel == StageParallel()


def test_growing_on_load_must_be_meant() -> None:
    past = _past(8, [], step=10)
    with pytest.raises(ConfigError, match=r"model\.num_experts was 8 there and is 16 here.*run\.resume=runs/a"):
        plan_course([], 16, past)
    with pytest.raises(
        ConfigError, match=r"model\.num_experts was 8 there and is 4 here: choose another run\.dir, or the s"
    ):
        plan_course([], 4, past, on_load=StageConfig())


@pytest.mark.parametrize("origin", ["configured", "offline"])
def test_an_offline_expansion_fits_either_way_of_telling_it(origin: str) -> None:
    """Listed as a stage of the smaller model, left out of its list, or as the size of a larger model."""
    stage = StageConfig(at_step=5, factor=2)
    past = _past(8, [Entry(replace(stage, factor=None, num_experts=16), origin, "the stage")], step=7)
    coming = StageConfig(at_step=9, factor=2)
    listed = plan_course([stage, coming], 8, past)
    assert listed.stages == [stage, coming] and listed.begun == 1
    if origin == "offline":
        assert [s.num_experts for s in plan_course([coming], 8, past).stages] == [16, None]
        assert plan_course([coming], 16, past).stages[1] == coming
    else:
        with pytest.raises(
            ConfigError, match=r"stages\[0\] gives 16 experts after step 9, but .* 16 experts after step 5"
        ):
            plan_course([coming], 8, past)


def test_the_past_cannot_be_changed() -> None:
    stage = StageConfig(at_step=5, factor=2)
    past = _past(8, [_configured(stage)], step=7)
    with pytest.raises(ConfigError, match=r"ends before a stage that is over.*16 experts after step 5"):
        plan_course([], 8, past)
    with pytest.raises(
        ConfigError, match=r"stages\[0\] gives 24 experts after step 5, but .*past expansions cannot be"
    ):
        plan_course([replace(stage, factor=3)], 8, past)
    with pytest.raises(ConfigError, match=r"stages\[0\]\.mode=exact, but .* expanded with mode=plain"):
        plan_course([replace(stage, mode="exact")], 8, past)
    with pytest.raises(ConfigError, match=r"stages\[1\]\.at_step=6 lies before checkpoint .* \(step 7\)"):
        plan_course([stage, StageConfig(at_step=6, factor=2)], 8, past)


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(0, 500))
def test_tokens_mean_the_first_boundary_that_has_seen_them(at_tokens: int, per_step: int, step: int) -> None:
    stage = StageConfig(at_tokens=at_tokens, factor=2)
    resolved = stage.resolved(step, step * per_step, per_step).at_step
    assert resolved * per_step >= at_tokens > (resolved - 1) * per_step
    # Resolved anywhere on the way, it is the same step; with another batch size from here on, the tokens still count.
    assert resolved == stage.resolved(0, 0, per_step).at_step
    twice = stage.resolved(step, step * per_step, 2 * per_step).at_step
    assert step * per_step + (twice - step) * 2 * per_step >= at_tokens


def test_a_stage_by_tokens_is_known_again_when_the_batch_has_changed() -> None:
    stage = StageConfig(at_tokens=1000, factor=2)
    past = _past(8, [_configured(replace(stage, at_step=5))], step=7)
    course = plan_course([replace(stage, at_step=99)], 8, past)
    assert course.begun == 1 and course.stages[0].at_step == 5


def test_what_needs_plain_routing_waits_for_the_release() -> None:
    stage = StageConfig(at_step=5, factor=2, mode="exact", release_hold_steps=10, release_steps=20)
    entries = [_configured(stage), _configured(StageConfig(at_step=6, parallel=StageParallel(expert=2)))]
    with pytest.raises(
        ExpansionError, match=r"ckpt still routes .*step 30, released at step 35\): exporting .* to step 35"
    ):
        require_released(entries, 30, "ckpt", "exporting")
    require_released(entries, 35, "ckpt", "exporting")
    require_released([], 3, "ckpt", "exporting")


def test_a_course_changes_only_by_copies() -> None:
    course = Course(8, (_configured(StageConfig(at_step=9, factor=2)),))
    request = Entry(StageConfig(at_step=4, factor=2), "requested", "r")
    more = course.with_next(request)
    assert more.entries[0] == request and len(course.entries) == 1
    assert more.entered().begun == 1 and more.entered().cut(0) == Course(8, (), 0)
