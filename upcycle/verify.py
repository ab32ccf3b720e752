"""Checks after an expansion that nothing was lost or changed, before the job goes on. Always on.

Compares layout-free fingerprints of the state before and after (`model/fingerprint.py`): every copy equals its parent
bit for bit in weights, masters and moments; everything that has no expert axis is untouched; every parameter has its
master and, once there were any, both moments. Moments that the plan's optimizer rule resets must be zero; those that it
scales are not compared. That the ranks' copies of one tensor agree is checked where fingerprints are taken.
"""

from collections.abc import Mapping
from typing import Any

from model.fingerprint import Fingerprints
from parallel.errors import ExpansionError
from parallel.optimizer_state import MOMENTS
from upcycle.optimizer_rules import other_factors, row_factors
from upcycle.plan import ExpansionPlan

_REMEDY = "start the job again: it resumes from its newest checkpoint"


def expected_after(
    before: Fingerprints,
    plan: ExpansionPlan,
    experts: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[int | None]]:
    """What the fingerprints must be after the expansion; None for a selection bias with noise and for scaled moments.

    Args:
        before: fingerprints of the smaller stage.
        plan: the expansion; parents in any order.
        experts: keys with an expert axis (`model.sharded_state.expert_keys`).
    """
    expected: dict[str, list[int | None]] = {}
    for name, numbers in before.items():
        state, key = name.split("/", 1)
        if key not in experts:
            factor = other_factors(plan.rule).get(state, 1.0)
            expected[name] = [_times(number, factor) for number in numbers]
            continue
        layer = plan.layer(experts[key]["layer"])
        rows: list[int | None] = [numbers[parent] for parent in layer.parents]
        if experts[key]["kind"] == "selection_bias" and plan.bias_noise != 0:
            for new in layer.replicas():
                rows[new] = None
        elif state in MOMENTS:
            factors = row_factors(layer, plan.rule)[state]
            rows = [_times(numbers[p], factor) for p, factor in zip(layer.parents, factors, strict=True)]
        expected[name] = rows
    return expected


def _times(number: int, factor: float) -> int | None:
    """The fingerprint of rows that were multiplied: itself, that of zeros, or unknown."""
    return number if factor == 1.0 else 0 if factor == 0.0 else None


def verify_expansion(
    before: Fingerprints,
    after: Fingerprints,
    plan: ExpansionPlan,
    experts: Mapping[str, Mapping[str, Any]],
) -> int:
    """Compare the state before and after an expansion.

    Args:
        before: fingerprints of the smaller stage.
        after: fingerprints of the larger stage.
        plan: the expansion; parents in any order.
        experts: keys with an expert axis (`model.sharded_state.expert_keys`).

    Returns:
        How many numbers were compared.

    Raises:
        ExpansionError: naming the first tensor, and expert, that is not what the plan says.
    """
    expected = expected_after(before, plan, experts)
    for name, numbers in expected.items():
        found = after.get(name)
        if found is None:
            raise ExpansionError(f"after the expansion {name} is gone; {_REMEDY}")
        same = [a is None or a == b for a, b in zip(numbers, found, strict=False)]
        if not all(same) or len(found) != len(numbers):
            expert = same.index(False) if False in same else min(len(found), len(numbers))
            what = f"expert {expert} of {name}" if len(numbers) > 1 else name
            zero = expert < len(numbers) and numbers[expert] == 0
            raise ExpansionError(
                f"after the expansion {what} {'is not zero' if zero else 'differs from its parent'}; {_REMEDY}"
            )
    for name in after:
        if name not in before:
            raise ExpansionError(f"after the expansion {name} appeared from nowhere; {_REMEDY}")
    check_complete(after)
    return sum(number is not None for numbers in expected.values() for number in numbers)


def check_complete(after: Fingerprints) -> None:
    """Every parameter has a master, and both moments as soon as any parameter has one; buffers have neither.

    Raises:
        ExpansionError: naming the first that is missing. It was missing before the expansion already.
    """
    trained = {name.split("/", 1)[1] for name in after if not name.startswith("weight/")}
    states = ["param", *(MOMENTS if any(name.startswith(MOMENTS) for name in after) else ())]
    for key in sorted(trained):
        for state in ("weight", *states):
            if f"{state}/{key}" not in after:
                raise ExpansionError(f"{key} has no {state}, before and after the expansion; {_REMEDY}")
