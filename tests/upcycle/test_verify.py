"""Verification after an expansion finds what it is there to find."""

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
_BEFORE = {"weight/w": [5, 7], "exp_avg/w": [1, 2], "weight/router": [3, 4], "weight/bias": [8, 9], "weight/dense": [6]}
_AFTER = {
    "weight/w": [5, 7, 7], "exp_avg/w": [1, 2, 2], "weight/router": [3, 4, 4], "weight/bias": [8, 9, 77],
    "weight/dense": [6],
}  # fmt: skip


def test_a_right_expansion_passes() -> None:
    # 3 + 3 + 3 rows, one dense tensor, and the selection bias of both originals; the noised replica's is free.
    assert verify_expansion(_BEFORE, _AFTER, _PLAN, _EXPERTS) == 12


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight/w", [5, 7, 8], "expert 2 of weight/w differs from its parent"),
        ("exp_avg/w", [1, 2, 0], "expert 2 of exp_avg/w differs"),
        ("weight/router", [4, 3, 4], "expert 0 of weight/router"),
        ("weight/dense", [0], "weight/dense differs"),
        ("weight/bias", [8, 0, 77], "expert 1 of weight/bias"),
        ("weight/w", [5, 7], "expert 2 of weight/w"),
        ("exp_avg/w", None, "exp_avg/w is gone"),
        ("weight/more", [1], "weight/more appeared from nowhere"),
    ],
)
def test_anything_lost_or_changed_is_named(name: str, value: list[int] | None, message: str) -> None:
    after = {**_AFTER, name: value}
    if value is None:
        del after[name]
    with pytest.raises(ExpansionError, match=message):
        verify_expansion(_BEFORE, after, _PLAN, _EXPERTS)


def test_without_noise_the_selection_bias_is_compared_too() -> None:
    plan = ExpansionPlan(3, 1, 2, 3, (LayerPlan(1, (0, 1, 1), (1, 2)),), bias_noise=0.0)
    with pytest.raises(ExpansionError, match="expert 2 of weight/bias"):
        verify_expansion(_BEFORE, _AFTER, plan, _EXPERTS)
