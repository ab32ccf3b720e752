"""Under which names the figures of a run appear in a tracker: one table, from the keys of `metrics.jsonl` to groups.

Groups are what W&B and TensorBoard fold charts by. The part after the group is the key of `metrics.jsonl`, so that one finds
the other; docs/tracking.md defines the groups, docs/report.md the keys. A key that this table does not know is sent too.
"""

import functools
import numbers
import re
from collections.abc import Mapping
from typing import Any

# The first pattern that fits a whole key gives its name.
_NAMES = (
    # Already grouped, such as valid/NAME/loss.
    (r".*/.*", r"\g<0>"),
    (r"valid_(.*)", r"valid/\1"),
    (r"(grad|param)_norm.*", r"norm/\g<0>"),
    (r"(expert_load|dead_|family_load|router_|bias_).*", r"load/\g<0>"),
    (r".*_seconds", r"time/\g<0>"),
    (r"tokens_per_second|.*_bytes|tflops.*|mfu|.*_flops", r"throughput/\g<0>"),
    (r".*", r"train/\g<0>"),
)
_PATTERNS = tuple((re.compile(pattern), name) for pattern, name in _NAMES)


@functools.cache
def tracked_name(key: str) -> str:
    """The name of a figure in a tracker, such as `norm/grad_norm` for `grad_norm`."""
    for pattern, name in _PATTERNS:
        found = pattern.fullmatch(key)
        if found:
            return found.expand(name)
    # A key with a line break in it.
    return f"train/{key!r}"


def tracked_figures(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among some figures by their names in a tracker; what is no number, or is the step itself, stays out."""
    return {
        tracked_name(key): float(value)
        for key, value in values.items()
        if key != "step" and isinstance(value, numbers.Real)
    }
