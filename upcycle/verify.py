"""Checks after an expansion that nothing was lost or changed, before the job goes on. Always on.

Compares layout-free fingerprints of the state before and after (`model/fingerprint.py`): every copy equals its parent
bit for bit in weights, masters and moments; everything that has no expert axis is untouched; every parameter that had
moments has them still.
"""

from collections.abc import Mapping
from typing import Any

from model.fingerprint import Fingerprints
from parallel.errors import ExpansionError
from upcycle.plan import ExpansionPlan


def expected_after(
    before: Fingerprints, plan: ExpansionPlan, experts: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[int | None]]:
    """What the fingerprints must be after the expansion; None for the selection bias of a replica that got noise.

    Args:
        before: fingerprints of the smaller stage.
        plan: the expansion.
        experts: keys with an expert axis (`model.sharded_state.expert_keys`).
    """
    expected: dict[str, list[int | None]] = {}
    for name, numbers in before.items():
        key = name.split("/", 1)[1]
        if key not in experts:
            expected[name] = list(numbers)
            continue
        layer = plan.layer(experts[key]["layer"])
        noised = set(layer.replicas()) if experts[key]["kind"] == "selection_bias" and plan.bias_noise else set()
        expected[name] = [None if new in noised else numbers[parent] for new, parent in enumerate(layer.parents)]
    return expected


def verify_expansion(
    before: Fingerprints, after: Fingerprints, plan: ExpansionPlan, experts: Mapping[str, Mapping[str, Any]]
) -> int:
    """Compare the state before and after an expansion.

    Returns:
        How many numbers were compared.

    Raises:
        ExpansionError: naming the first tensor, and expert, that is not what the plan says.
    """
    expected = expected_after(before, plan, experts)
    for name, numbers in expected.items():
        found = after.get(name)
        if found is None:
            raise ExpansionError(f"after the expansion {name} is gone; the stage before it is kept in its checkpoint")
        same = [a is None or a == b for a, b in zip(numbers, found, strict=False)]
        if not all(same) or len(found) != len(numbers):
            expert = same.index(False) if False in same else min(len(found), len(numbers))
            what = f"expert {expert} of {name}" if len(numbers) > 1 else name
            raise ExpansionError(
                f"after the expansion {what} differs from its parent; the stage before it is kept in its checkpoint"
            )
    for name in after:
        if name not in before:
            raise ExpansionError(f"after the expansion {name} appeared from nowhere; the old stage is kept")
    return sum(number is not None for numbers in expected.values() for number in numbers)
