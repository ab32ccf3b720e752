"""Verification after an expansion finds what it is there to find."""

import dataclasses

import pytest

from parallel.errors import ExpansionError
from upcycle.plan import ExpansionPlan, LayerPlan
from upcycle.verify import verify_expansion

_EXPERTS = {
    "w": {"layer": 1, "kind": "expert"},
    "router": {"layer": 1, "kind": "router"},
    "bias": {"layer": 1, "kind": "selection_bias"},
}
_PLAN = ExpansionPlan(3, 1, 2, 3, (LayerPlan(1, (0, 1, 1), (1, 2)),), bias_noise=1e-3)
_STATES = ("weight", "param", "exp_avg", "exp_avg_sq")
_BEFORE = {
    **{f"{state}/w": [5 + i, 7 + i] for i, state in enumerate(_STATES)},
    **{f"{state}/router": [3 + i, 4 + i] for i, state in enumerate(_STATES)},
    **{f"{state}/dense": [6 + i] for i, state in enumerate(_STATES)},
    "weight/bias": [8, 9],
}
_AFTER = {
    **{f"{state}/w": [5 + i, 7 + i, 7 + i] for i, state in enumerate(_STATES)},
    **{f"{state}/router": [3 + i, 4 + i, 4 + i] for i, state in enumerate(_STATES)},
    **{f"{state}/dense": [6 + i] for i, state in enumerate(_STATES)},
    "weight/bias": [8, 9, 77],
}


def test_a_right_expansion_passes() -> None:
    # 2 x 3 rows and a dense tensor, four states each, and the selection bias of both originals; a noised one is free.
    assert verify_expansion(_BEFORE, _AFTER, _PLAN, _EXPERTS) == 4 * 7 + 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight/w", [5, 7, 8], "expert 2 of weight/w differs from its parent"),
        ("exp_avg/w", [7, 9, 0], "expert 2 of exp_avg/w differs"),
        ("weight/router", [4, 3, 4], "expert 0 of weight/router"),
        ("weight/dense", [0], "weight/dense differs"),
        ("weight/bias", [8, 0, 77], "expert 1 of weight/bias"),
        ("weight/w", [5, 7], "expert 2 of weight/w"),
        ("param/w", None, "param/w is gone"),
        ("exp_avg/w", None, "exp_avg/w is gone"),
        ("exp_avg_sq/dense", None, "exp_avg_sq/dense is gone"),
        ("weight/more", [1], "weight/more appeared from nowhere"),
    ],
)
def test_anything_lost_or_changed_is_named(name: str, value: list[int] | None, message: str) -> None:
    after = {**_AFTER, name: value}
    if value is None:
        del after[name]
    with pytest.raises(ExpansionError, match=message):
        verify_expansion(_BEFORE, after, _PLAN, _EXPERTS)


@pytest.mark.parametrize("name", ["param/w", "exp_avg/dense", "exp_avg_sq/router", "weight/dense"])
def test_a_state_that_was_missing_before_already_is_named(name: str) -> None:
    before = {k: v for k, v in _BEFORE.items() if k != name}
    after = {k: v for k, v in _AFTER.items() if k != name}
    state, key = name.split("/")
    with pytest.raises(ExpansionError, match=f"{key} has no {state}, before and after"):
        verify_expansion(before, after, _PLAN, _EXPERTS)


def test_before_the_first_step_there_are_no_moments() -> None:
    before = {k: v for k, v in _BEFORE.items() if not k.startswith("exp_")}
    after = {k: v for k, v in _AFTER.items() if not k.startswith("exp_")}
    assert verify_expansion(before, after, _PLAN, _EXPERTS) == 2 * 7 + 2


def test_without_noise_the_selection_bias_is_compared_too() -> None:
    plan = dataclasses.replace(_PLAN, bias_noise=0.0)
    with pytest.raises(ExpansionError, match="expert 2 of weight/bias"):
        verify_expansion(_BEFORE, _AFTER, plan, _EXPERTS)


# Families that are not side by side: 0 -> {2, 3}, 1 -> {0, 1}; the lowest id of each is the original.
_SPREAD = dataclasses.replace(
    _PLAN, experts_after=5, layers=(LayerPlan(1, (1, 1, 0, 0, 1), (2, 3)),), bias_noise=1e-3
)  # fmt: skip


def _spread(before: list[int]) -> list[int]:
    return [before[1], before[1], before[0], before[0], before[1]]


def test_parents_come_in_any_order() -> None:
    after = {k: _spread(v) if len(v) > 1 else v for k, v in _BEFORE.items()}
    after["weight/bias"] = [9, 70, 8, 71, 72]
    # The bias of new 1, 3 and 4 is noised, that of 0 and 2 is their parent's.
    assert verify_expansion(_BEFORE, after, _SPREAD, _EXPERTS) == 4 * 11 + 2
    with pytest.raises(ExpansionError, match="expert 2 of weight/bias"):
        verify_expansion(_BEFORE, {**after, "weight/bias": [9, 70, 71, 8, 72]}, _SPREAD, _EXPERTS)
    with pytest.raises(ExpansionError, match="expert 4 of exp_avg/w"):
        verify_expansion(_BEFORE, {**after, "exp_avg/w": [9, 9, 7, 7, 7]}, _SPREAD, _EXPERTS)


def test_what_was_reset_must_be_zero_in_replicas_and_nowhere_else() -> None:
    after = {k: _spread(v) if len(v) > 1 else v for k, v in _BEFORE.items()} | {"weight/bias": [9, 0, 8, 0, 0]}
    after |= {"exp_avg/w": [9, 0, 7, 0, 0], "exp_avg/router": [6, 0, 5, 0, 0]}
    plan = dataclasses.replace(_SPREAD, optimizer_rule="reset_momentum")
    assert verify_expansion(_BEFORE, after, plan, _EXPERTS) == 4 * 11 + 2
    with pytest.raises(ExpansionError, match="expert 1 of exp_avg/w differs from its parent"):
        verify_expansion(_BEFORE, after, _SPREAD, _EXPERTS)
    for row, message in (
        (3, "expert 3 of exp_avg/w is not zero"),
        (2, "expert 2 of exp_avg/w differs from its parent"),
    ):
        wrong = list(after["exp_avg/w"])
        wrong[row] = 5
        with pytest.raises(ExpansionError, match=message):
            verify_expansion(_BEFORE, {**after, "exp_avg/w": wrong}, plan, _EXPERTS)
    gone = {k: v for k, v in after.items() if k != "exp_avg/w"}
    with pytest.raises(ExpansionError, match="exp_avg/w is gone"):
        verify_expansion(_BEFORE, gone, plan, _EXPERTS)


def test_scaled_moments_are_not_compared_and_a_reset_of_all_reaches_dense_ones() -> None:
    after = {k: _spread(v) if len(v) > 1 else v for k, v in _BEFORE.items()} | {"weight/bias": [9, 0, 8, 0, 0]}
    scaled = dataclasses.replace(_SPREAD, optimizer_rule="scale")
    # Three replicas in two tensors and two moments.
    assert verify_expansion(_BEFORE, after | {"exp_avg/w": [9, 1, 7, 2, 3]}, scaled, _EXPERTS) == 4 * 11 + 2 - 12
    zeros = {k: [0] * len(v) for k, v in after.items() if k.startswith("exp_")}
    everything = dataclasses.replace(_SPREAD, optimizer_rule="reset", optimizer_scope="all")
    assert verify_expansion(_BEFORE, after | zeros, everything, _EXPERTS) == 4 * 11 + 2
    with pytest.raises(ExpansionError, match="exp_avg/dense is not zero"):
        verify_expansion(_BEFORE, after | zeros | {"exp_avg/dense": [8]}, everything, _EXPERTS)
