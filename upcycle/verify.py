"""Checks after an expansion that nothing was lost or changed, before the job goes on. Always on.

Compares layout-free fingerprints of the state before and after (`model/fingerprint.py`): every copy equals its parent
bit for bit in weights, masters and moments; everything that has no expert axis is untouched; every parameter has its
master and, once there were any, both moments. Replicas whose moments were reset are named in a reset record and must be
zero. That the ranks' copies of one tensor agree is checked where fingerprints are taken.
"""

from collections.abc import Collection, Mapping
from typing import Any

from model.fingerprint import Fingerprints
from parallel.errors import ExpansionError
from parallel.optimizer_state import MOMENTS
from upcycle.plan import ExpansionPlan

_REMEDY = "the stage before it is kept in its checkpoint"


def expected_after(
    before: Fingerprints,
    plan: ExpansionPlan,
    experts: Mapping[str, Mapping[str, Any]],
    reset: Collection[str] = (),
) -> dict[str, list[int | None]]:
    """What the fingerprints must be after the expansion; None for the selection bias of a replica that got noise.

    Args:
        before: fingerprints of the smaller stage.
        plan: the expansion; parents in any order.
        experts: keys with an expert axis (`model.sharded_state.expert_keys`).
        reset: names (`exp_avg/<key>`) of moments whose replicas start from zero, which has the fingerprint 0.

    Raises:
        ExpansionError: if the reset record names what is no moment with an expert axis.
    """
    for name in sorted(reset):
        state, _, key = name.partition("/")
        if name not in before or state not in MOMENTS or key not in experts:
            raise ExpansionError(f"the reset record names {name}, which is no moment of an expert or a router")
    expected: dict[str, list[int | None]] = {}
    for name, numbers in before.items():
        key = name.split("/", 1)[1]
        if key not in experts:
            expected[name] = list(numbers)
            continue
        layer = plan.layer(experts[key]["layer"])
        rows: list[int | None] = [numbers[parent] for parent in layer.parents]
        noised = experts[key]["kind"] == "selection_bias" and plan.bias_noise != 0
        if noised or name in reset:
            for new in layer.replicas():
                rows[new] = None if noised else 0
        expected[name] = rows
    return expected


def verify_expansion(
    before: Fingerprints,
    after: Fingerprints,
    plan: ExpansionPlan,
    experts: Mapping[str, Mapping[str, Any]],
    reset: Collection[str] = (),
) -> int:
    """Compare the state before and after an expansion.

    Args:
        before: fingerprints of the smaller stage.
        after: fingerprints of the larger stage.
        plan: the expansion; parents in any order.
        experts: keys with an expert axis (`model.sharded_state.expert_keys`).
        reset: names (`exp_avg/<key>`) of moments whose replicas start from zero.

    Returns:
        How many numbers were compared.

    Raises:
        ExpansionError: naming the first tensor, and expert, that is not what the plan says.
    """
    expected = expected_after(before, plan, experts, reset)
    for name, numbers in expected.items():
        found = after.get(name)
        if found is None:
            raise ExpansionError(f"after the expansion {name} is gone; {_REMEDY}")
        same = [a is None or a == b for a, b in zip(numbers, found, strict=False)]
        if not all(same) or len(found) != len(numbers):
            expert = same.index(False) if False in same else min(len(found), len(numbers))
            what = f"expert {expert} of {name}" if len(numbers) > 1 else name
            replica = name in reset and expert in plan.layer(experts[name.split("/", 1)[1]]["layer"]).replicas()
            raise ExpansionError(
                f"after the expansion {what} {'is not zero' if replica else 'differs from its parent'}; {_REMEDY}"
            )
    for name in after:
        if name not in before:
            raise ExpansionError(f"after the expansion {name} appeared from nowhere; {_REMEDY}")
    _check_complete(after)
    return sum(number is not None for numbers in expected.values() for number in numbers)


def _check_complete(after: Fingerprints) -> None:
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
